//! A tensor in a [`QuantSpec`]'s arithmetic: the one meeting point of formats, algorithms and kernels.

use crate::QuantSpec;
use nibble_kernels::Outliers;

/// One quantized matrix. Row n is an output feature, groups run along K.
#[derive(Debug, Clone, PartialEq)]
pub struct QTensor {
    /// What the numbers below mean.
    pub spec: QuantSpec,
    /// (n, k); weights of higher rank are folded to (first dimension, the rest).
    pub shape: [usize; 2],
    /// (n, k) codes, one a byte, 0..2^bits (symmetric integers in offset binary: level + 2^(bits-1)).
    pub codes: Vec<u8>,
    /// (n, groups) scales.
    pub scales: ScaleData,
    /// Zero points or minimums, where the spec has them.
    pub zeros: ZeroData,
    /// What is added outside of the grid; empty if nothing is.
    pub outliers: Outliers,
    /// Column of the original weight that each column here came from, if they were reordered (GPTQ's act-order).
    pub order: Option<Vec<u32>>,
}

/// One number a group, in one or two levels.
#[derive(Debug, Clone, PartialEq)]
pub enum ScaleData {
    /// (n, groups) floats, each exactly representable in the spec's float format.
    Float(Vec<f32>),
    /// number = code * second[row][group / groups a span].
    Coded {
        /// (n, groups) codes, signed or unsigned as the spec says.
        codes: Vec<i16>,
        /// (n, spans) floats, exactly representable in the spec's second format.
        second: Vec<f32>,
    },
    /// number = map[code] * absmax[index / blocks] + offset.
    Dynamic {
        /// (n * groups) indices into the dynamic map.
        codes: Vec<u8>,
        /// One scale for every `blocks` codes.
        absmax: Vec<f32>,
        /// What was subtracted from the scales: their mean.
        offset: f32,
    },
}

/// Zero points or minimums of all groups.
#[derive(Debug, Clone, PartialEq)]
pub enum ZeroData {
    /// Symmetric: the grid's own middle.
    None,
    /// (n, groups) integer zero points.
    Int(Vec<u8>),
    /// (n, groups) float minimums.
    Min(ScaleData),
}
