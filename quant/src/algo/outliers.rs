//! Which values stay outside of the grid.

use super::fit::Method;
use super::rows;
use super::{AlgoInput, error};
use crate::error::Result;
use crate::{OutlierSpec, QTensor, QuantSpec};
use nibble_kernels::simd::Scalar;
use rayon::prelude::*;

/// Rows that one sum over columns takes: fixed, so that the sum doesn't depend on threads.
const BLOCK_ROWS: usize = 64;

/// The outliers of a tensor, as far as rows share them.
pub(super) enum Kept {
    None,
    PerGroup(usize),
    Columns(Vec<u32>),
}

/// How a row's outliers are chosen.
#[derive(Clone, Copy)]
pub(super) enum Choice<'a> {
    None,
    /// These columns.
    Columns(&'a [u32]),
    /// This many a group that weigh most.
    Largest(usize),
    /// This many a group whose error is largest if all are quantized.
    Worst(usize),
}

/// One way to quantize a row.
#[derive(Clone, Copy)]
pub(super) struct Way<'a> {
    pub(super) choice: Choice<'a>,
    pub(super) method: Method,
}

impl Kept {
    /// Chooses what rows share: the columns whose error under plain rounding is largest.
    pub(super) fn choose(input: &AlgoInput) -> Result<Kept> {
        match input.spec.outliers {
            OutlierSpec::None => Ok(Kept::None),
            OutlierSpec::PerGroup(count) => Ok(Kept::PerGroup(count)),
            OutlierSpec::Columns { .. } => {
                let spec = QuantSpec { outliers: OutlierSpec::None, ..input.spec.clone() };
                let plain = rows::quantize(&AlgoInput { spec: &spec, ..*input }, Method::Plain)?;
                let errors = column_errors(input, &plain);
                let count = input.spec.outlier_columns(input.shape[1]);
                Ok(Kept::Columns(largest(count, 0..errors.len(), |i| errors[i])))
            }
        }
    }

    /// The ways to try for each row: the plain method is always among them.
    pub(super) fn ways(&self, method: Method) -> Vec<Way<'_>> {
        let choices = match self {
            Kept::None => vec![Choice::None],
            Kept::Columns(cols) => vec![Choice::Columns(cols)],
            Kept::PerGroup(count) if method == Method::Plain => vec![Choice::Largest(*count)],
            Kept::PerGroup(count) => vec![Choice::Largest(*count), Choice::Worst(*count)],
        };
        let mut ways = vec![Way { choice: choices[0], method: Method::Plain }];
        if method != Method::Plain {
            ways.extend(choices.into_iter().map(|choice| Way { choice, method }));
        }
        ways
    }

    /// The `count` columns a group of largest `score`, ascending.
    pub(super) fn worst(x: &[f32], spec: &QuantSpec, count: usize, score: impl Fn(usize) -> f32) -> Vec<u32> {
        let size = spec.group_size(x.len());
        let groups = (0..x.len()).step_by(size).map(|start| start..x.len().min(start + size));
        groups.flat_map(|group| largest(count, group, |i| score(i) as f64)).collect()
    }
}

/// Weighted error of each column, summed in f64 in blocks of rows.
fn column_errors(input: &AlgoInput, quantized: &QTensor) -> Vec<f64> {
    let k = input.shape[1];
    let blocks: Vec<Vec<f64>> = input
        .weight
        .par_chunks((BLOCK_ROWS * k).max(1))
        .enumerate()
        .map(|(block, rows)| {
            let (mut sums, mut weights, mut q) = (vec![0f64; k], vec![0f32; k], vec![0f32; k]);
            for (r, x) in rows.chunks(k).enumerate() {
                error::row_weights(Scalar, input, x, &mut weights);
                quantized.dequantize_row(block * BLOCK_ROWS + r, &mut q);
                for (((sum, x), q), w) in sums.iter_mut().zip(x).zip(&q).zip(&weights) {
                    *sum += *w as f64 * (*x as f64 - *q as f64).powi(2);
                }
            }
            sums
        })
        .collect();
    let mut total = vec![0f64; k];
    for block in blocks {
        total.iter_mut().zip(block).for_each(|(total, sum)| *total += sum);
    }
    total
}

/// The `count` indices of largest score, ascending; of equal ones the first.
fn largest(count: usize, indices: std::ops::Range<usize>, score: impl Fn(usize) -> f64) -> Vec<u32> {
    let mut ranked: Vec<(f64, u32)> = indices.map(|i| (score(i), i as u32)).collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut cols: Vec<u32> = ranked.into_iter().take(count).map(|(_, col)| col).collect();
    cols.sort_unstable();
    cols
}
