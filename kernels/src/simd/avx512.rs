//! AVX-512 F, BW, DQ, VL and VNNI: a vector of 16 lanes is one register.

use super::{BYTES, LANES, Simd, SimdOp};
use crate::Isa;
use half::{bf16, f16};
use std::arch::x86_64::*;

/// AVX-512 with VNNI; a value exists only where the CPU has it.
#[derive(Debug, Clone, Copy)]
pub struct Avx512(());

/// Runs intrinsics on the strength of the token.
macro_rules! x86 {
    ($($body:tt)*) => {
        // SAFETY: `self` exists only if `new` found these instructions on this CPU; memory is reached through
        // references to arrays as large as the access, with unaligned loads and stores.
        unsafe { $($body)* }
    };
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn enter<O: SimdOp>(s: Avx512, op: O) -> O::Output {
    op.eval(s)
}

const TO_NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

impl Simd for Avx512 {
    const ISA: Isa = Isa::Avx512;
    const LEVEL_BIAS: i32 = 128;
    const MULTIPLIES: bool = false;
    const PANELS: usize = 2;

    type F32 = __m512;
    type I32 = __m512i;
    type Bytes = __m512i;
    type Mask = __mmask16;
    type NibbleSum = __m512i;
    type Levels = __m512i;

    #[inline(always)]
    fn new() -> Option<Self> {
        Self::ISA.is_present().then_some(Avx512(()))
    }

    #[inline(always)]
    fn vectorize<O: SimdOp>(self, op: O) -> O::Output {
        // SAFETY: `self` exists, so the CPU has the instructions that the function is compiled for.
        unsafe { enter(self, op) }
    }

    #[inline(always)]
    fn splat(self, v: f32) -> Self::F32 {
        x86! { _mm512_set1_ps(v) }
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::F32 {
        x86! { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, v: Self::F32, to: &mut [f32; LANES]) {
        x86! { _mm512_storeu_ps(to.as_mut_ptr(), v) }
    }

    #[inline(always)]
    fn load_f16(self, from: &[f16; LANES]) -> Self::F32 {
        x86! { _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())) }
    }

    #[inline(always)]
    fn store_f16(self, v: Self::F32, to: &mut [f16; LANES]) {
        x86! { _mm256_storeu_si256(to.as_mut_ptr().cast(), _mm512_cvtps_ph::<TO_NEAREST>(v)) }
    }

    #[inline(always)]
    fn load_bf16(self, from: &[bf16; LANES]) -> Self::F32 {
        x86! {
            let widen = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(widen))
        }
    }

    #[inline(always)]
    fn load_u8(self, from: &[u8; LANES]) -> Self::F32 {
        x86! { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn load_i8(self, from: &[i8; LANES]) -> Self::F32 {
        x86! { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        x86! { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        x86! { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        x86! { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        x86! { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        x86! { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn fnma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        x86! { _mm512_fnmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        x86! { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        x86! { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn abs(self, a: Self::F32) -> Self::F32 {
        x86! { _mm512_abs_ps(a) }
    }

    #[inline(always)]
    fn sqrt(self, a: Self::F32) -> Self::F32 {
        x86! { _mm512_sqrt_ps(a) }
    }

    #[inline(always)]
    fn lt(self, a: Self::F32, b: Self::F32) -> Self::Mask {
        x86! { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b) }
    }

    #[inline(always)]
    fn select(self, mask: Self::Mask, a: Self::F32, b: Self::F32) -> Self::F32 {
        x86! { _mm512_mask_blend_ps(mask, b, a) }
    }

    #[inline(always)]
    fn to_i32(self, a: Self::F32) -> Self::I32 {
        x86! { _mm512_cvtps_epi32(a) }
    }

    #[inline(always)]
    fn sum(self, a: Self::F32) -> f32 {
        x86! {
            let v = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps::<1>(v, v)))
        }
    }

    #[inline(always)]
    fn largest(self, a: Self::F32) -> f32 {
        x86! {
            let v = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps::<1>(v, v)))
        }
    }

    #[inline(always)]
    fn splat_i32(self, v: i32) -> Self::I32 {
        x86! { _mm512_set1_epi32(v) }
    }

    #[inline(always)]
    fn load_i32(self, from: &[i32; LANES]) -> Self::I32 {
        x86! { _mm512_loadu_si512(from.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store_i32(self, v: Self::I32, to: &mut [i32; LANES]) {
        x86! { _mm512_storeu_si512(to.as_mut_ptr().cast(), v) }
    }

    #[inline(always)]
    fn store_i8(self, v: Self::I32, to: &mut [i8; LANES]) {
        x86! { _mm_storeu_si128(to.as_mut_ptr().cast(), _mm512_cvtsepi32_epi8(v)) }
    }

    #[inline(always)]
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        x86! { _mm512_add_epi32(a, b) }
    }

    #[inline(always)]
    fn and_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        x86! { _mm512_and_si512(a, b) }
    }

    #[inline(always)]
    fn shl(self, a: Self::I32, bits: i32) -> Self::I32 {
        x86! { _mm512_sll_epi32(a, _mm_cvtsi32_si128(bits)) }
    }

    #[inline(always)]
    fn shr(self, a: Self::I32, bits: i32) -> Self::I32 {
        x86! { _mm512_srl_epi32(a, _mm_cvtsi32_si128(bits)) }
    }

    #[inline(always)]
    fn to_f32(self, a: Self::I32) -> Self::F32 {
        x86! { _mm512_cvtepi32_ps(a) }
    }

    #[inline(always)]
    fn from_bits(self, a: Self::I32) -> Self::F32 {
        x86! { _mm512_castsi512_ps(a) }
    }

    #[inline(always)]
    fn to_bits(self, a: Self::F32) -> Self::I32 {
        x86! { _mm512_castps_si512(a) }
    }

    #[inline(always)]
    fn lookup(self, table: Self::F32, index: Self::I32) -> Self::F32 {
        x86! { _mm512_permutexvar_ps(index, table) }
    }

    #[inline(always)]
    fn sum_i32(self, a: Self::I32) -> i32 {
        x86! { _mm512_reduce_add_epi32(a) }
    }

    #[inline(always)]
    fn load_bytes(self, from: &[u8; BYTES]) -> Self::Bytes {
        x86! { _mm512_loadu_si512(from.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store_bytes(self, v: Self::Bytes, to: &mut [u8; BYTES]) {
        x86! { _mm512_storeu_si512(to.as_mut_ptr().cast(), v) }
    }

    #[inline(always)]
    fn splat16(self, from: &[i8; 16]) -> Self::Bytes {
        x86! { _mm512_broadcast_i32x4(_mm_loadu_si128(from.as_ptr().cast())) }
    }

    #[inline(always)]
    fn splat4(self, from: &[i8; 4]) -> Self::Bytes {
        let [a, b, c, d] = *from;
        self.splat_i32(i32::from_le_bytes([a as u8, b as u8, c as u8, d as u8]))
    }

    #[inline(always)]
    fn low_nibbles(self, v: Self::Bytes) -> Self::Bytes {
        x86! { _mm512_and_si512(v, _mm512_set1_epi8(15)) }
    }

    #[inline(always)]
    fn high_nibbles(self, v: Self::Bytes) -> Self::Bytes {
        x86! { self.low_nibbles(_mm512_srli_epi16::<4>(v)) }
    }

    #[inline(always)]
    fn flip_top_bits(self, v: Self::Bytes) -> Self::Bytes {
        x86! { _mm512_xor_si512(v, _mm512_set1_epi8(-128)) }
    }

    #[inline(always)]
    fn lookup_bytes(self, table: Self::Bytes, index: Self::Bytes) -> Self::Bytes {
        x86! { _mm512_shuffle_epi8(table, index) }
    }

    #[inline(always)]
    fn words(self, v: Self::Bytes) -> Self::I32 {
        v
    }

    #[inline(always)]
    fn start_nibbles(self, factor: Self::I32, pair: Self::I32) -> Self::NibbleSum {
        self.start_levels(factor, pair, factor)
    }

    #[inline(always)]
    fn pin_nibbles(self, sum: Self::NibbleSum) -> Self::NibbleSum {
        sum
    }

    #[inline(always)]
    fn start_levels(self, factor: Self::I32, pair: Self::I32, _: Self::I32) -> Self::I32 {
        x86! { _mm512_madd_epi16(factor, pair) }
    }

    #[inline(always)]
    fn pin_levels(self, sum: Self::I32) -> Self::I32 {
        sum
    }

    #[inline(always)]
    fn dot_nibbles(self, sum: Self::NibbleSum, codes: Self::Bytes, x: Self::Bytes) -> Self::NibbleSum {
        x86! { _mm512_dpbusd_epi32(sum, codes, x) }
    }

    #[inline(always)]
    fn nibble_total(self, sum: Self::NibbleSum, _: Self::I32) -> Self::I32 {
        sum
    }

    #[inline(always)]
    fn levels(self, v: Self::Bytes) -> Self::Levels {
        self.flip_top_bits(v)
    }

    #[inline(always)]
    fn dot_levels(self, sum: Self::I32, levels: Self::Levels, x: Self::Bytes, _: Self::I32) -> Self::I32 {
        x86! { _mm512_dpbusd_epi32(sum, levels, x) }
    }
}
