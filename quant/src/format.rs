//! Bytes in files: what a checkpoint holds, read without copying it, and written so that a reader never sees half of it.
//!
//! Every format opens as a [`TensorSource`]: names, shapes and types in file order, bytes borrowed from a mapped file,
//! values as f32 by row ranges.

pub mod gguf;
pub mod hf_names;
mod mmap;
pub mod native;
pub mod output;
pub mod safetensors;
pub mod shards;
pub mod source;

pub use mmap::{MappedFile, free_space};
pub use output::{Done, OutputDir, OutputOptions};
pub use source::{Dtype, Stored, TensorInfo, TensorSource};

use crate::QuantError;
use crate::error::Result;
use gguf::GgufSource;
use native::NativeSource;
use safetensors::SafetensorsSource;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A format that checkpoints come in.
#[derive(Debug)]
pub struct Format {
    /// Its name: `native`, `safetensors`, `gguf`.
    pub name: &'static str,
    /// What it is, in a few words.
    pub about: &'static str,
    /// Whether a file or folder looks like it, from its first bytes.
    pub detect: fn(&Path) -> bool,
    /// Opens and validates it.
    pub open: fn(&Path) -> Result<Box<dyn TensorSource>>,
}

/// All formats, the most special first: the first that detects a path opens it.
pub static FORMATS: &[Format] = &[
    Format {
        name: "gguf",
        about: "llama.cpp's single file, version 2 or 3",
        detect: |path| starts_with(path, b"GGUF"),
        open: |path| Ok(Box::new(GgufSource::open(path)?)),
    },
    Format {
        name: "native",
        about: "nibble's own: codes and scales in safetensors",
        detect: native::detect,
        open: |path| Ok(Box::new(NativeSource::open(path)?)),
    },
    Format {
        name: "safetensors",
        about: "a Hugging Face checkpoint, in one file or in shards",
        detect: |path| safetensors::weight_paths(path).is_ok_and(|files| !files.is_empty()),
        open: |path| Ok(Box::new(SafetensorsSource::open(path)?)),
    },
];

/// The format of a file or folder.
///
/// # Errors
/// If it doesn't exist or is none of [`FORMATS`], saying what it seems to be.
pub fn detect(path: &Path) -> Result<&'static Format> {
    path.metadata().map_err(io_error(path))?;
    FORMATS.iter().find(|f| (f.detect)(path)).ok_or_else(|| damaged(path, unknown(path)))
}

/// Opens a checkpoint of any of [`FORMATS`].
///
/// # Errors
/// As for [`detect`] and the format's own opening.
pub fn open(path: &Path) -> Result<Box<dyn TensorSource>> {
    (detect(path)?.open)(path)
}

/// Files that are often taken for checkpoints, by the end of their names.
const FOREIGN: &[(&str, &str)] = &[
    (".bin", "PyTorch pickles"),
    (".pt", "a PyTorch pickle"),
    (".pth", "a PyTorch pickle"),
    (".ckpt", "a PyTorch pickle"),
    (".onnx", "an ONNX graph"),
    (".h5", "HDF5 weights"),
    (".msgpack", "Flax weights"),
    (".npz", "NumPy arrays"),
];

fn unknown(path: &Path) -> String {
    let wanted = FORMATS.iter().map(|f| f.name).collect::<Vec<_>>().join(", ");
    let foreign = |name: &str| FOREIGN.iter().find(|(ending, _)| name.ends_with(ending)).map(|f| f.1);
    if !path.is_dir() {
        let found = foreign(&path.to_string_lossy()).unwrap_or("no checkpoint");
        return format!("{found}, wanted one of {wanted}");
    }
    let names = std::fs::read_dir(path).into_iter().flatten().flatten().map(|e| e.file_name());
    let names: Vec<String> = names.map(|n| n.to_string_lossy().into_owned()).collect();
    if let Some(gguf) = names.iter().find(|n| n.ends_with(".gguf")) {
        return format!("a folder with `{gguf}`: name the file itself");
    }
    match names.iter().find_map(|n| foreign(n)) {
        Some(found) => format!("a folder with {found} but no safetensors, wanted one of {wanted}"),
        None => format!("a folder without weights, wanted one of {wanted}"),
    }
}

fn starts_with(path: &Path, magic: &[u8]) -> bool {
    let mut start = Vec::new();
    let read = File::open(path).and_then(|f| f.take(magic.len() as u64).read_to_end(&mut start));
    read.is_ok() && start == magic
}

/// Path, length and time of change (ns) of the files that hold a checkpoint's weights: what tells an edited source.
pub(crate) fn weight_stamps(path: &Path) -> Result<Vec<(String, u64, i128)>> {
    let files = match path.is_dir() {
        true => safetensors::weight_paths(path)?,
        false => vec![path.to_owned()],
    };
    let stamp = |file: &PathBuf| {
        let meta = file.metadata().map_err(io_error(file))?;
        let changed = meta.mtime() as i128 * 1_000_000_000 + meta.mtime_nsec() as i128;
        Ok((file.file_name().unwrap_or_default().to_string_lossy().into_owned(), meta.len(), changed))
    };
    files.iter().map(stamp).collect()
}

/// Names the file an operating system's refusal is about.
pub(crate) fn io_error(path: &Path) -> impl FnOnce(std::io::Error) -> QuantError + '_ {
    move |source| QuantError::Io { path: path.to_owned(), source }
}

/// A file whose bytes are not what its format asks for.
pub(crate) fn damaged(path: &Path, why: impl Into<String>) -> QuantError {
    QuantError::Damaged { path: path.to_owned(), why: why.into() }
}

/// A tensor that can't be used as it is.
pub(crate) fn tensor_error(name: &str, why: impl Into<String>) -> QuantError {
    QuantError::Tensor { name: name.to_owned(), why: why.into() }
}
