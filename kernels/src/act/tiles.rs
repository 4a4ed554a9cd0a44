//! Activation rows as tiles of bfloat16 numbers.

use crate::BLOCK;
use crate::simd::{Simd, SimdOp, TILE_ROWS, TileLines};

/// One row in tiles, line `at` of each: lane i of a line is the pair of values i and i + 16 of a block, the first of them
/// in its low half. Rounded to nearest, ties away from zero.
pub(super) struct EncodeTiles<'a> {
    pub(super) values: &'a [f32],
    pub(super) tiles: &'a mut [TileLines], // (blocks)
    pub(super) at: usize,
}

impl SimdOp for EncodeTiles<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let EncodeTiles { values, tiles, at } = self;
        let at = at % TILE_ROWS;
        let zero = s.splat(0.0);
        let mut poison = zero;
        for (block, tile) in values.as_chunks::<BLOCK>().0.iter().zip(&mut *tiles) {
            let [low, high] = super::halves(block);
            let (low, high) = (s.load(low), s.load(high));
            poison = s.fma(low, zero, s.fma(high, zero, poison));
            s.store_i32(pair(s, low, high), bytemuck::cast_mut(&mut tile.0[at]));
        }
        // A NaN or an infinity anywhere makes every output of its row NaN, as it does in single precision.
        if s.sum(poison).is_nan() {
            tiles.iter_mut().for_each(|tile| tile.0[at] = [NAN_PAIR; _]);
        }
    }
}

/// NaN twice.
const NAN_PAIR: u32 = 0x7fc0_7fc0;

/// Two bfloat16 numbers a lane, rounded to nearest, ties away from zero; for numbers that are finite after that.
#[inline(always)]
pub(crate) fn pair<S: Simd>(s: S, low: S::F32, high: S::F32) -> S::I32 {
    let half = s.splat_i32(0x8000);
    let (low, high) = (s.add_i32(s.to_bits(low), half), s.add_i32(s.to_bits(high), half));
    s.add_i32(s.shr(low, 16), s.and_i32(high, s.splat_i32(-0x10000)))
}
