//! All that is kept of the values of one tensor or channel.

use super::Histogram;
use crate::Range;

/// Running sums that a vector unit can add side by side.
const LANES: usize = 8;

/// Statistics of a tensor's or a channel's values over any number of batches, in memory that doesn't grow with them.
///
/// The merge law: statistics of batches A merged with statistics of batches B, in either order, equal those of A and B
/// together. Counts, extremes and histograms do exactly; sums, which are made in f64, to n * 2^-52 for n values, relative
/// to the sum of their terms' magnitudes.
#[derive(Debug, Clone, PartialEq)]
pub struct Statistics {
    count: u64,
    nans: u64,
    infinities: u64,
    lo: f32,
    hi: f32,
    sum: f64,
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
            sum: 0.0,
            squares: 0.0,
            batches: 0,
            lows: 0.0,
            highs: 0.0,
            histogram: histogram.then(Histogram::default),
        }
    }

    /// Takes in one batch. Values that aren't finite are counted and otherwise left out.
    pub fn observe(&mut self, values: &[f32]) {
        let mut lanes = Columns::<[f32; LANES], [f64; LANES]>::default();
        let whole = values.chunks_exact(LANES);
        let rest = whole.remainder();
        whole.for_each(|chunk| lanes.add(chunk));
        lanes.add(rest);
        let batch = lanes.batches().fold(Batch::default(), Batch::with);
        match batch.squares.is_finite() {
            true => self.take(values, batch),
            false => self.observe_finite_ones(values),
        }
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
        self.sum += other.sum;
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

    /// Mean of the values. 0 before the first one.
    pub fn mean(&self) -> f64 {
        self.sum / self.count.max(1) as f64
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
        let mut all = Columns::<[f32; 1], [f64; 1]>::default();
        finite.iter().for_each(|v| all.add(std::slice::from_ref(v)));
        let batch = all.batches().fold(Batch::default(), Batch::with);
        self.take(&finite, batch);
    }

    /// Takes in finite values, of which these things are known.
    pub(super) fn take(&mut self, values: &[f32], batch: Batch) {
        self.take_unseen(values.len(), batch);
        if let Some(histogram) = self.histogram.as_mut().filter(|_| !values.is_empty()) {
            histogram.add(values);
        }
    }

    /// Takes in what is known of `count` finite values; without a histogram that is all there is to take.
    pub(super) fn take_unseen(&mut self, count: usize, batch: Batch) {
        if count == 0 {
            return;
        }
        self.count += count as u64;
        self.lo = self.lo.min(batch.lo);
        self.hi = self.hi.max(batch.hi);
        self.sum += batch.sum;
        self.squares += batch.squares;
        self.batches += 1;
        self.lows += f64::from(batch.lo.min(0.0));
        self.highs += f64::from(batch.hi.max(0.0));
    }
}

/// What is known of a batch without a histogram. `squares` isn't finite if a value isn't.
#[derive(Debug, Clone, Copy)]
pub(super) struct Batch {
    lo: f32,
    hi: f32,
    sum: f64,
    pub(super) squares: f64,
}

impl Default for Batch {
    fn default() -> Self {
        Self { lo: f32::INFINITY, hi: f32::NEG_INFINITY, sum: 0.0, squares: 0.0 }
    }
}

impl Batch {
    fn with(self, other: Batch) -> Batch {
        Batch {
            lo: self.lo.min(other.lo),
            hi: self.hi.max(other.hi),
            sum: self.sum + other.sum,
            squares: self.squares + other.squares,
        }
    }
}

/// A [`Batch`] for each of some columns, as arrays that a vector unit goes along.
pub(super) struct Columns<F, D> {
    lo: F,
    hi: F,
    sum: D,
    squares: D,
}

impl<const N: usize> Default for Columns<[f32; N], [f64; N]> {
    fn default() -> Self {
        Self { lo: [f32::INFINITY; N], hi: [f32::NEG_INFINITY; N], sum: [0.0; N], squares: [0.0; N] }
    }
}

impl Columns<Vec<f32>, Vec<f64>> {
    pub(super) fn new(columns: usize) -> Self {
        Self {
            lo: vec![f32::INFINITY; columns],
            hi: vec![f32::NEG_INFINITY; columns],
            sum: vec![0.0; columns],
            squares: vec![0.0; columns],
        }
    }
}

impl<F: AsRef<[f32]> + AsMut<[f32]>, D: AsRef<[f64]> + AsMut<[f64]>> Columns<F, D> {
    /// Takes in one value of each column, or of the first ones. With a NaN the extremes mean nothing.
    #[inline(always)]
    pub(super) fn add(&mut self, row: &[f32]) {
        // As the processor's instructions choose, unlike f32::min, which takes care of NaN.
        for (lo, &v) in self.lo.as_mut().iter_mut().zip(row) {
            *lo = if v < *lo { v } else { *lo };
        }
        for (hi, &v) in self.hi.as_mut().iter_mut().zip(row) {
            *hi = if v > *hi { v } else { *hi };
        }
        for ((sum, squares), &v) in self.sum.as_mut().iter_mut().zip(self.squares.as_mut()).zip(row) {
            let v = f64::from(v);
            *sum += v;
            *squares += v * v;
        }
    }

    /// What is known of each column.
    pub(super) fn batches(&self) -> impl Iterator<Item = Batch> + '_ {
        let ends = self.lo.as_ref().iter().zip(self.hi.as_ref());
        let sums = self.sum.as_ref().iter().zip(self.squares.as_ref());
        ends.zip(sums).map(|((&lo, &hi), (&sum, &squares))| Batch { lo, hi, sum, squares })
    }
}
