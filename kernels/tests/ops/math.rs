//! Elementary functions against f64 over the whole range of f32.

use super::quick::quick;
use super::*;
use nibble_kernels::ops::math::Function;

/// One unit in the last place of the f32 nearest to `x`.
fn ulp(x: f64) -> f64 {
    let exponent = if x == 0.0 { -126 } else { (x.abs().log2().floor() as i32).clamp(-126, 127) };
    2.0_f64.powi(exponent - 23)
}

/// erfc for x >= 0, to about 1e-14 (relative): its series near 0, Lentz's continued fraction elsewhere.
fn erfc(x: f64) -> f64 {
    let two_over_root_pi = std::f64::consts::FRAC_2_SQRT_PI;
    if x < 2.0 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        1.0 - two_over_root_pi * sum
    } else {
        let mut fraction = 0.0;
        for n in (1..200).rev() {
            fraction = f64::from(n) / 2.0 / (x + fraction);
        }
        (-x * x).exp() * two_over_root_pi / 2.0 / (x + fraction)
    }
}

/// The function in f64; where its value rounds to 0 the limit.
fn reference(function: Function, x: f64) -> f64 {
    let sigmoid = |x: f64| if x < 0.0 { x.exp() / (1.0 + x.exp()) } else { 1.0 / (1.0 + (-x).exp()) };
    let times = |x: f64, y: f64| if y == 0.0 { 0.0 } else { x * y };
    match function {
        Function::Exp => x.exp(),
        Function::Tanh => x.tanh(),
        Function::Sigmoid => sigmoid(x),
        Function::Silu => times(x, sigmoid(x)),
        Function::GeluTanh => times(x, sigmoid(2.0 * gelu_inner(x))),
        Function::Gelu if x < 0.0 => times(x, 0.5 * erfc(-x * 0.5_f64.sqrt())),
        Function::Gelu => times(x, 1.0 - 0.5 * erfc(x * 0.5_f64.sqrt())),
    }
}

fn gelu_inner(x: f64) -> f64 {
    (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)
}

/// What the error may be, in units in the last place. An exponential is off by its sum (1 / 0.7 of half a unit), by
/// its polynomial and argument (a third) and by its scaling into the subnormals (half): 2. Sums, quotients and products
/// that follow cost half a unit each, twice that below a power of two.
fn bound(function: Function, x: f64) -> f64 {
    match function {
        Function::Exp => 2.0,
        // The numerator's and denominator's rounding and the polynomial's, each about a unit.
        Function::Tanh => 3.0,
        Function::Sigmoid => 4.0,
        Function::Silu => 5.0,
        // The argument of the exponential is rounded three times over, and its factors are: 2.5 half units of it.
        Function::GeluTanh => 5.0 + if x < 0.0 { 2.5 * (2.0 * gelu_inner(x)).abs().min(104.0) } else { 2.5 },
        // t and the polynomial in it add 3, the exponential of the square another 2.
        Function::Gelu => 10.0,
    }
}

/// Every 1021st f32, the neighbourhood of 0, infinities, and the places where results change their nature; of the first
/// and of the last one in `every`.
fn arguments(every: usize) -> Vec<f32> {
    let bits = (0..u32::MAX / 1021).step_by(every).map(|i| i * 1021);
    let mut x: Vec<f32> = bits.map(f32::from_bits).filter(|x| !x.is_nan()).collect();
    for edge in [0.0_f32, f32::MIN_POSITIVE, 0.34657, 1.0, 9.01, 17.0, 20.0, 87.33, 88.7228, 88.73, 89.0, 103.97, 104.0]
    {
        for bits in edge.to_bits().saturating_sub(50)..edge.to_bits() + 50 {
            x.extend([f32::from_bits(bits), -f32::from_bits(bits)]);
        }
    }
    // Where most arguments lie, evenly.
    x.extend((-200_000..200_000).step_by(every).map(|i| i as f32 * 1e-4));
    x.extend([f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN]);
    x
}

#[test]
fn functions_are_within_their_bound_everywhere() {
    let x = arguments(if quick() { 97 } else { 1 });
    for function in Function::ALL {
        // Release builds of the portable functions are slow without fused multiply-add; a sample of it is checked bit
        // for bit below.
        let mut y = x.clone();
        function.apply(Isa::best(), &mut y);
        for (&x, &y) in x.iter().zip(&y) {
            let wanted = reference(function, x.into());
            let most = f64::from(f32::MAX) + ulp(f64::from(f32::MAX)) / 2.0;
            if wanted >= most {
                assert_eq!(y, f32::INFINITY, "{function:?}({x})");
                continue;
            }
            let off = (f64::from(y) - wanted).abs() / ulp(wanted);
            assert!(off <= bound(function, x.into()), "{function:?}({x}) = {y}, expected {wanted}: {off} units");
        }
    }
}

#[test]
fn functions_have_the_same_bits_on_every_instruction_set() {
    let x: Vec<f32> = arguments(97).into_iter().chain([f32::NAN, -0.0]).collect();
    for function in Function::ALL {
        same_everywhere(|ops| {
            let mut y = x.clone();
            ops.apply(function, &mut y);
            y
        });
    }
}

#[test]
fn nan_stays_nan_and_limits_are_reached() {
    for function in Function::ALL {
        for isa in Isa::usable() {
            for n in [1, 16, 17] {
                let at = |x: f32| {
                    let mut y = vec![x; n];
                    function.apply(isa, &mut y);
                    // Which NaN comes out isn't part of the contract.
                    let same = |v: &f32| v.to_bits() == y[0].to_bits() || v.is_nan() && y[0].is_nan();
                    assert!(y.iter().all(same), "all lanes agree");
                    y[0]
                };
                assert!(at(f32::NAN).is_nan() && at(-f32::NAN).is_nan(), "{function:?}");
                let (low, zero, high) = match function {
                    Function::Exp => (0.0, 1.0, f32::INFINITY),
                    Function::Tanh => (-1.0, 0.0, 1.0),
                    Function::Sigmoid => (0.0, 0.5, 1.0),
                    _ => (0.0, 0.0, f32::INFINITY),
                };
                assert_eq!(at(f32::NEG_INFINITY), low, "{function:?}");
                assert_eq!((at(0.0), at(-0.0)), (zero, zero), "{function:?}");
                assert_eq!(at(f32::INFINITY), high, "{function:?}");
                if function != Function::Exp && function != Function::Sigmoid {
                    assert!(at(-0.0).is_sign_negative(), "{function:?} keeps the sign of zero");
                }
            }
        }
    }
}
