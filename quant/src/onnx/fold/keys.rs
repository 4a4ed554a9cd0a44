//! Biases of attention's keys are gone: they add to every score of a query alike, and a softmax doesn't see what is alike.
//!
//! ```text
//! softmax over keys j of q . (k_j + b) * s + mask   =   softmax over keys j of q . k_j * s + mask
//! ```

use super::Step;
use crate::error::Result;
use crate::onnx::graph::label;
use crate::onnx::tensor::{floats, ints};
use crate::onnx::{Edit, Graph};

pub(super) fn drop_biases(graph: &Graph) -> Result<Step> {
    let mut step = Step::default();
    for (_, softmax) in graph.nodes().filter(|(_, n)| n.is("Softmax") && matches!(n.int("axis", 1), -1 | 3)) {
        let Some(scores) = product(graph, softmax.arg(0), 4) else { continue };
        let Some((add, slot)) = bias(graph, graph.node(scores).arg(1)) else { continue };
        let node = graph.node(add);
        let kept = node.arg(1 - slot);
        let Some(layer) = graph.producer(kept) else { continue };
        let readers = graph.consumers(node.out()).iter();
        step.edits.push(Edit::Remove(add));
        step.edits.extend(readers.map(|&(node, slot)| Edit::Input { node, slot, to: kept.to_owned() }));
        step.into.push((label(node), Some(label(graph.node(layer)))));
    }
    Ok(step)
}

/// Whether a tensor is one number.
fn scalar(graph: &Graph, name: &str) -> bool {
    graph.constant(name).is_some_and(|t| floats(t).is_ok_and(|v| v.len() == 1))
}

/// The product that scores come from, over masks and scalings.
fn product(graph: &Graph, tensor: &str, depth: usize) -> Option<usize> {
    graph.sole_consumer(tensor)?;
    let id = graph.producer(tensor)?;
    let node = graph.node(id);
    let back = |slot: usize| product(graph, node.arg(slot), depth.checked_sub(1)?);
    match node.op_type() {
        "MatMul" => Some(id),
        "Add" => back(0).or_else(|| back(1)),
        "Mul" | "Div" if scalar(graph, node.arg(1)) => back(0),
        "Mul" if scalar(graph, node.arg(0)) => back(1),
        _ => None,
    }
}

/// The Add of a bias, and in which slot that is, that transposed keys (batch, heads, channels, keys) come from. On the way
/// nothing mixes channels with places: the last two dimensions of a Reshape are those of the bias.
fn bias(graph: &Graph, keys: &str) -> Option<(usize, usize)> {
    let (mut tensor, mut axis, mut split) = (keys, 3usize, None);
    for _ in 0..6 {
        graph.sole_consumer(tensor)?;
        let id = graph.producer(tensor)?;
        let node = graph.node(id);
        match (node.op_type(), split) {
            ("Transpose", None) => {
                let perm = &node.attr("perm")?.ints;
                axis = perm.get(axis).copied().filter(|_| perm.len() == 4).and_then(|a| usize::try_from(a).ok())?;
                tensor = node.arg(0);
            }
            ("Mul" | "Div", _) if scalar(graph, node.arg(1)) => tensor = node.arg(0),
            ("Mul", _) if scalar(graph, node.arg(0)) => tensor = node.arg(1),
            ("Reshape", None) if axis < 2 => {
                let shape = ints(graph.constant(node.arg(1))?).ok()?;
                let &[_, _, heads, channels] = shape.as_slice() else { return None };
                // A -1 or 0 there says nothing of how many there are.
                split = Some(usize::try_from(heads.max(0).checked_mul(channels.max(0))?).ok().filter(|&n| n > 0)?);
                tensor = node.arg(0);
            }
            ("Add", Some(n)) => {
                let vector = |name: &str| {
                    graph.constant(name).is_some_and(|t| {
                        t.dims.last() == Some(&(n as i64)) && t.dims.iter().rev().skip(1).all(|&d| d == 1)
                    })
                };
                let slot = (0..2).find(|&slot| vector(node.arg(slot)))?;
                return Some((id, slot));
            }
            _ => return None,
        }
    }
    None
}
