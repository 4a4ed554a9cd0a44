//! Fake quantization: its values are those of the integer grid, its gradients those of the papers' formulas.

use super::{drawn, flat};
use candle_core::{Device, Tensor, Var};
use nibble_models::qat::ops::{Axis, FakeQuantize, fake_quantize};
use nibble_models::qat::optimizer::{Group, Method, Optimizer, cosine};
use nibble_quant::Range;
use nibble_quant::observer::{IntGrid, IntType, QParams};

/// A shape, the axis of its scales, and which scale the value at a place has.
type Case = (Vec<usize>, Axis, fn(usize) -> usize);

fn layouts() -> Vec<Case> {
    vec![
        (vec![7, 45], Axis::Tensor, |_| 0),
        (vec![6, 5, 3, 3], Axis::First, |i| i / 45),
        (vec![30, 19], Axis::Last, |i| i % 19),
    ]
}

#[test]
fn values_are_those_of_the_grid_for_every_number_of_bits() {
    for bits in 2..=8 {
        for (dims, axis, channel) in layouts() {
            let x = drawn(bits, &dims).affine(3.0, 0.2).unwrap();
            let channels = match axis {
                Axis::Tensor => 1,
                Axis::First => dims[0],
                Axis::Last => dims[1],
            };
            let scales: Vec<f32> = (0..channels).map(|c| 0.01 + 0.03 * c as f32).collect();
            // Activations have a zero point, weights are symmetric.
            let grid = match axis {
                Axis::Tensor => IntGrid::asymmetric(IntType::U8).with_bits(bits),
                _ => IntGrid::symmetric(IntType::S8).with_bits(bits),
            };
            let zero = if axis == Axis::Tensor { 1 } else { 0 };
            let how = FakeQuantize { axis, zero, limits: grid.limits(), learn: None };
            let scale = Tensor::new(scales.clone(), &Device::Cpu).unwrap();
            let found = flat(&fake_quantize(&x, &scale, how).unwrap());
            for (i, (found, x)) in found.iter().zip(flat(&x)).enumerate() {
                let params = QParams { scale: scales[channel(i)], zero_point: zero };
                assert_eq!(*found, params.dequantize(grid.quantize(params, x)), "{bits} bits, {axis:?}, {x}");
            }
        }
    }
}

#[test]
fn grids_of_fewer_bits_have_fewer_codes() {
    let (u8s, s8) = (IntGrid::asymmetric(IntType::U8), IntGrid::symmetric(IntType::S8));
    for (bits, unsigned, signed) in [(8, (0, 255), (-127, 127)), (4, (0, 15), (-7, 7)), (2, (0, 3), (-1, 1))] {
        assert_eq!((u8s.with_bits(bits).limits(), s8.with_bits(bits).limits()), (unsigned, signed));
    }
    assert_eq!(IntGrid::asymmetric(IntType::S8).with_bits(4).limits(), (-8, 7));
    assert_eq!(IntGrid { symmetric: true, ..u8s.with_bits(4) }.params(Range { lo: -1.0, hi: 1.0 }).zero_point, 8);
}

/// Gradients in f64 by the definitions: straight through within the grid; of the scale by LSQ's equation 3.
#[test]
fn gradients_are_those_of_the_papers() {
    for (dims, axis, channel) in layouts() {
        for learn in [None, Some(0.125)] {
            let x = Var::from_tensor(&drawn(5, &dims).affine(2.0, 0.0).unwrap()).unwrap();
            let channels = match axis {
                Axis::Tensor => 1,
                Axis::First => dims[0],
                Axis::Last => dims[1],
            };
            let scales: Vec<f32> = (0..channels).map(|c| 0.11 + 0.01 * c as f32).collect();
            let scale = Var::from_tensor(&Tensor::new(scales.clone(), &Device::Cpu).unwrap()).unwrap();
            let how = FakeQuantize { axis, zero: 2, limits: (0, 15), learn };
            let y = fake_quantize(x.as_tensor(), scale.as_tensor(), how).unwrap();
            let weights = drawn(6, &dims);
            let grads = (&y * &weights).unwrap().sum_all().unwrap().backward().unwrap();
            let (mut passed, mut slopes) = (Vec::new(), vec![0f64; channels]);
            for (i, (x, g)) in flat(x.as_tensor()).into_iter().zip(flat(&weights)).enumerate() {
                let v = f64::from(x / scales[channel(i)]);
                let inside = match learn {
                    None => (-2.0..=13.0).contains(&v.round_ties_even()),
                    Some(_) => (-2.0..=13.0).contains(&v),
                };
                passed.push(if inside { g } else { 0.0 });
                let slope = match v {
                    v if v < -2.0 => -2.0,
                    v if v > 13.0 => 13.0,
                    v => v.round_ties_even() - v,
                };
                slopes[channel(i)] += slope * f64::from(g) * learn.unwrap_or(0.0);
            }
            assert!(passed.contains(&0.0) && passed.iter().any(|&g| g != 0.0), "the case shows both sides");
            assert_eq!(flat(grads.get(&x).unwrap()), passed, "{axis:?} {learn:?}");
            let found = grads.get(&scale).map(flat);
            match learn {
                None => assert_eq!(found, None),
                Some(_) => {
                    for (a, b) in found.unwrap().iter().zip(&slopes) {
                        assert!((f64::from(*a) - b).abs() <= 1e-4 * b.abs().max(1.0), "{axis:?}: {a} {b}");
                    }
                }
            }
        }
    }
}

/// With the values' rounding held fixed, the scale's gradient is the slope of y in s: a finite difference shows it.
#[test]
fn the_gradient_of_a_scale_is_a_slope_where_values_are_cut_off() {
    let x = Tensor::new(&[5.0f32, 7.5, -3.0, -9.0], &Device::Cpu).unwrap();
    let how = FakeQuantize { axis: Axis::Tensor, zero: 4, limits: (0, 15), learn: Some(1.0) };
    let value = |s: f32| {
        let y = fake_quantize(&x, &Tensor::new(&[s], &Device::Cpu).unwrap(), how).unwrap();
        flat(&y).iter().map(|&v| f64::from(v)).sum::<f64>()
    };
    let scale = Var::from_tensor(&Tensor::new(&[0.25f32], &Device::Cpu).unwrap()).unwrap();
    let y = fake_quantize(&x, scale.as_tensor(), how).unwrap().sum_all().unwrap();
    let found = flat(y.backward().unwrap().get(&scale).unwrap())[0];
    let slope = (value(0.2505) - value(0.2495)) / 0.001;
    assert!((f64::from(found) - slope).abs() < 1e-2 && found != 0.0, "{found} {slope}");
}

#[test]
fn scales_that_do_not_fit_are_refused() {
    let scale = Tensor::new(&[1f32, 2.0], &Device::Cpu).unwrap();
    for axis in [Axis::Tensor, Axis::First, Axis::Last] {
        let how = FakeQuantize { axis, zero: 0, limits: (-7, 7), learn: None };
        assert!(fake_quantize(&drawn(1, &[3, 5]), &scale, how).is_err(), "{axis:?}");
    }
}

#[test]
fn adamw_and_plain_descent_are_candle_nns() {
    use candle_nn::Optimizer as _;
    for (method, decay) in [(Method::AdamW { decay: 0.1 }, 0.1), (Method::Sgd, 0.0)] {
        let [ours, theirs] = [1, 1].map(|seed| Var::from_tensor(&drawn(seed, &[5, 7])).unwrap());
        let group = Group { name: "w".into(), var: ours.clone(), rate: 1.0, channels: None, decays: true };
        let mut own = Optimizer::new(vec![group], method);
        let params = candle_nn::ParamsAdamW { lr: 0.01, weight_decay: decay, ..Default::default() };
        let mut adam = candle_nn::AdamW::new(vec![theirs.clone()], params).unwrap();
        let mut plain = candle_nn::SGD::new(vec![theirs.clone()], 0.01).unwrap();
        for step in 0..20 {
            let loss = |v: &Var| (v.as_tensor().sqr().unwrap() * drawn(step, &[5, 7])).unwrap().sum_all().unwrap();
            own.step(&loss(&ours).backward().unwrap(), 0.01).unwrap();
            let grads = loss(&theirs).backward().unwrap();
            if method == Method::Sgd { plain.step(&grads).unwrap() } else { adam.step(&grads).unwrap() }
        }
        let apart = super::difference(ours.as_tensor(), theirs.as_tensor());
        assert!(apart < 1e-5, "{method:?}: {apart}");
        assert!(super::difference(ours.as_tensor(), &drawn(1, &[5, 7])) > 1e-2, "{method:?} moved");
    }
}

#[test]
fn channels_move_by_their_share_of_the_rate() {
    for (axis, channel) in [(Axis::First, [0, 0, 0, 1, 1, 1]), (Axis::Last, [0, 1, 0, 1, 0, 1])] {
        let dims = if axis == Axis::First { [2, 3] } else { [3, 2] };
        let var = Var::from_tensor(&drawn(1, &dims)).unwrap();
        let before = super::flat(var.as_tensor());
        let channels = Some((axis, vec![1.0, 0.01]));
        let group = Group { name: "w".into(), var: var.clone(), rate: 1.0, channels, decays: false };
        let loss = (var.as_tensor() * drawn(2, &dims)).unwrap().sum_all().unwrap();
        Optimizer::new(vec![group], Method::AdamW { decay: 0.0 }).step(&loss.backward().unwrap(), 0.5).unwrap();
        for ((new, old), channel) in super::flat(var.as_tensor()).iter().zip(before).zip(channel) {
            // The first step of Adam has one length.
            let wanted = [0.5, 0.005][channel];
            assert!(((new - old).abs() / wanted - 1.0).abs() < 0.01, "{axis:?}: {old} to {new}");
        }
    }
}

#[test]
fn the_learning_rate_rises_and_falls() {
    let rates: Vec<f64> = (0..100).map(|step| cosine(step, 10, 100)).collect();
    assert!(rates[..10].windows(2).all(|w| w[0] < w[1]) && (rates[9] - 1.0).abs() < 1e-12);
    assert!(rates[10..].windows(2).all(|w| w[0] > w[1]) && rates[99] < 1e-3);
    assert!((cosine(55, 10, 100) - 0.5).abs() < 1e-12);
}
