//! Errors fed back on both sides of a matrix: to columns that are read together and to rows whose outputs matter together.
//!
//! The error tr(G D H D^T) of D = W - Q, with G = L_g L_g^T over rows and H = L_h L_h^T over columns, is a sum over single
//! values once places are taken from the last to the first on both sides:
//! ```text
//! e = d + sum over later rows r of M_g[r][i] d[r]         what row i has to make up for, M[b][a] = L[b][a] / L[a][a]
//! best[i][j] = w + (e - d) + sum over later columns b of M_h[b][j] e[i][b]
//! tr(G D H D^T) = sum of L_g[i][i]^2 L_h[j][j]^2 (best - q)^2
//! ```
//! Rounding `best` is YAQA (arXiv 2505.22988); with G the identity it is GPTQ.

use super::{Feedback, TILE};
use nibble_kernels::Isa;
use nibble_kernels::simd::{self, LANES, Simd, SimdOp};
use rayon::prelude::*;

/// Rows whose sums are in registers together.
const SUMS: usize = 4;

/// Decides about one value.
pub trait DecideOne {
    /// The value that place `at` of row `row` takes, both as they come, where `best` would make up for all errors so far.
    fn decide(&mut self, row: usize, at: usize, best: f32) -> f32;
}

/// The two sides.
pub struct Pair<'a> {
    pub rows: &'a Feedback,
    pub cols: &'a Feedback,
}

impl Pair<'_> {
    /// Goes through all places and gives the error, damping included. `weights` are (rows, padded columns), by place.
    pub fn run(&self, weights: &[f32], decide: &mut impl DecideOne) -> f64 {
        let padded = self.cols.padded();
        // d and e of every place, and what later columns ask of a panel.
        let mut errors = vec![0f32; weights.len()];
        let mut shifted = vec![0f32; weights.len()];
        let mut sums = vec![0f32; weights.len() / padded.max(1) * LANES];
        let isa = Isa::best();
        let mut total = 0.0;
        for (j, panel) in self.cols.panels.iter().enumerate().rev() {
            let (own, after) = panel.split_at(TILE);
            let work = sums.par_chunks_mut(SUMS * LANES).zip(shifted.par_chunks(SUMS * padded));
            work.for_each(|(sums, shifted)| {
                simd::dispatch(isa, Later { sums, shifted, after, from: (j + 1) * LANES, padded })
            });
            let rows = self.rows;
            let pivots = &self.cols.pivots[j * LANES..(j + 1) * LANES];
            let (errors, shifted) = (&mut errors, &mut shifted);
            total += simd::dispatch(isa, Panel { rows, own, pivots, sums: &sums, weights, errors, shifted, j, decide });
        }
        total
    }
}

/// What the columns behind a panel ask of it, for a few rows.
struct Later<'a> {
    sums: &'a mut [f32],
    shifted: &'a [f32],
    after: &'a [f32],
    from: usize,
    padded: usize,
}

impl SimdOp for Later<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        self.sums.fill(0.0);
        add_rows(s, self.sums, self.after, self.shifted, self.padded, self.from);
    }
}

/// `sums[row] += sum over b of errors[row][from + b] * panel[b]`: `sums` are (rows, 16), `errors` (rows, padded).
#[inline(always)]
fn add_rows<S: Simd>(s: S, sums: &mut [f32], panel: &[f32], errors: &[f32], padded: usize, from: usize) {
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

/// One panel of columns, all rows.
struct Panel<'a, D> {
    rows: &'a Feedback,
    /// The panel's own tile, and its squared pivots.
    own: &'a [f32],
    pivots: &'a [f32],
    sums: &'a [f32],
    weights: &'a [f32],
    errors: &'a mut [f32],
    shifted: &'a mut [f32],
    j: usize,
    decide: &'a mut D,
}

impl<D: DecideOne> SimdOp for Panel<'_, D> {
    type Output = f64;

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> f64 {
        let Panel { rows, own, pivots, sums, weights, errors, shifted, j, decide } = self;
        let n = rows.order.len();
        let padded = weights.len() / n.max(1);
        let own = own.as_chunks::<LANES>().0;
        let lanes_of = |row: usize| row * padded + j * LANES..row * padded + (j + 1) * LANES;
        let mut total = 0f64;
        let mut asked = [[0f32; LANES]; LANES];
        for (tile, m) in rows.panels.iter().enumerate().rev() {
            let m = m.as_chunks::<LANES>().0;
            let first = tile * LANES;
            let mut later = [s.splat(0.0); LANES];
            for row in first + LANES..n {
                let error = s.load_partial(&errors[lanes_of(row)]);
                for (later, m) in later.iter_mut().zip(&m[row - first]) {
                    *later = s.fma(s.splat(*m), error, *later);
                }
            }
            for (asked, later) in asked.iter_mut().zip(later) {
                s.store(later, asked);
            }
            for a in (0..LANES.min(n - first)).rev() {
                let row = first + a;
                let mut shift = s.load(&asked[a]);
                for b in a + 1..LANES.min(n - first) {
                    shift = s.fma(s.splat(m[b][a]), s.load_partial(&errors[lanes_of(first + b)]), shift);
                }
                let mut shifts = [0f32; LANES];
                s.store(shift, &mut shifts);
                let mut carried = s.load_partial(&sums[row * LANES..(row + 1) * LANES]);
                let mut lanes = [0f32; LANES];
                for c in (0..LANES).rev() {
                    let at = row * padded + j * LANES + c;
                    s.store(carried, &mut lanes);
                    let target = weights[at] + shifts[c];
                    let best = target + lanes[c];
                    let value = decide.decide(row, j * LANES + c, best);
                    errors[at] = weights[at] - value;
                    let error = target - value;
                    shifted[at] = error;
                    let left = (best - value) as f64;
                    total += rows.pivots[row] as f64 * pivots[c] as f64 * left * left;
                    carried = s.fma(s.splat(error), s.load(&own[c]), carried);
                }
            }
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use super::super::Symmetric;
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    fn matrix(width: usize, rng: &mut StdRng) -> Symmetric {
        let mut matrix = Symmetric::new(width);
        let x: Vec<f32> = (0..width * width * 2).map(|_| rng.random::<f32>() - 0.4).collect();
        matrix.add_outer(&x);
        matrix
    }

    struct Whole<'a> {
        values: &'a mut [f32],
        padded: usize,
    }

    impl DecideOne for Whole<'_> {
        fn decide(&mut self, row: usize, at: usize, best: f32) -> f32 {
            self.values[row * self.padded + at] = best.round();
            best.round()
        }
    }

    /// What is left at each place adds up to tr(G D H D^T) for no other `best` than the one that makes up for all errors
    /// before it.
    #[test]
    fn what_is_left_at_each_place_adds_up_to_the_error_on_both_sides() {
        for (n, k) in [(1, 40), (5, 33), (16, 16), (40, 48), (33, 7)] {
            let mut rng = StdRng::seed_from_u64(n as u64);
            let (g, h) = (matrix(n, &mut rng), matrix(k, &mut rng));
            let side = |matrix: &Symmetric, width: usize| {
                let order: Vec<u32> = (0..width as u32).collect();
                Feedback::new(matrix, order, 1.0, 0.3).unwrap()
            };
            let (rows, cols) = (side(&g, n), side(&h, k));
            let padded = cols.padded();
            let mut weights = vec![0f32; n * padded];
            for row in weights.chunks_mut(padded) {
                row[..k].iter_mut().for_each(|w| *w = 6.0 * rng.random::<f32>() - 3.0);
            }
            let mut values = vec![f32::NAN; n * padded];
            let pair = Pair { rows: &rows, cols: &cols };
            let total = pair.run(&weights, &mut Whole { values: &mut values, padded });
            let damped = |m: &Symmetric, a: usize, b: usize| m.get(a, b) as f64 + if a == b { 0.3 } else { 0.0 };
            let d = |i: usize, j: usize| (weights[i * padded + j] - values[i * padded + j]) as f64;
            let mut exact = 0.0;
            for i in 0..n {
                // (G D)[i]
                let tied: Vec<f64> = (0..k).map(|j| (0..n).map(|r| damped(&g, i, r) * d(r, j)).sum()).collect();
                for a in 0..k {
                    exact += d(i, a) * (0..k).map(|b| damped(&h, a, b) * tied[b]).sum::<f64>();
                }
            }
            assert!((exact - total).abs() <= 1e-3 * exact, "{n} x {k}: {exact}, {total}");
            // Feedback is worth something: rounding each value by itself leaves more.
            let alone: f64 = {
                let d = |i: usize, j: usize| {
                    let w = weights[i * padded + j];
                    (w - w.round()) as f64
                };
                let tied = |i: usize, j: usize| (0..n).map(|r| damped(&g, i, r) * d(r, j)).sum::<f64>();
                let pairs = (0..n).flat_map(|i| (0..k).map(move |a| (i, a)));
                pairs.map(|(i, a)| d(i, a) * (0..k).map(|b| damped(&h, a, b) * tied(i, b)).sum::<f64>()).sum()
            };
            assert!(n < 16 || total < alone, "{n} x {k}: {total} of {alone}");
        }
    }
}
