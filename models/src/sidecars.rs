//! The small files beside a checkpoint's weights, wherever they come from: a folder holds them as files, a GGUF file as
//! metadata from which the same files follow.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{ModelError, Result};

/// Configuration, tokenizer and chat template of one checkpoint, by their names in a Hugging Face folder.
#[derive(Debug, Clone, PartialEq)]
pub struct Sidecars {
    path: PathBuf,
    /// Contents, where they aren't files.
    held: Option<BTreeMap<String, Vec<u8>>>,
}

impl Sidecars {
    /// Those of a folder; which of them are there shows when they are read.
    pub fn folder(path: impl AsRef<Path>) -> Self {
        Self { path: path.as_ref().to_path_buf(), held: None }
    }

    /// Those that aren't files: `held` are their contents by name, `path` is what they were made from.
    pub fn held(path: &Path, held: BTreeMap<String, Vec<u8>>) -> Self {
        Self { path: path.to_path_buf(), held: Some(held) }
    }

    /// What is held in memory, with relative paths: files that are still to be written.
    pub fn into_files(self) -> Vec<(PathBuf, Vec<u8>)> {
        self.held.into_iter().flatten().map(|(name, bytes)| (PathBuf::from(name), bytes)).collect()
    }

    /// What errors call a file.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// A file's bytes; `None` where there is no such file.
    ///
    /// # Errors
    /// It can't be read.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        if let Some(held) = &self.held {
            return Ok(held.get(name).cloned());
        }
        match std::fs::read(self.file(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(ModelError::Io { path: self.file(name), source }),
        }
    }

    /// The bytes of a file that has to be there.
    ///
    /// # Errors
    /// It is missing or can't be read.
    pub fn need(&self, name: &str) -> Result<Vec<u8>> {
        let missing = || ModelError::Io { path: self.file(name), source: std::io::ErrorKind::NotFound.into() };
        self.read(name)?.ok_or_else(missing)
    }

    /// A file as JSON; `None` where there is no such file.
    ///
    /// # Errors
    /// It can't be read or isn't JSON.
    pub fn json(&self, name: &str) -> Result<Option<Value>> {
        let Some(bytes) = self.read(name)? else { return Ok(None) };
        let damaged = |e| ModelError::Damaged { path: self.file(name), why: format!("not JSON: {e}") };
        serde_json::from_slice(&bytes).map(Some).map_err(damaged)
    }
}
