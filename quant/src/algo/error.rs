//! The weighted error: how much each value's error counts.

use super::AlgoInput;
use nibble_kernels::simd::{LANES, Simd};
use rayon::prelude::*;

/// Writes the weight of each value of one row, or of all rows where they are one group, into `out`.
#[inline(always)]
pub(super) fn row_weights<S: Simd>(s: S, input: &AlgoInput, x: &[f32], out: &mut [f32]) {
    let k = input.shape[1].max(1);
    for (x, out) in x.chunks(k).zip(out.chunks_mut(k)) {
        weights(s, x, input.importance, out);
    }
}

/// Writes the weight of each value of a row into `out`: the column's second moment if it was observed, since the error
/// of an output is then `sum_j importance_j * error_j^2` for uncorrelated inputs.
///
/// Without one, large values count more, as `1 + |x| / sqrt(mean square of the row)`: outputs are dominated by them
/// where inputs are not alike.
#[inline(always)]
fn weights<S: Simd>(s: S, x: &[f32], importance: Option<&[f32]>, out: &mut [f32]) {
    if let Some(importance) = importance {
        out.copy_from_slice(importance);
        return;
    }
    let mut squares = s.splat(0.0);
    for x in x.chunks(LANES) {
        let x = s.load_partial(x);
        squares = s.fma(x, x, squares);
    }
    let by = s.splat(super::fit::inverse((s.sum(squares) / x.len().max(1) as f32).sqrt()));
    for (x, out) in x.chunks(LANES).zip(out.chunks_mut(LANES)) {
        s.store_partial(s.fma(s.abs(s.load_partial(x)), by, s.splat(1.0)), out);
    }
}

/// Sum over all rows, each in f64.
pub(super) fn total(input: &AlgoInput, quantized: &[f32]) -> f64 {
    assert_eq!(input.weight.len(), quantized.len(), "shape of the quantized values");
    let k = input.shape[1].max(1);
    let rows: Vec<f64> = input
        .weight
        .par_chunks(k)
        .zip(quantized.par_chunks(k))
        .map(|(x, q)| {
            let mut w = vec![0.0; x.len()];
            weights(nibble_kernels::simd::Scalar, x, input.importance, &mut w);
            x.iter().zip(q).zip(&w).map(|((x, q), w)| *w as f64 * (*x as f64 - *q as f64).powi(2)).sum()
        })
        .collect();
    rows.iter().sum()
}
