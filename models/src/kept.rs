//! What a long piece of work has found so far, in a file, so that a run that was stopped goes on.

use crate::{ModelError, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::path::{Path, PathBuf};

/// What was found, and the file that it is kept in, if there is one.
#[derive(Debug, Default)]
pub(crate) struct Kept<T> {
    path: Option<PathBuf>,
    stored: Stored<T>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Stored<T> {
    /// What the work is about: models, samples, settings.
    fingerprint: String,
    found: T,
}

impl<T: Default + Serialize + DeserializeOwned> Kept<T> {
    /// What a file says was found, if it is there; `what` is a word for the work.
    ///
    /// # Errors
    /// A file that holds nothing of the kind.
    pub(crate) fn open(path: &Path, what: &str) -> Result<Self> {
        let stored = match std::fs::read(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Stored::default(),
            Err(e) => return Err(ModelError::io(path)(e)),
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| ModelError::Damaged {
                path: path.to_owned(),
                why: format!("holds no state of {what}: {e}"),
            })?,
        };
        Ok(Kept { path: Some(path.to_owned()), stored })
    }

    /// Starts for work that goes by this name.
    ///
    /// # Errors
    /// The file is of other work.
    pub(crate) fn begin(&mut self, fingerprint: &str) -> Result<()> {
        if let (Some(path), false) = (&self.path, self.stored.fingerprint.is_empty())
            && self.stored.fingerprint != fingerprint
        {
            let why = "is the state of another model, or of other settings; remove it, or name another one";
            return Err(ModelError::Damaged { path: path.clone(), why: why.into() });
        }
        self.stored.fingerprint = fingerprint.to_owned();
        Ok(())
    }

    /// What was found.
    pub(crate) fn found(&self) -> &T {
        &self.stored.found
    }

    /// Changes what was found, and writes it, whole or not at all.
    ///
    /// # Errors
    /// The file can't be written.
    pub(crate) fn keep(&mut self, change: impl FnOnce(&mut T)) -> Result<()> {
        change(&mut self.stored.found);
        let Some(path) = &self.path else { return Ok(()) };
        let temp = path.with_extension("part");
        let write = || -> std::io::Result<()> {
            let mut file = std::fs::File::create(&temp)?;
            file.write_all(&serde_json::to_vec(&self.stored)?)?;
            file.sync_all()?;
            std::fs::rename(&temp, path)
        };
        write().map_err(ModelError::io(path))
    }
}
