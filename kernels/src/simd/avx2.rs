//! AVX2, FMA and F16C: a vector of 16 lanes is two registers. With `VNNI` the dot products are one instruction.

use super::{BYTES, LANES, Simd, SimdOp};
use crate::Isa;
use half::{bf16, f16};
use std::arch::x86_64::*;

/// The 256-bit instruction sets; a value exists only where the CPU has them.
#[derive(Debug, Clone, Copy)]
pub struct Ymm<const VNNI: bool>(());

/// AVX2, FMA and F16C.
pub type Avx2 = Ymm<false>;
/// The same with AVX-VNNI.
pub type AvxVnni = Ymm<true>;

/// Runs intrinsics on the strength of the token.
macro_rules! x86 {
    ($($body:tt)*) => {
        // SAFETY: `self` exists only if `new` found these instructions on this CPU; memory is reached through
        // references to arrays as large as the access, with unaligned loads and stores.
        unsafe { $($body)* }
    };
}

#[target_feature(enable = "avx2,fma,f16c")]
fn enter_avx2<O: SimdOp>(s: Avx2, op: O) -> O::Output {
    op.eval(s)
}

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
fn enter_avxvnni<O: SimdOp>(s: AvxVnni, op: O) -> O::Output {
    op.eval(s)
}

/// Hands registers back as values that the compiler knows nothing of.
#[inline]
#[target_feature(enable = "avx2")]
fn pin([mut low, mut high]: [__m256i; 2]) -> [__m256i; 2] {
    // SAFETY: no instruction at all; the registers are named so that the compiler keeps the values in some.
    unsafe {
        std::arch::asm!("/* {0} {1} */", inout(ymm_reg) low, inout(ymm_reg) high,
            options(pure, nomem, nostack, preserves_flags));
    }
    [low, high]
}

impl<const VNNI: bool> Ymm<VNNI> {
    /// One half of 16 lanes folded into one number, in the order that [`Simd::sum`] promises.
    #[inline(always)]
    fn fold_sum(self, v: __m256) -> f32 {
        x86! {
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps::<1>(v, v)))
        }
    }
}

impl<const VNNI: bool> Simd for Ymm<VNNI> {
    const ISA: Isa = if VNNI { Isa::AvxVnni } else { Isa::Avx2 };
    const LEVEL_BIAS: i32 = if VNNI { 128 } else { 0 };
    const MULTIPLIES: bool = !VNNI;

    type F32 = [__m256; 2];
    type I32 = [__m256i; 2];
    type Bytes = [__m256i; 2];
    type Mask = [__m256; 2];
    /// 16-bit sums without VNNI (8 * 2 * 15 * 127 fits), 32-bit sums with it.
    type NibbleSum = [__m256i; 2];
    /// Without VNNI magnitudes and signed levels, with it levels + 128 and nothing.
    type Levels = [[__m256i; 2]; 2];

    #[inline(always)]
    fn new() -> Option<Self> {
        Self::ISA.is_present().then_some(Ymm(()))
    }

    #[inline(always)]
    fn vectorize<O: SimdOp>(self, op: O) -> O::Output {
        if VNNI {
            // SAFETY: `self` exists, so the CPU has the instructions that the function is compiled for.
            unsafe { enter_avxvnni(Ymm(()), op) }
        } else {
            // SAFETY: as above.
            unsafe { enter_avx2(Ymm(()), op) }
        }
    }

    #[inline(always)]
    fn splat(self, v: f32) -> Self::F32 {
        x86! { [_mm256_set1_ps(v); 2] }
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::F32 {
        x86! { [_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))] }
    }

    #[inline(always)]
    fn store(self, v: Self::F32, to: &mut [f32; LANES]) {
        x86! {
            _mm256_storeu_ps(to.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), v[1]);
        }
    }

    #[inline(always)]
    fn load_f16(self, from: &[f16; LANES]) -> Self::F32 {
        let at = from.as_ptr().cast::<__m128i>();
        x86! { [_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at.add(1)))] }
    }

    #[inline(always)]
    fn store_f16(self, v: Self::F32, to: &mut [f16; LANES]) {
        let at = to.as_mut_ptr().cast::<__m128i>();
        x86! {
            _mm_storeu_si128(at, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[0]));
            _mm_storeu_si128(at.add(1), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[1]));
        }
    }

    #[inline(always)]
    fn load_bf16(self, from: &[bf16; LANES]) -> Self::F32 {
        let at = from.as_ptr().cast::<__m128i>();
        x86! {
            let widen = [_mm256_cvtepu16_epi32(_mm_loadu_si128(at)), _mm256_cvtepu16_epi32(_mm_loadu_si128(at.add(1)))];
            self.from_bits([_mm256_slli_epi32::<16>(widen[0]), _mm256_slli_epi32::<16>(widen[1])])
        }
    }

    #[inline(always)]
    fn load_u8(self, from: &[u8; LANES]) -> Self::F32 {
        let at = from.as_ptr().cast::<__m128i>();
        x86! {
            let v = _mm_loadu_si128(at);
            self.to_f32([_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(v))])
        }
    }

    #[inline(always)]
    fn load_i8(self, from: &[i8; LANES]) -> Self::F32 {
        let at = from.as_ptr().cast::<__m128i>();
        x86! {
            let v = _mm_loadu_si128(at);
            self.to_f32([_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(v))])
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        x86! { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        x86! { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        x86! { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        x86! { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        x86! { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn fnma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        x86! { [_mm256_fnmadd_ps(a[0], b[0], c[0]), _mm256_fnmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        x86! { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        x86! { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn abs(self, a: Self::F32) -> Self::F32 {
        x86! {
            let sign = _mm256_set1_ps(-0.0);
            [_mm256_andnot_ps(sign, a[0]), _mm256_andnot_ps(sign, a[1])]
        }
    }

    #[inline(always)]
    fn sqrt(self, a: Self::F32) -> Self::F32 {
        x86! { [_mm256_sqrt_ps(a[0]), _mm256_sqrt_ps(a[1])] }
    }

    #[inline(always)]
    fn lt(self, a: Self::F32, b: Self::F32) -> Self::Mask {
        x86! { [_mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0]), _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1])] }
    }

    #[inline(always)]
    fn select(self, mask: Self::Mask, a: Self::F32, b: Self::F32) -> Self::F32 {
        x86! { [_mm256_blendv_ps(b[0], a[0], mask[0]), _mm256_blendv_ps(b[1], a[1], mask[1])] }
    }

    #[inline(always)]
    fn to_i32(self, a: Self::F32) -> Self::I32 {
        x86! { [_mm256_cvtps_epi32(a[0]), _mm256_cvtps_epi32(a[1])] }
    }

    #[inline(always)]
    fn sum(self, a: Self::F32) -> f32 {
        x86! { self.fold_sum(_mm256_add_ps(a[0], a[1])) }
    }

    #[inline(always)]
    fn largest(self, a: Self::F32) -> f32 {
        x86! {
            let v = _mm256_max_ps(a[0], a[1]);
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps::<1>(v, v)))
        }
    }

    #[inline(always)]
    fn splat_i32(self, v: i32) -> Self::I32 {
        x86! { [_mm256_set1_epi32(v); 2] }
    }

    #[inline(always)]
    fn load_i32(self, from: &[i32; LANES]) -> Self::I32 {
        let at = from.as_ptr().cast::<__m256i>();
        x86! { [_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))] }
    }

    #[inline(always)]
    fn store_i32(self, v: Self::I32, to: &mut [i32; LANES]) {
        let at = to.as_mut_ptr().cast::<__m256i>();
        x86! {
            _mm256_storeu_si256(at, v[0]);
            _mm256_storeu_si256(at.add(1), v[1]);
        }
    }

    #[inline(always)]
    fn store_i8(self, v: Self::I32, to: &mut [i8; LANES]) {
        x86! {
            // Packs work within 128-bit halves, which leaves 4-byte pieces in the order 0 2 1 3.
            let words = _mm256_packs_epi32(v[0], v[1]);
            let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(to.as_mut_ptr().cast(), _mm_shuffle_epi32::<0b11_01_10_00>(bytes));
        }
    }

    #[inline(always)]
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        x86! { [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])] }
    }

    #[inline(always)]
    fn and_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        x86! { [_mm256_and_si256(a[0], b[0]), _mm256_and_si256(a[1], b[1])] }
    }

    #[inline(always)]
    fn shl(self, a: Self::I32, bits: i32) -> Self::I32 {
        x86! {
            let bits = _mm_cvtsi32_si128(bits);
            [_mm256_sll_epi32(a[0], bits), _mm256_sll_epi32(a[1], bits)]
        }
    }

    #[inline(always)]
    fn shr(self, a: Self::I32, bits: i32) -> Self::I32 {
        x86! {
            let bits = _mm_cvtsi32_si128(bits);
            [_mm256_srl_epi32(a[0], bits), _mm256_srl_epi32(a[1], bits)]
        }
    }

    #[inline(always)]
    fn to_f32(self, a: Self::I32) -> Self::F32 {
        x86! { [_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])] }
    }

    #[inline(always)]
    fn from_bits(self, a: Self::I32) -> Self::F32 {
        x86! { [_mm256_castsi256_ps(a[0]), _mm256_castsi256_ps(a[1])] }
    }

    #[inline(always)]
    fn to_bits(self, a: Self::F32) -> Self::I32 {
        x86! { [_mm256_castps_si256(a[0]), _mm256_castps_si256(a[1])] }
    }

    #[inline(always)]
    fn lookup(self, table: Self::F32, index: Self::I32) -> Self::F32 {
        x86! {
            // The permutes read 3 bits of the index; the fourth, moved to the sign, picks the half of the table.
            let upper = self.from_bits(self.shl(index, 28));
            let low = [_mm256_permutevar8x32_ps(table[0], index[0]), _mm256_permutevar8x32_ps(table[0], index[1])];
            let high = [_mm256_permutevar8x32_ps(table[1], index[0]), _mm256_permutevar8x32_ps(table[1], index[1])];
            self.select(upper, high, low)
        }
    }

    #[inline(always)]
    fn sum_i32(self, a: Self::I32) -> i32 {
        x86! {
            let v = _mm256_add_epi32(a[0], a[1]);
            let v = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
            let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b11_10_11_10>(v));
            _mm_cvtsi128_si32(_mm_add_epi32(v, _mm_shuffle_epi32::<0b01_01_01_01>(v)))
        }
    }

    #[inline(always)]
    fn load_bytes(self, from: &[u8; BYTES]) -> Self::Bytes {
        let at = from.as_ptr().cast::<__m256i>();
        x86! { [_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))] }
    }

    #[inline(always)]
    fn store_bytes(self, v: Self::Bytes, to: &mut [u8; BYTES]) {
        let at = to.as_mut_ptr().cast::<__m256i>();
        x86! {
            _mm256_storeu_si256(at, v[0]);
            _mm256_storeu_si256(at.add(1), v[1]);
        }
    }

    #[inline(always)]
    fn splat16(self, from: &[i8; 16]) -> Self::Bytes {
        x86! { [_mm256_broadcastsi128_si256(_mm_loadu_si128(from.as_ptr().cast())); 2] }
    }

    #[inline(always)]
    fn splat4(self, from: &[i8; 4]) -> Self::Bytes {
        let [a, b, c, d] = *from;
        self.splat_i32(i32::from_le_bytes([a as u8, b as u8, c as u8, d as u8]))
    }

    #[inline(always)]
    fn low_nibbles(self, v: Self::Bytes) -> Self::Bytes {
        x86! {
            let mask = _mm256_set1_epi8(15);
            [_mm256_and_si256(v[0], mask), _mm256_and_si256(v[1], mask)]
        }
    }

    #[inline(always)]
    fn high_nibbles(self, v: Self::Bytes) -> Self::Bytes {
        x86! { self.low_nibbles([_mm256_srli_epi16::<4>(v[0]), _mm256_srli_epi16::<4>(v[1])]) }
    }

    #[inline(always)]
    fn flip_top_bits(self, v: Self::Bytes) -> Self::Bytes {
        x86! {
            let top = _mm256_set1_epi8(-128);
            [_mm256_xor_si256(v[0], top), _mm256_xor_si256(v[1], top)]
        }
    }

    #[inline(always)]
    fn lookup_bytes(self, table: Self::Bytes, index: Self::Bytes) -> Self::Bytes {
        x86! { [_mm256_shuffle_epi8(table[0], index[0]), _mm256_shuffle_epi8(table[1], index[1])] }
    }

    #[inline(always)]
    fn words(self, v: Self::Bytes) -> Self::I32 {
        v
    }

    #[inline(always)]
    fn start_nibbles(self, factor: Self::I32, pair: Self::I32) -> Self::NibbleSum {
        if VNNI {
            self.start_levels(factor, pair, factor)
        } else {
            // Wraps; the sum that it is part of doesn't.
            x86! { [_mm256_mullo_epi16(factor[0], pair[0]), _mm256_mullo_epi16(factor[1], pair[1])] }
        }
    }

    #[inline(always)]
    fn pin_nibbles(self, sum: Self::NibbleSum) -> Self::NibbleSum {
        x86! { pin(sum) }
    }

    #[inline(always)]
    fn start_levels(self, factor: Self::I32, pair: Self::I32, number: Self::I32) -> Self::I32 {
        x86! {
            let sum = [_mm256_madd_epi16(factor[0], pair[0]), _mm256_madd_epi16(factor[1], pair[1])];
            if VNNI {
                return sum;
            }
            let number = [_mm256_srai_epi32::<16>(number[0]), _mm256_srai_epi32::<16>(number[1])];
            [_mm256_mullo_epi32(sum[0], number[0]), _mm256_mullo_epi32(sum[1], number[1])]
        }
    }

    #[inline(always)]
    fn pin_levels(self, sum: Self::I32) -> Self::I32 {
        x86! { pin(sum) }
    }

    #[inline(always)]
    fn dot_nibbles(self, sum: Self::NibbleSum, codes: Self::Bytes, x: Self::Bytes) -> Self::NibbleSum {
        if VNNI {
            x86! { [_mm256_dpbusd_avx_epi32(sum[0], codes[0], x[0]), _mm256_dpbusd_avx_epi32(sum[1], codes[1], x[1])] }
        } else {
            x86! {
                let pairs = [_mm256_maddubs_epi16(codes[0], x[0]), _mm256_maddubs_epi16(codes[1], x[1])];
                [_mm256_add_epi16(sum[0], pairs[0]), _mm256_add_epi16(sum[1], pairs[1])]
            }
        }
    }

    #[inline(always)]
    fn nibble_total(self, sum: Self::NibbleSum, number: Self::I32) -> Self::I32 {
        if VNNI {
            sum
        } else {
            x86! { [_mm256_madd_epi16(sum[0], number[0]), _mm256_madd_epi16(sum[1], number[1])] }
        }
    }

    #[inline(always)]
    fn levels(self, v: Self::Bytes) -> Self::Levels {
        if VNNI {
            [self.flip_top_bits(v), v]
        } else {
            x86! { [[_mm256_abs_epi8(v[0]), _mm256_abs_epi8(v[1])], v] }
        }
    }

    #[inline(always)]
    fn dot_levels(self, sum: Self::I32, levels: Self::Levels, x: Self::Bytes, number: Self::I32) -> Self::I32 {
        let [w, signed] = levels;
        if VNNI {
            x86! { [_mm256_dpbusd_avx_epi32(sum[0], w[0], x[0]), _mm256_dpbusd_avx_epi32(sum[1], w[1], x[1])] }
        } else {
            x86! {
                // |w| <= 128 and |x| <= 127: a pair of products fits in 16 bits, and -x in 8.
                let x = [_mm256_sign_epi8(x[0], signed[0]), _mm256_sign_epi8(x[1], signed[1])];
                let pairs = [_mm256_maddubs_epi16(w[0], x[0]), _mm256_maddubs_epi16(w[1], x[1])];
                self.add_i32(sum, self.nibble_total(pairs, number))
            }
        }
    }
}
