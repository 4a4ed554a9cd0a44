//! HQQ (half-quadratic quantization): the scale of the range, and the minimum that leaves few large errors.
//!
//! Without data, errors to the power of 0.7 are lowered in two steps that take turns: large errors are set aside by
//! `shrink(e) = sign(e) max(0, |e| - |e|^(p-1) / beta)`, then the minimum is the mean of what is left.

use super::{Extremes, Fit, Group, Rule, inverse};

/// The power of errors, and how strongly they are set aside: HQQ's own numbers.
const POWER: f32 = 0.7;
const BETA: f32 = 10.0;
/// Most rounds; the error is least after a few.
const ROUNDS: usize = 20;

/// Fits scale and minimum; weights aren't used.
pub(super) fn fit(rule: &Rule, group: Group, range: Extremes) -> Fit {
    let lo = if rule.low_min { range.lo.min(0.0) } else { range.lo };
    let scale = (range.hi - lo).max(0.0) / rule.high;
    let by = inverse(scale);
    let count = group.x.len().max(1) as f32;
    let level = |x: f32, min: f32| ((x - min) * by).round_ties_even().clamp(0.0, rule.high);
    let (mut min, mut best) = (lo, (f32::INFINITY, lo));
    for _ in 0..ROUNDS {
        let (mut error, mut sum) = (0.0, 0.0);
        for &x in group.x {
            let on_grid = scale * level(x, min);
            let off = x - (on_grid + min);
            error += off.abs();
            let aside = off.signum() * (off.abs() - off.abs().powf(POWER - 1.0) / BETA).max(0.0);
            sum += x - aside - on_grid;
        }
        if error >= best.0 {
            break;
        }
        best = (error, min);
        min = sum / count;
        min = if rule.low_min { min.min(0.0) } else { min };
    }
    let min = best.1;
    let ll = group.x.iter().map(|x| level(*x, min).powi(2)).sum();
    Fit { scale, min, zero: 0, scale_cost: ll, min_cost: count }
}

/// The same with the minimum rounded to a zero point.
pub(super) fn fit_zero(rule: &Rule, group: Group, range: Extremes) -> Fit {
    let range = range.with_zero();
    let fit = fit(rule, group, range);
    let zero = (-fit.min * inverse(fit.scale)).round_ties_even().clamp(0.0, rule.high);
    Fit { min: 0.0, zero: zero as i32, ..fit }
}
