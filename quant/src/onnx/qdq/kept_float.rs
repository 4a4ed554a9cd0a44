//! Layers that stay float between integers. ONNX Runtime (seen in 1.32) rounds the weights of a Conv or Gemm that reads a
//! DequantizeLinear and is read by a QuantizeLinear, one scale a tensor, whatever its file says of them. It goes by those
//! neighbours, so that an operator that changes nothing keeps the layer float:
//!
//! ```text
//! DequantizeLinear -> Clip to what its integers reach -> Conv, float weights -> [Relu, Clip] -> QuantizeLinear
//! ```

use crate::error::Result;
use crate::observer::{IntGrid, QParams};
use crate::onnx::graph::fresh;
use crate::onnx::proto::*;
use crate::onnx::tensor::{from_f32, ints, scalar};
use crate::onnx::{Edit, Graph, Model, apply};
use std::collections::BTreeMap;

/// The first operator set whose Clip reads its ends.
const CLIP: i64 = 11;

/// Puts such an operator before each float layer that needs one.
///
/// # Errors
/// A graph that is none, or scales that can't be read.
pub(super) fn keep_float(model: &mut Model, grid: IntGrid) -> Result<()> {
    if model.opset("").unwrap_or(0) < CLIP {
        return Ok(());
    }
    let graph = Graph::new(model.graph())?;
    let mut names = graph.names();
    let mut edits = Vec::new();
    let mut clipped: BTreeMap<&str, String> = BTreeMap::new();
    for (id, node) in graph.nodes() {
        let layer = ["Conv", "ConvTranspose", "Gemm"].iter().any(|op| node.is(op));
        let from = graph.producer(node.arg(0)).map(|id| graph.node(id)).filter(|n| n.is("DequantizeLinear"));
        // Weights in half precision are widened when they are loaded.
        let widened = graph.producer(node.arg(1)).map(|id| graph.node(id)).filter(|n| n.is("Cast"));
        let weight = graph.constant(widened.map_or(node.arg(1), |cast| cast.arg(0)));
        let float = weight.is_some_and(|t| t.data_type().is_float());
        let Some(from) = from.filter(|_| layer && float && becomes_integers(&graph, node)) else { continue };
        let to = match clipped.get(node.arg(0)) {
            Some(known) => known.clone(),
            None => {
                let (Some(scale), Some(zero)) = (graph.constant(from.arg(1)), graph.constant(from.arg(2))) else {
                    continue;
                };
                let zero_point = ints(zero)?.first().copied().unwrap_or_default() as i32;
                let params = QParams { scale: scalar(scale)?, zero_point };
                let (low, high) = grid.limits();
                let base = node.arg(0);
                let [lo, hi, to] = ["low", "high", "Clip"].map(|part| fresh(&mut names, &format!("{base}_{part}")));
                edits.push(Edit::Initializer(from_f32(&lo, &[], &[params.dequantize(low)])));
                edits.push(Edit::Initializer(from_f32(&hi, &[], &[params.dequantize(high)])));
                edits.push(Edit::Add(NodeProto::new("Clip", &to, &[base, &lo, &hi], &[&to])));
                clipped.insert(base, to.clone());
                to
            }
        };
        edits.push(Edit::Input { node: id, slot: 0, to });
    }
    apply(model.graph_mut(), edits)
}

/// Whether a QuantizeLinear alone reads what a node makes, or the Relu or Clip after it.
fn becomes_integers(graph: &Graph, node: &NodeProto) -> bool {
    let next = |node: &NodeProto| graph.sole_consumer(node.out()).map(|id| graph.node(id));
    let first = next(node);
    let last = match first {
        Some(end) if end.is("Relu") || end.is("Clip") => next(end),
        other => other,
    };
    last.is_some_and(|n| n.is("QuantizeLinear"))
}
