//! Weights and biases of quantized layers, in integers.
//!
//! ```text
//! weight  int8, symmetric, one scale an output channel (or one a tensor)      w = s_w * q
//! bias    int32, scale s_x * s_w, zero point 0                                 b = s_x * s_w * q
//! ```

mod grouped;
mod pairs;

pub use pairs::Pairs;

use super::Graph;
use super::proto::*;
use super::tensor::{floats, tensor_error};
use crate::algo::{AlgoInput, algorithm};
use crate::error::Result;
use crate::observer::{IntGrid, IntType, QParams};
use crate::stats::Input;
use crate::{FloatFormat, Granularity, Grid, OutlierSpec, QTensor, QuantSpec, ScaleData, ScaleFormat, Zero};
use pairs::Limited;

/// Where a weight's output channels are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Channels first: a Conv's (out, in / groups, ...), a Gemm's (out, in) with transB.
    Rows,
    /// A matrix (in, out).
    Columns,
}

impl Layout {
    /// Of the weight of a Conv, Gemm or MatMul.
    pub fn of(node: &NodeProto) -> Layout {
        match node.is("Conv") || node.is("Gemm") && node.int("transB", 0) != 0 {
            true => Layout::Rows,
            false => Layout::Columns,
        }
    }
}

/// An int8 weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Weight {
    /// Codes in the float weight's own order.
    pub codes: Vec<i8>,
    /// One a channel, or a single one.
    pub scales: Vec<f32>,
    /// Output channels.
    pub channels: usize,
}

impl Weight {
    /// The scale of an output channel.
    pub fn scale(&self, channel: usize) -> f32 {
        match self.scales.as_slice() {
            [one] => *one,
            many => many[channel],
        }
    }
}

/// A weight's shape as (channels, values of a channel).
pub fn shape(tensor: &TensorProto, layout: Layout) -> [usize; 2] {
    let dims: Vec<usize> = tensor.dims.iter().map(|&d| d.max(0) as usize).collect();
    match layout {
        Layout::Rows => [dims[0], dims[1..].iter().product()],
        Layout::Columns => [dims[1], dims[0]],
    }
}

/// Swaps the sides of a (rows, columns) matrix.
pub fn transpose<T: Copy>(values: &[T], rows: usize, columns: usize) -> Vec<T> {
    (0..columns).flat_map(|c| (0..rows).map(move |r| values[r * columns + c])).collect()
}

/// A weight's values with channels first, (channels, values of a channel).
///
/// # Errors
/// Not floats, or of another size than the shape.
pub fn rows(tensor: &TensorProto, layout: Layout) -> Result<([usize; 2], Vec<f32>)> {
    let [n, k] = shape(tensor, layout);
    let values = floats(tensor)?;
    Ok(([n, k], if layout == Layout::Columns { transpose(&values, k, n) } else { values }))
}

/// How weights are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rounding {
    /// A scale for every output channel, or one a weight.
    pub per_channel: bool,
    /// Bits in use of the 8 that are stored: 8, or down to 2.
    pub bits: u8,
    /// Whether no pair of 8-bit weights may go beyond 16 bits ([`Pairs`]).
    pub pairs: bool,
    /// Name in [`crate::ALGORITHMS`].
    pub algorithm: &'static str,
}

/// What was seen of a weight's input.
#[derive(Debug, Clone, Copy, Default)]
pub struct Seen<'a> {
    /// (values of a channel) second moments of what each of them is multiplied by.
    pub importance: Option<&'a [f32]>,
    /// Products with each other of what they are multiplied by, one a group of channels.
    pub inputs: &'a [Input],
    /// (channels) what an error of each output costs beside those of others, where that is known.
    pub costs: Option<&'a [f64]>,
}

/// Whether each value of an output channel meets one input channel: a linear layer, or a Conv of 1 x 1.
pub fn reads_channels(graph: &Graph, node: &NodeProto) -> bool {
    let Some(weight) = graph.constant(node.arg(1)) else { return false };
    !node.is("Conv") || node.int("group", 1) == 1 && weight.dims.iter().skip(2).all(|&d| d == 1)
}

/// Codes and scales of a weight's [`rows`] by an algorithm.
///
/// # Errors
/// An unknown algorithm, or values that aren't finite.
pub(super) fn codes(
    tensor: &TensorProto,
    (shape, weight): ([usize; 2], &[f32]),
    spec: &QuantSpec,
    name: &str,
    seen: Seen,
) -> Result<QTensor> {
    let Seen { importance, inputs, .. } = seen;
    let calibrated = if let [one] = inputs { Some(one) } else { None };
    let input = AlgoInput { name: tensor.name(), weight, shape, spec, importance, calibrated, seed: 0 };
    (algorithm(name)?.run)(&input)
}

impl Rounding {
    /// The pairs of a layer's weight that are limited.
    pub fn pairs_of(&self, node: &NodeProto, weight: &TensorProto, layout: Layout) -> Option<Pairs> {
        Pairs::of(node, weight, layout).filter(|_| self.pairs && self.bits == 8)
    }
}

/// Quantizes a weight. `least` is what each channel's scale must be at least, so that a bias fits into 32 bits of it; `pairs` are
/// those of [`Rounding::pairs_of`].
///
/// # Errors
/// A weight that isn't finite, or whose bytes don't fit its shape.
pub fn quantize(
    tensor: &TensorProto,
    layout: Layout,
    how: Rounding,
    seen: Seen,
    least: &[f32],
    pairs: Option<&Pairs>,
) -> Result<Weight> {
    let (sides, values) = rows(tensor, layout)?;
    let [n, k] = sides;
    let Rounding { per_channel, bits, algorithm: name, .. } = how;
    let spec = QuantSpec {
        grid: Grid::Int { bits },
        granularity: if per_channel { Granularity::Channel } else { Granularity::Tensor },
        zero: Zero::Symmetric,
        scale: ScaleFormat::Float(FloatFormat::F32),
        outliers: OutlierSpec::None,
    };
    let (unsigned, mut scales) = match algorithm(name)?.gram && grouped::concerns(seen.inputs, &spec) {
        true => grouped::quantize(tensor, (sides, &values), &spec, name, seen)?,
        false => {
            let quantized = codes(tensor, (sides, &values), &spec, name, seen)?;
            let ScaleData::Float(scales) = quantized.scales else {
                return Err(tensor_error(tensor, "was quantized with coded scales, floats were wanted"));
            };
            (quantized.codes, scales)
        }
    };
    let mut codes: Vec<i8> = unsigned.iter().map(|&c| (i32::from(c) - spec.middle()) as i8).collect();
    if let Some(pairs) = pairs {
        let limited =
            Limited { name: tensor.name(), shape: sides, values: &values, spec: &spec, algorithm: name, seen, pairs };
        limited.limit(&mut codes, &mut scales)?;
    }
    let grid = IntGrid::symmetric(IntType::S8);
    let most = (1i32 << (bits - 1)) - 1;
    for (row, scale) in scales.iter_mut().enumerate() {
        let wanted = match per_channel {
            true => least.get(row).copied().unwrap_or(0.0),
            false => least.iter().copied().fold(0.0, f32::max),
        };
        // A channel of zeros has scale 0, by which nothing can be divided.
        let replaced = if *scale < f32::MIN_POSITIVE { wanted.max(1.0) } else { scale.max(wanted) };
        if replaced != *scale {
            *scale = replaced;
            let params = QParams { scale: replaced, zero_point: 0 };
            let range = if per_channel { row * k..(row + 1) * k } else { 0..n * k };
            for (code, &value) in codes[range.clone()].iter_mut().zip(&values[range.clone()]) {
                *code = grid.quantize(params, value).clamp(-most, most) as i8;
            }
            if let Some(pairs) = pairs {
                pairs.limit(&mut codes[range], k, None);
            }
        }
    }
    let codes = if layout == Layout::Columns { transpose(&codes, n, k) } else { codes };
    Ok(Weight { codes, scales, channels: n })
}

/// The least scale of each channel with which a bias fits into 32 bits, half of them kept free for the products.
pub fn least_scales(bias: &[f32], input_scale: f32) -> Vec<f32> {
    bias.iter().map(|b| (f64::from(b.abs()) / (f64::from(input_scale) * f64::from(1 << 30))) as f32).collect()
}

/// A bias in integers of scale `input_scale * weight_scale`; also those scales, one a channel.
pub fn quantize_bias(bias: &[f32], input_scale: f32, weight: &Weight) -> (Vec<i32>, Vec<f32>) {
    let scale = |c: usize| input_scale * weight.scale(c);
    let code = |(c, b): (usize, &f32)| {
        let q = (f64::from(*b) / f64::from(scale(c))).round_ties_even();
        q.clamp(-f64::from(i32::MAX), f64::from(i32::MAX)) as i32
    };
    let scales = if weight.scales.len() == 1 { vec![scale(0)] } else { (0..weight.channels).map(scale).collect() };
    (bias.iter().enumerate().map(code).collect(), scales)
}
