//! Portable Rust: the meaning of every operation, and the oracle for the other instruction sets.

use super::{BYTES, LANES, Simd, SimdOp};
use crate::Isa;
use half::{bf16, f16};

/// Portable operations; always at hand.
#[derive(Debug, Clone, Copy)]
pub struct Scalar;

#[inline(always)]
fn map<A: Copy, B>(a: [A; LANES], f: impl Fn(A) -> B) -> [B; LANES] {
    a.map(f)
}

#[inline(always)]
fn zip<A: Copy, B: Copy, C>(a: [A; LANES], b: [B; LANES], f: impl Fn(A, B) -> C) -> [C; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// Folds 16 lanes in halves: i with i+8, i with i+4, i with i+2, then the last two.
#[inline(always)]
fn fold<T: Copy>(mut a: [T; LANES], f: impl Fn(T, T) -> T) -> T {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            a[i] = f(a[i], a[i + half]);
        }
        half /= 2;
    }
    a[0]
}

impl Simd for Scalar {
    const ISA: Isa = Isa::Scalar;
    const LEVEL_BIAS: i32 = 0;
    const MULTIPLIES: bool = false;

    type F32 = [f32; LANES];
    type I32 = [i32; LANES];
    type Bytes = [u8; BYTES];
    type Mask = [bool; LANES];
    type NibbleSum = [i32; LANES];
    type Levels = [u8; BYTES];

    #[inline(always)]
    fn new() -> Option<Self> {
        Some(Scalar)
    }

    #[inline(always)]
    fn vectorize<O: SimdOp>(self, op: O) -> O::Output {
        op.eval(self)
    }

    #[inline(always)]
    fn splat(self, v: f32) -> Self::F32 {
        [v; LANES]
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::F32 {
        *from
    }

    #[inline(always)]
    fn store(self, v: Self::F32, to: &mut [f32; LANES]) {
        *to = v;
    }

    #[inline(always)]
    fn load_f16(self, from: &[f16; LANES]) -> Self::F32 {
        map(*from, f16::to_f32)
    }

    #[inline(always)]
    fn store_f16(self, v: Self::F32, to: &mut [f16; LANES]) {
        *to = map(v, f16::from_f32);
    }

    #[inline(always)]
    fn load_bf16(self, from: &[bf16; LANES]) -> Self::F32 {
        map(*from, bf16::to_f32)
    }

    #[inline(always)]
    fn load_u8(self, from: &[u8; LANES]) -> Self::F32 {
        map(*from, f32::from)
    }

    #[inline(always)]
    fn load_i8(self, from: &[i8; LANES]) -> Self::F32 {
        map(*from, f32::from)
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn fnma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        std::array::from_fn(|i| (-a[i]).mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn abs(self, a: Self::F32) -> Self::F32 {
        map(a, f32::abs)
    }

    #[inline(always)]
    fn sqrt(self, a: Self::F32) -> Self::F32 {
        map(a, f32::sqrt)
    }

    #[inline(always)]
    fn lt(self, a: Self::F32, b: Self::F32) -> Self::Mask {
        zip(a, b, |a, b| a < b)
    }

    #[inline(always)]
    fn select(self, mask: Self::Mask, a: Self::F32, b: Self::F32) -> Self::F32 {
        std::array::from_fn(|i| if mask[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn to_i32(self, a: Self::F32) -> Self::I32 {
        map(a, |a| {
            let r = a.round_ties_even();
            if (-2147483648.0..2147483648.0).contains(&r) { r as i32 } else { i32::MIN }
        })
    }

    #[inline(always)]
    fn sum(self, a: Self::F32) -> f32 {
        fold(a, |a, b| a + b)
    }

    #[inline(always)]
    fn largest(self, a: Self::F32) -> f32 {
        fold(a, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn splat_i32(self, v: i32) -> Self::I32 {
        [v; LANES]
    }

    #[inline(always)]
    fn load_i32(self, from: &[i32; LANES]) -> Self::I32 {
        *from
    }

    #[inline(always)]
    fn store_i32(self, v: Self::I32, to: &mut [i32; LANES]) {
        *to = v;
    }

    #[inline(always)]
    fn store_i8(self, v: Self::I32, to: &mut [i8; LANES]) {
        *to = map(v, |v| v.clamp(-128, 127) as i8);
    }

    #[inline(always)]
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        zip(a, b, i32::wrapping_add)
    }

    #[inline(always)]
    fn and_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        zip(a, b, |a, b| a & b)
    }

    #[inline(always)]
    fn shl(self, a: Self::I32, bits: i32) -> Self::I32 {
        map(a, |a| a << bits)
    }

    #[inline(always)]
    fn shr(self, a: Self::I32, bits: i32) -> Self::I32 {
        map(a, |a| (a as u32 >> bits) as i32)
    }

    #[inline(always)]
    fn to_f32(self, a: Self::I32) -> Self::F32 {
        map(a, |a| a as f32)
    }

    #[inline(always)]
    fn from_bits(self, a: Self::I32) -> Self::F32 {
        map(a, |a| f32::from_bits(a as u32))
    }

    #[inline(always)]
    fn to_bits(self, a: Self::F32) -> Self::I32 {
        map(a, |a| a.to_bits() as i32)
    }

    #[inline(always)]
    fn lookup(self, table: Self::F32, index: Self::I32) -> Self::F32 {
        map(index, |i| table[(i & 15) as usize])
    }

    #[inline(always)]
    fn sum_i32(self, a: Self::I32) -> i32 {
        fold(a, i32::wrapping_add)
    }

    #[inline(always)]
    fn load_bytes(self, from: &[u8; BYTES]) -> Self::Bytes {
        *from
    }

    #[inline(always)]
    fn store_bytes(self, v: Self::Bytes, to: &mut [u8; BYTES]) {
        *to = v;
    }

    #[inline(always)]
    fn splat16(self, from: &[i8; 16]) -> Self::Bytes {
        std::array::from_fn(|i| from[i % 16] as u8)
    }

    #[inline(always)]
    fn splat4(self, from: &[i8; 4]) -> Self::Bytes {
        std::array::from_fn(|i| from[i % 4] as u8)
    }

    #[inline(always)]
    fn low_nibbles(self, v: Self::Bytes) -> Self::Bytes {
        v.map(|b| b & 15)
    }

    #[inline(always)]
    fn high_nibbles(self, v: Self::Bytes) -> Self::Bytes {
        v.map(|b| b >> 4)
    }

    #[inline(always)]
    fn flip_top_bits(self, v: Self::Bytes) -> Self::Bytes {
        v.map(|b| b ^ 0x80)
    }

    #[inline(always)]
    fn lookup_bytes(self, table: Self::Bytes, index: Self::Bytes) -> Self::Bytes {
        index.map(|i| table[(i & 15) as usize])
    }

    #[inline(always)]
    fn words(self, v: Self::Bytes) -> Self::I32 {
        std::array::from_fn(|i| i32::from_le_bytes([v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]]))
    }

    #[inline(always)]
    fn start_nibbles(self, factor: Self::I32, pair: Self::I32) -> Self::NibbleSum {
        self.start_levels(factor, pair, [1; LANES])
    }

    #[inline(always)]
    fn pin_nibbles(self, sum: Self::NibbleSum) -> Self::NibbleSum {
        sum
    }

    #[inline(always)]
    fn start_levels(self, factor: Self::I32, pair: Self::I32, _: Self::I32) -> Self::I32 {
        zip(factor, pair, |f, p| i32::from(f as i16) * (i32::from(p as i16) + (p >> 16)))
    }

    #[inline(always)]
    fn pin_levels(self, sum: Self::I32) -> Self::I32 {
        sum
    }

    #[inline(always)]
    fn dot_nibbles(self, sum: Self::NibbleSum, codes: Self::Bytes, x: Self::Bytes) -> Self::NibbleSum {
        std::array::from_fn(|i| {
            (4 * i..4 * i + 4).fold(sum[i], |sum, b| sum + i32::from(codes[b]) * i32::from(x[b] as i8))
        })
    }

    #[inline(always)]
    fn nibble_total(self, sum: Self::NibbleSum, _: Self::I32) -> Self::I32 {
        sum
    }

    #[inline(always)]
    fn levels(self, v: Self::Bytes) -> Self::Levels {
        v
    }

    #[inline(always)]
    fn dot_levels(self, sum: Self::I32, levels: Self::Levels, x: Self::Bytes, _: Self::I32) -> Self::I32 {
        std::array::from_fn(|i| {
            (4 * i..4 * i + 4).fold(sum[i], |sum, b| sum + i32::from(levels[b] as i8) * i32::from(x[b] as i8))
        })
    }
}
