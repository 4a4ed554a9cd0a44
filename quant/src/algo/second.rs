//! Scales and minimums as they are stored: rounded to a float, or as integer codes against a second level.

use super::fit::{Method, inverse, lanes, least};
use crate::{FloatFormat, QuantSpec, ScaleFormat, nf4};
use nibble_kernels::simd::{LANES, Simd};

/// How many second-level scales are tried for a span's peak at an end of the codes, and how far beyond it and inside of it
/// the peak then lies.
const TRIED: usize = 2 * LANES;
const NARROW: f32 = 0.97;
const WIDE: f32 = 1.315;

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
    /// Room for those of `groups` groups.
    pub(super) fn of(groups: usize) -> Numbers {
        Numbers { values: Vec::with_capacity(groups), costs: Vec::with_capacity(groups), ..Numbers::default() }
    }

    pub(super) fn push(&mut self, value: f32, cost: f32) {
        self.values.push(value);
        self.costs.push(cost);
    }

    /// Rounds the values to what the spec stores, in place. Dynamic scales stay as they are: they need the tensor.
    ///
    /// `Err` names the number that is beyond the format.
    #[inline(always)]
    pub(super) fn store<S: Simd>(
        &mut self,
        s: S,
        spec: &QuantSpec,
        k: usize,
        signed: bool,
        method: Method,
    ) -> Result<(), String> {
        match spec.scale {
            ScaleFormat::Float(float) => {
                for value in &mut self.values {
                    *value = held(float, *value)?;
                }
                Ok(())
            }
            ScaleFormat::Coded { bits, second, .. } => {
                let ends = if signed { (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) } else { (0, (1 << bits) - 1) };
                let codes = Codes { low: ends.0 as f32, high: ends.1 as f32, float: second };
                self.codes.resize(self.values.len(), 0);
                let span = spec.span_groups(k);
                self.second.reserve_exact(self.values.len().div_ceil(span));
                let spans = self.values.chunks_mut(span).zip(self.costs.chunks(span)).zip(self.codes.chunks_mut(span));
                for ((values, costs), coded) in spans {
                    let level = codes.second_level(s, values, costs, method)?;
                    let by = inverse(level);
                    for (value, code) in values.iter_mut().zip(coded) {
                        let near = codes.nearest(*value, by);
                        (*code, *value) = (near as i16, near * level);
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

/// The codes of a second level and how its scales are stored.
#[derive(Clone, Copy)]
struct Codes {
    low: f32,
    high: f32,
    float: FloatFormat,
}

impl Codes {
    #[inline(always)]
    fn nearest(self, value: f32, by: f32) -> f32 {
        (value * by).round_ties_even().clamp(self.low, self.high)
    }

    /// The second-level scale of one span: the one that just holds the largest number, or of those around it the one of
    /// least cost. It has the sign of the numbers where codes are unsigned.
    #[inline(always)]
    fn second_level<S: Simd>(self, s: S, values: &[f32], costs: &[f32], method: Method) -> Result<f32, String> {
        let mut peak = 0f32;
        for &value in values {
            peak = if value.abs() > peak.abs() { value } else { peak };
        }
        if peak == 0.0 {
            return Ok(0.0);
        }
        let signed = self.low < 0.0;
        let plain = held(self.float, if signed { peak.abs() / self.high } else { peak / self.high })?;
        if method != Method::Search {
            return Ok(plain);
        }
        let mut best = (plain, lanes(s, self.cost(s, values, costs, [plain; LANES]))[0]);
        let ends = [peak / self.high, if signed { peak / self.low } else { 0.0 }];
        for end in &ends[..if signed { 2 } else { 1 }] {
            for first in (0..TRIED).step_by(LANES) {
                let mut levels = [plain; LANES];
                for (i, level) in levels.iter_mut().enumerate() {
                    let by = NARROW + (WIDE - NARROW) * (first + i) as f32 / (TRIED - 1) as f32;
                    *level = self.usable(end / by).unwrap_or(plain);
                }
                let cost = self.cost(s, values, costs, levels);
                if let Some(lane) = least(s, cost, best.1) {
                    best = (levels[lane], lanes(s, cost)[lane]);
                }
            }
        }
        // The codes of the best level, fitted by least squares.
        let by = inverse(best.0);
        let (mut vc, mut cc) = (0f64, 0f64);
        for (&v, &c) in values.iter().zip(costs) {
            let code = self.nearest(v, by) as f64;
            vc += c as f64 * code * v as f64;
            cc += c as f64 * code * code;
        }
        let Some(fitted) = self.usable((vc / cc) as f32) else { return Ok(best.0) };
        let cost = lanes(s, self.cost(s, values, costs, [fitted; LANES]))[0];
        Ok(if cost < best.1 { fitted } else { best.0 })
    }

    /// The level as it is stored, if that is a scale.
    fn usable(self, level: f32) -> Option<f32> {
        let level = self.float.round(level);
        (level.is_finite() && level != 0.0).then_some(level)
    }

    /// What numbers rounded to the codes of each level cost.
    #[inline(always)]
    fn cost<S: Simd>(self, s: S, values: &[f32], costs: &[f32], levels: [f32; LANES]) -> S::F32 {
        let mut by = [0.0; LANES];
        for (by, level) in by.iter_mut().zip(levels) {
            *by = inverse(level);
        }
        let (by, levels, low, high) = (s.load(&by), s.load(&levels), s.splat(self.low), s.splat(self.high));
        let mut sum = s.splat(0.0);
        for (&value, &cost) in values.iter().zip(costs) {
            let value = s.splat(value);
            let code = s.to_f32(s.to_i32(s.min(s.max(s.mul(value, by), low), high)));
            let off = s.fnma(code, levels, value);
            sum = s.fma(s.mul(s.splat(cost), off), off, sum);
        }
        sum
    }
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
