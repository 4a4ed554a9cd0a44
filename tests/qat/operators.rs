//! Operators of one pass against candle's own, which are compositions, forward and back.

use super::{difference, drawn};
use candle_core::{D, Result, Tensor, Var};
use nibble_models::qat::ops::{self, BatchStatistics, ConvShape, Pooling};

/// Values and gradients of both forms over the same inputs.
fn agree(
    name: &str,
    inputs: &[Tensor],
    ours: impl Fn(&[Tensor]) -> Result<Tensor>,
    theirs: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let run = |f: &dyn Fn(&[Tensor]) -> Result<Tensor>| {
        let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
        let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let y = f(&tensors).unwrap();
        // A weighted sum, so that no gradient is the same everywhere.
        let weights = drawn(99, y.dims());
        let grads = (&y * weights).unwrap().sum_all().unwrap().backward().unwrap();
        let grads: Vec<Tensor> = vars.iter().map(|v| grads.get(v).unwrap().clone()).collect();
        (y, grads)
    };
    let (ours, theirs) = (run(&ours), run(&theirs));
    assert!(difference(&ours.0, &theirs.0) < 2e-5, "{name}: values differ by {}", difference(&ours.0, &theirs.0));
    for (i, (a, b)) in ours.1.iter().zip(&theirs.1).enumerate() {
        assert!(difference(a, b) < 1e-4, "{name}: gradients of input {i} differ by {}", difference(a, b));
    }
}

#[test]
fn softmax_gelu_clips_and_norms_are_candles() {
    for dims in [vec![3, 5], vec![2, 3, 16], vec![2, 33]] {
        let x = drawn(1, &dims).affine(4.0, 0.5).unwrap();
        let n = *dims.last().unwrap();
        agree(
            "softmax",
            std::slice::from_ref(&x),
            |x| ops::softmax(&x[0]),
            |x| candle_nn::ops::softmax(&x[0], D::Minus1),
        );
        agree("gelu", std::slice::from_ref(&x), |x| ops::gelu(&x[0]), |x| x[0].gelu_erf());
        agree("relu", std::slice::from_ref(&x), |x| ops::clamp(&x[0], 0.0, f32::INFINITY), |x| x[0].relu());
        let (k, width) = (n, 5);
        let inputs = [x.clone(), drawn(3, &[k, width]), drawn(4, &[width])];
        agree("product", &inputs[..2], |x| ops::linear(&x[0], &x[1], None), |x| x[0].broadcast_matmul(&x[1]));
        agree(
            "linear",
            &inputs,
            |x| ops::linear(&x[0], &x[1], Some(&x[2])),
            |x| x[0].broadcast_matmul(&x[1])?.broadcast_add(&x[2]),
        );
        agree("add rows", &[x.clone(), drawn(2, &[n])], |x| ops::add_rows(&x[0], &x[1]), |x| x[0].broadcast_add(&x[1]));
        agree(
            "layer norm",
            &[x, drawn(3, &[n]), drawn(4, &[n])],
            |x| ops::layer_norm(&x[0], &x[1], &x[2], 1e-5),
            |x| candle_nn::ops::layer_norm_slow(&x[0], &x[1], &x[2], 1e-5),
        );
    }
}

/// Batch norm written out; candle-nn's keeps its parameters to itself.
fn batch_norm(x: &[Tensor]) -> Result<Tensor> {
    let mean = x[0].mean_keepdim((0, 2, 3))?;
    let centred = x[0].broadcast_sub(&mean)?;
    let variance = centred.sqr()?.mean_keepdim((0, 2, 3))?;
    let u = centred.broadcast_div(&(variance + 1e-5)?.sqrt()?)?;
    u.broadcast_mul(&x[1].reshape((1, (), 1, 1))?)?.broadcast_add(&x[2].reshape((1, (), 1, 1))?)
}

#[test]
fn batch_norm_is_its_formula_and_frozen_statistics_are_a_factor() {
    let inputs = [drawn(1, &[4, 3, 5, 5]).affine(2.0, 0.7).unwrap(), drawn(2, &[3]), drawn(3, &[3])];
    agree("batch norm", &inputs, |x| Ok(ops::batch_norm(&x[0], &x[1], &x[2], None, 1e-5)?.0), batch_norm);
    let given = BatchStatistics { means: vec![0.5, -1.0, 2.0], variances: vec![1.0, 0.25, 4.0], count: 0 };
    let frozen = |x: &[Tensor]| Ok(ops::batch_norm(&x[0], &x[1], &x[2], Some(given.clone()), 0.0)?.0);
    let written = |x: &[Tensor]| {
        let of = |v: [f32; 3]| Tensor::new(&v, x[0].device())?.reshape((1, 3, 1, 1));
        let u = x[0].broadcast_sub(&of([0.5, -1.0, 2.0])?)?.broadcast_div(&of([1.0, 0.5, 2.0])?)?;
        u.broadcast_mul(&x[1].reshape((1, 3, 1, 1))?)?.broadcast_add(&x[2].reshape((1, 3, 1, 1))?)
    };
    agree("frozen batch norm", &inputs, frozen, written);
}

#[test]
fn convolutions_are_candles() {
    // Channels in and out, groups, kernel, step, padding, distance; pictures of 9 x 7. The last row is odd in every way.
    for (c, o, groups, kernel, step, pad, distance) in [
        (3, 5, 1, 3, 1, 1, 1),
        (4, 6, 1, 1, 1, 0, 1),
        (6, 6, 6, 3, 1, 1, 1),
        (6, 6, 6, 3, 2, 1, 1),
        (4, 6, 2, 3, 1, 1, 1),
        (2, 4, 1, 5, 1, 2, 1),
        (3, 3, 3, 3, 1, 2, 2),
        (2, 3, 1, 3, 1, 2, 2),
    ] {
        let inputs = [drawn(1, &[2, c, 9, 7]), drawn(2, &[o, c / groups, kernel, kernel])];
        let shape = ConvShape {
            kernel: [kernel; 2],
            strides: [step; 2],
            pads: [[pad; 2]; 2],
            dilations: [distance; 2],
            groups,
        };
        let name = format!("{shape:?}");
        agree(
            &name,
            &inputs,
            |x| ops::conv2d(&x[0], &x[1], None, shape),
            |x| x[0].conv2d(&x[1], pad, step, distance, groups),
        );
    }
    let shape = ConvShape { kernel: [3; 2], strides: [1; 2], pads: [[0; 2]; 2], dilations: [1; 2], groups: 1 };
    let biased = [drawn(1, &[2, 3, 5, 5]), drawn(2, &[4, 3, 3, 3]), drawn(3, &[4])];
    agree(
        "bias",
        &biased,
        |x| ops::conv2d(&x[0], &x[1], Some(&x[2]), shape),
        |x| x[0].conv2d(&x[1], 0, 1, 1, 1)?.broadcast_add(&x[2].reshape((1, 4, 1, 1))?),
    );
    for (dims, weight) in [([1, 3, 2, 2], [4, 3, 3, 3]), ([1, 3, 5, 5], [4, 2, 3, 3]), ([1, 3, 5, 5], [4, 3, 5, 3])] {
        assert!(ops::conv2d(&drawn(1, &dims), &drawn(2, &weight), None, shape).is_err(), "{dims:?} {weight:?}");
    }
}

/// A convolution whose step and padding differ by axis, against one of a padded picture.
#[test]
fn uneven_windows_are_those_of_a_padded_picture() {
    let shape = ConvShape { kernel: [3, 2], strides: [2, 1], pads: [[0, 1], [2, 0]], dilations: [1; 2], groups: 1 };
    let padded = ConvShape { pads: [[0; 2]; 2], ..shape };
    let pad = |x: &Tensor| x.pad_with_zeros(2, 0, 1)?.pad_with_zeros(3, 2, 0);
    for (groups, weight) in [(1, [4, 3, 3, 2]), (3, [3, 1, 3, 2])] {
        let (shape, padded) = (ConvShape { groups, ..shape }, ConvShape { groups, ..padded });
        let inputs = [drawn(1, &[2, 3, 7, 6]), drawn(2, &weight)];
        agree(
            "uneven",
            &inputs,
            |x| ops::conv2d(&x[0], &x[1], None, shape),
            |x| ops::conv2d(&pad(&x[0])?, &x[1], None, padded),
        );
    }
}

#[test]
fn pooling_is_candles() {
    let x = drawn(1, &[2, 3, 6, 8]);
    let shape = ConvShape { kernel: [2; 2], strides: [2; 2], pads: [[0; 2]; 2], dilations: [1; 2], groups: 1 };
    // candle's own pool gives the largest value a quarter of its gradient (0.11): here it is two reductions.
    let largest = |x: &[Tensor]| x[0].reshape((2, 3, 3, 2, 4, 2))?.max(5)?.max(3);
    agree("max", std::slice::from_ref(&x), |x| ops::pool2d(&x[0], shape, Pooling::Max), largest);
    agree(
        "mean",
        std::slice::from_ref(&x),
        |x| ops::pool2d(&x[0], shape, Pooling::Mean { padding: false }),
        |x| x[0].avg_pool2d(2),
    );
    // With zeros around the picture counted or not.
    let around = ConvShape { pads: [[1; 2]; 2], ..shape };
    let ones = x.ones_like().unwrap();
    let counted = ops::pool2d(&ones, around, Pooling::Mean { padding: true }).unwrap();
    let left_out = ops::pool2d(&ones, around, Pooling::Mean { padding: false }).unwrap();
    assert_eq!(super::flat(&left_out), vec![1.0; 2 * 3 * 4 * 5]);
    assert_eq!(super::flat(&counted)[..6], [0.25, 0.5, 0.5, 0.5, 0.25, 0.5]);
}
