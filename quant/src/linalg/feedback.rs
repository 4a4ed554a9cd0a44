//! Rounding errors fed forward by a Cholesky factor, many rows at a time.

use super::{LANES, Symmetric, TILE};
use nibble_kernels::Isa;
use nibble_kernels::simd::{self, Simd, SimdOp};
use rayon::prelude::*;
use std::ops::Range;

/// Rows that are walked through together, at most: what is read of a large factor, which lies in memory, serves them all.
pub const ROWS: usize = 64;
/// Rows whose sums are in registers together.
pub(super) const SUMS: usize = 4;
/// Panels between whose columns errors are fed one by one; what those behind ask of them is summed before.
const BLOCK: usize = 8;
/// Errors of a row that are summed before the next row's turn.
const DEPTH: usize = 256;

/// How the error of a column is made up for by the columns that come after it.
///
/// With H = L L^T over columns in reverse order of processing, the value that is best for column a, given the errors
/// `d = w - q` of the columns b > a that came before it, is `w_a + sum_b d_b L[b][a] / L[a][a]`: the same numbers that
/// GPTQ (arXiv 2210.17323) takes from the Cholesky factor of H's inverse, without an inverse.
#[derive(Debug)]
pub struct Feedback {
    /// Original column of each place; the last place is processed first.
    pub order: Vec<u32>,
    /// What was added to the diagonal.
    pub damping: f32,
    /// (panels) each (padded width - 16 * panel, 16): row b - 16 * panel, lane a has `L[b][a] / L[a][a]`.
    pub(super) panels: Vec<Vec<f32>>,
    /// (padded width) `L[a][a]^2`.
    pub(super) pivots: Vec<f32>,
}

/// Decides about one value: given its place and what would be best there, what it becomes.
pub trait Decide {
    /// The value that place `at` of row `row` of the batch takes, where `best` would make up for all errors so far.
    fn decide(&mut self, row: usize, at: usize, best: f32) -> f32;
}

impl Feedback {
    /// Of `scale * M + damping * I`; `order` lists columns, the last one processed first. `None` if the matrix isn't
    /// positive definite, in f32 and then in f64.
    pub fn new(matrix: &Symmetric, order: Vec<u32>, scale: f32, damping: f32) -> Option<Feedback> {
        let l = matrix.cholesky(&order, scale, damping);
        let l = l.or_else(|| matrix.cholesky_in_f64(&order, scale, damping))?;
        let tiles = l.rows.len();
        let pivots: Vec<f32> = (0..tiles * LANES).map(|a| l.get(a, a)).collect();
        let panel = |j: usize| -> Vec<f32> {
            let mut panel = Vec::with_capacity((tiles - j) * TILE);
            for row in &l.rows[j..] {
                let tile = &row[j * TILE..(j + 1) * TILE];
                for r in 0..LANES {
                    panel.extend((0..LANES).map(|c| tile[c * LANES + r] / pivots[j * LANES + c]));
                }
            }
            panel
        };
        let panels = (0..tiles).into_par_iter().map(panel).collect();
        let pivots = pivots.iter().map(|p| p * p).collect();
        Some(Feedback { order, damping, panels, pivots })
    }

    /// Columns, padded to whole tiles.
    pub fn padded(&self) -> usize {
        self.pivots.len()
    }

    /// Goes through all places of up to [`ROWS`] rows, from the last to the first, and writes what is left of each value:
    /// `errors` = w - q. `weights` and `errors` are (rows, padded), by place. Gives each row's error d H d^T, damping
    /// included.
    pub fn run(&self, weights: &[f32], errors: &mut [f32], decide: &mut impl Decide) -> Vec<f64> {
        let rows = errors.len().checked_div(self.padded()).unwrap_or(0);
        let mut totals = vec![0f64; rows];
        let sums = &mut vec![0f32; rows * BLOCK * LANES];
        for first in (0..self.panels.len()).step_by(BLOCK).rev() {
            let block = first..(first + BLOCK).min(self.panels.len());
            sums.fill(0.0);
            simd::dispatch(Isa::best(), Behind { feedback: self, block: block.clone(), errors, sums });
            let totals = &mut totals;
            simd::dispatch(Isa::best(), Within { feedback: self, block, weights, errors, sums, totals, decide });
        }
        totals
    }
}

/// What the errors behind a block of panels ask of it: `sums` are (panels, rows, 16).
struct Behind<'a> {
    feedback: &'a Feedback,
    block: Range<usize>,
    errors: &'a [f32],
    sums: &'a mut [f32],
}

impl SimdOp for Behind<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let Behind { feedback, block, errors, sums } = self;
        let padded = feedback.padded();
        let rows = errors.len() / padded;
        for from in (block.end * LANES..padded).step_by(DEPTH) {
            let stretch = from..(from + DEPTH).min(padded);
            for (j, sums) in block.clone().zip(sums.chunks_exact_mut(rows * LANES)) {
                let first = j * LANES;
                let panel = &feedback.panels[j][(from - first) * LANES..(stretch.end - first) * LANES];
                add_rows(s, sums, panel, errors, padded, from);
            }
        }
    }
}

/// `sums[row] += sum over b of errors[row][from + b] * panel[b]`: `sums` are (rows, 16), `errors` (rows, padded).
#[inline(always)]
pub(super) fn add_rows<S: Simd>(s: S, sums: &mut [f32], panel: &[f32], errors: &[f32], padded: usize, from: usize) {
    let panel = panel.as_chunks::<LANES>().0;
    let (fours, rest) = sums.as_chunks_mut::<LANES>().0.as_chunks_mut::<SUMS>();
    let (errors, last) = errors.split_at(fours.len() * SUMS * padded);
    for (sums, errors) in fours.iter_mut().zip(errors.chunks_exact(SUMS * padded)) {
        add(s, sums, panel, |q| &errors[q * padded + from..(q + 1) * padded]);
    }
    for (sum, errors) in rest.iter_mut().zip(last.chunks_exact(padded)) {
        add(s, std::array::from_mut(sum), panel, |_| &errors[from..]);
    }
}

/// `sums[q] += sum over b of errors of row q [b] * panel[b]`, in the order of b.
#[inline(always)]
fn add<'a, S: Simd, const N: usize>(
    s: S,
    sums: &mut [[f32; LANES]; N],
    panel: &[[f32; LANES]],
    errors: impl Fn(usize) -> &'a [f32],
) {
    let errors: [&[f32]; N] = std::array::from_fn(|q| &errors(q)[..panel.len()]);
    let mut all = [s.splat(0.0); N];
    for q in 0..N {
        all[q] = s.load(&sums[q]);
    }
    for (b, m) in panel.iter().enumerate() {
        let m = s.load(m);
        for q in 0..N {
            all[q] = s.fma(s.splat(errors[q][b]), m, all[q]);
        }
    }
    for q in 0..N {
        s.store(all[q], &mut sums[q]);
    }
}

/// The columns of a block, from the last to the first.
struct Within<'a, D> {
    feedback: &'a Feedback,
    block: Range<usize>,
    weights: &'a [f32],
    errors: &'a mut [f32],
    sums: &'a [f32],
    totals: &'a mut [f64],
    decide: &'a mut D,
}

impl<D: Decide> SimdOp for Within<'_, D> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(mut self, s: S) {
        let rows = self.totals.len();
        let mut row = 0;
        while row + SUMS <= rows {
            self.rows::<S, SUMS>(s, row);
            row += SUMS;
        }
        for row in row..rows {
            self.rows::<S, 1>(s, row);
        }
    }
}

impl<D: Decide> Within<'_, D> {
    /// N rows, from `row` on.
    #[inline(always)]
    fn rows<S: Simd, const N: usize>(&mut self, s: S, row: usize) {
        let (padded, rows) = (self.feedback.padded(), self.totals.len());
        let sums = self.sums.as_chunks::<LANES>().0;
        let behind = self.block.end * LANES;
        for (q, j) in self.block.clone().enumerate().rev() {
            let (own, after) = self.feedback.panels[j].split_at(TILE);
            let (own, after) = (own.as_chunks::<LANES>().0, after.as_chunks::<LANES>().0);
            let from = (j + 1) * LANES;
            let mut asked: [[f32; LANES]; N] = std::array::from_fn(|r| sums[q * rows + row + r]);
            let errors = &*self.errors;
            add(s, &mut asked, &after[..behind - from], |r| &errors[(row + r) * padded..][from..behind]);
            for a in (0..LANES).rev() {
                let at = j * LANES + a;
                for r in 0..N {
                    let place = (row + r) * padded + at;
                    let weight = self.weights[place];
                    let best = weight + asked[r][a];
                    let value = self.decide.decide(row + r, at, best);
                    let error = weight - value;
                    self.errors[place] = error;
                    let left = (best - value) as f64;
                    self.totals[row + r] += self.feedback.pivots[at] as f64 * left * left;
                    let carried = s.fma(s.splat(error), s.load(&own[a]), s.load(&asked[r]));
                    s.store(carried, &mut asked[r]);
                }
            }
        }
    }
}
