//! Operator set versions: what a model imports, and moving it up to one that has what quantization needs.
//!
//! Per-channel scales came with opset 13, which also moved some attributes to inputs. Everything else that older sets
//! know means the same there.

use super::graph::{fresh, label};
use super::proto::*;
use super::tensor::{from_f32, from_i64};
use super::{Graph, Model};
use crate::QuantError;
use crate::error::Result;

/// The first opset whose QuantizeLinear has an axis.
pub const PER_CHANNEL: i64 = 13;

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

/// Moves a model up to opset 13 if it is below, nodes of its main graph rewritten where their meaning moved.
///
/// # Errors
/// A model without ONNX's own operators or below opset 11, one with sub-graphs or functions (their nodes aren't
/// rewritten), or a Softmax over several dimensions at once, which opset 13 doesn't have.
pub fn upgrade(model: &mut Model) -> Result<bool> {
    let refuse = |why: String| QuantError::Spec { what: "operator set".into(), why };
    let Some(version) = model.opset("") else {
        return Err(refuse("the model imports no operators of ONNX itself".into()));
    };
    if version >= PER_CHANNEL {
        return Ok(false);
    }
    if version < 11 {
        return Err(refuse(format!("version {version}; 11 and later are understood")));
    }
    let index = Graph::new(model.graph())?;
    let mut names = index.names();
    let nested = |n: &NodeProto| n.attribute.iter().any(|a| a.g.is_some() || !a.graphs.is_empty());
    if let Some((_, node)) = index.nodes().find(|(_, n)| nested(n)) {
        let name = label(node);
        return Err(refuse(format!(
            "version {version} with sub-graphs (node `{name}`); export the model with 13 or later"
        )));
    }
    if !model.proto.functions.is_empty() {
        return Err(refuse(format!("version {version} with functions; export the model with 13 or later")));
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
        match node.op_type() {
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
    model.import("", PER_CHANNEL);
    model.proto.ir_version = Some(model.proto.ir_version().max(7));
    Ok(true)
}
