//! Quantized weights by signed-byte activations.
//!
//! In every block of 32 the products of codes are summed exactly in integers, zero points included; floats begin with
//! one conversion a block: `sum += scale[group] * (x_scale[block] * dot[block])`, then `sum += min[group] * x_sum[group]`
//! for weights with minimums.
//!
//! Scales and zero points of a panel are made ready once, in a [`Scratch`] that stays in the first-level cache, and
//! serve all its activation rows; so the inner loop is the same for every way of storing them.

use super::scratch::Scratch;
use super::tile::Tile;
use crate::Isa;
use crate::act::CodedBlock;
use crate::simd::{BYTES, Simd, SimdOp};
use crate::weight::{Body, Grid, Levels, PackedZeros};
use std::marker::PhantomData;

/// How codes become levels and meet activations, 32 values of K at a time.
pub(super) trait Codes {
    /// Cache lines of a block of one panel.
    const LINES: usize;
    /// A decoding table in registers.
    type Table<S: Simd>: Copy;

    fn table<S: Simd>(s: S, levels: &Levels) -> Self::Table<S>;

    /// What to add to a zero point to make up for how [`Codes::dot`] shifts levels.
    fn shift<S: Simd>() -> i32;

    /// For each activation row, the 16 dot products of a block, less the zero points: `zero` has them negated, in both
    /// halves of every lane.
    fn dot<S: Simd, const MR: usize>(
        s: S,
        table: Self::Table<S>,
        zero: S::I32,
        lines: &[[u8; BYTES]],
        x: &[CodedBlock; MR],
    ) -> [S::I32; MR];
}

/// [`Levels::Linear4`]: codes are levels.
pub(super) struct Linear4;
/// [`Levels::Table4`]: a byte shuffle away.
struct Table4;
/// [`Levels::Table4`] with levels of 6 bits, zero point taken off: products of half a block fit in 16-bit sums.
struct Narrow4;
/// [`Levels::Linear8`]: codes - 128 are signed levels.
pub(super) struct Linear8;

impl Codes for Linear4 {
    const LINES: usize = 4;
    type Table<S: Simd> = ();

    #[inline(always)]
    fn table<S: Simd>(_: S, _: &Levels) {}

    #[inline(always)]
    fn shift<S: Simd>() -> i32 {
        0
    }

    #[inline(always)]
    fn dot<S: Simd, const MR: usize>(
        s: S,
        _: (),
        zero: S::I32,
        lines: &[[u8; BYTES]],
        x: &[CodedBlock; MR],
    ) -> [S::I32; MR] {
        let mut sums = [s.start_nibbles(zero, pair(s, x[0].pair)); MR];
        for r in 1..MR {
            sums[r] = s.start_nibbles(zero, pair(s, x[r].pair));
        }
        for (i, line) in lines[..Self::LINES].iter().enumerate() {
            let line = s.load_bytes(line);
            let low = s.low_nibbles(line);
            for r in 0..MR {
                sums[r] = s.pin_nibbles(s.dot_nibbles(sums[r], low, s.splat4(&x[r].quads[2 * i])));
            }
            let high = s.high_nibbles(line);
            for r in 0..MR {
                sums[r] = s.pin_nibbles(s.dot_nibbles(sums[r], high, s.splat4(&x[r].quads[2 * i + 1])));
            }
        }
        let mut totals = [zero; MR];
        for r in 0..MR {
            totals[r] = s.nibble_total(sums[r]);
        }
        totals
    }
}

impl Codes for Table4 {
    const LINES: usize = 4;
    type Table<S: Simd> = S::Bytes;

    #[inline(always)]
    fn table<S: Simd>(s: S, levels: &Levels) -> S::Bytes {
        match levels {
            Levels::Table4(table) => s.splat16(table),
            _ => s.splat16(&[0; 16]),
        }
    }

    #[inline(always)]
    fn shift<S: Simd>() -> i32 {
        S::LEVEL_BIAS
    }

    #[inline(always)]
    fn dot<S: Simd, const MR: usize>(
        s: S,
        table: S::Bytes,
        zero: S::I32,
        lines: &[[u8; BYTES]],
        x: &[CodedBlock; MR],
    ) -> [S::I32; MR] {
        let mut sums = start(s, zero, x);
        for (i, line) in lines[..Self::LINES].iter().enumerate() {
            let line = s.load_bytes(line);
            let low = s.levels(s.lookup_bytes(table, s.low_nibbles(line)));
            for r in 0..MR {
                sums[r] = s.pin_levels(s.dot_levels(sums[r], low, s.splat4(&x[r].quads[2 * i])));
            }
            let high = s.levels(s.lookup_bytes(table, s.high_nibbles(line)));
            for r in 0..MR {
                sums[r] = s.pin_levels(s.dot_levels(sums[r], high, s.splat4(&x[r].quads[2 * i + 1])));
            }
        }
        sums
    }
}

impl Narrow4 {
    /// What makes levels unsigned.
    const BIAS: i32 = 32;

    fn fits(grid: &Grid) -> bool {
        let zero = match grid.zeros {
            PackedZeros::Const(zero) => zero,
            PackedZeros::Int(_) => return false,
            PackedZeros::Min(_) => 0,
        };
        let from = |low: i32| low..low + 2 * Self::BIAS;
        match &grid.levels {
            Levels::Table4(table) => table.iter().all(|level| {
                let level = i32::from(*level);
                from(-Self::BIAS).contains(&level) && from(-Self::BIAS).contains(&(level - zero))
            }),
            _ => false,
        }
    }
}

impl Codes for Narrow4 {
    const LINES: usize = 4;
    type Table<S: Simd> = S::Bytes;

    #[inline(always)]
    fn table<S: Simd>(s: S, levels: &Levels) -> S::Bytes {
        match levels {
            Levels::Table4(table) => s.splat16(&table.map(|level| level.wrapping_add(Self::BIAS as i8))),
            _ => s.splat16(&[0; 16]),
        }
    }

    #[inline(always)]
    fn shift<S: Simd>() -> i32 {
        Self::BIAS
    }

    #[inline(always)]
    fn dot<S: Simd, const MR: usize>(
        s: S,
        table: S::Bytes,
        zero: S::I32,
        lines: &[[u8; BYTES]],
        x: &[CodedBlock; MR],
    ) -> [S::I32; MR] {
        let mut totals = [s.splat_i32(0); MR];
        for (half, lines) in lines[..Self::LINES].as_chunks::<2>().0.iter().enumerate() {
            let mut sums = [s.start_nibbles(zero, pair(s, x[0].half_pairs[half])); MR];
            for r in 1..MR {
                sums[r] = s.start_nibbles(zero, pair(s, x[r].half_pairs[half]));
            }
            for (i, line) in lines.iter().enumerate() {
                let (line, at) = (s.load_bytes(line), 4 * half + 2 * i);
                let low = s.lookup_bytes(table, s.low_nibbles(line));
                for r in 0..MR {
                    sums[r] = s.pin_nibbles(s.dot_nibbles(sums[r], low, s.splat4(&x[r].quads[at])));
                }
                let high = s.lookup_bytes(table, s.high_nibbles(line));
                for r in 0..MR {
                    sums[r] = s.pin_nibbles(s.dot_nibbles(sums[r], high, s.splat4(&x[r].quads[at + 1])));
                }
            }
            for r in 0..MR {
                totals[r] = s.add_i32(totals[r], s.nibble_total(sums[r]));
            }
        }
        totals
    }
}

impl Codes for Linear8 {
    const LINES: usize = 8;
    type Table<S: Simd> = ();

    #[inline(always)]
    fn table<S: Simd>(_: S, _: &Levels) {}

    #[inline(always)]
    fn shift<S: Simd>() -> i32 {
        S::LEVEL_BIAS - 128
    }

    #[inline(always)]
    fn dot<S: Simd, const MR: usize>(
        s: S,
        _: (),
        zero: S::I32,
        lines: &[[u8; BYTES]],
        x: &[CodedBlock; MR],
    ) -> [S::I32; MR] {
        let mut sums = start(s, zero, x);
        for (i, line) in lines[..Self::LINES].iter().enumerate() {
            let levels = s.levels(s.flip_top_bits(s.load_bytes(line)));
            for r in 0..MR {
                sums[r] = s.pin_levels(s.dot_levels(sums[r], levels, s.splat4(&x[r].quads[i])));
            }
        }
        sums
    }
}

#[inline(always)]
fn start<S: Simd, const MR: usize>(s: S, zero: S::I32, x: &[CodedBlock; MR]) -> [S::I32; MR] {
    let mut sums = [zero; MR];
    for r in 0..MR {
        sums[r] = s.start_levels(zero, pair(s, x[r].pair));
    }
    sums
}

/// The sums of a block's codes, in every lane.
#[inline(always)]
fn pair<S: Simd>(s: S, pair: [i16; 2]) -> S::I32 {
    s.splat_i32(both_halves(pair))
}

/// Two 16-bit integers in one lane.
#[inline(always)]
fn both_halves([low, high]: [i16; 2]) -> i32 {
    i32::from(low) & 0xffff | i32::from(high) << 16
}

/// The kernel for codes `C`, `MR` rows at a time.
pub(super) fn run<S: Simd, C: Codes, const MR: usize>(tile: &Tile) {
    if let (Some(s), Body::Grid(grid)) = (S::new(), &tile.weight.body) {
        Scratch::with(|scratch| s.vectorize(Run::<C, MR> { tile, grid, scratch, codes: PhantomData }));
    }
}

/// The kernel for tables, `MR` rows at a time: the narrow one where there is one and levels allow it.
pub(super) fn run_table<S: Simd, const MR: usize>(tile: &Tile) {
    match &tile.weight.body {
        Body::Grid(grid) if S::ISA == Isa::Avx2 && Narrow4::fits(grid) => run::<S, Narrow4, MR>(tile),
        _ => run::<S, Table4, MR>(tile),
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
        for panel in tile.panels.clone() {
            scratch.fill(s, grid, panel);
            for zero in scratch.zeros.as_flattened_mut() {
                *zero = both_halves([-(*zero + C::shift::<S>()) as i16; 2]);
            }
            let int = Int::<C> { tile, grid, scratch: &*scratch, codes: PhantomData };
            for row in tile.rows.clone().step_by(MR) {
                int.rows::<S, MR>(s, panel, row);
            }
        }
    }
}

/// One panel, ready for its activation rows.
struct Int<'a, C> {
    tile: &'a Tile<'a>,
    grid: &'a Grid,
    scratch: &'a Scratch,
    codes: PhantomData<C>,
}

impl<C: Codes> Int<'_, C> {
    #[inline(always)]
    fn rows<S: Simd, const MR: usize>(&self, s: S, panel: usize, row: usize) {
        let (tile, grid) = (self.tile, self.grid);
        let (x, blocks) = (tile.x.coded_tile::<MR>(row), tile.x.blocks());
        let lines: &[[u8; BYTES]] = &grid.codes.as_chunks().0[panel * blocks * C::LINES..][..blocks * C::LINES];
        let table = C::table(s, &grid.levels);
        let (Scratch { scales, zeros, mins }, mask) = (self.scratch, self.scratch.mask());
        let mut sums = [s.splat(0.0); MR];
        // Indices instead of zipped iterators, whose calls are not always inlined here.
        for group in 0..grid.groups {
            let (scale, zero) = (&scales[group], s.load_i32(&zeros[group & mask]));
            let first = group * grid.group_blocks;
            for block in first..blocks.min(first + grid.group_blocks) {
                let (lines, x) = (&lines[block * C::LINES..][..C::LINES], &x[block]);
                if MR == 1 {
                    prefetch(s, lines);
                }
                let dots = C::dot::<S, MR>(s, table, zero, lines, x);
                for r in 0..MR {
                    let part = s.mul(s.to_f32(dots[r]), s.splat(x[r].scale));
                    sums[r] = s.fma(s.load(scale), part, sums[r]);
                }
            }
        }
        for group in 0..mins.len() {
            let first = group * grid.group_blocks;
            let mut x_sums = [0.0; MR];
            for block in first..blocks.min(first + grid.group_blocks) {
                for r in 0..MR {
                    x_sums[r] += x[block][r].scaled_sum();
                }
            }
            for r in 0..MR {
                sums[r] = s.fma(s.load(&mins[group]), s.splat(x_sums[r]), sums[r]);
            }
        }
        for r in 0..MR.min(tile.rows.end - row) {
            tile.finish(s, panel, row + r, sums[r]);
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
