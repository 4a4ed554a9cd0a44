//! Normalization of rows: RMS norm, layer norm, and both fused with the residual sum before them.
//!
//! A head's norm (QK-norm) is the RMS norm of rows of `head_dim` values, in place.

use super::{GRAIN, Ops, lanes, rows_of};
use crate::simd::{LANES, Simd, SimdOp, dispatch};

/// `y = x / sqrt(mean(x^2) + eps) * weight` (arXiv 1910.07467).
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm<'a> {
    /// (d) factors.
    pub weight: &'a [f32],
    /// Added to the mean of squares.
    pub eps: f32,
    /// Whether the factor is 1 + weight, as Gemma stores it.
    pub add_one: bool,
}

/// `y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias` (arXiv 1607.06450).
#[derive(Debug, Clone, Copy)]
pub struct LayerNorm<'a> {
    /// (d) factors.
    pub weight: &'a [f32],
    /// (d) summands.
    pub bias: Option<&'a [f32]>,
    /// Added to the variance.
    pub eps: f32,
}

/// The norm of one row, in place.
trait RowNorm: Copy + Sync {
    /// Values of a row.
    fn width(self) -> usize;
    fn row<S: Simd>(self, s: S, x: &mut [f32]);
}

impl Ops<'_> {
    /// `out` (rows, d) = norm of each row of `x` (rows, d), d = `norm.weight.len()`.
    ///
    /// # Panics
    /// If the lengths differ or aren't rows of d values.
    pub fn rms_norm(&self, norm: RmsNorm<'_>, x: &[f32], out: &mut [f32]) {
        self.norm(norm, x, out);
    }

    /// As [`Ops::rms_norm`] in place, for example of (rows x heads, head_dim).
    ///
    /// # Panics
    /// If `x` isn't rows of d values.
    pub fn rms_norm_in_place(&self, norm: RmsNorm<'_>, x: &mut [f32]) {
        self.norm_in_place(norm, x);
    }

    /// `residual += y`, then `out` = norm of each row of `residual`; all (rows, d).
    ///
    /// # Panics
    /// If the lengths differ or aren't rows of d values.
    pub fn add_rms_norm(&self, norm: RmsNorm<'_>, residual: &mut [f32], y: &[f32], out: &mut [f32]) {
        self.add_norm(norm, residual, y, out);
    }

    /// `out` (rows, d) = norm of each row of `x` (rows, d), d = `norm.weight.len()`.
    ///
    /// # Panics
    /// If the lengths differ or aren't rows of d values.
    pub fn layer_norm(&self, norm: LayerNorm<'_>, x: &[f32], out: &mut [f32]) {
        self.norm(norm, x, out);
    }

    /// `residual += y`, then `out` = norm of each row of `residual`; all (rows, d).
    ///
    /// # Panics
    /// If the lengths differ or aren't rows of d values.
    pub fn add_layer_norm(&self, norm: LayerNorm<'_>, residual: &mut [f32], y: &[f32], out: &mut [f32]) {
        self.add_norm(norm, residual, y, out);
    }

    fn norm(&self, norm: impl RowNorm, x: &[f32], out: &mut [f32]) {
        let d = norm.width();
        assert_eq!(x.len(), out.len(), "norm's input and output");
        rows_of("norm's input", x.len(), d);
        self.over_rows(out, d, |first, out| {
            out.copy_from_slice(&x[first * d..][..out.len()]);
            dispatch(self.isa, Rows { norm, x: out });
        });
    }

    fn norm_in_place(&self, norm: impl RowNorm, x: &mut [f32]) {
        let d = norm.width();
        rows_of("norm's input", x.len(), d);
        self.over_rows(x, d, |_, x| dispatch(self.isa, Rows { norm, x }));
    }

    fn add_norm(&self, norm: impl RowNorm, residual: &mut [f32], y: &[f32], out: &mut [f32]) {
        let d = norm.width();
        assert_eq!((residual.len(), y.len()), (out.len(), out.len()), "residual, summand and output");
        if rows_of("residual", residual.len(), d) == 0 {
            return;
        }
        let rows = (GRAIN / d).max(1);
        let part = |index: usize, residual: &mut [f32], out: &mut [f32]| {
            let y = &y[index * rows * d..][..out.len()];
            dispatch(self.isa, AddRows { norm, residual, y, out });
        };
        if out.len() < 2 * GRAIN {
            return (residual.chunks_mut(rows * d).zip(out.chunks_mut(rows * d)).enumerate())
                .for_each(|(index, (residual, out))| part(index, residual, out));
        }
        self.pool.for_each_part_pair((residual, rows * d), (out, rows * d), part);
    }
}

struct Rows<'a, N> {
    norm: N,
    x: &'a mut [f32],
}

impl<N: RowNorm> SimdOp for Rows<'_, N> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for x in self.x.chunks_mut(self.norm.width()) {
            self.norm.row(s, x);
        }
    }
}

struct AddRows<'a, N> {
    norm: N,
    residual: &'a mut [f32],
    y: &'a [f32],
    out: &'a mut [f32],
}

impl<N: RowNorm> SimdOp for AddRows<'_, N> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let d = self.norm.width();
        let rows = self.residual.chunks_mut(d).zip(self.y.chunks(d)).zip(self.out.chunks_mut(d));
        for ((residual, y), out) in rows {
            for at in lanes(d) {
                let sum = s.add(s.load_partial(&residual[at.clone()]), s.load_partial(&y[at.clone()]));
                s.store_partial(sum, &mut residual[at.clone()]);
                s.store_partial(sum, &mut out[at]);
            }
            self.norm.row(s, out);
        }
    }
}

/// The sum of `(x - shift)^2`, or of `x` itself: four running sums a lane, then the lanes.
#[inline(always)]
fn total<S: Simd>(s: S, x: &[f32], squares_about: Option<f32>) -> f32 {
    let mut sums = [s.splat(0.0); 4];
    for (i, x) in x.chunks(LANES).enumerate() {
        let whole = s.load_partial(x);
        sums[i % 4] = match squares_about {
            None => s.add(sums[i % 4], whole),
            Some(shift) if x.len() == LANES => {
                let x = s.sub(whole, s.splat(shift));
                s.fma(x, x, sums[i % 4])
            }
            Some(shift) => {
                // The padding must stay 0 after the shift.
                let mut shifts = [0.0; LANES];
                shifts[..x.len()].fill(shift);
                let x = s.sub(whole, s.load(&shifts));
                s.fma(x, x, sums[i % 4])
            }
        };
    }
    s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
}

impl RowNorm for RmsNorm<'_> {
    fn width(self) -> usize {
        self.weight.len()
    }

    #[inline(always)]
    fn row<S: Simd>(self, s: S, x: &mut [f32]) {
        let mean = total(s, x, Some(0.0)) / x.len() as f32;
        let scale = s.splat(1.0 / (mean + self.eps).sqrt());
        let one = s.splat(if self.add_one { 1.0 } else { 0.0 });
        for (x, w) in x.chunks_mut(LANES).zip(self.weight.chunks(LANES)) {
            let factor = s.add(s.load_partial(w), one);
            s.store_partial(s.mul(s.mul(s.load_partial(x), scale), factor), x);
        }
    }
}

impl RowNorm for LayerNorm<'_> {
    fn width(self) -> usize {
        if let Some(bias) = self.bias {
            assert_eq!(bias.len(), self.weight.len(), "layer norm's bias and weight");
        }
        self.weight.len()
    }

    #[inline(always)]
    fn row<S: Simd>(self, s: S, x: &mut [f32]) {
        let mean = total(s, x, None) / x.len() as f32;
        let variance = total(s, x, Some(mean)) / x.len() as f32;
        let (mean, scale) = (s.splat(mean), s.splat(1.0 / (variance + self.eps).sqrt()));
        for (i, (x, w)) in x.chunks_mut(LANES).zip(self.weight.chunks(LANES)).enumerate() {
            let y = s.mul(s.mul(s.sub(s.load_partial(x), mean), scale), s.load_partial(w));
            let y = match self.bias {
                Some(bias) => s.add(y, s.load_partial(&bias[i * LANES..(i * LANES + x.len())])),
                None => y,
            };
            s.store_partial(y, x);
        }
    }
}
