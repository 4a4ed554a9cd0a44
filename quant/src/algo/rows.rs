//! A tensor row by row: fit, store, code, over the few ways that are tried for each row.

use super::fit::{Group, Method, Rule, refit_min};
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
    /// Values and weights with outliers as zeros.
    x: Vec<f32>,
    w: Vec<f32>,
    levels: Vec<f32>,
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
        let size = context.input.spec.group_size(x.len()).min(x.len());
        for buffer in [&mut scratch.weights, &mut scratch.x, &mut scratch.w] {
            buffer.resize(x.len(), 0.0);
        }
        scratch.levels.resize(size, 0.0);
        scratch.codes.resize(x.len(), 0);
        error::row_weights(s, context.input, x, &mut scratch.weights);
        match stage {
            Stage::Fit(method) => *row = context.best_row(s, x, method, codes, scratch)?,
            Stage::Recode(method) => {
                scratch.leave_out(x, &row.outliers);
                // bitsandbytes rounds scales after it has taken the codes; the plain method is held to its bytes.
                if method != Method::Plain {
                    context.code(s, x, row, codes);
                }
                row.error = context.row_error(x, &scratch.w, row, codes);
            }
        }
        row.values = context.outlier_values(x, row, codes)?;
        Ok(())
    }
}

impl Scratch {
    fn leave_out(&mut self, x: &[f32], outliers: &[u32]) {
        self.x.copy_from_slice(x);
        self.w.copy_from_slice(&self.weights);
        for &col in outliers {
            self.x[col as usize] = 0.0;
            self.w[col as usize] = 0.0;
        }
    }
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
                    scratch.leave_out(x, &[]);
                    let mut all = std::mem::take(&mut scratch.codes);
                    let row = self.row(s, x, way.method, &mut all, scratch)?;
                    let off = |i| scratch.weights[i] * (x[i] - self.value(&row, x.len(), i, all[i])).powi(2);
                    let outliers = Kept::worst(x, self.input.spec, count, off);
                    scratch.codes = all;
                    outliers
                }
            };
            scratch.leave_out(x, &outliers);
            let mut tried = std::mem::take(&mut scratch.codes);
            let row = Row { outliers, ..self.row(s, x, way.method, &mut tried, scratch)? };
            if best.as_ref().is_none_or(|best| row.error < best.error) {
                codes.copy_from_slice(&tried);
                best = Some(row);
            }
            scratch.codes = tried;
        }
        Ok(best.unwrap_or_default())
    }

    /// Fits, stores and codes one row by one method, without the values that scratch leaves out.
    #[inline(always)]
    fn row<S: Simd>(
        &self,
        s: S,
        x: &[f32],
        method: Method,
        codes: &mut [u8],
        scratch: &mut Scratch,
    ) -> std::result::Result<Row, String> {
        let (spec, k) = (self.input.spec, x.len());
        let size = spec.group_size(k);
        let mut row = Row::default();
        let groups = || scratch.x.chunks(size).zip(scratch.w.chunks(size)).map(|(x, w)| Group { x, w });
        for group in groups() {
            let fit = self.rule.fit(s, group, method, &mut scratch.levels[..group.x.len()]);
            row.scales.push(fit.scale, fit.scale_cost);
            match spec.zero {
                Zero::Min => row.mins.push(fit.min, fit.min_cost),
                Zero::Int => row.zeros.push(fit.zero as u8),
                Zero::Symmetric | Zero::FullRange => {}
            }
        }
        row.scales.store(spec, k, self.rule.signed, method)?;
        if spec.zero == Zero::Min {
            if method == Method::Search {
                for (group, (&scale, min)) in groups().zip(row.scales.values.iter().zip(&mut row.mins.values)) {
                    *min = refit_min(s, &self.rule, group, scale, *min);
                }
            }
            row.mins.store(spec, k, false, method)?;
        }
        self.code(s, x, &row, codes);
        row.error = self.row_error(x, &scratch.w, &row, codes);
        Ok(row)
    }

    /// Nearest codes under the stored numbers.
    #[inline(always)]
    fn code<S: Simd>(&self, s: S, x: &[f32], row: &Row, codes: &mut [u8]) {
        let size = self.input.spec.group_size(x.len());
        for (g, (x, codes)) in x.chunks(size).zip(codes.chunks_mut(size)).enumerate() {
            let line = (row.scales.values[g], row.mins.values.get(g).copied().unwrap_or(0.0));
            match self.rule.table {
                Some(levels) => code_group(s, Uneven::new(s, &levels), x, line, codes),
                None => {
                    let (low, high, zero) = self.rule.ends(row.zeros.get(g).copied());
                    code_group(s, Even::new(s, low, high, zero), x, line, codes);
                }
            }
        }
    }

    /// What code `code` at column `i` of a row of `k` means.
    #[inline(always)]
    fn value(&self, row: &Row, k: usize, i: usize, code: u8) -> f32 {
        let g = i / self.input.spec.group_size(k);
        let level = match self.rule.table {
            Some(levels) => levels[code as usize & (LANES - 1)],
            None => (code as i32 - row.zeros.get(g).map_or(self.rule.middle, |&z| z as i32)) as f32,
        };
        row.scales.values[g] * level + row.mins.values.get(g).copied().unwrap_or(0.0)
    }

    /// Weighted error of a row: 16 running sums in f32 a group, groups in f64.
    #[inline(always)]
    fn row_error(&self, x: &[f32], w: &[f32], row: &Row, codes: &[u8]) -> f64 {
        let size = self.input.spec.group_size(x.len());
        let mut total = 0.0;
        for (g, ((x, w), codes)) in x.chunks(size).zip(w.chunks(size)).zip(codes.chunks(size)).enumerate() {
            let scale = row.scales.values[g];
            let min = row.mins.values.get(g).copied().unwrap_or(0.0);
            let zero = row.zeros.get(g).map_or(self.rule.middle, |&z| z as i32);
            let mut sums = [0f32; LANES];
            for ((x, w), codes) in x.chunks(LANES).zip(w.chunks(LANES)).zip(codes.chunks(LANES)) {
                for i in 0..x.len() {
                    let level = match self.rule.table {
                        Some(levels) => levels[codes[i] as usize & (LANES - 1)],
                        None => (codes[i] as i32 - zero) as f32,
                    };
                    let off = x[i] - (scale * level + min);
                    sums[i] += w[i] * off * off;
                }
            }
            total += sums.iter().map(|&s| s as f64).sum::<f64>();
        }
        total
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

#[inline(always)]
fn code_group<S: Simd, G: Grid<S>>(s: S, grid: G, x: &[f32], (scale, min): (f32, f32), codes: &mut [u8]) {
    let (by, min) = (s.splat(super::fit::inverse(scale)), s.splat(min));
    let mut wide = [0i32; LANES];
    for (x, codes) in x.chunks(LANES).zip(codes.chunks_mut(LANES)) {
        s.store_i32(grid.code(s, s.mul(s.sub(s.load_partial(x), min), by)), &mut wide);
        for (code, &wide) in codes.iter_mut().zip(&wide) {
            *code = wide as u8;
        }
    }
}
