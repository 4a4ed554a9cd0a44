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

/// As [`super::under_scales`] has it.
pub(super) fn under_scales(input: &AlgoInput, scales: &[f32]) -> Result<(QTensor, Vec<f64>)> {
    let mut tensor = rows::quantize(input, Method::Plain)?;
    let one = input.spec.granularity == Granularity::Tensor;
    match &tensor.scales {
        ScaleData::Float(own) if own.len() == scales.len() && (one || own.len() == input.shape[0]) => {}
        _ => return Err(input.refuse(format!("{} scales are given, its spec has others", scales.len()))),
    }
    tensor.scales = ScaleData::Float(scales.to_vec());
    let (rule, k) = (Rule::new(input.spec), input.shape[1].max(1));
    let mut codes = std::mem::take(&mut tensor.codes);
    for (row, (codes, weight)) in codes.chunks_mut(k).zip(input.weight.chunks(k)).enumerate() {
        let line = Line::of(&tensor, row, 0);
        codes.iter_mut().zip(weight).for_each(|(code, &w)| *code = line.nearest(&rule, w).0);
    }
    tensor.codes = codes;
    let damping = if one { DAMPING_UNDER_ONE_SCALE } else { DAMPING };
    let Some((calibrated, feedback)) = factor(input, damping) else {
        let errors = errors(input, &tensor, None);
        return Ok((tensor, errors));
    };
    let tensor = recode(input, tensor, &feedback);
    let h = calibrated.damped(&feedback);
    let tensor = match &h {
        Some(h) if one => descent::refine(input, tensor, h),
        _ => tensor,
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
    let [n, k] = input.shape;
    let rule = Rule::new(input.spec);
    let mut codes = std::mem::take(&mut tensor.codes);
    let mut values = std::mem::take(&mut tensor.outliers.values);
    let starts = std::mem::take(&mut tensor.outliers.row_start);
    // Every thread gets some; rows don't depend on those they are walked through with.
    let together = n.div_ceil(4 * rayon::current_num_threads()).next_multiple_of(4).min(ROWS);
    let batch = (together * k).max(1);
    // What each row keeps beside the grid, cut up as the rows are.
    let mut kept: Vec<&mut [f16]> = Vec::with_capacity(n.div_ceil(together.max(1)));
    let mut rest = values.as_mut_slice();
    for first in (0..n).step_by(together.max(1)) {
        let last = (first + together).min(n);
        let count = match starts.as_slice() {
            [] => 0,
            starts => (starts[last] - starts[first]) as usize,
        };
        let (own, after) = std::mem::take(&mut rest).split_at_mut(count);
        kept.push(own);
        rest = after;
    }
    let size = input.spec.group_size(k).max(1);
    let places: Vec<Place> =
        feedback.order.iter().map(|&col| Place { col: col as usize, group: col as usize / size }).collect();
    let work = codes.par_chunks_mut(batch).zip(input.weight.par_chunks(batch)).zip(kept);
    work.enumerate().for_each(|(at, ((codes, weight), kept))| {
        let first = at * together;
        let outliers = |row: usize| match starts.as_slice() {
            [] => 0..0,
            starts => starts[first + row] as usize..starts[first + row + 1] as usize,
        };
        let cols = &tensor.outliers.cols;
        let rows = weight.len() / k;
        let groups = tensor.groups();
        let lines: Vec<Line> = (0..rows * groups).map(|i| Line::of(&tensor, first + i / groups, i % groups)).collect();
        let held: Vec<Vec<Option<u32>>> = (0..rows)
            .map(|row| {
                let mut held = vec![None; if starts.is_empty() { 0 } else { k }];
                let from = outliers(0).start;
                outliers(row).for_each(|i| held[cols[i] as usize] = Some((i - from) as u32));
                held
            })
            .collect();
        let places = &places;
        let mut batch = Batch { rule: &rule, feedback, places, lines, groups, k, codes, kept, free: true };
        batch.choose(weight, &held);
    });
    tensor.codes = codes;
    tensor.outliers.values = values;
    tensor.outliers.row_start = starts;
    tensor
}

/// A column as the walk comes to it, and its group.
#[derive(Clone, Copy)]
struct Place {
    col: usize,
    group: usize,
}

/// What turns the codes of a group into values.
#[derive(Clone, Copy)]
pub(super) struct Line {
    scale: f32,
    /// One over it.
    by: f32,
    min: f32,
    zero: i32,
}

impl Line {
    /// Of a row's group.
    #[inline(always)]
    pub(super) fn of(tensor: &QTensor, row: usize, g: usize) -> Line {
        Line::new(tensor.scale(row, g), tensor.min(row, g), tensor.zero(row, g))
    }

    #[inline(always)]
    fn new(scale: f32, min: f32, zero: i32) -> Line {
        Line { scale, by: inverse(scale), min, zero }
    }

    /// The code whose value is nearest to `best`, and that value.
    #[inline(always)]
    pub(super) fn nearest(self, rule: &Rule, best: f32) -> (u8, f32) {
        match &rule.table {
            Some(table) => {
                let code = table.code(best * self.by);
                (code, self.scale * table.level(code))
            }
            None => {
                let shift = (rule.middle - self.zero) as f32;
                let y = ((best - self.min) * self.by).round_ties_even().clamp(rule.low + shift, rule.high + shift);
                ((y as i32 + self.zero) as u8, self.scale * y + self.min)
            }
        }
    }

    /// What a code means.
    #[inline(always)]
    fn value(self, rule: &Rule, code: u8) -> f32 {
        match &rule.table {
            Some(table) => self.scale * table.level(code),
            None => self.scale * (code as i32 - self.zero) as f32 + self.min,
        }
    }
}

/// Some rows.
struct Batch<'a> {
    rule: &'a Rule,
    feedback: &'a Feedback,
    places: &'a [Place],
    /// (rows, groups)
    lines: Vec<Line>,
    groups: usize,
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
            placed.iter_mut().zip(self.places).for_each(|(to, place)| *to = row[place.col]);
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

    /// The code at a row and place, or the nearest one to `best`, and its value.
    #[inline(always)]
    fn value(&mut self, row: usize, place: Place, best: f32) -> f32 {
        let line = self.lines[row * self.groups + place.group];
        let code = &mut self.codes[row * self.k + place.col];
        if !self.free {
            return line.value(self.rule, *code);
        }
        let (nearest, value) = line.nearest(self.rule, best);
        *code = nearest;
        value
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
        let Some(&place) = self.batch.places.get(at) else { return best };
        let Some(Some(i)) = self.held[row].get(place.col) else { return self.batch.value(row, place, best) };
        // An outlier's code stays, and its value makes up for everything.
        let free = std::mem::replace(&mut self.batch.free, false);
        let on_grid = self.batch.value(row, place, best);
        self.batch.free = free;
        let kept = &mut self.batch.kept[*i as usize];
        let missing = f16::from_f32(best - on_grid);
        if free && missing.is_finite() {
            *kept = missing;
        }
        on_grid + kept.to_f32()
    }
}
