//! Why a quantized language model isn't as good as the one it was made from.
//!
//! ```text
//! sources       weights alone, int8 activations alone, both
//! layers        one linear layer quantized and the rest in floats; one in floats and the rest quantized
//! weights       float and quantized values side by side; activations the same, as integer kernels round them
//! ```
//! For layers the residual streams of both models go through them block by block: a layer is swapped between the models, and
//! only what comes after its block's beginning runs again.

mod numbers;
mod state;

pub use numbers::TensorFigures;
pub use state::State;

use crate::backend::KvKind;
use crate::calibrate::SITES;
use crate::cpu::CpuBackend;
use crate::decoder::{Context, ContextPlan, Decoder, PARTS, Site, Tap};
use crate::error::Result;
use crate::eval::{Effect, EvalPlan, LOGIT_ROWS, Predictions};
use crate::model::Model;
use nibble_kernels::{ActKind, Pool};
use nibble_quant::QuantError;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;

/// What predictions are compared on, and how models run.
#[derive(Debug, Clone)]
pub struct DiagnosisPlan<'a> {
    /// The text.
    pub tokens: &'a [u32],
    /// How it is cut up.
    pub eval: EvalPlan,
    /// How activations meet weights where they aren't what is looked at.
    pub activations: ActKind,
    /// Threads that models run on.
    pub pool: Arc<Pool>,
}

/// The divergence of predictions from the float model's, by where it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sources {
    /// Weights as they are quantized, activations in floats.
    pub weights: Effect,
    /// Activations in int8, weights in floats.
    pub activations: Effect,
    /// Both.
    pub both: Effect,
}

/// What a linear layer costs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerEffect {
    /// Its weight.
    pub name: String,
    /// It alone quantized.
    pub only: Effect,
    /// All but it quantized.
    pub without: Effect,
}

/// All that is found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// Predictions that were compared.
    pub predictions: usize,
    /// Weights, activations, both.
    pub sources: Sources,
    /// The float model run as layers are, against itself in single precision: what figures of layers can't go below.
    pub floor: Effect,
    /// One a linear layer, in the model's order.
    pub layers: Vec<LayerEffect>,
    /// One a quantized weight.
    pub weights: Vec<TensorFigures>,
    /// One an input of linear layers, in int8.
    pub activations: Vec<TensorFigures>,
}

/// Steps that [`diagnose`] tells of, for a model of so many layers.
pub fn steps(layers: usize) -> usize {
    5 + layers * (2 * PARTS.len() + 1)
}

/// Diagnoses the checkpoint at `quantized`, made from the one at `float`. `state` keeps what is done; `progress` is called
/// after each step with how many are done and answers whether to go on.
///
/// # Errors
/// A model can't be read or run, they aren't of one shape, the text is shorter than a chunk, or the state can't be
/// written.
pub fn diagnose(
    float: &Path,
    quantized: &Path,
    plan: &DiagnosisPlan,
    state: &mut State,
    progress: &mut dyn FnMut(usize) -> bool,
) -> Result<Diagnosis> {
    let load = |path: &Path, act: ActKind| Model::load_on(path, Arc::clone(&plan.pool), act);
    let mut steps = |count: usize| match progress(count) {
        true => Ok(()),
        false => Err(QuantError::Stopped),
    };
    let exact = load(float, ActKind::F32)?;
    let predictions = Predictions::of(exact.decoder(), plan.tokens, plan.eval)?;
    drop(exact);
    steps(1)?;
    state.begin(float, quantized, plan)?;
    let (sources, floor) = match state.sources() {
        Some(known) => {
            steps(3)?;
            known
        }
        None => {
            let weights = predictions.effect_of(load(quantized, ActKind::F32)?.decoder())?;
            steps(1)?;
            let rounding = CpuBackend::with_rounded_activations(Arc::clone(&plan.pool));
            let activations = predictions.effect_of(Model::load_with(float, rounding)?.decoder())?;
            steps(1)?;
            let both = predictions.effect_of(load(quantized, ActKind::I8)?.decoder())?;
            steps(1)?;
            let floor = predictions.effect_of(load(float, plan.activations)?.decoder())?;
            state.keep_sources(Sources { weights, activations, both }, floor)?;
            state.sources().unwrap_or((Sources { weights, activations, both }, floor))
        }
    };
    steps(1)?;
    let models = [load(float, plan.activations)?, load(quantized, plan.activations)?];
    let mut walk = Walk::new(models.map(Model::into_decoder), &predictions, plan)?;
    let layers = walk.run(state, &mut steps)?;
    let activations = std::mem::take(&mut walk.activations);
    drop(walk);
    let weights = numbers::weights(float, quantized)?;
    Ok(Diagnosis { predictions: predictions.count(), sources, floor, layers, weights, activations })
}

/// A float and a quantized model on their way through the layers, with the residual streams of every chunk.
struct Walk<'a> {
    /// Float, quantized.
    models: [Decoder<CpuBackend>; 2],
    contexts: [Context<CpuBackend>; 2],
    /// (chunks) of (tokens, hidden)
    streams: [Vec<Vec<f32>>; 2],
    predictions: &'a Predictions,
    pool: &'a Pool,
    activations: Vec<TensorFigures>,
}

impl<'a> Walk<'a> {
    fn new(
        models: [Decoder<CpuBackend>; 2],
        predictions: &'a Predictions,
        plan: &'a DiagnosisPlan,
    ) -> Result<Walk<'a>> {
        let n_ctx = plan.eval.n_ctx;
        let context = ContextPlan {
            capacity: n_ctx,
            chunk: n_ctx,
            logit_rows: LOGIT_ROWS,
            kv: KvKind::F16,
            ..ContextPlan::default()
        };
        let mut contexts = [models[0].context(context)?, models[1].context(context)?];
        let mut streams = [Vec::new(), Vec::new()];
        for ((model, cx), streams) in models.iter().zip(&mut contexts).zip(&mut streams) {
            for chunk in predictions.chunks() {
                streams.push(model.embedded(cx, chunk)?);
            }
        }
        Ok(Walk { models, contexts, streams, predictions, pool: &plan.pool, activations: Vec::new() })
    }

    fn run(
        &mut self,
        state: &mut State,
        steps: &mut impl FnMut(usize) -> std::result::Result<(), QuantError>,
    ) -> Result<Vec<LayerEffect>> {
        let count = self.models[0].config().layers.len();
        let mut all = Vec::with_capacity(count * PARTS.len());
        for layer in 0..count {
            match state.layer(layer) {
                Some(known) => {
                    all.extend(known.iter().cloned());
                    steps(2 * PARTS.len())?;
                }
                None => {
                    let mut found = Vec::with_capacity(PARTS.len());
                    for (part, word) in PARTS.iter().enumerate() {
                        self.exchange(layer, part)?;
                        let only = self.effect(0, layer, count);
                        steps(1)?;
                        let without = self.effect(1, layer, count);
                        // Whatever went wrong, both models are themselves again.
                        self.exchange(layer, part)?;
                        steps(1)?;
                        let name = format!("model.layers.{layer}.{word}.weight");
                        found.push(LayerEffect { name, only: only?, without: without? });
                    }
                    state.keep_layer(layer, &found)?;
                    all.extend(found);
                }
            }
            self.advance(layer)?;
            steps(1)?;
        }
        Ok(all)
    }

    fn exchange(&mut self, layer: usize, part: usize) -> Result<()> {
        let [float, quantized] = &mut self.models;
        float.exchange(quantized, layer, part)
    }

    /// How a model's predictions diverge, run from a layer on.
    fn effect(&mut self, which: usize, layer: usize, count: usize) -> Result<Effect> {
        let (model, cx) = (&self.models[which], &mut self.contexts[which]);
        let mut all = Vec::with_capacity(self.streams[which].len());
        for (at, stream) in self.streams[which].iter().enumerate() {
            let out = model.through(cx, stream, layer..count, None)?;
            let logits = model.logits_after(cx, &out, &self.predictions.rows(at))?;
            all.push(self.predictions.effect_of_chunk(at, &logits));
        }
        Ok(Effect::mean(&all))
    }

    /// Sends both streams through a layer; what the float model's linear layers read there is looked at.
    fn advance(&mut self, layer: usize) -> Result<()> {
        let mut seen = Seen::default();
        for which in 0..2 {
            let (model, cx) = (&self.models[which], &mut self.contexts[which]);
            for stream in &mut self.streams[which] {
                let tap = (which == 0).then_some(&mut seen as &mut dyn Tap);
                *stream = model.through(cx, stream, layer..layer + 1, tap)?;
            }
        }
        for (site, names) in SITES {
            if let Some((_, width, values)) = seen.sites.iter().find(|(known, _, _)| *known == site) {
                let name = format!("model.layers.{layer}, input of {}", names.join(", "));
                self.activations.push(numbers::activations(self.pool, name, values, *width)?);
            }
        }
        Ok(())
    }
}

/// What linear layers read.
#[derive(Default)]
struct Seen {
    sites: Vec<(Site, usize, Vec<f32>)>,
}

impl Tap for Seen {
    fn linear_input(&mut self, _: usize, site: Site, values: &[f32], width: usize) {
        match self.sites.iter_mut().find(|(known, _, _)| *known == site) {
            Some((_, _, all)) => all.extend_from_slice(values),
            None => self.sites.push((site, width, values.to_vec())),
        }
    }
}

#[cfg(test)]
mod tests;
