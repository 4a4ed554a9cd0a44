//! Bytes in files: what a checkpoint holds, read without copying it, and written so that a reader never sees half of it.
//!
//! Every format opens as a [`TensorSource`]: names, shapes and types in file order, bytes borrowed from a mapped file,
//! values as f32 by row ranges.

pub mod gguf;
mod mmap;
pub mod safetensors;
pub mod source;

pub use mmap::MappedFile;
pub use source::{Dtype, Stored, TensorInfo, TensorSource};

use crate::QuantError;
use std::path::Path;

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
