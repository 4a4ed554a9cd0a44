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
//! Arithmetic is done in f32 in the order of the reference implementation, so that values agree to the bit.

use half::f16;
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
    /// Decodes whole blocks: `bytes` per block in, `values` per block out.
    pub decode: fn(&[u8], &mut [f32]),
}

impl PartialEq for BlockType {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

/// Every type that can be read.
pub static BLOCKS: &[BlockType] = &[
    BlockType { id: 0, name: "F32", values: 1, bytes: 4, plain: Some(Dtype::F32), decode: |b, o| each(b, o, f32) },
    BlockType { id: 1, name: "F16", values: 1, bytes: 2, plain: Some(Dtype::F16), decode: |b, o| each(b, o, half) },
    BlockType { id: 30, name: "BF16", values: 1, bytes: 2, plain: Some(Dtype::BF16), decode: |b, o| each(b, o, bf16) },
    BlockType { id: 2, name: "Q4_0", values: 32, bytes: 18, plain: None, decode: |b, o| each(b, o, q4_0) },
    BlockType { id: 3, name: "Q4_1", values: 32, bytes: 20, plain: None, decode: |b, o| each(b, o, q4_1) },
    BlockType { id: 6, name: "Q5_0", values: 32, bytes: 22, plain: None, decode: |b, o| each(b, o, q5_0) },
    BlockType { id: 7, name: "Q5_1", values: 32, bytes: 24, plain: None, decode: |b, o| each(b, o, q5_1) },
    BlockType { id: 8, name: "Q8_0", values: 32, bytes: 34, plain: None, decode: |b, o| each(b, o, q8_0) },
    BlockType { id: 12, name: "Q4_K", values: 256, bytes: 144, plain: None, decode: |b, o| each(b, o, q4_k) },
    BlockType { id: 13, name: "Q5_K", values: 256, bytes: 176, plain: None, decode: |b, o| each(b, o, q5_k) },
    BlockType { id: 14, name: "Q6_K", values: 256, bytes: 210, plain: None, decode: |b, o| each(b, o, q6_k) },
    BlockType { id: 20, name: "IQ4_NL", values: 32, bytes: 18, plain: None, decode: |b, o| each(b, o, iq4_nl) },
    BlockType { id: 23, name: "IQ4_XS", values: 256, bytes: 136, plain: None, decode: |b, o| each(b, o, iq4_xs) },
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

/// llama.cpp's non-linear levels.
const IQ4_LEVELS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

fn each<const BYTES: usize, const VALUES: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; VALUES]),
) {
    for (block, out) in bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        decode(block, out);
    }
}

fn f32(b: &[u8; 4], out: &mut [f32; 1]) {
    *out = [f32::from_le_bytes(*b)];
}

fn half(b: &[u8; 2], out: &mut [f32; 1]) {
    *out = [f16_at(b, 0)];
}

fn bf16(b: &[u8; 2], out: &mut [f32; 1]) {
    *out = [half::bf16::from_le_bytes(*b).to_f32()];
}

fn f16_at(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

fn q4_0(b: &[u8; 18], out: &mut [f32; 32]) {
    let d = f16_at(b, 0);
    for j in 0..16 {
        out[j] = d * ((b[2 + j] & 15) as i32 - 8) as f32;
        out[j + 16] = d * ((b[2 + j] >> 4) as i32 - 8) as f32;
    }
}

fn q4_1(b: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (f16_at(b, 0), f16_at(b, 2));
    for j in 0..16 {
        out[j] = d * (b[4 + j] & 15) as f32 + m;
        out[j + 16] = d * (b[4 + j] >> 4) as f32 + m;
    }
}

fn q5_0(b: &[u8; 22], out: &mut [f32; 32]) {
    let d = f16_at(b, 0);
    let high = u32::from_le_bytes([b[2], b[3], b[4], b[5]]);
    for j in 0..16 {
        out[j] = d * (five_bits(b[6 + j] & 15, high, j) - 16) as f32;
        out[j + 16] = d * (five_bits(b[6 + j] >> 4, high, j + 16) - 16) as f32;
    }
}

fn q5_1(b: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (f16_at(b, 0), f16_at(b, 2));
    let high = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
    for j in 0..16 {
        out[j] = d * five_bits(b[8 + j] & 15, high, j) as f32 + m;
        out[j + 16] = d * five_bits(b[8 + j] >> 4, high, j + 16) as f32 + m;
    }
}

fn five_bits(low: u8, high: u32, at: usize) -> i32 {
    low as i32 | ((high >> at & 1) << 4) as i32
}

fn q8_0(b: &[u8; 34], out: &mut [f32; 32]) {
    let d = f16_at(b, 0);
    for j in 0..32 {
        out[j] = d * (b[2 + j] as i8) as f32;
    }
}

/// The 6-bit scale and minimum of sub-block `j`: the first four lie in the low bits of the first 8 bytes, the others
/// are split into the last 4 bytes and the high bits of the first 8.
fn scale_min(s: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = match j {
        0..4 => (s[j] & 63, s[j + 4] & 63),
        _ => (s[j + 4] & 15 | (s[j - 4] >> 6) << 4, s[j + 4] >> 4 | (s[j] >> 6) << 4),
    };
    (scale as f32, min as f32)
}

fn q4_k(b: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (f16_at(b, 0), f16_at(b, 2));
    for j in 0..8 {
        let (scale, min) = scale_min(&b[4..16], j);
        let (scale, min) = (d * scale, dmin * min);
        let shift = 4 * (j % 2);
        for l in 0..32 {
            out[32 * j + l] = scale * (b[16 + 32 * (j / 2) + l] >> shift & 15) as f32 - min;
        }
    }
}

fn q5_k(b: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (f16_at(b, 0), f16_at(b, 2));
    for j in 0..8 {
        let (scale, min) = scale_min(&b[4..16], j);
        let (scale, min) = (d * scale, dmin * min);
        let shift = 4 * (j % 2);
        for l in 0..32 {
            let code = (b[48 + 32 * (j / 2) + l] >> shift & 15) | (b[16 + l] >> j & 1) << 4;
            out[32 * j + l] = scale * code as f32 - min;
        }
    }
}

fn q6_k(b: &[u8; 210], out: &mut [f32; 256]) {
    let d = f16_at(b, 208);
    for i in 0..256 {
        // Halves of 128 values hold four runs of 32: low bits in two runs of 32 bytes, high bits two by two.
        let (half, run, l) = (i / 128, i % 128 / 32, i % 32);
        let low = b[64 * half + 32 * (run % 2) + l] >> (4 * (run / 2)) & 15;
        let high = b[128 + 32 * half + l] >> (2 * run) & 3;
        let scale = d * (b[192 + i / 16] as i8) as f32;
        out[i] = scale * ((low | high << 4) as i32 - 32) as f32;
    }
}

fn iq4_nl(b: &[u8; 18], out: &mut [f32; 32]) {
    let d = f16_at(b, 0);
    for j in 0..16 {
        out[j] = d * IQ4_LEVELS[(b[2 + j] & 15) as usize] as f32;
        out[j + 16] = d * IQ4_LEVELS[(b[2 + j] >> 4) as usize] as f32;
    }
}

fn iq4_xs(b: &[u8; 136], out: &mut [f32; 256]) {
    let d = f16_at(b, 0);
    let high = u16::from_le_bytes([b[2], b[3]]);
    for j in 0..8 {
        let low = b[4 + j / 2] >> (4 * (j % 2)) & 15;
        let scale = low as i32 | ((high >> (2 * j) & 3) << 4) as i32;
        let scale = d * (scale - 32) as f32;
        for l in 0..16 {
            let q = b[8 + 16 * j + l];
            out[32 * j + l] = scale * IQ4_LEVELS[(q & 15) as usize] as f32;
            out[32 * j + l + 16] = scale * IQ4_LEVELS[(q >> 4) as usize] as f32;
        }
    }
}
