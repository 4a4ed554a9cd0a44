//! Elementary functions on 16 lanes, from one exponential.
//!
//! ```text
//! x = n ln 2 + r, |r| <= ln 2 / 2      e^r - 1 = r + r^2 q(r)       e^x = 2^n (1 + (e^r - 1))
//! tanh x    = E / (E + 2) with E = e^2|x| - 1 = 2^n (e^r - 1) + (2^n - 1): no cancellation near 0
//! sigmoid x = (x < 0 ? z : 1) / (1 + z) with z = e^-|x|: no overflow, small results keep their digits
//! Phi x     = e^(-x^2/2) erfcx(-x/sqrt 2) / 2 for x < 0: the Gaussian tail likewise
//! ```
//! The polynomials interpolate at Chebyshev nodes (which is within a factor of two of the best possible) with
//! coefficients rounded to f32. Results are within a few units in the last place over the whole range, subnormal
//! numbers and infinities included; NaN gives NaN.

use crate::Isa;
use crate::simd::{LANES, Simd, SimdOp, dispatch};

/// e^r = 1 + r + r^2 q(r) within 1.1e-8 (relative) on |r| <= 0.35.
const EXP_Q: [f32; 5] = [0.5, 0.166_665_73, 0.041_666_55, 0.008_363_774, 0.001_392_692_7];

/// erfcx(a) = e^(a^2) erfc(a) = t p(t), t = 1 / (1 + 0.3 a), within 3.8e-8 (relative) on 0 <= a <= 10.5.
const ERFCX_P: [f32; 9] = [
    0.169_172_9,
    0.170_955_55,
    0.146_728_74,
    0.220_869_15,
    -0.107_884_414,
    0.565_965_83,
    -0.527_524_35,
    0.492_639_18,
    -0.130_922_63,
];

/// ln 2 in two parts: n times the first (9 bits) is exact for any exponent n.
const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];

/// A polynomial, lowest coefficient first.
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(s: S, x: S::F32, c: &[f32; N]) -> S::F32 {
    let mut sum = s.splat(c[N - 1]);
    for i in (0..N - 1).rev() {
        sum = s.fma(sum, x, s.splat(c[i]));
    }
    sum
}

/// (e^r - 1, n) with x = n ln 2 + r; n is a whole number as a float.
#[inline(always)]
fn reduce<S: Simd>(s: S, x: S::F32) -> (S::F32, S::F32) {
    let n = s.to_f32(s.to_i32(s.mul(x, s.splat(std::f32::consts::LOG2_E))));
    let r = s.fnma(n, s.splat(LN2[0]), x);
    let r = s.fnma(n, s.splat(LN2[1]), r);
    let q = polynomial(s, r, &EXP_Q);
    (s.fma(s.mul(r, r), q, r), n)
}

/// 2^n for whole n in -126..=127.
#[inline(always)]
fn exp2_whole<S: Simd>(s: S, n: S::F32) -> S::F32 {
    s.from_bits(s.shl(s.add_i32(s.to_i32(n), s.splat_i32(127)), 23))
}

/// e^x in three factors, of which the last two are powers of two. A product of all that starts with the first rounds
/// once more if it is subnormal, and not at all by the powers otherwise.
#[inline(always)]
fn exp_factors<S: Simd>(s: S, x: S::F32) -> [S::F32; 3] {
    // Beyond these e^x rounds to infinity or 0. The operand that may be NaN comes second, so that it stays.
    let x = s.max(s.splat(-110.0), s.min(s.splat(89.0), x));
    let (m, n) = reduce(s, x);
    // n reaches from -159 to 128, and each power must be a normal number.
    let most = s.max(s.splat(-100.0), s.min(s.splat(127.0), n));
    [s.add(m, s.splat(1.0)), exp2_whole(s, most), exp2_whole(s, s.sub(n, most))]
}

/// e^x.
#[inline(always)]
pub fn exp<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let [y, most, rest] = exp_factors(s, x);
    s.mul(s.mul(y, most), rest)
}

/// tanh x.
#[inline(always)]
pub fn tanh<S: Simd>(s: S, x: S::F32) -> S::F32 {
    // Past 20 the result is 1 in single precision.
    let a = s.min(s.splat(20.0), s.abs(x));
    let (m, n) = reduce(s, s.add(a, a));
    let power = exp2_whole(s, n);
    let e = s.fma(power, m, s.sub(power, s.splat(1.0)));
    let y = s.div(e, s.add(e, s.splat(2.0)));
    // y >= 0 has a clear top bit.
    let sign = s.and_i32(s.to_bits(x), s.splat_i32(i32::MIN));
    s.from_bits(s.add_i32(s.to_bits(y), sign))
}

/// y / (1 + e^-x).
#[inline(always)]
fn times_sigmoid<S: Simd>(s: S, y: S::F32, x: S::F32) -> S::F32 {
    let zero = s.splat(0.0);
    let [z, most, rest] = exp_factors(s, s.sub(zero, s.abs(x)));
    // y comes before the powers: z alone may be subnormal where y z isn't.
    let small = s.mul(s.mul(s.mul(y, z), most), rest);
    let z = s.mul(s.mul(z, most), rest);
    s.div(s.select(s.lt(x, zero), small, y), s.add(z, s.splat(1.0)))
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid<S: Simd>(s: S, x: S::F32) -> S::F32 {
    times_sigmoid(s, s.splat(1.0), x)
}

/// x sigmoid(x), also called swish; -0 at minus infinity.
#[inline(always)]
pub fn silu<S: Simd>(s: S, x: S::F32) -> S::F32 {
    // Below -150 the result is 0; the bound keeps infinity from meeting 0.
    let x = s.max(s.splat(-150.0), x);
    times_sigmoid(s, x, x)
}

/// The tanh form of GELU: x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2; -0 at minus infinity.
#[inline(always)]
pub fn gelu_tanh<S: Simd>(s: S, x: S::F32) -> S::F32 {
    // (1 + tanh u) / 2 = sigmoid(2u). Below -20 the result is 0.
    let x = s.max(s.splat(-20.0), x);
    let scale = s.fma(s.mul(x, x), s.splat(0.071_354_816), s.splat(1.595_769));
    times_sigmoid(s, x, s.mul(x, scale))
}

/// GELU: x Phi(x) with the Gaussian distribution function Phi; -0 at minus infinity.
#[inline(always)]
pub fn gelu<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    // Past 20 Phi is 0 or 1.
    let x = s.max(s.splat(-20.0), x);
    let a = s.min(s.splat(20.0), s.abs(x));
    let t = s.div(one, s.fma(a, s.splat(0.3 * std::f32::consts::FRAC_1_SQRT_2), one));
    let erfcx = s.mul(t, polynomial(s, t, &ERFCX_P));
    // The square in two parts, or else its rounding error alone would cost x^2 / 2 units.
    let square = s.mul(a, a);
    let error = s.fma(a, a, s.sub(zero, square));
    let e = exp(s, s.mul(square, s.splat(-0.5)));
    let e = s.fma(s.mul(e, error), s.splat(-0.5), e);
    let tail = s.mul(s.mul(erfcx, s.splat(0.5)), e);
    s.mul(x, s.select(s.lt(x, zero), tail, s.sub(one, tail)))
}

/// cap tanh(x / cap).
#[inline(always)]
pub fn softcap<S: Simd>(s: S, x: S::F32, cap: f32) -> S::F32 {
    s.mul(s.splat(cap), tanh(s, s.div(x, s.splat(cap))))
}

/// A function of this module, to be chosen by value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Function {
    /// [`exp`]
    Exp,
    /// [`tanh`]
    Tanh,
    /// [`sigmoid`]
    Sigmoid,
    /// [`silu`]
    Silu,
    /// [`gelu_tanh`]
    GeluTanh,
    /// [`gelu`]
    Gelu,
}

impl Function {
    /// Every function.
    pub const ALL: [Function; 6] =
        [Function::Exp, Function::Tanh, Function::Sigmoid, Function::Silu, Function::GeluTanh, Function::Gelu];

    /// The function of 16 lanes.
    #[inline(always)]
    pub fn eval<S: Simd>(self, s: S, x: S::F32) -> S::F32 {
        match self {
            Function::Exp => exp(s, x),
            Function::Tanh => tanh(s, x),
            Function::Sigmoid => sigmoid(s, x),
            Function::Silu => silu(s, x),
            Function::GeluTanh => gelu_tanh(s, x),
            Function::Gelu => gelu(s, x),
        }
    }

    /// Replaces every value by the function's, on the calling thread.
    pub fn apply(self, isa: Isa, x: &mut [f32]) {
        dispatch(isa, Apply { function: self, x });
    }
}

struct Apply<'a> {
    function: Function,
    x: &'a mut [f32],
}

impl SimdOp for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for x in self.x.chunks_mut(LANES) {
            s.store_partial(self.function.eval(s, s.load_partial(x)), x);
        }
    }
}
