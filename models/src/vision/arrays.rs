//! Arrays of .npy, .npz and .safetensors files as samples, one at a time.

use super::data::{Sample, kinds};
use crate::graph::{Input, Tensor, Values};
use crate::{ModelError, Result};
use candle_core::{DType, Device};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// An array for each of a model's inputs, along whose first axis samples are.
pub(super) struct Arrays {
    path: PathBuf,
    columns: Vec<Column>,
    count: usize,
}

struct Column {
    input: Input,
    /// Of one sample, the batch among them.
    dims: Vec<usize>,
    rows: Rows,
}

enum Rows {
    /// In memory.
    Whole(candle_core::Tensor),
    /// In a file, from this byte on.
    At(u64, DType),
}

impl Arrays {
    /// Looks at a file: reads an .npy's header, and the others whole.
    ///
    /// # Errors
    /// A file that can't be read, or has no array for an input, or one of another shape.
    pub(super) fn open(path: &Path, inputs: &[Input]) -> Result<Arrays> {
        let damaged = |why: String| ModelError::Damaged { path: path.to_owned(), why };
        let candle = |e: candle_core::Error| damaged(e.to_string());
        let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
        let mut arrays: BTreeMap<String, (Vec<usize>, Rows)> = match (extension.as_str(), inputs) {
            ("npy", [input]) => BTreeMap::from([(input.name.clone(), header(path)?)]),
            ("npy", _) => {
                return Err(damaged(format!("one array for a model with {} inputs; use .npz", inputs.len())));
            }
            ("npz", _) => whole(candle_core::Tensor::read_npz(path).map_err(candle)?),
            ("safetensors", _) => whole(candle_core::safetensors::load(path, &Device::Cpu).map_err(candle)?),
            (other, _) => return Err(damaged(format!("`.{other}`: wanted {}", kinds().join(", ")))),
        };
        let mut count = None;
        let mut columns = Vec::with_capacity(inputs.len());
        for input in inputs {
            let Some((shape, rows)) = arrays.remove(&input.name) else {
                return Err(damaged(format!("has no array `{}`", input.name)));
            };
            let (samples, dims) = split(&shape, input).map_err(damaged)?;
            if *count.get_or_insert(samples) != samples {
                return Err(damaged(format!("{samples} samples of `{}`, the others have {count:?}", input.name)));
            }
            columns.push(Column { input: input.clone(), dims, rows });
        }
        Ok(Arrays { path: path.to_owned(), columns, count: count.unwrap_or(0) })
    }

    /// How many samples there are.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// One sample, counted from 0.
    ///
    /// # Errors
    /// A file that can't be read, and integers that don't fit 32 bits.
    pub(super) fn sample(&self, index: usize) -> Result<Sample> {
        let of = |column: &Column| Ok((column.input.name.clone(), self.tensor(column, index)?));
        self.columns.iter().map(of).collect()
    }

    fn tensor(&self, Column { input, dims, rows }: &Column, index: usize) -> Result<Tensor> {
        let damaged = |why: String| ModelError::Damaged { path: self.path.clone(), why };
        let candle = |e: candle_core::Error| damaged(format!("array `{}`: {e}", input.name));
        let size: usize = dims.iter().product();
        let flat = match rows {
            Rows::Whole(array) => {
                array.flatten_all().and_then(|all| all.narrow(0, index * size, size)).map_err(candle)?
            }
            Rows::At(start, dtype) => {
                let mut bytes = vec![0; size * dtype.size_in_bytes()];
                let at = start + index as u64 * bytes.len() as u64;
                File::open(&self.path)
                    .and_then(|mut file| file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(&mut bytes)))
                    .map_err(ModelError::io(&self.path))?;
                candle_core::Tensor::from_raw_buffer(&bytes, *dtype, &[size], &Device::Cpu).map_err(candle)?
            }
        };
        if input.float {
            let values = flat.to_dtype(DType::F32).and_then(|v| v.to_vec1::<f32>()).map_err(candle)?;
            return Tensor::floats(&input.name, dims, values);
        }
        let values = flat.to_dtype(DType::I64).and_then(|v| v.to_vec1::<i64>()).map_err(candle)?;
        let narrow = |v: &i64| i32::try_from(*v).map_err(|_| damaged(format!("array `{}` holds {v}", input.name)));
        let values = values.iter().map(narrow).collect::<Result<Vec<i32>>>()?;
        Ok(Tensor { dims: dims.clone(), values: Values::Int(values) })
    }
}

fn whole(arrays: impl IntoIterator<Item = (String, candle_core::Tensor)>) -> BTreeMap<String, (Vec<usize>, Rows)> {
    let arrays = arrays.into_iter();
    arrays.map(|(name, array)| (name, (array.dims().to_vec(), Rows::Whole(array)))).collect()
}

/// How many samples an array of this shape has, and the dimensions of one: along its first axis, or whole if the model's
/// input has one dimension more.
fn split(shape: &[usize], input: &Input) -> std::result::Result<(usize, Vec<usize>), String> {
    let rank = input.dims.len();
    let (count, dims) = match shape {
        whole if whole.len() + 1 == rank => (1, whole),
        [count, dims @ ..] if shape.len() == rank => (*count, dims),
        _ => {
            return Err(format!("array `{}` has {} dimensions, the model takes {rank}", input.name, shape.len()));
        }
    };
    for (axis, (found, wanted)) in dims.iter().zip(&input.dims[1..]).enumerate() {
        if let Some(wanted) = wanted.filter(|wanted| wanted != found) {
            let at = axis + 1;
            return Err(format!("array `{}` is {found} in dimension {at}, the model takes {wanted}", input.name));
        }
    }
    Ok((count, [&[1], dims].concat()))
}

/// Shape, type and first byte of an .npy file's array (the NPY format of NumPy Enhancement Proposal 1, versions 1 to 3).
fn header(path: &Path) -> Result<(Vec<usize>, Rows)> {
    let damaged = |why: String| ModelError::Damaged { path: path.to_owned(), why };
    let file = File::open(path).map_err(ModelError::io(path))?;
    let length = file.metadata().map_err(ModelError::io(path))?.len();
    let mut head = Vec::new();
    file.take(1 << 16).read_to_end(&mut head).map_err(ModelError::io(path))?;
    let (size, start) = match *head.as_slice() {
        [0x93, b'N', b'U', b'M', b'P', b'Y', 1, _, a, b, ..] => (usize::from(u16::from_le_bytes([a, b])), 10),
        [0x93, b'N', b'U', b'M', b'P', b'Y', 2 | 3, _, a, b, c, d, ..] => {
            (u32::from_le_bytes([a, b, c, d]) as usize, 12)
        }
        _ => return Err(damaged("isn't an .npy file".into())),
    };
    let text = head.get(start..).and_then(|rest| rest.get(..size));
    let text =
        String::from_utf8_lossy(text.ok_or_else(|| damaged("its header is cut off, or longer than 64 KiB".into()))?);
    let values = length.saturating_sub((start + size) as u64);
    let after = |key: &str| text.split_once(&format!("'{key}':")).map(|(_, rest)| rest.trim_start());
    let missing = |key: &str| damaged(format!("its header has no `{key}`"));

    let kind = after("descr").and_then(|rest| rest.split('\'').nth(1)).ok_or_else(|| missing("descr"))?;
    let dtype = match kind.trim_start_matches(['<', '=', '|']) {
        "f2" => DType::F16,
        "f4" => DType::F32,
        "f8" => DType::F64,
        "u1" | "b1" => DType::U8,
        "i2" => DType::I16,
        "i4" => DType::I32,
        "u4" => DType::U32,
        "i8" => DType::I64,
        _ => {
            return Err(damaged(format!(
                "holds values of the type `{kind}`; wanted f2, f4, f8, u1, b1, i2, i4, u4 or i8"
            )));
        }
    };
    if !after("fortran_order").ok_or_else(|| missing("fortran_order"))?.starts_with("False") {
        return Err(damaged("its array is in Fortran order; wanted C order (numpy.ascontiguousarray)".into()));
    }
    let shape =
        after("shape").and_then(|rest| rest.strip_prefix('(')?.split_once(')')).ok_or_else(|| missing("shape"))?.0;
    let dims = shape.split(',').map(str::trim).filter(|d| !d.is_empty()).map(str::parse);
    let dims: Vec<usize> =
        dims.collect::<std::result::Result<_, _>>().map_err(|_| damaged(format!("shape ({shape})")))?;
    let wanted = dims.iter().try_fold(dtype.size_in_bytes(), |n, &d| n.checked_mul(d)).map(|n| n as u64);
    match wanted {
        Some(wanted) if wanted == values => Ok((dims, Rows::At((start + size) as u64, dtype))),
        _ => Err(damaged(format!(
            "has {values} bytes of values; shape ({shape}) of type `{kind}` wants {}",
            wanted.map_or("more than there can be".into(), |w| w.to_string())
        ))),
    }
}
