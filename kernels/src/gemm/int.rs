//! Quantized weights by signed-byte activations.
//!
//! In every block of 32 the products of codes are summed exactly in integers; floats begin with one conversion a block:
//! `sum += scale[group] * sum_blocks(x_scale[block] * (dot - zero * x_sum[block])) (+ min[group] * ...)`.
//! `dot - zero * x_sum` stays below 2^24, so it is exact in f32 too and zero points cost one fused operation.

use super::tile::{Inner, Tile, walk};
use crate::act::{CodeBlock, CodedRow};
use crate::simd::{BYTES, LANES, Simd, SimdOp};
use crate::weight::{Body, Grid, GroupNumbers, Levels, PackedZeros};

/// How codes become levels and meet activations, 32 values of K at a time.
pub(super) trait Codes {
    /// Cache lines of a block of one panel.
    const LINES: usize;
    /// A decoding table in registers.
    type Table<S: Simd>: Copy;

    fn table<S: Simd>(s: S, levels: &Levels) -> Self::Table<S>;

    /// What to add to a zero point to make up for how [`Codes::dot`] shifts levels.
    fn shift<S: Simd>() -> i32;

    /// For each activation row, the 16 dot products of a block.
    fn dot<S: Simd, const MR: usize>(
        s: S,
        table: Self::Table<S>,
        lines: &[[u8; BYTES]],
        x: [&CodeBlock; MR],
    ) -> [S::I32; MR];
}

/// [`Levels::Linear4`]: codes are levels.
pub(super) struct Linear4;
/// [`Levels::Table4`]: a byte shuffle away.
pub(super) struct Table4;
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
    fn dot<S: Simd, const MR: usize>(s: S, _: (), lines: &[[u8; BYTES]], x: [&CodeBlock; MR]) -> [S::I32; MR] {
        let mut sums = [s.nibble_zero(); MR];
        for (i, line) in lines[..Self::LINES].iter().enumerate() {
            let line = s.load_bytes(line);
            let (low, high) = (s.low_nibbles(line), s.high_nibbles(line));
            for r in 0..MR {
                sums[r] = s.dot_nibbles(sums[r], low, s.splat4(&x[r][2 * i]));
                sums[r] = s.dot_nibbles(sums[r], high, s.splat4(&x[r][2 * i + 1]));
            }
        }
        let mut totals = [s.splat_i32(0); MR];
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
        lines: &[[u8; BYTES]],
        x: [&CodeBlock; MR],
    ) -> [S::I32; MR] {
        let mut sums = [s.splat_i32(0); MR];
        for (i, line) in lines[..Self::LINES].iter().enumerate() {
            let line = s.load_bytes(line);
            let low = s.levels(s.lookup_bytes(table, s.low_nibbles(line)));
            for r in 0..MR {
                sums[r] = s.dot_levels(sums[r], low, s.splat4(&x[r][2 * i]));
            }
            let high = s.levels(s.lookup_bytes(table, s.high_nibbles(line)));
            for r in 0..MR {
                sums[r] = s.dot_levels(sums[r], high, s.splat4(&x[r][2 * i + 1]));
            }
        }
        sums
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
    fn dot<S: Simd, const MR: usize>(s: S, _: (), lines: &[[u8; BYTES]], x: [&CodeBlock; MR]) -> [S::I32; MR] {
        let mut sums = [s.splat_i32(0); MR];
        for (i, line) in lines[..Self::LINES].iter().enumerate() {
            let levels = s.levels(s.flip_top_bits(s.load_bytes(line)));
            for r in 0..MR {
                sums[r] = s.dot_levels(sums[r], levels, s.splat4(&x[r][i]));
            }
        }
        sums
    }
}

/// The kernel for codes `C`, `MR` rows at a time.
pub(super) fn run<S: Simd, C: Codes, const MR: usize>(tile: &Tile) {
    if let (Some(s), Body::Grid(grid)) = (S::new(), &tile.weight.body) {
        s.vectorize(Int::<C, MR> { tile, grid, codes: std::marker::PhantomData });
    }
}

struct Int<'a, C, const MR: usize> {
    tile: &'a Tile<'a>,
    grid: &'a Grid,
    codes: std::marker::PhantomData<C>,
}

impl<C: Codes, const MR: usize> SimdOp for Int<'_, C, MR> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        walk::<S, MR>(s, self.tile, &self);
    }
}

impl<S: Simd, C: Codes, const M: usize> Inner<S> for Int<'_, C, M> {
    #[inline(always)]
    fn rows<const MR: usize>(&self, s: S, panel: usize, row: usize) {
        let (tile, grid) = (self.tile, self.grid);
        let blocks = tile.x.blocks();
        let lines: &[[u8; BYTES]] = &grid.codes.as_chunks().0[panel * blocks * C::LINES..][..blocks * C::LINES];
        let table = C::table(s, &grid.levels);
        let shift = s.splat(C::shift::<S>() as f32);
        let mut scales = grid.scales.panel(panel, grid.groups);
        let mut zeros = Offsets::panel(&grid.zeros, panel, grid.groups);
        let constant = match grid.zeros {
            PackedZeros::Const(zero) => s.splat((zero + C::shift::<S>()) as f32),
            _ => shift,
        };
        let empty = CodedRow { codes: &[], scales: &[], sums: &[], scaled_sums: &[] };
        let mut x = [empty; MR];
        for r in 0..MR {
            x[r] = tile.x.coded_row(row + r);
        }

        let mut sums = [s.splat(0.0); MR];
        for group in 0..grid.groups {
            let scale = scales.next(s, group);
            let zero = match &zeros {
                Offsets::Int(rows) => s.add(s.load_u8(&rows[group]), shift),
                _ => constant,
            };
            let first = group * grid.group_blocks;
            let end = blocks.min(first + grid.group_blocks);
            let mut part = [s.splat(0.0); MR];
            for block in first..end {
                let lines = &lines[block * C::LINES..][..C::LINES];
                if M == 1 {
                    prefetch(s, grid, lines);
                }
                let mut codes = [&EMPTY; MR];
                for r in 0..MR {
                    codes[r] = &x[r].codes[block];
                }
                let dots = C::dot::<S, MR>(s, table, lines, codes);
                for r in 0..MR {
                    let dot = s.fnma(zero, s.splat(x[r].sums[block]), s.to_f32(dots[r]));
                    part[r] = s.fma(dot, s.splat(x[r].scales[block]), part[r]);
                }
            }
            for r in 0..MR {
                sums[r] = s.fma(scale, part[r], sums[r]);
            }
            if let Offsets::Min(mins) = &mut zeros {
                let min = mins.next(s, group);
                for r in 0..MR {
                    let mut sum = 0.0;
                    for scaled in &x[r].scaled_sums[first..end] {
                        sum += scaled;
                    }
                    sums[r] = s.fma(min, s.splat(sum), sums[r]);
                }
            }
        }
        for r in 0..MR {
            tile.finish(s, panel, row + r, sums[r]);
        }
    }
}

static EMPTY: CodeBlock = [[0; 4]; 8];

/// Zero points or minimums of one panel.
pub(super) enum Offsets<'a> {
    Const,
    Int(&'a [[u8; LANES]]),
    Min(GroupNumbers<'a>),
}

impl<'a> Offsets<'a> {
    #[inline(always)]
    pub(super) fn panel(zeros: &'a PackedZeros, panel: usize, groups: usize) -> Self {
        match zeros {
            PackedZeros::Const(_) => Offsets::Const,
            PackedZeros::Int(rows) => Offsets::Int(&rows.as_chunks().0[panel * groups..][..groups]),
            PackedZeros::Min(mins) => Offsets::Min(mins.panel(panel, groups)),
        }
    }
}

/// How far ahead of a single row's product codes are asked for: hardware prefetchers stop at 4 KiB pages.
const AHEAD: usize = 4096;

/// Asks for the codes that come [`AHEAD`] of these.
#[inline(always)]
pub(super) fn prefetch<S: Simd>(s: S, _: &Grid, lines: &[[u8; BYTES]]) {
    for line in lines {
        s.prefetch(line.as_ptr().wrapping_add(AHEAD));
    }
}
