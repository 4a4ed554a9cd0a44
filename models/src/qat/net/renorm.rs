//! Batch norms in training, where the exported model has only the convolutions that they are folded into.
//!
//! ```text
//! training, unfrozen   u = x * W / f quantized, undone: (x * Q(W f)) / f     y = gain (u - mean(u)) / sd(u) + offset
//! frozen, exported     y = x * Q(W f) + (offset - mean f)                    f = gain / sqrt(var + eps), per channel
//! ```
//! `mean` and `var` are running statistics of u, and rounding sees the weight that is exported, as in PyTorch's fused
//! modules (arXiv 1806.08342, section 3.1.2). The norms are made anew when ranges are observed, so that at first they change
//! nothing: a model whose norms were folded away long ago gets some too.

use super::{MOMENTUM, NormState};
use crate::qat::ops::{self, BatchStatistics, lend};
use candle_core::{Result, Tensor, Var};

/// Keeps variances above 0.
const EPSILON: f32 = 1e-5;
/// The smallest gain that outputs are divided by.
const LEAST_GAIN: f64 = 1e-6;

/// A norm between a convolution and what reads it.
pub(super) struct Renorm {
    /// The convolution's weight, by position.
    pub(super) weight: usize,
    /// Its bias, by position.
    pub(super) bias: usize,
    /// Running statistics, by position.
    pub(super) norm: usize,
    /// What is learned, (channels).
    pub(super) gain: Var,
    pub(super) offset: Var,
    /// What was observed: sums of values and of their squares, and how many.
    seen: Option<(Vec<f64>, Vec<f64>, usize)>,
}

impl Renorm {
    /// One that changes nothing: after a layer with this bias.
    pub(super) fn new([weight, bias, norm]: [usize; 3], offset: &Tensor) -> Result<Renorm> {
        let gain = Tensor::ones_like(offset)?.affine(f64::from(1.0 + EPSILON).sqrt(), 0.0)?;
        let (gain, offset) = (Var::from_tensor(&gain)?, Var::from_tensor(offset)?);
        Ok(Renorm { weight, bias, norm, gain, offset, seen: None })
    }

    /// Statistics that go with [`Renorm::new`].
    pub(super) fn unit(channels: usize) -> BatchStatistics {
        BatchStatistics { means: vec![0.0; channels], variances: vec![1.0; channels], count: 0 }
    }

    /// What a channel's weights are multiplied by, (channels).
    fn factor(&self, running: &BatchStatistics) -> Result<Tensor> {
        let inverse = running.variances.iter().map(|v| 1.0 / (v + EPSILON).sqrt()).collect::<Vec<f32>>();
        let n = inverse.len();
        self.gain.as_tensor().mul(&Tensor::from_vec(inverse, n, self.gain.device())?)
    }

    /// Weight and bias with the norm folded in.
    pub(super) fn fold(&self, weight: &Tensor, running: &BatchStatistics) -> Result<[Tensor; 2]> {
        let factor = self.factor(running)?;
        let mut along = vec![1; weight.rank()];
        along[0] = factor.elem_count();
        let means = Tensor::from_vec(running.means.clone(), factor.elem_count(), factor.device())?;
        let bias = self.offset.as_tensor().sub(&means.mul(&factor)?)?;
        Ok([weight.broadcast_mul(&factor.reshape(along)?)?, bias])
    }

    /// The norm of what the layer gives without its bias, by the statistics of this batch, which the running ones follow.
    pub(super) fn normalize(&self, y: &Tensor, state: &mut NormState) -> Result<Tensor> {
        let channels = self.gain.elem_count();
        // What the running statistics are of, for which the batch's gain is undone. The norm itself doesn't feel it.
        let gain = self.gain.as_tensor().abs()?.maximum(LEAST_GAIN)?;
        let (out, seen) = ops::batch_norm(y, &gain, self.offset.as_tensor(), None, EPSILON)?;
        let factors = self.factor(&state.running)?.to_vec1::<f32>()?;
        let unbiased = seen.count as f32 / seen.count.saturating_sub(1).max(1) as f32;
        for c in 0..channels {
            let factor = if factors[c].abs() < LEAST_GAIN as f32 { LEAST_GAIN as f32 } else { factors[c] };
            let (mean, variance) = (seen.means[c] / factor, seen.variances[c] * unbiased / (factor * factor));
            state.running.means[c] += MOMENTUM * (mean - state.running.means[c]);
            state.running.variances[c] += MOMENTUM * (variance - state.running.variances[c]);
        }
        Ok(out)
    }

    /// Takes in what the layer gives in floats, bias included.
    pub(super) fn observe(&mut self, y: &Tensor) -> Result<()> {
        let channels = self.gain.elem_count();
        let plane = y.dims().iter().skip(2).product::<usize>().max(1);
        let (sums, squares, count) = self.seen.get_or_insert_with(|| (vec![0.0; channels], vec![0.0; channels], 0));
        lend(y, |y| {
            for (i, y) in y.chunks(plane).enumerate() {
                sums[i % channels] += y.iter().map(|&y| f64::from(y)).sum::<f64>();
                squares[i % channels] += y.iter().map(|&y| f64::from(y) * f64::from(y)).sum::<f64>();
            }
            *count += y.len() / channels.max(1);
            Ok(())
        })
    }

    /// Becomes the norm by the statistics of what was observed, which still changes nothing.
    pub(super) fn conclude(&mut self, state: &mut NormState) -> Result<()> {
        let Some((sums, squares, count)) = self.seen.take() else { return Ok(()) };
        let count = count.max(1) as f64;
        let bias = self.offset.as_tensor().to_vec1::<f32>()?;
        let means: Vec<f64> = sums.iter().map(|s| s / count).collect();
        let variances: Vec<f32> =
            squares.iter().zip(&means).map(|(s, m)| (s / count - m * m).max(0.0) as f32).collect();
        let gain: Vec<f32> = variances.iter().map(|v| (v + EPSILON).sqrt()).collect();
        let (n, device) = (gain.len(), self.gain.device().clone());
        self.gain.set(&Tensor::from_vec(gain, n, &device)?)?;
        // Observed with the bias; the running mean is of what the norm reads, which has none.
        self.offset.set(&Tensor::from_vec(means.iter().map(|&m| m as f32).collect::<Vec<_>>(), n, &device)?)?;
        state.running.means = means.iter().zip(bias).map(|(m, bias)| (m - f64::from(bias)) as f32).collect();
        state.running.variances = variances;
        Ok(())
    }
}
