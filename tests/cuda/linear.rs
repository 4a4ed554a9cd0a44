//! Products with every kind of weight, over tails and all tile sizes.

use super::{Device, interpreted, numbers, random, rows_of, with_warpgroups};
use half::{bf16, f16};
use nibble_kernels::cuda::{Cuda, Gpu};
use nibble_kernels::{DenseSource, Levels, Outliers, PackedWeight, Scales, WeightSource, Zeros};
use rand::Rng;
use rand::rngs::StdRng;

/// Single precision's rounding error, relative.
pub(super) const EPS: f64 = 1.0 / (1u64 << 24) as f64;

const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// Levels of normally distributed weights, as halves hold them.
const NF4: [f32; 16] = [
    -1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
    0.723, 1.0,
];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Number {
    F16,
    F32,
    Coded,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Zero {
    Const(i32),
    Int,
    Min,
}

/// One kind of weight.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind {
    levels: Levels,
    number: Number,
    zero: Zero,
    outliers: bool,
}

pub(super) fn kinds() -> Vec<Kind> {
    let nf4 = Levels::FloatTable4(NF4.map(|level| f16::from_f32(level).to_f32()));
    let kind = |levels, number, zero| Kind { levels, number, zero, outliers: false };
    vec![
        kind(Levels::Linear4, Number::F16, Zero::Const(8)),
        kind(Levels::Linear4, Number::Coded, Zero::Const(7)),
        kind(Levels::Linear4, Number::F32, Zero::Int),
        Kind { outliers: true, ..kind(Levels::Linear4, Number::Coded, Zero::Min) },
        kind(Levels::Table4(IQ4), Number::F16, Zero::Const(0)),
        kind(Levels::Table4(IQ4), Number::Coded, Zero::Int),
        kind(nf4, Number::F32, Zero::Const(0)),
        kind(nf4, Number::Coded, Zero::Min),
        kind(Levels::Linear8, Number::F16, Zero::Const(128)),
        kind(Levels::Linear8, Number::Coded, Zero::Int),
        Kind { outliers: true, ..kind(Levels::Linear8, Number::F32, Zero::Min) },
    ]
}

/// One number a group: stored, and what it stands for.
struct Coded {
    f16: Vec<f16>,
    f32: Vec<f32>,
    codes: Vec<i16>,
    second: Vec<f32>,
    span: usize,
    values: Vec<f64>,
}

impl Coded {
    fn random(random: &mut StdRng, n: usize, groups: usize, number: Number, low: f32) -> Coded {
        let span = 3;
        let spans = groups.div_ceil(span);
        let f32s: Vec<f32> = (0..n * groups).map(|_| random.random_range(low..1.0) / 16.0).collect();
        let f16s: Vec<f16> = f32s.iter().map(|v| f16::from_f32(*v)).collect();
        let codes: Vec<i16> =
            (0..n * groups).map(|_| random.random_range(if low < 0.0 { -128..=127 } else { 0..=255 })).collect();
        let second: Vec<f32> = (0..n * spans).map(|_| random.random_range(0.5f32..1.0) / 2048.0).collect();
        let values = (0..n * groups)
            .map(|i| match number {
                Number::F16 => f16s[i].to_f64(),
                Number::F32 => f64::from(f32s[i]),
                Number::Coded => f64::from(codes[i]) * f64::from(second[i / groups * spans + i % groups / span]),
            })
            .collect();
        Coded { f16: f16s, f32: f32s, codes, second, span, values }
    }

    fn scales(&self, number: Number) -> Scales<'_> {
        match number {
            Number::F16 => Scales::F16(&self.f16),
            Number::F32 => Scales::F32(&self.f32),
            Number::Coded => Scales::Coded { codes: &self.codes, second: &self.second, span: self.span },
        }
    }
}

/// A weight, its values and the magnitudes that rounding errors are proportional to.
pub(super) struct Weight {
    pub packed: PackedWeight,
    pub values: Vec<f64>,     // (n, k)
    pub magnitudes: Vec<f64>, // (n, k)
}

pub(super) fn weight(random: &mut StdRng, kind: Kind, n: usize, k: usize, group: usize) -> Weight {
    let groups = k.div_ceil(group);
    let most = if kind.levels.bits() == 4 { 15 } else { 255 };
    let codes: Vec<u8> = (0..n * k).map(|_| random.random_range(0..=most)).collect();
    let scales = Coded::random(random, n, groups, kind.number, -1.0);
    let mins = Coded::random(random, n, groups, kind.number, -1.0);
    let ints: Vec<u8> = (0..n * groups).map(|_| random.random_range(0..=most)).collect();
    let zeros = match kind.zero {
        Zero::Const(zero) => Zeros::Const(zero),
        Zero::Int => Zeros::Int(&ints),
        Zero::Min => Zeros::Min(mins.scales(kind.number)),
    };
    let mut outliers = Outliers { row_start: vec![0], ..Outliers::default() };
    if kind.outliers {
        for row in 0..n {
            for col in (row % 7..k).step_by(41) {
                outliers.cols.push(col as u32);
                outliers.values.push(f16::from_f32(random.random_range(-1.0f32..1.0)));
            }
            outliers.row_start.push(outliers.cols.len() as u32);
        }
    }
    let source = WeightSource {
        n,
        k,
        group: if group >= k { k.next_multiple_of(32) } else { group },
        levels: kind.levels,
        codes: &codes,
        scales: scales.scales(kind.number),
        zeros,
        outliers: kind.outliers.then_some(&outliers),
    };
    let packed = PackedWeight::pack(&source).expect("a sound weight");
    let (mut values, mut magnitudes) = (Vec::new(), Vec::new());
    for i in 0..n * k {
        let g = i / k * groups + i % k / group;
        let level = f64::from(kind.levels.value(codes[i]));
        let (zero, min) = match kind.zero {
            Zero::Const(zero) => (f64::from(zero), 0.0),
            Zero::Int => (f64::from(ints[g]), 0.0),
            Zero::Min => (0.0, mins.values[g]),
        };
        values.push(scales.values[g] * (level - zero) + min);
        // Tables take a zero point apart from the level.
        magnitudes.push(scales.values[g].abs() * (level.abs() + zero.abs()) + min.abs());
    }
    for row in 0..n {
        for at in kind
            .outliers
            .then(|| outliers.row_start[row] as usize..outliers.row_start[row + 1] as usize)
            .into_iter()
            .flatten()
        {
            let place = row * k + outliers.cols[at] as usize;
            values[place] += outliers.values[at].to_f64();
            magnitudes[place] += outliers.values[at].to_f64().abs();
        }
    }
    Weight { packed, values, magnitudes }
}

/// A row as the kernels round it: halves, after the power of two that brings its largest magnitude into 8192..16384.
fn rounded(row: &[f32]) -> Vec<f64> {
    let most = row.iter().fold(0f32, |most, x| most.max(x.abs()));
    let exponent = (most.to_bits() >> 23) as i32;
    let power = 2f64.powi((140 - exponent).min(126));
    row.iter().map(|x| f16::from_f32((f64::from(*x) * power) as f32).to_f64() / power).collect()
}

/// Runs a product and holds it to the sum in double precision: rows made ready before, and by the product itself.
fn check<G: Gpu>(cuda: &Cuda<G>, kind: Kind, shape: (usize, usize, usize), m: usize, accumulate: bool) {
    for is_ready in [true, false] {
        check_one(cuda, kind, shape, m, accumulate, is_ready);
    }
}

fn check_one<G: Gpu>(
    cuda: &Cuda<G>,
    kind: Kind,
    (n, k, group): (usize, usize, usize),
    m: usize,
    accumulate: bool,
    is_ready: bool,
) {
    let mut random = random((n * k + m) as u64);
    let weight = weight(&mut random, kind, n, k, group);
    let x: Vec<f32> = (0..m)
        .flat_map(|row| numbers(&mut random, k).into_iter().map(move |x| x * 8f32.powi(row as i32 % 12 - 6)))
        .collect();
    let bias = numbers(&mut random, n);
    let before = numbers(&mut random, m * n);
    let on_device = cuda.weight(&weight.packed).unwrap();
    let rows = rows_of(cuda, &x, k);
    // Outputs that are not accumulated to hold nothing: reading them would be an error.
    let mut out = if accumulate { rows_of(cuda, &before, n) } else { cuda.rows(m, n).unwrap() };
    let vector = cuda.vector(&bias).unwrap();
    if is_ready {
        cuda.prepare(&rows, m).unwrap();
    }
    let context = format!("{kind:?}, n {n}, k {k}, group {group}, m {m}, accumulate {accumulate}, ready {is_ready}");
    cuda.multiply(&rows, m, &on_device, Some(&vector), accumulate, &mut out)
        .unwrap_or_else(|e| panic!("{context}: {e}"));
    let found = cuda.read_rows(&out, 0..m).unwrap();
    for t in 0..m {
        let exact = &x[t * k..(t + 1) * k];
        let halves = rounded(exact);
        for r in 0..n {
            let row = r * k..(r + 1) * k;
            let (mut wanted, mut magnitude) = (f64::from(bias[r]), f64::from(bias[r].abs()));
            for ((x, w), size) in halves.iter().zip(&weight.values[row.clone()]).zip(&weight.magnitudes[row]) {
                wanted += x * w;
                magnitude += x.abs() * size;
            }
            // Outliers meet the unrounded activations.
            let slack = if kind.outliers { magnitude / 2048.0 } else { 0.0 };
            if accumulate {
                wanted += f64::from(before[t * n + r]);
                magnitude += f64::from(before[t * n + r].abs());
            }
            // Each product is rounded into its sum once or twice, on its way through tiles, parts and scales.
            let bound = (2.0 * k as f64 + 16.0) * EPS * magnitude + slack + f64::from(f32::MIN_POSITIVE);
            let got = f64::from(found[t * n + r]);
            assert!((got - wanted).abs() <= bound, "{context}: row {t}, output {r}: {got}, wanted {wanted} +- {bound}");
        }
    }
}

pub fn products_of_few_rows_are_sums_in_double_precision<G: Gpu>(device: Device<G>) {
    let cuda = device(2);
    for kind in kinds() {
        for (shape, m) in [
            ((16, 64, 32), 1),
            ((40, 96, 32), 3),
            ((17, 200, 64), 8),
            ((50, 576, 128), 2),
            ((5, 40, 40), 7),
            ((33, 672, 96), 1),
            ((100, 96, 32), 5),  // many outputs
            ((20, 6200, 64), 2), // long rows
            ((24, 1100, 64), 8), // rows that a block can't make ready itself
        ] {
            check(&cuda, kind, shape, m, m == 3);
        }
    }
}

pub fn products_of_many_rows_are_sums_in_double_precision<G: Gpu>(device: Device<G>) {
    let cuda = device(2);
    for kind in kinds() {
        for (shape, m) in [
            ((64, 64, 32), 9),
            ((40, 96, 32), 16),
            ((70, 200, 64), 20),
            ((20, 40, 40), 33),
            ((130, 576, 128), 64),
            ((33, 352, 96), 70),
            ((100, 96, 32), 12), // many outputs
            ((105, 72, 72), 25),
        ] {
            check(&cuda, kind, shape, m, m == 20);
        }
    }
}

pub fn a_long_prompt_and_parts_of_k<G: Gpu>(device: Device<G>) {
    // Many processors: K is cut into parts. One: it isn't.
    for processors in [1, 64] {
        let cuda = device(processors);
        for kind in [kinds()[0], kinds()[3], kinds()[9]] {
            check(&cuda, kind, (136, 1056, 32), 200, false);
            check(&cuda, kind, (40, 1056, 96), 66, true);
            // Scales of more units than are held at once.
            check(&cuda, kind, (20, 16700, 128), 2, false);
            check(&cuda, kind, (20, 8400, 64), 20, true);
        }
    }
}

/// Blocks with several tiles, up to as many as there is room for; long rows on a large device, whose blocks have more
/// warps.
pub fn products_of_few_rows_with_very_many_outputs<G: Gpu>(device: Device<G>) {
    for (processors, shape, m) in [(1, (140, 200, 64), 4), (1, (300, 96, 32), 1), (132, (24, 1920, 32), 3)] {
        let cuda = device(processors);
        for kind in [kinds()[0], kinds()[1], kinds()[4], kinds()[6], kinds()[8]] {
            check(&cuda, kind, shape, m, true);
        }
    }
}

pub fn hostile_rows_of_activations_keep_their_magnitude<G: Gpu>(device: Device<G>) {
    let cuda = device(2);
    let mut random = random(5);
    let weight = weight(&mut random, kinds()[0], 16, 64, 32);
    let on_device = cuda.weight(&weight.packed).unwrap();
    let mut x = numbers(&mut random, 5 * 64);
    x[..64].iter_mut().for_each(|x| *x *= 1e30);
    x[64..128].iter_mut().for_each(|x| *x *= 1e-30);
    x[128..192].fill(0.0);
    x[192] = f32::NAN;
    x[256] = f32::INFINITY;
    let rows = rows_of(&cuda, &x, 64);
    let mut out = cuda.rows(5, 16).unwrap();
    cuda.multiply(&rows, 5, &on_device, None, false, &mut out).unwrap();
    let found = cuda.read_rows(&out, 0..5).unwrap();
    for (row, found) in found.chunks(16).enumerate() {
        for (r, found) in found.iter().enumerate() {
            let sum = |x: &[f32]| {
                let products = rounded(x).into_iter().zip(&weight.values[r * 64..]);
                products.fold((0.0, 0.0), |(sum, size), (x, w)| (sum + x * w, size + (x * w).abs()))
            };
            match row {
                0 | 1 => {
                    let (wanted, size) = sum(&x[row * 64..][..64]);
                    assert!((f64::from(*found) - wanted).abs() <= 1e-4 * size, "{row} {r}: {found}, {wanted}");
                }
                2 => assert_eq!(*found, 0.0),
                _ => assert!(!found.is_finite(), "{row} {r}: {found}"),
            }
        }
    }
}

pub fn unquantized_weights_are_multiplied_in_single_precision<G: Gpu>(device: Device<G>) {
    let cuda = device(2);
    let mut random = random(7);
    for (n, k, m) in [(16, 64, 1), (21, 70, 3), (9, 33, 8), (40, 100, 19)] {
        let values = numbers(&mut random, n * k);
        let halves: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
        let brains: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
        let x = numbers(&mut random, m * k);
        for source in [DenseSource::F32(&values), DenseSource::F16(&halves), DenseSource::Bf16(&brains)] {
            let exact: Vec<f64> = match source {
                DenseSource::F32(_) => values.iter().map(|v| f64::from(*v)).collect(),
                DenseSource::F16(_) => halves.iter().map(|v| v.to_f64()).collect(),
                DenseSource::Bf16(_) => brains.iter().map(|v| v.to_f64()).collect(),
            };
            let weight = cuda.weight(&PackedWeight::pack_dense(n, k, source).unwrap()).unwrap();
            let rows = rows_of(&cuda, &x, k);
            let mut out = cuda.rows(m, n).unwrap();
            cuda.multiply(&rows, m, &weight, None, false, &mut out).unwrap();
            let found = cuda.read_rows(&out, 0..m).unwrap();
            for (i, found) in found.iter().enumerate() {
                let (t, r) = (i / n, i % n);
                let products = x[t * k..(t + 1) * k].iter().zip(&exact[r * k..]).map(|(x, w)| f64::from(*x) * w);
                let (wanted, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                assert!((f64::from(*found) - wanted).abs() <= (k as f64 + 8.0) * EPS * size, "{found}, {wanted}");
            }
            let mut indices = cuda.indices(2).unwrap();
            let mut looked_up = cuda.rows(2, k).unwrap();
            cuda.embed(&weight, &[n as u32 - 1, 0], &mut indices, 0.5, &mut looked_up).unwrap();
            let found = cuda.read_rows(&looked_up, 0..2).unwrap();
            let wanted = exact[(n - 1) * k..].iter().chain(&exact[..k]).map(|w| (w * 0.5) as f32);
            assert!(found.iter().copied().eq(wanted), "embedding of {n} x {k}");
        }
    }
}

pub fn embeddings_are_the_rows_that_products_read<G: Gpu>(device: Device<G>) {
    let cuda = device(2);
    for (at, kind) in kinds().into_iter().enumerate() {
        for (n, k, group) in [(16, 64, 32), (21, 200, 64), (35, 40, 40)] {
            let weight = weight(&mut random(at as u64), kind, n, k, group);
            let on_device = cuda.weight(&weight.packed).unwrap();
            let tokens: Vec<u32> = (0..n as u32).rev().collect();
            let mut indices = cuda.indices(n).unwrap();
            let mut out = cuda.rows(n, k).unwrap();
            cuda.embed(&on_device, &tokens, &mut indices, 2.0, &mut out).unwrap();
            let found = cuda.read_rows(&out, 0..n).unwrap();
            for (i, found) in found.iter().enumerate() {
                let at = (n - 1 - i / k) * k + i % k;
                let bound = 8.0 * EPS * weight.magnitudes[at] + f64::from(f32::MIN_POSITIVE);
                assert!((f64::from(*found) - 2.0 * weight.values[at]).abs() <= 2.0 * bound, "{kind:?} {n} x {k}: {i}");
            }
        }
    }
}

pub fn unfit_products_are_refused<G: Gpu>(device: Device<G>) {
    let cuda = device(2);
    let weight = weight(&mut random(1), kinds()[0], 16, 64, 32);
    let weight = cuda.weight(&weight.packed).unwrap();
    let rows = |width| cuda.rows(2, width).unwrap();
    let vector = cuda.vector(&[0.0; 15]).unwrap();
    assert!(cuda.multiply(&rows(63), 2, &weight, None, false, &mut rows(16)).is_err());
    assert!(cuda.multiply(&rows(64), 2, &weight, None, false, &mut rows(15)).is_err());
    assert!(cuda.multiply(&rows(64), 3, &weight, None, false, &mut rows(16)).is_err());
    assert!(cuda.multiply(&rows(64), 2, &weight, Some(&vector), false, &mut rows(16)).is_err());
    let mut indices = cuda.indices(2).unwrap();
    assert!(cuda.embed(&weight, &[16], &mut indices, 1.0, &mut rows(64)).is_err(), "a token past the last");
    assert!(cuda.embed(&weight, &[1, 2, 3], &mut indices, 1.0, &mut rows(64)).is_err(), "more than there is room for");
}

/// Bank conflicts and sectors don't depend on a device's speed, so they are checked here: a product reads in whole
/// sectors, and its shared accesses take the least number of passes but for the sums at the end.
#[test]
fn products_keep_within_their_budgets_of_conflicts_and_sectors() {
    let cuda = interpreted(2);
    for kind in [kinds()[0], kinds()[4], kinds()[8]] {
        check(&cuda, kind, (256, 1024, 128), 1, false);
        check(&cuda, kind, (256, 1024, 128), 64, false);
        check(&cuda, kind, (256, 1024, 128), 72, false);
    }
    let by_warpgroups = with_warpgroups(2);
    for kind in [kinds()[0], kinds()[4], kinds()[8]] {
        check(&by_warpgroups, kind, (256, 1024, 128), 64, false);
        check(&by_warpgroups, kind, (256, 1024, 128), 128, false);
    }
    for (kernel, counters) in cuda.gpu().counters().into_iter().chain(by_warpgroups.gpu().counters()) {
        let (most_conflicts, most_sectors) = match kernel {
            "gemm64_w4" | "gemm64_w4_table" | "gemm64_w8" => (1.00, 1.00),
            // The sums at the end: two tiles' lie in the same banks.
            "gemv64_wide_w4" | "gemv64_wide_w4_table" | "gemv64_wide_w8" => (1.50, 1.00),
            // Rows of activations are copied eight lanes a row.
            "wgmma64_f16_w4" | "wgmma64_f16_w4_table" | "wgmma64_f16_w8" => (1.00, 1.00),
            "wgmma128_f16_w4" | "wgmma128_f16_w4_table" | "wgmma128_f16_w8" => (1.00, 1.00),
            // The sums of rows, and which outputs a block has.
            "few_f16_short_w4" | "few_f16_short_w4_table" | "few_f16_short_w8" => (1.05, 1.05),
            _ => continue,
        };
        let conflicts = counters.wavefronts as f64 / counters.least_wavefronts as f64;
        let sectors = counters.sectors as f64 / counters.least_sectors as f64;
        println!("{kernel}: {conflicts:.3} x the least wavefronts, {sectors:.3} x the least sectors, {counters:?}");
        assert!(conflicts <= most_conflicts, "{kernel}: {conflicts}");
        assert!(sectors <= most_sectors, "{kernel}: {sectors}");
    }
}
