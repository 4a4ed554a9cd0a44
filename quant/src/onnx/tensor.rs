//! Values of a [`TensorProto`], wherever its data lies: raw bytes or the typed field of its element type.
//!
//! Sizes are checked against the shape before anything is allocated. Floats of every width read as `f32`, integers as
//! `i64`; 4-bit and 2-bit integers are packed from the low bits up, as ONNX has them.

use super::proto::{DataLocation, DataType, TensorProto};
use crate::QuantError;
use crate::error::Result;
use bytes::Bytes;
use half::{bf16, f16};

pub(crate) fn tensor_error(tensor: &TensorProto, why: impl Into<String>) -> QuantError {
    QuantError::Tensor { name: tensor.name().to_owned(), why: why.into() }
}

impl DataType {
    /// Bits of one element in raw data; `None` for strings and `Undefined`.
    pub fn bits(self) -> Option<usize> {
        use DataType::*;
        Some(match self {
            Undefined | String => return None,
            Uint2 | Int2 => 2,
            Uint4 | Int4 | Float4e2m1 => 4,
            Float6e2m3 | Float6e3m2 => 6,
            Uint8 | Int8 | Bool | Float8e4m3fn | Float8e4m3fnuz | Float8e5m2 | Float8e5m2fnuz | Float8e8m0 => 8,
            Uint16 | Int16 | Float16 | Bfloat16 => 16,
            Float | Int32 | Uint32 => 32,
            Double | Int64 | Uint64 | Complex64 => 64,
            Complex128 => 128,
        })
    }

    /// Whether its values read as `f32`.
    pub fn is_float(self) -> bool {
        matches!(self, DataType::Float | DataType::Float16 | DataType::Bfloat16 | DataType::Double)
    }
}

/// Elements of a tensor, with its name for errors.
///
/// # Errors
/// A negative dimension, or more elements than fit in memory.
pub fn elements(tensor: &TensorProto) -> Result<usize> {
    let mut n = 1usize;
    for &dim in &tensor.dims {
        let dim = usize::try_from(dim).map_err(|_| tensor_error(tensor, format!("dimension {dim}")))?;
        n = n
            .checked_mul(dim)
            .filter(|n| *n <= isize::MAX as usize / 16)
            .ok_or_else(|| tensor_error(tensor, format!("shape {:?} has too many elements", tensor.dims)))?;
    }
    Ok(n)
}

/// Bytes of a tensor's raw data by its shape and type; `None` if the type has none (strings).
///
/// # Errors
/// As [`elements`].
pub fn raw_len(tensor: &TensorProto) -> Result<Option<usize>> {
    let n = elements(tensor)?;
    let ty = DataType::try_from(tensor.data_type.unwrap_or(0)).unwrap_or(DataType::Undefined);
    Ok(ty.bits().map(|bits| (n * bits).div_ceil(8)))
}

/// A tensor's raw bytes, after comparing their number with its shape.
///
/// # Errors
/// Data that lies in another file, or isn't as long as the shape asks for.
fn raw(tensor: &TensorProto) -> Result<Option<&Bytes>> {
    if tensor.data_location() == DataLocation::External {
        return Err(tensor_error(tensor, "its data lies in another file and wasn't loaded"));
    }
    let Some(raw) = &tensor.raw_data else { return Ok(None) };
    match raw_len(tensor)? {
        Some(wanted) if wanted == raw.len() => Ok(Some(raw)),
        Some(wanted) => {
            let found = raw.len();
            Err(tensor_error(tensor, format!("{found} bytes of data, shape {:?} asks for {wanted}", tensor.dims)))
        }
        None => Err(tensor_error(tensor, format!("raw data of type {:?}", tensor.data_type()))),
    }
}

/// Refuses a typed field of the wrong length.
fn typed<'a, T>(tensor: &TensorProto, field: &'a [T], wanted: usize) -> Result<&'a [T]> {
    if field.len() != wanted {
        let found = field.len();
        return Err(tensor_error(tensor, format!("{found} values, shape {:?} asks for {wanted}", tensor.dims)));
    }
    Ok(field)
}

fn words<const N: usize, T>(raw: &[u8], from: impl Fn([u8; N]) -> T) -> Vec<T> {
    raw.as_chunks::<N>().0.iter().map(|bytes| from(*bytes)).collect()
}

/// Codes of `bits` (2 or 4) each, lowest bits first, sign-extended if `signed`.
fn narrow(raw: impl Iterator<Item = u8>, bits: u32, signed: bool, n: usize) -> Vec<i64> {
    let per = 8 / bits;
    raw.flat_map(|byte| (0..per).map(move |i| (byte >> (i * bits)) & ((1u16 << bits) - 1) as u8))
        .take(n)
        .map(|code| {
            let half = 1i64 << (bits - 1);
            if signed { ((i64::from(code)) ^ half) - half } else { i64::from(code) }
        })
        .collect()
}

/// A float tensor's values, row-major.
///
/// # Errors
/// Not a float type, or a size that differs from the shape's.
pub fn floats(tensor: &TensorProto) -> Result<Vec<f32>> {
    let n = elements(tensor)?;
    let raw = raw(tensor)?;
    Ok(match (tensor.data_type(), raw) {
        (DataType::Float, Some(raw)) => words(raw, f32::from_le_bytes),
        (DataType::Float, None) => typed(tensor, &tensor.float_data, n)?.to_vec(),
        (DataType::Float16, Some(raw)) => words(raw, |b| f16::from_le_bytes(b).to_f32()),
        (DataType::Float16, None) => {
            typed(tensor, &tensor.int32_data, n)?.iter().map(|&v| f16::from_bits(v as u16).to_f32()).collect()
        }
        (DataType::Bfloat16, Some(raw)) => words(raw, |b| bf16::from_le_bytes(b).to_f32()),
        (DataType::Bfloat16, None) => {
            typed(tensor, &tensor.int32_data, n)?.iter().map(|&v| bf16::from_bits(v as u16).to_f32()).collect()
        }
        (DataType::Double, Some(raw)) => words(raw, |b| f64::from_le_bytes(b) as f32),
        (DataType::Double, None) => typed(tensor, &tensor.double_data, n)?.iter().map(|&v| v as f32).collect(),
        (other, _) => return Err(tensor_error(tensor, format!("is of type {other:?}, a float was wanted"))),
    })
}

/// An integer (or bool) tensor's values, row-major.
///
/// # Errors
/// Not an integer type, a size that differs from the shape's, or a value that a signed 64-bit integer can't hold.
pub fn ints(tensor: &TensorProto) -> Result<Vec<i64>> {
    let n = elements(tensor)?;
    let raw = raw(tensor)?;
    let from_i32 =
        || -> Result<Vec<i64>> { Ok(typed(tensor, &tensor.int32_data, n)?.iter().map(|&v| i64::from(v)).collect()) };
    // Typed 4- and 2-bit data keeps several codes in each int32.
    let packed = |bits: usize| -> Result<Vec<u8>> {
        let wanted = (n * bits).div_ceil(8);
        Ok(typed(tensor, &tensor.int32_data, wanted)?.iter().map(|&v| v as u8).collect())
    };
    let unsigned = |values: Vec<u64>| -> Result<Vec<i64>> {
        let too_big = |v| tensor_error(tensor, format!("value {v} is beyond signed 64-bit integers"));
        values.into_iter().map(|v| i64::try_from(v).map_err(|_| too_big(v))).collect()
    };
    use DataType::*;
    Ok(match (tensor.data_type(), raw) {
        (Int8, Some(raw)) => raw.iter().map(|&b| i64::from(b as i8)).collect(),
        (Uint8 | Bool, Some(raw)) => raw.iter().map(|&b| i64::from(b)).collect(),
        (Int16, Some(raw)) => words(raw, |b| i64::from(i16::from_le_bytes(b))),
        (Uint16, Some(raw)) => words(raw, |b| i64::from(u16::from_le_bytes(b))),
        (Int32, Some(raw)) => words(raw, |b| i64::from(i32::from_le_bytes(b))),
        (Uint32, Some(raw)) => words(raw, |b| i64::from(u32::from_le_bytes(b))),
        (Int64, Some(raw)) => words(raw, i64::from_le_bytes),
        (Uint64, Some(raw)) => unsigned(words(raw, u64::from_le_bytes))?,
        (Int4 | Uint4, Some(raw)) => narrow(raw.iter().copied(), 4, tensor.data_type() == Int4, n),
        (Int2 | Uint2, Some(raw)) => narrow(raw.iter().copied(), 2, tensor.data_type() == Int2, n),
        (Int4 | Uint4, None) => narrow(packed(4)?.into_iter(), 4, tensor.data_type() == Int4, n),
        (Int2 | Uint2, None) => narrow(packed(2)?.into_iter(), 2, tensor.data_type() == Int2, n),
        (Int8 | Uint8 | Bool | Int16 | Uint16 | Int32, None) => from_i32()?,
        (Int64, None) => typed(tensor, &tensor.int64_data, n)?.to_vec(),
        (Uint32 | Uint64, None) => unsigned(typed(tensor, &tensor.uint64_data, n)?.to_vec())?,
        (other, _) => return Err(tensor_error(tensor, format!("is of type {other:?}, an integer was wanted"))),
    })
}

/// The one value of a float tensor with one element.
///
/// # Errors
/// As [`floats`], or if there isn't exactly one.
pub fn scalar(tensor: &TensorProto) -> Result<f32> {
    match floats(tensor)?.as_slice() {
        [value] => Ok(*value),
        values => Err(tensor_error(tensor, format!("has {} values, one was wanted", values.len()))),
    }
}

fn build(name: &str, ty: DataType, dims: &[usize], raw: Vec<u8>) -> TensorProto {
    debug_assert_eq!((dims.iter().product::<usize>() * ty.bits().unwrap_or(0)).div_ceil(8), raw.len());
    TensorProto {
        name: Some(name.to_owned()),
        data_type: Some(ty as i32),
        dims: dims.iter().map(|&d| d as i64).collect(),
        raw_data: Some(raw.into()),
        ..Default::default()
    }
}

/// A float tensor; `values` has as many elements as `dims`.
pub fn from_f32(name: &str, dims: &[usize], values: &[f32]) -> TensorProto {
    build(name, DataType::Float, dims, values.iter().flat_map(|v| v.to_le_bytes()).collect())
}

/// A tensor in half precision, rounded to it.
pub fn from_f16(name: &str, dims: &[usize], values: &[f32]) -> TensorProto {
    build(name, DataType::Float16, dims, values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect())
}

/// An int8 tensor.
pub fn from_i8(name: &str, dims: &[usize], values: &[i8]) -> TensorProto {
    build(name, DataType::Int8, dims, values.iter().map(|&v| v as u8).collect())
}

/// A uint8 tensor.
pub fn from_u8(name: &str, dims: &[usize], values: &[u8]) -> TensorProto {
    build(name, DataType::Uint8, dims, values.to_vec())
}

/// A tensor of truth values.
pub fn from_bool(name: &str, dims: &[usize], values: &[bool]) -> TensorProto {
    build(name, DataType::Bool, dims, values.iter().map(|&v| u8::from(v)).collect())
}

/// An int32 tensor.
pub fn from_i32(name: &str, dims: &[usize], values: &[i32]) -> TensorProto {
    build(name, DataType::Int32, dims, values.iter().flat_map(|v| v.to_le_bytes()).collect())
}

/// An int64 tensor.
pub fn from_i64(name: &str, dims: &[usize], values: &[i64]) -> TensorProto {
    build(name, DataType::Int64, dims, values.iter().flat_map(|v| v.to_le_bytes()).collect())
}

/// A signed or unsigned 16-bit tensor; values are taken modulo 2^16.
pub fn from_16(name: &str, dims: &[usize], values: &[i32], signed: bool) -> TensorProto {
    let ty = if signed { DataType::Int16 } else { DataType::Uint16 };
    build(name, ty, dims, values.iter().flat_map(|&v| (v as u16).to_le_bytes()).collect())
}

/// A 4-bit tensor, two values a byte, the first in the low bits; values are taken modulo 16.
pub fn from_4bit(name: &str, dims: &[usize], values: &[i8], signed: bool) -> TensorProto {
    let ty = if signed { DataType::Int4 } else { DataType::Uint4 };
    let nibble = |v: i8| v as u8 & 15;
    let raw = values.chunks(2).map(|pair| nibble(pair[0]) | nibble(*pair.get(1).unwrap_or(&0)) << 4).collect();
    build(name, ty, dims, raw)
}
