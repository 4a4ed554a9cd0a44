//! The kernels, one row each: dispatch, tests, benches and `nibble kernels` walk this table.

use super::tile::Tile;
#[cfg(target_arch = "x86_64")]
use super::tiles;
use super::{dense, float, int};
use crate::act::{ActKind, TILED_ROWS};
use crate::simd::Scalar;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512, AvxVnni};
use crate::weight::WeightKind;
use crate::{Isa, PackedWeight};
use half::{bf16, f16};

/// A kernel as data.
#[derive(Clone, Copy)]
pub struct GemmKernel {
    /// `gemm_{weight}_{act}_{MR}x16_{isa}`
    pub name: &'static str,
    /// The instructions it needs.
    pub isa: Isa,
    /// The weights it multiplies.
    pub weight: WeightKind,
    /// The activations it multiplies them with.
    pub act: ActKind,
    /// Activation rows that it holds in registers at a time; 1 is for single rows, and reads the weight at the
    /// memory's pace.
    pub rows: usize,
    /// Computes one tile. Does nothing on a CPU without the instructions, or for another kind of weight.
    pub(super) run: fn(&Tile),
}

impl std::fmt::Debug for GemmKernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

impl GemmKernel {
    /// Whether it is meant for this problem on a CPU with the instructions of `isa`.
    ///
    /// Weights without a kernel for [`ActKind::I8`] are multiplied in single precision, as dense ones always are.
    pub fn accepts(&self, weight: WeightKind, act: ActKind, m: usize, isa: Isa) -> bool {
        let act = match act {
            ActKind::Bf16 if weight.is_quantized() && m >= TILED_ROWS && isa == Isa::Amx => ActKind::Bf16,
            ActKind::I8 | ActKind::Bf16 if weight.has_byte_levels() => ActKind::I8,
            _ => ActKind::F32,
        };
        let includes = self.isa <= isa && !(self.isa == Isa::AvxVnni && isa > Isa::AvxVnni);
        includes && self.weight == weight && self.act == act && (self.rows == 1) == (m == 1)
    }
}

/// The first kernel that accepts `m` activation rows times `weight`; none only if the table has a hole.
pub fn select(weight: &PackedWeight, act: ActKind, m: usize, isa: Isa) -> Option<&'static GemmKernel> {
    GEMMS.iter().find(|kernel| kernel.accepts(weight.kind(), act, m, isa))
}

/// One row: its name is made of its parts.
macro_rules! gemm {
    ($weight:ident $word:literal, $act:ident $act_word:literal, $rows:literal, $isa:ident $isa_word:literal, $run:expr) => {
        GemmKernel {
            name: concat!("gemm_", $word, "_", $act_word, "_", $rows, "x16_", $isa_word),
            isa: Isa::$isa,
            weight: WeightKind::$weight,
            act: ActKind::$act,
            rows: $rows,
            run: $run,
        }
    };
}

/// All kernels of an instruction set, with `$int` rows of bytes or `$mr` float rows in registers, and those for single rows.
macro_rules! gemms {
    ($($(#[$when:meta])* $isa:ident $isa_word:literal, $int:literal, $mr:literal;)*) => {
        /// Every kernel, widest instruction set first.
        pub static GEMMS: &[GemmKernel] = &[
            #[cfg(target_arch = "x86_64")] gemm!(W4Lin "w4lin", Bf16 "bf16", 32, Amx "amx", tiles::codes4),
            #[cfg(target_arch = "x86_64")] gemm!(W4Tab "w4tab", Bf16 "bf16", 32, Amx "amx", tiles::codes4),
            #[cfg(target_arch = "x86_64")] gemm!(W4Flt "w4flt", Bf16 "bf16", 32, Amx "amx", tiles::codes4),
            #[cfg(target_arch = "x86_64")] gemm!(W8 "w8", Bf16 "bf16", 32, Amx "amx", tiles::codes8),
        $(
            $(#[$when])* gemm!(W4Lin "w4lin", I8 "i8", 1, $isa $isa_word, int::linear4::<$isa, 1>),
            $(#[$when])* gemm!(W4Lin "w4lin", I8 "i8", $int, $isa $isa_word, int::linear4::<$isa, $int>),
            $(#[$when])* gemm!(W4Tab "w4tab", I8 "i8", 1, $isa $isa_word, int::table4::<$isa, 1>),
            $(#[$when])* gemm!(W4Tab "w4tab", I8 "i8", $int, $isa $isa_word, int::table4::<$isa, $int>),
            $(#[$when])* gemm!(W8 "w8", I8 "i8", 1, $isa $isa_word, int::linear8::<$isa, 1>),
            $(#[$when])* gemm!(W8 "w8", I8 "i8", $int, $isa $isa_word, int::linear8::<$isa, $int>),
            $(#[$when])* gemm!(W4Lin "w4lin", F32 "f32", 1, $isa $isa_word, float::run::<$isa, float::Linear4, 1>),
            $(#[$when])* gemm!(W4Lin "w4lin", F32 "f32", $mr, $isa $isa_word, float::run::<$isa, float::Linear4, $mr>),
            $(#[$when])* gemm!(W4Tab "w4tab", F32 "f32", 1, $isa $isa_word, float::run::<$isa, float::Table4, 1>),
            $(#[$when])* gemm!(W4Tab "w4tab", F32 "f32", $mr, $isa $isa_word, float::run::<$isa, float::Table4, $mr>),
            $(#[$when])* gemm!(W4Flt "w4flt", F32 "f32", 1, $isa $isa_word, float::run::<$isa, float::Table4, 1>),
            $(#[$when])* gemm!(W4Flt "w4flt", F32 "f32", $mr, $isa $isa_word, float::run::<$isa, float::Table4, $mr>),
            $(#[$when])* gemm!(W8 "w8", F32 "f32", 1, $isa $isa_word, float::run::<$isa, float::Linear8, 1>),
            $(#[$when])* gemm!(W8 "w8", F32 "f32", $mr, $isa $isa_word, float::run::<$isa, float::Linear8, $mr>),
            $(#[$when])* gemm!(F32 "f32", F32 "f32", 1, $isa $isa_word, dense::run::<$isa, f32, 1>),
            $(#[$when])* gemm!(F32 "f32", F32 "f32", $mr, $isa $isa_word, dense::run::<$isa, f32, $mr>),
            $(#[$when])* gemm!(Bf16 "bf16", F32 "f32", 1, $isa $isa_word, dense::run::<$isa, bf16, 1>),
            $(#[$when])* gemm!(Bf16 "bf16", F32 "f32", $mr, $isa $isa_word, dense::run::<$isa, bf16, $mr>),
            $(#[$when])* gemm!(F16 "f16", F32 "f32", 1, $isa $isa_word, dense::run::<$isa, f16, 1>),
            $(#[$when])* gemm!(F16 "f16", F32 "f32", $mr, $isa $isa_word, dense::run::<$isa, f16, $mr>),
        )*];
    };
}

gemms! {
    #[cfg(target_arch = "x86_64")] Avx512 "avx512", 8, 8;
    #[cfg(target_arch = "x86_64")] AvxVnni "avxvnni", 4, 4;
    #[cfg(target_arch = "x86_64")] Avx2 "avx2", 4, 4;
    Scalar "scalar", 4, 4;
}
