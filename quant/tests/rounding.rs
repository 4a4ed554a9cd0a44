//! Laws of rounding that is learned: over every preset that it takes.

use nibble_quant::algo::{AlgoInput, Rounding, algorithm};
use nibble_quant::{OutlierSpec, PRESETS, QTensor, QuantSpec};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const SHAPE: [usize; 2] = [5, 96];

fn weights(seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..SHAPE[0] * SHAPE[1]).map(|_| 0.05 * ((0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0)).collect()
}

fn quantized(weight: &[f32], spec: &QuantSpec) -> QTensor {
    let input = AlgoInput { name: "w", weight, shape: SHAPE, spec, importance: None, calibrated: None, seed: 0 };
    (algorithm("search").unwrap().run)(&input).unwrap()
}

/// Presets, each with some weights and what search makes of them.
fn cases() -> Vec<(&'static str, Vec<f32>, QTensor)> {
    let takes = PRESETS.iter().filter(|p| p.scheme.weight.outliers == OutlierSpec::None);
    let cases: Vec<_> = takes
        .map(|p| {
            let weight = weights(p.name.len() as u64);
            let tensor = quantized(&weight, &p.scheme.weight);
            (p.name, weight, tensor)
        })
        .collect();
    assert!(cases.len() > 15);
    cases
}

#[test]
fn it_begins_with_the_codes_it_is_given() {
    for (name, weight, tensor) in cases() {
        let mut rounding = Rounding::new(&weight, tensor.clone()).unwrap();
        assert_eq!(rounding.shape(), SHAPE);
        assert_eq!(rounding.values(), tensor.dequantize(), "{name}");
        // Nothing pulls, nothing moves.
        rounding.step(&weight, &vec![0.0; weight.len()], 0.5, 0.1);
        assert_eq!(rounding.finish(), tensor, "{name}");
    }
}

#[test]
fn what_it_cannot_learn_is_told_at_once() {
    for preset in PRESETS.iter().filter(|p| p.scheme.weight.outliers != OutlierSpec::None) {
        let weight = weights(1);
        assert!(Rounding::new(&weight, quantized(&weight, &preset.scheme.weight)).is_none(), "{}", preset.name);
    }
    let (_, weight, tensor) = cases().remove(0);
    assert!(Rounding::new(&weight[1..], tensor).is_none(), "a weight of another length");
}

/// With scales held fast a value never moves along its gradient, and comes to lie one step against it.
#[test]
fn values_move_against_their_gradient() {
    for (name, weight, tensor) in cases() {
        for up in [1.0f32, -1.0] {
            let mut rounding = Rounding::new(&weight, tensor.clone()).unwrap();
            for _ in 0..10 {
                rounding.step(&weight, &vec![up; weight.len()], 0.1, 0.0);
            }
            let (before, after) = (tensor.dequantize(), rounding.values());
            assert!(before.iter().zip(&after).all(|(b, a)| (a - b) * up <= 0.0), "{name}");
            let moved = before.iter().zip(&after).filter(|(b, a)| a != b).count();
            // Those at the end of their grid can't.
            assert!(4 * moved > weight.len(), "{name}: {moved} of {} moved", weight.len());
            let finished = rounding.finish();
            finished.validate(name).unwrap();
            assert_eq!(finished.scales, tensor.scales, "{name}");
        }
    }
}

/// Outputs of correlated inputs: what plain rounding leaves of their error is lowered by a good part.
#[test]
fn learning_lowers_the_error_of_outputs() {
    let [n, k] = SHAPE;
    let mut rng = StdRng::seed_from_u64(3);
    let causes: Vec<f32> = (0..8 * k).map(|_| rng.random::<f32>() - 0.5).collect();
    let x: Vec<f32> = (0..200)
        .flat_map(|_| {
            let cause: Vec<f32> = (0..8).map(|_| rng.random::<f32>() - 0.5).collect();
            let noise: Vec<f32> = (0..k).map(|_| 0.2 * (rng.random::<f32>() - 0.5)).collect();
            let causes = &causes;
            (0..k)
                .map(move |j| (0..8).map(|c| cause[c] * causes[c * k + j]).sum::<f32>() + noise[j])
                .collect::<Vec<_>>()
        })
        .collect();
    for (name, weight, tensor) in cases().into_iter().filter(|(_, _, t)| t.spec.bits() <= 4) {
        // (200, n) errors of outputs, and the gradient of half their squares by the values.
        let error = |values: &[f32]| -> (f64, Vec<f32>) {
            let (mut sum, mut gradient) = (0.0, vec![0f32; n * k]);
            for x in x.chunks(k) {
                for r in 0..n {
                    let row = r * k..(r + 1) * k;
                    let off: f32 = x
                        .iter()
                        .zip(&values[row.clone()])
                        .zip(&weight[row.clone()])
                        .map(|((x, q), w)| x * (q - w))
                        .sum();
                    sum += (off as f64).powi(2);
                    gradient[row].iter_mut().zip(x).for_each(|(g, x)| *g += off * x);
                }
            }
            (sum, gradient)
        };
        let mut rounding = Rounding::new(&weight, tensor.clone()).unwrap();
        let (before, mut gradient) = error(&rounding.values());
        let steps = 60;
        for step in 0..steps {
            let rate = 2.0 * (steps - step) as f32 / (steps * (steps + 1)) as f32;
            rounding.step(&weight, &gradient, 0.5 * rate, 0.05 * rate);
            gradient = error(&rounding.values()).1;
        }
        let after = error(&rounding.values()).0;
        assert!(after < 0.8 * before, "{name}: {before} -> {after}");
        rounding.finish().validate(name).unwrap();
    }
}
