//! Largest values and means of windows.

use super::{ConvShape, lend, values};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// What becomes of a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// Its largest value; the first of several alike gets the gradient.
    Max,
    /// The mean of its values, with or without those in the padding.
    Mean {
        /// Padding counts as zeros.
        padding: bool,
    },
}

/// Pools (batch, channels, height, width).
///
/// # Errors
/// A window larger than the padded picture.
pub fn pool2d(x: &Tensor, shape: ConvShape, what: Pooling) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Pool { shape, what })
}

struct Pool {
    shape: ConvShape,
    what: Pooling,
}

impl Pool {
    /// The pixels of a window, as places in a plane.
    fn window(&self, [h, w]: [usize; 2], [y, x]: [usize; 2], to: &mut Vec<usize>) {
        let ConvShape { kernel: [ky, kx], strides, pads, dilations, .. } = self.shape;
        let pixel = |axis: usize, place: usize, tap: usize, size: usize| {
            let at = place * strides[axis] + tap * dilations[axis];
            at.checked_sub(pads[axis][0]).filter(|&at| at < size)
        };
        to.clear();
        for py in (0..ky).filter_map(|tap| pixel(0, y, tap, h)) {
            to.extend((0..kx).filter_map(|tap| pixel(1, x, tap, w)).map(|px| py * w + px));
        }
    }

    fn count(&self, pixels: &[usize]) -> f32 {
        match self.what {
            Pooling::Mean { padding: true } => (self.shape.kernel[0] * self.shape.kernel[1]) as f32,
            _ => pixels.len().max(1) as f32,
        }
    }
}

fn largest(x: &[f32], pixels: &[usize]) -> Option<usize> {
    let mut best = *pixels.first()?;
    for &at in pixels {
        if x[at] > x[best] {
            best = at;
        }
    }
    Some(best)
}

impl CustomOp1 for Pool {
    fn name(&self) -> &'static str {
        "pool"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(self.name(), storage, layout)?;
        let (b, c, h, w) = layout.shape().dims4()?;
        let (oh, ow) = (self.shape.places(0, h)?, self.shape.places(1, w)?);
        let mut out = vec![0f32; b * c * oh * ow];
        let planes = out.par_chunks_mut((oh * ow).max(1)).zip(x.par_chunks((h * w).max(1)));
        planes.for_each_init(Vec::new, |pixels, (out, x)| {
            for (place, out) in out.iter_mut().enumerate() {
                self.window([h, w], [place / ow, place % ow], pixels);
                *out = match self.what {
                    Pooling::Max => largest(x, pixels).map_or(0.0, |at| x[at]),
                    Pooling::Mean { .. } => pixels.iter().map(|&at| x[at]).sum::<f32>() / self.count(pixels),
                };
            }
        });
        Ok((CpuStorage::F32(out), Shape::from((b, c, oh, ow))))
    }

    fn bwd(&self, arg: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (_, _, h, w) = arg.dims4()?;
        let (_, _, oh, ow) = grad.dims4()?;
        let out = lend(arg, |x| {
            lend(grad, |grad| {
                let mut out = vec![0f32; x.len()];
                let planes = out.par_chunks_mut((h * w).max(1)).zip(x.par_chunks((h * w).max(1)));
                let planes = planes.zip(grad.par_chunks((oh * ow).max(1)));
                planes.for_each_init(Vec::new, |pixels, ((out, x), grad)| {
                    for (place, grad) in grad.iter().enumerate() {
                        self.window([h, w], [place / ow, place % ow], pixels);
                        match self.what {
                            Pooling::Max => largest(x, pixels).into_iter().for_each(|at| out[at] += grad),
                            Pooling::Mean { .. } => {
                                let share = grad / self.count(pixels);
                                pixels.iter().for_each(|&at| out[at] += share);
                            }
                        }
                    }
                });
                Ok(out)
            })
        })?;
        Ok(Some(Tensor::from_vec(out, arg.shape(), arg.device())?))
    }
}
