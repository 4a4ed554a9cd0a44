//! Rounding errors fed forward by a Cholesky factor, many rows at a time.
//!
//! Rows don't depend on each other, so 16 of them lie side by side, one a lane (a *lot*): a place of all of them is decided
//! at once, and what errors ask of the places before them are the products of tiles that the factor itself is made with.

use super::{LANES, Symmetric, TILE, accumulate};
use nibble_kernels::Isa;
use nibble_kernels::simd::{self, Simd, SimdOp};
use rayon::prelude::*;
use std::ops::Range;

/// Rows that are walked through together, at most: what is read of a large factor, which lies in memory, serves them all.
pub const ROWS: usize = 128;
/// Panels between whose columns errors are fed one by one; what those behind ask of them is summed before.
const BLOCK: usize = 8;
/// Errors of a row that are summed before the next lot's turn.
const DEPTH: usize = 128;

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

/// Decides about values, those of 16 rows at a time.
pub trait Decide {
    /// The values that place `at` takes in the rows of a lot, where `best` would make up for all errors so far.
    fn decide<S: Simd>(&mut self, s: S, lot: usize, at: usize, best: S::F32) -> S::F32;

    /// Whether the walk through a lot goes on, now that its rows' errors have come to `totals`; they only grow.
    fn goes_on(&self, _lot: usize, _totals: &[f64; LANES]) -> bool {
        true
    }
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
    /// `errors` = w - q. `weights` and `errors` are (lots, padded), places of 16 rows each. Gives each row's error d H d^T,
    /// damping included; if its lot's walk didn't go on, that of the places until then.
    pub fn run(
        &self,
        weights: &[[f32; LANES]],
        errors: &mut [[f32; LANES]],
        decide: &mut impl Decide,
    ) -> Vec<[f64; LANES]> {
        let padded = self.padded();
        let lots = errors.len().checked_div(padded).unwrap_or(0);
        let mut totals = vec![[0f64; LANES]; lots];
        let mut open: Vec<usize> = (0..lots).collect();
        let mut sums = vec![0f32; lots * BLOCK * TILE];
        for first in (0..self.panels.len()).step_by(BLOCK).rev() {
            let block = first..(first + BLOCK).min(self.panels.len());
            sums.fill(0.0);
            let behind = Behind { feedback: self, block: block.clone(), open: &open, errors, sums: &mut sums };
            simd::dispatch(Isa::best(), behind);
            for &lot in &open {
                let (weights, errors) = (&weights[lot * padded..][..padded], &mut errors[lot * padded..][..padded]);
                let (sums, totals) = (&mut sums[lot * BLOCK * TILE..][..BLOCK * TILE], &mut totals[lot]);
                let block = block.clone();
                simd::dispatch(
                    Isa::best(),
                    Within { feedback: self, block, lot, weights, errors, sums, totals, decide },
                );
            }
            open.retain(|&lot| decide.goes_on(lot, &totals[lot]));
        }
        totals
    }
}

/// What the errors behind a block of panels ask of it: `sums` are (lots, panels) tiles of (places, rows).
struct Behind<'a> {
    feedback: &'a Feedback,
    block: Range<usize>,
    open: &'a [usize],
    errors: &'a [[f32; LANES]],
    sums: &'a mut [f32],
}

impl SimdOp for Behind<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let Behind { feedback, block, open, errors, sums } = self;
        let padded = feedback.padded();
        for from in (block.end * LANES..padded).step_by(DEPTH) {
            let stretch = from..(from + DEPTH).min(padded);
            for (q, j) in block.clone().enumerate() {
                let first = j * LANES;
                let panel = &feedback.panels[j][(from - first) * LANES..(stretch.end - first) * LANES];
                for &lot in open {
                    let errors = errors[lot * padded..][stretch.clone()].as_flattened();
                    accumulate::<S, false>(s, &mut sums[(lot * BLOCK + q) * TILE..][..TILE], panel, errors);
                }
            }
        }
    }
}

/// The columns of a block, from the last to the first, for one lot.
struct Within<'a, D> {
    feedback: &'a Feedback,
    block: Range<usize>,
    lot: usize,
    weights: &'a [[f32; LANES]],
    errors: &'a mut [[f32; LANES]],
    sums: &'a mut [f32],
    totals: &'a mut [f64; LANES],
    decide: &'a mut D,
}

impl<D: Decide> SimdOp for Within<'_, D> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let Within { feedback, block, lot, weights, errors, sums, totals, decide } = self;
        let behind = block.end * LANES;
        for (asked, j) in sums.chunks_exact_mut(TILE).zip(block).rev() {
            let (own, after) = feedback.panels[j].split_at(TILE);
            let from = (j + 1) * LANES;
            accumulate::<S, false>(s, asked, &after[..(behind - from) * LANES], errors[from..behind].as_flattened());
            let (own, asked) = (own.as_chunks::<LANES>().0, asked.as_chunks_mut::<LANES>().0);
            let mut grown = s.splat(0.0);
            for a in (0..LANES).rev() {
                let at = j * LANES + a;
                let weight = s.load(&weights[at]);
                let best = s.add(weight, s.load(&asked[a]));
                let value = decide.decide(s, lot, at, best);
                let error = s.sub(weight, value);
                s.store(error, &mut errors[at]);
                let left = s.sub(best, value);
                grown = s.fma(s.mul(left, left), s.splat(feedback.pivots[at]), grown);
                for (asked, by) in asked.iter_mut().zip(&own[a][..a]) {
                    s.store(s.fma(error, s.splat(*by), s.load(asked)), asked);
                }
            }
            let mut lanes = [0f32; LANES];
            s.store(grown, &mut lanes);
            totals.iter_mut().zip(lanes).for_each(|(total, grown)| *total += f64::from(grown));
        }
    }
}
