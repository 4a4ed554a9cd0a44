//! Softmax of rows.

use super::math::exp;
use super::{Ops, rows_of};
use crate::simd::{LANES, Simd, SimdOp, dispatch};

impl Ops<'_> {
    /// `x = exp(x - max) / sum(exp(x - max))` for each row of `x` (rows, d), in place.
    ///
    /// A row with NaN, or without a finite value and not all its weight on one infinity, becomes NaN.
    ///
    /// # Panics
    /// If `x` isn't rows of d values.
    pub fn softmax(&self, x: &mut [f32], d: usize) {
        if rows_of("softmax's input", x.len(), d) > 0 {
            self.over_rows(x, d, |_, x| dispatch(self.isa, Softmax { x, d }));
        }
    }
}

struct Softmax<'a> {
    x: &'a mut [f32],
    d: usize,
}

impl SimdOp for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for row in self.x.chunks_mut(self.d) {
            let largest = s.splat(largest(s, row));
            let mut sum = s.splat(0.0);
            for x in row.chunks_mut(LANES) {
                let e = exp(s, s.sub(s.load_partial(x), largest));
                s.store_partial(e, x);
                // Reloaded, so that lanes past the row count as 0.
                sum = s.add(sum, s.load_partial(x));
            }
            let share = s.splat(1.0 / s.sum(sum));
            for x in row.chunks_mut(LANES) {
                s.store_partial(s.mul(s.load_partial(x), share), x);
            }
        }
    }
}

/// The largest number, NaN left out; minus infinity if there is none.
#[inline(always)]
pub(super) fn largest<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut best = s.splat(f32::NEG_INFINITY);
    let (whole, tail) = x.as_chunks::<LANES>();
    for x in whole {
        best = s.max(s.load(x), best);
    }
    let mut largest = s.largest(best);
    for &x in tail {
        if x > largest {
            largest = x;
        }
    }
    largest
}
