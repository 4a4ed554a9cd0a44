//! Constants become initializers; nodes that do nothing go.

use super::{Computed, Evaluate, Folded, Step};
use crate::error::Result;
use crate::onnx::graph::label;
use crate::onnx::proto::*;
use crate::onnx::tensor::{from_bool, from_f32, from_i32, from_i64, ints, raw_len};
use crate::onnx::{Edit, Graph, Model, apply};
use std::collections::{HashMap, HashSet};

/// The largest constant that folding may make, in bytes, where its inputs are smaller: an `Expand` of one number over a
/// picture isn't worth storing.
const LARGEST: usize = 4 << 20;

/// Initializers that are listed as inputs too, as IR version 3 wants them, become plain constants.
pub(super) fn own_initializers(model: &mut Model) {
    let graph = model.graph_mut();
    let names: HashSet<&str> = graph.initializer.iter().map(TensorProto::name).collect();
    let keep: Vec<bool> = graph.input.iter().map(|i| !names.contains(i.name())).collect();
    if keep.iter().all(|&k| k) {
        return;
    }
    let mut keep = keep.into_iter();
    graph.input.retain(|_| keep.next().unwrap_or(true));
    model.proto.ir_version = Some(model.proto.ir_version().max(4));
}

/// `Constant` nodes become initializers of their output's name.
pub(super) fn lift(graph: &Graph) -> Result<Step> {
    let mut step = Step::default();
    for (id, node) in graph.nodes().filter(|(_, n)| n.is("Constant")) {
        let name = node.out();
        let read = !graph.consumers(name).is_empty() || graph.captured(name);
        let value = node.attribute.first().filter(|_| read && !graph.is_output(name)).and_then(|a| match a.name() {
            "value" => a.t.clone().map(|t| TensorProto { name: Some(name.to_owned()), ..t }),
            "value_float" => a.f.map(|v| from_f32(name, &[], &[v])),
            "value_floats" => Some(from_f32(name, &[a.floats.len()], &a.floats)),
            "value_int" => a.i.map(|v| from_i64(name, &[], &[v])),
            "value_ints" => Some(from_i64(name, &[a.ints.len()], &a.ints)),
            _ => None,
        });
        if let Some(tensor) = value {
            step.edits.extend([Edit::Remove(id), Edit::Initializer(tensor)]);
            step.into.push((label(node), None));
        }
    }
    Ok(step)
}

/// Whether a node hands its first input on as it is.
fn does_nothing(graph: &Graph, node: &NodeProto) -> Result<bool> {
    let unread = |name: &String| name.is_empty() || graph.consumers(name).is_empty() && graph.is_private(name);
    Ok(match node.op_type() {
        _ if node.input.first().is_none_or(String::is_empty) => false,
        "Identity" if node.is("Identity") => true,
        "Dropout" if node.is("Dropout") => {
            // Training mode is a third input from opset 12 on; before, inference was the only mode.
            let training = match node.input.get(2).filter(|n| !n.is_empty()) {
                None => false,
                Some(name) => match graph.constant(name) {
                    Some(flag) => ints(flag)?.iter().any(|&v| v != 0),
                    None => true,
                },
            };
            !training && node.output.iter().skip(1).all(unread)
        }
        "Cast" if node.is("Cast") => {
            let to = node.attr("to").and_then(|a| a.i);
            to.is_some() && graph.elem_type(&node.input[0]).map(|ty| i64::from(ty as i32)) == to
        }
        _ => false,
    })
}

/// Readers of a node that does nothing read its input instead.
pub(super) fn bypass(graph: &Graph) -> Result<Step> {
    let mut step = Step::default();
    // Where a tensor comes from, past the nodes that go in this step.
    let mut origin: HashMap<&str, &str> = HashMap::new();
    let mut renamed: HashSet<&str> = HashSet::new();
    for (id, node) in graph.nodes() {
        if !does_nothing(graph, node)? {
            continue;
        }
        let (input, output) = (node.input[0].as_str(), node.out());
        let source = *origin.get(input).unwrap_or(&input);
        if graph.is_private(output) {
            origin.insert(output, source);
        } else if graph.is_output(output)
            && !graph.captured(output)
            && graph.is_private(source)
            && let Some(producer) = graph.producer(source)
            && source == input
            && renamed.insert(source)
        {
            // The graph's output keeps its name: who made the input makes it directly.
            let slot = graph.node(producer).output.iter().position(|o| o == source).unwrap_or(0);
            step.edits.push(Edit::Output { node: producer, slot, to: output.to_owned() });
            origin.insert(source, output);
        } else {
            continue;
        }
        step.edits.push(Edit::Remove(id));
        let heir = graph.producer(source).map(|p| label(graph.node(p)));
        step.into.push((label(node), heir));
    }
    for (id, node) in graph.nodes() {
        for (slot, name) in node.input.iter().enumerate() {
            let mut to = name.as_str();
            while let Some(&next) = origin.get(to) {
                to = next;
            }
            if to != name {
                step.edits.push(Edit::Input { node: id, slot, to: to.to_owned() });
            }
        }
    }
    Ok(step)
}

/// Nodes that nothing reads.
pub(super) fn prune(graph: &Graph) -> Result<Step> {
    let mut step = Step::default();
    let mut dead: HashSet<usize> = HashSet::new();
    let nodes: Vec<(usize, &NodeProto)> = graph.nodes().collect();
    for &(id, node) in nodes.iter().rev() {
        let read = |name: &&String| {
            !name.is_empty()
                && (!graph.is_private(name) || graph.consumers(name).iter().any(|(reader, _)| !dead.contains(reader)))
        };
        if !node.output.iter().any(|name| read(&name)) {
            dead.insert(id);
            step.edits.push(Edit::Remove(id));
            step.into.push((label(node), None));
        }
    }
    Ok(step)
}

/// Operators whose result isn't a function of their inputs' values, or that must stay: because they are what is
/// quantized, or because engines don't agree on how to interpolate.
const KEPT: [&str; 13] = [
    "Resize",
    "Upsample",
    "GridSample",
    "QuantizeLinear",
    "DequantizeLinear",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
    "Dropout",
    "Optional",
];

/// Inputs whose values (not only shapes) decide the shape of an operator's result; `None` if others do, too.
fn shaping(op: &str, inputs: usize) -> Option<std::ops::Range<usize>> {
    Some(match op {
        "Reshape" | "Expand" | "Tile" | "Unsqueeze" | "Squeeze" | "TopK" | "Split" | "OneHot" => 1..inputs.min(2),
        "Slice" | "Pad" | "Resize" | "Upsample" | "CenterCropPad" => 1..inputs,
        "Range" | "ConstantOfShape" | "EyeLike" => 0..inputs,
        _ if op.starts_with("Reduce") => 1..inputs,
        "NonZero" | "Unique" | "NonMaxSuppression" | "Compress" | "If" | "Loop" | "Scan" | "StringSplit" => {
            return None;
        }
        _ if op.starts_with("Sequence") || op.starts_with("Optional") || op.ends_with("Sequence") => return None,
        _ => 0..0,
    })
}

/// Replaces nodes over constants, and shapes that are fixed, by what the executor computes for them.
pub(super) fn compute(model: &mut Model, folded: &mut Folded, evaluate: Evaluate) -> Result<usize> {
    let graph = Graph::new(model.graph())?;
    let standard = |node: &NodeProto| matches!(node.domain(), "" | "ai.onnx");
    let mut values: HashSet<&str> = model.graph().initializer.iter().map(TensorProto::name).collect();
    let mut shapes: HashSet<&str> = values.clone();
    for input in &model.graph().input {
        if graph.shape(input.name()).is_some_and(|s| s.iter().all(|d| d.is_some_and(|d| d >= 0))) {
            shapes.insert(input.name());
        }
    }
    let mut constant: HashSet<usize> = HashSet::new();
    for (id, node) in graph.nodes() {
        let plain = standard(node) && node.attribute.iter().all(|a| a.g.is_none() && a.graphs.is_empty());
        if !plain {
            continue;
        }
        let given: Vec<&String> = node.input.iter().filter(|n| !n.is_empty()).collect();
        let of_shape = node.is("Shape") || node.is("Size");
        let known = match of_shape {
            true => given.iter().all(|n| shapes.contains(n.as_str())),
            false => given.iter().all(|n| values.contains(n.as_str())),
        };
        let outputs = || node.output.iter().map(String::as_str).filter(|n| !n.is_empty());
        if known && !KEPT.contains(&node.op_type()) {
            constant.insert(id);
            values.extend(outputs());
        }
        let fixed = shaping(node.op_type(), node.input.len()).is_some_and(|mut slots| {
            slots.all(|slot| node.input[slot].is_empty() || values.contains(node.input[slot].as_str()))
        });
        if fixed && given.iter().all(|n| shapes.contains(n.as_str())) {
            shapes.extend(outputs());
        }
    }
    let mut wanted: Vec<String> = Vec::new();
    for (_, node) in graph.nodes().filter(|(id, _)| constant.contains(id)) {
        for name in node.output.iter().filter(|n| !n.is_empty()) {
            let leaves = graph.consumers(name).iter().any(|(reader, _)| !constant.contains(reader));
            if (leaves || graph.captured(name)) && !graph.is_output(name) {
                wanted.push(name.clone());
            }
        }
    }
    if wanted.is_empty() {
        return Ok(0);
    }
    let types = types(&graph, &constant);
    let results = evaluate(model, &wanted)?;
    let mut replaced: HashMap<String, TensorProto> = HashMap::new();
    for (name, result) in wanted.iter().zip(results) {
        let Some(tensor) = typed(name, types.get(name.as_str()).copied(), result) else { continue };
        if raw_len(&tensor)?.is_some_and(|bytes| bytes <= LARGEST || bytes <= input_bytes(&graph, tensor.name())) {
            replaced.insert(tensor.name().to_owned(), tensor);
        }
    }
    let mut edits = Vec::new();
    for (id, node) in graph.nodes().filter(|(id, _)| constant.contains(id)) {
        let made = node.output.iter().filter(|n| !n.is_empty());
        if made.clone().any(|n| replaced.contains_key(n))
            && made.clone().all(|n| !wanted.contains(n) || replaced.contains_key(n))
        {
            let outside = made.clone().any(|n| graph.is_output(n));
            if !outside {
                edits.push(Edit::Remove(id));
                edits.extend(made.filter_map(|n| replaced.get(n).cloned()).map(Edit::Initializer));
                folded.into.insert(label(node), None);
            }
        }
    }
    let count = edits.iter().filter(|e| matches!(e, Edit::Initializer(_))).count();
    apply(model.graph_mut(), edits)?;
    let step = prune(&Graph::new(model.graph())?)?;
    apply(model.graph_mut(), step.edits)?;
    folded.into.extend(step.into);
    Ok(count)
}

/// Bytes of the constants that the node of a tensor reads.
fn input_bytes(graph: &Graph, tensor: &str) -> usize {
    let Some(producer) = graph.producer(tensor) else { return 0 };
    let constants = graph.node(producer).input.iter().filter_map(|n| graph.constant(n));
    constants.filter_map(|t| raw_len(t).ok().flatten()).sum()
}

/// Element types of what constant nodes make, where their operators tell.
fn types<'a>(graph: &Graph<'a>, constant: &HashSet<usize>) -> HashMap<&'a str, DataType> {
    let mut types: HashMap<&str, DataType> = HashMap::new();
    for (_, node) in graph.nodes().filter(|(id, _)| constant.contains(id)) {
        let given = |slot: usize| {
            let name = node.arg(slot);
            types.get(name).copied().or_else(|| graph.elem_type(name))
        };
        let attribute = |name: &str| node.attr(name).and_then(|a| a.i).and_then(|i| DataType::try_from(i as i32).ok());
        let ty = match node.op_type() {
            "Shape" | "Size" | "ArgMax" | "ArgMin" | "NonZero" => Some(DataType::Int64),
            "Cast" => attribute("to"),
            "CastLike" | "Where" => given(1),
            "OneHot" => given(2),
            "EyeLike" => attribute("dtype").or_else(|| given(0)),
            "ConstantOfShape" => match node.attr("value").and_then(|a| a.t.as_ref()) {
                Some(value) => Some(value.data_type()),
                None => Some(DataType::Float),
            },
            "Equal" | "Less" | "LessOrEqual" | "Greater" | "GreaterOrEqual" | "And" | "Or" | "Xor" | "Not"
            | "IsNaN" | "IsInf" => Some(DataType::Bool),
            _ => given(0),
        };
        let Some(ty) = ty else { continue };
        for (slot, name) in node.output.iter().enumerate().filter(|(_, n)| !n.is_empty()) {
            let second = slot == 1 && (node.is("TopK") || node.is("MaxPool"));
            types.insert(name, if second { DataType::Int64 } else { ty });
        }
    }
    types
}

/// A computed tensor in its element type; `None` where that isn't known, or the numbers may have been cut to 32 bits.
fn typed(name: &str, ty: Option<DataType>, computed: Computed) -> Option<TensorProto> {
    match (ty?, computed) {
        (DataType::Float, Computed::Floats { dims, values }) => Some(from_f32(name, &dims, &values)),
        (DataType::Int32, Computed::Ints { dims, values }) => Some(from_i32(name, &dims, &values)),
        (DataType::Int64, Computed::Ints { dims, values }) => {
            let whole = values.iter().all(|&v| v != i32::MAX && v != i32::MIN);
            whole.then(|| from_i64(name, &dims, &values.iter().map(|&v| i64::from(v)).collect::<Vec<_>>()))
        }
        (DataType::Bool, Computed::Ints { dims, values }) => {
            Some(from_bool(name, &dims, &values.iter().map(|&v| v != 0).collect::<Vec<_>>()))
        }
        _ => None,
    }
}
