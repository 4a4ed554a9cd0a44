//! Layer norm, and batch norm with statistics of the batch.
//!
//! ```text
//! u = (x - mean) / sqrt(var + eps)      y = gamma u + beta
//! dx = (h - mean(h) - u mean(h u)) / sqrt(var + eps)   with h = gamma dy, means over what shares mean and var
//! ```

use super::rows::Sum;
use super::{grain_of_rows, lend, parts, parts2, values};
use candle_core::{CpuStorage, CustomOp3, Error, Layout, Result, Shape, Tensor};
use nibble_kernels::Isa;
use nibble_kernels::simd::{LANES, Simd, SimdOp, dispatch};
use std::sync::{Arc, Mutex};

/// Layer norm over the last dimension; `gain` and `offset` are as long.
///
/// # Errors
/// They aren't.
pub fn layer_norm(x: &Tensor, gain: &Tensor, offset: &Tensor, epsilon: f32) -> Result<Tensor> {
    let d = x.dims().last().copied().unwrap_or(0);
    if d == 0 || gain.elem_count() != d || offset.elem_count() != d {
        return Err(Error::Msg(format!("gain {:?} and offset {:?} for {:?}", gain.shape(), offset.shape(), x.shape())));
    }
    x.contiguous()?.apply_op3(&gain.contiguous()?, &offset.contiguous()?, LayerNorm { d, epsilon })
}

struct LayerNorm {
    d: usize,
    epsilon: f32,
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, gain, offset) =
            (values(self.name(), s1, l1)?, values(self.name(), s2, l2)?, values(self.name(), s3, l3)?);
        let isa = Isa::best();
        let (out, _) = parts(x, grain_of_rows(self.d), |x, out| {
            dispatch(isa, Rows { x, out, gain, offset, epsilon: self.epsilon });
        });
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gain: &Tensor,
        offset: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let isa = Isa::best();
        let (out, sums) = lend(x, |x| {
            lend(gain, |gain| {
                lend(grad, |grad| {
                    let (out, partial) = parts2(x, grad, grain_of_rows(self.d), |x, grad, out| {
                        let (mut gains, mut offsets) = (vec![0f32; self.d], vec![0f32; self.d]);
                        let sums = (&mut gains[..], &mut offsets[..]);
                        dispatch(isa, RowsBack { x, grad, out, gain, sums, epsilon: self.epsilon });
                        (gains, offsets)
                    });
                    let mut sums = (vec![0f32; self.d], vec![0f32; self.d]);
                    for (gains, offsets) in partial {
                        sums.0.iter_mut().zip(gains).for_each(|(sum, g)| *sum += g);
                        sums.1.iter_mut().zip(offsets).for_each(|(sum, g)| *sum += g);
                    }
                    Ok((out, sums))
                })
            })
        })?;
        let device = x.device();
        Ok((
            Some(Tensor::from_vec(out, x.shape(), device)?),
            Some(Tensor::from_vec(sums.0, gain.shape(), device)?),
            Some(Tensor::from_vec(sums.1, offset.shape(), device)?),
        ))
    }
}

/// Mean and reciprocal deviation of a row.
#[inline(always)]
fn moments<S: Simd>(s: S, x: &[f32], epsilon: f32) -> (f32, f32) {
    let mut sum = s.splat(0.0);
    for x in x.chunks(LANES) {
        sum = s.add(sum, s.load_partial(x));
    }
    let mean = s.sum(sum) / x.len() as f32;
    let (centre, mut squares) = (s.splat(mean), s.splat(0.0));
    let (whole, tail) = x.as_chunks::<LANES>();
    for x in whole {
        let d = s.sub(s.load(x), centre);
        squares = s.fma(d, d, squares);
    }
    let mut squares = s.sum(squares);
    for x in tail {
        squares += (x - mean) * (x - mean);
    }
    (mean, 1.0 / (squares / x.len() as f32 + epsilon).sqrt())
}

struct Rows<'a> {
    x: &'a [f32],
    out: &'a mut [f32],
    gain: &'a [f32],
    offset: &'a [f32],
    epsilon: f32,
}

impl SimdOp for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let d = self.gain.len();
        for (x, out) in self.x.chunks(d).zip(self.out.chunks_mut(d)) {
            let (mean, inverse) = moments(s, x, self.epsilon);
            let (mean, inverse) = (s.splat(mean), s.splat(inverse));
            let affine = self.gain.chunks(LANES).zip(self.offset.chunks(LANES));
            for ((x, out), (gain, offset)) in x.chunks(LANES).zip(out.chunks_mut(LANES)).zip(affine) {
                let u = s.mul(s.sub(s.load_partial(x), mean), inverse);
                s.store_partial(s.fma(u, s.load_partial(gain), s.load_partial(offset)), out);
            }
        }
    }
}

struct RowsBack<'a> {
    x: &'a [f32],
    grad: &'a [f32],
    out: &'a mut [f32],
    gain: &'a [f32],
    /// Gradients of gain and offset.
    sums: (&'a mut [f32], &'a mut [f32]),
    epsilon: f32,
}

impl SimdOp for RowsBack<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let d = self.gain.len();
        for ((x, grad), out) in self.x.chunks(d).zip(self.grad.chunks(d)).zip(self.out.chunks_mut(d)) {
            let (mean, inverse) = moments(s, x, self.epsilon);
            let (centre, factor) = (s.splat(mean), s.splat(inverse));
            let (mut of_h, mut of_hu) = (s.splat(0.0), s.splat(0.0));
            let sums = self.sums.0.chunks_mut(LANES).zip(self.sums.1.chunks_mut(LANES));
            let columns = x.chunks(LANES).zip(grad.chunks(LANES)).zip(self.gain.chunks(LANES));
            for (((x, grad), gain), (gains, offsets)) in columns.zip(sums) {
                let u = s.mul(s.sub(s.load_partial(x), centre), factor);
                // Lanes past the end have gradient 0.
                let grad = s.load_partial(grad);
                let h = s.mul(grad, s.load_partial(gain));
                of_h = s.add(of_h, h);
                of_hu = s.fma(h, u, of_hu);
                s.store_partial(s.fma(grad, u, s.load_partial(gains)), gains);
                s.store_partial(s.add(s.load_partial(offsets), grad), offsets);
            }
            let (of_h, of_hu) = (s.splat(s.sum(of_h) / d as f32), s.splat(s.sum(of_hu) / d as f32));
            let columns = x.chunks(LANES).zip(grad.chunks(LANES)).zip(self.gain.chunks(LANES));
            for (((x, grad), gain), out) in columns.zip(out.chunks_mut(LANES)) {
                let u = s.mul(s.sub(s.load_partial(x), centre), factor);
                let h = s.mul(s.load_partial(grad), s.load_partial(gain));
                s.store_partial(s.mul(s.fnma(u, of_hu, s.sub(h, of_h)), factor), out);
            }
        }
    }
}

/// Means and variances of a batch's channels.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct BatchStatistics {
    /// One a channel.
    pub means: Vec<f32>,
    /// Biased variances, one a channel.
    pub variances: Vec<f32>,
    /// Values of a channel.
    pub count: usize,
}

/// Batch norm of (batch, channels, ...): with the batch's own statistics, which are returned, or with `given` ones.
///
/// # Errors
/// Parameters that aren't one number a channel.
pub fn batch_norm(
    x: &Tensor,
    gain: &Tensor,
    offset: &Tensor,
    given: Option<BatchStatistics>,
    epsilon: f32,
) -> Result<(Tensor, BatchStatistics)> {
    let channels = x.dims().get(1).copied().unwrap_or(0);
    let known = given.as_ref().is_none_or(|g| g.means.len() == channels && g.variances.len() == channels);
    if channels == 0 || gain.elem_count() != channels || offset.elem_count() != channels || !known {
        return Err(Error::Msg(format!("gain {:?} and offset {:?} for {:?}", gain.shape(), offset.shape(), x.shape())));
    }
    let seen = Arc::new(Mutex::new(BatchStatistics::default()));
    let frozen = given.is_some();
    if let Some(given) = given {
        *held(&seen) = given;
    }
    let op = BatchNorm { epsilon, frozen, seen: Arc::clone(&seen) };
    let out = x.contiguous()?.apply_op3(&gain.contiguous()?, &offset.contiguous()?, op)?;
    let seen = held(&seen).clone();
    Ok((out, seen))
}

fn held(seen: &Mutex<BatchStatistics>) -> std::sync::MutexGuard<'_, BatchStatistics> {
    seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

struct BatchNorm {
    epsilon: f32,
    frozen: bool,
    seen: Arc<Mutex<BatchStatistics>>,
}

impl BatchNorm {
    fn inverse(&self, variance: f32) -> f32 {
        1.0 / (variance + self.epsilon).sqrt()
    }
}

/// Channels and the values of one in a row.
fn planes(dims: &[usize]) -> (usize, usize) {
    (dims[1], dims[2..].iter().product::<usize>().max(1))
}

impl CustomOp3 for BatchNorm {
    fn name(&self) -> &'static str {
        "batch-norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, gain, offset) =
            (values(self.name(), s1, l1)?, values(self.name(), s2, l2)?, values(self.name(), s3, l3)?);
        let (channels, plane) = planes(l1.dims());
        let mut seen = held(&self.seen);
        if !self.frozen {
            let count = x.len() / channels;
            let (mut means, mut squares) = (vec![0f64; channels], vec![0f64; channels]);
            for (i, x) in x.chunks(plane).enumerate() {
                means[i % channels] += f64::from(dispatch(Isa::best(), Sum(x)));
            }
            means.iter_mut().for_each(|m| *m /= count.max(1) as f64);
            for (i, x) in x.chunks(plane).enumerate() {
                let about = means[i % channels] as f32;
                squares[i % channels] += f64::from(dispatch(Isa::best(), Dot { x, y: x, about, by: about }));
            }
            *seen = BatchStatistics {
                means: means.iter().map(|&m| m as f32).collect(),
                variances: squares.iter().map(|&s| (s / count.max(1) as f64) as f32).collect(),
                count,
            };
        }
        let mut out = vec![0f32; x.len()];
        for (i, (x, out)) in x.chunks(plane).zip(out.chunks_mut(plane)).enumerate() {
            let c = i % channels;
            let factor = gain[c] * self.inverse(seen.variances[c]);
            let (mean, offset) = (seen.means[c], offset[c]);
            x.iter().zip(out).for_each(|(x, out)| *out = (x - mean) * factor + offset);
        }
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gain: &Tensor,
        offset: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (channels, plane) = planes(x.dims());
        let seen = held(&self.seen).clone();
        let (out, gains, offsets) = lend(x, |x| {
            lend(gain, |gain| {
                lend(grad, |grad| {
                    let (mut gains, mut offsets) = (vec![0f32; channels], vec![0f32; channels]);
                    for (i, (x, grad)) in x.chunks(plane).zip(grad.chunks(plane)).enumerate() {
                        let c = i % channels;
                        offsets[c] += dispatch(Isa::best(), Sum(grad));
                        let products = dispatch(Isa::best(), Dot { x, y: grad, about: seen.means[c], by: 0.0 });
                        gains[c] += products * self.inverse(seen.variances[c]);
                    }
                    let count = (x.len() / channels).max(1) as f32;
                    let mut out = vec![0f32; x.len()];
                    for (i, out) in out.chunks_mut(plane).enumerate() {
                        let c = i % channels;
                        let (x, grad) = (&x[i * plane..][..out.len()], &grad[i * plane..][..out.len()]);
                        let inverse = self.inverse(seen.variances[c]);
                        let factor = gain[c] * inverse;
                        // Frozen statistics don't depend on x.
                        let [of_h, of_hu] = if self.frozen { [0.0; 2] } else { [offsets[c] / count, gains[c] / count] };
                        let mean = seen.means[c];
                        for ((out, x), grad) in out.iter_mut().zip(x).zip(grad) {
                            *out = (grad - of_h - (x - mean) * inverse * of_hu) * factor;
                        }
                    }
                    Ok((out, gains, offsets))
                })
            })
        })?;
        let device = x.device();
        Ok((
            Some(Tensor::from_vec(out, x.shape(), device)?),
            Some(Tensor::from_vec(gains, gain.shape(), device)?),
            Some(Tensor::from_vec(offsets, offset.shape(), device)?),
        ))
    }
}

/// The sum of `(x - about) (y - by)`.
pub(super) struct Dot<'a> {
    pub(super) x: &'a [f32],
    pub(super) y: &'a [f32],
    pub(super) about: f32,
    pub(super) by: f32,
}

impl SimdOp for Dot<'_> {
    type Output = f32;

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> f32 {
        let (about, by) = (s.splat(self.about), s.splat(self.by));
        let mut sum = s.splat(0.0);
        let ((x, x_tail), (y, y_tail)) = (self.x.as_chunks::<LANES>(), self.y.as_chunks::<LANES>());
        for (x, y) in x.iter().zip(y) {
            sum = s.fma(s.sub(s.load(x), about), s.sub(s.load(y), by), sum);
        }
        let tail: f32 = x_tail.iter().zip(y_tail).map(|(x, y)| (x - self.about) * (y - self.by)).sum();
        s.sum(sum) + tail
    }
}
