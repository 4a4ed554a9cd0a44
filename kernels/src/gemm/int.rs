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
//! Rows that fit in registers meet codes that are decoded in registers. More rows meet a slab of blocks that was decoded to
//! bytes, a quad of K to a line, and stays in the first-level cache.

mod codes;

use super::scratch::{PANELS, Scratch, mask, twice};
use super::tile::Tile;
use crate::simd::{BYTES, Simd, SimdOp};
use crate::weight::{Body, Grid};
use codes::{Codes, Linear4, Linear8, Narrow4, Sum, Table4, Unsigned4};
use std::marker::PhantomData;
use std::ops::Range;

/// Blocks that are decoded at a time: 16 KiB of bytes.
const SLAB: usize = 32;
/// Rows of the widest kernels, and what they multiply at a time when there are no more: half of the work for twice as many.
const MANY: usize = 8;
const FEW: usize = 4;
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
        _ if S::LEVEL_BIAS == 128 => run::<S, Unsigned4, MR>(tile),
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
    scratch: &'a mut [Scratch; PANELS],
    codes: PhantomData<C>,
}

impl<C: Codes, const MR: usize> SimdOp for Run<'_, C, MR> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(mut self, s: S) {
        let Range { start: mut panel, end } = self.tile.panels;
        // Rows that are in registers at the same time meet codes as they come from memory.
        let once = self.tile.rows.len() <= MR;
        if !once && S::PANELS == PANELS {
            while panel + PANELS <= end {
                self.many::<S, PANELS>(s, panel);
                panel += PANELS;
            }
        }
        while panel < end {
            if once && MR == MANY && self.tile.rows.len() <= FEW {
                self.each::<S, FEW>(s, panel);
            } else if once {
                self.each::<S, MR>(s, panel);
            } else {
                self.many::<S, 1>(s, panel);
            }
            panel += 1;
        }
    }
}

impl<C: Codes, const MR: usize> Run<'_, C, MR> {
    /// Makes a panel's numbers ready.
    #[inline(always)]
    fn prepare<S: Simd>(&mut self, s: S, panel: usize, side: usize) {
        let scratch = &mut self.scratch[side];
        scratch.fill(s, self.grid, panel, S::MULTIPLIES);
        for zero in scratch.zeros.as_flattened_mut() {
            *zero = twice(C::ORIGIN - C::Sum::bias::<S>() - *zero);
        }
    }

    /// One panel, decoded in registers, by the tile's only rows, `ROWS` at most.
    #[inline(always)]
    fn each<S: Simd, const ROWS: usize>(&mut self, s: S, panel: usize) {
        self.prepare(s, panel, 0);
        let (tile, grid, scratch) = (self.tile, self.grid, &self.scratch[0]);
        let (blocks, row) = (tile.x.blocks(), tile.rows.start);
        let packed = &grid.codes.as_chunks().0[panel * blocks * C::LINES..][..blocks * C::LINES];
        let table = C::table(s, &grid.levels);
        let part = Part::<C, 1> { tile, grid, scratch: [scratch], codes: PhantomData };
        let sums = [[s.splat(0.0); ROWS]; 1];
        let sums = part.rows::<S, MR, ROWS, false>(s, table, [packed], 0..blocks, row, sums);
        part.finish::<S, MR, ROWS>(s, panel, row, sums);
    }

    /// `NP` panels, a slab after another, by `MR` rows at a time.
    #[inline(always)]
    fn many<S: Simd, const NP: usize>(&mut self, s: S, panel: usize) {
        for side in 0..NP {
            self.prepare(s, panel + side, side);
        }
        let (tile, grid) = (self.tile, self.grid);
        let blocks = tile.x.blocks();
        let table = C::table(s, &grid.levels);
        for scratch in &mut self.scratch[..NP] {
            scratch.sums.resize(tile.rows.len().next_multiple_of(MR), Default::default());
        }
        let mut first = 0;
        // Once even without any block.
        while first == 0 || first < blocks {
            let slab = first..blocks.min(first + SLAB);
            let mut packed: [&[[u8; BYTES]]; NP] = [&[]; NP];
            for side in 0..NP {
                let from = (panel + side) * blocks;
                packed[side] = &grid.codes.as_chunks().0[(from + slab.start) * C::LINES..(from + slab.end) * C::LINES];
                if C::DECODES {
                    decode::<S, C>(s, table, packed[side], &mut self.scratch[side].lines);
                }
            }
            for row in tile.rows.clone().step_by(MR) {
                let at = row - tile.rows.start;
                let mut sums = [[s.splat(0.0); MR]; NP];
                if first > 0 {
                    for side in 0..NP {
                        for r in 0..MR {
                            sums[side][r] = s.load(&self.scratch[side].sums[at + r]);
                        }
                    }
                }
                let mut scratch = [&self.scratch[0]; NP];
                let mut lines = packed;
                for side in 0..NP {
                    scratch[side] = &self.scratch[side];
                    if C::DECODES {
                        lines[side] = &self.scratch[side].lines;
                    }
                }
                let part = Part::<C, NP> { tile, grid, scratch, codes: PhantomData };
                sums = part.rows::<S, MR, MR, true>(s, table, lines, slab.clone(), row, sums);
                if slab.end == blocks {
                    part.finish::<S, MR, MR>(s, panel, row, sums);
                } else {
                    for side in 0..NP {
                        for r in 0..MR {
                            s.store(sums[side][r], &mut self.scratch[side].sums[at + r]);
                        }
                    }
                }
            }
            first += SLAB;
        }
    }
}

/// Bytes of one quad of K a line.
#[inline(always)]
fn decode<S: Simd, C: Codes>(s: S, table: C::Table<S>, packed: &[[u8; BYTES]], lines: &mut Vec<[u8; BYTES]>) {
    lines.resize(2 * packed.len(), [0; BYTES]);
    for at in 0..packed.len() {
        s.prefetch(packed[at].as_ptr().wrapping_add(AHEAD));
        let [low, high] = C::decode(s, table, s.load_bytes(&packed[at]));
        s.store_bytes(low, &mut lines[2 * at]);
        s.store_bytes(high, &mut lines[2 * at + 1]);
    }
}

/// Panels, ready for their activation rows.
struct Part<'a, C, const NP: usize> {
    tile: &'a Tile<'a>,
    grid: &'a Grid,
    scratch: [&'a Scratch; NP],
    codes: PhantomData<C>,
}

impl<C: Codes, const NP: usize> Part<'_, C, NP> {
    /// Adds the blocks of `slab` to the sums of `MR` rows of activations that lie in tiles of `TILE`; `lines` are the slab's,
    /// decoded or not.
    #[inline(always)]
    fn rows<S: Simd, const TILE: usize, const MR: usize, const DECODED: bool>(
        &self,
        s: S,
        table: C::Table<S>,
        lines: [&[[u8; BYTES]]; NP],
        slab: Range<usize>,
        row: usize,
        mut sums: [[S::F32; MR]; NP],
    ) -> [[S::F32; MR]; NP] {
        let x = &self.tile.x.coded_tile::<TILE>(row)[slab.clone()];
        let (every_zero, every_integer) = (mask(&self.scratch[0].zeros), mask(&self.scratch[0].integers));
        let group_blocks = self.grid.group_blocks;
        let per_block = if DECODED { QUADS } else { C::LINES };
        let mut group = slab.start / group_blocks;
        let mut at = 0;
        // Indices instead of zipped iterators, whose calls are not always inlined here.
        while at < slab.len() {
            let end = slab.len().min((group + 1) * group_blocks - slab.start);
            let mut integer = [s.splat_i32(0); NP];
            let mut zero = [s.splat_i32(0); NP];
            for p in 0..NP {
                integer[p] = s.load_i32(&self.scratch[p].integers[group & every_integer]);
                zero[p] = s.load_i32(&self.scratch[p].zeros[group & every_zero]);
            }
            for block in at..end {
                let x = &x[block];
                let mut block_lines = lines;
                for p in 0..NP {
                    block_lines[p] = &lines[p][block * per_block..][..per_block];
                    if !DECODED {
                        prefetch(s, block_lines[p]);
                    }
                }
                let mut totals = [[integer[0]; MR]; NP];
                for part in 0..C::Sum::PARTS {
                    let mut dots = [[C::Sum::start(s, zero[0], integer[0], &x[0], part); MR]; NP];
                    for p in 0..NP {
                        for r in 0..MR {
                            dots[p][r] = C::Sum::start(s, zero[p], integer[p], &x[r], part);
                        }
                    }
                    let (lines, quad) = (per_block / C::Sum::PARTS, part * QUADS / C::Sum::PARTS);
                    for i in part * lines..(part + 1) * lines {
                        if DECODED || C::LINES == QUADS {
                            let mut bytes = [C::Sum::bytes(s, s.load_bytes(&block_lines[0][i])); NP];
                            for p in 0..NP {
                                let line = s.load_bytes(&block_lines[p][i]);
                                let line = if C::DECODES { line } else { C::decode(s, table, line)[0] };
                                bytes[p] = C::Sum::bytes(s, line);
                            }
                            for r in 0..MR {
                                let x = s.splat4(&x[r].quads[quad + i - part * lines]);
                                for p in 0..NP {
                                    dots[p][r] = C::Sum::dot(s, dots[p][r], bytes[p], x, integer[p]);
                                }
                            }
                        } else {
                            for p in 0..NP {
                                let [low, high] = C::decode(s, table, s.load_bytes(&block_lines[p][i]));
                                let (low, high) = (C::Sum::bytes(s, low), C::Sum::bytes(s, high));
                                let quad = quad + 2 * (i - part * lines);
                                for r in 0..MR {
                                    let quads = &x[r].quads;
                                    dots[p][r] = C::Sum::dot(s, dots[p][r], low, s.splat4(&quads[quad]), integer[p]);
                                    dots[p][r] =
                                        C::Sum::dot(s, dots[p][r], high, s.splat4(&quads[quad + 1]), integer[p]);
                                }
                            }
                        }
                    }
                    for p in 0..NP {
                        for r in 0..MR {
                            let total = C::Sum::total(s, dots[p][r], integer[p]);
                            totals[p][r] = if part == 0 { total } else { s.add_i32(totals[p][r], total) };
                        }
                    }
                }
                for p in 0..NP {
                    // Without numbers the integers were multiplied in already.
                    let number = self.scratch[p].numbers.get(group);
                    for r in 0..MR {
                        let mut part = s.to_f32(totals[p][r]);
                        if let Some(number) = number {
                            part = s.mul(part, s.load(number));
                        }
                        sums[p][r] = s.fma(part, s.splat(x[r].scale), sums[p][r]);
                    }
                }
            }
            at = end;
            group += 1;
        }
        sums
    }

    /// Second level, minimums, and what all kernels add; stores the rows that there are.
    #[inline(always)]
    fn finish<S: Simd, const TILE: usize, const MR: usize>(
        &self,
        s: S,
        panel: usize,
        row: usize,
        mut sums: [[S::F32; MR]; NP],
    ) {
        let (x, group_blocks) = (self.tile.x.coded_tile::<TILE>(row), self.grid.group_blocks);
        for p in 0..NP {
            let Scratch { factor, mins, .. } = self.scratch[p];
            for r in 0..MR {
                sums[p][r] = s.mul(sums[p][r], s.load(factor));
            }
            for group in 0..mins.len() {
                let first = group * group_blocks;
                let mut x_sums = [0.0; MR];
                for block in first..x.len().min(first + group_blocks) {
                    for r in 0..MR {
                        x_sums[r] += x[block][r].scaled_sum();
                    }
                }
                for r in 0..MR {
                    sums[p][r] = s.fma(s.load(&mins[group]), s.splat(x_sums[r]), sums[p][r]);
                }
            }
        }
        for r in 0..MR.min(self.tile.rows.end - row) {
            for p in 0..NP {
                self.tile.finish(s, panel + p, row + r, sums[p][r]);
            }
        }
    }
}

/// How far ahead of their decoding codes are asked for: hardware prefetchers stop at 4 KiB pages.
const AHEAD: usize = 8192;

/// Asks for the codes that come [`AHEAD`] of these.
#[inline(always)]
pub(super) fn prefetch<S: Simd>(s: S, lines: &[[u8; BYTES]]) {
    for line in lines {
        s.prefetch(line.as_ptr().wrapping_add(AHEAD));
    }
}
