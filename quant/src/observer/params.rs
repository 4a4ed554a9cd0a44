//! From a range to scale and zero point, by the rules of ONNX's quantizers.
//!
//! Zero is always exactly representable: the range is stretched to hold it and the zero point is an integer. A range
//! too narrow for a normal f32 scale becomes scale 1.

use crate::Range;
use serde::{Deserialize, Serialize};

/// The element type of quantized values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IntType {
    /// 0..=255.
    U8,
    /// -128..=127.
    S8,
    /// 0..=65535.
    U16,
    /// -32768..=32767.
    S16,
}

/// An integer type, whether its zero point is fixed in the middle, and how much of it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct IntGrid {
    /// The element type.
    pub int: IntType,
    /// Zero point 0 (128 or 32768 for unsigned types), equal reach on both sides.
    pub symmetric: bool,
    /// Bits of the type that stay unused: 4 for codes of 4 bits that are stored in 8.
    #[serde(default)]
    pub unused: u32,
}

/// `x = scale * (q - zero_point)`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct QParams {
    /// Positive, normal.
    pub scale: f32,
    /// Within the type's range.
    pub zero_point: i32,
}

impl IntType {
    /// Bits of a value.
    pub fn bits(self) -> u32 {
        match self {
            IntType::U8 | IntType::S8 => 8,
            IntType::U16 | IntType::S16 => 16,
        }
    }

    /// Smallest and largest value.
    pub fn limits(self) -> (i32, i32) {
        match self {
            IntType::U8 => (0, 255),
            IntType::S8 => (-128, 127),
            IntType::U16 => (0, 65535),
            IntType::S16 => (-32768, 32767),
        }
    }
}

impl IntGrid {
    /// A grid with a zero point of its own.
    pub fn asymmetric(int: IntType) -> IntGrid {
        IntGrid { int, symmetric: false, unused: 0 }
    }

    /// A grid with its zero in the middle.
    pub fn symmetric(int: IntType) -> IntGrid {
        IntGrid { int, symmetric: true, unused: 0 }
    }

    /// The grid with codes of so many bits, at least 2, in the same type; the type's own bits at most.
    pub fn with_bits(self, bits: u32) -> IntGrid {
        IntGrid { unused: self.int.bits().saturating_sub(bits.max(2)), ..self }
    }

    /// Smallest and largest value in use: signed symmetric grids leave their lowest one out.
    pub fn limits(self) -> (i32, i32) {
        let (low, high) = self.int.limits();
        match ((low >> self.unused, high >> self.unused), self.symmetric) {
            ((low, high), true) if low < 0 => (-high, high),
            (limits, _) => limits,
        }
    }

    /// Scale and zero point that hold a range (of finite numbers).
    pub fn params(self, range: Range) -> QParams {
        let (low, high) = self.limits();
        let (mut lo, mut hi) = (range.lo.min(0.0) as f64, range.hi.max(0.0) as f64);
        if self.symmetric {
            hi = hi.max(-lo);
            lo = -hi;
        }
        let scale = (hi - lo) / (high - low) as f64;
        let middle = (0.5 * (low as f64 + high as f64)).round_ties_even();
        if scale < f32::MIN_POSITIVE as f64 {
            return QParams { scale: 1.0, zero_point: if self.symmetric { middle as i32 } else { 0 } };
        }
        let zero = (low as f64 - lo / scale).round_ties_even().clamp(low as f64, high as f64);
        QParams { scale: scale as f32, zero_point: if self.symmetric { middle } else { zero } as i32 }
    }

    /// The nearest value of the grid: `saturate(round_half_even(x / scale) + zero_point)`, as QuantizeLinear.
    pub fn quantize(self, params: QParams, x: f32) -> i32 {
        let (low, high) = self.limits();
        let q = (x / params.scale).round_ties_even() as f64 + params.zero_point as f64;
        q.clamp(low as f64, high as f64) as i32
    }
}

impl QParams {
    /// What an integer means.
    pub fn dequantize(self, q: i32) -> f32 {
        (q - self.zero_point) as f32 * self.scale
    }
}
