//! Symmetric matrices in tiles: sums of outer products, and the Cholesky factor that GPTQ feeds errors back with.
//!
//! ```text
//!  row 0 | T00                 A row of tiles is contiguous. Tile (i, j) holds M[16 i + r][16 j + c] at [c][r], so that a
//!  row 1 | T10 T11             row of tiles is also what the products below read: 16 values a step, one vector.
//!  row 2 | T20 T21 T22
//! ```
//!
//! Everything is written over [`Simd`]: every sum has one order, whatever the instruction set or the number of threads.

mod cholesky;
mod dense;
mod double;
mod feedback;
mod pair;

pub use dense::Dense;
pub use feedback::{Decide, Feedback, ROWS};
pub use pair::{DecideOne, Pair};

use nibble_kernels::Isa;
use nibble_kernels::simd::{self, LANES, Simd, SimdOp};
use rayon::prelude::*;

/// Values of one tile.
const TILE: usize = LANES * LANES;

/// A symmetric matrix of any width, in f32; padded with zeros to whole tiles.
#[derive(Debug, Clone, PartialEq)]
pub struct Symmetric {
    width: usize,
    /// Row i of tiles: i + 1 of them.
    rows: Vec<Vec<f32>>,
}

impl Symmetric {
    /// All zeros.
    pub fn new(width: usize) -> Symmetric {
        let rows = (0..width.div_ceil(LANES)).map(|i| vec![0.0; (i + 1) * TILE]).collect();
        Symmetric { width, rows }
    }

    /// Rows and columns.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Bytes that a matrix of this width takes.
    pub fn bytes(width: usize) -> u64 {
        let tiles = width.div_ceil(LANES) as u64;
        tiles * (tiles + 1) / 2 * TILE as u64 * 4
    }

    /// The value at a row and column.
    pub fn get(&self, row: usize, col: usize) -> f32 {
        let (row, col) = if row >= col { (row, col) } else { (col, row) };
        self.rows[row / LANES][col / LANES * TILE + col % LANES * LANES + row % LANES]
    }

    /// Row `row`, whole.
    fn row_into(&self, row: usize, to: &mut [f32]) {
        let (i, r) = (row / LANES, row % LANES);
        let (before, after) = to.split_at_mut(row);
        for (to, values) in before.iter_mut().zip(self.rows[i].chunks_exact(LANES)) {
            *to = values[r];
        }
        // From the diagonal on it is a column, of which each row of tiles has 16 values in a line.
        let (own, after) = after.split_at_mut((LANES - r).min(after.len()));
        own.copy_from_slice(&self.rows[i][row * LANES + r..][..own.len()]);
        for (to, tiles) in after.chunks_mut(LANES).zip(&self.rows[i + 1..]) {
            to.copy_from_slice(&tiles[row * LANES..][..to.len()]);
        }
    }

    #[cfg(test)]
    fn set(&mut self, row: usize, col: usize, value: f32) {
        let (row, col) = if row >= col { (row, col) } else { (col, row) };
        self.rows[row / LANES][col / LANES * TILE + col % LANES * LANES + row % LANES] = value;
    }

    /// All tiles, row of tiles after row of tiles.
    pub fn values(&self) -> impl Iterator<Item = f32> + '_ {
        self.rows.iter().flatten().copied()
    }

    /// The matrix whose [values](Symmetric::values) are these; `None` if there are more or fewer than it has.
    pub fn from_values(width: usize, values: &[f32]) -> Option<Symmetric> {
        let mut matrix = Symmetric::new(width);
        let mut rest = values;
        for row in &mut matrix.rows {
            let (own, after) = rest.split_at_checked(row.len())?;
            row.copy_from_slice(own);
            rest = after;
        }
        rest.is_empty().then_some(matrix)
    }

    /// Adds another one of the same width.
    pub fn add(&mut self, other: &Symmetric) {
        for (own, others) in self.rows.iter_mut().flatten().zip(other.rows.iter().flatten()) {
            *own += others;
        }
    }

    /// Adds `sum x x^T` over the rows of `x`, (rows, width).
    ///
    /// # Panics
    /// If `x` isn't whole rows.
    pub fn add_outer(&mut self, x: &[f32]) {
        assert!(self.width > 0 && x.len().is_multiple_of(self.width), "whole rows");
        let panels = Panels::new(x, self.width);
        let isa = Isa::best();
        self.rows.par_iter_mut().enumerate().rev().for_each(|(i, row)| {
            simd::dispatch(isa, OuterRow { row, own: panels.panel(i), panels: &panels });
        });
    }

    /// Subtracts `x x^T`; `x` has the matrix's width.
    pub fn subtract_outer(&mut self, x: &[f32]) {
        for (i, row) in self.rows.iter_mut().enumerate() {
            for (at, value) in row.iter_mut().enumerate() {
                let (r, c) = (i * LANES + at % LANES, at / TILE * LANES + at % TILE / LANES);
                *value -= x.get(r).zip(x.get(c)).map_or(0.0, |(a, b)| a * b);
            }
        }
    }
}

/// Rows cut into panels of 16 columns: (panels, rows, 16).
struct Panels {
    depth: usize,
    values: Vec<f32>,
}

impl Panels {
    fn new(x: &[f32], width: usize) -> Panels {
        let depth = x.len() / width;
        let mut values = vec![0.0; width.div_ceil(LANES) * depth * LANES];
        values.par_chunks_mut((depth * LANES).max(1)).enumerate().for_each(|(p, panel)| {
            let cols = p * LANES..width.min((p + 1) * LANES);
            for (to, row) in panel.chunks_exact_mut(LANES).zip(x.chunks_exact(width)) {
                to[..cols.len()].copy_from_slice(&row[cols.clone()]);
            }
        });
        Panels { depth, values }
    }

    fn panel(&self, p: usize) -> &[f32] {
        &self.values[p * self.depth * LANES..(p + 1) * self.depth * LANES]
    }
}

/// `tile[c][r] += sign * sum over steps t of broad[t][c] * vector[t][r]`.
#[inline(always)]
fn accumulate<S: Simd, const SUBTRACT: bool>(s: S, tile: &mut [f32], broad: &[f32], vector: &[f32]) {
    // As many sums at once as hide how long one addition takes, and fit in registers.
    match S::PANELS {
        1 => accumulate_columns::<S, 4, SUBTRACT>(s, tile, broad, vector),
        _ => accumulate_columns::<S, 8, SUBTRACT>(s, tile, broad, vector),
    }
}

/// The same, N columns at a time.
#[inline(always)]
fn accumulate_columns<S: Simd, const N: usize, const SUBTRACT: bool>(
    s: S,
    tile: &mut [f32],
    broad: &[f32],
    vector: &[f32],
) {
    let (broad, vector) = (broad.as_chunks::<LANES>().0, vector.as_chunks::<LANES>().0);
    for (at, columns) in tile.as_chunks_mut::<LANES>().0.as_chunks_mut::<N>().0.iter_mut().enumerate() {
        let mut sums = [s.splat(0.0); N];
        for q in 0..N {
            sums[q] = s.load(&columns[q]);
        }
        for (by, v) in broad.iter().zip(vector) {
            let v = s.load(v);
            let by = &by.as_chunks::<N>().0[at];
            for q in 0..N {
                let by = s.splat(by[q]);
                sums[q] = if SUBTRACT { s.fnma(by, v, sums[q]) } else { s.fma(by, v, sums[q]) };
            }
        }
        for q in 0..N {
            s.store(sums[q], &mut columns[q]);
        }
    }
}

struct OuterRow<'a> {
    row: &'a mut [f32],
    own: &'a [f32],
    panels: &'a Panels,
}

impl SimdOp for OuterRow<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for (j, tile) in self.row.chunks_exact_mut(TILE).enumerate() {
            accumulate::<S, false>(s, tile, self.panels.panel(j), self.own);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    fn observed(width: usize, rows: usize) -> (Vec<f32>, Symmetric) {
        let mut rng = StdRng::seed_from_u64(width as u64);
        let x: Vec<f32> = (0..width * rows).map(|_| rng.random::<f32>() - 0.4).collect();
        let mut matrix = Symmetric::new(width);
        matrix.add_outer(&x);
        (x, matrix)
    }

    #[test]
    fn sums_of_outer_products_equal_the_plain_ones() {
        for (width, rows) in [(1, 3), (15, 40), (16, 1), (33, 70), (80, 257)] {
            let (x, matrix) = observed(width, rows);
            for a in 0..width {
                for b in 0..width {
                    let terms = || x.chunks(width).map(|r| r[a] as f64 * r[b] as f64);
                    let (exact, size): (f64, f64) = (terms().sum(), terms().map(f64::abs).sum());
                    let bound = size * rows as f64 * f32::EPSILON as f64;
                    assert!((matrix.get(a, b) as f64 - exact).abs() <= bound, "{width} x {rows}: {a}, {b}");
                }
            }
            let values: Vec<f32> = matrix.values().collect();
            assert_eq!(Symmetric::from_values(width, &values).unwrap(), matrix);
            assert!(Symmetric::from_values(width, &values[1..]).is_none());
            assert_eq!(values.len() as u64 * 4, Symmetric::bytes(width));
        }
    }

    #[test]
    fn the_factor_times_itself_is_the_matrix() {
        for width in [1, 16, 17, 50, 96, 230] {
            let (_, matrix) = observed(width, 2 * width);
            let order: Vec<u32> = (0..width as u32).rev().collect();
            let l = matrix.cholesky(&order, 0.5, 0.25).unwrap();
            for a in 0..width {
                for b in 0..=a {
                    let got: f64 = (0..=b).map(|t| l.get(a, t) as f64 * l.get(b, t) as f64).sum();
                    let (i, j) = (order[a] as usize, order[b] as usize);
                    let want = 0.5 * matrix.get(i, j) as f64 + if a == b { 0.25 } else { 0.0 };
                    let size = (0.5 * matrix.get(i, i).max(matrix.get(j, j)) as f64 + 0.25) * (width + 20) as f64;
                    assert!((got - want).abs() <= size * f32::EPSILON as f64, "{width}: {a}, {b}: {got} for {want}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_positive_definite_has_no_factor() {
        let mut matrix = Symmetric::new(20);
        for i in 0..20 {
            matrix.set(i, i, if i == 17 { -1.0 } else { 1.0 });
        }
        let order: Vec<u32> = (0..20).collect();
        assert!(Feedback::new(&matrix, order.clone(), 1.0, 0.0).is_none());
        assert!(Feedback::new(&matrix, order.clone(), 1.0, 2.0).is_some());
        assert!(Feedback::new(&matrix, order, f32::NAN, 1.0).is_none());
    }

    /// Rounds to whole numbers.
    struct Whole;

    impl Decide for Whole {
        fn decide<S: Simd>(&mut self, s: S, _: usize, _: usize, best: S::F32) -> S::F32 {
            s.to_f32(s.to_i32(best))
        }
    }

    /// Weights (lots, padded), of so many rows and columns.
    fn weights(width: usize, padded: usize, rows: usize) -> Vec<[f32; LANES]> {
        let mut rng = StdRng::seed_from_u64(9);
        let mut weights = vec![[0f32; LANES]; rows.div_ceil(LANES) * padded];
        for row in 0..rows {
            for place in &mut weights[row / LANES * padded..][..width] {
                place[row % LANES] = 6.0 * rng.random::<f32>() - 3.0;
            }
        }
        weights
    }

    /// d H d^T = sum of L[a][a]^2 (best_a - value_a)^2 holds for no other `best` than the one that makes up for all
    /// errors before it.
    #[test]
    fn what_is_left_at_each_place_adds_up_to_the_error_of_the_row() {
        for (width, rows) in [(40, 1), (40, 3), (33, 16), (150, 17), (417, 37)] {
            let (_, matrix) = observed(width, 3 * width);
            let order: Vec<u32> = (0..width as u32).collect();
            let feedback = Feedback::new(&matrix, order, 1.0, 0.1).unwrap();
            let padded = feedback.padded();
            let weights = weights(width, padded, rows);
            let mut errors = vec![[f32::NAN; LANES]; weights.len()];
            let totals = feedback.run(&weights, &mut errors, &mut Whole);
            let h = |a: usize, b: usize| matrix.get(a, b) as f64 + if a == b { 0.1 } else { 0.0 };
            for row in 0..rows {
                let lot = row / LANES * padded;
                let d: Vec<f64> = errors[lot..][..width].iter().map(|e| e[row % LANES] as f64).collect();
                let pairs = (0..width).flat_map(|a| (0..width).map(move |b| (a, b)));
                let norm: f64 = pairs.map(|(a, b)| d[a] * h(a, b) * d[b]).sum();
                let total = totals[row / LANES][row % LANES];
                assert!((norm - total).abs() <= 1e-3 * norm, "{norm}, {total}");
                let whole = weights[lot..][..width].iter().zip(&d).all(|(w, d)| {
                    let value = w[row % LANES] as f64 - d;
                    (value - value.round()).abs() < 1e-5
                });
                assert!(whole, "row {row}");
            }
        }
    }

    /// Zeros everywhere, until one row of each lot is beyond a bound.
    struct Zeros(f64);

    impl Decide for Zeros {
        fn decide<S: Simd>(&mut self, s: S, _: usize, _: usize, _: S::F32) -> S::F32 {
            s.splat(0.0)
        }

        fn goes_on(&self, _: usize, totals: &[f64; LANES]) -> bool {
            totals.iter().all(|total| *total <= self.0)
        }
    }

    #[test]
    fn a_walk_that_ends_early_has_the_first_part_of_the_errors() {
        let (width, rows) = (417, 37);
        let (_, matrix) = observed(width, 3 * width);
        let order: Vec<u32> = (0..width as u32).collect();
        let feedback = Feedback::new(&matrix, order, 1.0, 0.1).unwrap();
        let weights = weights(width, feedback.padded(), rows);
        let run = |bound: f64| {
            let mut errors = vec![[f32::NAN; LANES]; weights.len()];
            let totals = feedback.run(&weights, &mut errors, &mut Zeros(bound));
            (totals, errors.iter().filter(|e| e[0].is_nan()).count())
        };
        let (whole, left) = run(f64::INFINITY);
        assert_eq!(left, 0);
        let bound = whole.iter().flatten().fold(0f64, |most, total| most.max(*total)) / 64.0;
        let (part, left) = run(bound);
        assert!(left > 0, "nothing was left out");
        for (part, whole) in part.iter().zip(&whole) {
            assert!(part.iter().zip(whole).all(|(part, whole)| part <= whole));
            let beyond = |totals: &[f64; LANES]| totals.iter().any(|total| *total > bound);
            assert_eq!(beyond(part), beyond(whole));
        }
    }
}
