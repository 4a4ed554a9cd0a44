//! How codes become bytes that meet activations, and how their products are summed.

use super::QUADS;
use crate::act::CodedBlock;
use crate::simd::Simd;
use crate::weight::{Levels, NARROW};

/// How codes become bytes.
pub(super) trait Codes {
    /// Cache lines of a packed block of one panel.
    const LINES: usize;
    /// Whether a packed line holds two quads of K.
    const DECODES: bool = Self::LINES < QUADS;
    /// How products are summed.
    type Sum: Sum;
    /// A decoding table in registers.
    type Table<S: Simd>: Copy;

    fn table<S: Simd>(s: S, levels: &Levels) -> Self::Table<S>;

    /// What decoding takes off levels.
    const ORIGIN: i32 = 0;

    /// The bytes of a packed line's quads; the first only, if it has one.
    fn decode<S: Simd>(s: S, table: Self::Table<S>, line: S::Bytes) -> [S::Bytes; 2];
}

/// [`Levels::Linear4`]: codes are levels.
pub(super) struct Linear4;
/// [`Levels::Table4`]: a byte shuffle away.
pub(super) struct Table4;
/// [`Levels::Table4`] with levels of 6 bits, zero point taken off: products of half a block fit in 16-bit sums.
pub(super) struct Narrow4;
/// [`Levels::Table4`] with 128 added: bytes without a sign, as VNNI wants them, straight from the table.
pub(super) struct Unsigned4;
/// [`Levels::Linear8`]: codes - 128 are signed levels.
pub(super) struct Linear8;

impl Codes for Linear4 {
    const LINES: usize = 4;
    type Sum = Nibbles<1>;
    type Table<S: Simd> = ();

    #[inline(always)]
    fn table<S: Simd>(_: S, _: &Levels) {}

    #[inline(always)]
    fn decode<S: Simd>(s: S, _: (), line: S::Bytes) -> [S::Bytes; 2] {
        [s.low_nibbles(line), s.high_nibbles(line)]
    }
}

impl Codes for Table4 {
    const LINES: usize = 4;
    type Sum = Signed;
    type Table<S: Simd> = S::Bytes;

    #[inline(always)]
    fn table<S: Simd>(s: S, levels: &Levels) -> S::Bytes {
        s.splat16(&table(levels))
    }

    #[inline(always)]
    fn decode<S: Simd>(s: S, table: S::Bytes, line: S::Bytes) -> [S::Bytes; 2] {
        [s.lookup_bytes(table, s.low_nibbles(line)), s.lookup_bytes(table, s.high_nibbles(line))]
    }
}

impl Codes for Narrow4 {
    const LINES: usize = 4;
    type Sum = Nibbles<2>;
    type Table<S: Simd> = S::Bytes;
    /// What makes levels unsigned.
    const ORIGIN: i32 = -NARROW;

    #[inline(always)]
    fn table<S: Simd>(s: S, levels: &Levels) -> S::Bytes {
        let mut unsigned = table(levels);
        for level in &mut unsigned {
            *level = level.wrapping_add(NARROW as i8);
        }
        s.splat16(&unsigned)
    }

    #[inline(always)]
    fn decode<S: Simd>(s: S, table: S::Bytes, line: S::Bytes) -> [S::Bytes; 2] {
        Table4::decode(s, table, line)
    }
}

impl Codes for Unsigned4 {
    const LINES: usize = 4;
    type Sum = Nibbles<1>;
    type Table<S: Simd> = S::Bytes;
    const ORIGIN: i32 = -128;

    #[inline(always)]
    fn table<S: Simd>(s: S, levels: &Levels) -> S::Bytes {
        s.splat16(&table(levels).map(|level| level.wrapping_add(-128)))
    }

    #[inline(always)]
    fn decode<S: Simd>(s: S, table: S::Bytes, line: S::Bytes) -> [S::Bytes; 2] {
        Table4::decode(s, table, line)
    }
}

impl Codes for Linear8 {
    const LINES: usize = 8;
    type Sum = Signed;
    type Table<S: Simd> = ();
    const ORIGIN: i32 = 128;

    #[inline(always)]
    fn table<S: Simd>(_: S, _: &Levels) {}

    #[inline(always)]
    fn decode<S: Simd>(s: S, _: (), line: S::Bytes) -> [S::Bytes; 2] {
        [s.flip_top_bits(line); 2]
    }
}

fn table(levels: &Levels) -> [i8; 16] {
    match levels {
        Levels::Table4(table) => *table,
        _ => [0; 16],
    }
}

/// How products of bytes and activations are summed over a block.
pub(super) trait Sum {
    /// Equal parts of a block that have a sum each.
    const PARTS: usize;
    type Dots<S: Simd>: Copy;
    type Bytes<S: Simd>: Copy;

    /// What products add to every byte.
    fn bias<S: Simd>() -> i32;

    /// What zero points, negated and in both halves of every lane, take from part `part` of a block.
    fn start<S: Simd>(s: S, zero: S::I32, integer: S::I32, x: &CodedBlock, part: usize) -> Self::Dots<S>;

    /// Bytes in the form that products want.
    fn bytes<S: Simd>(s: S, bytes: S::Bytes) -> Self::Bytes<S>;

    /// Adds the products of a quad.
    fn dot<S: Simd>(s: S, dots: Self::Dots<S>, bytes: Self::Bytes<S>, x: S::Bytes, integer: S::I32) -> Self::Dots<S>;

    /// The sum, times the group's integer.
    fn total<S: Simd>(s: S, dots: Self::Dots<S>, integer: S::I32) -> S::I32;
}

/// Unsigned bytes that are small enough for [`Simd::dot_nibbles`].
pub(super) struct Nibbles<const PARTS: usize>;

impl<const PARTS: usize> Sum for Nibbles<PARTS> {
    const PARTS: usize = PARTS;
    type Dots<S: Simd> = S::NibbleSum;
    type Bytes<S: Simd> = S::Bytes;

    fn bias<S: Simd>() -> i32 {
        0
    }

    #[inline(always)]
    fn start<S: Simd>(s: S, zero: S::I32, _: S::I32, x: &CodedBlock, part: usize) -> S::NibbleSum {
        s.start_nibbles(zero, splat(s, if PARTS == 1 { x.pair } else { x.half_pairs[part] }))
    }

    #[inline(always)]
    fn bytes<S: Simd>(_: S, bytes: S::Bytes) -> S::Bytes {
        bytes
    }

    #[inline(always)]
    fn dot<S: Simd>(s: S, dots: S::NibbleSum, bytes: S::Bytes, x: S::Bytes, _: S::I32) -> S::NibbleSum {
        s.pin_nibbles(s.dot_nibbles(dots, bytes, x))
    }

    #[inline(always)]
    fn total<S: Simd>(s: S, dots: S::NibbleSum, integer: S::I32) -> S::I32 {
        s.nibble_total(dots, integer)
    }
}

/// Signed bytes.
pub(super) struct Signed;

impl Sum for Signed {
    const PARTS: usize = 1;
    type Dots<S: Simd> = S::I32;
    type Bytes<S: Simd> = S::Levels;

    fn bias<S: Simd>() -> i32 {
        S::LEVEL_BIAS
    }

    #[inline(always)]
    fn start<S: Simd>(s: S, zero: S::I32, integer: S::I32, x: &CodedBlock, _: usize) -> S::I32 {
        s.start_levels(zero, splat(s, x.pair), integer)
    }

    #[inline(always)]
    fn bytes<S: Simd>(s: S, bytes: S::Bytes) -> S::Levels {
        s.levels(bytes)
    }

    #[inline(always)]
    fn dot<S: Simd>(s: S, dots: S::I32, levels: S::Levels, x: S::Bytes, integer: S::I32) -> S::I32 {
        s.pin_levels(s.dot_levels(dots, levels, x, integer))
    }

    #[inline(always)]
    fn total<S: Simd>(_: S, dots: S::I32, _: S::I32) -> S::I32 {
        dots
    }
}

/// The sums of a block's codes, in every lane.
#[inline(always)]
fn splat<S: Simd>(s: S, [low, high]: [i16; 2]) -> S::I32 {
    s.splat_i32(i32::from(low) & 0xffff | i32::from(high) << 16)
}
