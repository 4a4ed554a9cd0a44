//! Why a weight can't be packed or a product can't be run.

/// A refusal of this crate: what was found and what was wanted.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A buffer's length doesn't fit the shape that it was given with.
    #[error("{what} holds {found} values, expected {wanted}")]
    Length {
        /// Which buffer.
        what: &'static str,
        /// Its length.
        found: usize,
        /// The length that the shape asks for.
        wanted: usize,
    },
    /// Groups are neither multiples of 32 nor the whole row.
    #[error("groups of {found} values; kernels take multiples of 32, or one group a row")]
    Group {
        /// The group size found.
        found: usize,
    },
    /// Rows in one arithmetic to be added to rows in another.
    #[error("rows of {found} to be added to {wanted}, or with other levels, groups or zero points")]
    Unlike {
        /// The kind of weight they are.
        found: &'static str,
        /// The kind that they should be.
        wanted: &'static str,
    },
    /// A code is outside the levels that it indexes.
    #[error("code {found} at row {row}, column {col}; the grid has {levels} levels")]
    Code {
        /// Row of the code.
        row: usize,
        /// Column of the code.
        col: usize,
        /// The code found.
        found: u8,
        /// How many levels there are.
        levels: usize,
    },
    /// An outlier points outside of the weight.
    #[error("outlier at row {row}, column {col} of a {n} x {k} weight")]
    Outlier {
        /// Row it points at.
        row: usize,
        /// Column it points at.
        col: usize,
        /// Rows of the weight.
        n: usize,
        /// Columns of the weight.
        k: usize,
    },
    /// Outlier row offsets that don't start at 0, go backwards or reach past the columns.
    #[error("outliers of row {row} are {start}..{end}; offsets start at 0, ascend and end within the columns")]
    OutlierRow {
        /// The row.
        row: usize,
        /// Its first offset.
        start: u32,
        /// Its end.
        end: u32,
    },
    /// A zero point too large for exact arithmetic.
    #[error("zero point {found}; kernels take 0..=16 of linear 4-bit codes, -255..=255 of others")]
    Zero {
        /// The zero point found.
        found: i32,
    },
    /// A scale's or minimum's code that doesn't fit into a byte with the others.
    #[error("code {found} of {what} at row {row}, group {group}; all are in 0..=255 or all in -128..=127")]
    ScaleCode {
        /// Which numbers.
        what: &'static str,
        /// Row of the code.
        row: usize,
        /// Group of the code.
        group: usize,
        /// The code found.
        found: i16,
    },
    /// A second-level scale that no group shares.
    #[error("{what} with spans of 0 groups; a span holds at least 1")]
    Span {
        /// Which numbers.
        what: &'static str,
    },
    /// A row outside of the weight.
    #[error("row {found} of a weight of {n} rows")]
    Row {
        /// The row asked for.
        found: usize,
        /// Rows of the weight.
        n: usize,
    },
    /// No kernel multiplies such a weight with such activations here.
    #[error("no kernel for {weight} weights with {act} activations on {isa}")]
    NoKernel {
        /// The weight's kind.
        weight: &'static str,
        /// The activations' kind.
        act: &'static str,
        /// The widest instruction set allowed.
        isa: &'static str,
    },
    /// The CUDA device, its driver or what it is asked for can't be used.
    #[error("CUDA: {why}")]
    Cuda {
        /// What was found and what helps.
        why: String,
    },
    /// `NIBBLE_ISA` holds a word that names no instruction set.
    #[error("NIBBLE_ISA={found}; known: scalar, avx2, avxvnni, avx512, amx")]
    IsaName {
        /// The word found.
        found: String,
    },
}
