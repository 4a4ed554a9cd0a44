//! Quantized weights by single-precision activations: what kernels of signed bytes are compared with.
//!
//! `sum += scale[group] * sum_k((level - zero) * x[k]) (+ min[group] * sum_k(x[k]))`, every step fused.

use super::int::prefetch;
use super::scratch::{Scratch, mask};
use super::tile::{Inner, Tile, walk};
use crate::BLOCK;
use crate::simd::{BYTES, Simd, SimdOp};
use crate::weight::{Body, Grid, Levels};
use std::marker::PhantomData;

/// How the codes of one cache line become levels.
pub(super) trait Decode {
    /// Values of K in a line: 8 or 4.
    const WIDTH: usize;
    /// Whether levels come from a table of 16.
    const TABLE: bool;
}

/// [`Levels::Linear4`]
pub(super) struct Linear4;
/// [`Levels::Table4`] and [`Levels::FloatTable4`]
pub(super) struct Table4;
/// [`Levels::Linear8`]
pub(super) struct Linear8;

impl Decode for Linear4 {
    const WIDTH: usize = 8;
    const TABLE: bool = false;
}

impl Decode for Table4 {
    const WIDTH: usize = 8;
    const TABLE: bool = true;
}

impl Decode for Linear8 {
    const WIDTH: usize = 4;
    const TABLE: bool = false;
}

/// The kernel for codes `D`, `MR` rows at a time.
pub(super) fn run<S: Simd, D: Decode, const MR: usize>(tile: &Tile) {
    if let (Some(s), Body::Grid(grid)) = (S::new(), &tile.weight.body) {
        Scratch::with(|[scratch, _]| s.vectorize(Run::<D, MR> { tile, grid, scratch, decode: PhantomData }));
    }
}

struct Run<'a, D, const MR: usize> {
    tile: &'a Tile<'a>,
    grid: &'a Grid,
    scratch: &'a mut Scratch,
    decode: PhantomData<D>,
}

impl<D: Decode, const MR: usize> SimdOp for Run<'_, D, MR> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let Run { tile, grid, scratch, .. } = self;
        for panel in tile.panels.clone() {
            scratch.fill(s, grid, panel, false);
            let float = Float::<D> { tile, grid, scratch: &*scratch, decode: PhantomData };
            walk::<S, MR>(s, panel, tile.rows.clone(), &float);
        }
    }
}

/// One panel, ready for its activation rows.
struct Float<'a, D> {
    tile: &'a Tile<'a>,
    grid: &'a Grid,
    scratch: &'a Scratch,
    decode: PhantomData<D>,
}

impl<S: Simd, D: Decode> Inner<S> for Float<'_, D> {
    #[inline(always)]
    fn rows<const MR: usize>(&self, s: S, panel: usize, row: usize) {
        let (tile, grid) = (self.tile, self.grid);
        let (blocks, per_block) = (tile.x.blocks(), BLOCK / D::WIDTH);
        let lines: &[[u8; BYTES]] = &grid.codes.as_chunks().0[panel * blocks * per_block..][..blocks * per_block];
        let table = s.load(&table(&grid.levels));
        let code_mask = s.splat_i32(if D::WIDTH == 8 { 15 } else { 255 });
        let Scratch { numbers, factor, zeros, mins, .. } = self.scratch;
        let every_zero = mask(zeros);
        let no_values: &[[f32; BLOCK]] = &[];
        let (mut x, mut x_sums) = ([no_values; MR], [&[0.0; 0][..]; MR]);
        for r in 0..MR {
            x[r] = tile.x.value_blocks(row + r);
            x_sums[r] = tile.x.block_sums(row + r);
        }

        let mut sums = [s.splat(0.0); MR];
        for (group, number) in numbers[..grid.groups].iter().enumerate() {
            let zero = s.to_f32(s.load_i32(&zeros[group & every_zero]));
            let first = group * grid.group_blocks;
            let end = blocks.min(first + grid.group_blocks);
            let mut part = [s.splat(0.0); MR];
            for block in first..end {
                let lines = &lines[block * per_block..][..per_block];
                if MR == 1 {
                    prefetch(s, lines);
                }
                let mut values = [&ZEROS; MR];
                for r in 0..MR {
                    values[r] = &x[r][block];
                }
                for (i, line) in lines.iter().enumerate() {
                    let words = s.words(s.load_bytes(line));
                    for j in 0..D::WIDTH {
                        // Nibble j of K is byte j % 4, low half first; see the layout in `weight`.
                        let bits = 8 * (j % 4) + 4 * (j / 4);
                        let code = s.shr(words, bits as i32);
                        let level = if D::TABLE { s.lookup(table, code) } else { s.to_f32(s.and_i32(code, code_mask)) };
                        let level = s.sub(level, zero);
                        for r in 0..MR {
                            part[r] = s.fma(level, s.splat(values[r][i * D::WIDTH + j]), part[r]);
                        }
                    }
                }
            }
            for r in 0..MR {
                sums[r] = s.fma(s.load(number), part[r], sums[r]);
            }
        }
        for r in 0..MR {
            sums[r] = s.mul(sums[r], s.load(factor));
        }
        for (group, min) in mins.iter().enumerate() {
            let first = group * grid.group_blocks;
            let end = blocks.min(first + grid.group_blocks);
            for r in 0..MR {
                let mut sum = 0.0;
                for block in &x_sums[r][first..end] {
                    sum += block;
                }
                sums[r] = s.fma(s.load(min), s.splat(sum), sums[r]);
            }
        }
        for r in 0..MR {
            tile.finish(s, panel, row + r, sums[r]);
        }
    }
}

static ZEROS: [f32; BLOCK] = [0.0; BLOCK];

pub(super) fn table(levels: &Levels) -> [f32; 16] {
    std::array::from_fn(|code| levels.value(code as u8))
}
