//! Quantized weights by signed-byte activations.
//!
//! In every block of 32 the products of codes are summed exactly in integers, zero points included; floats begin with
//! one conversion a block. A group's scale is `number * factor`, where the factor is a second level that all groups of a
//! row share, or 1:
//! ```text
//! sum = factor * sum_blocks((dot[block] * number[group]) * x_scale[block]) + sum_groups(min[group] * x_sum[group])
//! ```
//! The product in the inner parentheses is rounded once, the rest is fused. Where numbers are small integers AVX2 multiplies
//! while it widens 16-bit sums; the rounded product is the same.
//!
//! One activation row meets codes that are decoded in registers. Many rows meet a slab of blocks that was decoded to bytes,
//! a quad of K to a line, and stays in the first-level cache.

mod codes;

use super::scratch::{Scratch, mask, twice};
use super::tile::Tile;
use crate::simd::{BYTES, Simd, SimdOp};
use crate::weight::{Body, Grid};
use codes::{Codes, Linear4, Linear8, Narrow4, Sum, Table4};
use std::marker::PhantomData;
use std::ops::Range;

/// Blocks that are decoded at a time: 16 KiB of bytes.
const SLAB: usize = 32;
/// Quads of K in a block.
const QUADS: usize = 8;

/// The kernel for evenly spaced 4-bit codes, `MR` rows at a time.
pub(super) fn linear4<S: Simd, const MR: usize>(tile: &Tile) {
    run::<S, Linear4, MR>(tile);
}

/// The kernel for 4-bit codes through a table: the narrow one where there is one and levels allow it.
pub(super) fn table4<S: Simd, const MR: usize>(tile: &Tile) {
    match &tile.weight.body {
        Body::Grid(grid) if S::MULTIPLIES && grid.narrow => run::<S, Narrow4, MR>(tile),
        _ => run::<S, Table4, MR>(tile),
    }
}

/// The kernel for 8-bit codes.
pub(super) fn linear8<S: Simd, const MR: usize>(tile: &Tile) {
    run::<S, Linear8, MR>(tile);
}

fn run<S: Simd, C: Codes, const MR: usize>(tile: &Tile) {
    if let (Some(s), Body::Grid(grid)) = (S::new(), &tile.weight.body) {
        Scratch::with(|scratch| s.vectorize(Run::<C, MR> { tile, grid, scratch, codes: PhantomData }));
    }
}

struct Run<'a, C, const MR: usize> {
    tile: &'a Tile<'a>,
    grid: &'a Grid,
    scratch: &'a mut Scratch,
    codes: PhantomData<C>,
}

impl<C: Codes, const MR: usize> SimdOp for Run<'_, C, MR> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let Run { tile, grid, scratch, .. } = self;
        let blocks = tile.x.blocks();
        for panel in tile.panels.clone() {
            scratch.fill(s, grid, panel, S::MULTIPLIES);
            for zero in scratch.zeros.as_flattened_mut() {
                *zero = twice(C::ORIGIN - C::Sum::bias::<S>() - *zero);
            }
            let table = C::table(s, &grid.levels);
            let packed: &[[u8; BYTES]] = &grid.codes.as_chunks().0[panel * blocks * C::LINES..][..blocks * C::LINES];
            if MR == 1 {
                for row in tile.rows.clone() {
                    let start = [s.splat(0.0); MR];
                    let part = Part::<C> { tile, grid, scratch: &*scratch, codes: PhantomData };
                    let sums = part.rows::<S, MR, false>(s, table, packed, 0..blocks, row, start);
                    part.finish::<S, MR>(s, panel, row, sums);
                }
                continue;
            }
            scratch.sums.resize(tile.rows.len().next_multiple_of(MR), Default::default());
            let mut first = 0;
            // Once even without any block.
            while first == 0 || first < blocks {
                let slab = first..blocks.min(first + SLAB);
                let packed = &packed[slab.start * C::LINES..slab.end * C::LINES];
                if C::DECODES {
                    decode::<S, C>(s, table, packed, &mut scratch.lines);
                }
                for row in tile.rows.clone().step_by(MR) {
                    let at = row - tile.rows.start;
                    let mut sums = [s.splat(0.0); MR];
                    if first > 0 {
                        for r in 0..MR {
                            sums[r] = s.load(&scratch.sums[at + r]);
                        }
                    }
                    let part = Part::<C> { tile, grid, scratch: &*scratch, codes: PhantomData };
                    let lines = if C::DECODES { &scratch.lines } else { packed };
                    sums = part.rows::<S, MR, true>(s, table, lines, slab.clone(), row, sums);
                    if slab.end == blocks {
                        part.finish::<S, MR>(s, panel, row, sums);
                    } else {
                        for r in 0..MR {
                            s.store(sums[r], &mut scratch.sums[at + r]);
                        }
                    }
                }
                first += SLAB;
            }
        }
    }
}

/// Bytes of one quad of K a line.
#[inline(always)]
fn decode<S: Simd, C: Codes>(s: S, table: C::Table<S>, packed: &[[u8; BYTES]], lines: &mut Vec<[u8; BYTES]>) {
    lines.resize(2 * packed.len(), [0; BYTES]);
    for at in 0..packed.len() {
        let [low, high] = C::decode(s, table, s.load_bytes(&packed[at]));
        s.store_bytes(low, &mut lines[2 * at]);
        s.store_bytes(high, &mut lines[2 * at + 1]);
    }
}

/// One panel, ready for its activation rows.
struct Part<'a, C> {
    tile: &'a Tile<'a>,
    grid: &'a Grid,
    scratch: &'a Scratch,
    codes: PhantomData<C>,
}

impl<C: Codes> Part<'_, C> {
    /// Adds the blocks of `slab` to the sums of `MR` rows; `lines` are the slab's, decoded or not.
    #[inline(always)]
    fn rows<S: Simd, const MR: usize, const DECODED: bool>(
        &self,
        s: S,
        table: C::Table<S>,
        lines: &[[u8; BYTES]],
        slab: Range<usize>,
        row: usize,
        mut sums: [S::F32; MR],
    ) -> [S::F32; MR] {
        let x = &self.tile.x.coded_tile::<MR>(row)[slab.clone()];
        let Scratch { numbers, integers, zeros, .. } = self.scratch;
        let (every_zero, every_integer) = (mask(zeros), mask(integers));
        let group_blocks = self.grid.group_blocks;
        let per_block = if DECODED { QUADS } else { C::LINES };
        let mut group = slab.start / group_blocks;
        let mut at = 0;
        // Indices instead of zipped iterators, whose calls are not always inlined here.
        while at < slab.len() {
            let end = slab.len().min((group + 1) * group_blocks - slab.start);
            let integer = s.load_i32(&integers[group & every_integer]);
            let zero = s.load_i32(&zeros[group & every_zero]);
            for block in at..end {
                let (lines, x) = (&lines[block * per_block..][..per_block], &x[block]);
                if MR == 1 {
                    prefetch(s, lines);
                }
                let mut totals = [integer; MR];
                for part in 0..C::Sum::PARTS {
                    let mut dots = [C::Sum::start(s, zero, integer, &x[0], part); MR];
                    for r in 1..MR {
                        dots[r] = C::Sum::start(s, zero, integer, &x[r], part);
                    }
                    let lines = &lines[part * per_block / C::Sum::PARTS..][..per_block / C::Sum::PARTS];
                    let quad = part * QUADS / C::Sum::PARTS;
                    for i in 0..lines.len() {
                        let bytes = s.load_bytes(&lines[i]);
                        if DECODED || C::LINES == QUADS {
                            let bytes = if C::DECODES { bytes } else { C::decode(s, table, bytes)[0] };
                            let bytes = C::Sum::bytes(s, bytes);
                            for r in 0..MR {
                                dots[r] = C::Sum::dot(s, dots[r], bytes, s.splat4(&x[r].quads[quad + i]), integer);
                            }
                        } else {
                            let [low, high] = C::decode(s, table, bytes);
                            let (low, high) = (C::Sum::bytes(s, low), C::Sum::bytes(s, high));
                            for r in 0..MR {
                                let quads = &x[r].quads;
                                dots[r] = C::Sum::dot(s, dots[r], low, s.splat4(&quads[quad + 2 * i]), integer);
                                dots[r] = C::Sum::dot(s, dots[r], high, s.splat4(&quads[quad + 2 * i + 1]), integer);
                            }
                        }
                    }
                    for r in 0..MR {
                        let total = C::Sum::total(s, dots[r], integer);
                        totals[r] = if part == 0 { total } else { s.add_i32(totals[r], total) };
                    }
                }
                for r in 0..MR {
                    let mut part = s.to_f32(totals[r]);
                    // Without numbers the integers were multiplied in already.
                    if let Some(number) = numbers.get(group) {
                        part = s.mul(part, s.load(number));
                    }
                    sums[r] = s.fma(part, s.splat(x[r].scale), sums[r]);
                }
            }
            at = end;
            group += 1;
        }
        sums
    }

    /// Second level, minimums, and what all kernels add; stores the rows that there are.
    #[inline(always)]
    fn finish<S: Simd, const MR: usize>(&self, s: S, panel: usize, row: usize, mut sums: [S::F32; MR]) {
        let (x, group_blocks) = (self.tile.x.coded_tile::<MR>(row), self.grid.group_blocks);
        for r in 0..MR {
            sums[r] = s.mul(sums[r], s.load(&self.scratch.factor));
        }
        for group in 0..self.scratch.mins.len() {
            let first = group * group_blocks;
            let mut x_sums = [0.0; MR];
            for block in first..x.len().min(first + group_blocks) {
                for r in 0..MR {
                    x_sums[r] += x[block][r].scaled_sum();
                }
            }
            for r in 0..MR {
                sums[r] = s.fma(s.load(&self.scratch.mins[group]), s.splat(x_sums[r]), sums[r]);
            }
        }
        for r in 0..MR.min(self.tile.rows.end - row) {
            self.tile.finish(s, panel, row + r, sums[r]);
        }
    }
}

/// How far ahead of a single row's product codes are asked for: hardware prefetchers stop at 4 KiB pages.
const AHEAD: usize = 8192;

/// Asks for the codes that come [`AHEAD`] of these.
#[inline(always)]
pub(super) fn prefetch<S: Simd>(s: S, lines: &[[u8; BYTES]]) {
    for line in lines {
        s.prefetch(line.as_ptr().wrapping_add(AHEAD));
    }
}
