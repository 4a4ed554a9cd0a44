//! What quantization did to each tensor, read off the float and the quantized model.

use super::proto::*;
use super::tensor::{elements, floats, ints};
use super::{Graph, Model};
use crate::error::Result;
use std::collections::BTreeMap;

/// An activation with a scale.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct ActivationRow {
    /// Its name.
    pub tensor: String,
    /// The step.
    pub scale: f32,
    /// The integer that means zero.
    pub zero_point: i64,
    /// Smallest and largest value that the integers reach.
    pub range: [f32; 2],
}

/// A weight or constant in integers.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct WeightRow {
    /// The name of the float tensor that it was.
    pub tensor: String,
    /// Bits of an integer.
    pub bits: usize,
    /// Scales: one, one a channel, or one a block.
    pub scales: usize,
    /// Power of the float values over that of the rounding, in dB; `None` where nothing was lost.
    pub sqnr_db: Option<f64>,
}

/// A row a tensor.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize)]
pub struct Report {
    /// Of activations, in the graph's order.
    pub activations: Vec<ActivationRow>,
    /// Of constants, in the graph's order.
    pub weights: Vec<WeightRow>,
}

/// Reads every QuantizeLinear of an activation, and every DequantizeLinear of integers that stand for a constant of the
/// float model, known by its name: `{name}_quantized`. Biases aren't among them: they are changed on purpose.
///
/// # Errors
/// A graph that is none, or constants whose bytes don't fit their shape.
pub fn report(float: &Model, quantized: &Model) -> Result<Report> {
    let graph = Graph::new(quantized.graph())?;
    let exact: BTreeMap<&str, &TensorProto> = float.graph().initializer.iter().map(|t| (t.name(), t)).collect();
    let mut report = Report::default();
    for (_, node) in graph.nodes() {
        match (node.op_type(), graph.constant(node.arg(0)), graph.constant(node.arg(1))) {
            ("QuantizeLinear", None, Some(scale)) => report.activations.extend(activation(&graph, node, scale)?),
            ("DequantizeLinear", Some(codes), Some(scale)) => {
                let name = codes.name().strip_suffix("_quantized").unwrap_or(codes.name());
                let same = |t: &&&TensorProto| t.dims == codes.dims && codes.data_type() != DataType::Int32;
                let Some(exact) = exact.get(name).filter(same) else { continue };
                report.weights.push(weight(node, exact, codes, scale, graph.constant(node.arg(2)))?);
            }
            _ => {}
        }
    }
    Ok(report)
}

fn activation(graph: &Graph, node: &NodeProto, scale: &TensorProto) -> Result<Option<ActivationRow>> {
    let Some(zero) = graph.constant(node.arg(2)) else { return Ok(None) };
    let (scales, zeros) = (floats(scale)?, ints(zero)?);
    let ([scale], [zero_point]) = (scales.as_slice(), zeros.as_slice()) else { return Ok(None) };
    let (low, high) = match zero.data_type() {
        DataType::Uint8 => (0, 255),
        DataType::Int8 => (-128, 127),
        DataType::Uint16 => (0, 65_535),
        DataType::Int16 => (-32_768, 32_767),
        _ => return Ok(None),
    };
    let value = |code: i64| (code - zero_point) as f32 * scale;
    let (tensor, range) = (node.arg(0).to_owned(), [value(low), value(high)]);
    Ok(Some(ActivationRow { tensor, scale: *scale, zero_point: *zero_point, range }))
}

/// What the integers of a constant mean, in their order: one scale, one a channel, or one a block.
pub(super) fn dequantize(
    node: &NodeProto,
    codes: &TensorProto,
    scale: &TensorProto,
    zero: Option<&TensorProto>,
) -> Result<Vec<f32>> {
    let (codes_of, scales) = (ints(codes)?, floats(scale)?);
    let zeros = zero.map(ints).transpose()?.unwrap_or_default();
    let dims: Vec<usize> = codes.dims.iter().map(|&d| d.max(0) as usize).collect();
    let axis = usize::try_from(node.int("axis", 1)).unwrap_or(0).min(dims.len().saturating_sub(1));
    let inner: usize = dims.iter().skip(axis + 1).product();
    let side = dims.get(axis).copied().unwrap_or(1).max(1);
    let block = usize::try_from(node.int("block_size", 0)).unwrap_or(0);
    let place = |index: usize| match (scales.len(), block) {
        (1, _) => 0,
        (_, 0) => index / inner.max(1) % side,
        (_, block) => {
            let (outer, along) = (index / (inner * side).max(1), index / inner.max(1) % side);
            (outer * side.div_ceil(block) + along / block) * inner + index % inner.max(1)
        }
    };
    let one = |(index, code): (usize, &i64)| {
        let (scale, zero) = (scales.get(place(index)), zeros.get(place(index)));
        let steps = *code - zero.copied().unwrap_or_default();
        (steps as f64 * f64::from(scale.copied().unwrap_or_default())) as f32
    };
    Ok(codes_of.iter().enumerate().map(one).collect())
}

fn weight(
    node: &NodeProto,
    exact: &TensorProto,
    codes: &TensorProto,
    scale: &TensorProto,
    zero: Option<&TensorProto>,
) -> Result<WeightRow> {
    let (mut signal, mut noise) = (0f64, 0f64);
    for (&value, rounded) in floats(exact)?.iter().zip(dequantize(node, codes, scale, zero)?) {
        signal += f64::from(value).powi(2);
        noise += (f64::from(value) - f64::from(rounded)).powi(2);
    }
    Ok(WeightRow {
        tensor: exact.name().to_owned(),
        bits: codes.data_type().bits().unwrap_or_default(),
        scales: elements(scale)?,
        sqnr_db: (noise > 0.0).then(|| 10.0 * (signal / noise).log10()),
    })
}
