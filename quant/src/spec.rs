//! The arithmetic of one tensor, as data.
//!
//! `w = scale[group] * (level(code) - zero[group])` or `w = scale[group] * level(code) + min[group]`, where groups run
//! along K (the input dimension). Grid, granularity, zero and scale levels are orthogonal.

mod bound;
mod size;

use crate::QuantError;
use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;

pub use bound::Range;
pub use size::SpecBytes;

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
    /// Levels from a table: 16 of them, 4 bits a code, or 8, 3 bits a code.
    Table(Table),
}

/// A table of levels, ascending.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Table {
    /// QLoRA's normal-float levels in -1..=1 (arXiv 2305.14314).
    Nf4,
    /// llama.cpp's non-linear int8 levels in -127..=113.
    Iq4Nl,
    /// A codebook of 16 int8 levels, ascending.
    Int8([i8; 16]),
    /// One of 8 such levels: 3 bits a code.
    Eight([i8; 8]),
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
    /// Levels -(2^(b-1)-1) ..= 2^(b-1)-1 are used; the scale is positive. Tables are always this: their own zero is
    /// the only one, and their scale carries a sign unless it is [`ScaleFormat::Dynamic`].
    Symmetric,
    /// Level -2^(b-1) is used too; the scale carries a sign so that the largest magnitude can sit on it.
    FullRange,
    /// An integer zero point a group, stored in the grid's bits.
    Int,
    /// A float minimum a group, stored like the scales: w = scale * code + min. With coded scales the minimum's codes
    /// are unsigned and its second level carries the sign, so that all minimums of a span share one.
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

/// llama.cpp's 16 non-linear levels (`kvalues_iq4nl` in ggml-common.h).
pub const IQ4_NL: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

impl Table {
    /// The levels, ascending; where there are 8, the last one stands in the places of those that aren't.
    pub fn levels(&self) -> [f32; 16] {
        match self {
            Table::Nf4 => crate::nf4::NF4,
            Table::Iq4Nl => IQ4_NL.map(f32::from),
            Table::Int8(t) => t.map(f32::from),
            Table::Eight(t) => std::array::from_fn(|i| f32::from(t[i.min(7)])),
        }
    }

    /// How many levels there are: 2^bits.
    pub fn count(&self) -> usize {
        if matches!(self, Table::Eight(_)) { 8 } else { 16 }
    }

    /// Whether its levels are integers, as those that are learned are.
    pub fn of_integers(&self) -> bool {
        *self != Table::Nf4
    }

    /// The levels of a table of integers that may be other ones; `None` for the tables that are given.
    fn own(&self) -> Option<&[i8]> {
        match self {
            Table::Nf4 | Table::Iq4Nl => None,
            Table::Int8(t) => Some(t),
            Table::Eight(t) => Some(t),
        }
    }
}

impl Grid {
    /// Bits of a code.
    pub fn bits(&self) -> usize {
        match self {
            Grid::Int { bits } => *bits as usize,
            Grid::Table(table) => table.count().ilog2() as usize,
        }
    }
}

impl FloatFormat {
    /// Bytes of one value.
    pub fn bytes(self) -> usize {
        match self {
            FloatFormat::F16 | FloatFormat::Bf16 => 2,
            FloatFormat::F32 => 4,
        }
    }

    /// The nearest value that the format holds; beyond its largest, infinity.
    pub fn round(self, value: f32) -> f32 {
        match self {
            FloatFormat::F16 => half::f16::from_f32(value).to_f32(),
            FloatFormat::Bf16 => half::bf16::from_f32(value).to_f32(),
            FloatFormat::F32 => value,
        }
    }

    /// Half a unit in the last place relative to the value, for normal numbers.
    pub fn epsilon(self) -> f32 {
        match self {
            FloatFormat::F16 => 1.0 / 2048.0,
            FloatFormat::Bf16 => 1.0 / 256.0,
            FloatFormat::F32 => f32::EPSILON / 2.0,
        }
    }

    /// Half the smallest number above zero: the rounding error of numbers close to zero.
    pub fn tiny(self) -> f32 {
        match self {
            FloatFormat::F16 => half::f16::from_bits(1).to_f32() / 2.0,
            FloatFormat::Bf16 => half::bf16::from_bits(1).to_f32() / 2.0,
            FloatFormat::F32 => f32::from_bits(1),
        }
    }

    /// The largest finite number.
    pub fn max(self) -> f32 {
        match self {
            FloatFormat::F16 => half::f16::MAX.to_f32(),
            FloatFormat::Bf16 => half::bf16::MAX.to_f32(),
            FloatFormat::F32 => f32::MAX,
        }
    }

    /// The word for it: `f16`, `bf16`, `f32`.
    pub fn name(self) -> &'static str {
        match self {
            FloatFormat::F16 => "f16",
            FloatFormat::Bf16 => "bf16",
            FloatFormat::F32 => "f32",
        }
    }
}

impl QuantSpec {
    /// Refuses a spec that contradicts itself, naming the two sides.
    pub fn validate(&self) -> Result<(), QuantError> {
        let refuse = |why: String| Err(QuantError::Spec { what: self.to_string(), why });
        match self.grid {
            Grid::Int { bits } if !(2..=8).contains(&bits) => {
                return refuse(format!("integer codes of {bits} bits; 2 to 8 are possible"));
            }
            Grid::Table(table) if let Some(t) = table.own().filter(|t| !t.is_sorted_by(|a, b| a < b)) => {
                return refuse(format!("table levels {t:?} do not ascend"));
            }
            Grid::Table(table) if let Some(t) = table.own().filter(|t| t[0] >= 0 || t[t.len() - 1] <= 0) => {
                return refuse(format!("table levels {t:?} are all on one side of zero"));
            }
            Grid::Table(_) if self.zero != Zero::Symmetric => {
                return refuse(format!("a table has its own zero; zero = {} needs an integer grid", self.zero.name()));
            }
            _ => {}
        }
        let group = match self.granularity {
            Granularity::Group(0) => return refuse("groups of 0 values".into()),
            Granularity::Group(size) => Some(size),
            _ => None,
        };
        match self.scale {
            ScaleFormat::Float(_) => {}
            ScaleFormat::Coded { bits, span, .. } => {
                if !(4..=8).contains(&bits) {
                    return refuse(format!("scale codes of {bits} bits; 4 to 8 are possible"));
                }
                let Some(group) = group else {
                    return refuse("a second scale level needs groups; there is one scale a row or a tensor".into());
                };
                if let Span::Values(values) = span
                    && (values == 0 || values % group != 0)
                {
                    return refuse(format!("a second-level span of {values} values over groups of {group}"));
                }
            }
            ScaleFormat::Dynamic { blocks } => {
                if blocks == 0 {
                    return refuse("an absmax for every 0 scales".into());
                }
                if self.granularity == Granularity::Tensor {
                    return refuse("a second scale level needs groups; there is one scale a tensor".into());
                }
                if matches!(self.zero, Zero::FullRange | Zero::Min) {
                    return refuse(format!(
                        "dynamic scales are positive; zero = {} needs signed ones",
                        self.zero.name()
                    ));
                }
            }
        }
        match self.outliers {
            OutlierSpec::None => Ok(()),
            OutlierSpec::PerGroup(0) => refuse("0 outliers a group; leave outliers out".into()),
            _ if self.granularity == Granularity::Tensor => {
                refuse("outliers need groups or channels; there is one group a tensor".into())
            }
            OutlierSpec::PerGroup(count) if group.is_some_and(|g| count >= g) => {
                refuse(format!("{count} outliers in groups of {} values", group.unwrap_or_default()))
            }
            OutlierSpec::Columns { permille } if !(1..1000).contains(&permille) => {
                refuse(format!("{permille} outlier columns in 1000; 1 to 999 are possible"))
            }
            _ => Ok(()),
        }
    }

    /// Bits of a code.
    pub fn bits(&self) -> usize {
        self.grid.bits()
    }

    /// The level of each code, 2^bits of them: `w = scale * (level - zero)` or `w = scale * level + min`.
    pub fn levels(&self) -> Vec<f32> {
        match self.grid {
            Grid::Int { bits } => (0..1u32 << bits).map(|code| code as f32 - self.middle() as f32).collect(),
            Grid::Table(table) => table.levels()[..table.count()].to_vec(),
        }
    }

    /// The code of level 0 where it is the same everywhere: 2^(bits-1) for symmetric integers, else 0.
    pub fn middle(&self) -> i32 {
        match (self.grid, self.zero) {
            (Grid::Int { bits }, Zero::Symmetric | Zero::FullRange) => 1 << (bits - 1),
            _ => 0,
        }
    }

    /// Codes that an algorithm may use: all, but the lowest one of symmetric integers.
    pub fn codes(&self) -> RangeInclusive<u8> {
        let top = ((1u32 << self.bits()) - 1) as u8;
        match (self.grid, self.zero) {
            (Grid::Int { .. }, Zero::Symmetric) => 1..=top,
            _ => 0..=top,
        }
    }

    /// Values of a row that share a scale, in a full group: at least 1.
    pub fn group_size(&self, k: usize) -> usize {
        match self.granularity {
            Granularity::Group(size) => size.max(1),
            _ => k.max(1),
        }
    }

    /// Groups of a row of `k` values.
    pub fn groups(&self, k: usize) -> usize {
        k.div_ceil(self.group_size(k))
    }

    /// Values of group `g` of a row of `k`: the group size, less for the last one.
    pub fn group_len(&self, k: usize, g: usize) -> usize {
        let size = self.group_size(k);
        size.min(k.saturating_sub(g.saturating_mul(size)))
    }

    /// Groups that share a second-level scale, in a full span: all of the row but with [`Span::Values`].
    pub fn span_groups(&self, k: usize) -> usize {
        match self.scale {
            ScaleFormat::Coded { span: Span::Values(values), .. } => (values / self.group_size(k)).max(1),
            _ => self.groups(k).max(1),
        }
    }

    /// Second-level spans of a row of `k` values.
    pub fn spans(&self, k: usize) -> usize {
        self.groups(k).div_ceil(self.span_groups(k))
    }

    /// Scales that share an absmax with [`ScaleFormat::Dynamic`]; else 1.
    pub fn dynamic_blocks(&self) -> usize {
        match self.scale {
            ScaleFormat::Dynamic { blocks } => blocks.max(1),
            _ => 1,
        }
    }

    /// Rows of the scale array: 1 with one scale a tensor, else `n`.
    pub fn scale_rows(&self, n: usize) -> usize {
        match self.granularity {
            Granularity::Tensor => n.min(1),
            _ => n,
        }
    }

    /// Whether a block of rows quantizes to the same codes as the rows do within their tensor: nothing is shared by all
    /// rows.
    pub fn rows_stand_alone(&self) -> bool {
        self.granularity != Granularity::Tensor
            && !matches!(self.scale, ScaleFormat::Dynamic { .. })
            && !matches!(self.outliers, OutlierSpec::Columns { .. })
    }

    /// Whether scales may be negative.
    pub fn signed_scales(&self) -> bool {
        match (self.grid, self.scale) {
            (_, ScaleFormat::Dynamic { .. }) => false,
            (Grid::Table(_), _) => true,
            _ => self.zero == Zero::FullRange,
        }
    }

    /// Codes that a second-level scale's codes may take; `None` unless scales are coded.
    pub fn scale_codes(&self) -> Option<RangeInclusive<i16>> {
        match self.scale {
            ScaleFormat::Coded { bits, .. } if self.signed_scales() => Some(-(1 << (bits - 1))..=(1 << (bits - 1)) - 1),
            ScaleFormat::Coded { bits, .. } => Some(0..=(1 << bits) - 1),
            _ => None,
        }
    }
}

impl Zero {
    /// The word for it, as in serialized specs.
    pub fn name(self) -> &'static str {
        match self {
            Zero::Symmetric => "symmetric",
            Zero::FullRange => "full-range",
            Zero::Int => "int",
            Zero::Min => "min",
        }
    }
}

/// One line in words: `int4 full-range, groups of 32, 6-bit scales by row in f16`.
impl std::fmt::Display for QuantSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.grid {
            Grid::Int { bits } => write!(f, "int{bits} {}", self.zero.name())?,
            Grid::Table(Table::Nf4) => write!(f, "nf4")?,
            Grid::Table(Table::Iq4Nl) => write!(f, "iq4-nl levels")?,
            Grid::Table(table) => write!(f, "{} learned levels", table.count())?,
        }
        match self.granularity {
            Granularity::Tensor => write!(f, ", one group a tensor")?,
            Granularity::Channel => write!(f, ", one group a row")?,
            Granularity::Group(size) => write!(f, ", groups of {size}")?,
        }
        match self.scale {
            ScaleFormat::Float(float) => write!(f, ", {} scales", float.name())?,
            ScaleFormat::Coded { bits, span: Span::Row, second } => {
                write!(f, ", {bits}-bit scales by row in {}", second.name())?;
            }
            ScaleFormat::Coded { bits, span: Span::Values(values), second } => {
                write!(f, ", {bits}-bit scales by {values} values in {}", second.name())?;
            }
            ScaleFormat::Dynamic { blocks } => write!(f, ", 8-bit dynamic scales by {blocks}")?,
        }
        match self.outliers {
            OutlierSpec::None => Ok(()),
            OutlierSpec::PerGroup(count) => write!(f, ", {count} outliers a group"),
            OutlierSpec::Columns { permille } => write!(f, ", {permille} in 1000 columns in f16"),
        }
    }
}
