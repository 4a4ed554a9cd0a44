//! The range of least mean squared error.

use super::{Histogram, IntGrid, Statistics};
use crate::Range;

/// Shrunk ranges tried for both ends together, then for each end alone.
const STEPS: usize = 100;

pub(super) fn range(seen: &Statistics, grid: IntGrid) -> Range {
    let whole = seen.range();
    let Some(histogram) = seen.histogram() else { return whole };
    let bins: Vec<(f64, u64)> = histogram.occupied().collect();
    let of = |range: Range| error(histogram, &bins, range, grid);
    let mut best = (whole, of(whole));
    let mut offer = |range: Range| {
        let error = of(range);
        if error < best.1 {
            best = (range, error);
        }
        best.0
    };
    let shares = || (1..STEPS).map(|i| i as f32 / STEPS as f32);
    let mut found = whole;
    for share in shares() {
        found = offer(Range { lo: whole.lo * share, hi: whole.hi * share });
    }
    if !grid.symmetric {
        for share in shares() {
            offer(Range { lo: whole.lo * share, ..found });
            offer(Range { hi: whole.hi * share, ..found });
        }
    }
    best.0
}

/// Sum over the values of the squared error that a range gives.
///
/// Bins stand for their middles. Where the grid is as fine as the bins, rounding within them can't be told and is taken
/// as evenly spread: a twelfth of a squared step each.
fn error(histogram: &Histogram, bins: &[(f64, u64)], range: Range, grid: IntGrid) -> f64 {
    let params = grid.params(range);
    let (low, high) = grid.limits();
    let (scale, zero) = (params.scale as f64, params.zero_point as f64);
    let fine = scale < 2.0 * histogram.width();
    let (low, high) = (low as f64 - zero, high as f64 - zero);
    let one = |&(x, count): &(f64, u64)| {
        let exact = x / scale;
        let inside = (low - 0.5..=high + 0.5).contains(&exact);
        let squared = match (fine && inside, x == 0.0) {
            (_, true) => 0.0,
            (true, _) => scale * scale / 12.0,
            (false, _) => (x - exact.round_ties_even().clamp(low, high) * scale).powi(2),
        };
        squared * count as f64
    };
    bins.iter().map(one).sum()
}
