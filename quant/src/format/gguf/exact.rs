//! Block types that a [`QTensor`] holds value for value: they run as they are, without being quantized again.

use crate::error::Result;
use crate::format::hf_names::interleaved_row;
use crate::format::source::{QuantizedRows, Stored, TensorInfo};
use crate::format::tensor_error;
use crate::spec::{FloatFormat, Granularity, Grid, OutlierSpec, ScaleFormat, Table, Zero};
use crate::{QTensor, QuantSpec, ScaleData, ZeroData};
use half::f16;
use nibble_kernels::Outliers;
use std::ops::Range;

/// Values of a block of every type here.
const BLOCK: usize = 32;

/// A block type in the words of a spec.
struct Exact {
    name: &'static str,
    grid: Grid,
    zero: Zero,
    /// Bytes before the codes: a scale, and a minimum with [`Zero::Min`].
    codes_at: usize,
}

const EXACT: &[Exact] = &[
    Exact { name: "Q4_0", grid: Grid::Int { bits: 4 }, zero: Zero::FullRange, codes_at: 2 },
    Exact { name: "Q4_1", grid: Grid::Int { bits: 4 }, zero: Zero::Min, codes_at: 4 },
    Exact { name: "Q8_0", grid: Grid::Int { bits: 8 }, zero: Zero::FullRange, codes_at: 2 },
    Exact { name: "IQ4_NL", grid: Grid::Table(Table::Iq4Nl), zero: Zero::Symmetric, codes_at: 2 },
];

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
    let Some(exact) = EXACT.iter().find(|e| e.name == block.name) else { return Ok(None) };
    if bytes.len() != info.bytes {
        return Err(tensor_error(&info.name, format!("{} bytes, wanted {}", bytes.len(), info.bytes)));
    }
    let read = move |rows: Range<usize>| {
        let row_bytes = k / BLOCK * block.bytes;
        let row = |row: usize| {
            let from = head.map_or(row, |head| interleaved_row(row, head));
            &bytes[from * row_bytes..(from + 1) * row_bytes]
        };
        let tensor = decode(exact, block.bytes, [rows.len(), k], rows.map(row));
        tensor.validate(&info.name)?;
        Ok(tensor)
    };
    Ok(Some(QuantizedRows { shape: [n, k], apart: true, read: Box::new(read) }))
}

fn decode<'a>(exact: &Exact, block_bytes: usize, [n, k]: [usize; 2], rows: impl Iterator<Item = &'a [u8]>) -> QTensor {
    let (mut codes, mut scales, mut mins) = (Vec::with_capacity(n * k), Vec::with_capacity(n * k / BLOCK), Vec::new());
    for block in rows.flat_map(|row| row.chunks_exact(block_bytes)) {
        let float = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        scales.push(float(0));
        if exact.zero == Zero::Min {
            mins.push(float(2));
        }
        let packed = &block[exact.codes_at..];
        match exact.grid.bits() {
            4 => {
                codes.extend(packed.iter().map(|b| b & 15));
                codes.extend(packed.iter().map(|b| b >> 4));
            }
            _ => codes.extend(packed.iter().map(|b| b ^ 0x80)),
        }
    }
    QTensor {
        spec: spec(exact),
        shape: [n, k],
        codes,
        scales: ScaleData::Float(scales),
        zeros: if exact.zero == Zero::Min { ZeroData::Min(ScaleData::Float(mins)) } else { ZeroData::None },
        outliers: Outliers::default(),
        order: None,
    }
}

fn spec(exact: &Exact) -> QuantSpec {
    QuantSpec {
        grid: exact.grid,
        granularity: Granularity::Group(BLOCK),
        zero: exact.zero,
        scale: ScaleFormat::Float(FloatFormat::F16),
        outliers: OutlierSpec::None,
    }
}
