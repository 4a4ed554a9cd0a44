//! A matrix in rows, and what rows of others make with it.

use super::{LANES, Symmetric};
use nibble_kernels::Isa;
use nibble_kernels::simd::{self, Simd, SimdOp, add_multiple};
use rayon::prelude::*;

/// Rows whose sums are in registers together.
const SUMS: usize = 4;
/// Rows of the matrix that are in the nearest caches while all columns of them are summed.
const DEPTH: usize = 64;

/// A matrix in rows, where whole rows are read: twice the bytes of a [`Symmetric`] one.
#[derive(Debug)]
pub struct Dense {
    width: usize,
    values: Vec<f32>,
}

impl Symmetric {
    /// `scale * M + damping * I` in rows.
    pub fn dense(&self, scale: f32, damping: f32) -> Dense {
        let width = self.width;
        let mut values = vec![0.0; width * width];
        values.par_chunks_mut(width.max(1)).enumerate().for_each(|(row, values)| {
            self.row_into(row, values);
            values.iter_mut().for_each(|v| *v *= scale);
            values[row] += damping;
        });
        Dense { width, values }
    }
}

impl Dense {
    /// One row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.width..(row + 1) * self.width]
    }

    /// `sum over j of d[j] * row j` for each row of `d`, (rows, width), in the order of j. The matrix, which may lie in memory, is
    /// read once for all of them.
    pub fn products(&self, d: &[f32]) -> Vec<f32> {
        let mut sums = vec![0.0; d.len()];
        simd::dispatch(Isa::best(), Products { matrix: self, d, sums: &mut sums });
        sums
    }
}

struct Products<'a> {
    matrix: &'a Dense,
    d: &'a [f32],
    sums: &'a mut [f32],
}

impl SimdOp for Products<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let Products { matrix, d, sums } = self;
        let width = matrix.width;
        let whole = width / LANES * LANES;
        for first in (0..width).step_by(DEPTH) {
            let rows = first..(first + DEPTH).min(width);
            for col in (0..whole).step_by(LANES) {
                for (d, sums) in d.chunks(SUMS * width).zip(sums.chunks_mut(SUMS * width)) {
                    if d.len() == SUMS * width {
                        add::<S, SUMS>(s, matrix, d, sums, (rows.start, rows.end), col);
                    } else {
                        for (d, sums) in d.chunks_exact(width).zip(sums.chunks_exact_mut(width)) {
                            add::<S, 1>(s, matrix, d, sums, (rows.start, rows.end), col);
                        }
                    }
                }
            }
            for (d, sums) in d.chunks_exact(width).zip(sums.chunks_exact_mut(width)) {
                for row in rows.clone() {
                    add_multiple(s, &mut sums[whole..], &matrix.row(row)[whole..], d[row]);
                }
            }
        }
    }
}

/// `sums[q][col..] += sum over rows of d[q][row] * matrix[row][col..]`, 16 columns.
#[inline(always)]
fn add<S: Simd, const N: usize>(
    s: S,
    matrix: &Dense,
    d: &[f32],
    sums: &mut [f32],
    (from, to): (usize, usize),
    col: usize,
) {
    let width = matrix.width;
    let mut all = [s.splat(0.0); N];
    for q in 0..N {
        all[q] = s.load_partial(&sums[q * width + col..q * width + col + LANES]);
    }
    let d: [&[f32]; N] = std::array::from_fn(|q| &d[q * width + from..q * width + to]);
    for (at, row) in matrix.values[from * width..to * width].chunks_exact(width).enumerate() {
        let Some(row) = row[col..].first_chunk::<LANES>() else { return };
        let row = s.load(row);
        for q in 0..N {
            all[q] = s.fma(s.splat(d[q][at]), row, all[q]);
        }
    }
    for q in 0..N {
        s.store_partial(all[q], &mut sums[q * width + col..q * width + col + LANES]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_sums_in_the_order_of_rows() {
        for (width, rows) in [(1, 1), (15, 3), (16, 4), (40, 5), (150, 9)] {
            let mut matrix = Symmetric::new(width);
            let x: Vec<f32> = (0..width * width).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.13).collect();
            matrix.add_outer(&x);
            let dense = matrix.dense(0.5, 0.25);
            for a in 0..width {
                for b in 0..width {
                    let damping = if a == b { 0.25 } else { 0.0 };
                    assert_eq!(dense.row(a)[b], 0.5 * matrix.get(a, b) + damping);
                }
            }
            let d: Vec<f32> = (0..rows * width).map(|i| (i * 53 % 29) as f32 - 14.5).collect();
            let got = dense.products(&d);
            for row in 0..rows {
                let d = &d[row * width..(row + 1) * width];
                for c in 0..width {
                    let want = (0..width).fold(0f32, |sum, j| d[j].mul_add(dense.row(j)[c], sum));
                    assert_eq!(got[row * width + c], want, "{width} x {rows}: {row}, {c}");
                }
            }
        }
    }
}
