//! Why a model can't be read, fetched or run. Every variant names the file, field or tensor it is about.

use std::path::PathBuf;

/// A refusal of this crate: which file, field or tensor, what was found, what was wanted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
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
    /// A field of a configuration is missing, or its value can't be used.
    #[error("{path}: `{field}`: {why}")]
    Field {
        /// The configuration file.
        path: PathBuf,
        /// The field, with dots between nested names.
        field: String,
        /// What was found and what was wanted.
        why: String,
    },
    /// The model's type names no family of [`FAMILIES`](crate::family::FAMILIES).
    #[error("{path}: `model_type` is `{found}`; known: {known}")]
    UnknownFamily {
        /// The configuration file.
        path: PathBuf,
        /// The type found.
        found: String,
        /// Every type that is known, separated by commas.
        known: String,
    },
    /// A context or a batch that can't be.
    #[error("{why}")]
    Context {
        /// What was asked for and what there is.
        why: String,
    },
    /// A sequence outgrew its context.
    #[error("{wanted} tokens in a context planned for {capacity}")]
    ContextFull {
        /// Tokens that the sequence would have.
        wanted: usize,
        /// Tokens that fit.
        capacity: usize,
    },
    /// A text can't be scored.
    #[error("evaluation: {why}")]
    Eval {
        /// What was found and what was wanted.
        why: String,
    },
    /// A chat template isn't valid, or refuses the conversation.
    #[error("{path}: chat template: {why}")]
    Template {
        /// The file that it comes from.
        path: PathBuf,
        /// What the template says or does, and in which line.
        why: String,
    },
    /// The hub can't be reached, refuses, or sends something else than it promised.
    #[error("{what}: {why}")]
    Hub {
        /// The repository, or the file in it.
        what: String,
        /// What happened and what helps.
        why: String,
    },
    /// A graph, or a value fed to it, can't be run.
    #[error("{what}: {why}")]
    Graph {
        /// The node or tensor.
        what: String,
        /// What was found and what was wanted.
        why: String,
    },
    /// A setting is out of its range.
    #[error("{what}: {why}")]
    Setting {
        /// The setting or flag.
        what: String,
        /// What was found and what was wanted.
        why: String,
    },
    /// A model's logits can't be chosen from.
    #[error("logits: {why}")]
    Logits {
        /// What was found and what was wanted.
        why: String,
    },
    /// A model can't be differentiated.
    #[error("gradients: {why}")]
    Gradient {
        /// What candle said.
        why: String,
    },
    /// Reading, checking or writing quantized tensors failed.
    #[error(transparent)]
    Quant(#[from] nibble_quant::QuantError),
    /// A kernel refused its operands.
    #[error(transparent)]
    Kernel(#[from] nibble_kernels::KernelError),
}

impl From<candle_core::Error> for ModelError {
    fn from(error: candle_core::Error) -> Self {
        ModelError::Gradient { why: error.to_string() }
    }
}

impl ModelError {
    /// An [`ModelError::Io`] about `path`, for `map_err`.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

/// The result of this crate's fallible functions.
pub type Result<T, E = ModelError> = std::result::Result<T, E>;
