//! All that is kept of the values of one tensor or channel.

use super::Histogram;
use crate::Range;

/// Running sums that a vector unit can add side by side.
const LANES: usize = 8;

/// Statistics of a tensor's or a channel's values over any number of batches, in memory that doesn't grow with them.
///
/// The merge law: statistics of batches A merged with statistics of batches B, in either order, equal those of A and B
/// together. Counts, extremes and histograms do exactly; sums of squares and of extremes, which are made in f64, to a
/// relative error of n * 2^-52 for n values (no term is negative, or all of a sum have one sign).
#[derive(Debug, Clone, PartialEq)]
pub struct Statistics {
    count: u64,
    nans: u64,
    infinities: u64,
    lo: f32,
    hi: f32,
    squares: f64,
    batches: u64,
    /// Sums over the batches of min(smallest, 0) and max(largest, 0).
    lows: f64,
    highs: f64,
    histogram: Option<Histogram>,
}

impl Statistics {
    /// Nothing seen yet; with a histogram if observers need one.
    pub fn new(histogram: bool) -> Statistics {
        Statistics {
            count: 0,
            nans: 0,
            infinities: 0,
            lo: f32::INFINITY,
            hi: f32::NEG_INFINITY,
            squares: 0.0,
            batches: 0,
            lows: 0.0,
            highs: 0.0,
            histogram: histogram.then(Histogram::default),
        }
    }

    /// Takes in one batch. Values that aren't finite are counted and otherwise left out.
    pub fn observe(&mut self, values: &[f32]) {
        let (mut lo, mut hi, mut squares, mut finite) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES], 0.0, true);
        let mut sums = [0f64; LANES];
        for chunk in values.chunks(LANES) {
            for (lane, &v) in chunk.iter().enumerate() {
                lo[lane] = lo[lane].min(v);
                hi[lane] = hi[lane].max(v);
                sums[lane] += v as f64 * v as f64;
            }
        }
        for lane in 0..LANES {
            squares += sums[lane];
            finite &= sums[lane].is_finite();
        }
        if !finite {
            return self.observe_finite_ones(values);
        }
        let lo = lo.into_iter().fold(f32::INFINITY, f32::min);
        let hi = hi.into_iter().fold(f32::NEG_INFINITY, f32::max);
        self.take(values, lo, hi, squares);
    }

    /// Takes in what another one has seen.
    ///
    /// A histogram is kept only if both have one: half a histogram would say something false about the whole.
    pub fn merge(&mut self, other: &Statistics) {
        self.count += other.count;
        self.nans += other.nans;
        self.infinities += other.infinities;
        self.lo = self.lo.min(other.lo);
        self.hi = self.hi.max(other.hi);
        self.squares += other.squares;
        self.batches += other.batches;
        self.lows += other.lows;
        self.highs += other.highs;
        match (&mut self.histogram, &other.histogram) {
            (Some(own), Some(others)) => own.merge(others),
            _ => self.histogram = None,
        }
    }

    /// Finite values seen.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// NaNs seen.
    pub fn nans(&self) -> u64 {
        self.nans
    }

    /// Infinities seen, of either sign.
    pub fn infinities(&self) -> u64 {
        self.infinities
    }

    /// NaNs and infinities seen.
    pub fn not_finite(&self) -> u64 {
        self.nans + self.infinities
    }

    /// Smallest and largest value, zero included.
    pub fn range(&self) -> Range {
        Range { lo: self.lo.min(0.0), hi: self.hi.max(0.0) }
    }

    /// Smallest and largest value, whichever side of zero; `None` before the first finite one.
    pub fn extremes(&self) -> Option<(f32, f32)> {
        (self.count > 0).then_some((self.lo, self.hi))
    }

    /// Means over the batches of their smallest and largest values, zero included.
    pub fn average_range(&self) -> Range {
        let batches = self.batches.max(1) as f64;
        Range { lo: (self.lows / batches) as f32, hi: (self.highs / batches) as f32 }
    }

    /// Mean of the squares: the second moment about zero. 0 before the first value.
    pub fn mean_square(&self) -> f64 {
        self.squares / self.count.max(1) as f64
    }

    /// The histogram, if one is kept.
    pub fn histogram(&self) -> Option<&Histogram> {
        self.histogram.as_ref()
    }

    fn observe_finite_ones(&mut self, values: &[f32]) {
        self.nans += values.iter().filter(|v| v.is_nan()).count() as u64;
        self.infinities += values.iter().filter(|v| v.is_infinite()).count() as u64;
        let finite: Vec<f32> = values.iter().copied().filter(|v| v.is_finite()).collect();
        let lo = finite.iter().copied().fold(f32::INFINITY, f32::min);
        let hi = finite.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let squares = finite.iter().map(|&v| v as f64 * v as f64).sum();
        self.take(&finite, lo, hi, squares);
    }

    /// Takes in finite values of which these things are known.
    fn take(&mut self, values: &[f32], lo: f32, hi: f32, squares: f64) {
        if values.is_empty() {
            return;
        }
        self.count += values.len() as u64;
        self.lo = self.lo.min(lo);
        self.hi = self.hi.max(hi);
        self.squares += squares;
        self.batches += 1;
        self.lows += lo.min(0.0) as f64;
        self.highs += hi.max(0.0) as f64;
        if let Some(histogram) = &mut self.histogram {
            histogram.add(values);
        }
    }
}
