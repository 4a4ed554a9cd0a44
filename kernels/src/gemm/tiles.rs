//! Quantized weights by bfloat16 activations in tile registers: for prompts, where a decoded weight meets many rows.
//!
//! A slab of blocks of two panels is decoded to bfloat16, scale, zero point and minimum included; it stays in the
//! first-level cache while it meets the rows of the task, 32 at a time. Sums are in single precision; those of a slab are
//! added to the ones before it.
//!
//! ```text
//! value = round(level * scale + (min - zero * scale))      y = sum_k(value[k] * round(x[k]))
//! ```

use super::float;
use super::scratch::{Scratch, mask};
use super::tile::Tile;
use crate::act::pair;
use crate::simd::{Amx, Avx512, BYTES, Simd, SimdOp, TILE_ROWS, TileLines};
use crate::weight::{Body, Grid};
use bytemuck::Zeroable;
use std::cell::RefCell;
use std::ops::Range;

/// Blocks that are decoded at a time: 32 KiB of two panels.
const SLAB: usize = 16;
/// Cache lines of a block with 4-bit codes.
const LINES4: usize = 4;
/// Cache lines of a block with 8-bit codes.
const LINES8: usize = 8;

/// Buffers that a thread uses for task after task.
#[derive(Default)]
struct Buffers {
    /// Decoded blocks of two panels.
    decoded: [Vec<TileLines>; 2],
    /// (panels, tiles) sums of the blocks so far, and one to spare.
    sums: Vec<TileLines>,
}

thread_local! {
    static TILES: RefCell<Buffers> = RefCell::default();
}

/// The kernel for 4-bit codes, evenly spaced or through a table.
pub(super) fn codes4(tile: &Tile) {
    run::<LINES4>(tile);
}

/// The kernel for 8-bit codes.
pub(super) fn codes8(tile: &Tile) {
    run::<LINES8>(tile);
}

fn run<const LINES: usize>(tile: &Tile) {
    if let (Some(amx), Some(s), Body::Grid(grid)) = (Amx::new(), Avx512::new(), &tile.weight.body) {
        Scratch::with(|[scratch, _]| {
            TILES.with_borrow_mut(|tiles| s.vectorize(Run::<LINES> { tile, grid, scratch, buffers: tiles, amx }));
        });
    }
}

struct Run<'a, const LINES: usize> {
    tile: &'a Tile<'a>,
    grid: &'a Grid,
    scratch: &'a mut Scratch,
    buffers: &'a mut Buffers,
    amx: Amx,
}

impl<const LINES: usize> SimdOp for Run<'_, LINES> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let Run { tile, grid, scratch, buffers: Buffers { decoded, sums }, amx } = self;
        let blocks = tile.x.blocks();
        let tiles = tile.rows.len().div_ceil(TILE_ROWS);
        let spare = tile.panels.len() * tiles;
        sums.resize(spare + 1, TileLines::zeroed());
        let mut first = 0;
        // Once even without any block.
        while first == 0 || first < blocks {
            let slab = first..blocks.min(first + SLAB);
            for panel in tile.panels.clone().step_by(2) {
                let two = panel + 1 < tile.panels.end;
                for side in 0..=usize::from(two) {
                    scratch.fill(s, grid, panel + side, false);
                    decode::<S, LINES>(s, grid, scratch, (panel + side, blocks), slab.clone(), &mut decoded[side]);
                }
                let b = [&decoded[0][..slab.len()], &decoded[usize::from(two)][..slab.len()]];
                for at in (0..tiles).step_by(2) {
                    // A missing second tile or panel is multiplied as if it were the first, for nothing.
                    let next = at + usize::from(at + 1 < tiles);
                    let row = tile.rows.start + at * TILE_ROWS;
                    let a = [tile.x.tiles(row), tile.x.tiles(row + (next - at) * TILE_ROWS)].map(|x| &x[slab.clone()]);
                    let place =
                        |panel: usize, tile: usize, there: bool| if there { panel * tiles + tile } else { spare };
                    let here = panel - tile.panels.start;
                    let places = [
                        place(here, at, true),
                        place(here, next, next > at),
                        place(here + 1, at, two),
                        place(here + 1, next, two && next > at),
                    ];
                    match first {
                        0 => amx.zero(),
                        _ => amx.load(places.map(|place| &sums[place])),
                    }
                    amx.multiply(a, b);
                    amx.store::<0>(&mut sums[places[0]]);
                    amx.store::<1>(&mut sums[places[1]]);
                    amx.store::<2>(&mut sums[places[2]]);
                    amx.store::<3>(&mut sums[places[3]]);
                }
            }
            first += SLAB;
        }
        for at in 0..tile.rows.len() {
            for panel in 0..tile.panels.len() {
                let line = &sums[panel * tiles + at / TILE_ROWS].0[at % TILE_ROWS];
                tile.finish(s, tile.panels.start + panel, tile.rows.start + at, s.load(bytemuck::cast_ref(line)));
            }
        }
    }
}

/// Decodes the blocks of `slab` of a panel, whose numbers are in `scratch`: pairs i and i + 16 of K to a line.
#[inline(always)]
fn decode<S: Simd, const LINES: usize>(
    s: S,
    grid: &Grid,
    scratch: &Scratch,
    (panel, blocks): (usize, usize),
    slab: Range<usize>,
    decoded: &mut Vec<TileLines>,
) {
    let Scratch { numbers, zeros, mins, factor, .. } = scratch;
    decoded.resize(slab.len(), TileLines::zeroed());
    let lines: &[[[u8; BYTES]; LINES]] = grid.codes.as_chunks().0.as_chunks().0;
    let table = s.load(&float::table(&grid.levels));
    let every_zero = mask(zeros);
    let factor = s.load(factor);
    for (block, tile) in slab.zip(decoded) {
        let group = block / grid.group_blocks;
        let scale = s.mul(s.load(&numbers[group]), factor);
        let zero = s.to_f32(s.load_i32(&zeros[group & every_zero]));
        let least = match mins.get(group) {
            Some(min) => s.load(min),
            None => s.splat(0.0),
        };
        let offset = s.fnma(zero, scale, least);
        let lines = &lines[panel * blocks + block];
        for i in 0..TILE_ROWS {
            let quad = i / 4;
            let [low, high] = if LINES == LINES4 {
                let shift = (i % 4 * 8 + quad % 2 * 4) as i32;
                let level = |line: &[u8; BYTES]| s.lookup(table, s.shr(s.words(s.load_bytes(line)), shift));
                [level(&lines[quad / 2]), level(&lines[quad / 2 + 2])]
            } else {
                let shift = (i % 4 * 8) as i32;
                let byte = s.splat_i32(255);
                let level = |line: &[u8; BYTES]| s.to_f32(s.and_i32(s.shr(s.words(s.load_bytes(line)), shift), byte));
                [level(&lines[quad]), level(&lines[quad + 4])]
            };
            let values = pair(s, s.fma(low, scale, offset), s.fma(high, scale, offset));
            s.store_i32(values, bytemuck::cast_mut(&mut tile.0[i]));
        }
    }
}
