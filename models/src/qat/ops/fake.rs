//! Fake quantization: values of a grid in floats, with a gradient that passes straight through.
//!
//! ```text
//! v = x / s        q = clamp(round(v), low - z, high - z)        y = q s
//! dy/dx = 1 where v is within the grid, else 0                         (straight-through estimator)
//! dy/ds = round(v) - v within, low - z below, high - z above; times g  (LSQ, arXiv 1902.08153, equation 3)
//! ```
//! `round` is to even, as in QuantizeLinear. With a fixed scale "within" means that `round(v)` is a code of the grid, as
//! PyTorch has it: the largest weight of a channel, whose quotient may come out a bit above the last code, keeps its
//! gradient. With a learned scale it means that `v` itself is, as in the paper.

use super::{GRAIN, Lanewise, Map, Map2, lend, parts, parts2, values};
use candle_core::{CpuStorage, CustomOp2, Error, Layout, Result, Shape, Tensor};
use nibble_kernels::Isa;
use nibble_kernels::simd::{LANES, Simd, SimdOp, dispatch};

/// Which values share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// All of them.
    Tensor,
    /// Those of an index of the first dimension.
    First,
    /// Those of an index of the last dimension.
    Last,
}

/// A grid, and how its scale is treated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FakeQuantize {
    /// Which values share a scale.
    pub axis: Axis,
    /// The code that means 0.
    pub zero: i32,
    /// Smallest and largest code.
    pub limits: (i32, i32),
    /// Learns the scale, whose gradient is multiplied by this number; `None` leaves it fixed.
    pub learn: Option<f64>,
}

/// Fake-quantizes `x` with scales (1) or one a channel.
///
/// # Errors
/// A number of scales that isn't the axis's.
pub fn fake_quantize(x: &Tensor, scale: &Tensor, how: FakeQuantize) -> Result<Tensor> {
    let channels = match how.axis {
        Axis::Tensor => 1,
        Axis::First => x.dims().first().copied().unwrap_or(1),
        Axis::Last => x.dims().last().copied().unwrap_or(1),
    };
    if scale.elem_count() != channels {
        return Err(Error::Msg(format!("{} scales for {:?} along {:?}", scale.elem_count(), x.shape(), how.axis)));
    }
    x.contiguous()?.apply_op2(&scale.contiguous()?, how)
}

impl FakeQuantize {
    /// The grid's ends as distances from 0, in steps.
    fn ends(&self) -> (f32, f32) {
        ((self.limits.0 - self.zero) as f32, (self.limits.1 - self.zero) as f32)
    }

    fn slack(&self) -> f32 {
        if self.learn.is_some() { 0.0 } else { 0.5 }
    }
}

impl CustomOp2 for FakeQuantize {
    fn name(&self) -> &'static str {
        "fake-quantize"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, scales) = (values(self.name(), s1, l1)?, values(self.name(), s2, l2)?);
        let (low, high) = self.ends();
        let isa = Isa::best();
        if let (Axis::Tensor, [scale]) = (self.axis, scales) {
            let f = |x: &[f32], out: &mut [f32]| dispatch(isa, Map { x, out, f: Run { scale: *scale, low, high } });
            return Ok((CpuStorage::F32(parts(x, GRAIN, f).0), l1.shape().clone()));
        }
        let mut out = vec![0f32; x.len()];
        match (self.axis, scales) {
            (Axis::First, _) => {
                let row = x.len() / scales.len().max(1);
                let rows = x.chunks(row.max(1)).zip(out.chunks_mut(row.max(1)));
                for ((x, out), &scale) in rows.zip(scales) {
                    dispatch(isa, Map { x, out, f: Run { scale, low, high } });
                }
            }
            _ => {
                let n = scales.len().max(1);
                for (x, out) in x.chunks(n).zip(out.chunks_mut(n)) {
                    dispatch(isa, Map2 { x, y: scales, out, f: Columns { low, high } });
                }
            }
        }
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, scale: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (grads, sums) = lend(x, |x| lend(scale, |scales| lend(grad, |grad| Ok(self.backward(x, scales, grad)))))?;
        let grads = Tensor::from_vec(grads, x.shape(), x.device())?;
        let sums = match self.learn {
            Some(factor) => {
                let sums = sums.into_iter().map(|s| (s * factor) as f32).collect();
                Some(Tensor::from_vec(sums, scale.shape(), x.device())?)
            }
            None => None,
        };
        Ok((Some(grads), sums))
    }
}

impl FakeQuantize {
    fn backward(&self, x: &[f32], scales: &[f32], grad: &[f32]) -> (Vec<f32>, Vec<f64>) {
        let (low, high) = self.ends();
        let (slack, learn) = (self.slack(), self.learn.is_some());
        let isa = Isa::best();
        let run = |x: &[f32], grad: &[f32], out: &mut [f32], scale: f32| {
            f64::from(dispatch(isa, RunBack { x, grad, out, scale, low, high, slack, learn }))
        };
        if let (Axis::Tensor, [scale]) = (self.axis, scales) {
            let (out, sums) = parts2(x, grad, GRAIN, |x, grad, out| run(x, grad, out, *scale));
            return (out, vec![sums.into_iter().sum()]);
        }
        let mut out = vec![0f32; x.len()];
        let sums = match (self.axis, scales) {
            (Axis::First, _) => {
                let row = (x.len() / scales.len().max(1)).max(1);
                let rows = x.chunks(row).zip(grad.chunks(row)).zip(out.chunks_mut(row));
                rows.zip(scales).map(|(((x, grad), out), &scale)| run(x, grad, out, scale)).collect()
            }
            _ => {
                let n = scales.len().max(1);
                let mut sums = vec![0f32; scales.len()];
                for ((x, grad), out) in x.chunks(n).zip(grad.chunks(n)).zip(out.chunks_mut(n)) {
                    let sums = &mut sums;
                    dispatch(isa, ColumnsBack { x, grad, out, scales, sums, low, high, slack });
                }
                sums.into_iter().map(f64::from).collect()
            }
        };
        (out, sums)
    }
}

/// The nearest value of the grid, in steps.
#[inline(always)]
fn steps<S: Simd>(s: S, v: S::F32, low: S::F32, high: S::F32) -> S::F32 {
    s.to_f32(s.to_i32(s.max(s.min(v, high), low)))
}

/// The value of the grid that is nearest to x.
struct Run {
    scale: f32,
    low: f32,
    high: f32,
}

impl Lanewise<1> for Run {
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, [x]: [S::F32; 1]) -> S::F32 {
        let scale = s.splat(self.scale);
        s.mul(steps(s, s.div(x, scale), s.splat(self.low), s.splat(self.high)), scale)
    }
}

/// The same with a scale a column.
struct Columns {
    low: f32,
    high: f32,
}

impl Lanewise<2> for Columns {
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, [x, scale]: [S::F32; 2]) -> S::F32 {
        s.mul(steps(s, s.div(x, scale), s.splat(self.low), s.splat(self.high)), scale)
    }
}

/// Gradients of x and of the scale, a vector at a time.
#[inline(always)]
fn back<S: Simd>(s: S, v: S::F32, grad: S::F32, [low, high, below, above]: [S::F32; 4]) -> [S::F32; 2] {
    let zero = s.splat(0.0);
    let passed = s.select(s.lt(v, below), zero, s.select(s.lt(above, v), zero, grad));
    let inner = s.sub(steps(s, v, low, high), v);
    let slope = s.select(s.lt(v, low), low, s.select(s.lt(high, v), high, inner));
    [passed, s.mul(slope, grad)]
}

struct RunBack<'a> {
    x: &'a [f32],
    grad: &'a [f32],
    out: &'a mut [f32],
    scale: f32,
    low: f32,
    high: f32,
    slack: f32,
    learn: bool,
}

impl SimdOp for RunBack<'_> {
    type Output = f32;

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> f32 {
        let scale = s.splat(self.scale);
        let ends = [self.low, self.high, self.low - self.slack, self.high + self.slack];
        let ends = [s.splat(ends[0]), s.splat(ends[1]), s.splat(ends[2]), s.splat(ends[3])];
        let mut sum = s.splat(0.0);
        let vectors = self.x.chunks(LANES).zip(self.grad.chunks(LANES)).zip(self.out.chunks_mut(LANES));
        for ((x, grad), out) in vectors {
            // Lanes past the end have gradient 0.
            let [passed, slope] = back(s, s.div(s.load_partial(x), scale), s.load_partial(grad), ends);
            s.store_partial(passed, out);
            if self.learn {
                sum = s.add(sum, slope);
            }
        }
        s.sum(sum)
    }
}

struct ColumnsBack<'a> {
    x: &'a [f32],
    grad: &'a [f32],
    out: &'a mut [f32],
    scales: &'a [f32],
    sums: &'a mut [f32],
    low: f32,
    high: f32,
    slack: f32,
}

impl SimdOp for ColumnsBack<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let ends = [self.low, self.high, self.low - self.slack, self.high + self.slack];
        let ends = [s.splat(ends[0]), s.splat(ends[1]), s.splat(ends[2]), s.splat(ends[3])];
        let columns = self.x.chunks(LANES).zip(self.grad.chunks(LANES)).zip(self.out.chunks_mut(LANES));
        for (((x, grad), out), (scale, sum)) in columns.zip(self.scales.chunks(LANES).zip(self.sums.chunks_mut(LANES)))
        {
            let v = s.div(s.load_partial(x), s.load_partial(scale));
            let [passed, slope] = back(s, v, s.load_partial(grad), ends);
            s.store_partial(passed, out);
            s.store_partial(s.add(s.load_partial(sum), slope), sum);
        }
    }
}
