//! The block types of GGUF and what their bytes mean, one row a type.
//!
//! ```text
//! d, m: f16 scale and minimum   q: low bits, byte j = value j | value j + half << 4   h: the bits above
//! Q4_0  18 B / 32   d q[16]                   (q - 8) * d            Q5_0  22   d h[4] q[16]       (q - 16) * d
//! Q4_1  20          d m q[16]                 q * d + m              Q5_1  24   d m h[4] q[16]     q * d + m
//! Q8_0  34          d i8[32]                  q * d                  IQ4_NL 18  d q[16]            table[q] * d
//! Q4_K 144 B / 256  d m s[12] q[128]          q * (d * s6) - m * m6, 8 sub-blocks
//! Q5_K 176          d m s[12] h[32] q[128]    as Q4_K with 5 bits
//! Q6_K 210          q[128] h[64] i8 s[16] d   (q - 32) * (d * s), 16 sub-blocks
//! IQ4_XS 136        d u16 h, l[4] q[128]      table[q] * (d * (s6 - 32)), 8 sub-blocks
//! ```
//! Arithmetic is done in f32 in the order of the reference implementation, so that values agree to the bit. A
//! minimum that is taken off is the same as its negative added.

use crate::spec::{Grid, Table, Zero};
use half::{bf16, f16};
use safetensors::Dtype;

/// One type of tensor data: plain values are blocks of one.
#[derive(Debug)]
pub struct BlockType {
    /// Its number in the file.
    pub id: u32,
    /// Its usual name.
    pub name: &'static str,
    /// Values a block stands for.
    pub values: usize,
    /// Bytes of a block.
    pub bytes: usize,
    /// The element type, if values are stored one by one.
    pub plain: Option<Dtype>,
    /// What its codes mean, if it has codes.
    pub(crate) coded: Option<Coded>,
}

/// The codes and scales of a block type.
#[derive(Debug)]
pub(crate) struct Coded {
    pub(crate) grid: Grid,
    pub(crate) zero: Zero,
    /// Values that share a scale.
    pub(crate) group: usize,
    /// Bits of the scales' codes, if the block has a scale for its scales.
    pub(crate) scale_bits: Option<u8>,
    /// Takes a block apart.
    pub(crate) parts: fn(&[u8], &mut Parts),
}

/// Most values of a block, and most groups.
const VALUES: usize = 256;
const GROUPS: usize = 16;

/// A block taken apart. A value is `d * scale * level(code)`, with a minimum `m * min` more.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) codes: [u8; VALUES],
    /// Codes of the groups' scales and minimums; ones where the block has only `d` and `m`.
    pub(crate) scales: [i16; GROUPS],
    pub(crate) mins: [i16; GROUPS],
    pub(crate) d: f32,
    /// -0 without minimums: adding that changes no number.
    pub(crate) m: f32,
}

impl Default for Parts {
    fn default() -> Self {
        Parts { codes: [0; VALUES], scales: [1; GROUPS], mins: [1; GROUPS], d: 0.0, m: -0.0 }
    }
}

impl PartialEq for BlockType {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

const fn plain_type(id: u32, name: &'static str, bytes: usize, dtype: Dtype) -> BlockType {
    BlockType { id, name, values: 1, bytes, plain: Some(dtype), coded: None }
}

const fn coded_type(id: u32, name: &'static str, values: usize, bytes: usize, coded: Coded) -> BlockType {
    BlockType { id, name, values, bytes, plain: None, coded: Some(coded) }
}

/// Blocks with one scale.
const fn one(grid: Grid, zero: Zero, parts: fn(&[u8], &mut Parts)) -> Coded {
    Coded { grid, zero, group: 32, scale_bits: None, parts }
}

/// Blocks with a scale for their scales.
const fn two(grid: Grid, zero: Zero, group: usize, bits: u8, parts: fn(&[u8], &mut Parts)) -> Coded {
    Coded { grid, zero, group, scale_bits: Some(bits), parts }
}

const fn int(bits: u8) -> Grid {
    Grid::Int { bits }
}

/// Every type that can be read.
pub static BLOCKS: &[BlockType] = &[
    plain_type(0, "F32", 4, Dtype::F32),
    plain_type(1, "F16", 2, Dtype::F16),
    plain_type(30, "BF16", 2, Dtype::BF16),
    coded_type(2, "Q4_0", 32, 18, one(int(4), Zero::FullRange, |b, p| short(b, p, 4, false))),
    coded_type(3, "Q4_1", 32, 20, one(int(4), Zero::Min, |b, p| short(b, p, 4, true))),
    coded_type(6, "Q5_0", 32, 22, one(int(5), Zero::FullRange, |b, p| short(b, p, 5, false))),
    coded_type(7, "Q5_1", 32, 24, one(int(5), Zero::Min, |b, p| short(b, p, 5, true))),
    coded_type(8, "Q8_0", 32, 34, one(int(8), Zero::FullRange, q8_0)),
    coded_type(12, "Q4_K", 256, 144, two(int(4), Zero::Min, 32, 6, q4_k)),
    coded_type(13, "Q5_K", 256, 176, two(int(5), Zero::Min, 32, 6, q5_k)),
    coded_type(14, "Q6_K", 256, 210, two(int(6), Zero::FullRange, 16, 8, q6_k)),
    coded_type(20, "IQ4_NL", 32, 18, one(Grid::Table(Table::Iq4Nl), Zero::Symmetric, |b, p| short(b, p, 4, false))),
    coded_type(23, "IQ4_XS", 256, 136, two(Grid::Table(Table::Iq4Nl), Zero::Symmetric, 32, 6, iq4_xs)),
];

/// Types that exist but can't be read, for error messages.
pub(super) static UNREAD: &[(u32, &str)] = &[
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

/// The row of a type number.
pub fn find(id: u32) -> Option<&'static BlockType> {
    BLOCKS.iter().find(|b| b.id == id)
}

/// The row of a type whose values are stored one by one.
pub fn plain(dtype: Dtype) -> Option<&'static BlockType> {
    BLOCKS.iter().find(|b| b.plain == Some(dtype))
}

fn each<const N: usize>(bytes: &[u8], out: &mut [f32], value: impl Fn([u8; N]) -> f32) {
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
        *out = value(*bytes);
    }
}

impl BlockType {
    /// Decodes whole blocks: `bytes` per block in, `values` per block out.
    pub fn decode(&self, bytes: &[u8], out: &mut [f32]) {
        let Some(coded) = &self.coded else {
            return match self.plain {
                Some(Dtype::F16) => each(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
                Some(Dtype::BF16) => each(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
                _ => each(bytes, out, f32::from_le_bytes),
            };
        };
        let mut parts = Parts::default();
        for (block, out) in bytes.chunks_exact(self.bytes).zip(out.chunks_exact_mut(self.values)) {
            (coded.parts)(block, &mut parts);
            coded.values(&parts, out);
        }
    }
}

impl Coded {
    fn values(&self, parts: &Parts, out: &mut [f32]) {
        let levels = match self.grid {
            Grid::Table(table) => Some(table.levels()),
            Grid::Int { .. } => None,
        };
        let middle = if self.zero == Zero::FullRange { 1 << (self.grid.bits() - 1) } else { 0 };
        let codes = parts.codes.chunks(self.group);
        for (g, (codes, out)) in codes.zip(out.chunks_mut(self.group)).enumerate() {
            let (scale, min) = (parts.d * parts.scales[g] as f32, parts.m * parts.mins[g] as f32);
            for (code, out) in codes.iter().zip(out) {
                let level = match &levels {
                    Some(levels) => levels[(code & 15) as usize],
                    None => (*code as i32 - middle) as f32,
                };
                *out = scale * level + min;
            }
        }
    }
}

fn f16_at(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

/// Splits bytes into the low 4 bits of each, then the high ones.
fn halves(bytes: &[u8], codes: &mut [u8]) {
    let (low, high) = codes.split_at_mut(bytes.len());
    for ((byte, low), high) in bytes.iter().zip(low).zip(high) {
        (*low, *high) = (byte & 15, byte >> 4);
    }
}

/// A block of 32 codes of 4 or 5 bits: a scale, a minimum if it has one, the fifth bits, the others.
fn short(b: &[u8], parts: &mut Parts, bits: usize, min: bool) {
    parts.d = f16_at(b, 0);
    let mut at = 2;
    if min {
        parts.m = f16_at(b, at);
        at += 2;
    }
    let fifth = if bits == 5 { u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]) } else { 0 };
    at += 4 * (bits - 4);
    halves(&b[at..at + 16], &mut parts.codes[..32]);
    for (i, code) in parts.codes[..32].iter_mut().enumerate() {
        *code |= ((fifth >> i & 1) << 4) as u8;
    }
}

fn q8_0(b: &[u8], parts: &mut Parts) {
    parts.d = f16_at(b, 0);
    for (code, byte) in parts.codes.iter_mut().zip(&b[2..34]) {
        *code = byte ^ 0x80;
    }
}

/// The 6-bit scale and minimum of group `j`: the first four lie in the low bits of the first 8 bytes, the others are split
/// into the last 4 bytes and the high bits of the first 8.
fn scale_min(s: &[u8], j: usize) -> (i16, i16) {
    let (scale, min) = match j {
        0..4 => (s[j] & 63, s[j + 4] & 63),
        _ => (s[j + 4] & 15 | (s[j - 4] >> 6) << 4, s[j + 4] >> 4 | (s[j] >> 6) << 4),
    };
    (scale as i16, min as i16)
}

/// What Q4_K and Q5_K begin with, and their low bits from byte `at` on.
fn with_minimums(b: &[u8], at: usize, parts: &mut Parts) {
    (parts.d, parts.m) = (f16_at(b, 0), -f16_at(b, 2));
    for j in 0..8 {
        (parts.scales[j], parts.mins[j]) = scale_min(&b[4..16], j);
    }
    for (bytes, codes) in b[at..at + 128].chunks(32).zip(parts.codes.chunks_mut(64)) {
        halves(bytes, codes);
    }
}

fn q4_k(b: &[u8], parts: &mut Parts) {
    with_minimums(b, 16, parts);
}

fn q5_k(b: &[u8], parts: &mut Parts) {
    with_minimums(b, 48, parts);
    for (i, code) in parts.codes.iter_mut().enumerate() {
        *code |= (b[16 + i % 32] >> (i / 32) & 1) << 4;
    }
}

fn q6_k(b: &[u8], parts: &mut Parts) {
    parts.d = f16_at(b, 208);
    for (i, code) in parts.codes.iter_mut().enumerate() {
        // Halves of 128 values hold four runs of 32: low bits in two runs of 32 bytes, high bits two by two.
        let (half, run, l) = (i / 128, i % 128 / 32, i % 32);
        let low = b[64 * half + 32 * (run % 2) + l] >> (4 * (run / 2)) & 15;
        let high = b[128 + 32 * half + l] >> (2 * run) & 3;
        *code = low | high << 4;
    }
    for (scale, byte) in parts.scales.iter_mut().zip(&b[192..208]) {
        *scale = *byte as i8 as i16;
    }
}

fn iq4_xs(b: &[u8], parts: &mut Parts) {
    parts.d = f16_at(b, 0);
    let high = u16::from_le_bytes([b[2], b[3]]);
    for j in 0..8 {
        let low = b[4 + j / 2] >> (4 * (j % 2)) & 15;
        let scale = low as i16 | ((high >> (2 * j) & 3) << 4) as i16;
        parts.scales[j] = scale - 32;
        halves(&b[8 + 16 * j..][..16], &mut parts.codes[32 * j..][..32]);
    }
}
