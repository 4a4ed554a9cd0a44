//! Counts of values by magnitude and sign, in bins that grow with the values.
//!
//! ```text
//!  negative[2] negative[1] negative[0] | positive[0] positive[1] positive[2]
//!  ------------|-----------|-----------0-----------|-----------|------------
//!            -2w          -w                       w           2w           w = 2^exponent
//! ```
//!
//! The width is the smallest power of two with which [`Histogram::BINS`] bins a side hold the largest magnitude. Where
//! a larger value comes, neighbouring bins join in pairs, which gives exactly the counts that the wider bins would have
//! had from the start: what is kept depends on the values alone, not on their order or on who counted them.

/// A histogram of finite values.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Histogram {
    /// log2 of a bin's width; meaningless while both sides are empty.
    exponent: i32,
    /// Counts of positive values in [i w, (i + 1) w), as far as there are any.
    positive: Vec<u64>,
    /// Counts of negative values with a magnitude in [i w, (i + 1) w), as far as there are any.
    negative: Vec<u64>,
    zeros: u64,
}

impl Histogram {
    /// Bins on each side of zero: at least half of them reach to the largest magnitude.
    pub const BINS: usize = 1 << Self::LOG_BINS;
    const LOG_BINS: i32 = 12;

    /// Counts finite values.
    pub(super) fn add(&mut self, values: &[f32]) {
        let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
        self.hold(largest);
        let per_bin = self.inverse_width();
        for &value in values {
            self.count(value, per_bin, 1);
        }
    }

    /// Counts what another one has counted.
    pub fn merge(&mut self, other: &Histogram) {
        self.zeros += other.zeros;
        if other.is_empty_but_zeros() {
            return;
        }
        if self.is_empty_but_zeros() {
            self.exponent = other.exponent;
        }
        while self.exponent < other.exponent {
            self.double();
        }
        let shift = (self.exponent - other.exponent) as u32;
        for (to, from) in [(&mut self.positive, &other.positive), (&mut self.negative, &other.negative)] {
            for (i, &count) in from.iter().enumerate() {
                add_at(to, i.checked_shr(shift).unwrap_or(0), count);
            }
        }
    }

    /// Values counted, zeros included.
    pub fn total(&self) -> u64 {
        self.zeros + self.positive.iter().sum::<u64>() + self.negative.iter().sum::<u64>()
    }

    /// Values that are exactly zero; they are in no bin.
    pub fn zeros(&self) -> u64 {
        self.zeros
    }

    /// A bin's width.
    pub fn width(&self) -> f64 {
        2f64.powi(self.exponent)
    }

    /// Counts of positive values in [i w, (i + 1) w).
    pub fn positive(&self) -> &[u64] {
        &self.positive
    }

    /// Counts of negative values with a magnitude in [i w, (i + 1) w).
    pub fn negative(&self) -> &[u64] {
        &self.negative
    }

    /// Counts of magnitudes in [i w, (i + 1) w), without zeros.
    pub fn magnitudes(&self) -> Vec<u64> {
        let bins = self.positive.len().max(self.negative.len());
        let at = |side: &[u64], i: usize| side.get(i).copied().unwrap_or(0);
        (0..bins).map(|i| at(&self.positive, i) + at(&self.negative, i)).collect()
    }

    /// Occupied bins as (middle, count), ascending; zeros are a bin of their own.
    pub fn occupied(&self) -> impl Iterator<Item = (f64, u64)> + '_ {
        let w = self.width();
        let middle = move |i: usize| (i as f64 + 0.5) * w;
        let below = self.negative.iter().enumerate().rev().map(move |(i, &count)| (-middle(i), count));
        let above = self.positive.iter().enumerate().map(move |(i, &count)| (middle(i), count));
        below.chain(std::iter::once((0.0, self.zeros))).chain(above).filter(|(_, count)| *count > 0)
    }

    fn is_empty_but_zeros(&self) -> bool {
        self.positive.is_empty() && self.negative.is_empty()
    }

    fn inverse_width(&self) -> f64 {
        2f64.powi(-self.exponent)
    }

    fn count(&mut self, value: f32, per_bin: f64, times: u64) {
        if value == 0.0 {
            self.zeros += times;
            return;
        }
        // Scaling by a power of two is exact in f64 for every f32, and the cast rounds towards zero.
        let bin = (value.abs() as f64 * per_bin) as usize;
        add_at(if value > 0.0 { &mut self.positive } else { &mut self.negative }, bin, times);
    }

    /// Widens bins until they hold this magnitude.
    fn hold(&mut self, magnitude: f32) {
        if magnitude == 0.0 {
            return;
        }
        // magnitude < 2^(log + 1) = BINS * 2^(log + 1 - LOG_BINS)
        let needed = exponent_of(magnitude) + 1 - Self::LOG_BINS;
        if self.is_empty_but_zeros() {
            self.exponent = needed;
        }
        while self.exponent < needed {
            self.double();
        }
    }

    fn double(&mut self) {
        self.exponent += 1;
        for side in [&mut self.positive, &mut self.negative] {
            let joined: Vec<u64> = side.chunks(2).map(|pair| pair.iter().sum()).collect();
            *side = joined;
        }
    }
}

fn add_at(side: &mut Vec<u64>, bin: usize, count: u64) {
    if bin >= side.len() {
        side.resize(bin + 1, 0);
    }
    side[bin] += count;
}

/// floor(log2(x)) of a positive finite number, exactly.
fn exponent_of(x: f32) -> i32 {
    // Every f32 above zero is a normal f64.
    ((x as f64).to_bits() >> 52) as i32 - 1023
}
