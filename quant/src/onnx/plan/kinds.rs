//! Which nodes could compute in integers, and as what.

use super::{Mode, Settings, Target};
use crate::error::Result;
use crate::onnx::Graph;
use crate::onnx::proto::*;
use crate::onnx::tensor::scalar;

/// What a quantized node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A convolution with constant weights.
    Conv,
    /// A Gemm, or a MatMul by a constant matrix; `bias` is the Add after a MatMul and the constant's place in it.
    Linear {
        /// The node that adds a bias, and which of its inputs that is.
        bias: Option<(usize, usize)>,
    },
    /// A product of two activations.
    MatMul,
    /// An operator over one or several quantized tensors with a result of its own range.
    Join,
    /// An operator that hands values on.
    Pass,
}

/// The interval a Relu or Clip leaves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clip {
    /// The lower end; minus infinity without one.
    pub lo: f32,
    /// The upper end; infinity without one.
    pub hi: f32,
}

impl Kind {
    /// Whether it is worth quantizing whatever surrounds it.
    pub fn is_anchor(self) -> bool {
        matches!(self, Kind::Conv | Kind::Linear { .. } | Kind::MatMul)
    }

    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Conv => "conv",
            Kind::Linear { .. } => "linear",
            Kind::MatMul => "matmul",
            Kind::Join => "join",
            Kind::Pass => "pass",
        }
    }

    /// The inputs that carry activations.
    pub(in crate::onnx) fn data_slots(self, node: &NodeProto) -> std::ops::Range<usize> {
        match self {
            Kind::Conv | Kind::Linear { .. } | Kind::Pass => 0..1,
            Kind::MatMul => 0..2,
            Kind::Join => 0..node.input.len(),
        }
    }
}

fn float(graph: &Graph, name: &str) -> bool {
    graph.constant(name).is_some_and(|t| t.data_type() == DataType::Float)
}

/// A node's kind, or why it stays float.
///
/// # Errors
/// A bound of a Clip that isn't a number.
pub(super) fn kind(graph: &Graph, node: &NodeProto, settings: &Settings) -> Result<Result<Kind, String>> {
    let no = |why: &str| Ok(Err(why.to_owned()));
    if !matches!(node.domain(), "" | "ai.onnx") {
        return no("an operator of another domain");
    }
    let rank = |name: &str| graph.constant(name).map_or(0, |t| t.dims.len());
    let whole = |name: &str| graph.constant(name).is_some_and(|t| t.dims.iter().all(|&d| d > 0));
    let ort = settings.target == Target::OnnxRuntime;
    let kind = match node.op_type() {
        "Conv" => {
            let weight = node.arg(1);
            if !float(graph, weight) || !whole(weight) || rank(weight) < 3 {
                return no("its weights aren't constant floats");
            }
            if !node.arg(2).is_empty() && !float(graph, node.arg(2)) {
                return no("its bias isn't constant");
            }
            match settings.mode {
                Mode::Static => Kind::Conv,
                Mode::Dynamic if settings.force_conv => Kind::Conv,
                Mode::Dynamic => {
                    return no("a Conv quantized at run time (ConvInteger) is many times slower than float");
                }
                Mode::WeightOnly { .. } => return no("no runtime has a Conv over packed weights"),
            }
        }
        "Gemm" | "MatMul" => return linear(graph, node, settings),
        _ if settings.mode != Mode::Static => return no("only layers with weights are quantized in this mode"),
        "Add" | "Mul" if node.input.len() == 2 => Kind::Join,
        "Concat" | "AveragePool" | "GlobalAveragePool" => Kind::Join,
        "Sigmoid" | "LeakyRelu" | "Softmax" if ort => Kind::Join,
        "Reshape" | "Transpose" | "Flatten" | "Squeeze" | "Unsqueeze" | "Slice" | "Expand" | "Tile" => Kind::Pass,
        "MaxPool" if node.output.len() == 1 => Kind::Pass,
        "Resize" if matches!(node.attr("mode").and_then(|a| a.s.as_deref()), None | Some(b"nearest")) => Kind::Pass,
        "Relu" | "Clip" => return no("not right after a layer, or read by others too"),
        "LayerNormalization" | "Gelu" | "Erf" => return no("no integer kernel"),
        _ => return no("stays as it is"),
    };
    Ok(Ok(kind))
}

fn linear(graph: &Graph, node: &NodeProto, settings: &Settings) -> Result<Result<Kind, String>> {
    let no = |why: &str| Ok(Err(why.to_owned()));
    let weight = graph.constant(node.arg(1));
    let Some(weight) = weight.filter(|t| t.data_type() == DataType::Float && t.dims.len() == 2) else {
        return match (settings.mode, graph.constant(node.arg(0)).is_none() && weight.is_none() && node.is("MatMul")) {
            (Mode::Static, true) if settings.attention => Ok(Ok(Kind::MatMul)),
            (_, true) => no("a product of two activations"),
            _ => no("its weights aren't a constant float matrix"),
        };
    };
    if weight.dims.iter().any(|&d| d <= 0) {
        return no("its weights are empty");
    }
    if graph.constant(node.arg(0)).is_some() {
        return no("both of its operands are constant");
    }
    if node.is("Gemm") {
        let n = weight.dims[usize::from(node.int("transB", 0) == 0)];
        let plain = node.float("alpha", 1.0) == 1.0 && node.float("beta", 1.0) == 1.0 && node.int("transA", 0) == 0;
        let bias = graph.constant(node.arg(2));
        let good = node.arg(2).is_empty() || bias.is_some_and(|b| b.data_type() == DataType::Float && b.dims == [n]);
        return match plain && good {
            true => Ok(Ok(Kind::Linear { bias: None })),
            false => no("a Gemm with factors, a transposed input, or a bias that isn't one number a channel"),
        };
    }
    let n = weight.dims[1];
    let bias = graph.sole_consumer(node.out()).filter(|&add| graph.node(add).is("Add")).and_then(|add| {
        let slot = usize::from(graph.node(add).arg(0) == node.out());
        let constant = graph.constant(graph.node(add).arg(slot))?;
        (constant.data_type() == DataType::Float && constant.dims == [n]).then_some((add, slot))
    });
    Ok(Ok(Kind::Linear { bias }))
}

/// The interval of a Relu or Clip; `None` for other nodes and for bounds that are computed.
///
/// # Errors
/// A bound that isn't one number.
pub(super) fn clip(graph: &Graph, node: &NodeProto) -> Result<Option<Clip>> {
    if node.is("Relu") {
        return Ok(Some(Clip { lo: 0.0, hi: f32::INFINITY }));
    }
    if !node.is("Clip") {
        return Ok(None);
    }
    let mut ends = [node.float("min", f32::NEG_INFINITY), node.float("max", f32::INFINITY)];
    for (end, slot) in ends.iter_mut().zip([1, 2]) {
        if node.arg(slot).is_empty() {
            continue;
        }
        match graph.constant(node.arg(slot)) {
            Some(bound) if bound.data_type() == DataType::Float => *end = scalar(bound)?,
            _ => return Ok(None),
        }
    }
    // A range always holds zero, so that it can't stand for a Clip that doesn't.
    let [lo, hi] = ends;
    Ok((lo <= 0.0 && hi >= 0.0 && lo < hi).then_some(Clip { lo, hi }))
}
