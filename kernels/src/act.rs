//! Activations as kernels read them: float rows, and the same rows as signed bytes with one scale a block of 32.
//!
//! ```text
//! values   (m, stride) f32, stride = k rounded up to 32, zeros from k on
//! coded    (ceil(m / tile), blocks, tile) records of 48 bytes: 32 codes, value ~ scale * code, and what products need
//!          besides; `tile` rows are what a kernel multiplies at a time, rows past m have zeros
//! tiles    (ceil(m / 16), blocks) tiles of bfloat16, for CPUs that multiply them
//! ```
//! Codes are rounded half to even in every instruction set, so they are the same bits on every machine.

mod tiles;

#[cfg(target_arch = "x86_64")]
pub(crate) use tiles::pair;

use crate::buffer::Buffer;
use crate::simd::{self, LANES, Simd, SimdOp, TILE_ROWS, TileLines};
use crate::{BLOCK, Isa, KernelError, Pool};
use bytemuck::{Pod, Zeroable};
use tiles::EncodeTiles;

/// In which numbers activations meet a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ActKind {
    /// Single precision.
    F32,
    /// Signed bytes with a scale for every 32 values of a row, made on the fly; weights that have no such kernel
    /// (dense, float tables) are multiplied in single precision.
    I8,
    /// bfloat16, and quantized weights too as they are decoded, where this CPU multiplies tiles of such numbers and rows
    /// are many enough for them ([`TILED_ROWS`]); as [`ActKind::I8`] otherwise.
    Bf16,
}

/// Fewest activation rows that tiles are worth their decoding for.
pub const TILED_ROWS: usize = 32;

impl ActKind {
    /// The word for it in kernel names.
    pub const fn name(self) -> &'static str {
        match self {
            ActKind::F32 => "f32",
            ActKind::I8 => "i8",
            ActKind::Bf16 => "bf16",
        }
    }

    /// Bytes of one value as kernels read it.
    pub(crate) const fn bytes(self) -> usize {
        match self {
            ActKind::F32 => 4,
            ActKind::I8 => 1,
            ActKind::Bf16 => 2,
        }
    }
}

/// 32 values of a row in codes.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct CodedBlock {
    /// The codes in quads: each quad meets 16 weight rows at once.
    pub quads: [[i8; 4]; BLOCK / 4],
    /// value ~ scale * code
    pub scale: f32,
    /// What zero points are multiplied with: sums of the codes at places 0 and 1, and at places 2 and 3, of all quads.
    pub pair: [i16; 2],
    /// The same of the first four quads and of the last four.
    pub half_pairs: [[i16; 2]; 2],
}

impl CodedBlock {
    /// scale * sum of the codes: what a minimum is multiplied with.
    #[inline(always)]
    pub(crate) fn scaled_sum(&self) -> f32 {
        self.scale * f32::from(self.pair[0].wrapping_add(self.pair[1]))
    }
}

/// Most rows that a kernel multiplies at a time.
const MOST_ROWS: usize = 8;

/// Blocks with no magnitude above this count as zero: the reciprocal of their scale might overflow.
const TINY: f32 = f32::from_bits((127 - 120) << 23);

/// The input of matrix products: m rows of k values, reusable without allocation.
#[derive(Debug, Clone)]
pub struct Activations {
    m: usize,
    k: usize,
    /// (m, stride)
    values: Buffer<f32>,
    /// (m, blocks) sums of values.
    sums: Buffer<f32>,
    /// (tiles, blocks, coded) values in codes.
    records: Buffer<CodedBlock>,
    /// (tiles, blocks) values in bfloat16.
    tiles: Buffer<TileLines>,
    summed: bool,
    /// Rows of a tile in `records`, 0 if it isn't up to date.
    coded: usize,
    tiled: bool,
}

impl Activations {
    /// No rows, with room for `m` rows of `k` values.
    pub fn with_capacity(m: usize, k: usize) -> Self {
        let mut x = Activations {
            m: 0,
            k: 0,
            values: Buffer::zeroed(0),
            sums: Buffer::zeroed(0),
            records: Buffer::zeroed(0),
            tiles: Buffer::zeroed(0),
            summed: false,
            coded: 0,
            tiled: false,
        };
        x.reshape(m, k);
        x.sums.resize(m * x.blocks());
        x.records.resize(m.next_multiple_of(MOST_ROWS) * x.blocks());
        if Isa::best() == Isa::Amx && m >= TILED_ROWS {
            x.tiles.resize(m.div_ceil(TILE_ROWS) * x.blocks());
        }
        x.reshape(0, k);
        x
    }

    /// Rows.
    pub fn m(&self) -> usize {
        self.m
    }

    /// Values of a row.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Distance between rows in [`Activations::values_mut`]: k rounded up to 32.
    pub fn stride(&self) -> usize {
        self.k.next_multiple_of(BLOCK)
    }

    /// Makes room for `m` rows of `k` values, whose values are unspecified until written.
    pub fn reshape(&mut self, m: usize, k: usize) {
        (self.m, self.k) = (m, k);
        self.values.resize(m * self.stride());
        self.forget();
    }

    fn forget(&mut self) {
        (self.summed, self.coded, self.tiled) = (false, 0, false);
    }

    /// Takes `m` rows of `k` values from (m, k) row-major `rows`.
    pub fn fill(&mut self, m: usize, k: usize, rows: &[f32]) -> Result<(), KernelError> {
        let wanted = m.saturating_mul(k);
        if rows.len() != wanted {
            return Err(KernelError::Length { what: "activations", found: rows.len(), wanted });
        }
        self.reshape(m, k);
        for row in 0..m {
            self.row_mut(row).copy_from_slice(&rows[row * k..][..k]);
        }
        Ok(())
    }

    /// Row `row`: k values.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: usize) -> &[f32] {
        assert!(row < self.m, "row {row} of {} activation rows", self.m);
        &self.values[row * self.stride()..][..self.k]
    }

    /// Row `row` to write to: k values.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.m, "row {row} of {} activation rows", self.m);
        self.forget();
        let (at, k) = (row * self.stride(), self.k);
        &mut self.values[at..][..k]
    }

    /// All rows, (m, stride) row-major; what lies past the first k values of each row is unspecified.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Forgets rows from `m` on; no effect if there are fewer.
    pub fn truncate(&mut self, m: usize) {
        if m < self.m {
            self.m = m;
            self.values.resize(m * self.stride());
            self.forget();
        }
    }

    /// All rows to write to, (m, stride) row-major: only the first k values of each row count.
    pub fn values_mut(&mut self) -> &mut [f32] {
        self.forget();
        &mut self.values
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        self.values.bytes() + self.sums.bytes() + self.records.bytes() + self.tiles.bytes()
    }

    /// Row `row` in codes, block after block, as the last product in [`ActKind::I8`] used it; none if the row was
    /// written since.
    pub fn codes(&self, row: usize) -> Option<impl Iterator<Item = &CodedBlock>> {
        (self.coded > 0 && row < self.m).then(|| {
            let (tile, at) = (row / self.coded, row % self.coded);
            let first = tile * self.coded * self.blocks() + at;
            self.records.iter().skip(first).step_by(self.coded).take(self.blocks())
        })
    }

    /// Makes what kernels of this kind that multiply `tile` rows at a time read, unless it is there already; rows in
    /// parallel.
    pub fn prepare(&mut self, pool: &Pool, act: ActKind, tile: usize) {
        let (stride, k, blocks) = (self.stride(), self.k, self.blocks());
        let ready = match act {
            ActKind::F32 => self.summed,
            ActKind::I8 => self.coded == tile,
            ActKind::Bf16 => self.tiled,
        };
        if ready {
            return;
        }
        if stride > k {
            for row in 0..self.m {
                self.values[row * stride + k..][..stride - k].fill(0.0);
            }
        }
        let isa = Isa::best();
        let values = &self.values[..];
        let row = |row: usize| &values[row * stride..][..stride];
        match act {
            ActKind::F32 => {
                self.sums.resize(self.m * blocks);
                let sum = |at: usize, sums: &mut [f32]| simd::dispatch(isa, SumBlocks { values: row(at), sums });
                if self.m == 1 {
                    sum(0, &mut self.sums);
                } else {
                    pool.for_each_part(&mut self.sums, blocks, sum);
                }
                self.summed = true;
            }
            ActKind::I8 => {
                let (m, part) = (self.m, tile * blocks);
                self.records.resize(m.next_multiple_of(tile) * blocks);
                pool.for_each_part(&mut self.records, part, |index, coded| {
                    for at in 0..tile {
                        match index * tile + at < m {
                            true => {
                                simd::dispatch(isa, Encode { values: row(index * tile + at), coded, at, tile });
                            }
                            false => coded[at..].iter_mut().step_by(tile).for_each(|c| *c = CodedBlock::zeroed()),
                        }
                    }
                });
                self.coded = tile;
            }
            ActKind::Bf16 => {
                let m = self.m;
                self.tiles.resize(m.div_ceil(TILE_ROWS) * blocks);
                pool.for_each_part(&mut self.tiles, blocks, |index, tiles| {
                    for at in 0..TILE_ROWS {
                        match index * TILE_ROWS + at < m {
                            true => {
                                let values = row(index * TILE_ROWS + at);
                                simd::dispatch(isa, EncodeTiles { values, tiles: &mut *tiles, at });
                            }
                            false => tiles.iter_mut().for_each(|tile| tile.0[at] = [0; LANES]),
                        }
                    }
                });
                self.tiled = true;
            }
        }
    }

    /// The 16 rows from `row` on, a multiple of 16, in tiles, block after block.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(crate) fn tiles(&self, row: usize) -> &[TileLines] {
        &self.tiles[row / TILE_ROWS * self.blocks()..][..self.blocks()]
    }

    pub(crate) fn blocks(&self) -> usize {
        self.k.div_ceil(BLOCK)
    }

    /// Row `row` with its padding, as blocks.
    #[inline(always)]
    pub(crate) fn value_blocks(&self, row: usize) -> &[[f32; BLOCK]] {
        self.values[row * self.stride()..][..self.stride()].as_chunks().0
    }

    /// Sums of row `row`'s blocks.
    #[inline(always)]
    pub(crate) fn block_sums(&self, row: usize) -> &[f32] {
        &self.sums[row * self.blocks()..][..self.blocks()]
    }

    /// The rows from `row` on, a multiple of `MR`, block by block.
    ///
    /// # Panics
    /// If they weren't prepared for this many.
    #[inline(always)]
    pub(crate) fn coded_tile<const MR: usize>(&self, row: usize) -> &[[CodedBlock; MR]] {
        assert_eq!(self.coded, MR, "rows of a tile of activations");
        &self.records.as_chunks().0[row / MR * self.blocks()..][..self.blocks()]
    }
}

/// Sums of the blocks of one row.
struct SumBlocks<'a> {
    values: &'a [f32],
    sums: &'a mut [f32],
}

impl SimdOp for SumBlocks<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for (block, sum) in self.values.as_chunks::<BLOCK>().0.iter().zip(self.sums) {
            let [low, high] = halves(block);
            *sum = s.sum(s.add(s.load(low), s.load(high)));
        }
    }
}

/// One row in codes, row `at` of a tile.
struct Encode<'a> {
    values: &'a [f32],
    coded: &'a mut [CodedBlock], // (blocks, tile)
    at: usize,
    tile: usize,
}

impl SimdOp for Encode<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let Encode { values, coded, at, tile } = self;
        let zero = s.splat(0.0);
        let first_two = s.load_i32(&FIRST_TWO);
        let mut poison = zero;
        for (block, coded) in values.as_chunks::<BLOCK>().0.iter().zip(coded.chunks_exact_mut(tile)) {
            let coded = &mut coded[at];
            let [low, high] = halves(block);
            let (low, high) = (s.load(low), s.load(high));
            poison = s.fma(low, zero, s.fma(high, zero, poison));
            let most = s.largest(s.max(s.abs(low), s.abs(high)));
            let (scale, inverse) = if most < TINY { (0.0, 0.0) } else { (most / 127.0, 127.0 / most) };
            let inverse = s.splat(inverse);
            let (low, high) = (s.to_i32(s.mul(low, inverse)), s.to_i32(s.mul(high, inverse)));
            let (to_low, to_high) = coded.quads.as_flattened_mut().split_at_mut(LANES);
            if let (Some(to_low), Some(to_high)) = (to_low.first_chunk_mut(), to_high.first_chunk_mut()) {
                s.store_i8(low, to_low);
                s.store_i8(high, to_high);
            }
            for (half, codes) in [low, high].into_iter().enumerate() {
                let (sum, pair) = (s.sum_i32(codes), s.sum_i32(s.and_i32(codes, first_two)));
                // Codes of values that aren't finite may be anything.
                coded.half_pairs[half] = [pair as i16, sum.wrapping_sub(pair) as i16];
            }
            let [first, last] = coded.half_pairs;
            coded.pair = [first[0].wrapping_add(last[0]), first[1].wrapping_add(last[1])];
            coded.scale = scale;
        }
        // A NaN or an infinity anywhere makes every output of its row NaN, as it does in single precision.
        if s.sum(poison).is_nan() {
            coded[at..].iter_mut().step_by(tile).for_each(|coded| coded.scale = f32::NAN);
        }
    }
}

/// The lanes at places 0 and 1 of a quad.
static FIRST_TWO: [i32; LANES] = [-1, -1, 0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1, 0, 0];

/// The two vectors of a block.
#[inline(always)]
fn halves(block: &[f32; BLOCK]) -> [&[f32; LANES]; 2] {
    let (halves, _) = block.as_chunks::<LANES>();
    [&halves[0], &halves[1]]
}
