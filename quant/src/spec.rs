//! The arithmetic of one tensor, as data.
//!
//! `w = scale[group] * (level(code) - zero[group])` or `w = scale[group] * level(code) + min[group]`, where groups run
//! along K (the input dimension). Grid, granularity, zero and scale levels are orthogonal.

use serde::{Deserialize, Serialize};

/// Everything that decides how codes become values in one tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuantSpec {
    /// The values that codes can mean.
    pub grid: Grid,
    /// Which values share a scale.
    pub granularity: Granularity,
    /// Where zero lies on the grid.
    pub zero: Zero,
    /// How scales (and minimums) are stored.
    pub scale: ScaleFormat,
    /// What is kept outside of the grid.
    #[serde(default)]
    pub outliers: OutlierSpec,
}

/// The values that codes can mean, before the scale.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Grid {
    /// Evenly spaced integers of 2 to 8 bits. Level = code - 2^(bits-1) if symmetric, else code.
    Int {
        /// Bits of a code, 2..=8.
        bits: u8,
    },
    /// 16 levels from a table, 4 bits a code.
    Table(Table),
}

/// A 16-entry table of levels, ascending.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Table {
    /// QLoRA's normal-float levels in -1..=1 (arXiv 2305.14314).
    Nf4,
    /// llama.cpp's non-linear int8 levels in -127..=113.
    Iq4Nl,
    /// A codebook of int8 levels, ascending.
    Int8([i8; 16]),
}

/// Which values share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Granularity {
    /// The whole tensor: (n, k) -> 1 scale.
    Tensor,
    /// A row (output channel): (n, k) -> (n, 1) scales.
    Channel,
    /// This many consecutive values along K: (n, k) -> (n, ceil(k / size)) scales; the last group may be short.
    Group(usize),
}

/// Where zero lies on the grid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Zero {
    /// Levels -(2^(b-1)-1) ..= 2^(b-1)-1 are used; the scale is positive.
    Symmetric,
    /// Level -2^(b-1) is used too; the scale carries a sign so that the largest magnitude can sit on it.
    FullRange,
    /// An integer zero point a group, stored in the grid's bits.
    Int,
    /// A float minimum a group, stored like the scales: w = scale * code + min.
    Min,
}

/// A float's bytes in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FloatFormat {
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE single precision.
    F32,
}

/// How far a second-level scale reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Span {
    /// All groups of a row.
    Row,
    /// The groups of this many consecutive values along K (a multiple of the group).
    Values(usize),
}

/// How scales (and minimums) are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScaleFormat {
    /// One level: a float a group.
    Float(FloatFormat),
    /// Double quantization: an integer code a group times a float a span.
    Coded {
        /// Bits of a scale's code, 4..=8. Signed (two's complement) for [`Zero::FullRange`] and for tables, else
        /// unsigned.
        bits: u8,
        /// Which groups share a second-level scale.
        span: Span,
        /// The second level's float.
        second: FloatFormat,
    },
    /// QLoRA's double quantization: `scale = map[code] * absmax + offset` with bitsandbytes' signed 8-bit dynamic map,
    /// one f32 absmax every `blocks` scales (row-major over the tensor) and one f32 offset a tensor.
    Dynamic {
        /// Scales that share an absmax; 256 in QLoRA.
        blocks: usize,
    },
}

/// What is kept in f16 outside of the grid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OutlierSpec {
    /// Nothing.
    #[default]
    None,
    /// The values of largest error in each group, this many (SpQR, arXiv 2306.03078).
    PerGroup(usize),
    /// The columns of largest error in the tensor, this many in 1000, at least one (LLM.int8(), arXiv 2208.07339).
    Columns {
        /// Columns in 1000.
        permille: usize,
    },
}
