//! What is done already, in a file, so that a run that was stopped goes on.

use super::{DiagnosisPlan, LayerEffect, Sources};
use crate::error::{ModelError, Result};
use crate::eval::Effect;
use crate::model::open;
use nibble_quant::convert::Blocks;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Effects by layer.
#[derive(Debug, Default)]
pub struct State {
    path: Option<PathBuf>,
    kept: Kept,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Kept {
    /// What models, text and settings are.
    fingerprint: String,
    sources: Option<(Sources, Effect)>,
    layers: BTreeMap<usize, Vec<LayerEffect>>,
}

impl State {
    /// What a file says is done, if it is there; it is written after every layer.
    ///
    /// # Errors
    /// A file that holds no state.
    pub fn open(path: &Path) -> Result<State> {
        let mut state = State { path: Some(path.to_owned()), ..State::default() };
        match std::fs::read(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(ModelError::io(path)(e)),
            Ok(bytes) => {
                let why = |e: serde_json::Error| format!("holds no state of a diagnosis: {e}");
                let damaged = |e| ModelError::Damaged { path: path.to_owned(), why: why(e) };
                state.kept = serde_json::from_slice(&bytes).map_err(damaged)?;
            }
        }
        Ok(state)
    }

    /// Starts for these models; refuses what others left.
    pub(super) fn begin(&mut self, float: &Path, quantized: &Path, plan: &DiagnosisPlan) -> Result<()> {
        let words = format!("{:?} {:?} {:?}", plan.tokens, plan.eval, plan.activations);
        let of = |path: &Path| -> Result<String> { Ok(Blocks::fingerprint_of(&*open(path)?, &words)?) };
        let fingerprint = format!("{}-{}", of(float)?, of(quantized)?);
        if let Some(path) = &self.path
            && !self.kept.fingerprint.is_empty()
            && self.kept.fingerprint != fingerprint
        {
            let why = "is the state of other models, or of other settings; remove it, or name another one";
            return Err(ModelError::Damaged { path: path.clone(), why: why.into() });
        }
        self.kept.fingerprint = fingerprint;
        Ok(())
    }

    pub(super) fn sources(&self) -> Option<(Sources, Effect)> {
        self.kept.sources
    }

    pub(super) fn keep_sources(&mut self, sources: Sources, floor: Effect) -> Result<()> {
        self.kept.sources = Some((sources, floor));
        self.save()
    }

    pub(super) fn layer(&self, layer: usize) -> Option<&[LayerEffect]> {
        self.kept.layers.get(&layer).map(Vec::as_slice)
    }

    pub(super) fn keep_layer(&mut self, layer: usize, found: &[LayerEffect]) -> Result<()> {
        self.kept.layers.insert(layer, found.to_vec());
        self.save()
    }

    fn save(&self) -> Result<()> {
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
