//! Clips and GELU.

use super::{GRAIN, Lanewise, Map, Map2, lend, parts, parts2, values};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use nibble_kernels::Isa;
use nibble_kernels::ops::math;
use nibble_kernels::simd::{Simd, dispatch};

/// Values within `lo..=hi`; the gradient is 0 at and past the ends (Relu: `lo` 0, `hi` infinite).
pub fn clamp(x: &Tensor, lo: f32, hi: f32) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Clamp { lo, hi })
}

/// `x/2 (1 + erf(x / sqrt 2))`.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Gelu)
}

#[derive(Clone, Copy)]
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
        let (isa, Clamp { lo, hi }) = (Isa::best(), *self);
        let (out, _) = parts(x, GRAIN, |x, out| dispatch(isa, Map { x, out, f: Clip { lo, hi } }));
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, arg: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (isa, Clamp { lo, hi }) = (Isa::best(), *self);
        two(arg, grad, |x, y, out| dispatch(isa, Map2 { x, y, out, f: ClipBack { lo, hi } }))
    }
}

/// A gradient from an operand's values and the gradient of the result.
fn two(arg: &Tensor, grad: &Tensor, f: impl Fn(&[f32], &[f32], &mut [f32]) + Sync) -> Result<Option<Tensor>> {
    let out = lend(arg, |x| lend(grad, |grad| Ok(parts2(x, grad, GRAIN, &f).0)))?;
    Ok(Some(Tensor::from_vec(out, arg.shape(), arg.device())?))
}

struct Clip {
    lo: f32,
    hi: f32,
}

impl Lanewise<1> for Clip {
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, [x]: [S::F32; 1]) -> S::F32 {
        // The operand that may be NaN comes second, so that it stays.
        s.max(s.splat(self.lo), s.min(s.splat(self.hi), x))
    }
}

struct ClipBack {
    lo: f32,
    hi: f32,
}

impl Lanewise<2> for ClipBack {
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, [x, grad]: [S::F32; 2]) -> S::F32 {
        let zero = s.splat(0.0);
        s.select(s.lt(s.splat(self.lo), x), s.select(s.lt(x, s.splat(self.hi)), grad, zero), zero)
    }
}

struct Gelu;

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(self.name(), storage, layout)?;
        let isa = Isa::best();
        let (out, _) = parts(x, GRAIN, |x, out| dispatch(isa, Map { x, out, f: GeluRun }));
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, arg: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let isa = Isa::best();
        two(arg, grad, |x, y, out| dispatch(isa, Map2 { x, y, out, f: GeluBack }))
    }
}

struct GeluRun;

impl Lanewise<1> for GeluRun {
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, [x]: [S::F32; 1]) -> S::F32 {
        math::gelu(s, x)
    }
}

struct GeluBack;

impl Lanewise<2> for GeluBack {
    /// `Phi(x) + x phi(x)`; Phi is the value over x, or its first two terms near 0.
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, [x, grad]: [S::F32; 2]) -> S::F32 {
        let density = s.splat(0.398_942_3);
        let near = s.fma(x, density, s.splat(0.5));
        let phi = s.select(s.lt(s.abs(x), s.splat(1e-3)), near, s.div(math::gelu(s, x), x));
        let bell = s.mul(density, math::exp(s, s.mul(s.mul(x, x), s.splat(-0.5))));
        s.mul(s.fma(x, bell, phi), grad)
    }
}
