//! Samples with labels, all of them in memory.
//!
//! ```text
//! .csv, .csv.gz   a sample a row: values 0..=255, the class last
//! .npz            arrays `x` (or the model's input's name) and, with labels, `y` or `labels`
//! .npy            samples alone
//! a folder        a folder for each class, in the order of their names, with pictures
//! ```

use crate::vision::data::Data;
use crate::vision::picture::{self, Frame, Preprocess};
use crate::{ModelError, Result, graph};
use candle_core::{DType, Device, Tensor};
use flate2::read::GzDecoder;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Samples of one shape.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// The file or folder they are from.
    pub path: PathBuf,
    /// A sample's shape.
    pub dims: Vec<usize>,
    /// (samples, a sample's values).
    pub values: Vec<f32>,
    /// Their classes.
    pub labels: Option<Vec<u32>>,
}

/// What is done to samples as they are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Augment {
    /// Pictures (channels, height, width) move by up to so many pixels; what comes in from outside is 0.
    pub shift: usize,
}

fn damaged(path: &Path, why: impl ToString) -> ModelError {
    ModelError::Damaged { path: path.to_owned(), why: why.to_string() }
}

impl Dataset {
    /// Reads samples; `dims` is the shape that the model takes, if there is one, and `frame` what pictures become.
    ///
    /// # Errors
    /// A file that can't be read, isn't what its name says, or holds samples of another shape; each by file and row.
    pub fn open(
        path: &Path,
        input: &str,
        dims: Option<&[usize]>,
        pictures: Option<(Frame, Preprocess)>,
    ) -> Result<Self> {
        let name = path.file_name().map(|n| n.to_string_lossy().to_lowercase()).unwrap_or_default();
        let found = match name {
            _ if path.is_dir() => match pictures {
                Some((frame, preprocess)) => classes(path, frame, &preprocess)?,
                None => return Err(damaged(path, "is a folder; pictures are for models that take pictures")),
            },
            n if n.ends_with(".csv") || n.ends_with(".csv.gz") => csv(path, n.ends_with(".gz"))?,
            n if n.ends_with(".npz") => npz(path, input)?,
            n if n.ends_with(".npy") => {
                let x = Tensor::read_npy(path).map_err(|e| damaged(path, e))?;
                array(path, &x, None)?
            }
            _ => return Err(damaged(path, "wanted .csv, .csv.gz, .npz, .npy or a folder of classes")),
        };
        let found = match dims {
            Some(wanted) => found.shaped(wanted)?,
            None => found.square()?,
        };
        match found.values.iter().position(|v| !v.is_finite()) {
            Some(at) => Err(damaged(path, format!("sample {} has a value {}", at / found.size(), found.values[at]))),
            None if found.is_empty() => Err(damaged(path, "holds no sample")),
            None => Ok(found),
        }
    }

    fn size(&self) -> usize {
        self.dims.iter().product::<usize>().max(1)
    }

    /// How many samples there are.
    pub fn len(&self) -> usize {
        self.values.len() / self.size()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Classes, if there are labels: one more than the largest.
    pub fn classes(&self) -> Option<usize> {
        Some(self.labels.as_ref()?.iter().max().map_or(0, |&l| l as usize + 1))
    }

    fn shaped(self, wanted: &[usize]) -> Result<Self> {
        if wanted.iter().product::<usize>() != self.size() {
            let why = format!("samples of shape {:?}, the model takes {wanted:?}", self.dims);
            return Err(damaged(&self.path, why));
        }
        Ok(Self { dims: wanted.to_vec(), ..self })
    }

    /// Flat samples are taken for square pictures of one channel.
    fn square(self) -> Result<Self> {
        let side = self.size().isqrt();
        match self.dims.len() {
            1 if side * side == self.size() => Ok(Self { dims: vec![1, side, side], ..self }),
            3 => Ok(self),
            _ => Err(damaged(&self.path, format!("samples of shape {:?} are no pictures", self.dims))),
        }
    }

    /// Splits off `count` samples, drawn by `seed`: what is left, and those.
    ///
    /// # Errors
    /// There aren't more than `count`.
    pub fn split(&self, count: usize, seed: u64) -> Result<(Self, Self)> {
        if count >= self.len() {
            return Err(damaged(&self.path, format!("{} samples, {count} were to be split off", self.len())));
        }
        let mut order: Vec<usize> = (0..self.len()).collect();
        order.shuffle(&mut StdRng::seed_from_u64(seed));
        let (rest, drawn) = order.split_at(self.len() - count);
        Ok((self.of(rest), self.of(drawn)))
    }

    fn of(&self, indices: &[usize]) -> Self {
        let size = self.size();
        Self {
            path: self.path.clone(),
            dims: self.dims.clone(),
            values: indices.iter().flat_map(|&i| &self.values[i * size..(i + 1) * size]).copied().collect(),
            labels: self.labels.as_ref().map(|labels| indices.iter().map(|&i| labels[i]).collect()),
        }
    }

    /// At most `count` samples, drawn by `seed`, as a model's input of that name takes them, one by one.
    ///
    /// # Errors
    /// None that samples of one shape could have.
    pub fn drawn(&self, input: &str, count: usize, seed: u64) -> Result<Data> {
        let dims = [&[1], self.dims.as_slice()].concat();
        let sample = |i: &usize| {
            let values = self.values[i * self.size()..(i + 1) * self.size()].to_vec();
            Ok(vec![(input.to_owned(), graph::Tensor::floats(input, &dims, values)?)])
        };
        let samples = self.order(count, seed).iter().map(sample).collect::<Result<Vec<_>>>()?;
        Ok(Data::held(samples, &self.path))
    }

    /// Indices of at most `count` samples, drawn by `seed`.
    pub fn order(&self, count: usize, seed: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.len()).collect();
        order.shuffle(&mut StdRng::seed_from_u64(seed));
        order.truncate(count.max(1));
        order
    }

    /// Samples as a tensor (samples, ...), and their labels. `draw` is where randomness starts for [`Augment`].
    ///
    /// # Errors
    /// What candle refuses.
    pub fn batch(&self, indices: &[usize], augment: Augment, draw: u64) -> Result<(Tensor, Option<Tensor>)> {
        let picked = self.of(indices);
        let mut values = picked.values;
        if let (1.., &[_, h, w]) = (augment.shift, self.dims.as_slice()) {
            let mut rng = StdRng::seed_from_u64(draw);
            for sample in values.chunks_mut(self.size()) {
                let mut by = || rng.random_range(0..=2 * augment.shift) as isize - augment.shift as isize;
                shift(sample, [h, w], [by(), by()]);
            }
        }
        let dims = [&[indices.len()], self.dims.as_slice()].concat();
        let x = Tensor::from_vec(values, dims, &Device::Cpu).map_err(|e| damaged(&self.path, e))?;
        let labels = match picked.labels {
            Some(labels) => {
                Some(Tensor::from_vec(labels, indices.len(), &Device::Cpu).map_err(|e| damaged(&self.path, e))?)
            }
            None => None,
        };
        Ok((x, labels))
    }
}

/// Moves a picture's planes; what leaves is lost.
fn shift(sample: &mut [f32], [h, w]: [usize; 2], [down, right]: [isize; 2]) {
    let from = sample.to_vec();
    let pixel = |at: usize, by: isize, size: usize| at.checked_add_signed(-by).filter(|&at| at < size);
    for (plane, from) in sample.chunks_mut(h * w).zip(from.chunks(h * w)) {
        for (at, value) in plane.iter_mut().enumerate() {
            let source = pixel(at / w, down, h).zip(pixel(at % w, right, w));
            *value = source.map_or(0.0, |(y, x)| from[y * w + x]);
        }
    }
}

fn csv(path: &Path, packed: bool) -> Result<Dataset> {
    let file = std::fs::File::open(path).map_err(ModelError::io(path))?;
    let mut text = String::new();
    let read = match packed {
        true => GzDecoder::new(&file).read_to_string(&mut text),
        false => (&file).read_to_string(&mut text),
    };
    read.map_err(|e| damaged(path, e))?;
    let (mut values, mut labels, mut columns) = (Vec::new(), Vec::new(), None);
    for (row, line) in text.lines().filter(|l| !l.trim().is_empty()).enumerate() {
        let bad = |word: &str| damaged(path, format!("row {}: `{}`, a number was wanted", row + 1, word.trim()));
        let (pixels, label) = line.rsplit_once(',').ok_or_else(|| bad(line))?;
        let before = values.len();
        for word in pixels.split(',') {
            values.push(word.trim().parse::<f32>().map_err(|_| bad(word))? / 255.0);
        }
        let label: f32 = label.trim().parse().map_err(|_| bad(label))?;
        if label < 0.0 || label.fract() != 0.0 || label > 65535.0 {
            return Err(damaged(path, format!("row {}: class {label}", row + 1)));
        }
        labels.push(label as u32);
        let found = values.len() - before;
        if *columns.get_or_insert(found) != found {
            return Err(damaged(path, format!("row {}: {found} values, the first row has {columns:?}", row + 1)));
        }
    }
    Ok(Dataset { path: path.to_owned(), dims: vec![columns.unwrap_or(0)], values, labels: Some(labels) })
}

fn npz(path: &Path, input: &str) -> Result<Dataset> {
    let arrays = Tensor::read_npz(path).map_err(|e| damaged(path, e))?;
    let named = |name: &str| arrays.iter().find(|(n, _)| n == name).map(|(_, t)| t);
    let x =
        named(input).or_else(|| named("x")).ok_or_else(|| damaged(path, format!("has no array `x` or `{input}`")))?;
    array(path, x, named("y").or_else(|| named("labels")))
}

fn array(path: &Path, x: &Tensor, y: Option<&Tensor>) -> Result<Dataset> {
    let candle = |e: candle_core::Error| damaged(path, e);
    let Some((&n, dims)) = x.dims().split_first() else { return Err(damaged(path, "a number, samples were wanted")) };
    let values = x.to_dtype(DType::F32).and_then(|x| x.flatten_all()?.to_vec1::<f32>()).map_err(candle)?;
    let labels = match y {
        None => None,
        Some(y) => {
            let labels = y.to_dtype(DType::I64).and_then(|y| y.flatten_all()?.to_vec1::<i64>()).map_err(candle)?;
            let class = |&l: &i64| u32::try_from(l).ok().filter(|&l| l < 1 << 16);
            let labels: Option<Vec<u32>> = labels.iter().map(class).collect();
            let labels = labels.ok_or_else(|| damaged(path, "labels beyond 0..65536"))?;
            if labels.len() != n {
                return Err(damaged(path, format!("{} labels for {n} samples", labels.len())));
            }
            Some(labels)
        }
    };
    Ok(Dataset { path: path.to_owned(), dims: dims.to_vec(), values, labels })
}

/// A folder for each class.
fn classes(path: &Path, frame: Frame, preprocess: &Preprocess) -> Result<Dataset> {
    let entries = |folder: &Path| -> Result<Vec<PathBuf>> {
        let read = std::fs::read_dir(folder).map_err(ModelError::io(folder))?;
        let mut all = read.map(|e| Ok(e.map_err(ModelError::io(folder))?.path())).collect::<Result<Vec<_>>>()?;
        all.sort();
        Ok(all)
    };
    let (mut values, mut labels) = (Vec::new(), Vec::new());
    for (class, folder) in entries(path)?.iter().filter(|p| p.is_dir()).enumerate() {
        let pictures = entries(folder)?;
        let known = |p: &&PathBuf| p.extension().is_some_and(|e| matches!(e.to_str(), Some("png" | "jpg" | "jpeg")));
        for file in pictures.iter().filter(known) {
            let picture = picture::read(file)?;
            values.extend(picture::values(&picture::centre(&picture, frame, preprocess), frame, preprocess));
            labels.push(class as u32);
        }
    }
    if labels.is_empty() {
        return Err(damaged(path, "holds no folder of pictures (.png, .jpg) for a class"));
    }
    let dims = vec![frame.channels, frame.height, frame.width];
    Ok(Dataset { path: path.to_owned(), dims, values, labels: Some(labels) })
}
