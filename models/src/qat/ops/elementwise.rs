//! Clips and GELU.

use super::{GRAIN, lend, map, map2, parts, parts2, values};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use nibble_kernels::Isa;
use nibble_kernels::ops::math;
use nibble_kernels::simd::{Simd, SimdOp, dispatch};

/// Values within `lo..=hi`; the gradient is 0 at and past the ends (Relu: `lo` 0, `hi` infinite).
pub fn clamp(x: &Tensor, lo: f32, hi: f32) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Clamp { lo, hi })
}

/// `x/2 (1 + erf(x / sqrt 2))`.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Gelu)
}

struct Clamp {
    lo: f32,
    hi: f32,
}

impl CustomOp1 for Clamp {
    fn name(&self) -> &'static str {
        "clamp"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(self.name(), storage, layout)?;
        let mut out = vec![0f32; x.len()];
        let (lo, hi, isa) = (self.lo, self.hi, Isa::best());
        parts(x, &mut out, GRAIN, |x, out| dispatch(isa, Clip { x, out, lo, hi }));
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, arg: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (lo, hi, isa) = (self.lo, self.hi, Isa::best());
        two(arg, grad, |x, grad, out| dispatch(isa, ClipBack { x, grad, out, lo, hi }))
    }
}

/// A gradient from an operand's values and the gradient of the result.
fn two(arg: &Tensor, grad: &Tensor, f: impl Fn(&[f32], &[f32], &mut [f32]) + Sync) -> Result<Option<Tensor>> {
    let out = lend(arg, |x| {
        lend(grad, |g| {
            let mut out = vec![0f32; x.len()];
            parts2(x, g, &mut out, GRAIN, &f);
            Ok(out)
        })
    })?;
    Ok(Some(Tensor::from_vec(out, arg.shape(), arg.device())?))
}

struct Clip<'a> {
    x: &'a [f32],
    out: &'a mut [f32],
    lo: f32,
    hi: f32,
}

impl SimdOp for Clip<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let (lo, hi) = (s.splat(self.lo), s.splat(self.hi));
        // The operand that may be NaN comes second, so that it stays.
        map(s, self.x, self.out, |x| s.max(lo, s.min(hi, x)));
    }
}

struct ClipBack<'a> {
    x: &'a [f32],
    grad: &'a [f32],
    out: &'a mut [f32],
    lo: f32,
    hi: f32,
}

impl SimdOp for ClipBack<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let (lo, hi, zero) = (s.splat(self.lo), s.splat(self.hi), s.splat(0.0));
        map2(s, self.x, self.grad, self.out, |x, grad| s.select(s.lt(lo, x), s.select(s.lt(x, hi), grad, zero), zero));
    }
}

struct Gelu;

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(self.name(), storage, layout)?;
        let mut out = vec![0f32; x.len()];
        let isa = Isa::best();
        parts(x, &mut out, GRAIN, |x, out| dispatch(isa, GeluRun { x, out }));
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, arg: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let isa = Isa::best();
        two(arg, grad, |x, grad, out| dispatch(isa, GeluBack { x, grad, out }))
    }
}

struct GeluRun<'a> {
    x: &'a [f32],
    out: &'a mut [f32],
}

impl SimdOp for GeluRun<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        map(s, self.x, self.out, |x| math::gelu(s, x));
    }
}

struct GeluBack<'a> {
    x: &'a [f32],
    grad: &'a [f32],
    out: &'a mut [f32],
}

impl SimdOp for GeluBack<'_> {
    type Output = ();

    /// `Phi(x) + x phi(x)`; Phi is the value over x, or its first two terms near 0.
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let density = s.splat(0.398_942_3);
        map2(s, self.x, self.grad, self.out, |x, grad| {
            let near = s.fma(x, density, s.splat(0.5));
            let phi = s.select(s.lt(s.abs(x), s.splat(1e-3)), near, s.div(math::gelu(s, x), x));
            let bell = s.mul(density, math::exp(s, s.mul(s.mul(x, x), s.splat(-0.5))));
            s.mul(s.fma(x, bell, phi), grad)
        });
    }
}
