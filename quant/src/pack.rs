//! From a [`QTensor`] to the panels that kernels read.
//!
//! Integer grids of up to 4 bits use the kernels' 4-bit codes, wider ones their 8-bit codes; tables go along as data.
//! Double-quantized scales stay codes with their second level; QLoRA's dynamic ones become floats.

use crate::error::Result;
use crate::format::source::QuantizedRows;
use crate::{FloatFormat, Grid, QTensor, QuantError, ScaleData, ScaleFormat, Table, ZeroData};
use half::f16;
use nibble_kernels::{BLOCK, Levels, PackedWeight, Scales, WeightSource, Zeros};
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;

/// Codes of a block that is decoded and packed at a time: it stays in a core's second-level cache, and the allocator keeps what it takes.
const BLOCK_CODES: usize = 1 << 16;
/// Blocks that are packed before they are put together.
const WAVE: usize = 16;

impl QuantizedRows<'_> {
    /// Packs the tensor from its file, a few blocks of rows at a time, in parallel. As [`QTensor::pack`] of the whole.
    ///
    /// # Errors
    /// As [`QTensor::pack`], or its parts contradict each other.
    pub fn pack(&self) -> Result<PackedWeight> {
        let blocks = self.blocks(BLOCK_CODES);
        let pack = |wave: &[Range<usize>]| -> Result<Vec<PackedWeight>> {
            wave.par_iter().map(|rows| self.block(rows.clone())?.pack()).collect()
        };
        let (first, rest) = blocks.split_at(1.min(blocks.len()));
        let mut whole = match first {
            [rows] => self.block(rows.clone())?.pack()?,
            _ => self.all()?.pack()?,
        };
        whole.reserve(self.shape()[0]);
        let mut ready = Vec::new();
        for wave in rest.chunks(WAVE) {
            // Memory that is touched for the first time costs as much as packing: both at the same time.
            let (put, next) = rayon::join(|| put(&mut whole, &ready), || pack(wave));
            put?;
            ready = next?;
        }
        put(&mut whole, &ready)?;
        Ok(whole)
    }
}

/// Puts blocks under each other.
fn put(whole: &mut PackedWeight, blocks: &[PackedWeight]) -> Result<()> {
    blocks.iter().try_for_each(|block| Ok(whole.append(block)?))
}

impl QTensor {
    /// Packs the tensor for the fused kernels.
    ///
    /// # Errors
    /// Columns were reordered or groups are no multiples of 32: kernels take neither.
    pub fn pack(&self) -> Result<PackedWeight> {
        if self.order.is_some() {
            let why = "columns are in act-order, which kernels don't take: requantize with static groups".to_string();
            return Err(QuantError::Spec { what: self.spec.to_string(), why });
        }
        let [n, k] = self.shape;
        let scales = Numbers::of(self, &self.scales);
        let mins = match &self.zeros {
            ZeroData::Min(mins) => Some(Numbers::of(self, mins)),
            _ => None,
        };
        let int_zeros = match &self.zeros {
            ZeroData::Int(zeros) => Some(self.each_row(zeros)),
            _ => None,
        };
        let zeros = match (&mins, &int_zeros) {
            (Some(mins), _) => Zeros::Min(mins.scales()),
            (_, Some(zeros)) => Zeros::Int(zeros),
            _ => Zeros::Const(self.spec.middle()),
        };
        let levels = match self.spec.grid {
            Grid::Int { bits: 0..=4 } => Levels::Linear4,
            Grid::Int { .. } => Levels::Linear8,
            Grid::Table(Table::Nf4) => Levels::FloatTable4(Table::Nf4.levels()),
            Grid::Table(table) => Levels::Table4(table.levels().map(|level| level as i8)),
        };
        let outliers = Some(&self.outliers).filter(|outliers| !outliers.cols.is_empty());
        let size = self.spec.group_size(k);
        // A group that is a whole row needs no multiple of 32.
        let group = if size >= k { k.max(1).next_multiple_of(BLOCK) } else { size };
        let source = WeightSource { n, k, group, levels, codes: &self.codes, scales: scales.scales(), zeros, outliers };
        Ok(PackedWeight::pack(&source)?)
    }

    /// Values a group for every row, also where the tensor has one for all.
    fn each_row<'a, T: Copy>(&self, values: &'a [T]) -> Cow<'a, [T]> {
        let [n, _] = self.shape;
        if self.spec.scale_rows(n) == n { Cow::Borrowed(values) } else { Cow::Owned(values.repeat(n)) }
    }
}

/// One number a group as kernels take it.
enum Numbers<'a> {
    F16(Vec<f16>),
    F32(Vec<f32>),
    Coded { codes: Cow<'a, [i16]>, second: Cow<'a, [f32]>, span: usize },
}

impl<'a> Numbers<'a> {
    fn of(tensor: &'a QTensor, data: &'a ScaleData) -> Numbers<'a> {
        match data {
            ScaleData::Float(values) => {
                let values = tensor.each_row(values);
                match tensor.spec.scale {
                    ScaleFormat::Float(FloatFormat::F16) => {
                        Numbers::F16(values.iter().map(|v| f16::from_f32(*v)).collect())
                    }
                    _ => Numbers::F32(values.into_owned()),
                }
            }
            ScaleData::Coded { codes, second } => Numbers::Coded {
                codes: tensor.each_row(codes),
                second: tensor.each_row(second),
                span: tensor.spec.span_groups(tensor.shape[1]),
            },
            ScaleData::Dynamic { .. } => {
                let [n, _] = tensor.shape;
                let groups = tensor.groups();
                Numbers::F32((0..n * groups).map(|i| tensor.scale(i / groups, i % groups)).collect())
            }
        }
    }

    fn scales(&self) -> Scales<'_> {
        match self {
            Numbers::F16(values) => Scales::F16(values),
            Numbers::F32(values) => Scales::F32(values),
            Numbers::Coded { codes, second, span } => Scales::Coded { codes, second, span: *span },
        }
    }
}
