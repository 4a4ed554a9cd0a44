//! Schemes with names: `int4-g32-dq` is bits, group, and what is done to scales.
//!
//! ```text
//! int4      levels -8..7, signed scale            -g32      groups of 32 along K
//! int4-nl   16 non-linear levels of 6 bits        -channel  one group a row
//! int3-nl   8 of them
//! nf4       QLoRA's normal-float levels           -asym     integer zero points; -min: float minimums
//!                                                 -dq       6-bit scales against an f16 a row (-dq8: 8-bit,
//!                                                           -dq256: an f16 for every 256 values)
//! ```

use crate::error::Result;
use crate::scheme::{Activation, KvFormat, QuantScheme};
use crate::{FloatFormat, Granularity, Grid, OutlierSpec, QuantError, QuantSpec, ScaleFormat, Span, Table, Zero};
use Granularity::{Channel, Group, Tensor};
use Zero::{FullRange, Int, Min, Symmetric};

/// A scheme with a name and the algorithm that suits it.
#[derive(Debug, Clone, PartialEq)]
pub struct Preset {
    /// The word for it in recipes and flags.
    pub name: &'static str,
    /// The arithmetic.
    pub scheme: QuantScheme,
    /// Its algorithm, by name in [`crate::ALGORITHMS`], where no other is asked for.
    pub algorithm: &'static str,
    /// One line on what it is for.
    pub summary: &'static str,
}

/// The scheme of linear layers where none is asked for: of the 4-bit ones at up to 4.3 bits a weight the most exact
/// without calibration on real weights.
pub const DEFAULT: &str = "int4-nl-g32-dq";
/// The scheme of embeddings and output heads where none is asked for.
pub const DEFAULT_EMBEDDING: &str = "int8-g32";

const F16: ScaleFormat = ScaleFormat::Float(FloatFormat::F16);
const F32: ScaleFormat = ScaleFormat::Float(FloatFormat::F32);
const DQ: ScaleFormat = coded(6, Span::Row);
const DQ8: ScaleFormat = coded(8, Span::Row);
const DQ256: ScaleFormat = coded(6, Span::Values(256));
const QLORA: ScaleFormat = ScaleFormat::Dynamic { blocks: 256 };
const IQ4: Grid = Grid::Table(Table::Iq4Nl);
/// Levels of 6 bits, whose products with activations AVX2 sums in 16 bits: a third faster there than levels of 8 bits.
/// Fitted, starting from IQ4_NL's, to groups of 32 normal and Student-t (5 degrees of freedom) values with the best scale
/// each; within 0.1 dB of IQ4_NL's there.
const NL: Grid = Grid::Table(Table::Int8([-31, -25, -20, -16, -12, -8, -5, -2, 1, 4, 7, 10, 13, 17, 22, 28]));
/// Fitted to the same values, from normal ones' best levels on: 0.8 dB above the 8 levels of integers there.
const NL3: Grid = Grid::Table(Table::Eight([-31, -18, -10, -4, 2, 7, 15, 25]));
const NF4: Grid = Grid::Table(Table::Nf4);

const fn coded(bits: u8, span: Span) -> ScaleFormat {
    ScaleFormat::Coded { bits, span, second: FloatFormat::F16 }
}

const fn int(bits: u8) -> Grid {
    Grid::Int { bits }
}

/// A preset searched for the least error; activations are 8-bit where kernels multiply integers.
const fn preset(
    name: &'static str,
    grid: Grid,
    granularity: Granularity,
    zero: Zero,
    scale: ScaleFormat,
    summary: &'static str,
) -> Preset {
    let weight = QuantSpec { grid, granularity, zero, scale, outliers: OutlierSpec::None };
    let activation = match grid {
        Grid::Table(Table::Nf4) => Activation::Float,
        _ => Activation::Int8Dynamic,
    };
    Preset { name, scheme: QuantScheme { weight, activation, kv: KvFormat::F16 }, algorithm: "search", summary }
}

impl Preset {
    const fn keeping(mut self, outliers: OutlierSpec) -> Preset {
        self.scheme.weight.outliers = outliers;
        self
    }

    const fn by(mut self, algorithm: &'static str) -> Preset {
        self.algorithm = algorithm;
        self
    }
}

/// Every preset.
pub static PRESETS: &[Preset] = &[
    preset("int4-nl-g32-dq", NL, Group(32), Symmetric, DQ, "non-linear levels, double-quantized scales: the default"),
    preset("int4-iq4nl-g32-dq", IQ4, Group(32), Symmetric, DQ, "IQ4_NL's levels, double-quantized scales"),
    preset("int4-iq4nl-g32-dq256", IQ4, Group(32), Symmetric, DQ256, "the numbers of llama.cpp's IQ4_XS"),
    preset("int4-iq4nl-g32", IQ4, Group(32), Symmetric, F16, "the numbers of llama.cpp's IQ4_NL"),
    preset("int4-nl-g64-dq", NL, Group(64), Symmetric, DQ, "non-linear levels in larger groups"),
    preset("int4-g32", int(4), Group(32), FullRange, F16, "the numbers of llama.cpp's Q4_0"),
    preset("int4-g64", int(4), Group(64), FullRange, F16, "plain levels in larger groups"),
    preset("int4-g128", int(4), Group(128), FullRange, F16, "what most GPU kernels load"),
    preset("int4-g128-asym", int(4), Group(128), Int, F16, "the numbers of AWQ and GPTQ"),
    preset("int4-g32-asym", int(4), Group(32), Int, F16, "zero points in small groups"),
    preset("int4-g32-min", int(4), Group(32), Min, F16, "the numbers of llama.cpp's Q4_1"),
    preset("int4-g32-dq", int(4), Group(32), FullRange, DQ, "plain levels, 6-bit scales by row"),
    preset("int4-g32-dq8", int(4), Group(32), FullRange, DQ8, "plain levels, 8-bit scales by row"),
    preset("int4-g32-dq256", int(4), Group(32), FullRange, DQ256, "plain levels, 6-bit scales by 256 values"),
    preset("int4-g32-min-dq256", int(4), Group(32), Min, DQ256, "the numbers of llama.cpp's Q4_K"),
    preset("int4-g64-asym-dq", int(4), Group(64), Min, DQ, "6-bit scales and 6-bit minimums by row"),
    preset("int4-g64-outliers", int(4), Group(64), FullRange, F16, "the worst value of each group kept in f16")
        .keeping(OutlierSpec::PerGroup(1)),
    preset("int4-g64-columns", int(4), Group(64), FullRange, F16, "the worst 5 in 1000 columns kept in f16")
        .keeping(OutlierSpec::Columns { permille: 5 }),
    preset("int4-channel", int(4), Channel, FullRange, F16, "one scale a row"),
    preset("int4-tensor", int(4), Tensor, FullRange, F32, "one scale a tensor: a lower bound on quality"),
    preset("int8-g32", int(8), Group(32), Symmetric, F16, "the numbers of llama.cpp's Q8_0; for embeddings and heads"),
    preset("int8-g32-dq", int(8), Group(32), Symmetric, DQ8, "8-bit scales by row"),
    preset("int8-g128", int(8), Group(128), Symmetric, F16, "larger groups"),
    preset("int8-channel", int(8), Channel, Symmetric, F16, "W8A8's weights: one scale a row"),
    preset("int8-channel-asym", int(8), Channel, Int, F16, "one scale and zero point a row"),
    preset("int8-tensor", int(8), Tensor, Symmetric, F32, "one scale a tensor"),
    preset("nf4-g64", NF4, Group(64), Symmetric, F32, "QLoRA's 4-bit levels, one f32 scale for 64 values").by("rtn"),
    preset("nf4-dq", NF4, Group(64), Symmetric, QLORA, "QLoRA's, 64/256: bitsandbytes' bits where 64 divides a row")
        .by("rtn"),
    preset("int2-g32-dq", int(2), Group(32), Min, DQ, "4 levels with a minimum"),
    preset("int3-g32-dq", int(3), Group(32), FullRange, DQ, "8 levels"),
    preset("int3-nl-g32-dq", NL3, Group(32), Symmetric, DQ, "8 non-linear levels"),
    preset("int5-g32-dq", int(5), Group(32), FullRange, DQ, "32 levels"),
    preset("int6-g32-dq", int(6), Group(32), FullRange, DQ8, "64 levels: close to 8 bits"),
];

/// Short words for the presets that are meant without further thought.
pub const ALIASES: &[(&str, &str)] =
    &[("default", DEFAULT), ("int4", DEFAULT), ("int8", DEFAULT_EMBEDDING), ("nf4", "nf4-dq"), ("qlora", "nf4-dq")];

/// The preset of that name or [alias](ALIASES); an unknown one is told what it may have meant.
pub fn by_name(name: &str) -> Result<&'static Preset> {
    let wanted = ALIASES.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, preset)| preset);
    PRESETS.iter().find(|p| p.name == wanted).ok_or_else(|| QuantError::Spec {
        what: format!("scheme `{name}`"),
        why: crate::names::unknown(name, PRESETS.iter().map(|p| p.name)),
    })
}
