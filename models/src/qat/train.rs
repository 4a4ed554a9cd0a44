//! The loop: batches in a drawn order, a loss, a step, and now and then a look at samples that aren't trained on.

use super::checkpoint::{self, Progress};
use super::dataset::{Augment, Dataset};
use super::loss::{Distill, Likeness, flat, loss};
use super::net::Net;
use super::ops::{Axis, lend};
use super::optimizer::{Group, Method, Optimizer, cosine};
use super::quantizer::Mode;
use crate::{ModelError, Result};
use candle_core::backprop::GradStore;
use candle_core::{D, Tensor};
use rand::seq::SliceRandom;
use rand::{SeedableRng, rngs::StdRng};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

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
    /// Decibels of the other samples' outputs, where outputs are learned as values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_db: Option<f64>,
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

/// Samples that are run at once where nothing is learned, and how many values they may have.
const EVALUATED: (usize, usize) = (250, 1 << 21);

/// Runs samples in order where nothing is learned, some at a time.
fn each(
    net: &mut Net,
    data: &Dataset,
    (order, mode): (&[usize], Mode),
    seen: &mut dyn FnMut(&Tensor, Tensor) -> Result<()>,
) -> Result<()> {
    let size = data.dims.iter().product::<usize>().max(1);
    for part in order.chunks(net.together(EVALUATED.0.min(EVALUATED.1 / size))) {
        let (x, _) = data.batch(part, Augment::default(), 0)?;
        let y = net.forward(&x, mode)?;
        seen(&x, flat(&y).map_err(candle)?)?;
    }
    Ok(())
}

/// The class of each row.
fn largest(y: &Tensor) -> Result<Vec<u32>> {
    y.argmax(D::Minus1).and_then(|c| c.to_vec1::<u32>()).map_err(candle)
}

/// Classes of all samples.
///
/// # Errors
/// What the network refuses.
pub fn classes(net: &mut Net, data: &Dataset) -> Result<Vec<u32>> {
    let order: Vec<usize> = (0..data.len()).collect();
    let mut all = Vec::with_capacity(data.len());
    each(net, data, (&order, Mode::Evaluate), &mut |_, y| {
        all.extend(largest(&y)?);
        Ok(())
    })?;
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

/// Decibels of the teacher's outputs over what a network's differ from them by.
///
/// # Errors
/// What a network refuses.
pub fn likeness(net: &mut Net, data: &Dataset, teacher: &mut Net) -> Result<f64> {
    let order: Vec<usize> = (0..data.len()).collect();
    let mut sums = [0f64; 2];
    let squares = |t: &Tensor| t.sqr()?.sum_all()?.to_scalar::<f32>();
    each(net, data, (&order, Mode::Evaluate), &mut |x, y| {
        let wanted = flat(&teacher.forward(x, Mode::Evaluate)?).map_err(candle)?;
        sums[0] += f64::from(squares(&wanted).map_err(candle)?);
        sums[1] += f64::from((y - wanted).and_then(|error| squares(&error)).map_err(candle)?);
        Ok(())
    })?;
    Ok(10.0 * (sums[0] / sums[1]).log10())
}

/// Lets batch norms to be see samples in floats.
///
/// # Errors
/// What the network refuses.
pub fn observe(net: &mut Net, data: &Dataset, samples: usize, seed: u64) -> Result<()> {
    each(net, data, (&data.order(samples, seed), Mode::Observe), &mut |_, _| Ok(()))?;
    net.conclude()
}

/// The largest factor between a channel's rate and the median one.
const APART: f32 = 1e3;

/// Shares of the learning rate by parameter: a channel whose weights are small moves by as much less. Channels of a folded
/// model differ by what was folded into them, a layer scale of some thousandths.
fn shares(net: &Net) -> Result<HashMap<String, (Axis, Vec<f32>)>> {
    let mut sizes: Vec<(usize, Option<&str>, Vec<f32>)> = Vec::new();
    for (at, bias) in net.layers() {
        let weight = &net.weights()[at];
        let (n, axis) = (weight.scale.elem_count().max(1), weight.axis);
        let Some(var) = net.parameters().get(&weight.parameter).filter(|_| axis != Axis::Tensor) else { continue };
        let squares = lend(var.as_tensor(), |values| {
            let row = (values.len() / n).max(1);
            let mut squares = vec![0f32; n];
            for (i, v) in values.iter().enumerate() {
                squares[if axis == Axis::Last { i % n } else { i / row }] += v * v / row as f32;
            }
            Ok(squares)
        });
        sizes.push((at, bias, squares.map_err(candle)?.into_iter().map(f32::sqrt).collect()));
    }
    let mut all: Vec<f32> = sizes.iter().flat_map(|(.., sizes)| sizes).copied().filter(|&s| s > 0.0).collect();
    all.sort_by(f32::total_cmp);
    let Some(&median) = all.get(all.len() / 2) else { return Ok(HashMap::new()) };
    let mut found = HashMap::new();
    for (at, bias, sizes) in sizes {
        let shares: Vec<f32> = sizes.iter().map(|size| (size / median).clamp(1.0 / APART, APART)).collect();
        let weight = &net.weights()[at];
        found.extend(bias.map(|bias| (bias.to_owned(), (Axis::Last, shares.clone()))));
        found.insert(weight.parameter.clone(), (weight.axis, shares));
    }
    Ok(found)
}

/// What is learned of a network: decaying matrices, everything else without decay, scales at a rate of their own size.
fn groups(net: &Net) -> Result<Vec<Group>> {
    let mut shares = shares(net)?;
    let parameters = net.parameters().iter().map(|(name, var)| Group {
        name: format!("parameter.{name}"),
        var: var.clone(),
        rate: 1.0,
        channels: shares.remove(name).filter(|(_, shares)| var.elem_count().is_multiple_of(shares.len())),
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
        channels: None,
        decays: false,
    };
    groups.extend(net.weights().iter().filter(|w| w.learn).map(|w| scale(&w.output, &w.scale)));
    groups.extend(net.activations().iter().filter(|a| a.learn).map(|a| scale(&a.name, &a.scale)));
    Ok(groups)
}

/// What a step's samples say.
struct Found {
    /// Their mean loss.
    loss: f64,
    /// Those whose label is found.
    right: usize,
    /// Gradients of the mean loss.
    gradients: Option<GradStore>,
}

/// The loss of the samples `part` and its gradients: in one run, or summed up over as many as the network needs.
fn gradient(
    net: &mut Net,
    mut teacher: Option<&mut Net>,
    (data, part, draw): (&Dataset, &[usize], u64),
    settings: &TrainSettings,
) -> Result<Found> {
    let mut all = Found { loss: 0.0, right: 0, gradients: None };
    for (i, run) in part.chunks(net.together(part.len())).enumerate() {
        let (x, labels) = data.batch(run, settings.augment, mix(draw, i as u64))?;
        let outputs = net.forward(&x, Mode::Train)?;
        let taught = match (&mut teacher, settings.distill) {
            (Some(teacher), Some(distill)) => Some((teacher.forward(&x, Mode::Evaluate)?.detach(), distill)),
            _ => None,
        };
        let taught = taught.as_ref().map(|(t, d)| (t, *d));
        let share = run.len() as f64 / part.len() as f64;
        let loss = loss(&outputs, labels.as_ref(), taught)?.affine(share, 0.0).map_err(candle)?;
        all.loss += f64::from(loss.to_scalar::<f32>().map_err(candle)?);
        if let Some(labels) = &labels {
            let found = flat(&outputs).map_err(candle).and_then(|y| largest(&y))?;
            let wanted = labels.to_vec1::<u32>().map_err(candle)?;
            all.right += found.iter().zip(&wanted).filter(|(a, b)| a == b).count();
        }
        let found = loss.backward().map_err(candle)?;
        all.gradients = Some(match all.gradients.take() {
            None => found,
            Some(sum) => add(net, sum, &found)?,
        });
    }
    Ok(all)
}

/// The learning rate at which one step, as the first gradient has it, would take away the whole loss. What a step of rate 1
/// promises is a sum over all parameters: of the gradients' sizes with Adam, whose steps all have one length, and of their
/// squares with plain descent. A network of tens of millions of weights that is nearly right bears a thousand times less
/// than a small one.
///
/// # Errors
/// What a network refuses.
pub fn bearable_rate(
    net: &mut Net,
    teacher: Option<&mut Net>,
    data: &Dataset,
    settings: &TrainSettings,
) -> Result<Option<f64>> {
    let first = data.order(settings.batch, settings.seed);
    let found = gradient(net, teacher, (data, &first, settings.seed), settings)?;
    let Some(gradients) = found.gradients else { return Ok(None) };
    let mut promised = 0f64;
    for group in groups(net)? {
        let Some(grad) = gradients.get(group.var.as_tensor()) else { continue };
        promised += lend(grad, |grad| {
            let promise = |(&g, &share): (&f32, &f32)| match settings.method {
                Method::AdamW { .. } => f64::from(g.abs() * share),
                Method::Sgd => f64::from(g * g),
            };
            Ok(group.rate * grad.iter().zip(&group.shares()).map(promise).sum::<f64>())
        })
        .map_err(candle)?;
    }
    Ok((promised > 0.0 && found.loss > 0.0).then(|| found.loss / promised))
}

/// The sum of gradients of what a network learns.
fn add(net: &Net, mut sum: GradStore, more: &GradStore) -> Result<GradStore> {
    for var in net.learned() {
        let Some(more) = more.get(var.as_tensor()) else { continue };
        let added = match sum.remove(var.as_tensor()) {
            Some(sum) => (sum + more).map_err(candle)?,
            None => more.clone(),
        };
        sum.insert(var.as_tensor(), added);
    }
    Ok(sum)
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
    let mut optimizer = Optimizer::new(groups(net)?, settings.method);
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
            let draw = mix(settings.seed, (total + number) as u64);
            let found = gradient(net, teacher.as_deref_mut(), (data, part, draw), settings)?;
            if !found.loss.is_finite() {
                let why = format!("the loss is {} at step {}; a lower learning rate may help", found.loss, number + 1);
                return Err(ModelError::Setting { what: "training".into(), why });
            }
            sum += found.loss;
            right += found.right;
            if let Some(gradients) = &found.gradients {
                optimizer.step(gradients, settings.rate * cosine(number, settings.warmup, total))?;
            }
            net.restrain()?;
            step(number + 1, total);
        }
        let seconds = started.elapsed().as_secs_f64();
        let by_values = settings.distill.is_some_and(|d| d.by == Likeness::Values);
        let (mut right_of_valid, mut likeness_of_valid) = (None, None);
        match (valid, teacher.as_deref_mut()) {
            (Some(valid), Some(teacher)) if by_values => likeness_of_valid = Some(likeness(net, valid, teacher)?),
            (Some(valid), teacher) => right_of_valid = score(net, valid, teacher)?.map(Score::share),
            (None, _) => {}
        }
        let accuracy = data.labels.is_some().then(|| right as f64 / data.len().max(1) as f64);
        let loss = sum / steps.max(1) as f64;
        let (valid, valid_db) = (right_of_valid, likeness_of_valid);
        let seen = Epoch { epoch: at + 1, loss, accuracy, valid, valid_db, seconds };
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
