//! Why a tensor can't be quantized, read or written. Every variant names the tensor or file it is about.

use std::path::PathBuf;

/// A refusal of this crate: which tensor or file, what was found, what was wanted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuantError {
    /// The operating system refused a file operation.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file's bytes are not what its format asks for.
    #[error("{path}: {why}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found and what was wanted.
        why: String,
    },
    /// A tensor that was asked for isn't there.
    #[error("{path}: no tensor `{name}`")]
    NoTensor {
        /// The file or folder looked in.
        path: PathBuf,
        /// The name asked for.
        name: String,
    },
    /// A tensor can't be used as it is.
    #[error("tensor `{name}`: {why}")]
    Tensor {
        /// Its name.
        name: String,
        /// What was found and what was wanted.
        why: String,
    },
    /// A spec, scheme or recipe contradicts itself or can't be met.
    #[error("{what}: {why}")]
    Spec {
        /// The scheme, rule or flag.
        what: String,
        /// What was found and what was wanted.
        why: String,
    },
    /// What was made is whole, but whoever looked at it refused it.
    #[error("{path}: {why}")]
    Rejected {
        /// The output that it would have become.
        path: PathBuf,
        /// What was found and what was wanted.
        why: String,
    },
    /// Stopped at the user's wish; what was written so far can be resumed.
    #[error("stopped")]
    Stopped,
    /// A kernel refused the tensor.
    #[error(transparent)]
    Kernel(#[from] nibble_kernels::KernelError),
}

/// The result of this crate's fallible functions.
pub type Result<T, E = QuantError> = std::result::Result<T, E>;
