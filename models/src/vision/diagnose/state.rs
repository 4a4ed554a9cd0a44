//! What is done already, in a file, so that a run that was stopped goes on.

use super::Tally;
use crate::Result;
use crate::kept::Kept;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::Path;

/// Tallies by sample. A sample goes by what is in it, so that it doesn't matter which file it came from.
#[derive(Debug, Default)]
pub struct State(Kept<BTreeMap<String, Vec<Tally>>>);

/// A short name for bytes.
pub(super) fn digest(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    parts.iter().for_each(|part| hash.update(part));
    hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

impl State {
    /// Nothing done, and nothing written.
    pub fn none() -> State {
        State::default()
    }

    /// What a file says is done, if it is there.
    ///
    /// # Errors
    /// A file that holds no state.
    pub fn open(path: &Path) -> Result<State> {
        Ok(State(Kept::open(path, "a diagnosis")?))
    }

    /// Starts for models that go by this name; refuses what another one left.
    pub(super) fn begin(&mut self, fingerprint: &str) -> Result<()> {
        self.0.begin(fingerprint)
    }

    /// What is known of a sample, if it is of so many numbers.
    pub(super) fn get(&self, sample: &str, cases: usize) -> Option<&Vec<Tally>> {
        self.0.found().get(sample).filter(|tallies| tallies.len() == cases)
    }

    /// Keeps what was found of samples, in the file if there is one.
    pub(super) fn keep(&mut self, found: Vec<(String, Vec<Tally>)>) -> Result<()> {
        self.0.keep(|kept| kept.extend(found))
    }
}
