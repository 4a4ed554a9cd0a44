//! The layers of a plan.

use nibble_quant::onnx::graph::label;
use nibble_quant::onnx::{Graph, Plan};
use serde::{Deserialize, Serialize};

/// A layer that a plan quantizes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Layer {
    /// Its node.
    pub node: String,
    /// Its operator.
    pub op: String,
    /// Its weight; `None` for a product of two activations.
    pub weight: Option<String>,
    /// Shape of the weight.
    pub shape: Vec<usize>,
    /// Activations that it reads.
    pub reads: Vec<String>,
    /// What it makes, with its bias, and the Relu or Clip that became part of it.
    pub makes: String,
    /// Whether its activations are in two terms.
    pub fine: bool,
    /// Position of the node in the graph.
    pub id: usize,
}

/// Every convolution, linear layer and product that a plan quantizes, in the graph's order.
pub fn layers(graph: &Graph, plan: &Plan) -> Vec<Layer> {
    let anchors = graph.nodes().filter(|(id, _)| plan.kind(*id).is_some_and(|kind| kind.is_anchor()));
    let layer = |(id, node): (usize, &nibble_quant::onnx::proto::NodeProto)| {
        let weight = graph.constant(node.arg(1));
        Layer {
            node: label(node),
            op: node.op_type().to_owned(),
            weight: weight.map(|t| t.name().to_owned()),
            shape: weight.map(|t| t.dims.iter().map(|&d| d.max(0) as usize).collect()).unwrap_or_default(),
            reads: plan.inputs(graph, id),
            makes: plan.output(graph, id),
            fine: plan.fine.contains(&id),
            id,
        }
    };
    anchors.map(layer).collect()
}

/// Layers that are looked at together: those that read the same tensor, such as an attention's queries, keys and values,
/// which many models have in one matrix. Products of two activations, and all layers if `apart`, are alone.
pub fn units(layers: Vec<Layer>, apart: bool) -> Vec<Vec<Layer>> {
    let mut units: Vec<Vec<Layer>> = Vec::new();
    for layer in layers {
        let same = |unit: &&mut Vec<Layer>| {
            let first = unit.first().filter(|first| !apart && first.weight.is_some() && layer.weight.is_some());
            first.is_some_and(|first| first.reads == layer.reads && first.op == layer.op)
        };
        match units.iter_mut().find(same) {
            Some(unit) => unit.push(layer),
            None => units.push(vec![layer]),
        }
    }
    units
}
