//! Mixed precision: layers that cost the most in integers get two terms, or stay float, until the whole is good enough. Where not even
//! integers of 8 bits fit, layers start from weights of 4 bits.
//!
//! ```text
//! effects  each layer alone in integers, with one term and with two: the error that it adds   (proxy)
//! path     upgrades by error spared for what they cost, best first
//! search   the fewest upgrades with which the *measured* model reaches the goal, or the most that fit a size or a time
//! trim     upgrades that turn out not to be needed are taken back, each by measuring again
//! ```
//! Errors of layers add up only roughly, so that they order what is tried, and never decide.

mod path;

pub use path::Precision;
use path::{Upgrade, path};

use super::data::Data;
use super::diagnose::{Layer, Tally, effects, layers};
use super::evaluate::{OutputReport, evaluate};
use super::prepare::Prepared;
use crate::graph::Rten;
use crate::{ModelError, Result};
use nibble_quant::Range;
use nibble_quant::onnx::plan::{Kind, Stored, Target};
use nibble_quant::onnx::tensor::floats;
use nibble_quant::onnx::weights::{self, Layout};
use nibble_quant::onnx::{Fine, Graph, Mode, Model, Selector, Settings};
use prost::Message;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicBool;

/// What is wanted of the model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// SQNR of the first output, in dB, at least.
    Sqnr(f64),
    /// Share of samples that agree with the float model, at least: on the largest class, or where the output isn't classes,
    /// on the nearest neighbour.
    Agreement(f64),
    /// Share of samples with the right class, at least.
    Accuracy(f64),
    /// As good as it gets in so many bytes.
    Bytes(u64),
    /// As good as it gets in this share of the float model's time, measured.
    Time(f64),
}

impl Goal {
    /// Whether as many upgrades are wanted as fit, and not as few as do.
    fn is_budget(self) -> bool {
        matches!(self, Goal::Bytes(_) | Goal::Time(_))
    }
}

/// Upgrades that are tried without, at the end.
const TRIMS: usize = 6;

/// A layer's choices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerChoice {
    /// The layer.
    #[serde(flatten)]
    pub layer: Layer,
    /// What was chosen.
    pub precision: Precision,
    /// Share of the outputs' power that is error with this layer alone in a precision, for those that it can have.
    pub error: BTreeMap<Precision, f64>,
    /// Products of a sample, in multiplications.
    pub multiplications: f64,
}

impl LayerChoice {
    /// Values of its weight.
    fn weights(&self) -> f64 {
        if self.layer.weight.is_some() { self.layer.shape.iter().product::<usize>() as f64 } else { 0.0 }
    }
}

/// A model that was made and measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attempt {
    /// Upgrades in it.
    pub upgrades: usize,
    /// SQNR of the first output, in dB.
    pub sqnr_db: Option<f64>,
    /// Share of samples that agree.
    pub agreement: Option<f64>,
    /// Share of samples with the right class.
    pub accuracy: Option<f64>,
    /// Bytes of the model.
    pub bytes: u64,
    /// Estimated time of its layers, of that in floats.
    pub time: f64,
    /// Measured time of the model, of the float model's, where there is a goal for it.
    pub measured: Option<f64>,
    /// Whether it does what is wanted.
    pub good: bool,
}

/// What was chosen.
#[derive(Debug)]
pub struct Mixed {
    /// What the model is made of: its plan has the layers that stay float and those in two terms.
    pub prepared: Prepared,
    /// The quantized model.
    pub model: Model,
    /// One a layer, in the graph's order.
    pub layers: Vec<LayerChoice>,
    /// Every model that was measured, in that order.
    pub attempts: Vec<Attempt>,
    /// The one that was chosen.
    pub chosen: Attempt,
}

/// Time of a quantized model as a share of the float one's.
pub type Timer<'a> = dyn Fn(&Model) -> Result<f64> + 'a;

/// Samples to judge by, and what is known of them.
pub struct Judge<'a> {
    /// The samples.
    pub data: &'a Data,
    /// Their classes, in their order.
    pub labels: Option<&'a [usize]>,
    /// Threads of the engine.
    pub threads: usize,
    /// Time of a quantized model as a share of the float one's: models run in turns, so that what else the machine does
    /// meets both. Without it there can't be a goal for time.
    pub timer: Option<&'a Timer<'a>>,
    /// Set when the user wants to stop.
    pub stop: &'a AtomicBool,
}

/// Finds the precision of each layer. `effects_of` are the samples that layers' errors are estimated on, and `progress` is
/// told what is being done and that one more sample of it is.
///
/// # Errors
/// As [`evaluate`], and a goal that no model reaches, or a size or time that even all layers in integers pass.
pub fn allocate(
    prepared: &Prepared,
    goal: Goal,
    effects_of: &Data,
    judge: &Judge,
    progress: &(dyn Fn(&str) + Sync),
) -> Result<Mixed> {
    let graph = Graph::new(prepared.model.graph())?;
    let layers = layers(&graph, &prepared.plan);
    let packed = match goal {
        // Other runtimes have no products of packed weights.
        Goal::Bytes(most) if prepared.plan.settings.target == Target::OnnxRuntime => {
            prepared.quantize()?.proto.encoded_len() as u64 > most
        }
        _ => false,
    };
    let choices = choices(prepared, &graph, layers, packed, effects_of, judge, progress)?;
    let path = path(&choices, goal);
    let mut search =
        Search { prepared, goal, judge, progress, choices, attempts: Vec::new(), known: BTreeMap::new(), float: None };
    let all: Vec<usize> = (0..path.len()).collect();
    let (mut fewest, mut most) = (0, path.len());
    let budget = goal.is_budget();
    while fewest < most {
        let middle = if budget { (fewest + most).div_ceil(2) } else { (fewest + most) / 2 };
        let good = search.measure(&path, &all[..middle])?.good;
        match (budget, good) {
            (false, true) => most = middle,
            (false, false) => fewest = middle + 1,
            (true, true) => fewest = middle,
            (true, false) => most = middle - 1,
        }
    }
    let mut kept: Vec<usize> = all[..fewest].to_vec();
    if !search.measure(&path, &kept)?.good {
        let reached = search.measure(&path, &kept)?;
        let why = match goal {
            Goal::Bytes(_) if packed => format!("{} bytes with all linear layers' weights in 4 bits", reached.bytes),
            Goal::Bytes(_) => format!("{} bytes with all layers in integers", reached.bytes),
            Goal::Time(_) => {
                format!("{:.3} of the float model's time with all layers in integers", reached.measured.unwrap_or(1.0))
            }
            _ => format!("not reached with all layers in float: {reached:?}"),
        };
        return Err(ModelError::Setting { what: "the goal".into(), why });
    }
    if !budget {
        // The last ones are those that spare least for their time.
        for index in all[..fewest].iter().rev().skip(1).take(TRIMS) {
            let fewer: Vec<usize> = kept.iter().copied().filter(|i| i != index).collect();
            if search.measure(&path, &fewer)?.good {
                kept = fewer;
            }
        }
    }
    search.finish(&path, kept)
}

/// What each layer's error is with one term and with two (and, if layers start so, with packed weights), and how many multiplications it
/// takes.
fn choices(
    prepared: &Prepared,
    graph: &Graph,
    layers: Vec<Layer>,
    packed: bool,
    data: &Data,
    judge: &Judge,
    progress: &(dyn Fn(&str) + Sync),
) -> Result<Vec<LayerChoice>> {
    let base = &prepared.plan.settings;
    let mut cases = Vec::new();
    for layer in &layers {
        let own = |fine: bool| Settings {
            fine: selector(&layer.node).filter(|_| fine).map(Fine::Named).into_iter().collect(),
            ..base.clone()
        };
        // A layer in two terms by the plan has ranges for those.
        if !layer.fine {
            cases.push((layer.id, Precision::Int8, own(false)));
        }
        if two_terms(prepared, graph, layer) {
            cases.push((layer.id, Precision::TwoTerms, own(true)));
        }
        // A layer of less than a group has little to gain, and one of a part of a group more can't be run here.
        let linear = prepared.plan.kind(layer.id).is_some_and(|kind| Stored::Int4.possible(*kind));
        let node = graph.node(layer.id);
        let shape = graph.constant(node.arg(1)).filter(|_| linear).map(|w| weights::shape(w, Layout::of(node)));
        let whole = shape.is_some_and(|[_, k]| k > 0 && k % Stored::GROUP == 0);
        if let Some(selector) = selector(&layer.node).filter(|_| packed && whole) {
            let stored = [vec![(selector, Stored::Int4)], base.stored.clone()].concat();
            cases.push((layer.id, Precision::Int4, Settings { stored, ..base.clone() }));
        }
    }
    let asked: Vec<(usize, Settings)> = cases.iter().map(|(id, _, settings)| (*id, settings.clone())).collect();
    let (tallies, dims) = effects(prepared, &asked, data, judge.threads, judge.stop, &|| progress("layers"))?;
    let mut errors: BTreeMap<usize, BTreeMap<Precision, f64>> = BTreeMap::new();
    for ((id, precision, _), Tally { signal, noise, .. }) in cases.iter().zip(&tallies) {
        errors.entry(*id).or_default().insert(*precision, noise / signal.max(f64::MIN_POSITIVE));
    }
    let choice = |layer: Layer| {
        let made = dims.get(&layer.makes).map(Vec::as_slice).unwrap_or_default();
        // Each place of a picture, or each token, meets the whole weight.
        let places: usize = match layer.op.as_str() {
            "Conv" => made.iter().skip(2).product(),
            _ => made.iter().rev().skip(1).product(),
        };
        let multiplications = places as f64 * layer.shape.iter().product::<usize>() as f64;
        let mut error = errors.remove(&layer.id).unwrap_or_default();
        error.insert(Precision::Float, 0.0);
        if fits_half(graph, &layer)? {
            error.insert(Precision::Half, path::HALF_ERROR);
        }
        let precision = match layer.fine {
            _ if error.contains_key(&Precision::Int4) => Precision::Int4,
            true => Precision::TwoTerms,
            false => Precision::Int8,
        };
        Ok(LayerChoice { layer, precision, error, multiplications })
    };
    layers.into_iter().map(choice).collect()
}

/// Whether half precision holds a layer's weight.
fn fits_half(graph: &Graph, layer: &Layer) -> Result<bool> {
    let Some(weight) = layer.weight.as_deref().and_then(|name| graph.constant(name)) else { return Ok(false) };
    Ok(floats(weight)?.iter().all(|v| half::f16::from_f32(*v).is_finite()))
}

/// Whether a layer can have activations in two terms: as [`Fine`] has it.
fn two_terms(prepared: &Prepared, graph: &Graph, layer: &Layer) -> bool {
    let settings = &prepared.plan.settings;
    let product = graph.node(layer.id).is("MatMul")
        && matches!(prepared.plan.kind(layer.id), Some(Kind::Linear { .. }))
        && layer.reads.iter().all(|name| prepared.calibration.ranks.get(name).is_some_and(|&rank| rank > 2));
    let possible = settings.mode == Mode::Static && settings.target == Target::OnnxRuntime;
    layer.fine || product && possible && settings.activation.int.bits() == 8
}

fn selector(node: &str) -> Option<Selector> {
    format!("name:{node}").parse().ok()
}

struct Search<'a> {
    prepared: &'a Prepared,
    goal: Goal,
    judge: &'a Judge<'a>,
    progress: &'a (dyn Fn(&str) + Sync),
    choices: Vec<LayerChoice>,
    attempts: Vec<Attempt>,
    known: BTreeMap<Vec<Precision>, Attempt>,
    float: Option<Rten>,
}

impl Search<'_> {
    /// The precision of each layer with these upgrades.
    fn precisions(&self, path: &[Upgrade], kept: &[usize]) -> Vec<Precision> {
        let mut precisions: Vec<Precision> = self.choices.iter().map(|c| c.precision).collect();
        for upgrade in kept.iter().filter_map(|&i| path.get(i)) {
            precisions[upgrade.layer] = precisions[upgrade.layer].max(upgrade.to);
        }
        precisions
    }

    /// The model with these precisions.
    fn make(&self, precisions: &[Precision]) -> Result<(Prepared, Model)> {
        let named = |wanted: Precision| {
            let chosen = self.choices.iter().zip(precisions).filter(move |(_, p)| **p == wanted);
            chosen.filter_map(|(c, _)| selector(&c.layer.node)).collect::<Vec<_>>()
        };
        let stored = |precision, stored| named(precision).into_iter().map(|s| (s, stored)).collect::<Vec<_>>();
        let base = &self.prepared.plan.settings;
        let settings = Settings {
            exclude: [base.exclude.clone(), named(Precision::Float)].concat(),
            stored: [base.stored.clone(), stored(Precision::Half, Stored::Half), stored(Precision::Int4, Stored::Int4)]
                .concat(),
            fine: named(Precision::TwoTerms).into_iter().map(Fine::Named).collect(),
            ..base.clone()
        };
        let graph = Graph::new(self.prepared.model.graph())?;
        let before = self.prepared.plan.fine_tensors(&graph);
        let mut roomy = self.prepared.clone();
        roomy.plan = nibble_quant::onnx::plan(&roomy.model, &settings, &roomy.folded)?;
        let after: BTreeSet<String> = roomy.plan.fine_tensors(&graph);
        for name in after.difference(&before) {
            if let Some(range) = roomy.calibration.ranges.get_mut(name) {
                *range = Range { lo: roomy.room * range.lo, hi: roomy.room * range.hi };
            }
        }
        let model = roomy.quantize()?;
        Ok((roomy, model))
    }

    /// Makes and judges a model, once.
    fn measure(&mut self, path: &[Upgrade], kept: &[usize]) -> Result<Attempt> {
        let precisions = self.precisions(path, kept);
        if let Some(known) = self.known.get(&precisions) {
            return Ok(known.clone());
        }
        let (_, model) = self.make(&precisions)?;
        let attempt = self.judge(&model, &precisions, kept.len())?;
        self.attempts.push(attempt.clone());
        self.known.insert(precisions, attempt.clone());
        Ok(attempt)
    }

    fn judge(&mut self, model: &Model, precisions: &[Precision], upgrades: usize) -> Result<Attempt> {
        let outputs: Vec<String> = self.prepared.model.graph().output.iter().map(|o| o.name().to_owned()).collect();
        let Judge { data, labels, threads, stop, .. } = *self.judge;
        if self.float.is_none() {
            self.float = Some(Rten::packed(&self.prepared.model, &outputs, threads)?);
        }
        let of_layer = |(choice, precision): (&LayerChoice, &Precision)| choice.multiplications * precision.time();
        let whole: f64 = self.choices.iter().map(|c| c.multiplications).sum();
        let mut attempt = Attempt {
            upgrades,
            sqnr_db: None,
            agreement: None,
            accuracy: None,
            bytes: model.proto.encoded_len() as u64,
            time: self.choices.iter().zip(precisions).map(of_layer).sum::<f64>() / whole.max(1.0),
            measured: None,
            good: false,
        };
        if let Goal::Bytes(most) = self.goal
            && attempt.bytes > most
        {
            return Ok(attempt);
        }
        if let Goal::Time(most) = self.goal {
            let Some(timer) = self.judge.timer else {
                return Err(ModelError::Setting { what: "the goal".into(), why: "nothing measures time".into() });
            };
            let measured = timer(model)?;
            attempt.measured = Some(measured);
            if measured > most {
                return Ok(attempt);
            }
        }
        let Some(float) = &self.float else { return Ok(attempt) };
        let runner = Rten::packed(model, &outputs, threads)?;
        let mut progress = || (self.progress)("models");
        let report = evaluate(float, &runner, &outputs, data, labels, stop, &mut progress)?;
        let Some(OutputReport { sqnr_db, top1, nearest, kl, accuracy, .. }) = report.outputs.first() else {
            return Err(ModelError::Graph { what: "outputs".into(), why: "none of them holds floats".into() });
        };
        attempt.sqnr_db = *sqnr_db;
        // Only scores of classes have a divergence.
        attempt.agreement = if kl.is_some() { Some(*top1) } else { *nearest };
        attempt.accuracy = accuracy.map(|[_, this]| this);
        attempt.good = match self.goal {
            Goal::Sqnr(least) => sqnr_db.is_none_or(|db| db >= least),
            Goal::Agreement(least) => attempt.agreement.is_some_and(|share| share >= least),
            Goal::Accuracy(least) => attempt.accuracy.is_some_and(|share| share >= least),
            Goal::Bytes(_) | Goal::Time(_) => true,
        };
        Ok(attempt)
    }

    /// The chosen model. Its time is measured once more: one measurement in many is always a lucky one.
    fn finish(mut self, path: &[Upgrade], mut kept: Vec<usize>) -> Result<Mixed> {
        loop {
            let precisions = self.precisions(path, &kept);
            let (prepared, model) = self.make(&precisions)?;
            let chosen = match self.goal {
                Goal::Time(_) => {
                    let again = self.judge(&model, &precisions, kept.len())?;
                    self.attempts.push(again.clone());
                    again
                }
                _ => self.measure(path, &kept)?,
            };
            if chosen.good || kept.pop().is_none() {
                for (choice, precision) in self.choices.iter_mut().zip(precisions) {
                    choice.precision = precision;
                }
                return Ok(Mixed { prepared, model, layers: self.choices, attempts: self.attempts, chosen });
            }
        }
    }
}
