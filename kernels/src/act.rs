//! Activations as kernels read them: float rows, and the same rows as signed bytes with one scale a block of 32.
//!
//! ```text
//! values   (m, stride) f32, stride = k rounded up to 32, zeros from k on
//! record   one a row: codes (blocks, 32) i8 | scales (blocks) f32 | sums (blocks) f32 | scaled sums (blocks) f32
//!          value ~ scale * code;  sum = sum(codes) of the block, exact in f32;  scaled sum = scale * sum
//! ```
//! Rounding is half to even in every instruction set, so codes are the same bits on every machine.

use crate::buffer::Buffer;
use crate::simd::{self, LANES, Simd, SimdOp};
use crate::{BLOCK, Isa, KernelError, Pool};

/// In which numbers activations meet a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ActKind {
    /// Single precision.
    F32,
    /// Signed bytes with a scale for every 32 values of a row, made on the fly; weights that have no such kernel
    /// (dense, float tables) are multiplied in single precision.
    I8,
}

impl ActKind {
    /// The word for it in kernel names.
    pub const fn name(self) -> &'static str {
        match self {
            ActKind::F32 => "f32",
            ActKind::I8 => "i8",
        }
    }

    /// Bytes of one value as kernels read it.
    pub(crate) const fn bytes(self) -> usize {
        match self {
            ActKind::F32 => 4,
            ActKind::I8 => 1,
        }
    }
}

/// 32 activation codes as the 8 quads that meet 16 rows each.
pub(crate) type CodeBlock = [[i8; 4]; BLOCK / 4];

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
    /// (m, record) rows in codes.
    records: Buffer<f32>,
    summed: bool,
    coded: bool,
}

/// One row in codes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CodedRow<'a> {
    pub(crate) codes: &'a [CodeBlock],
    pub(crate) scales: &'a [f32],
    pub(crate) sums: &'a [f32],
    pub(crate) scaled_sums: &'a [f32],
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
            summed: false,
            coded: false,
        };
        x.reshape(m, k);
        x.sums.resize(m * x.blocks());
        x.records.resize(m * x.record());
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
        (self.summed, self.coded) = (false, false);
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
        (self.summed, self.coded) = (false, false);
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
            (self.summed, self.coded) = (false, false);
        }
    }

    /// All rows to write to, (m, stride) row-major: only the first k values of each row count.
    pub fn values_mut(&mut self) -> &mut [f32] {
        (self.summed, self.coded) = (false, false);
        &mut self.values
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        self.values.bytes() + self.sums.bytes() + self.records.bytes()
    }

    /// The codes of row `row`, as the last product in [`ActKind::I8`] used them: (blocks, 32) codes and a scale a
    /// block; none if the row was written since.
    pub fn codes(&self, row: usize) -> Option<(&[i8], &[f32])> {
        (self.coded && row < self.m).then(|| {
            let coded = self.coded_row(row);
            (coded.codes.as_flattened().as_flattened(), coded.scales)
        })
    }

    /// Makes what kernels of this kind read, unless it is there already; rows in parallel.
    pub fn prepare(&mut self, pool: &Pool, act: ActKind) {
        let (stride, k, blocks, record) = (self.stride(), self.k, self.blocks(), self.record());
        if (act == ActKind::F32 && self.summed) || (act == ActKind::I8 && self.coded) {
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
                self.records.resize(self.m * record);
                let encode = |at: usize, record: &mut [f32]| simd::dispatch(isa, Encode { values: row(at), record });
                if self.m == 1 {
                    encode(0, &mut self.records);
                } else {
                    pool.for_each_part(&mut self.records, record, encode);
                }
                self.coded = true;
            }
        }
    }

    pub(crate) fn blocks(&self) -> usize {
        self.k.div_ceil(BLOCK)
    }

    /// Length of a row's record in words: codes are a quarter of a word each.
    fn record(&self) -> usize {
        self.blocks() * (BLOCK / 4 + 3)
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

    /// Row `row` in codes.
    #[inline(always)]
    pub(crate) fn coded_row(&self, row: usize) -> CodedRow<'_> {
        let blocks = self.blocks();
        let record = &self.records[row * self.record()..][..self.record()];
        let (codes, numbers) = record.split_at(blocks * BLOCK / 4);
        let (scales, sums) = numbers.split_at(blocks);
        let (sums, scaled_sums) = sums.split_at(blocks);
        CodedRow { codes: bytemuck::cast_slice(codes), scales, sums, scaled_sums }
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

/// Codes, scales and sums of one row.
struct Encode<'a> {
    values: &'a [f32],
    record: &'a mut [f32],
}

impl SimdOp for Encode<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let blocks = self.values.len() / BLOCK;
        let (codes, numbers) = self.record.split_at_mut(blocks * BLOCK / 4);
        let (scales, sums) = numbers.split_at_mut(blocks);
        let (sums, scaled_sums) = sums.split_at_mut(blocks);
        let codes: &mut [[i8; BLOCK]] = bytemuck::cast_slice_mut(codes);
        let zero = s.splat(0.0);
        let mut poison = zero;
        for (b, block) in self.values.as_chunks::<BLOCK>().0.iter().enumerate() {
            let [low, high] = halves(block);
            let (low, high) = (s.load(low), s.load(high));
            poison = s.fma(low, zero, s.fma(high, zero, poison));
            let most = s.largest(s.max(s.abs(low), s.abs(high)));
            let (scale, inverse) = if most < TINY { (0.0, 0.0) } else { (most / 127.0, 127.0 / most) };
            let inverse = s.splat(inverse);
            let (low, high) = (s.to_i32(s.mul(low, inverse)), s.to_i32(s.mul(high, inverse)));
            let (to_low, to_high) = codes[b].split_at_mut(LANES);
            if let (Some(to_low), Some(to_high)) = (to_low.first_chunk_mut(), to_high.first_chunk_mut()) {
                s.store_i8(low, to_low);
                s.store_i8(high, to_high);
            }
            let sum = s.sum_i32(s.add_i32(low, high)) as f32;
            (scales[b], sums[b], scaled_sums[b]) = (scale, sum, scale * sum);
        }
        // A NaN or an infinity anywhere makes every output of its row NaN, as it does in single precision.
        if s.sum(poison).is_nan() {
            scales.fill(f32::NAN);
            scaled_sums.fill(f32::NAN);
        }
    }
}

/// The two vectors of a block.
#[inline(always)]
fn halves(block: &[f32; BLOCK]) -> [&[f32; LANES]; 2] {
    let (halves, _) = block.as_chunks::<LANES>();
    [&halves[0], &halves[1]]
}
