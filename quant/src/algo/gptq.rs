//! GPTQ (arXiv 2210.17323): each column's rounding error is made up for by the columns that are rounded after it.
//!
//! Scales, zero points and minimums are searched for first, weighted by second moments, and stored, second level and
//! all ("static groups"); only codes are chosen anew, under those numbers, columns of large second moments first. A row
//! that this makes worse in its own measure, d H d^T with H = E[x x^T], keeps the codes of the search.

use super::fit::{Method, Rule, inverse, lanes};
use super::grid::{Even, Grid, Uneven};
use super::{AlgoInput, descent, rows};
use crate::error::Result;
use crate::linalg::{Decide, Dense, Feedback, ROWS};
use crate::stats::Input;
use crate::{Granularity, QTensor, ScaleData};
use half::f16;
use nibble_kernels::simd::{LANES, Simd};
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
    let together = n.div_ceil(4 * rayon::current_num_threads()).next_multiple_of(LANES).min(ROWS);
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
        let cols = match starts.as_slice() {
            [] => Vec::new(),
            starts => {
                let row = |r: usize| &tensor.outliers.cols[starts[r] as usize..starts[r + 1] as usize];
                (first..first + weight.len() / k).map(row).collect()
            }
        };
        let (rows, groups) = (weight.len() / k, tensor.groups());
        let line = |i: usize| Line::of(&tensor, first + i / groups, i % groups);
        let lines: Vec<Line> = (0..rows * groups).map(line).collect();
        let batch = Batch { rule: &rule, feedback, places: &places, lines: &lines, groups, k, rows, weight };
        batch.choose(codes, kept, &Beside::new(&cols, k));
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

/// Rows that are walked through together.
struct Batch<'a> {
    rule: &'a Rule,
    feedback: &'a Feedback,
    places: &'a [Place],
    /// (rows, groups)
    lines: &'a [Line],
    groups: usize,
    k: usize,
    rows: usize,
    /// (rows, k)
    weight: &'a [f32],
}

impl Batch<'_> {
    /// Chooses codes, and the values that are kept beside them. Both stay as they are in a row that would be worse, without
    /// damping.
    fn choose(&self, codes: &mut [u8], kept: &mut [f16], beside: &Beside) {
        let Batch { feedback, k, .. } = *self;
        let weights = self.placed(|row, place| self.weight[row * k + place.col]);
        let searched = self.placed(|row, place| {
            let on_grid = self.lines[row * self.groups + place.group].value(self.rule, codes[row * k + place.col]);
            beside.at(row, place.col).map_or(on_grid, |i| on_grid + kept[i].to_f32())
        });
        let mut errors = vec![[0f32; LANES]; weights.len()];
        let (mut new, mut new_kept) = (codes.to_vec(), kept.to_vec());
        let mut free = Free { batch: self, lots: self.lots(), beside, codes: &mut new, kept: &mut new_kept };
        let after = feedback.run(&weights, &mut errors, &mut free);
        let damping = |row: usize, values: &dyn Fn(usize) -> f32| {
            let first = row / LANES * feedback.padded();
            let squares = (first..first + feedback.padded()).map(|at| f64::from(values(at)).powi(2));
            f64::from(feedback.damping) * squares.sum::<f64>()
        };
        // What the searched row comes to with its damping, where it is as good as the new one.
        let bound = |row: usize| {
            let lane = row % LANES;
            let new = after[row / LANES][lane] - damping(row, &|at| errors[at][lane]);
            new + damping(row, &|at| weights[at][lane] - searched[at][lane])
        };
        let bounds: Vec<f64> = (0..self.rows).map(bound).collect();
        let mut searched = Searched { values: &searched, padded: feedback.padded(), bounds: &bounds };
        let before = feedback.run(&weights, &mut errors, &mut searched);
        for (row, bound) in bounds.iter().enumerate() {
            if before[row / LANES][row % LANES] >= *bound {
                codes[row * k..(row + 1) * k].copy_from_slice(&new[row * k..(row + 1) * k]);
                beside.of(row).for_each(|i| kept[i] = new_kept[i]);
            }
        }
    }

    /// One number of each row and place: (lots, padded), zeros as padding.
    fn placed(&self, number: impl Fn(usize, Place) -> f32) -> Vec<[f32; LANES]> {
        let padded = self.feedback.padded();
        let mut placed = vec![[0f32; LANES]; self.rows.div_ceil(LANES) * padded];
        for row in 0..self.rows {
            for (lanes, place) in placed[row / LANES * padded..].iter_mut().zip(self.places) {
                lanes[row % LANES] = number(row, *place);
            }
        }
        placed
    }

    /// (lots, groups)
    fn lots(&self) -> Vec<Lot> {
        let mut lots = vec![Lot::default(); self.rows.div_ceil(LANES) * self.groups];
        for (i, line) in self.lines.iter().enumerate() {
            let (row, g) = (i / self.groups, i % self.groups);
            lots[row / LANES * self.groups + g].set(row % LANES, *line);
        }
        lots
    }
}

/// Which values lie beside the grid, those of some rows in one list.
struct Beside<'a> {
    cols: &'a [&'a [u32]],
    /// (lots, k), index in the list; empty if there are none.
    index: Vec<[u32; LANES]>,
    k: usize,
}

impl<'a> Beside<'a> {
    const NONE: u32 = u32::MAX;

    /// Of rows of `k` columns; `cols` are the columns of each, empty if no row keeps any.
    fn new(cols: &'a [&'a [u32]], k: usize) -> Self {
        let mut index = vec![[Self::NONE; LANES]; cols.len().div_ceil(LANES) * k];
        let all = cols.iter().enumerate().flat_map(|(row, cols)| cols.iter().map(move |col| (row, *col as usize)));
        for (i, (row, col)) in all.enumerate() {
            index[row / LANES * k + col][row % LANES] = i as u32;
        }
        Beside { cols, index, k }
    }

    fn at(&self, row: usize, col: usize) -> Option<usize> {
        let i = self.index.get(row / LANES * self.k + col)?[row % LANES];
        (i != Self::NONE).then_some(i as usize)
    }

    /// Those of a row.
    fn of(&self, row: usize) -> std::ops::Range<usize> {
        let before: usize = self.cols.iter().take(row).map(|cols| cols.len()).sum();
        before..before + self.cols.get(row).map_or(0, |cols| cols.len())
    }
}

/// The lines of a group of 16 rows.
#[derive(Clone, Copy, Default)]
struct Lot {
    scale: [f32; LANES],
    by: [f32; LANES],
    min: [f32; LANES],
    zero: [i32; LANES],
}

impl Lot {
    fn set(&mut self, lane: usize, line: Line) {
        (self.scale[lane], self.by[lane], self.min[lane], self.zero[lane]) = (line.scale, line.by, line.min, line.zero);
    }

    /// [`Line::nearest`] of each.
    #[inline(always)]
    fn nearest<S: Simd>(&self, s: S, rule: &Rule, best: S::F32) -> (S::I32, S::F32) {
        let y = s.mul(s.sub(best, s.load(&self.min)), s.load(&self.by));
        let (code, level) = match &rule.table {
            Some(table) => {
                let grid = Uneven::new(s, table);
                let code = grid.code(s, y);
                (code, grid.level_of(s, code))
            }
            None => {
                let grid = Even::each(s, (rule.low, rule.high), rule.middle, s.load_i32(&self.zero));
                let code = grid.code(s, y);
                (code, grid.level_of(s, code))
            }
        };
        (code, s.add(s.mul(s.load(&self.scale), level), s.load(&self.min)))
    }
}

/// Takes the nearest codes.
struct Free<'a> {
    batch: &'a Batch<'a>,
    /// (lots, groups)
    lots: Vec<Lot>,
    beside: &'a Beside<'a>,
    codes: &'a mut [u8],
    kept: &'a mut [f16],
}

impl Decide for Free<'_> {
    #[inline(always)]
    fn decide<S: Simd>(&mut self, s: S, lot: usize, at: usize, best: S::F32) -> S::F32 {
        let Batch { rule, places, groups, k, rows, .. } = *self.batch;
        // Padding.
        let Some(&place) = places.get(at) else { return best };
        let (code, value) = self.lots[lot * groups + place.group].nearest(s, rule, best);
        let mut codes = [0i32; LANES];
        s.store_i32(code, &mut codes);
        let first = lot * LANES;
        if !self.beside.index.is_empty() {
            return self.with_kept(s, lot, place, (best, value), &codes);
        }
        for (row, code) in (first..rows.min(first + LANES)).zip(codes) {
            self.codes[row * k + place.col] = code as u8;
        }
        value
    }
}

impl Free<'_> {
    /// The same where some rows keep a value: its code stays, and it makes up for everything.
    #[inline(always)]
    fn with_kept<S: Simd>(
        &mut self,
        s: S,
        lot: usize,
        place: Place,
        (best, value): (S::F32, S::F32),
        codes: &[i32; LANES],
    ) -> S::F32 {
        let Batch { rule, groups, k, rows, lines, .. } = *self.batch;
        let (bests, mut values) = (lanes(s, best), lanes(s, value));
        for (lane, row) in (lot * LANES..rows.min((lot + 1) * LANES)).enumerate() {
            let own = &mut self.codes[row * k + place.col];
            let Some(i) = self.beside.at(row, place.col) else {
                *own = codes[lane] as u8;
                continue;
            };
            let on_grid = lines[row * groups + place.group].value(rule, *own);
            let missing = f16::from_f32(bests[lane] - on_grid);
            if missing.is_finite() {
                self.kept[i] = missing;
            }
            values[lane] = on_grid + self.kept[i].to_f32();
        }
        s.load(&values)
    }
}

/// Takes the values that there are, until all rows of a lot are worse than their bounds.
struct Searched<'a> {
    /// (lots, padded)
    values: &'a [[f32; LANES]],
    padded: usize,
    bounds: &'a [f64],
}

impl Decide for Searched<'_> {
    #[inline(always)]
    fn decide<S: Simd>(&mut self, s: S, lot: usize, at: usize, _best: S::F32) -> S::F32 {
        s.load(&self.values[lot * self.padded + at])
    }

    fn goes_on(&self, lot: usize, totals: &[f64; LANES]) -> bool {
        self.bounds[lot * LANES..].iter().zip(totals).any(|(bound, total)| total < bound)
    }
}
