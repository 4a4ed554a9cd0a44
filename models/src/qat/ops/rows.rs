//! Sums with a vector that repeats: biases and tables of positions.

use super::{Lanewise, Map2, grain_of_rows, lend, parts, values};
use candle_core::{CpuStorage, CustomOp2, Error, Layout, Result, Shape, Tensor};
use nibble_kernels::Isa;
use nibble_kernels::simd::{LANES, Simd, SimdOp, dispatch};

/// `x + y`, where `y` has as many values as the last dimensions of `x` together.
///
/// # Errors
/// It hasn't.
pub fn add_rows(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let n = y.elem_count();
    if n == 0 || !x.elem_count().is_multiple_of(n) {
        return Err(Error::Msg(format!("{:?} can't be added to each row of {:?}", y.shape(), x.shape())));
    }
    x.contiguous()?.apply_op2(&y.contiguous()?, AddRows)
}

/// `x + y`: (batch, channels, ...) and one value a channel.
///
/// # Errors
/// Another number of values.
pub fn add_channels(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    if x.dims().get(1) != Some(&y.elem_count()) {
        return Err(Error::Msg(format!("{:?} can't be added to the channels of {:?}", y.shape(), x.shape())));
    }
    x.contiguous()?.apply_op2(&y.contiguous()?, AddChannels)
}

struct AddRows;

impl CustomOp2 for AddRows {
    fn name(&self) -> &'static str {
        "add-rows"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, y) = (values(self.name(), s1, l1)?, values(self.name(), s2, l2)?);
        let isa = Isa::best();
        let (out, _) = parts(x, grain_of_rows(y.len()), |x, out| dispatch(isa, Add { x, y, out }));
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, y: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(grad.clone()), Some(sum_rows(grad, y)?)))
    }
}

/// Sums of rows that are as long as `like`, in its shape.
pub(super) fn sum_rows(grad: &Tensor, like: &Tensor) -> Result<Tensor> {
    let sums = lend(grad, |grad| {
        let mut sums = vec![0f32; like.elem_count()];
        dispatch(Isa::best(), SumRows { grad, sums: &mut sums });
        Ok(sums)
    })?;
    Tensor::from_vec(sums, like.shape(), like.device())
}

struct Add<'a> {
    x: &'a [f32],
    y: &'a [f32],
    out: &'a mut [f32],
}

/// `rows += y`, in place.
pub(super) struct AddTo<'a> {
    pub(super) rows: &'a mut [f32],
    pub(super) y: &'a [f32],
}

impl SimdOp for AddTo<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for row in self.rows.chunks_mut(self.y.len().max(1)) {
            for (row, y) in row.chunks_mut(LANES).zip(self.y.chunks(LANES)) {
                s.store_partial(s.add(s.load_partial(row), s.load_partial(y)), row);
            }
        }
    }
}

impl SimdOp for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let n = self.y.len();
        for (x, out) in self.x.chunks(n).zip(self.out.chunks_mut(n)) {
            Map2 { x, y: self.y, out, f: Plus }.eval(s);
        }
    }
}

struct Plus;

impl Lanewise<2> for Plus {
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, [x, y]: [S::F32; 2]) -> S::F32 {
        s.add(x, y)
    }
}

struct SumRows<'a> {
    grad: &'a [f32],
    sums: &'a mut [f32],
}

impl SimdOp for SumRows<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for grad in self.grad.chunks(self.sums.len()) {
            let ((grad, grad_tail), (sums, sums_tail)) =
                (grad.as_chunks::<LANES>(), self.sums.as_chunks_mut::<LANES>());
            for (grad, sum) in grad.iter().zip(sums) {
                s.store(s.add(s.load(sum), s.load(grad)), sum);
            }
            sums_tail.iter_mut().zip(grad_tail).for_each(|(sum, grad)| *sum += grad);
        }
    }
}

struct AddChannels;

impl CustomOp2 for AddChannels {
    fn name(&self) -> &'static str {
        "add-channels"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, y) = (values(self.name(), s1, l1)?, values(self.name(), s2, l2)?);
        let plane: usize = l1.dims()[2..].iter().product::<usize>().max(1);
        let mut out = vec![0f32; x.len()];
        for ((x, out), y) in x.chunks(plane).zip(out.chunks_mut(plane)).zip(y.iter().cycle()) {
            x.iter().zip(out).for_each(|(x, out)| *out = x + y);
        }
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let plane: usize = x.dims()[2..].iter().product::<usize>().max(1);
        let sums = lend(grad, |grad| {
            let mut sums = vec![0f32; y.elem_count()];
            for (i, grad) in grad.chunks(plane).enumerate() {
                let channel = i % sums.len();
                sums[channel] += dispatch(Isa::best(), Sum(grad));
            }
            Ok(sums)
        })?;
        Ok((Some(grad.clone()), Some(Tensor::from_vec(sums, y.shape(), y.device())?)))
    }
}

/// The sum of some values.
pub(super) struct Sum<'a>(pub(super) &'a [f32]);

impl SimdOp for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> f32 {
        let mut sum = s.splat(0.0);
        let (whole, tail) = self.0.as_chunks::<LANES>();
        for x in whole {
            sum = s.add(sum, s.load(x));
        }
        s.sum(sum) + tail.iter().sum::<f32>()
    }
}
