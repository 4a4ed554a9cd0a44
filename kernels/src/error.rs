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
    /// `NIBBLE_ISA` holds a word that names no instruction set.
    #[error("NIBBLE_ISA={found}; known: scalar, avx2, avxvnni, avx512")]
    IsaName {
        /// The word found.
        found: String,
    },
}
