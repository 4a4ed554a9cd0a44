//! The range of a share of the values.

use super::{IntGrid, Statistics};
use crate::Range;

/// Cuts off the same number of values at both ends; of a symmetric grid those of largest magnitude.
///
/// Within a bin values are taken as evenly spread, so that an end is off by at most one bin: 1/2048 of the largest
/// magnitude.
pub(super) fn range(seen: &Statistics, percent: f64, grid: IntGrid) -> Range {
    let extremes = seen.range();
    let Some(histogram) = seen.histogram() else { return extremes };
    let (total, width, cut) = (histogram.total() as f64, histogram.width(), 1.0 - percent / 100.0);
    if grid.symmetric {
        let reach = end(&histogram.magnitudes(), width, cut * total).min(extremes.absmax());
        return Range { lo: extremes.lo.max(-reach), hi: extremes.hi.min(reach) };
    }
    let each = 0.5 * cut * total;
    let hi = end(histogram.positive(), width, each).min(extremes.hi);
    let lo = end(histogram.negative(), width, each).min(-extremes.lo);
    Range { lo: -lo, hi }
}

/// Where `cut` values lie further out; 0 if the bins hold no more than that.
fn end(bins: &[u64], width: f64, cut: f64) -> f32 {
    let mut left = cut;
    for (i, &count) in bins.iter().enumerate().rev() {
        let count = count as f64;
        if count > left {
            return ((i as f64 + 1.0 - left / count) * width) as f32;
        }
        left -= count;
    }
    0.0
}
