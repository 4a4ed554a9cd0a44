//! The threshold of least Kullback-Leibler divergence (8-bit Inference with TensorRT, S. Migacz, GTC 2017).
//!
//! For every threshold the distribution of magnitudes clipped to it, P, is compared with what the grid makes of it, Q:
//! P's bins below the threshold joined into as many as the grid has levels, and each spread evenly over those of its
//! bins that hold anything. What is clipped counts in P's last bin but not in Q, so that clipping costs.

use super::{IntGrid, Statistics};
use crate::Range;

/// Most bins that are searched.
const BINS: usize = 2048;
/// The count that Q's last bin is given where it holds nothing but what was clipped, so that the divergence stays finite.
const SMOOTHING: f64 = 1e-4;

pub(super) fn range(seen: &Statistics, grid: IntGrid) -> Range {
    let extremes = seen.range();
    let Some(histogram) = seen.histogram() else { return extremes };
    let (mut bins, mut width) = (histogram.magnitudes(), histogram.width());
    while bins.len() > BINS {
        bins = bins.chunks(2).map(|pair| pair.iter().sum()).collect();
        width *= 2.0;
    }
    // A grid with a zero point of its own spends all levels on the only side that there is.
    let one_sided = extremes.lo == 0.0 || extremes.hi == 0.0;
    let levels = 1usize << if one_sided && !grid.symmetric { grid.int.bits() } else { grid.int.bits() - 1 };
    let threshold = (threshold(&bins, levels) as f64 * width) as f32;
    Range { lo: extremes.lo.max(-threshold), hi: extremes.hi.min(threshold) }
}

/// How many of the bins to keep; all where they are no more than the levels.
fn threshold(bins: &[u64], levels: usize) -> usize {
    let sums = Sums::of(bins);
    let mut best = (bins.len(), f64::INFINITY);
    for kept in levels..=bins.len() {
        let divergence = sums.divergence(kept, levels, bins[kept - 1] as f64);
        // Of equals the larger threshold: it clips less.
        if divergence <= best.1 {
            best = (kept, divergence);
        }
    }
    best.0
}

/// Sums over the bins before each one, so that a level costs the same however many bins it joins.
struct Sums {
    count: Vec<f64>,
    held: Vec<f64>,
    /// `count * ln(count)`
    logs: Vec<f64>,
}

impl Sums {
    fn of(bins: &[u64]) -> Sums {
        let before = |f: &dyn Fn(f64) -> f64| -> Vec<f64> {
            let mut sum = 0.0;
            let ends = bins.iter().map(|&b| {
                sum += f(b as f64);
                sum
            });
            std::iter::once(0.0).chain(ends).collect()
        };
        Sums { count: before(&|b| b), held: before(&|b| if b > 0.0 { 1.0 } else { 0.0 }), logs: before(&times_log) }
    }

    /// `sum p ln(p / q)` over the first `kept` bins; `last` is the count of the last of them.
    fn divergence(&self, kept: usize, levels: usize, last: f64) -> f64 {
        let (all, inside) = (self.count[self.count.len() - 1], self.count[kept]);
        let clipped = all - inside;
        if inside == 0.0 {
            return f64::INFINITY;
        }
        // sum P ln P, then less sum P ln Q, both in counts.
        let mut sum = self.logs[kept] - times_log(last) + times_log(last + clipped);
        for level in 0..levels {
            let (from, to) = (level * kept / levels, (level + 1) * kept / levels);
            let (count, held) = (self.count[to] - self.count[from], self.held[to] - self.held[from]);
            let own = if to == kept && last > 0.0 { count + clipped } else { count };
            if held > 0.0 {
                sum -= own * (count / held).ln();
            }
        }
        if last == 0.0 && clipped > 0.0 {
            sum -= clipped * SMOOTHING.ln();
        }
        sum / all + (inside / all).ln()
    }
}

fn times_log(x: f64) -> f64 {
    if x > 0.0 { x * x.ln() } else { 0.0 }
}
