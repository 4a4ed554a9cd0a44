//! Every operation of every instruction set gives the scalar operation's bits.

use crate::quick::thin;
use half::{bf16, f16};
use nibble_kernels::Isa;
use nibble_kernels::simd::{self, BYTES, LANES, Scalar, Simd, SimdOp};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// Everything that can be seen of one set of inputs, as bits.
struct Probe<'a>(&'a Inputs);

struct Inputs {
    a: [f32; LANES],
    b: [f32; LANES],
    c: [f32; LANES],
    i: [i32; LANES],
    j: [i32; LANES],
    bytes: [u8; BYTES],
    x: [i8; 16],
}

impl SimdOp for Probe<'_> {
    type Output = Vec<(&'static str, Vec<u32>)>;

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> Self::Output {
        let Inputs { a, b, c, i, j, bytes, x } = self.0;
        let mut seen = Vec::new();
        let floats = |v: S::F32| -> Vec<u32> {
            let mut out = [f32::NAN; LANES];
            s.store(v, &mut out);
            // Which NaN comes out isn't part of the contract.
            out.iter().map(|v| if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() }).collect()
        };
        let ints = |v: S::I32| -> Vec<u32> {
            let mut out = [-1; LANES];
            s.store_i32(v, &mut out);
            out.iter().map(|v| *v as u32).collect()
        };
        let (va, vb, vc) = (s.load(a), s.load(b), s.load(c));
        seen.push(("load", floats(va)));
        seen.push(("splat", floats(s.splat(a[3]))));
        seen.push(("add", floats(s.add(va, vb))));
        seen.push(("sub", floats(s.sub(va, vb))));
        seen.push(("mul", floats(s.mul(va, vb))));
        seen.push(("div", floats(s.div(va, vb))));
        seen.push(("fma", floats(s.fma(va, vb, vc))));
        seen.push(("fnma", floats(s.fnma(va, vb, vc))));
        seen.push(("min", floats(s.min(va, vb))));
        seen.push(("max", floats(s.max(va, vb))));
        seen.push(("abs", floats(s.abs(va))));
        seen.push(("sqrt", floats(s.sqrt(s.abs(va)))));
        seen.push(("select", floats(s.select(s.lt(va, vb), vb, vc))));
        seen.push(("to_i32", ints(s.to_i32(va))));
        let nan_or_bits = |v: f32| vec![if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() }];
        seen.push(("sum", nan_or_bits(s.sum(va))));
        if !a.iter().any(|v| v.is_nan()) {
            seen.push(("largest", nan_or_bits(s.largest(va))));
        }
        for len in [0, 1, 7, 15, 16] {
            seen.push(("load_partial", floats(s.load_partial(&a[..len]))));
            let mut out = [f32::INFINITY; LANES];
            s.store_partial(vb, &mut out[..len]);
            seen.push(("store_partial", floats(s.load(&out))));
        }

        let halves: [f16; LANES] = std::array::from_fn(|l| f16::from_bits(i[l] as u16 & 0xfbff));
        seen.push(("load_f16", floats(s.load_f16(&halves))));
        let brains: [bf16; LANES] = std::array::from_fn(|l| bf16::from_bits(i[l] as u16));
        seen.push(("load_bf16", floats(s.load_bf16(&brains))));
        let mut halves = [f16::NAN; LANES];
        s.store_f16(va, &mut halves);
        let nan = |v: &f16| if v.is_nan() { f16::NAN.to_bits() } else { v.to_bits() }.into();
        seen.push(("store_f16", halves.iter().map(nan).collect()));
        let first: [u8; LANES] = std::array::from_fn(|l| bytes[l]);
        seen.push(("load_u8", floats(s.load_u8(&first))));
        seen.push(("load_i8", floats(s.load_i8(&first.map(|v| v as i8)))));

        let (vi, vj) = (s.load_i32(i), s.load_i32(j));
        seen.push(("add_i32", ints(s.add_i32(vi, vj))));
        seen.push(("and_i32", ints(s.and_i32(vi, vj))));
        seen.push(("sum_i32", vec![s.sum_i32(vi) as u32]));
        seen.push(("to_f32", floats(s.to_f32(vi))));
        seen.push(("from_bits", floats(s.from_bits(vi))));
        seen.push(("to_bits", ints(s.to_bits(va))));
        seen.push(("lookup", floats(s.lookup(va, vi))));
        for bits in [0, 1, 4, 12, 23, 31] {
            seen.push(("shl", ints(s.shl(vi, bits))));
            seen.push(("shr", ints(s.shr(vi, bits))));
        }
        let mut narrow = [0; LANES];
        for v in [vi, s.and_i32(vi, s.splat_i32(127)), s.shr(vi, 25)] {
            s.store_i8(v, &mut narrow);
            seen.push(("store_i8", narrow.iter().map(|v| *v as u32).collect()));
        }

        let v = s.load_bytes(bytes);
        let (low, high) = (s.low_nibbles(v), s.high_nibbles(v));
        seen.push(("low_nibbles", ints(s.words(low))));
        seen.push(("high_nibbles", ints(s.words(high))));
        seen.push(("flip_top_bits", ints(s.words(s.flip_top_bits(v)))));
        seen.push(("lookup_bytes", ints(s.words(s.lookup_bytes(s.splat16(x), low)))));
        let xs: Vec<S::Bytes> = x.as_chunks::<4>().0.iter().map(|four| s.splat4(four)).collect();
        seen.push(("splat4", ints(s.words(xs[1]))));
        // Four quads, twice: a block whose pairs of places sum to twice those of the quads.
        let places = |first: usize| -> i32 {
            x.as_chunks::<4>().0.iter().map(|four| i32::from(four[first]) + i32::from(four[first + 1])).sum::<i32>() * 2
        };
        let pair = s.splat_i32(places(0) & 0xffff | places(2) << 16);
        for zero in [0, 8, 16] {
            let factor = s.splat_i32(-zero & 0xffff | -zero << 16);
            let mut sum = s.start_nibbles(factor, pair);
            for codes in [low, high] {
                for x in &xs {
                    sum = s.pin_nibbles(s.dot_nibbles(sum, codes, *x));
                }
            }
            for number in [1, -128, 255] {
                let pairs = s.splat_i32(number & 0xffff | number << 16);
                let total = s.nibble_total(sum, pairs);
                let times = if S::MULTIPLIES { 1 } else { number };
                seen.push(("dot_nibbles", ints(total).iter().map(|v| v.wrapping_mul(times as u32)).collect()));
            }
        }
        for (factor, number) in [(-383, 255), (0, 3), (255, -128), (383, 1)] {
            let factor = s.splat_i32(factor & 0xffff | factor << 16);
            let pairs = s.splat_i32(number & 0xffff | number << 16);
            let start = s.pin_levels(s.start_levels(factor, pair, pairs));
            let times = if S::MULTIPLIES { 1 } else { number };
            seen.push(("start_levels", ints(start).iter().map(|v| v.wrapping_mul(times as u32)).collect()));
        }
        let levels = s.levels(v);
        let one = s.splat_i32(0x0001_0001);
        let mut dot = vi;
        let mut bias = s.splat_i32(0);
        let ones = s.levels(s.splat16(&[1; 16]));
        for x in &xs {
            dot = s.dot_levels(dot, levels, *x, one);
            // (1 + LEVEL_BIAS) * sum(x): what the bias adds is part of the contract.
            bias = s.dot_levels(bias, ones, *x, one);
        }
        if S::MULTIPLIES {
            let three = s.splat_i32(0x0003_0003);
            let zero = s.splat_i32(0);
            let (mut single, mut triple) = (zero, zero);
            for x in &xs {
                single = s.dot_levels(single, levels, *x, one);
                triple = s.dot_levels(triple, levels, *x, three);
            }
            assert_eq!(ints(triple), ints(single).iter().map(|v| v.wrapping_mul(3)).collect::<Vec<_>>());
        }
        let total: i32 = x.iter().map(|v| i32::from(*v)).sum();
        assert_eq!(ints(bias), [((1 + S::LEVEL_BIAS) * total) as u32; LANES], "{}: LEVEL_BIAS", S::ISA);
        let unbias = s.splat_i32(-S::LEVEL_BIAS * total);
        seen.push(("dot_levels", ints(s.add_i32(dot, unbias))));
        seen
    }
}

fn inputs(rng: &mut StdRng) -> Inputs {
    let special = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        1.5,
        2.5,
        -2.5,
        1e-45,
        -3e-39,
        f32::MIN_POSITIVE,
        65504.0,
        65520.0,
        5.97e-8,
        f32::MAX,
        -f32::MAX,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        2147483648.0,
        -2147483648.0,
        8388609.0,
        16777217.0,
    ];
    let float = |rng: &mut StdRng| match rng.random_range(0..4) {
        0 => special[rng.random_range(0..special.len())],
        1 => f32::from_bits(rng.random()),
        _ => rng.random_range(-200.0..200.0),
    };
    let extreme = |rng: &mut StdRng| match rng.random_range(0..3) {
        0 => 127,
        1 => -127,
        _ => rng.random_range(-127..=127),
    };
    let uniform: u8 = rng.random();
    Inputs {
        a: std::array::from_fn(|_| float(rng)),
        b: std::array::from_fn(|_| float(rng)),
        c: std::array::from_fn(|_| float(rng)),
        i: std::array::from_fn(|_| rng.random()),
        j: std::array::from_fn(|_| rng.random()),
        bytes: std::array::from_fn(|_| {
            if uniform < 64 { [0x80, 0xff, 0x7f, 0x00][uniform as usize % 4] } else { rng.random() }
        }),
        x: std::array::from_fn(|_| extreme(rng)),
    }
}

#[test]
fn every_instruction_set_gives_the_scalar_bits() {
    let mut rng = StdRng::seed_from_u64(1);
    for case in thin(3, 0..2000) {
        let inputs = inputs(&mut rng);
        let wanted = Scalar.vectorize(Probe(&inputs));
        for isa in Isa::usable() {
            let found = simd::dispatch(isa, Probe(&inputs));
            assert_eq!(found.len(), wanted.len());
            for ((name, found), (_, wanted)) in found.iter().zip(&wanted) {
                assert_eq!(found, wanted, "{name} on {isa}, case {case}: a {:?} b {:?}", inputs.a, inputs.b);
            }
        }
    }
}

/// Whose code runs.
struct Whose;

impl SimdOp for Whose {
    type Output = Isa;

    #[inline(always)]
    fn eval<S: Simd>(self, _: S) -> Isa {
        S::ISA
    }
}

/// A run that is for one instruction set (`NIBBLE_REQUIRE_ISA`) must not pass with a narrower one.
#[test]
fn the_widest_instruction_set_is_the_one_that_the_run_is_for() {
    let cap = std::env::var("NIBBLE_ISA").unwrap_or_default();
    let cap = Isa::ALL.into_iter().find(|isa| isa.name() == cap).unwrap_or(Isa::Amx);
    let widest = Isa::ALL.into_iter().filter(|isa| *isa <= cap && isa.is_present()).max().unwrap();
    let wanted = std::env::var("NIBBLE_REQUIRE_ISA").unwrap_or(widest.name().to_owned());
    assert_eq!(Isa::best().name(), wanted);
    for isa in Isa::usable() {
        // Tiles come beside the vectors of AVX-512.
        let vectors = if isa == Isa::Amx { Isa::Avx512 } else { isa };
        assert_eq!(simd::dispatch(isa, Whose), vectors, "another instruction set stood in");
    }
}
