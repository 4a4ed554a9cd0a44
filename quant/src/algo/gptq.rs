//! GPTQ (arXiv 2210.17323): each column's rounding error is made up for by the columns that are rounded after it.
//!
//! Scales, zero points and minimums are searched for first, weighted by second moments, and stored, second level and
//! all ("static groups"); only codes are chosen anew, under those numbers, columns of large second moments first. A row
//! that this makes worse in its own measure, d H d^T with H = E[x x^T], keeps the codes of the search.

use super::fit::{Method, Rule, inverse};
use super::{AlgoInput, descent, rows};
use crate::error::Result;
use crate::linalg::{Decide, Dense, Feedback, ROWS};
use crate::stats::Input;
use crate::{Granularity, QTensor, ScaleData};
use half::f16;
use rayon::prelude::*;
use std::sync::Arc;

/// What is added to the diagonal of H, as a share of its mean: the texts that a model meets differ from the one that it
/// was calibrated on, and more damping trusts that one less. See benches/QUALITY.md.
pub(super) const DAMPING: f32 = 0.2;
/// The same under one scale for a whole tensor: its small channels have few codes, and much to make up for. See
/// benches/RESCUE.md.
const DAMPING_UNDER_ONE_SCALE: f32 = 0.05;

/// Quantizes by search, then chooses codes again; without a Gram matrix, and where it has no factor, the search stands.
pub(super) fn quantize(input: &AlgoInput) -> Result<QTensor> {
    let tensor = rows::quantize(input, Method::Search)?;
    match factor(input, DAMPING) {
        Some((_, feedback)) => Ok(recode(input, tensor, &feedback)),
        None => Ok(tensor),
    }
}

/// The same, and then [`descent`].
pub(super) fn quantize_and_descend(input: &AlgoInput) -> Result<QTensor> {
    let tensor = rows::quantize(input, Method::Search)?;
    let Some((calibrated, feedback)) = factor(input, DAMPING) else { return Ok(tensor) };
    let tensor = recode(input, tensor, &feedback);
    match calibrated.damped(&feedback) {
        Some(h) => Ok(descent::refine(input, tensor, &h)),
        None => Ok(tensor),
    }
}

/// As [`super::under_scale`] has it.
pub(super) fn under_scale(input: &AlgoInput, scale: f32) -> Result<(QTensor, Vec<f64>)> {
    let mut tensor = rows::quantize(input, Method::Plain)?;
    let one = matches!(&tensor.scales, ScaleData::Float(scales) if scales.len() == 1);
    if input.spec.granularity != Granularity::Tensor || !one {
        return Err(input.refuse("a scale is given, and its spec has more than one".into()));
    }
    tensor.scales = ScaleData::Float(vec![scale]);
    let (rule, zero) = (Rule::new(input.spec), tensor.zero(0, 0));
    for (code, &w) in tensor.codes.iter_mut().zip(input.weight) {
        *code = nearest(&rule, w, scale, 0.0, zero).0;
    }
    let Some((calibrated, feedback)) = factor(input, DAMPING_UNDER_ONE_SCALE) else {
        let errors = errors(input, &tensor, None);
        return Ok((tensor, errors));
    };
    let tensor = recode(input, tensor, &feedback);
    let h = calibrated.damped(&feedback);
    let tensor = match &h {
        Some(h) => descent::refine(input, tensor, h),
        None => tensor,
    };
    let errors = errors(input, &tensor, h.as_ref());
    Ok((tensor, errors))
}

/// d H d^T of each row; H is the identity if there is none.
fn errors(input: &AlgoInput, tensor: &QTensor, h: Option<&Dense>) -> Vec<f64> {
    let k = input.shape[1].max(1);
    let d: Vec<f32> = input.weight.iter().zip(tensor.dequantize()).map(|(w, q)| w - q).collect();
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    let row = |d: &[f32]| match h {
        Some(h) => (0..k).map(|j| f64::from(d[j]) * dot(&h.row(j)[..k], d)).sum(),
        None => dot(d, d),
    };
    d.chunks_exact(k).map(row).collect()
}

fn factor<'a>(input: &AlgoInput<'a>, damping: f32) -> Option<(&'a Input, Arc<Feedback>)> {
    let calibrated = input.calibrated.filter(|c| c.width() == input.shape[1])?;
    Some((calibrated, calibrated.feedback(damping)?))
}

/// Codes chosen again under a tensor's numbers.
fn recode(input: &AlgoInput, mut tensor: QTensor, feedback: &Feedback) -> QTensor {
    let k = input.shape[1];
    let rule = Rule::new(input.spec);
    let mut codes = std::mem::take(&mut tensor.codes);
    let mut values = std::mem::take(&mut tensor.outliers.values);
    let starts = std::mem::take(&mut tensor.outliers.row_start);
    let batch = (ROWS * k).max(1);
    // What each row keeps beside the grid, cut up as the rows are.
    let mut kept: Vec<&mut [f16]> = Vec::with_capacity(input.shape[0].div_ceil(ROWS));
    let mut rest = values.as_mut_slice();
    for first in (0..input.shape[0]).step_by(ROWS) {
        let last = (first + ROWS).min(input.shape[0]);
        let count = match starts.as_slice() {
            [] => 0,
            starts => (starts[last] - starts[first]) as usize,
        };
        let (own, after) = std::mem::take(&mut rest).split_at_mut(count);
        kept.push(own);
        rest = after;
    }
    let work = codes.par_chunks_mut(batch).zip(input.weight.par_chunks(batch)).zip(kept);
    work.enumerate().for_each(|(at, ((codes, weight), kept))| {
        let first = at * ROWS;
        let outliers = |row: usize| match starts.as_slice() {
            [] => 0..0,
            starts => starts[first + row] as usize..starts[first + row + 1] as usize,
        };
        let cols = &tensor.outliers.cols;
        let mut group = Batch { tensor: &tensor, rule: &rule, feedback, first, k, codes, kept, free: true };
        let held: Vec<Vec<Option<u32>>> = (0..weight.len() / k)
            .map(|row| {
                let mut held = vec![None; if starts.is_empty() { 0 } else { k }];
                let from = outliers(0).start;
                outliers(row).for_each(|i| held[cols[i] as usize] = Some((i - from) as u32));
                held
            })
            .collect();
        group.choose(weight, &held);
    });
    tensor.codes = codes;
    tensor.outliers.values = values;
    tensor.outliers.row_start = starts;
    tensor
}

/// Up to four rows.
struct Batch<'a> {
    tensor: &'a QTensor,
    rule: &'a Rule,
    feedback: &'a Feedback,
    first: usize,
    k: usize,
    codes: &'a mut [u8],
    /// Values of the outliers of all these rows.
    kept: &'a mut [f16],
    free: bool,
}

impl Batch<'_> {
    /// `held` has the index in `kept` of each column that is an outlier; empty if the tensor has none.
    fn choose(&mut self, weight: &[f32], held: &[Vec<Option<u32>>]) {
        let (k, padded) = (self.k, self.feedback.padded());
        let rows = weight.len() / k;
        let mut placed = vec![0f32; rows * padded];
        for (placed, row) in placed.chunks_mut(padded).zip(weight.chunks(k)) {
            placed.iter_mut().zip(&self.feedback.order).for_each(|(to, col)| *to = row[*col as usize]);
        }
        let mut errors = vec![0f32; rows * padded];
        let damping = self.feedback.damping as f64;
        let undamped =
            |total: f64, errors: &[f32]| total - damping * errors.iter().map(|e| *e as f64 * *e as f64).sum::<f64>();
        self.free = false;
        let before = self.feedback.run(&placed, &mut errors, &mut Chooser { batch: self, held });
        let before: Vec<f64> = errors.chunks(padded).zip(before).map(|(e, total)| undamped(total, e)).collect();
        let searched = (self.codes.to_vec(), self.kept.to_vec());
        self.free = true;
        let after = self.feedback.run(&placed, &mut errors, &mut Chooser { batch: self, held });
        for (row, (errors, total)) in errors.chunks(padded).zip(after).enumerate() {
            if undamped(total, errors) > before[row] {
                self.codes[row * k..(row + 1) * k].copy_from_slice(&searched.0[row * k..(row + 1) * k]);
                for i in held[row].iter().flatten() {
                    self.kept[*i as usize] = searched.1[*i as usize];
                }
            }
        }
    }

    /// The code at a row and column, or the nearest one to `best`, and its value.
    #[inline(always)]
    fn value(&mut self, row: usize, col: usize, best: f32) -> f32 {
        let g = col / self.tensor.spec.group_size(self.k);
        let r = self.first + row;
        let (scale, min) = (self.tensor.scale(r, g), self.tensor.min(r, g));
        let zero = self.tensor.zero(r, g);
        let code = &mut self.codes[row * self.k + col];
        if self.free {
            *code = nearest(self.rule, best, scale, min, zero).0;
        }
        match &self.rule.table {
            Some(table) => scale * table.level(*code),
            None => scale * (*code as i32 - zero) as f32 + min,
        }
    }
}

/// The code whose value is nearest to `best`, and that value.
#[inline(always)]
pub(super) fn nearest(rule: &Rule, best: f32, scale: f32, min: f32, zero: i32) -> (u8, f32) {
    match &rule.table {
        Some(table) => {
            let code = table.code(best * inverse(scale));
            (code, scale * table.level(code))
        }
        None => {
            let shift = (rule.middle - zero) as f32;
            let y = ((best - min) * inverse(scale)).round_ties_even().clamp(rule.low + shift, rule.high + shift);
            ((y as i32 + zero) as u8, scale * y + min)
        }
    }
}

/// What the walk asks at every place.
struct Chooser<'a, 'b> {
    batch: &'a mut Batch<'b>,
    held: &'a [Vec<Option<u32>>],
}

impl Decide for Chooser<'_, '_> {
    #[inline(always)]
    fn decide(&mut self, row: usize, at: usize, best: f32) -> f32 {
        // Padding.
        let Some(&col) = self.batch.feedback.order.get(at) else { return best };
        let col = col as usize;
        let Some(Some(i)) = self.held[row].get(col) else { return self.batch.value(row, col, best) };
        // An outlier's code stays, and its value makes up for everything.
        let free = std::mem::replace(&mut self.batch.free, false);
        let on_grid = self.batch.value(row, col, best);
        self.batch.free = free;
        let kept = &mut self.batch.kept[*i as usize];
        let missing = f16::from_f32(best - on_grid);
        if free && missing.is_finite() {
            *kept = missing;
        }
        on_grid + kept.to_f32()
    }
}
