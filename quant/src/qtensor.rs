//! A tensor in a [`QuantSpec`]'s arithmetic: the one meeting point of formats, algorithms and kernels.

mod check;

use crate::{Grid, QuantSpec, nf4};
use half::f16;
use nibble_kernels::simd::{self, LANES, Simd, SimdOp};
use nibble_kernels::{Isa, Outliers};
use rayon::prelude::*;

/// One quantized matrix. Row n is an output feature, groups run along K.
#[derive(Debug, Clone, PartialEq)]
pub struct QTensor {
    /// What the numbers below mean.
    pub spec: QuantSpec,
    /// (n, k); weights of higher rank are folded to (first dimension, the rest).
    pub shape: [usize; 2],
    /// (n, k) codes, one a byte, 0..2^bits (symmetric integers in offset binary: level + 2^(bits-1)).
    pub codes: Vec<u8>,
    /// (n, groups) scales; one with [`crate::Granularity::Tensor`].
    pub scales: ScaleData,
    /// Zero points or minimums, where the spec has them, shaped as the scales.
    pub zeros: ZeroData,
    /// What is added outside of the grid, in this tensor's column order; empty if nothing is. With outliers a group
    /// every group has as many as the spec says (short groups at most all their values), with outlier columns every row
    /// has the same.
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
    /// number = `map[code] * absmax[index / blocks] + offset`.
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
    /// (n, groups) float minimums; coded ones are unsigned.
    Min(ScaleData),
}

impl QTensor {
    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.spec.groups(self.shape[1])
    }

    /// Scale of group `g` of row `r`.
    pub fn scale(&self, r: usize, g: usize) -> f32 {
        self.number(&self.scales, r, g)
    }

    /// The level that is subtracted from codes in group `g` of row `r`: the zero point, or the middle of symmetric
    /// integers; 0 with minimums and for tables.
    pub fn zero(&self, r: usize, g: usize) -> i32 {
        match &self.zeros {
            ZeroData::Int(zeros) => zeros[self.scale_row(r) * self.groups() + g] as i32,
            _ => self.spec.middle(),
        }
    }

    /// The minimum that is added in group `g` of row `r`; 0 without minimums.
    pub fn min(&self, r: usize, g: usize) -> f32 {
        match &self.zeros {
            ZeroData::Min(mins) => self.number(mins, r, g),
            _ => 0.0,
        }
    }

    /// Writes row `r` in floats, columns in the original order; `out` holds `k` values.
    ///
    /// # Panics
    /// If `r` or `out` don't fit the shape, or the tensor doesn't pass [`QTensor::validate`].
    pub fn dequantize_row(&self, r: usize, out: &mut [f32]) {
        match &self.order {
            None => self.row_in_order(r, out),
            Some(order) => {
                let mut row = vec![0.0; out.len()];
                self.row_in_order(r, &mut row);
                for (value, &col) in row.iter().zip(order) {
                    out[col as usize] = *value;
                }
            }
        }
    }

    /// All values in floats, (n, k), columns in the original order.
    ///
    /// # Panics
    /// If the tensor doesn't pass [`QTensor::validate`].
    pub fn dequantize(&self) -> Vec<f32> {
        let [n, k] = self.shape;
        let mut out = vec![0.0; n * k];
        if k > 0 {
            out.par_chunks_mut(k).enumerate().for_each(|(r, row)| self.dequantize_row(r, row));
        }
        out
    }

    /// Bytes of the tensor as the native format stores it: [`QuantSpec::bytes`] and 4 a column if they were reordered.
    pub fn bytes(&self) -> u64 {
        self.spec.bytes(self.shape) + self.order.as_ref().map_or(0, |order| 4 * order.len() as u64)
    }

    /// Bits per weight with everything that is stored; 0 for an empty tensor.
    pub fn bits_per_weight(&self) -> f64 {
        let weights = self.shape[0] as f64 * self.shape[1] as f64;
        if weights == 0.0 { 0.0 } else { self.bytes() as f64 * 8.0 / weights }
    }

    fn row_in_order(&self, r: usize, out: &mut [f32]) {
        simd::dispatch(Isa::best(), DecodeRow { tensor: self, r, out });
        for (col, value) in self.row_outliers(r) {
            out[col] += value.to_f32();
        }
    }

    /// Column and value of the outliers of row `r`, ascending.
    pub fn row_outliers(&self, r: usize) -> impl Iterator<Item = (usize, f16)> {
        let Outliers { row_start, cols, values } = &self.outliers;
        let range = match row_start.get(r..r + 2) {
            Some(ends) => ends[0] as usize..ends[1] as usize,
            None => 0..0,
        };
        cols[range.clone()].iter().map(|&c| c as usize).zip(values[range].iter().copied())
    }

    fn scale_row(&self, r: usize) -> usize {
        r.min(self.spec.scale_rows(self.shape[0]).saturating_sub(1))
    }

    fn number(&self, data: &ScaleData, r: usize, g: usize) -> f32 {
        self.row_numbers(data, r).of(g)
    }

    fn row_numbers<'a>(&self, data: &'a ScaleData, r: usize) -> RowNumbers<'a> {
        let (r, k) = (self.scale_row(r), self.shape[1]);
        let (span, spans) = match data {
            ScaleData::Coded { .. } => (self.spec.span_groups(k), self.spec.spans(k)),
            ScaleData::Dynamic { .. } => (self.spec.dynamic_blocks(), 0),
            ScaleData::Float(_) => (1, 0),
        };
        RowNumbers { data, first: r * self.groups(), first_span: r * spans, span }
    }
}

/// The scales or minimums of one row.
struct RowNumbers<'a> {
    data: &'a ScaleData,
    /// Where the row's groups begin, and its spans.
    first: usize,
    first_span: usize,
    /// Groups of a span; scales of a block where they are dynamic.
    span: usize,
}

impl RowNumbers<'_> {
    #[inline(always)]
    fn of(&self, g: usize) -> f32 {
        let i = self.first + g;
        match self.data {
            ScaleData::Float(values) => values[i],
            ScaleData::Coded { codes, second } => codes[i] as f32 * second[self.first_span + g / self.span],
            ScaleData::Dynamic { codes, absmax, offset } => {
                nf4::dynamic_map()[codes[i] as usize] * absmax[i / self.span] + offset
            }
        }
    }
}

/// Decodes a row, without what is kept beside the grid.
struct DecodeRow<'a> {
    tensor: &'a QTensor,
    r: usize,
    out: &'a mut [f32],
}

impl SimdOp for DecodeRow<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let DecodeRow { tensor, r, out } = self;
        let (k, size) = (tensor.shape[1], tensor.spec.group_size(tensor.shape[1]));
        let table = match tensor.spec.grid {
            Grid::Table(table) => Some(s.load(&table.levels())),
            Grid::Int { .. } => None,
        };
        let scales = tensor.row_numbers(&tensor.scales, r);
        let mins = match &tensor.zeros {
            ZeroData::Min(mins) => Some(tensor.row_numbers(mins, r)),
            ZeroData::None | ZeroData::Int(_) => None,
        };
        for (g, (codes, out)) in tensor.codes[r * k..(r + 1) * k].chunks(size).zip(out.chunks_mut(size)).enumerate() {
            let (scale, zero) = (s.splat(scales.of(g)), s.splat(tensor.zero(r, g) as f32));
            // Adding -0 changes no number, not even -0.
            let min = s.splat(mins.as_ref().map_or(-0.0, |mins| mins.of(g)));
            for (codes, out) in codes.chunks(LANES).zip(out.chunks_mut(LANES)) {
                let mut padded = [0; LANES];
                let code = match codes.first_chunk() {
                    Some(whole) => s.load_u8(whole),
                    None => {
                        padded[..codes.len()].copy_from_slice(codes);
                        s.load_u8(&padded)
                    }
                };
                let level = match table {
                    Some(levels) => s.lookup(levels, s.to_i32(code)),
                    None => s.sub(code, zero),
                };
                s.store_partial(s.add(s.mul(scale, level), min), out);
            }
        }
    }
}
