//! An index over a graph: who makes a tensor, who reads it, what is constant.
//!
//! Nodes are named by their position in [`GraphProto::node`]. Sub-graphs (`If`, `Loop`, `Scan` bodies) are left alone,
//! but the outer tensors they read count as read ([`Graph::captured`]), so that nobody removes or renames those.

use super::proto::*;
use crate::QuantError;
use crate::error::Result;
use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap, HashSet};

impl NodeProto {
    /// A node of ONNX's own domain.
    pub fn new(op: &str, name: &str, inputs: &[&str], outputs: &[&str]) -> Self {
        let owned = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect();
        Self {
            op_type: Some(op.to_owned()),
            name: Some(name.to_owned()),
            input: owned(inputs),
            output: owned(outputs),
            ..Default::default()
        }
    }

    /// The node with an attribute more.
    pub fn with(mut self, attribute: AttributeProto) -> Self {
        self.attribute.push(attribute);
        self
    }

    /// Whether it is this operator of ONNX's own domain.
    pub fn is(&self, op: &str) -> bool {
        self.op_type() == op && matches!(self.domain(), "" | "ai.onnx")
    }

    /// An attribute by name.
    pub fn attr(&self, name: &str) -> Option<&AttributeProto> {
        self.attribute.iter().find(|a| a.name() == name)
    }

    /// An integer attribute, or what it is by default.
    pub fn int(&self, name: &str, default: i64) -> i64 {
        self.attr(name).and_then(|a| a.i).unwrap_or(default)
    }

    /// A float attribute, or what it is by default.
    pub fn float(&self, name: &str, default: f32) -> f32 {
        self.attr(name).and_then(|a| a.f).unwrap_or(default)
    }

    /// An input's name; `""` if it is left out.
    pub fn arg(&self, slot: usize) -> &str {
        self.input.get(slot).map_or("", String::as_str)
    }

    /// The first output's name; `""` if there is none.
    pub fn out(&self) -> &str {
        self.output.first().map_or("", String::as_str)
    }
}

impl AttributeProto {
    /// An integer attribute.
    pub fn new_int(name: &str, value: i64) -> Self {
        Self { name: Some(name.into()), i: Some(value), r#type: Some(AttributeType::Int as i32), ..Default::default() }
    }

    /// A float attribute.
    pub fn new_float(name: &str, value: f32) -> Self {
        Self {
            name: Some(name.into()),
            f: Some(value),
            r#type: Some(AttributeType::Float as i32),
            ..Default::default()
        }
    }

    /// A list of integers.
    pub fn new_ints(name: &str, values: &[i64]) -> Self {
        let ty = Some(AttributeType::Ints as i32);
        Self { name: Some(name.into()), ints: values.to_vec(), r#type: ty, ..Default::default() }
    }
}

/// The index of a graph.
#[derive(Debug)]
pub struct Graph<'a> {
    /// What is indexed.
    pub proto: &'a GraphProto,
    producers: HashMap<&'a str, usize>,
    consumers: HashMap<&'a str, Vec<(usize, usize)>>,
    constants: HashMap<&'a str, &'a TensorProto>,
    types: HashMap<&'a str, &'a TypeProto>,
    outputs: HashSet<&'a str>,
    captured: HashSet<&'a str>,
}

fn tensor_error(name: &str, why: impl Into<String>) -> QuantError {
    QuantError::Tensor { name: name.to_owned(), why: why.into() }
}

/// What a node is called in errors and plans: its name, or its operator and first output.
pub fn label(node: &NodeProto) -> String {
    match node.name() {
        "" => format!("{} -> {}", node.op_type(), node.out()),
        name => name.to_owned(),
    }
}

/// Tensors of outer graphs that a node's sub-graphs read.
fn captures<'a>(node: &'a NodeProto, found: &mut Vec<&'a str>) {
    for graph in node.attribute.iter().flat_map(|a| a.g.iter().chain(&a.graphs)) {
        let mut own: HashSet<&str> = graph.input.iter().map(ValueInfoProto::name).collect();
        own.extend(graph.initializer.iter().map(TensorProto::name));
        own.extend(graph.node.iter().flat_map(|n| &n.output).map(String::as_str));
        let mut read: Vec<&str> = graph.node.iter().flat_map(|n| &n.input).map(String::as_str).collect();
        read.extend(graph.output.iter().map(ValueInfoProto::name));
        graph.node.iter().for_each(|n| captures(n, &mut read));
        found.extend(read.into_iter().filter(|name| !name.is_empty() && !own.contains(name)));
    }
}

impl<'a> Graph<'a> {
    /// Indexes a graph and checks it.
    ///
    /// # Errors
    /// A tensor that is made twice, read before it is made, or never made; each by name.
    pub fn new(proto: &'a GraphProto) -> Result<Self> {
        let mut graph = Self {
            proto,
            producers: HashMap::new(),
            consumers: HashMap::new(),
            constants: proto.initializer.iter().map(|t| (t.name(), t)).collect(),
            types: HashMap::new(),
            outputs: proto.output.iter().map(ValueInfoProto::name).collect(),
            captured: HashSet::new(),
        };
        for info in proto.value_info.iter().chain(&proto.input).chain(&proto.output) {
            if let Some(ty) = &info.r#type {
                graph.types.insert(info.name(), ty);
            }
        }
        let mut known: HashSet<&str> = proto.input.iter().map(ValueInfoProto::name).collect();
        known.extend(proto.initializer.iter().map(TensorProto::name));
        known.extend(proto.sparse_initializer.iter().filter_map(|s| s.values.as_ref()).map(TensorProto::name));
        if graph.constants.len() != proto.initializer.len() {
            let mut seen = HashSet::new();
            let twice = proto.initializer.iter().map(TensorProto::name).find(|name| !seen.insert(*name));
            return Err(tensor_error(twice.unwrap_or_default(), "two initializers of this name"));
        }
        for (id, node) in proto.node.iter().enumerate() {
            for (slot, name) in node.input.iter().enumerate().filter(|(_, name)| !name.is_empty()) {
                if !known.contains(name.as_str()) {
                    let why = format!("read by node `{}`, and no node before it makes it", label(node));
                    return Err(tensor_error(name, why));
                }
                graph.consumers.entry(name).or_default().push((id, slot));
            }
            let mut outer = Vec::new();
            captures(node, &mut outer);
            if let Some(name) = outer.iter().find(|name| !known.contains(*name)) {
                let why = format!("read inside of node `{}`, and no node before it makes it", label(node));
                return Err(tensor_error(name, why));
            }
            graph.captured.extend(outer);
            for name in node.output.iter().filter(|name| !name.is_empty()) {
                if !known.insert(name) {
                    return Err(tensor_error(
                        name,
                        format!("made by node `{}`, and by something before it", label(node)),
                    ));
                }
                graph.producers.insert(name, id);
            }
        }
        if let Some(name) = graph.outputs.iter().find(|name| !known.contains(*name)) {
            return Err(tensor_error(name, "an output of the graph that no node makes"));
        }
        Ok(graph)
    }

    /// A node by position.
    pub fn node(&self, id: usize) -> &'a NodeProto {
        &self.proto.node[id]
    }

    /// The nodes with their positions.
    pub fn nodes(&self) -> impl Iterator<Item = (usize, &'a NodeProto)> + use<'a> {
        self.proto.node.iter().enumerate()
    }

    /// Position of the node that makes a tensor; `None` for inputs and initializers.
    pub fn producer(&self, tensor: &str) -> Option<usize> {
        self.producers.get(tensor).copied()
    }

    /// The nodes that read a tensor, with the input it is for them.
    pub fn consumers(&self, tensor: &str) -> &[(usize, usize)] {
        self.consumers.get(tensor).map_or(&[], Vec::as_slice)
    }

    /// The one node that reads a tensor, if nothing else does: no other node, sub-graph or output of the graph.
    pub fn sole_consumer(&self, tensor: &str) -> Option<usize> {
        match self.consumers(tensor) {
            [(id, _)] if self.is_private(tensor) => Some(*id),
            _ => None,
        }
    }

    /// Whether only nodes of this graph read it: it can be renamed or removed.
    pub fn is_private(&self, tensor: &str) -> bool {
        !self.is_output(tensor) && !self.captured(tensor)
    }

    /// Whether a sub-graph reads it.
    pub fn captured(&self, tensor: &str) -> bool {
        self.captured.contains(tensor)
    }

    /// Whether it is an output of the graph.
    pub fn is_output(&self, tensor: &str) -> bool {
        self.outputs.contains(tensor)
    }

    /// An initializer.
    pub fn constant(&self, name: &str) -> Option<&'a TensorProto> {
        self.constants.get(name).copied()
    }

    /// A tensor's element type, where the file says it.
    pub fn elem_type(&self, tensor: &str) -> Option<DataType> {
        if let Some(constant) = self.constant(tensor) {
            return Some(constant.data_type());
        }
        match self.types.get(tensor)?.value.as_ref()? {
            TypeValue::Tensor(ty) => Some(ty.elem_type()),
            _ => None,
        }
    }

    /// A tensor's shape, where the file says it; unknown and symbolic dimensions are `None`.
    pub fn shape(&self, tensor: &str) -> Option<Vec<Option<i64>>> {
        if let Some(constant) = self.constant(tensor) {
            return Some(constant.dims.iter().map(|&d| Some(d)).collect());
        }
        let Some(TypeValue::Tensor(TensorType { shape: Some(shape), .. })) = &self.types.get(tensor)?.value else {
            return None;
        };
        let known = |dim: &Dimension| match dim.value {
            Some(DimensionValue::Value(v)) => Some(v),
            _ => None,
        };
        Some(shape.dim.iter().map(known).collect())
    }

    /// All names in use, for new ones to differ from.
    pub fn names(&self) -> BTreeSet<String> {
        let mut names: BTreeSet<String> = self.proto.node.iter().map(|n| n.name().to_owned()).collect();
        names.extend(self.proto.node.iter().flat_map(|n| n.output.iter().cloned()));
        names.extend(self.constants.keys().map(|&n| n.to_owned()));
        names.extend(self.proto.input.iter().map(|i| i.name().to_owned()));
        names
    }
}

/// `wanted`, or with the first number appended that makes it new; the result counts as taken from then on.
pub fn fresh(names: &mut BTreeSet<String>, wanted: &str) -> String {
    let mut name = wanted.to_owned();
    let mut n = 1;
    while !names.insert(name.clone()) {
        name = format!("{wanted}_{n}");
        n += 1;
    }
    name
}

/// Orders nodes so that each comes after those whose outputs it reads, otherwise as they were.
///
/// # Errors
/// A cycle, by the name of a node in it.
pub fn sort(graph: &mut GraphProto) -> Result<()> {
    let mut producers: HashMap<&str, usize> = HashMap::new();
    for (id, node) in graph.node.iter().enumerate() {
        producers.extend(node.output.iter().filter(|o| !o.is_empty()).map(|o| (o.as_str(), id)));
    }
    let mut waits = vec![0usize; graph.node.len()];
    let mut feeds = vec![Vec::new(); graph.node.len()];
    for (id, node) in graph.node.iter().enumerate() {
        let mut read: Vec<&str> = node.input.iter().map(String::as_str).collect();
        captures(node, &mut read);
        let sources: BTreeSet<usize> = read.iter().filter_map(|name| producers.get(name).copied()).collect();
        waits[id] = sources.len();
        sources.into_iter().for_each(|source| feeds[source].push(id));
    }
    let mut ready: BinaryHeap<Reverse<usize>> = (0..waits.len()).filter(|&id| waits[id] == 0).map(Reverse).collect();
    let mut order = Vec::with_capacity(waits.len());
    while let Some(Reverse(id)) = ready.pop() {
        order.push(id);
        for &next in &feeds[id] {
            waits[next] -= 1;
            if waits[next] == 0 {
                ready.push(Reverse(next));
            }
        }
    }
    if let Some(stuck) = (0..waits.len()).find(|&id| waits[id] > 0) {
        let node = &graph.node[stuck];
        return Err(tensor_error(node.out(), format!("node `{}` waits for its own output", label(node))));
    }
    if order.windows(2).any(|pair| pair[0] > pair[1]) {
        let mut nodes: Vec<Option<NodeProto>> = std::mem::take(&mut graph.node).into_iter().map(Some).collect();
        graph.node = order.into_iter().filter_map(|id| nodes[id].take()).collect();
    }
    Ok(())
}
