//! Block types that a [`QTensor`] holds value for value: they run as they are, without being quantized again. Q6_K does not,
//! since kernels take no groups of 16.

use super::blocks::{BlockType, Coded, Parts};
use crate::error::Result;
use crate::format::hf_names::interleaved_row;
use crate::format::source::{QuantizedRows, Stored, TensorInfo};
use crate::format::tensor_error;
use crate::spec::{FloatFormat, Granularity, OutlierSpec, ScaleFormat, Span, Zero};
use crate::{QTensor, QuantSpec, ScaleData, ZeroData};
use nibble_kernels::{BLOCK, Outliers};
use std::ops::Range;

/// The tensor in its own arithmetic, if its type has one. With `head`, rows of so many are put back into their order.
///
/// # Errors
/// If `bytes` are not those of the tensor; reading it then fails if a scale or minimum isn't finite.
pub(super) fn tensor<'a>(
    info: &'a TensorInfo,
    bytes: &'a [u8],
    head: Option<usize>,
) -> Result<Option<QuantizedRows<'a>>> {
    let (Stored::Blocks(block), &[n, k]) = (&info.stored, info.shape.as_slice()) else { return Ok(None) };
    let Some(coded) = block.coded.as_ref().filter(|coded| coded.group % BLOCK == 0) else { return Ok(None) };
    if bytes.len() != info.bytes {
        return Err(tensor_error(&info.name, format!("{} bytes, wanted {}", bytes.len(), info.bytes)));
    }
    let read = move |rows: Range<usize>| {
        let row_bytes = k / block.values * block.bytes;
        let row = |row: usize| {
            let from = head.map_or(row, |head| interleaved_row(row, head));
            &bytes[from * row_bytes..(from + 1) * row_bytes]
        };
        let tensor = decode(block, coded, [rows.len(), k], rows.map(row));
        tensor.validate(&info.name)?;
        Ok(tensor)
    };
    Ok(Some(QuantizedRows { shape: [n, k], apart: true, read: Box::new(read) }))
}

fn decode<'a>(block: &BlockType, coded: &Coded, [n, k]: [usize; 2], rows: impl Iterator<Item = &'a [u8]>) -> QTensor {
    let mut codes = Vec::with_capacity(n * k);
    let (mut scales, mut mins) = (Numbers::default(), Numbers::default());
    let mut parts = Parts::default();
    for bytes in rows.flat_map(|row| row.chunks_exact(block.bytes)) {
        (coded.parts)(bytes, &mut parts);
        codes.extend_from_slice(&parts.codes[..block.values]);
        let groups = block.values / coded.group;
        scales.push(parts.d, &parts.scales[..groups]);
        mins.push(parts.m, &parts.mins[..groups]);
    }
    let is_coded = coded.scale_bits.is_some();
    QTensor {
        spec: spec(block, coded),
        shape: [n, k],
        codes,
        scales: scales.data(is_coded),
        zeros: if coded.zero == Zero::Min { ZeroData::Min(mins.data(is_coded)) } else { ZeroData::None },
        outliers: Outliers::default(),
        order: None,
    }
}

/// Scales or minimums of blocks.
#[derive(Default)]
struct Numbers {
    codes: Vec<i16>,
    /// One a block.
    second: Vec<f32>,
}

impl Numbers {
    fn push(&mut self, second: f32, codes: &[i16]) {
        self.second.push(second);
        self.codes.extend_from_slice(codes);
    }

    fn data(self, coded: bool) -> ScaleData {
        match coded {
            true => ScaleData::Coded { codes: self.codes, second: self.second },
            false => ScaleData::Float(self.second),
        }
    }
}

fn spec(block: &BlockType, coded: &Coded) -> QuantSpec {
    let scale = match coded.scale_bits {
        Some(bits) => ScaleFormat::Coded { bits, span: Span::Values(block.values), second: FloatFormat::F16 },
        None => ScaleFormat::Float(FloatFormat::F16),
    };
    let granularity = Granularity::Group(coded.group);
    QuantSpec { grid: coded.grid, granularity, zero: coded.zero, scale, outliers: OutlierSpec::None }
}
