//! Samples for a model: pictures of a folder, arrays of .npy, .npz and .safetensors files, lines of texts.

use super::arrays::Arrays;
use super::picture::{self, ChannelOrder, Frame, Preprocess};
use super::text::Texts;
use crate::graph::{Input, Tensor};
use crate::{ModelError, Result};
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

impl Default for DataOptions {
    /// The middle of every picture, as ImageNet's models take it.
    fn default() -> Self {
        let preprocess = picture::PREPROCESS[0];
        Self { preprocess, crops: 0, seed: 0, bgr: false, limit: None, tokenizer: None, tokens: 128 }
    }
}

/// One set of inputs, by name, of batch size 1.
pub type Sample = Vec<(String, Tensor)>;

/// Where samples come from. In memory there is one at a time; of an .npz or .safetensors file, all of the file's.
pub struct Data {
    held: Vec<Sample>,
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

pub(super) fn kinds() -> Vec<&'static str> {
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
        Ok(Data { held: Vec::new(), files, others, inputs: inputs.to_vec(), options, texts, root: path.to_owned() })
    }

    /// Samples that are in memory already, as they were read from `path`.
    pub fn held(samples: Vec<Sample>, path: &Path) -> Data {
        let [files, others] = [Vec::new(), Vec::new()];
        Data {
            held: samples,
            files,
            others,
            inputs: Vec::new(),
            options: DataOptions::default(),
            texts: None,
            root: path.to_owned(),
        }
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
    /// A file of arrays or texts that can't be read or doesn't fit.
    pub fn count(&self) -> Result<u64> {
        let mut count = self.held.len();
        for file in &self.files {
            count += match (PICTURES.contains(&extension(file).as_str()), self.texts_of(file)) {
                (true, _) => self.options.crops.max(1),
                (_, Some(texts)) => texts.count(file)?,
                _ => Arrays::open(file, &self.inputs)?.count(),
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
        for sample in self.held.iter().take(limit) {
            if !each(sample.clone(), &self.root)? {
                return Ok(count);
            }
            count += 1;
        }
        for (index, file) in self.files.iter().enumerate() {
            let more = self.samples(file, index, &mut |sample| {
                let more = count < limit && each(sample, file)?;
                count += usize::from(more);
                Ok(more)
            })?;
            if !more {
                return Ok(count);
            }
        }
        match count {
            0 => Err(ModelError::Damaged { path: self.root.clone(), why: "holds no sample".into() }),
            _ => Ok(count),
        }
    }

    /// What reads a file if it is a text.
    fn texts_of(&self, file: &Path) -> Option<&Texts> {
        self.texts.as_ref().filter(|_| TEXTS.contains(&extension(file).as_str()))
    }

    /// Makes a file's samples one after the other, until `each` returns false; what it returned last.
    fn samples(&self, file: &Path, index: usize, each: &mut dyn FnMut(Sample) -> Result<bool>) -> Result<bool> {
        if PICTURES.contains(&extension(file).as_str()) {
            return self.pictures(file, index, each);
        }
        if let Some(texts) = self.texts_of(file) {
            return texts.samples(file, &self.inputs, each);
        }
        let arrays = Arrays::open(file, &self.inputs)?;
        for index in 0..arrays.count() {
            if !each(arrays.sample(index)?)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn pictures(&self, file: &Path, index: usize, each: &mut dyn FnMut(Sample) -> Result<bool>) -> Result<bool> {
        let [input] = self.inputs.as_slice() else {
            let why = format!("a picture for a model with {} inputs; use .npz", self.inputs.len());
            return Err(ModelError::Damaged { path: file.to_owned(), why });
        };
        let frame = frame(input, self.options.bgr)?;
        let picture = picture::read(file)?;
        let dims = match frame.order {
            ChannelOrder::First => [1, frame.channels, frame.height, frame.width],
            ChannelOrder::Last => [1, frame.height, frame.width, frame.channels],
        };
        let how = &self.options.preprocess;
        let mut take = |crop| {
            let values = picture::values(&crop, frame, how);
            each(vec![(input.name.clone(), Tensor::floats(&input.name, &dims, values)?)])
        };
        if self.options.crops == 0 {
            return take(picture::centre(&picture, frame, how));
        }
        for crop in picture::crops(&picture, frame, self.options.crops, self.options.seed ^ (index as u64) << 32) {
            if !take(crop)? {
                return Ok(false);
            }
        }
        Ok(true)
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
