//! A quantized tensor as a few plain tensors.
//!
//! ```text
//! codes            U8  (n, ceil(k * bits / 8))          bit streams, least significant bit first, rows padded to a byte
//! scales           F   (n, groups)                      one level
//! scale_codes      U8  (n, ceil(groups * bits / 8))     two levels; with a dynamic map (n, groups)
//! second           F   (n, spans)                       with a dynamic map: F32, absmaxes, then the offset
//! zeros            U8  (n, ceil(groups * bits / 8))     integer zero points
//! mins | min_codes, min_second                          minimums, as the scales
//! outliers         F16 (n, outliers a row)              outlier_places  U8, U16 or U32: place in the group, or
//!                                                       outlier_columns U32 (columns), the same for all rows
//! order            U32 (k)                              original column of each column, if they were reordered
//! ```
//! (n becomes 1 in scales, zeros and mins where there is one scale a tensor.)

use crate::bits::{pack_row, pack_row_i16, packed_len, unpack_row, unpack_row_i16};
use crate::error::Result;
use crate::format::source::Dtype;
use crate::format::tensor_error;
use crate::{FloatFormat, Granularity, OutlierSpec, QTensor, QuantSpec, ScaleData, ScaleFormat, Zero, ZeroData};
use half::{bf16, f16};
use nibble_kernels::Outliers;
use rayon::prelude::*;
use std::ops::Range;

/// Name, type and dimensions of one part.
#[derive(Debug, Clone, PartialEq)]
pub struct PartSlot {
    /// What follows the tensor's name and a dot.
    pub suffix: &'static str,
    /// Its element type.
    pub dtype: Dtype,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// Whether its rows are the tensor's rows, so that a block of rows has the same part with fewer rows.
    pub by_row: bool,
}

/// One part with its bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// What follows the tensor's name and a dot.
    pub suffix: &'static str,
    /// Little-endian elements.
    pub bytes: Vec<u8>,
}

/// The parts of an (n, k) tensor, in the order they are written. Their bytes add up to [`QuantSpec::bytes`].
pub fn part_slots(spec: &QuantSpec, [n, k]: [usize; 2], reordered: bool) -> Vec<PartSlot> {
    let (rows, groups, spans) = (spec.scale_rows(n), spec.groups(k), spec.spans(k));
    let scales_by_row = spec.granularity != Granularity::Tensor;
    let mut slots = vec![slot("codes", Dtype::U8, vec![n, spec.row_bytes(k)], true)];
    let mut numbers = |names: [&'static str; 3]| match spec.scale {
        ScaleFormat::Float(float) => slots.push(slot(names[0], float_dtype(float), vec![rows, groups], scales_by_row)),
        ScaleFormat::Coded { bits, second, .. } => {
            slots.push(slot(names[1], Dtype::U8, vec![rows, packed_len(groups, bits as usize)], scales_by_row));
            slots.push(slot(names[2], float_dtype(second), vec![rows, spans], scales_by_row));
        }
        ScaleFormat::Dynamic { .. } => {
            let count = rows * groups;
            let floats = if count == 0 { 0 } else { count.div_ceil(spec.dynamic_blocks()) + 1 };
            slots.push(slot(names[1], Dtype::U8, vec![rows, groups], false));
            slots.push(slot(names[2], Dtype::F32, vec![floats], false));
        }
    };
    numbers(["scales", "scale_codes", "second"]);
    match spec.zero {
        Zero::Symmetric | Zero::FullRange => {}
        Zero::Int => {
            slots.push(slot("zeros", Dtype::U8, vec![rows, packed_len(groups, spec.bits())], scales_by_row));
        }
        Zero::Min => numbers(["mins", "min_codes", "min_second"]),
    }
    match spec.outliers {
        OutlierSpec::None => {}
        OutlierSpec::PerGroup(_) => {
            let shape = vec![n, spec.row_outliers(k)];
            slots.push(slot("outliers", Dtype::F16, shape.clone(), true));
            slots.push(slot("outlier_places", place_dtype(spec, k), shape, true));
        }
        OutlierSpec::Columns { .. } => {
            slots.push(slot("outliers", Dtype::F16, vec![n, spec.row_outliers(k)], true));
            slots.push(slot("outlier_columns", Dtype::U32, vec![spec.outlier_columns(k)], false));
        }
    }
    if reordered {
        slots.push(slot("order", Dtype::U32, vec![k], false));
    }
    slots
}

fn slot(suffix: &'static str, dtype: Dtype, shape: Vec<usize>, by_row: bool) -> PartSlot {
    PartSlot { suffix, dtype, shape, by_row }
}

fn float_dtype(float: FloatFormat) -> Dtype {
    match float {
        FloatFormat::F16 => Dtype::F16,
        FloatFormat::Bf16 => Dtype::BF16,
        FloatFormat::F32 => Dtype::F32,
    }
}

fn place_dtype(spec: &QuantSpec, k: usize) -> Dtype {
    match spec.outlier_index_bytes(k) {
        1 => Dtype::U8,
        2 => Dtype::U16,
        _ => Dtype::U32,
    }
}

/// The parts of a tensor (or of a block of its rows), in the order of [`part_slots`].
///
/// # Errors
/// If the tensor doesn't fit its spec.
pub fn encode(name: &str, tensor: &QTensor) -> Result<Vec<Part>> {
    tensor.validate(name)?;
    let (spec, [_, k]) = (&tensor.spec, tensor.shape);
    let mut parts = vec![part("codes", pack(&tensor.codes, k, spec.bits()))];
    numbers(&mut parts, ["scales", "scale_codes", "second"], &tensor.scales, tensor);
    match &tensor.zeros {
        ZeroData::None => {}
        ZeroData::Int(zeros) => parts.push(part("zeros", pack(zeros, spec.groups(k), spec.bits()))),
        ZeroData::Min(mins) => numbers(&mut parts, ["mins", "min_codes", "min_second"], mins, tensor),
    }
    let o = &tensor.outliers;
    let values = || o.values.iter().flat_map(|v| v.to_le_bytes()).collect();
    match spec.outliers {
        OutlierSpec::None => {}
        OutlierSpec::PerGroup(_) => {
            let (width, size) = (spec.outlier_index_bytes(k), spec.group_size(k));
            let place = |c: &u32| (*c as usize % size).to_le_bytes().into_iter().take(width);
            parts.push(part("outliers", values()));
            parts.push(part("outlier_places", o.cols.iter().flat_map(place).collect()));
        }
        OutlierSpec::Columns { .. } => {
            let columns = o.cols.iter().take(spec.outlier_columns(k));
            parts.push(part("outliers", values()));
            parts.push(part("outlier_columns", columns.flat_map(|c| c.to_le_bytes()).collect()));
        }
    }
    if let Some(order) = &tensor.order {
        parts.push(part("order", order.iter().flat_map(|c| c.to_le_bytes()).collect()));
    }
    Ok(parts)
}

fn part(suffix: &'static str, bytes: Vec<u8>) -> Part {
    Part { suffix, bytes }
}

fn numbers(parts: &mut Vec<Part>, names: [&'static str; 3], data: &ScaleData, tensor: &QTensor) {
    let (spec, k) = (&tensor.spec, tensor.shape[1]);
    match (data, spec.scale) {
        (ScaleData::Float(values), ScaleFormat::Float(float)) => {
            parts.push(part(names[0], float_bytes(values, float)));
        }
        (ScaleData::Coded { codes, second }, ScaleFormat::Coded { bits, second: float, .. }) => {
            let (groups, bits) = (spec.groups(k), bits as usize);
            let mut bytes = Vec::new();
            if groups > 0 {
                codes.chunks(groups).for_each(|row| pack_row_i16(row, bits, &mut bytes));
            }
            parts.push(part(names[1], bytes));
            parts.push(part(names[2], float_bytes(second, float)));
        }
        (ScaleData::Dynamic { codes, absmax, offset }, _) => {
            parts.push(part(names[1], codes.clone()));
            let offset = if codes.is_empty() { None } else { Some(offset) };
            let floats = absmax.iter().chain(offset);
            parts.push(part(names[2], floats.flat_map(|v| v.to_le_bytes()).collect()));
        }
        // `validate` has refused scales of another kind than the spec's.
        _ => {}
    }
}

fn pack(codes: &[u8], row: usize, bits: usize) -> Vec<u8> {
    if row == 0 {
        return Vec::new();
    }
    let mut packed = vec![0; codes.len() / row * packed_len(row, bits)];
    packed.par_chunks_mut(packed_len(row, bits)).zip(codes.par_chunks(row)).for_each_init(
        Vec::new,
        |buffer, (out, codes)| {
            buffer.clear();
            pack_row(codes, bits, buffer);
            out.copy_from_slice(buffer);
        },
    );
    packed
}

fn float_bytes(values: &[f32], float: FloatFormat) -> Vec<u8> {
    match float {
        FloatFormat::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        FloatFormat::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        FloatFormat::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// A tensor, or a block of its rows, from its parts: `bytes(suffix)` are those of the whole part. All rows must be
/// asked for if scales are dynamic.
///
/// # Errors
/// If a part has another length than its slot, or the tensor doesn't fit its spec.
pub fn decode<'a>(
    name: &str,
    spec: &QuantSpec,
    [n, k]: [usize; 2],
    rows: Range<usize>,
    reordered: bool,
    bytes: &mut dyn FnMut(&str) -> Result<&'a [u8]>,
) -> Result<QTensor> {
    let slots = part_slots(spec, [n, k], reordered);
    let mut parts = Vec::with_capacity(slots.len());
    for slot in &slots {
        let whole = bytes(slot.suffix)?;
        let wanted = slot.shape.iter().product::<usize>() * slot.dtype.bitsize() / 8;
        if whole.len() != wanted {
            return Err(tensor_error(name, format!("part `{}`: {} bytes, wanted {wanted}", slot.suffix, whole.len())));
        }
        let row = if slot.by_row && n > 0 { wanted / n } else { 0 };
        parts.push((slot.suffix, if slot.by_row { &whole[rows.start * row..rows.end * row] } else { whole }));
    }
    let get = |suffix: &str| parts.iter().find(|p| p.0 == suffix).map_or(&[][..], |p| p.1);
    let n = rows.len();
    let groups = spec.groups(k);
    let scale_rows = spec.scale_rows(n);
    let data = |names: [&str; 3], signed: bool| match spec.scale {
        ScaleFormat::Float(float) => ScaleData::Float(floats(get(names[0]), float)),
        ScaleFormat::Coded { bits, second, .. } => {
            let (bits, bytes) = (bits as usize, get(names[1]));
            let mut codes = vec![0i16; scale_rows * groups];
            let mut complete = true;
            if groups > 0 {
                let packed = bytes.chunks(packed_len(groups, bits));
                codes.chunks_mut(groups).zip(packed).for_each(|(c, b)| complete &= unpack_row_i16(b, bits, signed, c));
            }
            debug_assert!(complete, "part lengths were checked");
            ScaleData::Coded { codes, second: floats(get(names[2]), second) }
        }
        ScaleFormat::Dynamic { .. } => {
            let mut absmax = floats(get(names[2]), FloatFormat::F32);
            let offset = absmax.pop().unwrap_or(0.0);
            ScaleData::Dynamic { codes: get(names[1]).to_vec(), absmax, offset }
        }
    };
    let zeros = match spec.zero {
        Zero::Symmetric | Zero::FullRange => ZeroData::None,
        Zero::Int => ZeroData::Int(unpack(get("zeros"), scale_rows, groups, spec.bits())),
        Zero::Min => ZeroData::Min(data(["mins", "min_codes", "min_second"], false)),
    };
    let tensor = QTensor {
        spec: spec.clone(),
        shape: [n, k],
        codes: unpack(get("codes"), n, k, spec.bits()),
        scales: data(["scales", "scale_codes", "second"], spec.signed_scales()),
        zeros,
        outliers: outliers(spec, n, k, &get),
        order: reordered.then(|| get("order").as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect()),
    };
    tensor.validate(name)?;
    Ok(tensor)
}

fn unpack(bytes: &[u8], rows: usize, row: usize, bits: usize) -> Vec<u8> {
    let mut codes = vec![0; rows * row];
    if row > 0 {
        codes.par_chunks_mut(row).zip(bytes.par_chunks(packed_len(row, bits))).for_each(|(codes, bytes)| {
            let complete = unpack_row(bytes, bits, codes);
            debug_assert!(complete, "part lengths were checked");
        });
    }
    codes
}

fn floats(bytes: &[u8], float: FloatFormat) -> Vec<f32> {
    match float {
        FloatFormat::F16 => bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        FloatFormat::Bf16 => bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        FloatFormat::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
    }
}

fn outliers<'a>(spec: &QuantSpec, n: usize, k: usize, get: &dyn Fn(&str) -> &'a [u8]) -> Outliers {
    let row = spec.row_outliers(k);
    let cols: Vec<u32> = match spec.outliers {
        OutlierSpec::None => return Outliers::default(),
        OutlierSpec::PerGroup(count) => {
            let width = spec.outlier_index_bytes(k).max(1);
            let size = spec.group_size(k);
            let place = |b: &[u8]| b.iter().rev().fold(0u32, |place, byte| place << 8 | *byte as u32);
            let places = get("outlier_places").chunks_exact(width).map(place);
            // Full groups have `count` outliers each, so the i-th of a row lies in group i / count.
            let base = |i: usize| (i % row.max(1) / count.max(1) * size) as u32;
            places.enumerate().map(|(i, place)| base(i).saturating_add(place)).collect()
        }
        OutlierSpec::Columns { .. } => {
            let columns = get("outlier_columns").as_chunks().0;
            (0..n).flat_map(|_| columns.iter().map(|b| u32::from_le_bytes(*b))).collect()
        }
    };
    let values = get("outliers").as_chunks().0.iter().map(|b| f16::from_le_bytes(*b)).collect();
    Outliers { row_start: (0..=n).map(|r| (r * row) as u32).collect(), cols, values }
}
