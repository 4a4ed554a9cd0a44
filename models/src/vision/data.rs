//! Samples for a model: pictures of a folder, arrays of .npy, .npz and .safetensors files, lines of texts.

use super::picture::{self, ChannelOrder, Frame, Preprocess};
use super::text::Texts;
use crate::graph::{Input, Tensor, Values};
use crate::{ModelError, Result};
use candle_core::{DType, Device};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// How data is read.
#[derive(Debug, Clone)]
pub struct DataOptions {
    /// What is done to pictures.
    pub preprocess: Preprocess,
    /// Crops that are drawn of each picture; 0 for its middle alone.
    pub crops: usize,
    /// Seed of the crops.
    pub seed: u64,
    /// Blue first.
    pub bgr: bool,
    /// At most so many samples.
    pub limit: Option<usize>,
    /// What makes tokens of texts: a `tokenizer.json`.
    pub tokenizer: Option<PathBuf>,
    /// Tokens of a text that are used.
    pub tokens: usize,
}

/// One set of inputs, by name, of batch size 1.
pub type Sample = Vec<(String, Tensor)>;

/// Where samples come from: what is in memory is one file's.
pub struct Data {
    files: Vec<PathBuf>,
    others: Vec<PathBuf>,
    inputs: Vec<Input>,
    options: DataOptions,
    texts: Option<Texts>,
    root: PathBuf,
}

const PICTURES: [&str; 3] = ["jpg", "jpeg", "png"];
const ARRAYS: [&str; 3] = ["npy", "npz", "safetensors"];
const TEXTS: [&str; 1] = ["txt"];

fn extension(path: &Path) -> String {
    path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default()
}

fn kinds() -> Vec<&'static str> {
    [&PICTURES[..], &ARRAYS, &TEXTS].concat()
}

/// Files of a folder and of those in it, sorted: those that samples can be read from, and the others.
fn collect(folder: &Path, files: &mut Vec<PathBuf>, others: &mut Vec<PathBuf>) -> Result<()> {
    let entries = std::fs::read_dir(folder).map_err(ModelError::io(folder))?;
    let mut paths = Vec::new();
    for entry in entries {
        paths.push(entry.map_err(ModelError::io(folder))?.path());
    }
    paths.sort();
    for path in paths {
        if path.is_dir() {
            collect(&path, files, others)?;
        } else if kinds().contains(&extension(&path).as_str()) {
            files.push(path);
        } else {
            others.push(path);
        }
    }
    Ok(())
}

impl Data {
    /// Looks at a file, or at a folder and those in it.
    ///
    /// # Errors
    /// Nothing there that samples can be read from.
    pub fn open(path: &Path, inputs: &[Input], options: DataOptions) -> Result<Data> {
        let (mut files, mut others) = (Vec::new(), Vec::new());
        if path.is_dir() {
            collect(path, &mut files, &mut others)?;
        } else {
            std::fs::metadata(path).map_err(ModelError::io(path))?;
            files.push(path.to_owned());
        }
        if files.is_empty() {
            let kinds = kinds().join(", ");
            return Err(ModelError::Damaged {
                path: path.to_owned(),
                why: format!("holds no file of the kinds {kinds}"),
            });
        }
        let texts = match files.iter().find(|file| TEXTS.contains(&extension(file).as_str())) {
            Some(text) => Some(Texts::open(options.tokenizer.as_deref(), text, options.tokens)?),
            None => None,
        };
        Ok(Data { files, others, inputs: inputs.to_vec(), options, texts, root: path.to_owned() })
    }

    /// Files that samples come from.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Files of the folder that are passed over: of kinds that no samples are read from.
    pub fn passed_over(&self) -> &[PathBuf] {
        &self.others
    }

    /// How many samples there are.
    ///
    /// # Errors
    /// An array file that can't be read or doesn't fit.
    pub fn count(&self) -> Result<u64> {
        let mut count = 0;
        for (index, file) in self.files.iter().enumerate() {
            count += match PICTURES.contains(&extension(file).as_str()) {
                true => self.options.crops.max(1),
                false => self.samples(file, index)?.len(),
            };
        }
        Ok(self.options.limit.map_or(count, |limit| limit.min(count)) as u64)
    }

    /// Calls `each` on every sample, with the file it is from, until it returns false.
    ///
    /// # Errors
    /// A file that can't be read or doesn't fit the model's inputs, or what `each` returns.
    pub fn each(&self, each: &mut dyn FnMut(Sample, &Path) -> Result<bool>) -> Result<usize> {
        let mut count = 0;
        let limit = self.options.limit.unwrap_or(usize::MAX);
        for (index, file) in self.files.iter().enumerate() {
            for sample in self.samples(file, index)? {
                if count == limit || !each(sample, file)? {
                    return Ok(count);
                }
                count += 1;
            }
        }
        match count {
            0 => Err(ModelError::Damaged { path: self.root.clone(), why: "holds no sample".into() }),
            _ => Ok(count),
        }
    }

    fn samples(&self, file: &Path, index: usize) -> Result<Vec<Sample>> {
        if PICTURES.contains(&extension(file).as_str()) {
            return self.pictures(file, index);
        }
        if let Some(texts) = self.texts.as_ref().filter(|_| TEXTS.contains(&extension(file).as_str())) {
            return texts.samples(file, &self.inputs);
        }
        let damaged = |why: String| ModelError::Damaged { path: file.to_owned(), why };
        let candle = |e: candle_core::Error| damaged(e.to_string());
        let arrays: BTreeMap<String, candle_core::Tensor> = match extension(file).as_str() {
            "npy" => {
                let [input] = self.inputs.as_slice() else {
                    return Err(damaged(format!("one array for a model with {} inputs; use .npz", self.inputs.len())));
                };
                BTreeMap::from([(input.name.clone(), candle_core::Tensor::read_npy(file).map_err(candle)?)])
            }
            "npz" => candle_core::Tensor::read_npz(file).map_err(candle)?.into_iter().collect(),
            "safetensors" => candle_core::safetensors::load(file, &Device::Cpu).map_err(candle)?.into_iter().collect(),
            other => return Err(damaged(format!("`.{other}`: wanted {}", kinds().join(", ")))),
        };
        let mut count = None;
        let mut columns: Vec<(String, Vec<Tensor>)> = Vec::new();
        for input in &self.inputs {
            let array = arrays.get(&input.name).ok_or_else(|| damaged(format!("has no array `{}`", input.name)))?;
            let rows = split(array, input, &damaged)?;
            if *count.get_or_insert(rows.len()) != rows.len() {
                return Err(damaged(format!("{} samples of `{}`, the others have {count:?}", rows.len(), input.name)));
            }
            columns.push((input.name.clone(), rows));
        }
        let mut samples: Vec<Sample> = vec![Vec::new(); count.unwrap_or(0)];
        for (name, rows) in columns {
            for (sample, row) in samples.iter_mut().zip(rows) {
                sample.push((name.clone(), row));
            }
        }
        Ok(samples)
    }

    fn pictures(&self, file: &Path, index: usize) -> Result<Vec<Sample>> {
        let damaged = |why: String| ModelError::Damaged { path: file.to_owned(), why };
        let [input] = self.inputs.as_slice() else {
            return Err(damaged(format!("a picture for a model with {} inputs; use .npz", self.inputs.len())));
        };
        let frame = frame(input, self.options.bgr)?;
        let picture = picture::read(file)?;
        let crops = match self.options.crops {
            0 => vec![picture::centre(&picture, frame, &self.options.preprocess)],
            n => picture::crops(&picture, frame, n, self.options.seed ^ (index as u64) << 32),
        };
        let dims = match frame.order {
            ChannelOrder::First => [1, frame.channels, frame.height, frame.width],
            ChannelOrder::Last => [1, frame.height, frame.width, frame.channels],
        };
        let sample = |crop| {
            let values = picture::values(&crop, frame, &self.options.preprocess);
            Ok(vec![(input.name.clone(), Tensor::floats(&input.name, &dims, values)?)])
        };
        crops.into_iter().map(sample).collect()
    }
}

/// The picture that an input takes.
///
/// # Errors
/// An input that isn't (batch, channels, height, width) or (batch, height, width, channels) with 1 or 3 channels.
pub fn frame(input: &Input, bgr: bool) -> Result<Frame> {
    let refuse = |why: String| ModelError::Graph { what: format!("input `{}`", input.name), why };
    let [_, a, b, c] = input.dims.as_slice() else {
        return Err(refuse(format!("has {} dimensions, a picture has 4", input.dims.len())));
    };
    let colours = |d: &Option<usize>| matches!(d, Some(1 | 3));
    let (order, channels, height, width) = match () {
        () if colours(a) => (ChannelOrder::First, *a, *b, *c),
        () if colours(c) => (ChannelOrder::Last, *c, *a, *b),
        () => return Err(refuse(format!("of shape {:?} has no dimension of 1 or 3 channels", input.dims))),
    };
    match (height, width) {
        (Some(height), Some(width)) => Ok(Frame { height, width, order, channels: channels.unwrap_or(3), bgr }),
        _ => Err(refuse("leaves height and width open; fix them with --shape".into())),
    }
}

/// An array as single samples: along its first axis, or whole if the model's input has one dimension more.
fn split(array: &candle_core::Tensor, input: &Input, damaged: &dyn Fn(String) -> ModelError) -> Result<Vec<Tensor>> {
    let candle = |e: candle_core::Error| damaged(format!("array `{}`: {e}", input.name));
    let rank = input.dims.len();
    let shape = array.dims().to_vec();
    let (n, dims) = match shape.len() {
        r if r + 1 == rank => (1, shape.clone()),
        r if r == rank && r > 0 => (shape[0], shape[1..].to_vec()),
        r => return Err(damaged(format!("array `{}` has {r} dimensions, the model takes {rank}", input.name))),
    };
    for (axis, (&found, wanted)) in dims.iter().zip(&input.dims[1..]).enumerate() {
        if wanted.is_some_and(|w| w != found) {
            let why = format!(
                "array `{}` is {found} in dimension {}, the model takes {}",
                input.name,
                axis + 1,
                wanted.unwrap_or_default()
            );
            return Err(damaged(why));
        }
    }
    let dims = [vec![1], dims].concat();
    let size: usize = dims.iter().product();
    let flat = array.flatten_all().map_err(candle)?;
    if input.float {
        let all = flat.to_dtype(DType::F32).map_err(candle)?.to_vec1::<f32>().map_err(candle)?;
        return (0..n).map(|i| Tensor::floats(&input.name, &dims, all[i * size..(i + 1) * size].to_vec())).collect();
    }
    let all = flat.to_dtype(DType::I64).map_err(candle)?.to_vec1::<i64>().map_err(candle)?;
    let narrow = |v: &i64| i32::try_from(*v).map_err(|_| damaged(format!("array `{}` holds {v}", input.name)));
    let all = all.iter().map(narrow).collect::<Result<Vec<i32>>>()?;
    let row = |i: usize| Tensor { dims: dims.clone(), values: Values::Int(all[i * size..(i + 1) * size].to_vec()) };
    Ok((0..n).map(row).collect())
}
