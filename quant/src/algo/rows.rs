//! A tensor row by row: fit, store, code, over the few ways that are tried for each row.

use super::fit::{Group, Levels, Method, Rule, inverse, refit_min};
use super::grid::{Even, Grid, Uneven};
use super::outliers::{Choice, Kept};
use super::second::{Dynamic, Numbers};
use super::{AlgoInput, assemble, error};
use crate::error::Result;
use crate::{Granularity, QTensor, ScaleFormat, Zero};
use half::f16;
use nibble_kernels::Isa;
use nibble_kernels::simd::{self, LANES, Simd, SimdOp};
use rayon::prelude::*;

/// Groups whose errors are summed before their sums are.
const SUMMED: usize = 16;

/// What is stored for one row beside its codes.
#[derive(Debug, Clone, Default)]
pub(super) struct Row {
    pub(super) scales: Numbers,
    pub(super) mins: Numbers,
    pub(super) zeros: Vec<u8>,
    /// Columns of the outliers, ascending.
    pub(super) outliers: Vec<u32>,
    /// What is added there.
    pub(super) values: Vec<f16>,
    /// Weighted error without the outliers.
    pub(super) error: f64,
}

/// Quantizes a tensor by one method, and never worse than by the plain one.
pub(super) fn quantize(input: &AlgoInput, method: Method) -> Result<QTensor> {
    input.check()?;
    let kept = Kept::choose(input)?;
    let context = Context { input, rule: Rule::new(input.spec), kept };
    let tensor = context.attempt(method)?;
    match input.spec.scale {
        // Rows share numbers: only whole tensors compare.
        ScaleFormat::Dynamic { .. } if method != Method::Plain => {
            let plain = context.attempt(Method::Plain)?;
            let error = |rows: &[Row]| rows.iter().map(|row| row.error).sum::<f64>();
            let better = if error(&plain.1) < error(&tensor.1) { plain } else { tensor };
            Ok(assemble::tensor(input, better.0, better.1, better.2))
        }
        _ => Ok(assemble::tensor(input, tensor.0, tensor.1, tensor.2)),
    }
}

/// What all rows share.
pub(super) struct Context<'a> {
    pub(super) input: &'a AlgoInput<'a>,
    pub(super) rule: Rule,
    kept: Kept,
}

/// Codes, rows, and the scales of the whole tensor where it shares them.
type Attempt = (Vec<u8>, Vec<Row>, Option<Dynamic>);

impl Context<'_> {
    fn attempt(&self, method: Method) -> Result<Attempt> {
        let input = self.input;
        // One group a tensor is one long row.
        let (count, width) = match input.spec.granularity {
            Granularity::Tensor => (input.shape[0].min(1), input.weight.len()),
            _ => (input.shape[0], input.shape[1]),
        };
        let mut codes = vec![0u8; input.weight.len()];
        let mut rows = vec![Row::default(); count];
        if width == 0 {
            return Ok((codes, rows, None));
        }
        let isa = Isa::best();
        let each = |codes: &mut Vec<u8>, rows: &mut Vec<Row>, stage: Stage| -> Result<()> {
            let work = codes.par_chunks_mut(width).zip(input.weight.par_chunks(width)).zip(rows.par_iter_mut());
            let outcomes: Vec<_> = work
                .map_init(Scratch::default, |scratch, ((codes, x), row)| {
                    simd::dispatch(isa, RowOp { context: self, stage, x, codes, row, scratch })
                })
                .collect();
            let refused = outcomes.into_iter().enumerate().find_map(|(r, outcome)| outcome.err().map(|why| (r, why)));
            refused.map_or(Ok(()), |(r, why)| Err(input.refuse(format!("row {r}: {why}"))))
        };
        each(&mut codes, &mut rows, Stage::Fit(method))?;
        let ScaleFormat::Dynamic { blocks } = input.spec.scale else { return Ok((codes, rows, None)) };
        let mut scales: Vec<f32> = rows.iter().flat_map(|row| row.scales.values.iter().copied()).collect();
        let dynamic = Dynamic::store(&mut scales, blocks);
        let mut stored = scales.into_iter();
        rows.iter_mut().flat_map(|row| &mut row.scales.values).zip(&mut stored).for_each(|(to, from)| *to = from);
        each(&mut codes, &mut rows, Stage::Recode(method))?;
        Ok((codes, rows, Some(dynamic)))
    }
}

/// What is to be done with a row.
#[derive(Clone, Copy)]
enum Stage {
    /// All of it; dynamic scales stay in full precision.
    Fit(Method),
    /// The rest of it once the tensor's dynamic scales are stored.
    Recode(Method),
}

/// Buffers of one thread, reused from row to row.
#[derive(Default)]
struct Scratch {
    weights: Vec<f32>,
    /// Values and weights with zeros in the places of outliers.
    x: Vec<f32>,
    w: Vec<f32>,
    levels: Levels,
    codes: Vec<u8>,
}

/// One row, for any instruction set.
struct RowOp<'a> {
    context: &'a Context<'a>,
    stage: Stage,
    x: &'a [f32],
    codes: &'a mut [u8],
    row: &'a mut Row,
    scratch: &'a mut Scratch,
}

impl SimdOp for RowOp<'_> {
    type Output = std::result::Result<(), String>;

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> Self::Output {
        let RowOp { context, stage, x, codes, row, scratch } = self;
        scratch.weights.resize(x.len(), 0.0);
        scratch.codes.resize(x.len(), 0);
        error::row_weights(s, context.input, x, &mut scratch.weights);
        match stage {
            Stage::Fit(method) => *row = context.best_row(s, x, method, codes, scratch)?,
            Stage::Recode(method) => {
                let group = left(x, &scratch.weights, &row.outliers, &mut scratch.x, &mut scratch.w);
                // bitsandbytes rounds scales after it has taken the codes; the plain method is held to its bytes.
                row.error = match method {
                    Method::Plain => context.row_error(x, group.w, row, codes),
                    _ => context.code(s, x, group.w, row, codes),
                };
            }
        }
        row.values = context.outlier_values(x, row, codes)?;
        Ok(())
    }
}

/// A row and its weights, with zeros in the places of outliers; `zeroed` are buffers for that.
#[inline(always)]
fn left<'a>(
    x: &'a [f32],
    w: &'a [f32],
    outliers: &[u32],
    zeroed_x: &'a mut Vec<f32>,
    zeroed_w: &'a mut Vec<f32>,
) -> Group<'a> {
    if outliers.is_empty() {
        return Group { x, w };
    }
    for (from, to) in [(x, &mut *zeroed_x), (w, &mut *zeroed_w)] {
        to.clear();
        to.extend_from_slice(from);
        outliers.iter().for_each(|&col| to[col as usize] = 0.0);
    }
    Group { x: zeroed_x, w: zeroed_w }
}

impl Context<'_> {
    /// The best of the ways that a row is tried in.
    #[inline(always)]
    fn best_row<S: Simd>(
        &self,
        s: S,
        x: &[f32],
        method: Method,
        codes: &mut [u8],
        scratch: &mut Scratch,
    ) -> std::result::Result<Row, String> {
        let mut best: Option<Row> = None;
        for way in self.kept.ways(method) {
            let outliers = match way.choice {
                Choice::None => Vec::new(),
                Choice::Columns(cols) => cols.to_vec(),
                Choice::Largest(count) => Kept::worst(x, self.input.spec, count, |i| scratch.weights[i] * x[i] * x[i]),
                Choice::Worst(count) => {
                    let Scratch { weights, levels, codes: all, .. } = &mut *scratch;
                    let row = self.row(s, x, Group { x, w: weights }, way.method, all, levels)?;
                    let off = |i| weights[i] * (x[i] - self.value(&row, x.len(), i, all[i])).powi(2);
                    Kept::worst(x, self.input.spec, count, off)
                }
            };
            let Scratch { weights, x: zeroed_x, w: zeroed_w, levels, codes: tried } = &mut *scratch;
            let group = left(x, weights, &outliers, zeroed_x, zeroed_w);
            let row = self.row(s, x, group, way.method, tried, levels)?;
            if best.as_ref().is_none_or(|best| row.error < best.error) {
                codes.copy_from_slice(tried);
                best = Some(Row { outliers, ..row });
            }
        }
        Ok(best.unwrap_or_default())
    }

    /// Fits, stores and codes one row by one method; `left` is what isn't an outlier.
    #[inline(always)]
    fn row<S: Simd>(
        &self,
        s: S,
        x: &[f32],
        left: Group,
        method: Method,
        codes: &mut [u8],
        levels: &mut Levels,
    ) -> std::result::Result<Row, String> {
        let (spec, k) = (self.input.spec, x.len());
        let size = spec.group_size(k);
        let mut row = Row { scales: Numbers::of(k.div_ceil(size)), ..Row::default() };
        let groups = || left.x.chunks(size).zip(left.w.chunks(size)).map(|(x, w)| Group { x, w });
        for group in groups() {
            let fit = self.rule.fit(s, group, method, levels);
            row.scales.push(fit.scale, fit.scale_cost);
            match spec.zero {
                Zero::Min => row.mins.push(fit.min, fit.min_cost),
                Zero::Int => row.zeros.push(fit.zero as u8),
                Zero::Symmetric | Zero::FullRange => {}
            }
        }
        row.scales.store(s, spec, k, self.rule.signed, method)?;
        if spec.zero == Zero::Min {
            if method == Method::Search {
                for (group, (&scale, min)) in groups().zip(row.scales.values.iter().zip(&mut row.mins.values)) {
                    *min = refit_min(s, &self.rule, group, scale, *min);
                }
            }
            row.mins.store(s, spec, k, false, method)?;
        }
        row.error = self.code(s, x, left.w, &row, codes);
        Ok(row)
    }

    /// Nearest codes under the stored numbers, and their weighted error: 16 running sums in f32 over a few groups, those
    /// in f64.
    #[inline(always)]
    fn code<S: Simd>(&self, s: S, x: &[f32], w: &[f32], row: &Row, codes: &mut [u8]) -> f64 {
        let size = self.input.spec.group_size(x.len());
        let (mut total, mut error) = (0.0, s.splat(0.0));
        for (g, ((x, w), codes)) in x.chunks(size).zip(w.chunks(size)).zip(codes.chunks_mut(size)).enumerate() {
            let line = (row.scales.values[g], row.mins.values.get(g).copied().unwrap_or(0.0));
            error = match &self.rule.table {
                Some(table) => code_group(s, Uneven::new(s, table), Group { x, w }, line, codes, error),
                None => {
                    let (low, high, zero) = self.rule.ends(row.zeros.get(g).copied());
                    code_group(s, Even::new(s, low, high, zero), Group { x, w }, line, codes, error)
                }
            };
            if g % SUMMED == SUMMED - 1 {
                total += s.sum(error) as f64;
                error = s.splat(0.0);
            }
        }
        total + s.sum(error) as f64
    }

    /// What code `code` at column `i` of a row of `k` means.
    #[inline(always)]
    fn value(&self, row: &Row, k: usize, i: usize, code: u8) -> f32 {
        let g = i / self.input.spec.group_size(k);
        let zero = row.zeros.get(g).map_or(self.rule.middle, |&zero| zero as i32);
        row.scales.values[g] * self.rule.level(code, zero) + row.mins.values.get(g).copied().unwrap_or(0.0)
    }

    /// Weighted error of codes that stay as they are.
    fn row_error(&self, x: &[f32], w: &[f32], row: &Row, codes: &[u8]) -> f64 {
        let off = |i: usize| x[i] - self.value(row, x.len(), i, codes[i]);
        (0..x.len()).map(|i| (w[i] * off(i) * off(i)) as f64).sum()
    }

    /// What the outliers add to what their codes give.
    fn outlier_values(&self, x: &[f32], row: &Row, codes: &[u8]) -> std::result::Result<Vec<f16>, String> {
        let one = |&col: &u32| {
            let i = col as usize;
            let missing = x[i] - self.value(row, x.len(), i, codes[i]);
            let value = f16::from_f32(missing);
            if value.is_finite() { Ok(value) } else { Err(format!("outlier {missing} at column {i} is beyond f16")) }
        };
        row.outliers.iter().map(one).collect()
    }
}

/// Codes of a group; their weighted error is added to `error`.
#[inline(always)]
fn code_group<S: Simd, G: Grid<S>>(
    s: S,
    grid: G,
    group: Group,
    (scale, min): (f32, f32),
    codes: &mut [u8],
    mut error: S::F32,
) -> S::F32 {
    let (by, scale, min) = (s.splat(inverse(scale)), s.splat(scale), s.splat(min));
    let mut wide = [0i32; LANES];
    for ((x, w), codes) in group.x.chunks(LANES).zip(group.w.chunks(LANES)).zip(codes.chunks_mut(LANES)) {
        let (x, w) = (s.load_partial(x), s.load_partial(w));
        let code = grid.code(s, s.mul(s.sub(x, min), by));
        let off = s.sub(x, s.fma(scale, grid.level_of(s, code), min));
        // Past the group's end weights are 0.
        error = s.fma(s.mul(w, off), off, error);
        s.store_i32(code, &mut wide);
        for (code, &wide) in codes.iter_mut().zip(&wide) {
            *code = wide as u8;
        }
    }
    error
}
