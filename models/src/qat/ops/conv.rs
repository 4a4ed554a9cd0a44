//! Convolutions over (batch, channels, height, width): products of unrolled pictures, and plain sums for depthwise ones.
//!
//! ```text
//! columns (c ky kx, b y x) --weight (o, c ky kx)--> (o, b y x) -> (b, o, y, x)     one product for the whole batch
//! ```
//! candle's own convolution takes a channel of a depthwise one at a time, and gets its gradients from transposed
//! convolutions.

use super::norm::Dot;
use super::{add_channels, lend, values};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Error, Layout, Result, Shape, Tensor};
use nibble_kernels::Isa;
use nibble_kernels::simd::{LANES, Simd, SimdOp, dispatch};
use rayon::prelude::*;

/// How a kernel moves over a picture; of both axes, height first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvShape {
    /// The kernel's sides.
    pub kernel: [usize; 2],
    /// Steps.
    pub strides: [usize; 2],
    /// Rows above and below, columns left and right.
    pub pads: [[usize; 2]; 2],
    /// Distances between the kernel's values.
    pub dilations: [usize; 2],
    /// Parts of the channels that know nothing of each other.
    pub groups: usize,
}

impl ConvShape {
    /// Places that the kernel takes along an axis of `size`.
    ///
    /// # Errors
    /// A kernel larger than the padded picture, or a step of 0.
    pub fn places(&self, axis: usize, size: usize) -> Result<usize> {
        let reach = self.dilations[axis] * self.kernel[axis].saturating_sub(1) + 1;
        let padded = size + self.pads[axis][0] + self.pads[axis][1];
        if self.kernel[axis] == 0 || self.strides[axis] == 0 || reach > padded {
            return Err(Error::Msg(format!("kernel {:?} over {padded} padded pixels: {self:?}", self.kernel)));
        }
        Ok((padded - reach) / self.strides[axis] + 1)
    }

    /// Whether columns are the picture itself.
    fn is_pointwise(&self) -> bool {
        self.kernel == [1; 2] && self.strides == [1; 2] && self.pads == [[0; 2]; 2]
    }

    /// For a place along an axis and a value of the kernel, the pixel; `None` in the padding.
    fn pixel(&self, axis: usize, place: usize, tap: usize, size: usize) -> Option<usize> {
        let at = place * self.strides[axis] + tap * self.dilations[axis];
        at.checked_sub(self.pads[axis][0]).filter(|&at| at < size)
    }

    /// Places along an axis whose pixel for this value of the kernel lies in the picture, and the pixel of the first.
    fn inside(&self, axis: usize, tap: usize, size: usize, places: usize) -> (std::ops::Range<usize>, usize) {
        let (step, offset, pad) = (self.strides[axis], tap * self.dilations[axis], self.pads[axis][0]);
        let first = pad.saturating_sub(offset).div_ceil(step);
        // The last pixel is at place * step + offset - pad < size.
        let end = (size + pad).saturating_sub(offset).div_ceil(step).min(places);
        match first < end {
            true => (first..end, first * step + offset - pad),
            false => (0..0, 0),
        }
    }
}

/// A convolution with (out, in / groups, ky, kx) weights and an optional bias.
///
/// # Errors
/// Shapes that don't fit.
pub fn conv2d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, shape: ConvShape) -> Result<Tensor> {
    let (_, c, _, _) = x.dims4()?;
    let (o, per_group, ky, kx) = weight.dims4()?;
    let groups = shape.groups;
    if shape.kernel != [ky, kx] || groups == 0 || c != per_group * groups || o % groups != 0 {
        return Err(Error::Msg(format!("weights {:?} for {:?} in {groups} groups", weight.shape(), x.shape())));
    }
    let y = match groups {
        1 => product(x, weight, shape)?,
        _ if per_group == 1 && o == c => x.contiguous()?.apply_op2(&weight.contiguous()?, Depthwise { shape })?,
        _ => {
            let one = ConvShape { groups: 1, ..shape };
            let part = |g: usize| {
                let weight = weight.narrow(0, g * (o / groups), o / groups)?;
                product(&x.narrow(1, g * per_group, per_group)?, &weight, one)
            };
            Tensor::cat(&(0..groups).map(part).collect::<Result<Vec<_>>>()?, 1)?
        }
    };
    match bias {
        Some(bias) => add_channels(&y, bias),
        None => Ok(y),
    }
}

fn product(x: &Tensor, weight: &Tensor, shape: ConvShape) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let o = weight.dim(0)?;
    let (oh, ow) = (shape.places(0, h)?, shape.places(1, w)?);
    let columns = match shape.is_pointwise() {
        true => x.reshape((b, c, h * w))?.transpose(0, 1)?.contiguous()?.reshape((c, b * h * w))?,
        false => x.contiguous()?.apply_op1(Unroll { shape })?,
    };
    let y = weight.flatten_from(1)?.matmul(&columns)?;
    y.reshape((o, b, oh * ow))?.transpose(0, 1)?.contiguous()?.reshape((b, o, oh, ow))
}

/// (b, c, h, w) to columns (c ky kx, b y x).
struct Unroll {
    shape: ConvShape,
}

/// The way back: sums of columns.
struct Roll {
    shape: ConvShape,
    to: [usize; 4],
}

impl CustomOp1 for Unroll {
    fn name(&self) -> &'static str {
        "unroll"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(self.name(), storage, layout)?;
        let (b, c, h, w) = layout.shape().dims4()?;
        let ConvShape { kernel: [ky, kx], strides, .. } = self.shape;
        let (oh, ow) = (self.shape.places(0, h)?, self.shape.places(1, w)?);
        let row = b * oh * ow;
        let mut out = vec![0f32; c * ky * kx * row];
        out.par_chunks_mut(row.max(1)).enumerate().for_each(|(k, out)| {
            let (channel, ty, tx) = (k / (ky * kx), k / kx % ky, k % kx);
            let (inside, start) = self.shape.inside(1, tx, w, ow);
            for (place, out) in out.chunks_mut(ow.max(1)).enumerate() {
                let (picture, y) = (place / oh, place % oh);
                let Some(py) = self.shape.pixel(0, y, ty, h) else { continue };
                let from = &x[((picture * c + channel) * h + py) * w..][..w];
                match strides[1] {
                    1 => out[inside.clone()].copy_from_slice(&from[start..start + inside.len()]),
                    step => {
                        let pixels = from[start..].iter().step_by(step);
                        out[inside.clone()].iter_mut().zip(pixels).for_each(|(out, x)| *out = *x);
                    }
                }
            }
        });
        Ok((CpuStorage::F32(out), Shape::from((c * ky * kx, row))))
    }

    fn bwd(&self, arg: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (b, c, h, w) = arg.dims4()?;
        Ok(Some(grad.contiguous()?.apply_op1_no_bwd(&Roll { shape: self.shape, to: [b, c, h, w] })?))
    }
}

impl CustomOp1 for Roll {
    fn name(&self) -> &'static str {
        "roll"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let columns = values(self.name(), storage, layout)?;
        let [b, c, h, w] = self.to;
        let ConvShape { kernel: [ky, kx], strides, .. } = self.shape;
        let (oh, ow) = (self.shape.places(0, h)?, self.shape.places(1, w)?);
        let row = b * oh * ow;
        let mut out = vec![0f32; b * c * h * w];
        out.par_chunks_mut((h * w).max(1)).enumerate().for_each(|(plane, out)| {
            let (picture, channel) = (plane / c, plane % c);
            for tap in 0..ky * kx {
                let (ty, tx) = (tap / kx, tap % kx);
                let (inside, start) = self.shape.inside(1, tx, w, ow);
                let from = &columns[(channel * ky * kx + tap) * row + picture * oh * ow..][..oh * ow];
                for (y, from) in from.chunks(ow.max(1)).enumerate() {
                    let Some(py) = self.shape.pixel(0, y, ty, h) else { continue };
                    let out = &mut out[py * w..][..w];
                    let pixels = out[start..].iter_mut().step_by(strides[1]);
                    pixels.zip(&from[inside.clone()]).for_each(|(out, x)| *out += x);
                }
            }
        });
        Ok((CpuStorage::F32(out), Shape::from((b, c, h, w))))
    }
}

/// A convolution of each channel with a kernel of its own.
///
/// ```text
/// picture with zeros around it, row after row    x x x 0 0 | x x x 0 0 | ...
/// kernel value (ky, kx)                          reads `ky * width + kx` further on
/// ```
/// A plane is one run of values and the kernel a few distances in it, whatever the picture's width. Places between two
/// rows, and those that steps jump over, are computed too and left out.
struct Depthwise {
    shape: ConvShape,
}

/// Where things lie in the run of values of a plane.
struct Runs {
    /// Of a padded row.
    width: usize,
    /// Distance of each value of the kernel.
    offsets: Vec<usize>,
    /// The largest of them.
    reach: usize,
    /// Values of the padded picture, and places of the kernel, in whole vectors.
    pixels: usize,
    places: usize,
}

impl Depthwise {
    fn runs(&self, [h, w]: [usize; 2], oh: usize) -> Runs {
        let ConvShape { kernel: [ky, kx], strides, pads, dilations, .. } = self.shape;
        let width = w + pads[1][0] + pads[1][1];
        let offset = |tap: usize| tap / kx * dilations[0] * width + tap % kx * dilations[1];
        let offsets: Vec<usize> = (0..ky * kx).map(offset).collect();
        let reach = offsets.iter().copied().max().unwrap_or(0);
        let pixels = (width * (h + pads[0][0] + pads[0][1])).next_multiple_of(LANES);
        let places = (((oh - 1) * strides[0] + 1) * width).next_multiple_of(LANES);
        Runs { width, offsets, reach, pixels, places }
    }

    /// A plane with zeros around it, and enough of them behind it.
    fn pad(&self, x: &[f32], w: usize, runs: &Runs, out: &mut Vec<f32>) {
        out.clear();
        out.resize(runs.pixels.max(runs.places) + runs.reach, 0.0);
        for (y, x) in x.chunks(w.max(1)).enumerate() {
            let at = (y + self.shape.pads[0][0]) * runs.width + self.shape.pads[1][0];
            out[at..at + w].copy_from_slice(x);
        }
    }

    /// The place of an output's row in a run, and the distance of two of its values.
    fn row(&self, y: usize, runs: &Runs) -> (usize, usize) {
        (y * self.shape.strides[0] * runs.width, self.shape.strides[1])
    }
}

impl CustomOp2 for Depthwise {
    fn name(&self) -> &'static str {
        "depthwise"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (values(self.name(), s1, l1)?, values(self.name(), s2, l2)?);
        let (b, c, h, w) = l1.shape().dims4()?;
        let (oh, ow) = (self.shape.places(0, h)?, self.shape.places(1, w)?);
        let runs = self.runs([h, w], oh);
        let taps = runs.offsets.len();
        let mut out = vec![0f32; b * c * oh * ow];
        let isa = Isa::best();
        let planes = out.par_chunks_mut((oh * ow).max(1)).zip(x.par_chunks((h * w).max(1))).enumerate();
        planes.for_each_init(
            || (Vec::new(), vec![0f32; runs.places]),
            |(from, to), (plane, (out, x))| {
                self.pad(x, w, &runs, from);
                let kernel = &weight[plane % c * taps..][..taps];
                dispatch(isa, Correlate { x: from, offsets: &runs.offsets, kernel, out: to });
                for (y, out) in out.chunks_mut(ow.max(1)).enumerate() {
                    let (at, step) = self.row(y, &runs);
                    out.iter_mut().zip(to[at..].iter().step_by(step)).for_each(|(out, v)| *out = *v);
                }
            },
        );
        Ok((CpuStorage::F32(out), Shape::from((b, c, oh, ow))))
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (out, sums) = lend(x, |x_values| {
            lend(weight, |weight| lend(grad, |g| Ok(self.backward(x_values, x.dims(), weight, g, grad.dims()))))
        })?;
        let device = x.device();
        let out = Tensor::from_vec(out, x.shape(), device)?;
        Ok((Some(out), Some(Tensor::from_vec(sums, weight.shape(), device)?)))
    }
}

impl Depthwise {
    /// Gradients of (b, c, h, w) pictures and of the kernels.
    fn backward(&self, x: &[f32], dims: &[usize], weight: &[f32], grad: &[f32], of: &[usize]) -> (Vec<f32>, Vec<f32>) {
        let (c, h, w, oh, ow) = (dims[1], dims[2], dims[3], of[2], of[3]);
        let runs = self.runs([h, w], oh);
        let taps = runs.offsets.len();
        // What a pixel went into lies before it: with `reach` zeros in front, that is further on again.
        let backwards: Vec<usize> = runs.offsets.iter().map(|offset| runs.reach - offset).collect();
        let isa = Isa::best();
        let mut out = vec![0f32; x.len()];
        let planes = out.par_chunks_mut((h * w).max(1)).zip(x.par_chunks((h * w).max(1)));
        let planes = planes.zip(grad.par_chunks((oh * ow).max(1))).enumerate();
        let plane = |(from, grads, to): &mut (Vec<f32>, Vec<f32>, Vec<f32>),
                     plane: usize,
                     x: &[f32],
                     g: &[f32],
                     out: &mut [f32]| {
            self.pad(x, w, &runs, from);
            grads.clear();
            grads.resize(runs.pixels.max(runs.places) + 2 * runs.reach, 0.0);
            for (y, g) in g.chunks(ow.max(1)).enumerate() {
                let (at, step) = self.row(y, &runs);
                grads[runs.reach + at..].iter_mut().step_by(step).zip(g).for_each(|(to, g)| *to = *g);
            }
            to.clear();
            to.resize(runs.pixels, 0.0);
            let kernel = &weight[plane % c * taps..][..taps];
            dispatch(isa, Correlate { x: grads, offsets: &backwards, kernel, out: to });
            for (y, out) in out.chunks_mut(w.max(1)).enumerate() {
                let at = (y + self.shape.pads[0][0]) * runs.width + self.shape.pads[1][0];
                out.copy_from_slice(&to[at..at + w]);
            }
            let g = &grads[runs.reach..][..runs.places];
            let sum = |&offset: &usize| dispatch(isa, Dot { x: &from[offset..][..g.len()], y: g, about: 0.0, by: 0.0 });
            runs.offsets.iter().map(sum).collect::<Vec<f32>>()
        };
        let partial: Vec<Vec<f32>> =
            planes.map_init(Default::default, |buffers, (i, ((out, x), g))| plane(buffers, i, x, g, out)).collect();
        let mut sums = vec![0f32; weight.len()];
        for (plane, partial) in partial.iter().enumerate() {
            let at = plane % c * taps;
            sums[at..at + taps].iter_mut().zip(partial).for_each(|(sum, p)| *sum += p);
        }
        (out, sums)
    }
}

/// `out[i] = sum over the kernel of kernel[k] * x[i + offsets[k]]`, for whole vectors.
struct Correlate<'a> {
    x: &'a [f32],
    offsets: &'a [usize],
    kernel: &'a [f32],
    out: &'a mut [f32],
}

impl SimdOp for Correlate<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for (i, out) in self.out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let mut sum = s.splat(0.0);
            for (&offset, &weight) in self.offsets.iter().zip(self.kernel) {
                if let Some(x) = self.x[i * LANES + offset..].first_chunk::<LANES>() {
                    sum = s.fma(s.load(x), s.splat(weight), sum);
                }
            }
            s.store(sum, out);
        }
    }
}
