//! Operator set versions: what a model imports, and moving it up to one that has what quantization needs.
//!
//! Per-channel scales came with opset 13, blocks of values with a scale each and 4-bit integers with 21. Both and 18
//! moved attributes to inputs; a few operators mean something else in newer sets. Everything else means the same there.

use super::graph::{fresh, label};
use super::proto::*;
use super::tensor::{from_f32, from_i64};
use super::{Graph, Model};
use crate::QuantError;
use crate::error::Result;

/// The first opset whose QuantizeLinear has an axis.
pub const PER_CHANNEL: i64 = 13;
/// The first opset whose DequantizeLinear has blocks.
pub const BLOCKS: i64 = 21;
/// The opset since which reductions take their axes as an input, and a Split says how many outputs it has.
const AXES_AS_INPUT: i64 = 18;

/// Reductions whose axes moved with opset 18 (those of ReduceSum did with 13).
const REDUCTIONS: [&str; 9] = [
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSumSquare",
];

/// Operators that mean something else since an opset.
const CHANGED: [(&str, i64); 4] = [("RoiAlign", 16), ("GridSample", 20), ("DFT", 20), ("GroupNormalization", 21)];

impl Model {
    /// Sees to it that an operator set is imported, at this version at least.
    pub fn import(&mut self, domain: &str, version: i64) {
        let canonical = |d: &str| if d == "ai.onnx" { "" } else { d }.to_owned();
        let wanted = canonical(domain);
        match self.proto.opset_import.iter_mut().find(|o| canonical(o.domain()) == wanted) {
            Some(found) => found.version = Some(found.version().max(version)),
            None => self
                .proto
                .opset_import
                .push(OperatorSetIdProto { domain: Some(domain.to_owned()), version: Some(version) }),
        }
    }
}

/// Moves a model up to opset 13 if it is below.
///
/// # Errors
/// As [`raise`].
pub fn upgrade(model: &mut Model) -> Result<bool> {
    raise(model, PER_CHANNEL)
}

/// Moves a model up to an opset (13 to 21) if it is below, nodes of its main graph rewritten where their meaning moved.
///
/// # Errors
/// A model without ONNX's own operators or below opset 11, one with sub-graphs or functions (their nodes aren't
/// rewritten), a Softmax over several dimensions at once, which opset 13 doesn't have, or an operator that means something
/// else there.
pub fn raise(model: &mut Model, to: i64) -> Result<bool> {
    let refuse = |why: String| QuantError::Spec { what: "operator set".into(), why };
    let Some(version) = model.opset("") else {
        return Err(refuse("the model imports no operators of ONNX itself".into()));
    };
    if version >= to {
        return Ok(false);
    }
    if version < 11 {
        return Err(refuse(format!("version {version}; 11 and later are understood")));
    }
    // A set is passed on the way if it is newer than the model's and not newer than the one that is wanted.
    let passed = |set: i64| version < set && set <= to;
    let index = Graph::new(model.graph())?;
    let mut names = index.names();
    let nested = |n: &NodeProto| n.attribute.iter().any(|a| a.g.is_some() || !a.graphs.is_empty());
    if let Some((_, node)) = index.nodes().find(|(_, n)| nested(n)) {
        let name = label(node);
        return Err(refuse(format!(
            "version {version} with sub-graphs (node `{name}`); export the model with {to} or later"
        )));
    }
    if !model.proto.functions.is_empty() {
        return Err(refuse(format!("version {version} with functions; export the model with {to} or later")));
    }
    let mut ranks: Vec<Option<usize>> = Vec::new();
    for (_, node) in index.nodes() {
        ranks.push(index.shape(node.arg(0)).map(|s| s.len()));
    }
    let graph = model.graph_mut();
    let mut constants = Vec::new();
    for (node, rank) in graph.node.iter_mut().zip(ranks) {
        if !matches!(node.domain(), "" | "ai.onnx") {
            continue;
        }
        let mut to_input = |node: &mut NodeProto, attribute: &str, slot: usize, float: bool| {
            let Some(at) = node.attribute.iter().position(|a| a.name() == attribute) else { return };
            let old = node.attribute.remove(at);
            let name = fresh(&mut names, &format!("{}_{attribute}", label(node)));
            constants.push(match float {
                true => from_f32(&name, &[], &[old.f.unwrap_or(0.0)]),
                false => from_i64(&name, &[old.ints.len()], &old.ints),
            });
            node.input.resize(slot.max(node.input.len()), String::new());
            match node.input.get_mut(slot) {
                Some(input) => *input = name,
                None => node.input.push(name),
            }
        };
        let op = node.op_type().to_owned();
        let elsewhere = CHANGED.iter().any(|&(name, set)| op == name && passed(set))
            || op == "BatchNormalization" && node.output.len() > 1 && passed(14)
            || op == "Resize"
                && node.attr("coordinate_transformation_mode").and_then(|a| a.s.as_deref())
                    == Some(b"tf_half_pixel_for_nn")
                && passed(AXES_AS_INPUT);
        if elsewhere {
            let why = format!("node `{}` ({op}) means something else in version {to}; export with that", label(node));
            return Err(refuse(why));
        }
        if passed(AXES_AS_INPUT) {
            match op.as_str() {
                reduction if REDUCTIONS.contains(&reduction) => to_input(node, "axes", 1, false),
                "Split" if node.arg(1).is_empty() && node.attr("split").is_none() => {
                    let parts = AttributeProto::new_int("num_outputs", node.output.len() as i64);
                    node.attribute.push(parts);
                }
                _ => {}
            }
        }
        match op.as_str() {
            _ if !passed(PER_CHANNEL) => {}
            "Squeeze" | "Unsqueeze" | "ReduceSum" => to_input(node, "axes", 1, false),
            "Split" => to_input(node, "split", 1, false),
            "Dropout" => to_input(node, "ratio", 1, true),
            "Softmax" | "LogSoftmax" | "Hardmax" => {
                let axis = node.int("axis", 1);
                let last = axis == -1 || rank.is_some_and(|r| axis == r as i64 - 1);
                if !last {
                    let name = label(node);
                    let why = format!(
                        "node `{name}` works on all dimensions from {axis} on at once; export with 13 or later"
                    );
                    return Err(refuse(why));
                }
                node.attribute.retain(|a| a.name() != "axis");
                node.attribute.push(AttributeProto::new_int("axis", -1));
            }
            _ => {}
        }
    }
    graph.initializer.extend(constants);
    model.import("", to);
    model.proto.ir_version = Some(model.proto.ir_version().max(if to < BLOCKS { 7 } else { 10 }));
    Ok(true)
}
