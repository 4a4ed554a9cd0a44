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
mod rows;
mod softmax;

pub use conv::{ConvShape, conv2d};
pub use elementwise::{clamp, gelu};
pub use fake::{Axis, FakeQuantize, fake_quantize};
pub use norm::{BatchStatistics, batch_norm, layer_norm};
pub use pool::{Pooling, pool2d};
pub use rows::{add_channels, add_rows};
pub use softmax::softmax;

use candle_core::{CpuStorage, Error, Layout, Result, Storage, Tensor};
use nibble_kernels::simd::{LANES, Simd};
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

/// Cuts `out` and `x` at the same places and works on the parts in parallel; what each part returns, in order.
fn parts<T: Send>(x: &[f32], out: &mut [f32], part: usize, f: impl Fn(&[f32], &mut [f32]) -> T + Sync) -> Vec<T> {
    x.par_chunks(part.max(1)).zip(out.par_chunks_mut(part.max(1))).map(|(x, out)| f(x, out)).collect()
}

/// As [`parts`], over two inputs.
fn parts2<T: Send>(
    x: &[f32],
    y: &[f32],
    out: &mut [f32],
    part: usize,
    f: impl Fn(&[f32], &[f32], &mut [f32]) -> T + Sync,
) -> Vec<T> {
    let part = part.max(1);
    let inputs = x.par_chunks(part).zip(y.par_chunks(part));
    inputs.zip(out.par_chunks_mut(part)).map(|((x, y), out)| f(x, y, out)).collect()
}

/// `out = f(x)`, whole vectors first.
#[inline(always)]
fn map<S: Simd>(s: S, x: &[f32], out: &mut [f32], f: impl Fn(S::F32) -> S::F32) {
    let ((x, x_tail), (out, out_tail)) = (x.as_chunks::<LANES>(), out.as_chunks_mut::<LANES>());
    for (x, out) in x.iter().zip(out) {
        s.store(f(s.load(x)), out);
    }
    if !out_tail.is_empty() {
        s.store_partial(f(s.load_partial(x_tail)), out_tail);
    }
}

/// `out = f(x, y)`, whole vectors first; lanes past the end are 0.
#[inline(always)]
fn map2<S: Simd>(s: S, x: &[f32], y: &[f32], out: &mut [f32], mut f: impl FnMut(S::F32, S::F32) -> S::F32) {
    let ((x, x_tail), (y, y_tail)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    let (out, out_tail) = out.as_chunks_mut::<LANES>();
    for ((x, y), out) in x.iter().zip(y).zip(out) {
        s.store(f(s.load(x), s.load(y)), out);
    }
    if !out_tail.is_empty() {
        s.store_partial(f(s.load_partial(x_tail), s.load_partial(y_tail)), out_tail);
    }
}

/// Rows of `d` values that make about a [`GRAIN`].
fn grain_of_rows(d: usize) -> usize {
    (GRAIN / d.max(1)).max(1) * d.max(1)
}
