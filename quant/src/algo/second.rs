//! Scales and minimums as they are stored: rounded to a float, or as integer codes against a second level.

use super::fit::{Method, inverse};
use crate::{FloatFormat, QuantSpec, ScaleFormat, nf4};
use std::ops::RangeInclusive;

/// The numbers of one row's groups, before and after storing.
#[derive(Debug, Clone, Default)]
pub(super) struct Numbers {
    /// (groups) in full precision; after storing, what the stored numbers mean.
    pub(super) values: Vec<f32>,
    /// (groups) what a unit of squared error costs.
    pub(super) costs: Vec<f32>,
    /// (groups) codes, with a second level.
    pub(super) codes: Vec<i16>,
    /// (spans) second-level scales.
    pub(super) second: Vec<f32>,
}

impl Numbers {
    pub(super) fn push(&mut self, value: f32, cost: f32) {
        self.values.push(value);
        self.costs.push(cost);
    }

    /// Rounds the values to what the spec stores, in place. Dynamic scales stay as they are: they need the tensor.
    ///
    /// `Err` names the number that is beyond the format.
    pub(super) fn store(&mut self, spec: &QuantSpec, k: usize, signed: bool, method: Method) -> Result<(), String> {
        match spec.scale {
            ScaleFormat::Float(float) => {
                for value in &mut self.values {
                    *value = held(float, *value)?;
                }
                Ok(())
            }
            ScaleFormat::Coded { bits, second, .. } => {
                let range = if signed { -(1 << (bits - 1))..=(1 << (bits - 1)) - 1 } else { 0..=(1 << bits) - 1 };
                self.codes.resize(self.values.len(), 0);
                let span = spec.span_groups(k);
                let spans = self.values.chunks_mut(span).zip(self.costs.chunks(span)).zip(self.codes.chunks_mut(span));
                for ((values, costs), codes) in spans {
                    let level = second_level(values, costs, &range, second, method)?;
                    for (value, code) in values.iter_mut().zip(codes) {
                        *code = nearest(*value, level, &range);
                        *value = *code as f32 * level;
                    }
                    self.second.push(level);
                }
                Ok(())
            }
            ScaleFormat::Dynamic { .. } => Ok(()),
        }
    }
}

/// The value as the format holds it.
fn held(float: FloatFormat, value: f32) -> Result<f32, String> {
    let rounded = float.round(value);
    if rounded.is_finite() {
        Ok(rounded)
    } else {
        Err(format!("scale or minimum {value} is beyond {}, which ends at {}", float.name(), float.max()))
    }
}

fn nearest(value: f32, level: f32, range: &RangeInclusive<i16>) -> i16 {
    (value * inverse(level)).round_ties_even().clamp(*range.start() as f32, *range.end() as f32) as i16
}

/// The second-level scale of one span: the one that just holds the largest number, or of those around it the one of
/// least cost. It has the sign of the numbers where codes are unsigned.
fn second_level(
    values: &[f32],
    costs: &[f32],
    range: &RangeInclusive<i16>,
    float: FloatFormat,
    method: Method,
) -> Result<f32, String> {
    let peak = values.iter().copied().reduce(|a, b| if b.abs() > a.abs() { b } else { a }).unwrap_or(0.0);
    if peak == 0.0 {
        return Ok(0.0);
    }
    let (low, top) = (*range.start() as f32, *range.end() as f32);
    let signed = low < 0.0;
    let plain = held(float, if signed { peak.abs() / top } else { peak / top })?;
    if method != Method::Search {
        return Ok(plain);
    }
    let cost = |level: f32| -> f64 {
        let errors = values.iter().zip(costs).map(|(&v, &c)| {
            let error = (nearest(v, level, range) as f32 * level - v) as f64;
            c as f64 * error * error
        });
        errors.sum()
    };
    let mut best = (plain, cost(plain));
    let mut offer = |level: f32| {
        let level = float.round(level);
        if level.is_finite() && level != 0.0 {
            let cost = cost(level);
            if cost < best.1 {
                best = (level, cost);
            }
        }
    };
    let ends = [peak / top, if signed { peak / low } else { 0.0 }];
    for end in ends {
        for i in 0..24 {
            offer(end / (0.97 + 0.015 * i as f32));
        }
    }
    // The codes of the best level, fitted by least squares.
    let level = best.0;
    let (mut vc, mut cc) = (0f64, 0f64);
    for (&v, &c) in values.iter().zip(costs) {
        let code = nearest(v, level, range) as f64;
        vc += c as f64 * code * v as f64;
        cc += c as f64 * code * code;
    }
    if cc > 0.0 {
        let level = float.round((vc / cc) as f32);
        if level.is_finite() && level != 0.0 && cost(level) < best.1 {
            return Ok(level);
        }
    }
    Ok(best.0)
}

/// The scales of a whole tensor as QLoRA stores them (bitsandbytes' nested quantization): the mean is taken off, then
/// every `blocks` of them share an absmax.
pub(super) struct Dynamic {
    /// (n * groups) indices into the dynamic map.
    pub(super) codes: Vec<u8>,
    /// One for every `blocks` codes.
    pub(super) absmax: Vec<f32>,
    /// The mean.
    pub(super) offset: f32,
}

impl Dynamic {
    /// Stores the scales; `scales` become what the stored ones mean.
    pub(super) fn store(scales: &mut [f32], blocks: usize) -> Dynamic {
        let sum: f64 = scales.iter().map(|&s| s as f64).sum();
        let offset = if scales.is_empty() { 0.0 } else { (sum / scales.len() as f64) as f32 };
        let mut stored = Dynamic { codes: Vec::with_capacity(scales.len()), absmax: Vec::new(), offset };
        for block in scales.chunks_mut(blocks) {
            let absmax = block.iter().fold(0f32, |m, s| m.max((s - offset).abs()));
            let by = 1.0 / absmax.max(1e-38);
            for scale in block {
                let code = nf4::dynamic_code((*scale - offset) * by);
                *scale = nf4::dynamic_map()[code as usize] * absmax + offset;
                stored.codes.push(code);
            }
            stored.absmax.push(absmax);
        }
        stored
    }
}
