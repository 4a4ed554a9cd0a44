//! Laws of algorithms: every preset, over widths that groups don't divide and values that break naive code.

#[path = "algo/bitsandbytes.rs"]
mod bitsandbytes;

use nibble_quant::algo::{ALGORITHMS, AlgoInput, algorithm, weighted_error};
use nibble_quant::{Granularity, OutlierSpec, PRESETS, QTensor, QuantSpec, Range, ScaleFormat, Span};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const ROWS: usize = 3;
const WIDTHS: [usize; 6] = [1, 31, 32, 33, 576, 896];

/// Seeded weights: bell-shaped, heavy-tailed, and adversarial.
fn matrices(k: usize) -> Vec<(&'static str, Vec<f32>)> {
    let mut rng = StdRng::seed_from_u64(k as u64);
    let mut bell = || (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0;
    let normal: Vec<f32> = (0..ROWS * k).map(|_| 0.02 * bell()).collect();
    let heavy: Vec<f32> = normal.iter().map(|x| x * x * x * 1e4).collect();
    let at = |f: &dyn Fn(usize) -> f32| (0..ROWS * k).map(f).collect::<Vec<f32>>();
    vec![
        ("zeros", vec![0.0; ROWS * k]),
        ("one value", vec![0.7; ROWS * k]),
        ("positive", normal.iter().map(|x| x.abs() + 1.0).collect()),
        ("negative", normal.iter().map(|x| -x.abs()).collect()),
        ("a lone spike", at(&|i| if i % 97 == 5 { -30.0 } else { 1e-3 * (i % 7) as f32 })),
        (
            "fourteen decades in a row",
            at(&|i| (if i % 2 == 0 { 1.0 } else { -1.0 }) * 10f32.powi((i / 8 % 14) as i32 - 10)),
        ),
        ("ties", at(&|i| (i % 31) as f32 * 0.5 - 7.5)),
        ("normal", normal),
        ("heavy tails", heavy),
    ]
}

fn specs() -> Vec<(String, QuantSpec)> {
    PRESETS.iter().map(|p| (p.name.to_string(), p.scheme.weight.clone())).collect()
}

fn run(name: &str, weight: &[f32], k: usize, spec: &QuantSpec) -> QTensor {
    (algorithm(name).unwrap().run)(&input(weight, k, spec)).unwrap()
}

fn input<'a>(weight: &'a [f32], k: usize, spec: &'a QuantSpec) -> AlgoInput<'a> {
    AlgoInput { name: "w", weight, shape: [weight.len() / k, k], spec, importance: None, calibrated: None, seed: 0 }
}

#[test]
fn plain_rounding_lands_within_the_error_bound() {
    for k in WIDTHS {
        for (what, x) in matrices(k) {
            for (name, spec) in specs() {
                let q = run("rtn", &x, k, &spec);
                q.validate(&name).unwrap();
                let back = q.dequantize();
                let all = Range::of(&x);
                for r in 0..ROWS {
                    for g in 0..spec.groups(k) {
                        let start = r * k + g * spec.group_size(k);
                        let group = start..start + spec.group_len(k, g);
                        let own = match spec.granularity {
                            Granularity::Tensor => all,
                            _ => Range::of(&x[group.clone()]),
                        };
                        let shared = match spec.scale {
                            ScaleFormat::Float(_) => own,
                            ScaleFormat::Dynamic { .. } => all,
                            ScaleFormat::Coded { span: Span::Row, .. } => Range::of(&x[r * k..(r + 1) * k]),
                            ScaleFormat::Coded { span: Span::Values(values), .. } => {
                                let from = r * k + (start - r * k) / values * values;
                                Range::of(&x[from..(from + values).min((r + 1) * k)])
                            }
                        };
                        let bound = spec.error_bound(own, shared);
                        for i in group {
                            let off = (x[i] - back[i]).abs();
                            assert!(
                                off <= bound,
                                "{name}, k {k}, {what}, value {i}: {} -> {}, bound {bound}",
                                x[i],
                                back[i]
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn searching_is_never_worse_than_plain_rounding() {
    for k in WIDTHS {
        for (what, x) in matrices(k) {
            for (name, spec) in specs() {
                let error =
                    |algorithm: &str| weighted_error(&input(&x, k, &spec), &run(algorithm, &x, k, &spec).dequantize());
                let plain = error("rtn");
                // Sums in f32 choose, f64 judges; what outliers lose in f16 isn't part of the choice.
                let zero = weighted_error(&input(&x, k, &spec), &vec![0.0; x.len()]);
                let f16 = if spec.outliers == OutlierSpec::None { 0.0 } else { 2.0 * zero * 2f64.powi(-22) };
                let slack = plain * 1e-5 + zero * 1e-13 + f16;
                for algorithm in ["clip", "hqq", "search"] {
                    let searched = error(algorithm);
                    assert!(searched <= plain + slack, "{name}, k {k}, {what}: {algorithm} {searched} > rtn {plain}");
                }
            }
        }
    }
}

#[test]
fn searching_pays_on_bell_shaped_weights() {
    let k = 576;
    let (_, x) = matrices(k).into_iter().find(|(what, _)| *what == "normal").unwrap();
    for (name, spec) in specs() {
        let error = |algorithm: &str| weighted_error(&input(&x, k, &spec), &run(algorithm, &x, k, &spec).dequantize());
        assert!(error("search") < error("rtn"), "{name}");
    }
}

#[test]
fn more_bits_are_more_exact() {
    let k = 576;
    for (what, x) in matrices(k).into_iter().filter(|(what, _)| ["normal", "heavy tails"].contains(what)) {
        for algorithm in ALGORITHMS {
            let mut last = f64::INFINITY;
            for bits in 2..=8 {
                let mut spec = nibble_quant::presets::by_name("int4-g32").unwrap().scheme.weight.clone();
                spec.grid = nibble_quant::Grid::Int { bits };
                let error = weighted_error(&input(&x, k, &spec), &run(algorithm.name, &x, k, &spec).dequantize());
                assert!(error < last, "{} bits, {what}, {}: {error} after {last}", bits, algorithm.name);
                last = error;
            }
        }
    }
}

#[test]
fn quantized_values_quantize_to_themselves() {
    // With one level of scales the extreme value gives the scale back wherever it sits on the end of the grid.
    let k = 576;
    for name in ["int4-g32", "int4-g64", "int8-g32", "int4-channel", "int8-channel", "nf4-g64"] {
        let spec = &nibble_quant::presets::by_name(name).unwrap().scheme.weight;
        for (what, x) in matrices(k) {
            let once = run("rtn", &x, k, spec).dequantize();
            let twice = run("rtn", &once, k, spec).dequantize();
            for (a, b) in once.iter().zip(&twice) {
                assert!((a - b).abs() <= a.abs() * 2f32.powi(-10), "{name}, {what}: {a} -> {b}");
            }
        }
    }
}

#[test]
fn outliers_come_back_to_half_precision() {
    let k = 896;
    for name in ["int4-g64-outliers", "int4-g64-columns"] {
        let spec = &nibble_quant::presets::by_name(name).unwrap().scheme.weight;
        for (what, x) in matrices(k) {
            for algorithm in ALGORITHMS {
                let q = run(algorithm.name, &x, k, spec);
                q.validate(name).unwrap();
                let back = q.dequantize();
                for r in 0..ROWS {
                    for (col, value) in q.row_outliers(r) {
                        let (x, back) = (x[r * k + col], back[r * k + col]);
                        let bound =
                            value.to_f32().abs() * 2f32.powi(-11) + 2f32.powi(-25) + x.abs() * f32::EPSILON * 4.0;
                        assert!((x - back).abs() <= bound, "{name}, {what}: {x} -> {back}, outlier {value}");
                    }
                }
            }
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    let k = 576;
    let x: Vec<f32> = (0..40).flat_map(|_| matrices(k).pop().unwrap().1).collect();
    for (name, spec) in specs() {
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| run("search", &x, k, &spec))
        };
        let one = with(1);
        for threads in [2, 8] {
            assert!(one == with(threads), "{name} with {threads} threads");
        }
    }
}

#[test]
fn importance_moves_error_to_columns_that_matter_less() {
    let k = 576;
    let (_, x) = matrices(k).pop().unwrap();
    let importance: Vec<f32> = (0..k).map(|c| if c % 8 == 0 { 100.0 } else { 1.0 }).collect();
    for (name, spec) in specs().into_iter().filter(|(name, _)| !name.contains("tensor")) {
        let weighted = AlgoInput { importance: Some(&importance), ..input(&x, k, &spec) };
        let informed = (algorithm("search").unwrap().run)(&weighted).unwrap().dequantize();
        let blind = run("search", &x, k, &spec).dequantize();
        assert!(weighted_error(&weighted, &informed) < weighted_error(&weighted, &blind), "{name}");
    }
}

#[test]
fn what_cannot_be_quantized_is_refused_by_place() {
    let spec = &nibble_quant::presets::by_name("int4-g32").unwrap().scheme.weight;
    for algorithm in ALGORITHMS {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![0.5; 3 * 40];
            x[2 * 40 + 7] = bad;
            let error = (algorithm.run)(&input(&x, 40, spec)).unwrap_err().to_string();
            assert!(error.contains("`w`") && error.contains("row 2, column 7"), "{error}");
        }
        let huge = vec![3e38; 80];
        let error = (algorithm.run)(&input(&huge, 40, spec)).unwrap_err().to_string();
        assert!(error.contains("row 0") && error.contains("beyond f16"), "{error}");
        let x = [1.0; 80];
        let short = AlgoInput { shape: [3, 40], ..input(&x, 40, spec) };
        assert!((algorithm.run)(&short).unwrap_err().to_string().contains("80 values for a shape of 3 x 40"));
        let importance = [1.0, -1.0];
        let wrong = AlgoInput { importance: Some(&importance), ..input(&x, 2, spec) };
        assert!((algorithm.run)(&wrong).unwrap_err().to_string().contains("importance -1 of column 1"));
    }
    assert!(algorithm("serch").unwrap_err().to_string().contains("did you mean `search`?"));
}

#[test]
fn empty_tensors_stay_empty() {
    for (name, spec) in specs() {
        for shape in [[0, 32], [3, 0]] {
            let q = (algorithm("search").unwrap().run)(&AlgoInput { shape, ..input(&[], 1, &spec) }).unwrap();
            q.validate(&name).unwrap();
            assert!(q.dequantize().is_empty());
        }
    }
}

#[test]
fn rows_that_stand_alone_quantize_alone() {
    let k = 576;
    let (_, x) = matrices(k).pop().unwrap();
    for (name, spec) in specs() {
        let whole = run("search", &x, k, &spec).dequantize();
        let alone: Vec<f32> = x.chunks(k).flat_map(|row| run("search", row, k, &spec).dequantize()).collect();
        assert_eq!(whole == alone, spec.rows_stand_alone(), "{name}");
    }
}
