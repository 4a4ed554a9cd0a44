//! What is done already, in a file, so that a run that was stopped goes on.

use super::{DiagnosisPlan, LayerEffect, Sources};
use crate::error::Result;
use crate::eval::Effect;
use crate::kept::Kept;
use crate::model::open;
use nibble_quant::convert::Blocks;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// Effects by layer; written after every layer.
#[derive(Debug, Default)]
pub struct State(Kept<Found>);

#[derive(Debug, Default, Serialize, Deserialize)]
struct Found {
    sources: Option<(Sources, Effect)>,
    layers: BTreeMap<usize, Vec<LayerEffect>>,
}

impl State {
    /// What a file says is done, if it is there.
    ///
    /// # Errors
    /// A file that holds no state.
    pub fn open(path: &Path) -> Result<State> {
        Ok(State(Kept::open(path, "a diagnosis")?))
    }

    /// Starts for these models; refuses what others left.
    pub(super) fn begin(&mut self, float: &Path, quantized: &Path, plan: &DiagnosisPlan) -> Result<()> {
        let words = format!("{:?} {:?} {:?}", plan.tokens, plan.eval, plan.activations);
        let of = |path: &Path| -> Result<String> { Ok(Blocks::fingerprint_of(&*open(path)?, &words)?) };
        self.0.begin(&format!("{}-{}", of(float)?, of(quantized)?))
    }

    pub(super) fn sources(&self) -> Option<(Sources, Effect)> {
        self.0.found().sources
    }

    pub(super) fn keep_sources(&mut self, sources: Sources, floor: Effect) -> Result<()> {
        self.0.keep(|found| found.sources = Some((sources, floor)))
    }

    pub(super) fn layer(&self, layer: usize) -> Option<&[LayerEffect]> {
        self.0.found().layers.get(&layer).map(Vec::as_slice)
    }

    pub(super) fn keep_layer(&mut self, layer: usize, effects: &[LayerEffect]) -> Result<()> {
        self.0.keep(|found| drop(found.layers.insert(layer, effects.to_vec())))
    }
}
