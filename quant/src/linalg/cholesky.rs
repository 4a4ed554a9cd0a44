//! The Cholesky factor, a few columns of tiles at a time.
//!
//! What the columns before a block explain of it is taken off all of its rows first, in stretches that stay in the nearest
//! cache: a large factor, which lies in memory, is read once for each block instead of once for each column of tiles.
//! Every value's sum goes through its terms in the order of columns, whatever the block.

use super::{LANES, Symmetric, TILE, accumulate};
use nibble_kernels::Isa;
use nibble_kernels::simd::{self, Simd, SimdOp};
use rayon::prelude::*;

/// Columns of tiles that are finished together.
const BLOCK: usize = 8;
/// Terms that are summed before the next values' turn.
const DEPTH: usize = 64;

impl Symmetric {
    /// The lower Cholesky factor L of `scale * M + damping * I`, columns and rows taken in the order `order`;
    /// `None` if that isn't positive definite. Padding gets a diagonal of 1.
    pub(super) fn cholesky(&self, order: &[u32], scale: f32, damping: f32) -> Option<Symmetric> {
        debug_assert_eq!(order.len(), self.width);
        let mut l = self.ordered(order, scale, damping);
        let isa = Isa::best();
        for first in (0..l.rows.len()).step_by(BLOCK) {
            let open = &mut l.rows[first..];
            let count = BLOCK.min(open.len());
            let above = broad(&open[..count], first);
            open.par_iter_mut().enumerate().for_each(|(i, row)| {
                let (before, tiles) = row.split_at_mut(first * TILE);
                let tiles = &mut tiles[..count.min(i + 1) * TILE];
                simd::dispatch(isa, Before { tiles, before, above: &above, width: count * LANES });
            });
            let (block, below) = open.split_at_mut(count);
            for j in 0..count {
                let (done, rest) = block.split_at_mut(j + 1);
                let own = &mut done[j][first * TILE..];
                simd::dispatch(isa, Diagonal { row: own })?;
                let diagonal: &[f32] = own;
                rest.iter_mut()
                    .for_each(|row| simd::dispatch(isa, Below { row: &mut row[first * TILE..], j, diagonal }));
            }
            below.par_iter_mut().for_each(|row| {
                for (j, own) in block.iter().enumerate() {
                    let row = &mut row[first * TILE..];
                    simd::dispatch(isa, Below { row, j, diagonal: &own[first * TILE..] });
                }
            });
        }
        Some(l)
    }

    /// `scale * M + damping * I` in another order, with 1 on the padding's diagonal.
    fn ordered(&self, order: &[u32], scale: f32, damping: f32) -> Symmetric {
        let mut l = Symmetric::new(self.width);
        l.rows.par_iter_mut().enumerate().for_each_init(
            || vec![0.0; self.width],
            |from, (i, tiles)| {
                for r in 0..LANES {
                    let row = i * LANES + r;
                    let places = tiles[r..].iter_mut().step_by(LANES);
                    let Some(&source) = order.get(row) else {
                        places.enumerate().for_each(|(col, value)| *value = if col == row { 1.0 } else { 0.0 });
                        continue;
                    };
                    self.row_into(source as usize, from);
                    // Beyond the last column is padding.
                    for (value, &col) in places.zip(order) {
                        *value = scale * from[col as usize];
                    }
                    tiles[row * LANES + r] += damping;
                }
            },
        );
        l
    }
}

/// A few rows of tiles up to tile `first`, a column after the other: (16 * first, 16 * rows).
fn broad(rows: &[Vec<f32>], first: usize) -> Vec<f32> {
    let width = rows.len() * LANES;
    let mut values = vec![0.0; first * LANES * width];
    values.par_chunks_mut(width * DEPTH).enumerate().for_each(|(at, values)| {
        for (t, to) in values.chunks_exact_mut(width).enumerate() {
            for (to, row) in to.chunks_exact_mut(LANES).zip(rows) {
                to.copy_from_slice(&row[(at * DEPTH + t) * LANES..][..LANES]);
            }
        }
    });
    values
}

/// What the columns before a block explain of a row of its tiles is taken off.
struct Before<'a> {
    tiles: &'a mut [f32],
    before: &'a [f32],
    /// (columns before, width)
    above: &'a [f32],
    width: usize,
}

impl SimdOp for Before<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let Before { tiles, before, above, width } = self;
        let stretches = before.as_chunks::<LANES>().0.chunks(DEPTH).zip(above.chunks(DEPTH * width));
        for (before, above) in stretches {
            // As many sums at once as hide how long one addition takes, and fit in registers.
            match S::PANELS {
                1 => explained::<S, 4>(s, tiles, before, above, width),
                _ => explained::<S, 8>(s, tiles, before, above, width),
            }
        }
    }
}

/// `tiles[c] -= sum over t of above[t][c] * before[t]`, N columns at a time.
#[inline(always)]
fn explained<S: Simd, const N: usize>(s: S, tiles: &mut [f32], before: &[[f32; LANES]], above: &[f32], width: usize) {
    for (at, columns) in tiles.as_chunks_mut::<LANES>().0.as_chunks_mut::<N>().0.iter_mut().enumerate() {
        let mut sums = [s.splat(0.0); N];
        for q in 0..N {
            sums[q] = s.load(&columns[q]);
        }
        for (v, by) in before.iter().zip(above.chunks_exact(width)) {
            let v = s.load(v);
            let Some(by) = by[at * N..].first_chunk::<N>() else { return };
            for q in 0..N {
                sums[q] = s.fnma(s.splat(by[q]), v, sums[q]);
            }
        }
        for q in 0..N {
            s.store(sums[q], &mut columns[q]);
        }
    }
}

/// The last tile of a row: what its other tiles explain is taken off, then it is factored.
struct Diagonal<'a> {
    row: &'a mut [f32],
}

impl SimdOp for Diagonal<'_> {
    type Output = Option<()>;

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> Option<()> {
        let (before, tile) = self.row.split_at_mut(self.row.len() - TILE);
        accumulate::<S, true>(s, tile, before, before);
        for c in 0..LANES {
            for r in c..LANES {
                let explained = (0..c).map(|t| tile[t * LANES + r] as f64 * tile[t * LANES + c] as f64).sum::<f64>();
                let left = tile[c * LANES + r] as f64 - explained;
                if r == c && (left <= 0.0 || !left.is_finite()) {
                    return None;
                }
                let pivot = if r == c { 1.0 } else { tile[c * LANES + c] as f64 };
                tile[c * LANES + r] = if r == c { left.sqrt() as f32 } else { (left / pivot) as f32 };
            }
            tile[c * LANES..c * LANES + c].fill(0.0);
        }
        Some(())
    }
}

/// Tile j of a lower row: the same, then solved against the diagonal tile, 16 rows at once.
struct Below<'a> {
    row: &'a mut [f32],
    j: usize,
    diagonal: &'a [f32],
}

impl SimdOp for Below<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let (before, rest) = self.row.split_at_mut(self.j * TILE);
        let tile = &mut rest[..TILE];
        let (above, diagonal) = self.diagonal.split_at(self.j * TILE);
        accumulate::<S, true>(s, tile, above, before);
        let columns = tile.as_chunks_mut::<LANES>().0;
        for c in 0..LANES {
            let mut column = s.load(&columns[c]);
            for t in 0..c {
                column = s.fnma(s.splat(diagonal[t * LANES + c]), s.load(&columns[t]), column);
            }
            s.store(s.div(column, s.splat(diagonal[c * LANES + c])), &mut columns[c]);
        }
    }
}
