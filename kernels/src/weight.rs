//! A weight as kernels read it: panels of 16 rows, so that a vector of 16 lanes holds one output feature a lane.
//!
//! ```text
//! 4-bit codes, one panel, 8 values of K: 64 bytes           8-bit codes, 4 values of K: 64 bytes
//!   byte 4r+j = code[r][k+j] | code[r][k+4+j] << 4             byte 4r+j = code[r][k+j]
//!   (r = row 0..16, j = 0..4)
//! dense, one panel, 1 value of K: 16 values, one a row
//! scales, zeros: [panel][group][16]
//! ```
//! The same bytes serve every instruction set: AVX-512 loads 64 of them, AVX2 twice 32.
//! Rows past `n` and columns past `k` are padding: rows are computed and dropped, columns meet activations of zero.

mod numbers;
mod packed;

pub(crate) use numbers::{GroupNumbers, PackedNumbers};
pub(crate) use packed::{Body, Grid, NARROW, PackedZeros};
pub use packed::{PackedWeight, WeightKind};

use half::{bf16, f16};

/// What a code stands for before its group's scale: `w = scale * (level - zero)` or `w = scale * level + min`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Levels {
    /// 4-bit codes 0..=15, level = code.
    Linear4,
    /// 4-bit codes, level = an int8 table entry in -127..=127 (IQ4_NL's levels, a learned codebook).
    Table4([i8; 16]),
    /// 4-bit codes, level = a float table entry (NF4); float-activation kernels only.
    FloatTable4([f32; 16]),
    /// 8-bit codes 0..=255, level = code.
    Linear8,
}

impl Levels {
    /// Bits of one stored code: 4 or 8.
    pub const fn bits(&self) -> usize {
        match self {
            Levels::Linear8 => 8,
            _ => 4,
        }
    }

    /// The level of a code, as a number.
    pub fn value(&self, code: u8) -> f32 {
        match self {
            Levels::Linear4 | Levels::Linear8 => code as f32,
            Levels::Table4(t) => t[(code & 15) as usize] as f32,
            Levels::FloatTable4(t) => t[(code & 15) as usize],
        }
    }
}

/// One number a group, (n, groups) row-major: in floats, or as codes against a second level.
#[derive(Debug, Clone, Copy)]
pub enum Scales<'a> {
    /// Plain floats that f16 holds exactly or nearly: kept as f16 in the packed weight.
    F16(&'a [f16]),
    /// Plain floats kept as f32 in the packed weight.
    F32(&'a [f32]),
    /// Double quantization: number = code * second[row][group / span].
    Coded {
        /// (n, groups) codes, each in -128..=127 or each in 0..=255.
        codes: &'a [i16],
        /// (n, ceil(groups / span)) second-level scales.
        second: &'a [f32],
        /// Groups that share one second-level scale.
        span: usize,
    },
}

/// What is subtracted from a level (a zero point), or added after scaling (a minimum).
#[derive(Debug, Clone, Copy)]
pub enum Zeros<'a> {
    /// The same zero point everywhere: 8 for symmetric int4, 128 for symmetric int8, 0 for tables. 0..=16 for
    /// [`Levels::Linear4`], -255..=255 otherwise.
    Const(i32),
    /// An integer zero point a group, (n, groups), of the same range.
    Int(&'a [u8]),
    /// A float a group that is added: w = scale * level + min.
    Min(Scales<'a>),
}

/// Values kept in f16 outside of the grid; they are added to what the codes give, so codes there stand for zero or for
/// the value that the outlier corrects.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outliers {
    /// (n + 1) offsets into `cols` and `values`; empty if there are none.
    pub row_start: Vec<u32>,
    /// Column of each outlier, ascending within a row.
    pub cols: Vec<u32>,
    /// What is added at that place.
    pub values: Vec<f16>,
}

impl Outliers {
    /// Adds those of `more` rows under `n` rows. None at all are written without offsets.
    fn append(&mut self, below: &Outliers, n: usize, more: usize) {
        if self.cols.is_empty() && below.cols.is_empty() {
            self.row_start.clear();
            return;
        }
        if self.row_start.is_empty() {
            self.row_start = vec![0; n + 1];
        }
        let start = self.cols.len() as u32;
        match below.row_start.get(1..) {
            Some(ends) if !ends.is_empty() => self.row_start.extend(ends.iter().map(|end| start + end)),
            _ => self.row_start.extend(std::iter::repeat_n(start, more)),
        }
        self.cols.extend(&below.cols);
        self.values.extend(&below.values);
    }
}

/// What a packed weight is made from: one code a byte, row-major (n, k).
#[derive(Debug, Clone, Copy)]
pub struct WeightSource<'a> {
    /// Output features (rows).
    pub n: usize,
    /// Input features (columns).
    pub k: usize,
    /// Consecutive columns that share a scale: a multiple of 32, or at least `k` for one group a row. The last group
    /// of a row may be short.
    pub group: usize,
    /// What codes mean.
    pub levels: Levels,
    /// (n, k) codes.
    pub codes: &'a [u8],
    /// (n, groups) scales.
    pub scales: Scales<'a>,
    /// Zero points or minimums.
    pub zeros: Zeros<'a>,
    /// Values outside of the grid.
    pub outliers: Option<&'a Outliers>,
}

/// Rows of dense numbers, for layers that stay unquantized: (n, k) row-major.
#[derive(Debug, Clone, Copy)]
pub enum DenseSource<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Half precision.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}
