//! Differentiable operators that candle lacks or is slow at, each one pass forward and one back.
//!
//! candle composes a fake quantization, a norm or a softmax from elementary operators, each with a tensor of its own and
//! two more in its gradient. Here they are [custom operators](candle_core::CustomOp1) over plain slices, vectorized by
//! [`nibble_kernels::simd`]. Results depend neither on the number of threads nor on the instruction set: work is cut by
//! its shape, and sums have one order.

mod conv;
mod elementwise;
mod fake;
mod norm;
mod pool;
mod product;
mod rows;
mod softmax;

pub use conv::{ConvShape, conv2d};
pub use elementwise::{clamp, gelu};
pub use fake::{Axis, FakeQuantize, fake_quantize};
pub use norm::{BatchStatistics, batch_norm, layer_norm};
pub use pool::{Pooling, pool2d};
pub use product::linear;
pub use rows::{add_channels, add_rows};
pub use softmax::softmax;

use candle_core::{CpuStorage, Error, Layout, Result, Storage, Tensor};
use nibble_kernels::simd::{LANES, Simd, SimdOp};
use rayon::prelude::*;

/// Values that one thread takes at a time: a multiple of every vector's lanes.
const GRAIN: usize = 1 << 13;

/// The values of an operand, which wrappers have made contiguous.
fn values<'a>(op: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let CpuStorage::F32(values) = storage else {
        return Err(Error::Msg(format!("{op} takes f32, got {:?}", layout.shape())));
    };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&values[start..end]),
        None => Err(Error::Msg(format!("{op} takes contiguous tensors, got strides {:?}", layout.stride()))),
    }
}

/// Lends a tensor's values.
pub fn lend<T>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(values("a CPU operator", storage, layout)?),
        _ => Err(Error::Msg("a tensor of another device than the CPU".into())),
    }
}

/// As many values as `x` has, made in parts: `f` is given a part of `x` and the zeros that become the same part of the
/// result. What it returns for each part comes second, in order.
fn parts<T: Send>(x: &[f32], part: usize, f: impl Fn(&[f32], &mut [f32]) -> T + Sync) -> (Vec<f32>, Vec<T>) {
    parts2(x, x, part, |x, _, out| f(x, out))
}

/// As [`parts`], over two inputs of one length.
fn parts2<T: Send>(
    x: &[f32],
    y: &[f32],
    part: usize,
    f: impl Fn(&[f32], &[f32], &mut [f32]) -> T + Sync,
) -> (Vec<f32>, Vec<T>) {
    let part = part.max(1);
    if rayon::current_num_threads() > 1 {
        let mut out = vec![0f32; x.len()];
        let inputs = x.par_chunks(part).zip(y.par_chunks(part));
        let results = inputs.zip(out.par_chunks_mut(part)).map(|((x, y), out)| f(x, y, out)).collect();
        return (out, results);
    }
    // A part is cleared just before it is written, and doesn't leave the cache in between.
    let mut out = Vec::with_capacity(x.len());
    let one = |(x, y): (&[f32], &[f32])| {
        let at = out.len();
        out.resize(at + x.len(), 0.0);
        f(x, y, &mut out[at..])
    };
    let results = x.chunks(part).zip(y.chunks(part)).map(one).collect();
    (out, results)
}

/// A function of the values in each lane. Not a closure: a closure is compiled by itself, without the instructions of
/// whoever calls it, and each of its operations becomes a call.
trait Lanewise<const N: usize> {
    /// Its value. Must be `#[inline(always)]`.
    fn at<S: Simd>(&self, s: S, x: [S::F32; N]) -> S::F32;
}

/// `out = f(x)`.
struct Map<'a, F> {
    x: &'a [f32],
    out: &'a mut [f32],
    f: F,
}

impl<F: Lanewise<1>> SimdOp for Map<'_, F> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let ((x, x_tail), (out, out_tail)) = (self.x.as_chunks::<LANES>(), self.out.as_chunks_mut::<LANES>());
        for (x, out) in x.iter().zip(out) {
            s.store(self.f.at(s, [s.load(x)]), out);
        }
        if !out_tail.is_empty() {
            s.store_partial(self.f.at(s, [s.load_partial(x_tail)]), out_tail);
        }
    }
}

/// `out = f(x, y)`; lanes past the end are 0.
struct Map2<'a, F> {
    x: &'a [f32],
    y: &'a [f32],
    out: &'a mut [f32],
    f: F,
}

impl<F: Lanewise<2>> SimdOp for Map2<'_, F> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let ((x, x_tail), (y, y_tail)) = (self.x.as_chunks::<LANES>(), self.y.as_chunks::<LANES>());
        let (out, out_tail) = self.out.as_chunks_mut::<LANES>();
        for ((x, y), out) in x.iter().zip(y).zip(out) {
            s.store(self.f.at(s, [s.load(x), s.load(y)]), out);
        }
        if !out_tail.is_empty() {
            s.store_partial(self.f.at(s, [s.load_partial(x_tail), s.load_partial(y_tail)]), out_tail);
        }
    }
}

/// Rows of `d` values that make about a [`GRAIN`].
fn grain_of_rows(d: usize) -> usize {
    (GRAIN / d.max(1)).max(1) * d.max(1)
}
