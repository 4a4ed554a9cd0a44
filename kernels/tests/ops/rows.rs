//! Norms, rotations, softmax and gates, row by row.

use super::quick::thin;
use super::*;
use nibble_kernels::ops::math::Function;
use nibble_kernels::ops::{LayerNorm, RmsNorm, RopeTable};

/// Rows that are worked on by one thread and by many.
const ROWS: [usize; 4] = [0, 1, 3, 40];

/// Additions that a number goes through when a row of d values is summed: four sums of 16 lanes, then those.
fn depth(d: usize) -> f64 {
    (d as f64 / 64.0).ceil() + 6.0
}

fn shapes() -> impl Iterator<Item = (usize, usize)> {
    thin(5, WIDTHS.into_iter().flat_map(|d| ROWS.into_iter().map(move |rows| (rows, d))))
}

#[test]
fn rms_norm_equals_its_reference() {
    for (case, (rows, d)) in shapes().enumerate() {
        let mut rng = rng(case as u64);
        let (x, y, weight) =
            (activations(&mut rng, rows * d), activations(&mut rng, rows * d), activations(&mut rng, d));
        for add_one in [false, true] {
            let norm = RmsNorm { weight: &weight, eps: 1e-5, add_one };
            let check = |x: &[f32], found: &[f32]| {
                for (x, found) in x.chunks(d).zip(found.chunks(d)) {
                    let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / d as f64;
                    let inverse = 1.0 / (mean + f64::from(1e-5_f32)).sqrt();
                    for ((x, w), found) in x.iter().zip(&weight).zip(found) {
                        let factor = f64::from(*w) + if add_one { 1.0 } else { 0.0 };
                        let wanted = f64::from(*x) * inverse * factor;
                        // Half of the sum's error, then division, root, quotient, two products and the factor.
                        assert_close(*found, wanted, wanted.abs() * (depth(d) / 2.0 + 6.0) * U, "rms norm");
                    }
                }
            };
            let out = same_everywhere(|ops| {
                let mut out = vec![f32::NAN; rows * d];
                ops.rms_norm(norm, &x, &mut out);
                out
            });
            check(&x, &out);
            let in_place = same_everywhere(|ops| {
                let mut x = x.clone();
                ops.rms_norm_in_place(norm, &mut x);
                x
            });
            assert_eq!(in_place, out);
            let sum: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
            let fused = same_everywhere(|ops| {
                let (mut residual, mut out) = (x.clone(), vec![f32::NAN; rows * d]);
                ops.add_rms_norm(norm, &mut residual, &y, &mut out);
                assert_eq!(residual, sum);
                out
            });
            check(&sum, &fused);
        }
    }
}

#[test]
fn layer_norm_equals_its_reference() {
    for (case, (rows, d)) in shapes().enumerate() {
        let mut rng = rng(case as u64);
        let (x, y) = (activations(&mut rng, rows * d), activations(&mut rng, rows * d));
        let (weight, bias) = (activations(&mut rng, d), activations(&mut rng, d));
        for bias in [None, Some(&bias[..])] {
            let norm = LayerNorm { weight: &weight, bias, eps: 1e-5 };
            let check = |x: &[f32], found: &[f32]| {
                for (x, found) in x.chunks(d).zip(found.chunks(d)) {
                    let mean = x.iter().map(|x| f64::from(*x)).sum::<f64>() / d as f64;
                    let size = x.iter().map(|x| f64::from(*x).abs()).sum::<f64>() / d as f64;
                    let variance = x.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / d as f64;
                    let inverse = 1.0 / (variance + f64::from(1e-5_f32)).sqrt();
                    // The mean is off by `shift`, which moves each value and adds its square to the variance.
                    let shift = (depth(d) + 1.0) * U * size;
                    let spread = (depth(d) / 2.0 + 6.0) * U + 0.5 * (shift * inverse).powi(2);
                    for (i, (x, found)) in x.iter().zip(found).enumerate() {
                        let (w, b) = (f64::from(weight[i]), bias.map_or(0.0, |b| f64::from(b[i])));
                        let centred = (f64::from(*x) - mean) * inverse * w;
                        let bound = centred.abs() * (spread + U) + shift * inverse * w.abs() + (centred + b).abs() * U;
                        assert_close(*found, centred + b, bound * (1.0 + 1e-3), "layer norm");
                    }
                }
            };
            let out = same_everywhere(|ops| {
                let mut out = vec![f32::NAN; rows * d];
                ops.layer_norm(norm, &x, &mut out);
                out
            });
            check(&x, &out);
            let sum: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
            let fused = same_everywhere(|ops| {
                let (mut residual, mut out) = (x.clone(), vec![f32::NAN; rows * d]);
                ops.add_layer_norm(norm, &mut residual, &y, &mut out);
                assert_eq!(residual, sum);
                out
            });
            check(&sum, &fused);
        }
    }
}

#[test]
fn a_row_of_nan_spoils_itself_only() {
    let d = 100;
    let weight = vec![1.0; d];
    let mut x = activations(&mut rng(3), 3 * d);
    x[d + 99] = f32::NAN;
    let out = same_everywhere(|ops| {
        let mut out = vec![0.0; 3 * d];
        ops.rms_norm(RmsNorm { weight: &weight, eps: 1e-5, add_one: false }, &x, &mut out);
        out
    });
    assert!(out[d..2 * d].iter().all(|x| x.is_nan()));
    assert!(out[..d].iter().chain(&out[2 * d..]).all(|x| x.is_finite()));
    // Zeros stay zeros: eps keeps the division finite.
    let zeros = same_everywhere(|ops| {
        let mut x = vec![0.0; d];
        ops.rms_norm_in_place(RmsNorm { weight: &weight, eps: 1e-6, add_one: true }, &mut x);
        x
    });
    assert!(zeros.iter().all(|x| *x == 0.0));
}

#[test]
fn rope_turns_pairs_of_halves() {
    for (case, (heads, head_dim, half)) in
        [(1, 2, 1), (3, 64, 32), (2, 80, 16), (9, 64, 0), (2, 34, 17), (1, 128, 64), (4, 10, 3)].into_iter().enumerate()
    {
        let inv_freq: Vec<f32> = (0..half).map(|i| 1e4_f32.powf(-(i as f32) / half as f32)).collect();
        for scale in [1.0, 1.25] {
            let table = RopeTable::new(&inv_freq, 5000, scale);
            assert_eq!((table.positions(), table.rotary_dim()), (5000, 2 * half));
            for (rows, start) in [(0, 0), (1, 0), (1, 4999), (3, 17), (100, 4000)] {
                let x = activations(&mut rng(case as u64), rows * heads * head_dim);
                let found = same_everywhere(|ops| {
                    let mut x = x.clone();
                    ops.rope(&table, &mut x, heads, head_dim, start);
                    x
                });
                for (at, (x, found)) in x.chunks(head_dim).zip(found.chunks(head_dim)).enumerate() {
                    let position = (start + at / heads) as f64;
                    for i in 0..half {
                        let (sin, cos) = (position * f64::from(inv_freq[i])).sin_cos();
                        let (sin, cos) = (sin * f64::from(scale), cos * f64::from(scale));
                        let (a, b) = (f64::from(x[i]), f64::from(x[half + i]));
                        // Each product has a rounded factor and is rounded itself, then their sum is.
                        let bound = |p: f64, q: f64| 3.0 * U * (p.abs() + q.abs());
                        assert_close(found[i], a * cos - b * sin, bound(a * cos, b * sin), "first half");
                        assert_close(found[half + i], b * cos + a * sin, bound(b * cos, a * sin), "second half");
                    }
                    assert_eq!(found[2 * half..], x[2 * half..], "the rest of the head stays");
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "positions 4.. + 2 of 5")]
fn rope_refuses_a_position_outside_of_its_table() {
    Ops::new(&POOLS[0]).rope(&RopeTable::new(&[1.0], 5, 1.0), &mut [0.0; 4], 1, 2, 4);
}

#[test]
fn softmax_equals_its_reference() {
    for (case, (rows, d)) in shapes().enumerate() {
        let mut x = activations(&mut rng(case as u64), rows * d);
        for (i, x) in x.iter_mut().enumerate() {
            *x = if i % d > 0 && i % 7 == 3 { f32::NEG_INFINITY } else { *x * 10.0 };
        }
        let found = same_everywhere(|ops| {
            let mut x = x.clone();
            ops.softmax(&mut x, d);
            x
        });
        for (x, found) in x.chunks(d).zip(found.chunks(d)) {
            let largest = f64::from(x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let sum: f64 = x.iter().map(|x| (f64::from(*x) - largest).exp()).sum();
            for (x, found) in x.iter().zip(found) {
                let below = f64::from(*x) - largest;
                let wanted = below.exp() / sum;
                // The difference is rounded, which the exponential multiplies; two exponentials of 2 units each, the
                // sum over 16 lanes, a quotient and a product. A subnormal result is off by its own unit.
                let relative = (below.abs().min(110.0) + 8.0 + d as f64 / 16.0 + 5.0 + 2.0) * U;
                assert_close(*found, wanted, wanted * relative + 3.0 * 1.5e-45, "softmax");
            }
        }
    }
}

#[test]
fn softmax_of_nan_is_nan_and_rows_are_apart() {
    let found = same_everywhere(|ops| {
        let mut x = vec![0.0, f32::NAN, 1.0, 2.0, 2.0, 2.0];
        ops.softmax(&mut x, 3);
        x
    });
    assert!(found[..3].iter().all(|x| x.is_nan()));
    assert!(found[3..].iter().all(|x| (x - 1.0 / 3.0).abs() < 1e-7));
}

#[test]
fn gates_and_sums_equal_their_formulas() {
    for n in thin(2, [0, 1, 15, 16, 33, 576, 8192, 20_001]) {
        let mut rng = rng(n as u64);
        let (x, y) = (activations(&mut rng, n), activations(&mut rng, n));
        let with = |f: &dyn Fn(&Ops<'_>, &mut [f32])| {
            same_everywhere(|ops| {
                let mut x = x.clone();
                f(&ops, &mut x);
                x
            })
        };
        let formula = |f: &dyn Fn(f32, f32) -> f32| x.iter().zip(&y).map(|(x, y)| f(*x, *y)).collect::<Vec<f32>>();
        assert_eq!(with(&|ops, x| ops.add(x, &y)), formula(&|x, y| x + y));
        assert_eq!(with(&|ops, x| ops.add_scaled(x, &y, 0.3)), formula(&|x, y| y.mul_add(0.3, x)));
        assert_eq!(with(&|ops, x| ops.scale(x, -0.3)), formula(&|x, _| x * -0.3));
        for function in Function::ALL {
            let mut values = x.clone();
            function.apply(Isa::Scalar, &mut values);
            let wanted: Vec<f32> = values.iter().zip(&y).map(|(f, y)| f * y).collect();
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
            assert_eq!(bits(&with(&|ops, x| ops.apply(function, x))), bits(&values));
            assert_eq!(bits(&with(&|ops, x| ops.gate(function, x, &y))), bits(&wanted));
            // The same from rows that hold both.
            let width = if n % 3 == 0 { n / 3 } else { n };
            let rows: Vec<f32> =
                (x.chunks(width.max(1)).zip(y.chunks(width.max(1)))).flat_map(|(x, y)| [x, y].concat()).collect();
            let fused = same_everywhere(|ops| {
                let mut out = vec![f32::NAN; n];
                ops.gate_fused(function, &rows, width, &mut out);
                out
            });
            assert_eq!(bits(&fused), bits(&wanted));
        }
        let capped = with(&|ops, x| ops.softcap(x, 30.0));
        for (x, found) in x.iter().zip(capped) {
            let wanted = 30.0 * (f64::from(*x) / 30.0).tanh();
            // A rounded quotient (whose relative error tanh doesn't enlarge), tanh within 3 units, a product.
            assert_close(found, wanted, wanted.abs() * (1.0 + 6.0 + 1.0) * U, "softcap");
        }
    }
}

#[test]
fn a_bias_is_added_to_every_row() {
    for (rows, d) in shapes() {
        let mut rng = rng(d as u64);
        let (x, bias) = (activations(&mut rng, rows * d), activations(&mut rng, d));
        let found = same_everywhere(|ops| {
            let mut x = x.clone();
            ops.add_bias(&mut x, &bias);
            x
        });
        assert!(found.iter().enumerate().all(|(i, found)| *found == x[i] + bias[i % d]));
    }
}
