//! Softmax over the last dimension.

use super::{grain_of_rows, lend, parts, parts2, values};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use nibble_kernels::Isa;
use nibble_kernels::ops::math;
use nibble_kernels::simd::{LANES, Simd, SimdOp, dispatch};

/// `e^x / sum(e^x)` over the last dimension.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Softmax)
}

struct Softmax;

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(self.name(), storage, layout)?;
        let d = layout.dims().last().copied().unwrap_or(1);
        let isa = Isa::best();
        let (out, _) = parts(x, grain_of_rows(d), |x, out| dispatch(isa, Forward { x, out, d }));
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, arg: &Tensor, res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let d = arg.dims().last().copied().unwrap_or(1);
        let isa = Isa::best();
        let run = |y: &[f32], grad: &[f32], out: &mut [f32]| dispatch(isa, Backward { y, grad, out, d });
        let out = lend(res, |y| lend(grad, |grad| Ok(parts2(y, grad, grain_of_rows(d), run).0)))?;
        Ok(Some(Tensor::from_vec(out, arg.shape(), arg.device())?))
    }
}

struct Forward<'a> {
    x: &'a [f32],
    out: &'a mut [f32],
    d: usize,
}

impl SimdOp for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for (x, out) in self.x.chunks(self.d).zip(self.out.chunks_mut(self.d)) {
            let mut largest = f32::NEG_INFINITY;
            for &x in x {
                // A NaN is taken too: it must come out.
                if x > largest || x.is_nan() {
                    largest = x;
                }
            }
            let largest = s.splat(largest);
            let mut sum = s.splat(0.0);
            for (x, out) in x.chunks(LANES).zip(out.chunks_mut(LANES)) {
                s.store_partial(math::exp(s, s.sub(s.load_partial(x), largest)), out);
                // Reloaded, so that lanes past the row count as 0.
                sum = s.add(sum, s.load_partial(out));
            }
            let share = s.splat(1.0 / s.sum(sum));
            for out in out.chunks_mut(LANES) {
                s.store_partial(s.mul(s.load_partial(out), share), out);
            }
        }
    }
}

struct Backward<'a> {
    y: &'a [f32],
    grad: &'a [f32],
    out: &'a mut [f32],
    d: usize,
}

impl SimdOp for Backward<'_> {
    type Output = ();

    /// `y (g - sum(g y))`.
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let rows = self.y.chunks(self.d).zip(self.grad.chunks(self.d)).zip(self.out.chunks_mut(self.d));
        for ((y, grad), out) in rows {
            let mut sum = s.splat(0.0);
            for (y, grad) in y.chunks(LANES).zip(grad.chunks(LANES)) {
                sum = s.fma(s.load_partial(y), s.load_partial(grad), sum);
            }
            let sum = s.splat(s.sum(sum));
            for ((y, grad), out) in y.chunks(LANES).zip(grad.chunks(LANES)).zip(out.chunks_mut(LANES)) {
                s.store_partial(s.mul(s.load_partial(y), s.sub(s.load_partial(grad), sum)), out);
            }
        }
    }
}
