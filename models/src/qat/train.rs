//! The loop: batches in a drawn order, a loss, a step, and now and then a look at samples that aren't trained on.

use super::checkpoint::{self, Progress};
use super::dataset::{Augment, Dataset};
use super::net::Net;
use super::optimizer::{Group, Method, Optimizer, cosine};
use super::quantizer::Mode;
use crate::{ModelError, Result};
use candle_core::{D, Tensor};
use nibble_quant::observer::Choice;
use rand::seq::SliceRandom;
use rand::{SeedableRng, rngs::StdRng};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Learning from another model's outputs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Distill {
    /// The teacher's share of the loss; labels have the rest. 1 without labels.
    pub share: f64,
    /// Both outputs are divided by it.
    pub temperature: f64,
}

/// How to train.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainSettings {
    /// Passes over the samples.
    pub epochs: usize,
    /// Samples of a step.
    pub batch: usize,
    /// The learning rate at its highest.
    pub rate: f64,
    /// Steps in which it rises.
    pub warmup: usize,
    /// What moves parameters.
    pub method: Method,
    /// Where randomness starts.
    pub seed: u64,
    /// What is done to samples.
    pub augment: Augment,
    /// Learning from the float model.
    pub distill: Option<Distill>,
    /// Stops after so many epochs without a better accuracy (or loss), and goes back to the best.
    pub patience: Option<usize>,
    /// Epochs in which ranges of activations follow what they see.
    pub following: usize,
    /// Epochs in which batch norms go by the statistics of their batches, if the network has any that are folded later.
    pub normalizing: usize,
    /// Where to write the state after each epoch.
    pub checkpoint: Option<PathBuf>,
    /// Go on from there.
    pub resume: bool,
    /// Stops after this epoch, as if the user had: for tests.
    pub stop_after: Option<usize>,
}

/// What an epoch came to.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Epoch {
    /// From 1 on.
    pub epoch: usize,
    /// Mean over the steps.
    pub loss: f64,
    /// Share of its samples that were right as they were trained on.
    pub accuracy: Option<f64>,
    /// Share of the other samples that are right; of those without labels, those with the teacher's class.
    pub valid: Option<f64>,
    /// Seconds of its steps.
    pub seconds: f64,
}

/// How good a network is on samples.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Score {
    /// Samples that are right.
    pub right: usize,
    /// All of them.
    pub samples: usize,
}

impl Score {
    /// The share of samples that are right.
    pub fn share(self) -> f64 {
        self.right as f64 / self.samples.max(1) as f64
    }
}

fn candle(e: candle_core::Error) -> ModelError {
    ModelError::Graph { what: "training".into(), why: e.to_string() }
}

/// Samples whose pictures are run at once where nothing is learned.
const EVALUATED: usize = 250;

/// Classes of all samples.
///
/// # Errors
/// What the network refuses.
pub fn classes(net: &mut Net, data: &Dataset) -> Result<Vec<u32>> {
    let indices: Vec<usize> = (0..data.len()).collect();
    let mut all = Vec::with_capacity(data.len());
    for part in indices.chunks(EVALUATED) {
        let (x, _) = data.batch(part, Augment::default(), 0)?;
        let y = flat(&net.forward(&x, Mode::Evaluate)?)?;
        all.extend(y.argmax(D::Minus1).and_then(|c| c.to_vec1::<u32>()).map_err(candle)?);
    }
    Ok(all)
}

/// How many samples get their label, or where there are none the class that `teacher` gives them.
///
/// # Errors
/// What a network refuses.
pub fn score(net: &mut Net, data: &Dataset, teacher: Option<&mut Net>) -> Result<Option<Score>> {
    let wanted = match (&data.labels, teacher) {
        (Some(labels), _) => labels.clone(),
        (None, Some(teacher)) => classes(teacher, data)?,
        (None, None) => return Ok(None),
    };
    let found = classes(net, data)?;
    let right = found.iter().zip(&wanted).filter(|(a, b)| a == b).count();
    Ok(Some(Score { right, samples: wanted.len() }))
}

/// Lets observers see samples in floats, and reads ranges off them.
///
/// # Errors
/// What the network refuses, or values that aren't finite, by tensor.
pub fn observe(net: &mut Net, data: &Dataset, samples: usize, observer: Choice, seed: u64) -> Result<()> {
    let mut order: Vec<usize> = (0..data.len()).collect();
    order.shuffle(&mut StdRng::seed_from_u64(seed));
    order.truncate(samples.max(1));
    for part in order.chunks(EVALUATED) {
        let (x, _) = data.batch(part, Augment::default(), 0)?;
        net.forward(&x, Mode::Observe)?;
    }
    net.conclude(observer)
}

/// (batch, ...) as (batch, classes).
fn flat(y: &Tensor) -> Result<Tensor> {
    if y.rank() == 2 { Ok(y.clone()) } else { y.flatten_from(1).map_err(candle) }
}

/// What is learned of a network: decaying matrices, everything else without decay, scales at a rate of their own size.
fn groups(net: &mut Net) -> Vec<Group> {
    let parameters = net.parameters().iter().map(|(name, var)| Group {
        name: format!("parameter.{name}"),
        var: var.clone(),
        rate: 1.0,
        decays: var.dims().iter().filter(|&&d| d > 1).count() > 1,
    });
    let mut groups: Vec<Group> = parameters.collect();
    let size = |var: &candle_core::Var| {
        let values = var.as_tensor().to_vec1::<f32>().unwrap_or_default();
        values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len().max(1) as f64
    };
    let scale = |name: &str, var: &candle_core::Var| Group {
        name: format!("scale.{name}"),
        var: var.clone(),
        rate: size(var),
        decays: false,
    };
    groups.extend(net.weights().iter().filter(|w| w.learn).map(|w| scale(&w.output, &w.scale)));
    groups.extend(net.activations().iter().filter(|a| a.learn).map(|a| scale(&a.name, &a.scale)));
    groups
}

fn loss(logits: &Tensor, labels: Option<&Tensor>, taught: Option<(&Tensor, Distill)>) -> Result<Tensor> {
    let hard = match labels {
        Some(labels) => Some(candle_nn::loss::cross_entropy(logits, labels).map_err(candle)?),
        None => None,
    };
    let Some((teacher, Distill { share, temperature })) = taught else {
        return hard.ok_or_else(|| ModelError::Setting {
            what: "training".into(),
            why: "samples have no labels, and there is no teacher".into(),
        });
    };
    let soft = || -> candle_core::Result<Tensor> {
        let wanted = super::ops::softmax(&teacher.affine(1.0 / temperature, 0.0)?)?;
        let found = candle_nn::ops::log_softmax(&logits.affine(1.0 / temperature, 0.0)?, D::Minus1)?;
        let rows = logits.dim(0)?.max(1) as f64;
        // T^2 keeps the gradient's size (arXiv 1503.02531).
        (wanted * found)?.sum_all()?.affine(-temperature * temperature / rows, 0.0)
    };
    let soft = soft().map_err(candle)?;
    match hard {
        Some(hard) => hard.affine(1.0 - share, 0.0).and_then(|h| soft.affine(share, 0.0)?.add(&h)).map_err(candle),
        None => Ok(soft),
    }
}

/// Trains on samples; others, if there are any, are looked at after each epoch. `step` is told of every step (its number from 1 on, and how many there are), `epoch` of every epoch.
///
/// # Errors
/// What the network refuses, a loss that isn't finite, a checkpoint that can't be written or is of another training, or
/// the wish to stop.
pub fn train(
    net: &mut Net,
    mut teacher: Option<&mut Net>,
    (data, valid): (&Dataset, Option<&Dataset>),
    settings: &TrainSettings,
    stop: &AtomicBool,
    step: &mut dyn FnMut(usize, usize),
    epoch: &mut dyn FnMut(&Epoch),
) -> Result<Vec<Epoch>> {
    let mut optimizer = Optimizer::new(groups(net), settings.method);
    let steps = data.len().div_ceil(settings.batch.max(1));
    let total = steps * settings.epochs;
    let fingerprint = checkpoint::fingerprint(settings, data);
    let mut progress = Progress::default();
    if let Some(path) = settings.checkpoint.as_ref().filter(|p| settings.resume && p.exists()) {
        progress = checkpoint::load(path, &fingerprint, net, &mut optimizer)?;
    }
    for at in progress.epochs.len()..settings.epochs {
        if progress.worse_for(settings.patience) {
            break;
        }
        net.follow(at < settings.following);
        net.normalize(at < settings.normalizing);
        let mut order: Vec<usize> = (0..data.len()).collect();
        order.shuffle(&mut StdRng::seed_from_u64(mix(settings.seed, at as u64)));
        let started = Instant::now();
        let (mut sum, mut right) = (0.0, 0usize);
        for (i, part) in order.chunks(settings.batch.max(1)).enumerate() {
            if stop.load(Ordering::Relaxed) {
                return Err(nibble_quant::QuantError::Stopped.into());
            }
            let number = at * steps + i;
            let (x, labels) = data.batch(part, settings.augment, mix(settings.seed, (total + number) as u64))?;
            let logits = flat(&net.forward(&x, Mode::Train)?)?;
            let taught = match (&mut teacher, settings.distill) {
                (Some(teacher), Some(distill)) => {
                    Some((flat(&teacher.forward(&x, Mode::Evaluate)?)?.detach(), distill))
                }
                _ => None,
            };
            let taught = taught.as_ref().map(|(t, d)| (t, *d));
            let loss = loss(&logits, labels.as_ref(), taught)?;
            let value = loss.to_scalar::<f32>().map_err(candle)?;
            if !value.is_finite() {
                let why = format!("the loss is {value} at step {}; a lower learning rate may help", number + 1);
                return Err(ModelError::Setting { what: "training".into(), why });
            }
            sum += f64::from(value);
            if let Some(labels) = &labels {
                let found = logits.argmax(D::Minus1).and_then(|c| c.to_vec1::<u32>()).map_err(candle)?;
                let wanted = labels.to_vec1::<u32>().map_err(candle)?;
                right += found.iter().zip(&wanted).filter(|(a, b)| a == b).count();
            }
            let grads = loss.backward().map_err(candle)?;
            optimizer.step(&grads, settings.rate * cosine(number, settings.warmup, total))?;
            net.restrain()?;
            step(number + 1, total);
        }
        let seconds = started.elapsed().as_secs_f64();
        let valid = match valid {
            Some(valid) => score(net, valid, teacher.as_deref_mut())?.map(Score::share),
            None => None,
        };
        let accuracy = data.labels.is_some().then(|| right as f64 / data.len().max(1) as f64);
        let seen = Epoch { epoch: at + 1, loss: sum / steps.max(1) as f64, accuracy, valid, seconds };
        epoch(&seen);
        progress.take(seen, settings.patience.map(|_| checkpoint::snapshot(net)).transpose()?);
        if let Some(path) = &settings.checkpoint {
            checkpoint::save(path, &fingerprint, net, &optimizer, &progress)?;
        }
        if settings.stop_after == Some(at + 1) {
            return Ok(progress.epochs);
        }
    }
    if let (Some(_), Some(best)) = (settings.patience, &progress.best) {
        checkpoint::restore(net, best)?;
    }
    net.follow(false);
    net.normalize(false);
    Ok(progress.epochs)
}

/// A seed for one of many draws: SplitMix64's step.
fn mix(seed: u64, number: u64) -> u64 {
    let mut z = seed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
