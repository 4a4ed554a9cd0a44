//! What a spec costs: the exact bytes of every part of a tensor, as the native format stores them.
//!
//! Rows of codes, of scale codes and of zero points are bit streams that are padded to a byte, so that a row can be
//! read alone. Everything else is whole bytes.

use super::{FloatFormat, OutlierSpec, QuantSpec, ScaleFormat, Zero};

/// Bytes of each part of one (n, k) tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SpecBytes {
    /// (n, ceil(k * bits / 8)) codes.
    pub codes: u64,
    /// First-level scales: floats, or rows of codes.
    pub scales: u64,
    /// Second-level scales, dynamic absmaxes and the offset a tensor.
    pub second: u64,
    /// Zero points, or minimums with their own second level.
    pub zeros: u64,
    /// Outliers: an f16 each and where they are.
    pub outliers: u64,
}

impl SpecBytes {
    /// All parts.
    pub fn total(&self) -> u64 {
        self.codes + self.scales + self.second + self.zeros + self.outliers
    }
}

impl QuantSpec {
    /// Bytes of one row's codes: a bit stream padded to a byte.
    pub fn row_bytes(&self, k: usize) -> usize {
        (k * self.bits()).div_ceil(8)
    }

    /// Bytes of each part of an (n, k) tensor.
    pub fn bytes_by_part(&self, [n, k]: [usize; 2]) -> SpecBytes {
        let (groups, rows) = (self.groups(k), self.scale_rows(n));
        let (scales, second) = match self.scale {
            ScaleFormat::Float(float) => (rows * groups * float.bytes(), 0),
            ScaleFormat::Coded { bits, second, .. } => {
                (rows * (groups * bits as usize).div_ceil(8), rows * self.spans(k) * second.bytes())
            }
            ScaleFormat::Dynamic { blocks } => {
                let count = rows * groups;
                let f32s = if count == 0 { 0 } else { count.div_ceil(blocks) + 1 };
                (count, f32s * FloatFormat::F32.bytes())
            }
        };
        let zeros = match self.zero {
            Zero::Symmetric | Zero::FullRange => 0,
            Zero::Int => rows * (groups * self.bits()).div_ceil(8),
            Zero::Min => scales + second,
        };
        SpecBytes {
            codes: (n * self.row_bytes(k)) as u64,
            scales: scales as u64,
            second: second as u64,
            zeros: zeros as u64,
            outliers: self.outlier_bytes([n, k]) as u64,
        }
    }

    /// Bytes of an (n, k) tensor.
    pub fn bytes(&self, shape: [usize; 2]) -> u64 {
        self.bytes_by_part(shape).total()
    }

    /// Bits per weight of an (n, k) tensor, with everything that is stored for it; 0 for an empty one.
    ///
    /// int4-g128 with f16 scales is 4.125 wherever 128 divides k.
    pub fn bits_per_weight(&self, shape: [usize; 2]) -> f64 {
        let weights = shape[0] as f64 * shape[1] as f64;
        if weights == 0.0 { 0.0 } else { self.bytes(shape) as f64 * 8.0 / weights }
    }

    /// Columns that are kept outside of the grid.
    pub fn outlier_columns(&self, k: usize) -> usize {
        match self.outliers {
            OutlierSpec::Columns { permille } => (k * permille / 1000).clamp(k.min(1), k),
            _ => 0,
        }
    }

    /// Outliers of one row.
    pub fn row_outliers(&self, k: usize) -> usize {
        match self.outliers {
            OutlierSpec::None => 0,
            OutlierSpec::PerGroup(count) => (0..self.groups(k)).map(|g| count.min(self.group_len(k, g))).sum::<usize>(),
            OutlierSpec::Columns { .. } => self.outlier_columns(k),
        }
    }

    /// Bytes of an outlier's place: within its group for outliers a group, 0 for columns (listed once a tensor in u32).
    pub fn outlier_index_bytes(&self, k: usize) -> usize {
        match (self.outliers, self.group_size(k)) {
            (OutlierSpec::PerGroup(_), 0..=0x100) => 1,
            (OutlierSpec::PerGroup(_), 0x101..=0x1_0000) => 2,
            (OutlierSpec::PerGroup(_), _) => 4,
            _ => 0,
        }
    }

    fn outlier_bytes(&self, [n, k]: [usize; 2]) -> usize {
        n * self.row_outliers(k) * (2 + self.outlier_index_bytes(k)) + 4 * self.outlier_columns(k)
    }
}
