//! Per-channel gains and offsets after a layer go into its weights.
//!
//! ```text
//! y = a * (w x + b) + c   ->   y = (a w) x + (a b + c)          a, c: one number a channel, or one for all
//! ```
//! The layer is a Conv, ConvTranspose, Gemm or MatMul (with the Add of a bias after it); what follows is a batch norm or
//! an Add, Sub, Mul or Div by a constant. Sums are in f64, so that folding rounds once.

use super::Step;
use crate::error::Result;
use crate::onnx::graph::{fresh, label};
use crate::onnx::proto::*;
use crate::onnx::tensor::{floats, from_f32, tensor_error};
use crate::onnx::{Edit, Graph};
use std::collections::{BTreeSet, HashSet};

/// A layer whose weights can take a gain and an offset per output channel.
struct Layer<'a> {
    node: usize,
    weight: &'a TensorProto,
    kind: Kind,
    /// Where the bias is: an input of the layer, or the constant of an Add after it.
    bias: Bias<'a>,
    /// Output channels.
    channels: usize,
    /// What the gain and the offset apply to.
    output: &'a str,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Conv,
    ConvTranspose { groups: usize },
    Gemm { transposed: bool },
    MatMul,
}

enum Bias<'a> {
    None,
    Input(&'a TensorProto),
    Added { node: usize, slot: usize, constant: &'a TensorProto },
}

/// `y = gain * x + offset`, one of each a channel.
struct Affine {
    gain: Vec<f64>,
    offset: Vec<f64>,
}

pub(super) fn absorb(graph: &Graph) -> Result<Step> {
    let mut step = Step::default();
    let mut names: BTreeSet<String> = graph.names();
    // A node takes part in one change a step; the next step sees the result.
    let mut busy: HashSet<usize> = HashSet::new();
    for (id, node) in graph.nodes() {
        let Some(layer) = layer(graph, id, node)? else { continue };
        let Some(next) = graph.sole_consumer(layer.output) else { continue };
        let Some(affine) = affine(graph, next, &layer)? else { continue };
        let adder = if let Bias::Added { node, .. } = layer.bias { Some(node) } else { None };
        // The Add after a MatMul is its bias: it is where an offset belongs.
        if layer.kind == Kind::MatMul && adder.is_none() && affine.gain.iter().all(|&a| a == 1.0) {
            continue;
        }
        if [Some(id), Some(next), adder].into_iter().flatten().any(|n| !busy.insert(n)) {
            continue;
        }
        edit(graph, &layer, &affine, next, &mut names, &mut step)?;
    }
    Ok(step)
}

fn layer<'a>(graph: &Graph<'a>, id: usize, node: &'a NodeProto) -> Result<Option<Layer<'a>>> {
    let Some(weight) = graph.constant(node.arg(1)).filter(|t| t.data_type() == DataType::Float) else {
        return Ok(None);
    };
    let rank = weight.dims.len();
    let dim = |axis: usize| weight.dims[axis].max(0) as usize;
    let (kind, channels) = match node.op_type() {
        _ if !matches!(node.domain(), "" | "ai.onnx") => return Ok(None),
        "Conv" if rank >= 3 => (Kind::Conv, dim(0)),
        "ConvTranspose" if rank >= 3 => {
            let groups = node.int("group", 1).max(1) as usize;
            (Kind::ConvTranspose { groups }, dim(1) * groups)
        }
        "Gemm" if rank == 2 && node.float("alpha", 1.0) == 1.0 && node.float("beta", 1.0) == 1.0 => {
            let transposed = node.int("transB", 0) != 0;
            (Kind::Gemm { transposed }, dim(usize::from(!transposed)))
        }
        "MatMul" if rank == 2 => (Kind::MatMul, dim(1)),
        _ => return Ok(None),
    };
    if channels == 0 {
        return Ok(None);
    }
    let float = |name: &str| graph.constant(name).filter(|t| t.data_type() == DataType::Float);
    let mut output = node.out();
    let mut bias = Bias::None;
    match kind {
        Kind::MatMul => {
            if let Some(add) = graph.sole_consumer(output).filter(|&n| graph.node(n).is("Add")) {
                let slot = usize::from(graph.node(add).arg(0) == output);
                if let Some(constant) = float(graph.node(add).arg(slot)).filter(|t| t.dims == [channels as i64]) {
                    bias = Bias::Added { node: add, slot, constant };
                    output = graph.node(add).out();
                }
            }
        }
        _ if !node.arg(2).is_empty() => match float(node.arg(2)).filter(|t| t.dims == [channels as i64]) {
            Some(constant) => bias = Bias::Input(constant),
            None => return Ok(None),
        },
        _ => {}
    }
    Ok(Some(Layer { node: id, weight, kind, bias, channels, output }))
}

/// What a node does to the layer's output, if that is a gain and an offset per channel.
fn affine(graph: &Graph, id: usize, layer: &Layer) -> Result<Option<Affine>> {
    let node = graph.node(id);
    let n = layer.channels;
    if node.is("BatchNormalization") {
        let unread = |name: &String| name.is_empty() || graph.consumers(name).is_empty() && graph.is_private(name);
        let trains = node.int("training_mode", 0) != 0 || !node.output.iter().skip(1).all(unread);
        let by_channel = matches!(layer.kind, Kind::Conv | Kind::ConvTranspose { .. } | Kind::Gemm { .. });
        if node.arg(0) != layer.output || trains || !by_channel || node.int("spatial", 1) == 0 {
            return Ok(None);
        }
        let mut parts = Vec::new();
        for slot in 1..5 {
            let Some(part) = graph.constant(node.arg(slot)) else { return Ok(None) };
            let values = floats(part)?;
            if values.len() != n {
                return Err(tensor_error(
                    part,
                    format!("{} values for {n} channels of `{}`", values.len(), label(node)),
                ));
            }
            parts.push((part, values));
        }
        let [(_, scale), (_, shift), (_, mean), (named, variance)] = parts.as_slice() else { return Ok(None) };
        let epsilon = f64::from(node.float("epsilon", 1e-5));
        let deviation: Vec<f64> = variance.iter().map(|&v| (f64::from(v) + epsilon).sqrt()).collect();
        if let Some(c) = deviation.iter().position(|d| d.is_nan() || *d <= 0.0) {
            let why = format!("variance {} of channel {c} plus epsilon {epsilon} isn't above 0", variance[c]);
            return Err(tensor_error(named, why));
        }
        let gain: Vec<f64> = (0..n).map(|c| f64::from(scale[c]) / deviation[c]).collect();
        let offset = (0..n).map(|c| f64::from(shift[c]) - gain[c] * f64::from(mean[c])).collect();
        return Ok(Some(Affine { gain, offset }));
    }
    let op = node.op_type();
    if !matches!(op, "Add" | "Sub" | "Mul" | "Div") || !matches!(node.domain(), "" | "ai.onnx") {
        return Ok(None);
    }
    let slot = usize::from(node.arg(0) == layer.output);
    // A constant minus the layer, or divided by it, is another function.
    if slot == 0 && matches!(op, "Sub" | "Div") {
        return Ok(None);
    }
    let Some(constant) = graph.constant(node.arg(slot)).filter(|t| t.data_type() == DataType::Float) else {
        return Ok(None);
    };
    let Some(values) = per_channel(constant, layer)? else { return Ok(None) };
    if op == "Div" && values.contains(&0.0) {
        return Ok(None);
    }
    let of = |f: fn(f64) -> f64| values.iter().map(|&v| f(v)).collect::<Vec<f64>>();
    Ok(Some(match op {
        "Add" => Affine { gain: vec![1.0; n], offset: values },
        "Sub" => Affine { gain: vec![1.0; n], offset: of(|v| -v) },
        "Mul" => Affine { gain: values, offset: vec![0.0; n] },
        _ => Affine { gain: of(|v| 1.0 / v), offset: vec![0.0; n] },
    }))
}

/// A constant as one number a channel, if it broadcasts over everything else without adding dimensions.
fn per_channel(constant: &TensorProto, layer: &Layer) -> Result<Option<Vec<f64>>> {
    let dims = &constant.dims;
    let rank = match layer.kind {
        Kind::Conv | Kind::ConvTranspose { .. } => layer.weight.dims.len(),
        Kind::Gemm { .. } => 2,
        // Inputs of a MatMul have any rank, so that a constant of rank 1 is all that surely adds none.
        Kind::MatMul => 1,
    };
    if dims.len() > rank {
        return Ok(None);
    }
    let axis = usize::from(layer.kind != Kind::MatMul);
    let missing = rank - dims.len();
    let at_channel = axis.checked_sub(missing).and_then(|at| dims.get(at)).copied().unwrap_or(1);
    let others = dims.iter().enumerate().all(|(i, &d)| i + missing == axis || d == 1);
    if !others || (at_channel != 1 && at_channel != layer.channels as i64) {
        return Ok(None);
    }
    let values = floats(constant)?;
    Ok(match values.as_slice() {
        [one] => Some(vec![f64::from(*one); layer.channels]),
        many if many.len() == layer.channels => Some(many.iter().map(|&v| f64::from(v)).collect()),
        _ => None,
    })
}

/// The output channel of each weight, row-major.
fn channel_of(layer: &Layer, index: usize) -> usize {
    let dims: Vec<usize> = layer.weight.dims.iter().map(|&d| d.max(0) as usize).collect();
    match layer.kind {
        Kind::Conv => index / dims[1..].iter().product::<usize>(),
        Kind::Gemm { transposed: true } => index / dims[1],
        Kind::Gemm { transposed: false } | Kind::MatMul => index % dims[1],
        // (in, out / groups, ...): the group follows from the input channel.
        Kind::ConvTranspose { groups } => {
            let inner: usize = dims[2..].iter().product();
            let (input, output) = (index / inner / dims[1], index / inner % dims[1]);
            input / (dims[0] / groups).max(1) * dims[1] + output
        }
    }
}

fn edit(
    graph: &Graph,
    layer: &Layer,
    affine: &Affine,
    next: usize,
    names: &mut BTreeSet<String>,
    step: &mut Step,
) -> Result<()> {
    let own = |tensor: &TensorProto, names: &mut BTreeSet<String>| match graph.sole_consumer(tensor.name()) {
        Some(_) => tensor.name().to_owned(),
        None => fresh(names, &format!("{}_folded", tensor.name())),
    };
    let dims = |tensor: &TensorProto| tensor.dims.iter().map(|&d| d.max(0) as usize).collect::<Vec<_>>();
    if affine.gain.iter().any(|&a| a != 1.0) {
        let mut weight = floats(layer.weight)?;
        for (index, w) in weight.iter_mut().enumerate() {
            *w = (f64::from(*w) * affine.gain[channel_of(layer, index)]) as f32;
        }
        let name = own(layer.weight, names);
        step.edits.push(Edit::Initializer(from_f32(&name, &dims(layer.weight), &weight)));
        step.edits.push(Edit::Input { node: layer.node, slot: 1, to: name });
    }
    let bias = match layer.bias {
        Bias::None => None,
        Bias::Input(tensor) | Bias::Added { constant: tensor, .. } => Some(tensor),
    };
    let old = bias.map(floats).transpose()?.unwrap_or_else(|| vec![0.0; layer.channels]);
    let new: Vec<f32> =
        (0..layer.channels).map(|c| (f64::from(old[c]) * affine.gain[c] + affine.offset[c]) as f32).collect();
    // A layer without a bias gets one only if there is something to add.
    if bias.is_some() || new.iter().any(|&b| b != 0.0) {
        let name = match bias {
            Some(tensor) => own(tensor, names),
            None => fresh(names, &format!("{}_bias", layer.weight.name())),
        };
        let (node, slot) = match layer.bias {
            Bias::Added { node, slot, .. } => (node, slot),
            _ => (layer.node, 2),
        };
        step.edits.push(Edit::Initializer(from_f32(&name, &[layer.channels], &new)));
        step.edits.push(Edit::Input { node, slot, to: name });
    }
    // What follows keeps its name: the layer's last node makes it now.
    let last = match layer.bias {
        Bias::Added { node, .. } => node,
        _ => layer.node,
    };
    step.edits.push(Edit::Output { node: last, slot: 0, to: graph.node(next).out().to_owned() });
    step.edits.push(Edit::Remove(next));
    step.into.push((label(graph.node(next)), Some(label(graph.node(last)))));
    Ok(())
}
