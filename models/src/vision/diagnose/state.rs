//! What is done already, in a file, so that a run that was stopped goes on.

use super::Tally;
use crate::{ModelError, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Tallies by sample. A sample goes by what is in it, so that it doesn't matter which file it came from.
#[derive(Debug)]
pub struct State {
    path: Option<PathBuf>,
    kept: Kept,
}

#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    /// What the models are.
    fingerprint: String,
    samples: BTreeMap<String, Vec<Tally>>,
}

/// A short name for bytes.
pub(super) fn digest(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    parts.iter().for_each(|part| hash.update(part));
    hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

impl State {
    /// Nothing done, and nothing written.
    pub fn none() -> State {
        State { path: None, kept: Kept { fingerprint: String::new(), samples: BTreeMap::new() } }
    }

    /// What a file says is done, if it is there.
    ///
    /// # Errors
    /// A file that holds no state.
    pub fn open(path: &Path) -> Result<State> {
        let mut state = State { path: Some(path.to_owned()), ..State::none() };
        match std::fs::read(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(ModelError::io(path)(e)),
            Ok(bytes) => {
                let damaged = |e: serde_json::Error| ModelError::Damaged {
                    path: path.to_owned(),
                    why: format!("holds no state of a diagnosis: {e}"),
                };
                state.kept = serde_json::from_slice(&bytes).map_err(damaged)?;
            }
        }
        Ok(state)
    }

    /// Starts for models that go by this name; refuses what another one left.
    pub(super) fn begin(&mut self, fingerprint: &str) -> Result<()> {
        if let (Some(path), false) = (&self.path, self.kept.fingerprint.is_empty())
            && self.kept.fingerprint != fingerprint
        {
            let why = "is the state of another model, or of other settings; remove it, or name another one";
            return Err(ModelError::Damaged { path: path.clone(), why: why.into() });
        }
        self.kept.fingerprint = fingerprint.to_owned();
        Ok(())
    }

    /// What is known of a sample, if it is of so many numbers.
    pub(super) fn get(&self, sample: &str, cases: usize) -> Option<&Vec<Tally>> {
        self.kept.samples.get(sample).filter(|tallies| tallies.len() == cases)
    }

    /// Keeps what was found of samples, in the file if there is one.
    pub(super) fn keep(&mut self, found: Vec<(String, Vec<Tally>)>) -> Result<()> {
        self.kept.samples.extend(found);
        let Some(path) = &self.path else { return Ok(()) };
        let temp = path.with_extension("part");
        let write = || -> std::io::Result<()> {
            let mut file = std::fs::File::create(&temp)?;
            file.write_all(&serde_json::to_vec(&self.kept)?)?;
            file.sync_all()?;
            std::fs::rename(&temp, path)
        };
        write().map_err(ModelError::io(path))
    }
}
