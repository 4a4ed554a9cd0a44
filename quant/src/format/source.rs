//! What every checkpoint offers: tensors by name, their bytes borrowed, their values as f32 by rows.

use super::gguf::blocks::BlockType;
use super::tensor_error;
use crate::error::Result;
use crate::first::first_where;
use crate::{QTensor, QuantSpec};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use nibble_kernels::PANEL;
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

/// The element types of safetensors, of which this crate reads those that have a plain meaning as a number.
pub use safetensors::Dtype;

/// Values that one task converts: small enough to balance, large enough not to notice the task.
const CHUNK: usize = 1 << 16;

/// How a tensor's values are stored.
#[derive(Debug, Clone, PartialEq)]
pub enum Stored {
    /// One element after another.
    Plain(Dtype),
    /// GGUF blocks along the last dimension.
    Blocks(&'static BlockType),
    /// nibble's own codes and scales.
    Quantized(Box<QuantSpec>),
}

impl Stored {
    /// The type's usual name: `F16`, `Q4_K`, `quantized`.
    pub fn name(&self) -> String {
        match self {
            Stored::Plain(dtype) => dtype.to_string(),
            Stored::Blocks(block) => block.name.to_owned(),
            Stored::Quantized(_) => "quantized".to_owned(),
        }
    }

    /// Whether the values are real numbers that may be quantized (floats, or blocks that stand for floats).
    pub fn is_float(&self) -> bool {
        match self {
            Stored::Plain(dtype) => matches!(dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64),
            Stored::Blocks(_) | Stored::Quantized(_) => true,
        }
    }
}

/// One tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// How its values are stored.
    pub stored: Stored,
    /// Dimensions, the slowest first; empty for a single value.
    pub shape: Vec<usize>,
    /// Bytes it takes in the file.
    pub bytes: usize,
}

impl TensorInfo {
    /// Number of values. Sources check at opening that the product doesn't overflow.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// (rows, columns): the first dimension and the product of the rest; one row for vectors and single values.
    pub fn rows_cols(&self) -> (usize, usize) {
        match self.shape.as_slice() {
            [] => (1, 1),
            [n] => (1, *n),
            [n, rest @ ..] => (*n, rest.iter().product()),
        }
    }
}

/// A checkpoint's tensors. Everything is validated when it is opened; reading later fails only if the file changes.
pub trait TensorSource: Send + Sync {
    /// The file or folder it was opened from.
    fn path(&self) -> &Path;

    /// All tensors, in file order.
    fn infos(&self) -> &[TensorInfo];

    /// One tensor's description.
    ///
    /// # Errors
    /// [`QuantError::NoTensor`](crate::QuantError::NoTensor) if there is none of that name.
    fn info(&self, name: &str) -> Result<&TensorInfo>;

    /// The bytes of a tensor that has one piece (all but quantized ones): borrowed from the mapped file, or made where the
    /// tensor is made as it is read.
    ///
    /// # Errors
    /// If there is no such tensor, it has several parts, or the file has changed.
    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>>;

    /// Replaces `out` by rows `rows` of [`TensorInfo::rows_cols`], in f32, converted in parallel.
    ///
    /// # Errors
    /// As for [`TensorSource::bytes`]; if the rows aren't there or the type has no plain meaning as a number.
    fn read_rows_f32(&self, name: &str, rows: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
        let info = self.info(name)?;
        decode_rows(info, &self.bytes(name)?, rows, out)
    }

    /// The tensor in its own arithmetic, if it is stored in one that [`QTensor`] expresses.
    ///
    /// # Errors
    /// If there is no such tensor or its parts contradict each other.
    fn quantized(&self, name: &str) -> Result<Option<QTensor>> {
        self.quantized_rows(name)?.map(|rows| rows.all()).transpose()
    }

    /// The same, still in its file.
    ///
    /// # Errors
    /// If there is no such tensor.
    fn quantized_rows(&self, name: &str) -> Result<Option<QuantizedRows<'_>>> {
        self.info(name)?;
        Ok(None)
    }

    /// Lets go of the memory that reading this tensor has mapped in.
    fn release(&self, name: &str);
}

/// A quantized tensor that is still in its file: blocks of its rows become [`QTensor`]s, several at the same time.
pub struct QuantizedRows<'a> {
    /// (n, k)
    pub(crate) shape: [usize; 2],
    /// Whether rows can be read without the others.
    pub(crate) apart: bool,
    pub(crate) read: Box<dyn Fn(Range<usize>) -> Result<QTensor> + Send + Sync + 'a>,
}

impl QuantizedRows<'_> {
    /// (n, k)
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// The whole tensor.
    ///
    /// # Errors
    /// If its parts contradict each other.
    pub fn all(&self) -> Result<QTensor> {
        (self.read)(0..self.shape[0])
    }

    /// Its rows in blocks of whole panels, each of about `codes` codes; one block if rows can't be read apart.
    pub fn blocks(&self, codes: usize) -> Vec<Range<usize>> {
        let [n, k] = self.shape;
        let rows = if self.apart { (codes / k.max(1)).next_multiple_of(PANEL).max(PANEL) } else { n.max(1) };
        (0..n.max(1)).step_by(rows).map(|start| start..n.min(start + rows)).collect()
    }

    /// Rows `rows`, one of [`QuantizedRows::blocks`].
    ///
    /// # Errors
    /// As [`QuantizedRows::all`].
    pub fn block(&self, rows: Range<usize>) -> Result<QTensor> {
        (self.read)(rows)
    }
}

impl std::fmt::Debug for QuantizedRows<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QuantizedRows").field("shape", &self.shape).finish_non_exhaustive()
    }
}

impl dyn TensorSource + '_ {
    /// Replaces `out` by all values of a tensor, in f32.
    ///
    /// # Errors
    /// As for [`TensorSource::read_rows_f32`].
    pub fn read_f32(&self, name: &str, out: &mut Vec<f32>) -> Result<()> {
        let rows = self.info(name)?.rows_cols().0;
        self.read_rows_f32(name, 0..rows, out)
    }
}

/// Decodes rows of one tensor from its bytes.
///
/// # Errors
/// If the rows aren't there, the bytes aren't those of the whole tensor, or the type isn't a number.
pub fn decode_rows(info: &TensorInfo, bytes: &[u8], rows: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
    let (n, cols) = info.rows_cols();
    if rows.start > rows.end || rows.end > n {
        let why = format!("rows {}..{} of {n} were asked for", rows.start, rows.end);
        return Err(tensor_error(&info.name, why));
    }
    if bytes.len() != info.bytes {
        return Err(tensor_error(&info.name, format!("{} bytes, wanted {}", bytes.len(), info.bytes)));
    }
    let len = (rows.end - rows.start) * cols;
    out.clear();
    out.resize(len, 0.0);
    if len == 0 {
        return Ok(());
    }
    let row_bytes = bytes.len() / n;
    let bytes = &bytes[rows.start * row_bytes..rows.end * row_bytes];
    match &info.stored {
        Stored::Plain(dtype) => {
            let size = dtype.bitsize() / 8;
            let convert = converter(*dtype)
                .ok_or_else(|| tensor_error(&info.name, format!("type {dtype} has no plain meaning as a number")))?;
            out.par_chunks_mut(CHUNK).zip(bytes.par_chunks(CHUNK * size)).for_each(|(out, bytes)| convert(bytes, out));
        }
        Stored::Blocks(block) => {
            let per_task = CHUNK / block.values;
            out.par_chunks_mut(per_task * block.values)
                .zip(bytes.par_chunks(per_task * block.bytes))
                .for_each(|(out, bytes)| block.decode(bytes, out));
        }
        Stored::Quantized(_) => {
            return Err(tensor_error(&info.name, "is stored in parts, wanted one piece"));
        }
    }
    Ok(())
}

type Convert = fn(&[u8], &mut [f32]);

/// How little-endian elements of a type become f32; none for types that are not plain numbers.
fn converter(dtype: Dtype) -> Option<Convert> {
    fn each<const N: usize>(bytes: &[u8], out: &mut [f32], value: impl Fn([u8; N]) -> f32) {
        for (o, b) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
            *o = value(*b);
        }
    }
    Some(match dtype {
        Dtype::F32 => |b, o| each(b, o, f32::from_le_bytes),
        // The slice conversion uses the CPU's own instructions, but wants aligned halves, which a file doesn't promise.
        Dtype::F16 => |b, o| {
            let halves: Vec<f16> = b.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b)).collect();
            halves.convert_to_f32_slice(o);
        },
        Dtype::BF16 => |b, o| each(b, o, |b| bf16::from_le_bytes(b).to_f32()),
        Dtype::F64 => |b, o| each(b, o, |b| f64::from_le_bytes(b) as f32),
        Dtype::I64 => |b, o| each(b, o, |b| i64::from_le_bytes(b) as f32),
        Dtype::U64 => |b, o| each(b, o, |b| u64::from_le_bytes(b) as f32),
        Dtype::I32 => |b, o| each(b, o, |b| i32::from_le_bytes(b) as f32),
        Dtype::U32 => |b, o| each(b, o, |b| u32::from_le_bytes(b) as f32),
        Dtype::I16 => |b, o| each(b, o, |b| i16::from_le_bytes(b) as f32),
        Dtype::U16 => |b, o| each(b, o, |b| u16::from_le_bytes(b) as f32),
        Dtype::I8 => |b, o| each(b, o, |[b]| b as i8 as f32),
        Dtype::U8 | Dtype::BOOL => |b, o| each(b, o, |[b]| b as f32),
        _ => return None,
    })
}

/// Where the first value is that isn't finite, in the bytes of a float type; none for other types.
pub fn first_non_finite(dtype: Dtype, bytes: &[u8]) -> Option<usize> {
    // All ones in the exponent are infinities and NaNs.
    fn find<const N: usize>(bytes: &[u8], bad: impl Fn([u8; N]) -> bool + Sync) -> Option<usize> {
        first_where(bytes.as_chunks::<N>().0, |b| bad(*b))
    }
    match dtype {
        Dtype::F16 => find(bytes, |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
        Dtype::BF16 => find(bytes, |b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
        Dtype::F32 => find(bytes, |b| u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000),
        // Everything here computes in f32: a value beyond it is as good as infinite.
        Dtype::F64 => find(bytes, |b| !(f64::from_le_bytes(b) as f32).is_finite()),
        _ => None,
    }
}

/// Values in the bytes of a 16- or 32-bit float type, rounded to nearest even; the inverse of reading.
///
/// # Errors
/// If the type isn't F32, F16 or BF16, or a finite value doesn't fit into it.
pub fn encode_f32(name: &str, values: &[f32], dtype: Dtype) -> Result<Vec<u8>> {
    if let (Dtype::F16, Some(at)) = (dtype, first_where(values, |v| v.is_finite() && f16::from_f32(*v).is_infinite())) {
        return Err(tensor_error(name, format!("value {} at {at} doesn't fit into F16", values[at])));
    }
    let size = match dtype {
        Dtype::F32 => 4,
        Dtype::F16 | Dtype::BF16 => 2,
        other => return Err(tensor_error(name, format!("can't be written as {other}, wanted F32, F16 or BF16"))),
    };
    let mut bytes = vec![0; values.len() * size];
    bytes.par_chunks_mut(CHUNK * size).zip(values.par_chunks(CHUNK)).for_each(|(bytes, values)| match dtype {
        Dtype::F32 => bytes.as_chunks_mut().0.iter_mut().zip(values).for_each(|(b, v)| *b = v.to_le_bytes()),
        Dtype::F16 => {
            let mut halves = vec![f16::ZERO; values.len()];
            halves.convert_from_f32_slice(values);
            bytes.as_chunks_mut().0.iter_mut().zip(halves).for_each(|(b, v)| *b = v.to_le_bytes());
        }
        _ => bytes.as_chunks_mut().0.iter_mut().zip(values).for_each(|(b, v)| *b = bf16::from_f32(*v).to_le_bytes()),
    });
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_value_that_is_not_finite_is_found_wherever_it_is() {
        let count = 2 * CHUNK + 77;
        let good = vec![1f32; count];
        let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        assert_eq!(first_non_finite(Dtype::F32, &bytes(&good)), None);
        for at in [0, 1, CHUNK - 1, CHUNK, 2 * CHUNK - 1, 2 * CHUNK, count - 1] {
            let mut values = good.clone();
            values[at] = f32::NAN;
            values[count - 1] = f32::INFINITY;
            assert_eq!(first_non_finite(Dtype::F32, &bytes(&values)), Some(at));
            assert_eq!(first_where(&values, |v| !v.is_finite()), Some(at));
        }
        let half = |v: f32| [f16::from_f32(v).to_le_bytes(), bf16::from_f32(v).to_le_bytes()];
        for (i, dtype) in [Dtype::F16, Dtype::BF16].into_iter().enumerate() {
            let mut bytes: Vec<u8> = [1.0, -65504.0, 0.0].iter().flat_map(|v| half(*v)[i]).collect();
            assert_eq!(first_non_finite(dtype, &bytes), None, "{dtype}");
            bytes.extend(half(f32::NEG_INFINITY)[i]);
            assert_eq!(first_non_finite(dtype, &bytes), Some(3), "{dtype}");
        }
        assert_eq!(first_non_finite(Dtype::F64, &1e300f64.to_le_bytes()), Some(0));
    }
}
