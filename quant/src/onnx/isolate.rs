//! Where an error comes from: the model with weights alone in integers, and with activations alone.

use super::graph::label;
use super::plan::{Kind, Plan};
use super::proto::*;
use super::report::dequantize;
use super::tensor::{floats, from_f32};
use super::{Edit, Graph, Model, apply};
use crate::error::Result;
use std::collections::HashMap;

/// A constant that a node reads, and what its integers mean if it is one in integers.
fn constant(graph: &Graph, name: &str) -> Result<Option<(Vec<usize>, Vec<f32>)>> {
    let dims = |t: &TensorProto| t.dims.iter().map(|&d| d.max(0) as usize).collect();
    if let Some(tensor) = graph.constant(name) {
        return Ok(Some((dims(tensor), floats(tensor)?)));
    }
    let Some(node) = graph.producer(name).map(|id| graph.node(id)).filter(|n| n.is("DequantizeLinear")) else {
        return Ok(None);
    };
    match (graph.constant(node.arg(0)), graph.constant(node.arg(1))) {
        (Some(codes), Some(scale)) => {
            Ok(Some((dims(codes), dequantize(node, codes, scale, graph.constant(node.arg(2)))?)))
        }
        _ => Ok(None),
    }
}

/// A planned layer in both models.
struct Pair<'a> {
    /// In the float one.
    id: usize,
    node: &'a NodeProto,
    /// In the quantized one.
    other: usize,
    /// The node and slot of its bias, in the float model and the other one.
    bias: Option<[(usize, usize); 2]>,
}

fn pairs<'a>(float: &Graph<'a>, quantized: &Graph, plan: &Plan) -> Vec<Pair<'a>> {
    let places: HashMap<String, usize> = quantized.nodes().map(|(id, node)| (label(node), id)).collect();
    let pair = |(id, node): (usize, &'a NodeProto)| {
        let other = *places.get(&label(node))?;
        let bias = match plan.kind(id)? {
            Kind::Conv | Kind::Linear { bias: None } => match quantized.node(other).arg(2) {
                "" => None,
                _ => Some([(id, 2), (other, 2)]),
            },
            // The product and its Add may have become a Gemm.
            Kind::Linear { bias: Some((add, slot)) } => match places.get(&label(float.node(*add))) {
                Some(&sum) => Some([(*add, *slot), (sum, *slot)]),
                None => Some([(*add, *slot), (other, 2)]),
            },
            _ => return None,
        };
        Some(Pair { id, node, other, bias })
    };
    float.nodes().filter_map(pair).collect()
}

/// The float model with weights and biases that are what the quantized model's integers mean.
///
/// # Errors
/// Constants whose bytes don't fit their shape.
pub fn weights_alone(float: &Model, quantized: &Model, plan: &Plan) -> Result<Model> {
    let (graph, other) = (Graph::new(float.graph())?, Graph::new(quantized.graph())?);
    let mut edits = Vec::new();
    for pair in pairs(&graph, &other, plan) {
        let mut set = |node: usize, slot: usize, name: String, dims: &[usize], values: &[f32]| {
            edits.push(Edit::Initializer(from_f32(&name, dims, values)));
            edits.push(Edit::Input { node, slot, to: name });
        };
        let own = label(pair.node);
        if let Some((dims, values)) = constant(&other, other.node(pair.other).arg(1))? {
            set(pair.id, 1, format!("{own}_rounded_weight"), &dims, &values);
        }
        if let Some([(node, slot), (of, at)]) = pair.bias
            && let Some((_, values)) = constant(&other, other.node(of).arg(at))?
        {
            set(node, slot, format!("{own}_rounded_bias"), &[values.len()], &values);
        }
    }
    let mut model = float.clone();
    apply(model.graph_mut(), edits)?;
    Ok(model)
}

/// The quantized model with the float model's weights and biases.
///
/// # Errors
/// A graph that is none.
pub fn activations_alone(float: &Model, quantized: &Model, plan: &Plan) -> Result<Model> {
    let (graph, other) = (Graph::new(float.graph())?, Graph::new(quantized.graph())?);
    let mut edits = Vec::new();
    for pair in pairs(&graph, &other, plan) {
        let mut set = |node: usize, slot: usize, exact: &str| {
            let name = if exact.is_empty() { String::new() } else { format!("{exact}_exact") };
            if let Some(tensor) = graph.constant(exact) {
                edits.push(Edit::Initializer(TensorProto { name: Some(name.clone()), ..tensor.clone() }));
            }
            edits.push(Edit::Input { node, slot, to: name });
        };
        // The second term of an activation meets the same weight.
        for &(reader, slot) in other.consumers(other.node(pair.other).arg(1)) {
            set(reader, slot, pair.node.arg(1));
        }
        if let Some([(node, slot), (of, at)]) = pair.bias {
            set(of, at, graph.node(node).arg(slot));
        }
    }
    let mut model = quantized.clone();
    apply(model.graph_mut(), edits)?;
    Ok(model)
}
