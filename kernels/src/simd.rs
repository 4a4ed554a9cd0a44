//! Sixteen lanes at a time, written once: [`Simd`] is the small vocabulary that every algorithm of this crate is
//! written in, and the types that implement it are the instruction sets.
//!
//! ```
//! use nibble_kernels::{Isa, simd::{self, LANES, Simd, SimdOp}};
//!
//! struct Dot<'a>(&'a [f32], &'a [f32]);
//! impl SimdOp for Dot<'_> {
//!     type Output = f32;
//!     #[inline(always)]
//!     fn eval<S: Simd>(self, s: S) -> f32 {
//!         let mut sum = s.splat(0.0);
//!         for (a, b) in self.0.chunks(LANES).zip(self.1.chunks(LANES)) {
//!             sum = s.fma(s.load_partial(a), s.load_partial(b), sum);
//!         }
//!         s.sum(sum)
//!     }
//! }
//! assert_eq!(simd::dispatch(Isa::best(), Dot(&[1.0; 17], &[2.0; 17])), 34.0);
//! ```
//!
//! **A token is the proof.** A value of type `S: Simd` exists only where the CPU has the instructions (`S::new`), so its
//! methods are safe to call. `dispatch` makes the token and enters a function compiled for that instruction set; all
//! that is called from [`SimdOp::eval`] must be `#[inline(always)]` and free of closures that might stay calls: code
//! that is not inlined there is still right, but compiled without the instructions.
//!
//! **Every instruction set gives the same bits.** Each method is one correctly rounded IEEE operation a lane or exact
//! integer arithmetic, `fma` is fused everywhere, and sums over lanes have one order. So the scalar implementation is
//! an oracle for the others bit for bit. Tiles of bfloat16 (`Amx`) are beside this vocabulary and outside of that law.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;

#[cfg(target_arch = "x86_64")]
pub(crate) use amx::{Amx, REGISTER_PRODUCTS};
#[cfg(target_arch = "x86_64")]
pub use avx2::{Avx2, AvxVnni, Ymm};
#[cfg(target_arch = "x86_64")]
pub use avx512::Avx512;
pub use scalar::Scalar;

use crate::Isa;
use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};

/// Lanes of a vector: 16 numbers of 32 bits.
pub const LANES: usize = 16;
/// Bytes of a vector.
pub const BYTES: usize = 64;

/// Lines of a tile.
pub(crate) const TILE_ROWS: usize = 16;

/// A tile register in memory: 16 lines of 16 numbers, or of 16 pairs of shorter ones.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(crate) struct TileLines(pub(crate) [[u32; LANES]; TILE_ROWS]);

/// Work that can be compiled for any instruction set: a struct of its arguments.
pub trait SimdOp {
    /// What the work returns.
    type Output;

    /// Does the work. Must be `#[inline(always)]`.
    fn eval<S: Simd>(self, s: S) -> Self::Output;
}

/// The sum of `a * b`, over as many values as both have.
#[inline(always)]
pub fn dot<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    let mut sums = s.splat(0.0);
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        sums = s.fma(s.load_partial(a), s.load_partial(b), sums);
    }
    s.sum(sums)
}

/// `to += by * from`.
#[inline(always)]
pub fn add_multiple<S: Simd>(s: S, to: &mut [f32], from: &[f32], by: f32) {
    let by = s.splat(by);
    let ((to, to_tail), (from, tail)) = (to.as_chunks_mut::<LANES>(), from.as_chunks::<LANES>());
    for (to, from) in to.iter_mut().zip(from) {
        s.store(s.fma(by, s.load(from), s.load(to)), to);
    }
    s.store_partial(s.fma(by, s.load_partial(tail), s.load_partial(to_tail)), to_tail);
}

/// `out[i] = a . rows[i]`: rows of as many values as `a` has, one after the other.
///
/// # Panics
/// If there are less rows than `out` has places.
#[inline(always)]
pub fn dots<S: Simd>(s: S, a: &[f32], rows: &[f32], out: &mut [f32]) {
    let (width, whole) = (a.len(), out.len() / 4 * 4);
    for first in (0..whole).step_by(4) {
        let mut sums = [s.splat(0.0); 4];
        for col in (0..width).step_by(LANES) {
            let cols = col..(col + LANES).min(width);
            let x = s.load_partial(&a[cols.clone()]);
            for (i, sum) in sums.iter_mut().enumerate() {
                let row = &rows[(first + i) * width..(first + i + 1) * width];
                *sum = s.fma(x, s.load_partial(&row[cols.clone()]), *sum);
            }
        }
        for i in 0..4 {
            out[first + i] = s.sum(sums[i]);
        }
    }
    for i in whole..out.len() {
        out[i] = dot(s, a, &rows[i * width..(i + 1) * width]);
    }
}

/// `to += sum of by[i] * rows[i]`: rows of as many values as `to` has, one after the other.
///
/// # Panics
/// If there are less rows than `by` has numbers.
#[inline(always)]
pub fn add_rows<S: Simd>(s: S, to: &mut [f32], rows: &[f32], by: &[f32]) {
    let (width, whole) = (to.len(), by.len() / 4 * 4);
    for first in (0..whole).step_by(4) {
        let mut factors = [s.splat(0.0); 4];
        for i in 0..4 {
            factors[i] = s.splat(by[first + i]);
        }
        for col in (0..width).step_by(LANES) {
            let cols = col..(col + LANES).min(width);
            let mut sum = s.load_partial(&to[cols.clone()]);
            for (i, factor) in factors.iter().enumerate() {
                let row = &rows[(first + i) * width..(first + i + 1) * width];
                sum = s.fma(*factor, s.load_partial(&row[cols.clone()]), sum);
            }
            s.store_partial(sum, &mut to[cols]);
        }
    }
    for i in whole..by.len() {
        add_multiple(s, to, &rows[i * width..(i + 1) * width], by[i]);
    }
}

/// Does `op` with the instructions of `isa`, or with portable ones if this CPU lacks them.
pub fn dispatch<O: SimdOp>(isa: Isa, op: O) -> O::Output {
    #[cfg(target_arch = "x86_64")]
    match isa {
        Isa::Avx512 | Isa::Amx => {
            if let Some(s) = Avx512::new() {
                return s.vectorize(op);
            }
        }
        Isa::AvxVnni => {
            if let Some(s) = AvxVnni::new() {
                return s.vectorize(op);
            }
        }
        Isa::Avx2 => {
            if let Some(s) = Avx2::new() {
                return s.vectorize(op);
            }
        }
        Isa::Scalar => {}
    }
    let _ = isa;
    Scalar.vectorize(op)
}

/// An instruction set, as operations on vectors of 16 lanes.
pub trait Simd: Copy + Send + Sync + 'static {
    /// Its name.
    const ISA: Isa;
    /// What [`Simd::dot_levels`] adds to every level: `dot = sum((level + LEVEL_BIAS) * x)`.
    const LEVEL_BIAS: i32;
    /// Whether dot products are multiplied by a 16-bit integer on the way, which costs nothing where sums of 16 bits are
    /// widened by a multiplication anyway.
    const MULTIPLIES: bool;
    /// Panels whose sums fit in registers together, for a few activation rows.
    const PANELS: usize = 1;

    /// 16 single-precision numbers.
    type F32: Copy;
    /// 16 32-bit integers.
    type I32: Copy;
    /// 64 bytes; lane i of a dot product is made of bytes 4i..4i+4.
    type Bytes: Copy;
    /// 16 truths.
    type Mask: Copy;
    /// Running dot products of 4-bit codes over one [`BLOCK`](crate::BLOCK).
    type NibbleSum: Copy;
    /// Signed 8-bit levels prepared for [`Simd::dot_levels`].
    type Levels: Copy;

    /// The token, if this CPU has the instructions.
    fn new() -> Option<Self>;

    /// Runs `op` in a function that is compiled for these instructions.
    fn vectorize<O: SimdOp>(self, op: O) -> O::Output;

    // Floats.

    /// The same number in every lane.
    fn splat(self, v: f32) -> Self::F32;
    /// 16 numbers.
    fn load(self, from: &[f32; LANES]) -> Self::F32;
    /// Stores 16 numbers.
    fn store(self, v: Self::F32, to: &mut [f32; LANES]);
    /// 16 half-precision numbers, widened.
    fn load_f16(self, from: &[f16; LANES]) -> Self::F32;
    /// Stores 16 numbers rounded (half to even) to half precision.
    fn store_f16(self, v: Self::F32, to: &mut [f16; LANES]);
    /// 16 bfloat16 numbers, widened.
    fn load_bf16(self, from: &[bf16; LANES]) -> Self::F32;
    /// 16 unsigned bytes as floats.
    fn load_u8(self, from: &[u8; LANES]) -> Self::F32;
    /// 16 signed bytes as floats.
    fn load_i8(self, from: &[i8; LANES]) -> Self::F32;
    /// a + b
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// a - b
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// a * b
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// a / b
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// a * b + c, rounded once.
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// c - a * b, rounded once.
    fn fnma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// `if a < b { a } else { b }`: b where one of them is NaN.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `if a > b { a } else { b }`: b where one of them is NaN.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// |a|
    fn abs(self, a: Self::F32) -> Self::F32;
    /// The square root.
    fn sqrt(self, a: Self::F32) -> Self::F32;
    /// a < b; false where one of them is NaN.
    fn lt(self, a: Self::F32, b: Self::F32) -> Self::Mask;
    /// `a` where the mask is true, `b` elsewhere.
    fn select(self, mask: Self::Mask, a: Self::F32, b: Self::F32) -> Self::F32;
    /// Nearest integers, halves to even; `i32::MIN` for NaN and for what doesn't fit.
    fn to_i32(self, a: Self::F32) -> Self::I32;
    /// The sum of all lanes: lane i + lane i+8, then i + i+4, then i + i+2, then the last two.
    fn sum(self, a: Self::F32) -> f32;
    /// The largest lane, by [`Simd::max`] in the order of [`Simd::sum`].
    fn largest(self, a: Self::F32) -> f32;

    // Integers.

    /// The same integer in every lane.
    fn splat_i32(self, v: i32) -> Self::I32;
    /// 16 integers.
    fn load_i32(self, from: &[i32; LANES]) -> Self::I32;
    /// Stores 16 integers.
    fn store_i32(self, v: Self::I32, to: &mut [i32; LANES]);
    /// Stores 16 integers saturated to signed bytes.
    fn store_i8(self, v: Self::I32, to: &mut [i8; LANES]);
    /// a + b, wrapping.
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// a & b
    fn and_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// a << bits
    fn shl(self, a: Self::I32, bits: i32) -> Self::I32;
    /// a >> bits, zeros shifted in.
    fn shr(self, a: Self::I32, bits: i32) -> Self::I32;
    /// The nearest floats.
    fn to_f32(self, a: Self::I32) -> Self::F32;
    /// The floats whose bits these are.
    #[expect(clippy::wrong_self_convention, reason = "named after `f32::from_bits`; `self` is the token")]
    fn from_bits(self, a: Self::I32) -> Self::F32;
    /// The bits of floats.
    fn to_bits(self, a: Self::F32) -> Self::I32;
    /// `table[index & 15]`
    fn lookup(self, table: Self::F32, index: Self::I32) -> Self::F32;
    /// The sum of all lanes, wrapping.
    fn sum_i32(self, a: Self::I32) -> i32;

    // Bytes and their dot products.

    /// 64 bytes.
    fn load_bytes(self, from: &[u8; BYTES]) -> Self::Bytes;
    /// Stores 64 bytes.
    fn store_bytes(self, v: Self::Bytes, to: &mut [u8; BYTES]);
    /// 16 bytes, four times over: a table for [`Simd::lookup_bytes`].
    fn splat16(self, from: &[i8; 16]) -> Self::Bytes;
    /// 4 bytes, 16 times over: 4 activations that meet 16 rows.
    fn splat4(self, from: &[i8; 4]) -> Self::Bytes;
    /// The low 4 bits of every byte.
    fn low_nibbles(self, v: Self::Bytes) -> Self::Bytes;
    /// The high 4 bits of every byte.
    fn high_nibbles(self, v: Self::Bytes) -> Self::Bytes;
    /// Every byte with its top bit flipped: unsigned code to signed code - 128.
    fn flip_top_bits(self, v: Self::Bytes) -> Self::Bytes;
    /// `table[index]` for bytes of 0..=15; `table` is a [`Simd::splat16`].
    fn lookup_bytes(self, table: Self::Bytes, index: Self::Bytes) -> Self::Bytes;
    /// Each 4 bytes as one integer, little endian.
    fn words(self, v: Self::Bytes) -> Self::I32;

    /// `factor * (low + high)` where every lane of both arguments is a pair of 16-bit integers and both halves of a
    /// factor are the same: what a zero point takes from a block, before its products.
    ///
    /// Together with calls of [`Simd::dot_nibbles`] it is exact if all products of the block, each with its share of the
    /// factor taken off, stay within 16 bits: 8 quads for `|code + factor| <= 16`, 4 for `|code + factor| <= 32`.
    fn start_nibbles(self, factor: Self::I32, pair: Self::I32) -> Self::NibbleSum;
    /// Adds the products of codes 0..=63 and signed bytes in -127..=127, 4 to a lane, for [`Simd::nibble_total`].
    fn dot_nibbles(self, sum: Self::NibbleSum, codes: Self::Bytes, x: Self::Bytes) -> Self::NibbleSum;
    /// The dot products of a block, times `number` (pairs of equal 16-bit integers) if [`Simd::MULTIPLIES`].
    fn nibble_total(self, sum: Self::NibbleSum, number: Self::I32) -> Self::I32;
    /// The same sum, which the compiler takes for another: it neither reorders products across this point nor moves
    /// later ones before it, so that the sums of a tile stay in registers.
    fn pin_nibbles(self, sum: Self::NibbleSum) -> Self::NibbleSum;
    /// [`Simd::start_nibbles`] for [`Simd::dot_levels`], times `number` if [`Simd::MULTIPLIES`]: exact for all 16-bit
    /// factors and pairs.
    fn start_levels(self, factor: Self::I32, pair: Self::I32, number: Self::I32) -> Self::I32;
    /// [`Simd::pin_nibbles`] for [`Simd::dot_levels`].
    fn pin_levels(self, sum: Self::I32) -> Self::I32;
    /// Signed levels -128..=127 in the form that dot products want; made once, used for many rows.
    fn levels(self, v: Self::Bytes) -> Self::Levels;
    /// Adds `(level + LEVEL_BIAS) * x` for signed bytes x in -127..=127, 4 to a lane, times `number` if
    /// [`Simd::MULTIPLIES`]; exact.
    fn dot_levels(self, sum: Self::I32, levels: Self::Levels, x: Self::Bytes, number: Self::I32) -> Self::I32;

    // Composed of the above.

    /// Up to 16 numbers, zeros after them.
    #[inline(always)]
    fn load_partial(self, from: &[f32]) -> Self::F32 {
        match from.first_chunk() {
            Some(whole) => self.load(whole),
            None => {
                let mut padded = [0.0; LANES];
                padded[..from.len()].copy_from_slice(from);
                self.load(&padded)
            }
        }
    }

    /// Stores as many of the 16 numbers as there is room for.
    #[inline(always)]
    fn store_partial(self, v: Self::F32, to: &mut [f32]) {
        match to.first_chunk_mut() {
            Some(whole) => self.store(v, whole),
            None => {
                let mut padded = [0.0; LANES];
                self.store(v, &mut padded);
                let len = to.len();
                to.copy_from_slice(&padded[..len]);
            }
        }
    }

    /// Asks for the cache line at `at`, which need not be a valid address, for the second-level cache: what is used only
    /// once needn't displace what is used again from the first.
    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch is a hint that never faults, whatever the address; SSE is in the x86-64 baseline.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(at.cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = at;
    }
}
