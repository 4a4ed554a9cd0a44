//! Rounding by what inputs show, where that is more than one matrix for a whole weight, or one scale for all of it.
//!
//! A convolution of several groups has an input a group, one whose outputs are cut off has one an output channel. A weight
//! with one scale has its scale chosen by the errors of the outputs, each as it costs those who read it: those of codes that
//! make up for each other, under several scales.

use super::{AlgoInput, Seen, TensorProto};
use crate::algo::{algorithm, under_scales};
use crate::error::Result;
use crate::onnx::tensor::tensor_error;
use crate::stats::Input;
use crate::{Granularity, QuantSpec, ScaleData};

/// Scales that are tried, as shares of the one that just holds the largest value.
const SHARES: [f32; 14] = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4, 0.3, 0.2];
/// Products of an error that are tried for, at most: in larger weights hardly any value is near the largest.
const TRIED: usize = 1 << 24;

/// Whether a weight is rounded here.
pub(super) fn concerns(inputs: &[Input], spec: &QuantSpec) -> bool {
    inputs.len() > 1 || inputs.len() == 1 && spec.granularity == Granularity::Tensor
}

/// Codes (n, k) and scales.
pub(super) fn quantize(
    tensor: &TensorProto,
    ([n, k], values): ([usize; 2], &[f32]),
    spec: &QuantSpec,
    name: &str,
    Seen { inputs, costs, .. }: Seen,
) -> Result<(Vec<u8>, Vec<f32>)> {
    let groups = inputs.len();
    if groups == 0 || n % groups != 0 {
        return Err(tensor_error(tensor, format!("{n} output channels, inputs of {groups} groups were seen")));
    }
    let rows = n / groups;
    let part = |g: usize| &values[g * rows * k..(g + 1) * rows * k];
    let importance: Vec<Vec<f32>> = inputs.iter().map(Input::mean_squares).collect();
    let input = |g: usize| AlgoInput {
        name: tensor.name(),
        weight: part(g),
        shape: [rows, k],
        spec,
        importance: Some(&importance[g]),
        calibrated: Some(&inputs[g]),
        seed: 0,
    };
    let mut codes = Vec::with_capacity(values.len());
    if spec.granularity != Granularity::Tensor {
        let run = algorithm(name)?.run;
        let mut scales = Vec::with_capacity(n);
        for g in 0..groups {
            let quantized = run(&input(g))?;
            codes.extend_from_slice(&quantized.codes);
            match quantized.scales {
                ScaleData::Float(own) => scales.extend(own),
                _ => return Err(tensor_error(tensor, "was quantized with coded scales, floats were wanted")),
            }
        }
        return Ok((codes, scales));
    }
    let largest = values.iter().fold(0f32, |most, v| most.max(v.abs()));
    let whole = largest / (spec.middle() - 1).max(1) as f32;
    let scales: Vec<f32> = match n * k * k <= TRIED || groups > 1 {
        true => SHARES.iter().map(|share| share * whole).collect(),
        // The one of least error of the weights, each by what it is multiplied by.
        false => match (algorithm("search")?.run)(&input(0))?.scales {
            ScaleData::Float(found) => found.iter().map(|scale| scale.abs()).collect(),
            _ => vec![whole],
        },
    };
    let mut best: Option<(f64, Vec<u8>, f32)> = None;
    for scale in scales.into_iter().filter(|s| *s >= f32::MIN_POSITIVE) {
        let mut total = 0.0;
        codes.clear();
        for g in 0..groups {
            let (quantized, errors) = under_scales(&input(g), &[scale])?;
            codes.extend_from_slice(&quantized.codes);
            let cost = |row: usize| costs.and_then(|c| c.get(g * rows + row)).copied().unwrap_or(1.0);
            total += errors.iter().enumerate().map(|(row, error)| error * cost(row)).sum::<f64>();
        }
        if best.as_ref().is_none_or(|(least, ..)| total < *least) {
            best = Some((total, codes.clone(), scale));
        }
    }
    // Nothing but zeros.
    Ok(best
        .map_or_else(|| (vec![spec.middle() as u8; values.len()], vec![0.0]), |(_, codes, scale)| (codes, vec![scale])))
}
