//! High-bias absorption (arXiv 1906.04721, section 4.1.3): what a channel never falls below is taken out of the activation.
//!
//! ```text
//! layer (b1 - c) --> Relu --> layer (b2 + W2 c)          c = max(0, mean - 3 deviations) of what the Relu reads
//! ```
//! Relu(x - c) is Relu(x) - c where x is at least c. The range of the activation shrinks by what all of its values share.
//! A convolution that pads sees zeros at the border, which nothing was taken from, so that none may read the activation.

use super::weight;
use crate::error::Result;
use crate::onnx::proto::NodeProto;
use crate::onnx::tensor::from_f32;
use crate::onnx::weights::Layout;
use crate::onnx::{Edit, Graph, Model, apply};
use std::collections::BTreeMap;

/// How far below the mean values are expected.
const DEVIATIONS: f64 = 3.0;

/// Means and second moments of a tensor's channels.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Moments {
    /// Of each channel.
    pub means: Vec<f64>,
    /// Of each channel.
    pub squares: Vec<f32>,
}

/// A layer after a Relu: its weight, and where its bias is.
struct Reader {
    weight: String,
    bias: String,
    /// Whether output channels come first.
    rows: bool,
}

/// A Relu whose neighbours can take part.
struct Place {
    reads: String,
    bias: String,
    readers: Vec<Reader>,
}

/// The constant bias of a layer: one of its inputs, or of the Add after it. Nothing else reads it.
fn bias(graph: &Graph, id: usize) -> Option<String> {
    let node = graph.node(id);
    let name = match node.op_type() {
        "MatMul" => {
            let add = graph.node(graph.sole_consumer(node.out())?);
            add.is("Add").then(|| add.input.iter().find(|name| graph.constant(name).is_some()))??.clone()
        }
        _ => node.arg(2).to_owned(),
    };
    let vector = graph.constant(&name).is_some_and(|t| t.dims.len() == 1);
    (vector && graph.consumers(&name).len() == 1).then_some(name)
}

fn layer(node: &NodeProto) -> bool {
    let plain = node.float("alpha", 1.0) == 1.0 && node.float("beta", 1.0) == 1.0 && node.int("transA", 0) == 0;
    node.is("Conv") || node.is("MatMul") || node.is("Gemm") && plain
}

fn reader(graph: &Graph, id: usize, slot: usize) -> Option<Reader> {
    let node = graph.node(id);
    let list = |name: &str| node.attr(name).map(|a| a.ints.clone()).unwrap_or_default();
    let pads = list("pads").iter().any(|&p| p != 0) || node.attr("auto_pad").is_some();
    let weight = graph.constant(node.arg(1))?;
    let rows = Layout::of(node) == Layout::Rows;
    let dense = node.int("group", 1) == 1 && !pads && weight.dims.len() >= 2;
    (layer(node) && slot == 0 && dense).then(|| bias(graph, id))?.map(|bias| Reader {
        weight: weight.name().to_owned(),
        bias,
        rows,
    })
}

fn places(graph: &Graph) -> Vec<Place> {
    let place = |(_, node): (usize, &NodeProto)| {
        let reads = node.arg(0).to_owned();
        graph.sole_consumer(&reads).filter(|_| node.is("Relu") && graph.is_private(node.out()))?;
        let maker = graph.producer(&reads)?;
        let maker = match graph.node(maker).is("Add") {
            true => graph.node(maker).input.iter().find_map(|name| graph.producer(name))?,
            false => maker,
        };
        let bias = bias(graph, maker).filter(|_| layer(graph.node(maker)))?;
        // A MatMul's output with its bias is the Add's.
        let own = graph.consumers(&bias).first().map(|&(id, _)| graph.node(id).out() == reads);
        let readers = graph.consumers(node.out()).iter().map(|&(id, slot)| reader(graph, id, slot));
        let readers = readers.collect::<Option<Vec<Reader>>>().filter(|r| !r.is_empty() && own == Some(true))?;
        Some(Place { reads, bias, readers })
    };
    graph.nodes().filter_map(place).collect()
}

/// Tensors whose channels have to be known.
pub fn tensors(graph: &Graph) -> BTreeMap<String, super::Axis> {
    let axis = |place: &Place| match graph.producer(&place.reads).is_some_and(|id| graph.node(id).is("Conv")) {
        true => super::Axis::Second,
        false => super::Axis::Last,
    };
    places(graph).into_iter().map(|p| (p.reads.clone(), axis(&p))).collect()
}

/// Takes out what channels never fall below; how many Relus changed.
///
/// # Errors
/// Weights whose bytes don't fit their shape, or that aren't finite.
pub fn absorb(model: &mut Model, seen: &BTreeMap<String, Moments>) -> Result<usize> {
    let mut changed = 0;
    for place in places(&Graph::new(model.graph())?) {
        let Some(moments) = seen.get(&place.reads) else { continue };
        let common: Vec<f64> = moments
            .means
            .iter()
            .zip(&moments.squares)
            .map(|(mean, square)| (mean - DEVIATIONS * (f64::from(*square) - mean * mean).max(0.0).sqrt()).max(0.0))
            .collect();
        let graph = Graph::new(model.graph())?;
        let mut biases: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        let values =
            |name: &str| -> Result<Vec<f64>> { Ok(weight(&graph, name)?.1.into_iter().map(f64::from).collect()) };
        let before = values(&place.bias)?;
        if before.len() != common.len() || common.iter().all(|&c| c == 0.0) {
            continue;
        }
        biases.insert(&place.bias, before.iter().zip(&common).map(|(b, c)| b - c).collect());
        for Reader { weight: name, bias, rows } in &place.readers {
            let (tensor, weights) = weight(&graph, name)?;
            let sides: Vec<usize> = tensor.dims.iter().map(|&d| d.max(1) as usize).collect();
            let taps: usize = sides.iter().skip(2).product();
            let mut after = values(bias)?;
            for (index, &w) in weights.iter().enumerate() {
                let (output, input) = match rows {
                    true => (index / (sides[1] * taps), index / taps % sides[1]),
                    false => (index % sides[1], index / sides[1]),
                };
                if let (Some(to), Some(c)) = (after.get_mut(output), common.get(input)) {
                    *to += f64::from(w) * c;
                }
            }
            biases.insert(bias, after);
        }
        let edits = biases.iter().map(|(name, values)| {
            let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
            Edit::Initializer(from_f32(name, &[values.len()], &values))
        });
        let edits = edits.collect();
        apply(model.graph_mut(), edits)?;
        changed += 1;
    }
    Ok(changed)
}
