//! What GPTQ leaves, lowered one number at a time: d H d^T, d = w - q, falls with every step.
//!
//! GPTQ settles each column once, and the columns after it make up for its error. Here any code may be changed again, and
//! so may a group's stored scale, as long as the error of the row falls:
//! ```text
//! g = H d          a value of column j moved by D changes the error by  D^2 H[j][j] - 2 D g[j]
//!                  a scale moved by D, u its group's levels, by         D^2 u H u - 2 D u g
//! ```
//! The best D of a code leads to a level near it, that of a scale to a neighbouring stored scale. Sweeps over codes and
//! scales take turns until one changes nothing.

use super::AlgoInput;
use super::fit::{Rule, inverse};
use crate::linalg::Dense;
use crate::{FloatFormat, Granularity, QTensor, ScaleData, ScaleFormat};
use nibble_kernels::Isa;
use nibble_kernels::simd::{self, Simd, SimdOp, add_multiple, dot};
use rayon::prelude::*;

/// Most sweeps over a row; the error hardly changes after the first few.
const SWEEPS: usize = 6;

/// Rows whose first H d are made together.
const TOGETHER: usize = 16;

/// Lowers the error of every row of `tensor`, as `h` measures it.
pub(super) fn refine(input: &AlgoInput, mut tensor: QTensor, h: &Dense) -> QTensor {
    let k = input.shape[1];
    if k == 0 {
        return tensor;
    }
    let rule = Rule::new(input.spec);
    let mut codes = std::mem::take(&mut tensor.codes);
    let together = TOGETHER * k;
    let batches = codes.par_chunks_mut(together).zip(input.weight.par_chunks(together)).enumerate();
    let isa = Isa::best();
    let scales: Vec<Vec<Scale>> = batches
        .flat_map_iter(|(at, (codes, w))| {
            let parts = codes.chunks_mut(k).zip(w.chunks(k)).enumerate();
            let mut rows: Vec<Row> =
                parts.map(|(r, (codes, w))| Row::new(&tensor, &rule, h, at * TOGETHER + r, codes, w)).collect();
            let d: Vec<f32> = rows.iter().flat_map(|row| &row.d).copied().collect();
            for (row, g) in rows.iter_mut().zip(h.products(&d).chunks(k)) {
                row.g.copy_from_slice(g);
                simd::dispatch(isa, Sweeps { row });
            }
            rows.into_iter().map(|row| row.scales)
        })
        .collect();
    tensor.codes = codes;
    store(&mut tensor, scales.into_iter().flatten());
    tensor
}

/// Sweeps over all rows where rows make up for each other too.
const ROUNDS: usize = 3;

/// The same for tr(G D H D^T): with the errors of the other rows as they are, a row is moved by what it has to make up for
/// them, `sum over r of G[i][r] / G[i][i] d[r]`.
pub(super) fn refine_both(input: &AlgoInput, mut tensor: QTensor, h: &Dense, g: &Dense) -> QTensor {
    let k = input.shape[1];
    if k == 0 {
        return tensor;
    }
    let rule = Rule::new(input.spec);
    let mut codes = std::mem::take(&mut tensor.codes);
    let isa = Isa::best();
    let parts = codes.chunks_mut(k).zip(input.weight.chunks(k)).enumerate();
    let mut rows: Vec<Row> = parts.map(|(r, (codes, w))| Row::new(&tensor, &rule, h, r, codes, w)).collect();
    for _ in 0..ROUNDS {
        let mut changed = false;
        for r in 0..rows.len() {
            let ties = g.row(r);
            let mut shift = vec![0f32; k];
            simd::dispatch(isa, Shift { shift: &mut shift, rows: &rows, ties, r });
            let row = &mut rows[r];
            row.d.iter_mut().zip(&shift).for_each(|(d, s)| *d += s);
            row.g = h.products(&row.d);
            changed |= simd::dispatch(isa, Sweeps { row });
            row.d.iter_mut().zip(&shift).for_each(|(d, s)| *d -= s);
        }
        if !changed {
            break;
        }
    }
    let scales: Vec<Scale> = rows.into_iter().flat_map(|row| row.scales).collect();
    tensor.codes = codes;
    store(&mut tensor, scales.into_iter());
    tensor
}

/// tr(G D H D^T), the sum over rows of `(sum over r of G[i][r] d[r]) H d[i]`.
pub(super) fn error_on_both_sides(input: &AlgoInput, tensor: &QTensor, h: &Dense, g: &Dense) -> f64 {
    let k = input.shape[1].max(1);
    let back = tensor.dequantize();
    let d: Vec<f32> = input.weight.iter().zip(&back).map(|(w, q)| w - q).collect();
    let isa = Isa::best();
    let rows: Vec<f64> = d
        .par_chunks(k)
        .enumerate()
        .map(|(r, own)| simd::dispatch(isa, RowError { own, d: &d, ties: g.row(r), h }))
        .collect();
    rows.iter().sum()
}

struct RowError<'a> {
    own: &'a [f32],
    /// All rows.
    d: &'a [f32],
    ties: &'a [f32],
    h: &'a Dense,
}

impl SimdOp for RowError<'_> {
    type Output = f64;

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> f64 {
        let k = self.own.len();
        let mut tied = vec![0f32; k];
        for (row, tie) in self.d.chunks(k).zip(self.ties) {
            add_multiple(s, &mut tied, row, *tie);
        }
        let moved = tied.iter().enumerate().map(|(j, t)| *t as f64 * dot(s, self.h.row(j), self.own) as f64);
        moved.sum()
    }
}

/// What the errors of other rows ask of row `r`.
struct Shift<'a, 'b> {
    shift: &'a mut [f32],
    rows: &'a [Row<'b>],
    ties: &'a [f32],
    r: usize,
}

impl SimdOp for Shift<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let by = inverse(self.ties[self.r]);
        for (at, (row, tie)) in self.rows.iter().zip(self.ties).enumerate() {
            if at != self.r {
                add_multiple(s, self.shift, &row.d, tie * by);
            }
        }
    }
}

fn store(tensor: &mut QTensor, stored: impl Iterator<Item = Scale>) {
    if tensor.spec.granularity != Granularity::Tensor {
        match &mut tensor.scales {
            ScaleData::Float(values) => values.iter_mut().zip(stored).for_each(|(to, s)| *to = s.value),
            ScaleData::Coded { codes, .. } => codes.iter_mut().zip(stored).for_each(|(to, s)| *to = s.code),
            ScaleData::Dynamic { .. } => {}
        }
    }
}

/// A group's scale, and how it is stored.
#[derive(Clone, Copy)]
struct Scale {
    value: f32,
    code: i16,
    /// The second-level scale; 0 where the scale is a float.
    unit: f32,
}

/// What a group's scale may become.
enum Stored {
    /// Any value of a float format.
    Float(FloatFormat),
    /// A code of this range times the unit.
    Coded(i16, i16),
    /// Nothing else: it is shared with other rows.
    Fixed,
}

struct Row<'a> {
    rule: &'a Rule,
    h: &'a Dense,
    size: usize,
    stored: Stored,
    scales: Vec<Scale>,
    mins: Vec<f32>,
    zeros: Vec<i32>,
    codes: &'a mut [u8],
    /// Columns whose value isn't on the grid, which keep their code.
    off_grid: Vec<bool>,
    /// w - q.
    d: Vec<f32>,
    /// H d.
    g: Vec<f32>,
}

impl<'a> Row<'a> {
    fn new(tensor: &QTensor, rule: &'a Rule, h: &'a Dense, r: usize, codes: &'a mut [u8], w: &[f32]) -> Row<'a> {
        let (k, groups, spec) = (w.len(), tensor.groups(), &tensor.spec);
        let second = |g: usize| match &tensor.scales {
            ScaleData::Coded { codes, second } => {
                (codes[r * groups + g], second[r * spec.spans(k) + g / spec.span_groups(k)])
            }
            _ => (0, 0.0),
        };
        let scale = |g: usize| {
            let (code, unit) = second(g);
            Scale { value: tensor.scale(r, g), code, unit }
        };
        let stored = match spec.scale {
            _ if spec.granularity == Granularity::Tensor => Stored::Fixed,
            ScaleFormat::Float(float) => Stored::Float(float),
            ScaleFormat::Coded { .. } => match spec.scale_codes() {
                Some(range) => Stored::Coded(*range.start(), *range.end()),
                None => Stored::Fixed,
            },
            ScaleFormat::Dynamic { .. } => Stored::Fixed,
        };
        let mut row = Row {
            rule,
            h,
            size: spec.group_size(k),
            stored,
            scales: (0..groups).map(scale).collect(),
            mins: (0..groups).map(|g| tensor.min(r, g)).collect(),
            zeros: (0..groups).map(|g| tensor.zero(r, g)).collect(),
            codes,
            off_grid: vec![false; k],
            d: vec![0.0; k],
            g: vec![0.0; k],
        };
        for j in 0..k {
            row.d[j] = w[j] - row.value(j, row.codes[j]);
        }
        for (col, value) in tensor.row_outliers(r) {
            row.off_grid[col] = true;
            row.d[col] -= value.to_f32();
        }
        row
    }

    #[inline(always)]
    fn level(&self, j: usize, code: u8) -> f32 {
        self.rule.level(code, self.zeros[j / self.size])
    }

    #[inline(always)]
    fn value(&self, j: usize, code: u8) -> f32 {
        let g = j / self.size;
        self.scales[g].value * self.level(j, code) + self.mins[g]
    }

    /// The code whose value is nearest.
    #[inline(always)]
    fn nearest(&self, j: usize, value: f32) -> u8 {
        let g = j / self.size;
        let y = (value - self.mins[g]) * inverse(self.scales[g].value);
        match &self.rule.table {
            Some(table) => table.code(y),
            None => {
                let zero = self.zeros[g];
                let shift = (self.rule.middle - zero) as f32;
                let y = y.round_ties_even().clamp(self.rule.low + shift, self.rule.high + shift);
                (y as i32 + zero) as u8
            }
        }
    }

    /// Moves the value of column j.
    #[inline(always)]
    fn step<S: Simd>(&mut self, s: S, j: usize, by: f32) {
        self.d[j] -= by;
        add_multiple(s, &mut self.g, self.h.row(j), -by);
    }

    /// One sweep over codes; whether one has changed.
    #[inline(always)]
    fn sweep_codes<S: Simd>(&mut self, s: S) -> bool {
        let mut changed = false;
        for j in 0..self.codes.len() {
            if self.off_grid[j] {
                continue;
            }
            let (old, hjj) = (self.codes[j], self.h.row(j)[j]);
            let now = self.value(j, old);
            let code = self.nearest(j, now + self.g[j] / hjj);
            let by = self.value(j, code) - now;
            if code != old && falls(by, hjj, self.g[j]) {
                self.codes[j] = code;
                self.step(s, j, by);
                changed = true;
            }
        }
        changed
    }

    /// One sweep over scales; whether one has changed.
    #[inline(always)]
    fn sweep_scales<S: Simd>(&mut self, s: S) -> bool {
        let mut changed = false;
        for g in 0..self.scales.len() {
            let cols = g * self.size..((g + 1) * self.size).min(self.codes.len());
            let levels: Vec<f32> = cols.clone().map(|j| self.level(j, self.codes[j])).collect();
            let pull = dot(s, &levels, &self.g[cols.clone()]);
            let stiff: f32 =
                cols.clone().zip(&levels).map(|(j, l)| l * dot(s, &levels, &self.h.row(j)[cols.clone()])).sum();
            let old = self.scales[g];
            let best = old.value + pull / stiff;
            let new = match self.stored {
                Stored::Float(float) => Scale { value: float.round(best), ..old },
                Stored::Coded(low, high) => {
                    let code = (best * inverse(old.unit)).round_ties_even().clamp(low as f32, high as f32) as i16;
                    Scale { value: code as f32 * old.unit, code, ..old }
                }
                Stored::Fixed => return false,
            };
            let by = new.value - old.value;
            // A scale of another sign would turn the levels around, one of zero could never change again.
            if new.value.is_finite() && new.value * old.value > 0.0 && falls(by, stiff, pull) {
                self.scales[g] = new;
                cols.zip(&levels).for_each(|(j, level)| self.step(s, j, by * level));
                changed = true;
            }
        }
        changed
    }
}

/// Whether a step `by` lowers the error, by more than rounding could feign.
#[inline(always)]
fn falls(by: f32, stiff: f32, pull: f32) -> bool {
    by * by * stiff - 2.0 * by * pull < -1e-4 * by * by * stiff
}

/// Changes what lowers the error of a row whose `g` is H d; whether anything has changed.
struct Sweeps<'a, 'b> {
    row: &'a mut Row<'b>,
}

impl SimdOp for Sweeps<'_, '_> {
    type Output = bool;

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> bool {
        let row = self.row;
        let mut changed = false;
        for _ in 0..SWEEPS {
            let codes = row.sweep_codes(s);
            if !row.sweep_scales(s) && !codes {
                break;
            }
            changed = true;
        }
        changed
    }
}
