//! Parts of graphs: what makes a tensor out of others, as a branch of another graph, and what is left after a tensor.
//!
//! ```text
//! x --+-> layer -------------> y -> rest -> outputs       the float graph
//!     '-> Q -> DQ -> layer --> y#      (the branch: the same layer in integers)
//! ```
//! With `y` replaced by `y#` only the rest has to be computed, which is how one layer's effect is found.

use super::graph::label;
use super::plan::{Decision, Plan};
use super::proto::NodeProto;
use super::tensor::{from_f32, ints, scalar};
use super::{Calibration, Edit, Folded, Graph, Model, Selector, Settings, plan, qdq};
use crate::QuantError;
use crate::error::Result;
use crate::observer::QParams;
use std::collections::{BTreeMap, BTreeSet};

/// What has to be computed anew when tensors change.
#[derive(Debug, Clone, PartialEq)]
pub struct Rest {
    /// Tensors that it reads, beside those that change.
    pub feeds: Vec<String>,
    /// The graph's outputs that it makes, in the graph's order.
    pub outputs: Vec<String>,
}

/// What of a graph depends on tensors and leads to an output. A tensor that changes and depends on another one that does
/// is taken as it is given.
pub fn rest<'a>(graph: &'a Graph, tensors: &'a [String]) -> Rest {
    let given: BTreeSet<&str> = tensors.iter().map(String::as_str).collect();
    let mut changed = given.clone();
    let mut touched = Vec::new();
    for (_, node) in graph.nodes() {
        if node.input.iter().any(|name| changed.contains(name.as_str())) {
            changed.extend(node.output.iter().map(String::as_str));
            touched.push(node);
        }
    }
    let outputs: Vec<String> =
        graph.proto.output.iter().map(|o| o.name().to_owned()).filter(|n| changed.contains(n.as_str())).collect();
    let mut needed: BTreeSet<&str> = outputs.iter().map(String::as_str).collect();
    let mut feeds = BTreeSet::new();
    for node in touched.into_iter().rev() {
        if !node.output.iter().any(|name| needed.contains(name.as_str())) {
            continue;
        }
        for name in node.input.iter().filter(|name| !name.is_empty() && graph.constant(name).is_none()) {
            if given.contains(name.as_str()) {
                continue;
            }
            match changed.contains(name.as_str()) {
                true => drop(needed.insert(name)),
                false => drop(feeds.insert(name.clone())),
            }
        }
    }
    Rest { feeds: feeds.into_iter().collect(), outputs }
}

/// A branch, and the tensors it ends in.
#[derive(Debug, Clone, PartialEq)]
pub struct Branch {
    /// What adds it to a graph.
    pub edits: Vec<Edit>,
    /// What it makes, in the order in which it was asked for.
    pub makes: Vec<String>,
}

/// The nodes that make the tensors of `to`, under other names (with `prefix` before them), for a graph in which the tensors of `from`
/// go by the names given there. Nothing before those tensors is taken along.
///
/// # Errors
/// They also need an input of the graph that isn't in `from`.
pub fn branch(graph: &Graph, from: &BTreeMap<String, String>, to: &[String], prefix: &str) -> Result<Branch> {
    let renamed = |name: &str| match (name, from.get(name)) {
        ("", _) => String::new(),
        (_, Some(other)) => other.clone(),
        _ => format!("{prefix}{name}"),
    };
    let mut edits = Vec::new();
    let mut open: Vec<&str> = to.iter().map(String::as_str).collect();
    let mut done: BTreeSet<&str> = BTreeSet::new();
    let mut copied = BTreeSet::new();
    while let Some(name) = open.pop() {
        if name.is_empty() || from.contains_key(name) || !done.insert(name) {
            continue;
        }
        if let Some(tensor) = graph.constant(name) {
            let mut tensor = tensor.clone();
            tensor.name = Some(renamed(name));
            edits.push(Edit::Initializer(tensor));
            continue;
        }
        let Some(id) = graph.producer(name) else {
            let why = format!("is needed for `{}`, and isn't among what its branch starts from", to.join("`, `"));
            return Err(QuantError::Tensor { name: name.into(), why });
        };
        let node = graph.node(id);
        open.extend(node.input.iter().map(String::as_str));
        // A node of two outputs is met by each of them.
        if !copied.insert(id) {
            continue;
        }
        let copy = NodeProto {
            name: Some(format!("{prefix}{}", label(node))),
            input: node.input.iter().map(|n| renamed(n)).collect(),
            output: node.output.iter().map(|n| renamed(n)).collect(),
            ..node.clone()
        };
        edits.push(Edit::Add(copy));
    }
    Ok(Branch { edits, makes: to.iter().map(|name| renamed(name)).collect() })
}

/// What readers of a layer's output read in a quantized graph: the output, or what its integers mean.
pub fn rounded(quantized: &Graph, plan: &Plan, output: &str) -> String {
    if !plan.made.contains(output) {
        return output.to_owned();
    }
    let step = |name: &str, op: &str| {
        let readers = quantized.consumers(name).iter().map(|&(id, _)| quantized.node(id));
        readers.into_iter().find(|n| n.op_type() == op).map(|n| n.out().to_owned())
    };
    let codes = step(output, "QuantizeLinear");
    let limited = codes.as_ref().map(|codes| step(codes, "Clip").unwrap_or_else(|| codes.clone()));
    limited.and_then(|codes| step(&codes, "DequantizeLinear")).unwrap_or_else(|| output.to_owned())
}

/// What a tensor is in a quantized graph before it is rounded.
fn exact(quantized: &Graph, name: &str) -> String {
    let mut at = name.to_owned();
    for op in ["DequantizeLinear", "Clip", "QuantizeLinear"] {
        let maker = quantized.producer(&at).map(|id| quantized.node(id)).filter(|n| n.op_type() == op);
        match maker {
            Some(node) => at = node.arg(0).to_owned(),
            None if op == "Clip" => {}
            None => return at,
        }
    }
    at
}

/// Scale and zero point of a tensor in a quantized graph, if it has any.
///
/// # Errors
/// Constants whose bytes don't fit their shape.
pub fn params(quantized: &Graph, name: &str) -> Result<Option<QParams>> {
    let source = exact(quantized, name);
    let mut readers = quantized.consumers(&source).iter().map(|&(id, _)| quantized.node(id));
    let Some(node) = readers.find(|n| n.op_type() == "QuantizeLinear") else { return Ok(None) };
    let constants = (quantized.constant(node.arg(1)), quantized.constant(node.arg(2)));
    let (Some(scale), Some(zero)) = constants else { return Ok(None) };
    let zero_point = ints(zero)?.first().copied().unwrap_or_default() as i32;
    Ok(Some(QParams { scale: scalar(scale)?, zero_point }))
}

/// Planned layers in integers, everything around them in float: a branch of the float model. None of them may read what
/// another one makes.
///
/// # Errors
/// As [`qdq::quantize`].
pub fn in_integers(
    model: &Model,
    settings: &Settings,
    folded: &Folded,
    calibration: &Calibration,
    ids: &[usize],
    prefix: &str,
) -> Result<Branch> {
    let graph = Graph::new(model.graph())?;
    let named = |&id: &usize| format!("name:{}", label(graph.node(id))).parse::<Selector>();
    let settings = Settings { include: ids.iter().map(named).collect::<Result<_>>()?, ..settings.clone() };
    let own = plan(model, &settings, folded)?;
    let quantized = qdq::quantize(model, &own, calibration)?;
    let after = Graph::new(quantized.graph())?;
    let from = ids.iter().flat_map(|&id| own.inputs(&graph, id)).map(|name| (name.clone(), name)).collect();
    let to: Vec<String> = ids.iter().map(|&id| rounded(&after, &own, &own.output(&graph, id))).collect();
    branch(&after, &from, &to, prefix)
}

/// Planned layers in float in the midst of a quantized model: a branch of that. They read what their inputs are before
/// those are rounded, and their outputs aren't rounded either. None of them may read what another one makes.
///
/// # Errors
/// As [`branch`].
pub fn in_float(model: &Model, plan: &Plan, quantized: &Graph, ids: &[usize], prefix: &str) -> Result<Branch> {
    let graph = Graph::new(model.graph())?;
    let mut from = BTreeMap::new();
    let mut edits = Vec::new();
    let inputs: BTreeSet<String> = ids.iter().flat_map(|&id| plan.inputs(&graph, id)).collect();
    for name in inputs {
        let mut source = exact(quantized, &name);
        let root = plan.scales.get(&name).unwrap_or(&name);
        let maker = graph.producer(root).and_then(|id| plan.nodes.get(id));
        if let Some(Decision::Merged(clip)) = maker.map(|n| &n.decision) {
            // The range took the Clip's place; without rounding there has to be one again.
            let names = ["lo", "hi", "clipped"].map(|part| format!("{prefix}{name}_{part}"));
            let ends = [clip.lo, clip.hi].map(|v| v.clamp(f32::MIN, f32::MAX));
            edits.extend([0, 1].map(|i| Edit::Initializer(from_f32(&names[i], &[], &[ends[i]]))));
            edits.push(Edit::Add(NodeProto::new("Clip", &names[2], &[&source, &names[0], &names[1]], &[&names[2]])));
            source = names[2].clone();
        }
        from.insert(name, source);
    }
    let to: Vec<String> = ids.iter().map(|&id| plan.output(&graph, id)).collect();
    let own = branch(&graph, &from, &to, prefix)?;
    edits.extend(own.edits);
    Ok(Branch { edits, makes: own.makes })
}

impl Plan {
    /// The activations that a node reads that is quantized, or whose weight is.
    pub fn inputs(&self, graph: &Graph, id: usize) -> Vec<String> {
        let node = graph.node(id);
        let slots = self.rounded(id).map(|kind| kind.data_slots(node)).unwrap_or(0..0);
        slots.map(|slot| node.arg(slot).to_owned()).filter(|name| graph.constant(name).is_none()).collect()
    }

    /// What a quantized node makes, with the bias after it, and the Relu or Clip that its range stands for.
    pub fn output(&self, graph: &Graph, id: usize) -> String {
        match (self.outputs.get(&id), self.rounded(id)) {
            (Some(name), _) => name.clone(),
            (None, Some(super::plan::Kind::Linear { bias: Some((add, _)) })) => graph.node(*add).out().to_owned(),
            _ => graph.node(id).out().to_owned(),
        }
    }
}
