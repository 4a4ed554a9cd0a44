//! Running a float model over samples and keeping what its activations ask for.
//!
//! Every tensor has statistics of its own, and samples are taken in order, so that the figures don't depend on the number
//! of threads. Memory holds the tensors of as many samples at a time as there are threads, four at most.

use super::data::{Data, Sample};
use super::windows::{PLACES, Windows, windows};
use crate::graph::{GraphRunner, Rten, Tensor};
use crate::{ModelError, Result};
use nibble_quant::Range;
use nibble_quant::algo::algorithm;
use nibble_quant::observer::{Choice, Observed, Statistics};
use nibble_quant::onnx::equalize::absorb::{self, Moments};
use nibble_quant::onnx::equalize::{Axis, ChannelStatistics, Scaled, equalize, layers, sites};
use nibble_quant::onnx::plan::Kind;
use nibble_quant::onnx::weights::reads_channels;
use nibble_quant::onnx::{Calibration, Graph, Model, Plan};
use nibble_quant::stats::Input;
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// How to calibrate.
pub struct CalibrateOptions<'a> {
    /// What reads ranges off statistics.
    pub observer: Choice,
    /// Threads of the engine.
    pub threads: usize,
    /// Whether biases are to be corrected by the mean error of the weights.
    pub correct_bias: bool,
    /// What ranges are multiplied by: other samples have larger values than the few that are seen.
    pub headroom: f32,
    /// Set when the user wants to stop.
    pub stop: &'a AtomicBool,
}

/// Statistics of tensors over samples: one a tensor, and one a channel for those where channels were asked for.
pub struct Seen {
    /// By tensor.
    pub tensors: BTreeMap<String, Statistics>,
    /// By tensor, along its channels.
    pub channels: BTreeMap<String, Channels>,
    /// Of convolutions.
    pub windows: Vec<Windows>,
    /// Dimensions by tensor, by their number.
    pub ranks: BTreeMap<String, usize>,
    /// Samples seen.
    pub samples: usize,
}

/// What is to be observed.
#[derive(Default)]
pub struct Wanted {
    /// Tensors as a whole.
    pub tensors: Vec<String>,
    /// Tensors along their channels.
    pub channels: BTreeMap<String, Channels>,
    /// Windows of convolutions.
    pub windows: Vec<Windows>,
}

/// Statistics of the channels of a tensor.
#[derive(Debug)]
pub struct Channels {
    axis: Axis,
    observed: Option<Observed>,
    gram: Option<Gram>,
}

/// Products of channels with each other.
#[derive(Debug, Default)]
struct Gram {
    input: Option<Input>,
    /// The first sample's means, or nothing: with biases corrected only deviations from the mean cost anything.
    shift: Vec<f32>,
    centred: bool,
    samples: usize,
}

impl Gram {
    /// Takes in (outer, channels, inner) values.
    fn observe(&mut self, name: &str, values: &[f32], channels: usize, inner: usize) -> Result<()> {
        let places = values.len() / channels;
        if self.shift.is_empty() {
            self.shift = vec![0.0; channels];
            for (c, shift) in self.shift.iter_mut().enumerate().filter(|_| self.centred) {
                let of = values.chunks_exact(channels * inner).flat_map(|o| &o[c * inner..(c + 1) * inner]);
                *shift = (of.map(|&v| f64::from(v)).sum::<f64>() / places.max(1) as f64) as f32;
            }
        }
        let step = places.div_ceil(PLACES).max(1);
        // From sample to sample another first place, so that no column of a picture is left out.
        let first = self.samples * 7 % step;
        let mut rows = Vec::with_capacity(places.div_ceil(step) * channels);
        for place in (first..places).step_by(step) {
            let (outer, at) = (place / inner, place % inner);
            let start = outer * channels * inner + at;
            rows.extend(self.shift.iter().enumerate().map(|(c, shift)| values[start + c * inner] - shift));
        }
        self.samples += 1;
        Ok(self.input.get_or_insert_with(|| Input::new(channels, true)).observe(name, &rows)?)
    }
}

impl Channels {
    /// Along these dimensions.
    pub fn along(axis: Axis) -> Channels {
        Channels { axis, observed: None, gram: None }
    }

    /// With a Gram matrix, of deviations from the mean if `centred`.
    fn with_gram(self, centred: bool) -> Channels {
        Channels { gram: Some(Gram { centred, ..Gram::default() }), ..self }
    }

    /// Smallest and largest value of each channel, zero included.
    pub fn ranges(&self) -> Vec<Range> {
        self.observed.iter().flat_map(Observed::ranges).collect()
    }

    /// Second moments of the channels.
    pub fn moments(&self) -> Vec<f32> {
        self.observed.as_ref().map(Observed::mean_squares).unwrap_or_default()
    }

    /// Means of the channels.
    pub fn means(&self) -> Vec<f64> {
        self.observed.as_ref().map(Observed::means).unwrap_or_default()
    }

    fn observe(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        let values = tensor.as_floats(name)?;
        let axis = match self.axis {
            Axis::Second => 1,
            Axis::Last => tensor.dims.len().saturating_sub(1),
        };
        let Some(&channels) = tensor.dims.get(axis) else { return Ok(()) };
        let inner: usize = tensor.dims[axis + 1..].iter().product();
        if self.observed.is_none() {
            self.observed = Some(Observed::channels(&tensor.dims, axis, false)?);
        }
        if let Some(observed) = &mut self.observed {
            observed.observe(name, values)?;
        }
        if channels * inner == 0 {
            return Ok(());
        }
        match &mut self.gram {
            Some(gram) => gram.observe(name, values, channels, inner),
            None => Ok(()),
        }
    }
}

/// Samples that run at a time, at most: each has its tensors in memory.
const TOGETHER: usize = 4;

/// Runs `model` over all samples and observes what is wanted. `progress` is called after each sample.
///
/// # Errors
/// A sample that can't be read or run, values that aren't floats, or the user's wish to stop.
pub fn observe(
    model: &Model,
    wanted: Wanted,
    data: &Data,
    histogram: bool,
    options: &CalibrateOptions,
    progress: &mut dyn FnMut(),
) -> Result<Seen> {
    let Wanted { tensors, channels, windows } = wanted;
    let mut wanted: Vec<String> = tensors.clone();
    wanted.extend(channels.keys().cloned());
    wanted.extend(windows.iter().map(|w| w.reads.clone()));
    wanted.sort();
    wanted.dedup();
    // What is fed is known without asking for it.
    let made: Vec<String> =
        wanted.iter().filter(|name| !model.graph().input.iter().any(|i| i.name() == *name)).cloned().collect();
    let runner = Rten::new(model, &made, options.threads)?;
    let many = options.threads.clamp(1, TOGETHER);
    let mut seen = Seen {
        tensors: tensors.iter().map(|name| (name.clone(), Statistics::new(histogram))).collect(),
        channels,
        windows,
        ranks: BTreeMap::new(),
        samples: 0,
    };
    let mut take = |batch: Vec<(Sample, PathBuf)>| -> Result<()> {
        let results = batch.par_iter().map(|(sample, file)| {
            runner.run(sample, &made).map_err(|e| match e {
                ModelError::Graph { what, why } => {
                    ModelError::Damaged { path: file.clone(), why: format!("{what}: {why}") }
                }
                other => other,
            })
        });
        // In the samples' order, whatever the number of threads.
        for ((sample, _), results) in batch.iter().zip(results.collect::<Result<Vec<_>>>()?) {
            let values: BTreeMap<&str, &Tensor> = made
                .iter()
                .map(String::as_str)
                .zip(&results)
                .chain(sample.iter().map(|(name, tensor)| (name.as_str(), tensor)))
                .collect();
            let of = |name: &str| {
                let missing = || ModelError::Graph { what: name.to_owned(), why: "isn't made by the graph".into() };
                values.get(name).copied().ok_or_else(missing)
            };
            for name in &wanted {
                seen.ranks.insert(name.clone(), of(name)?.dims.len());
            }
            seen.tensors.par_iter_mut().try_for_each(|(name, statistics)| -> Result<()> {
                statistics.observe(of(name)?.as_floats(name)?);
                Ok(())
            })?;
            seen.channels.par_iter_mut().try_for_each(|(name, channels)| channels.observe(name, of(name)?))?;
            seen.windows.par_iter_mut().try_for_each(|windows| -> Result<()> {
                let tensor = of(&windows.reads)?;
                windows.observe(tensor.as_floats(&windows.reads)?, &tensor.dims)
            })?;
            seen.samples += 1;
            progress();
        }
        Ok(())
    };
    let mut batch = Vec::new();
    data.each(&mut |sample, file| {
        if options.stop.load(Ordering::Relaxed) {
            return Err(nibble_quant::QuantError::Stopped.into());
        }
        batch.push((sample, file.to_owned()));
        if batch.len() == many {
            take(std::mem::take(&mut batch))?;
        }
        Ok(true)
    })?;
    take(batch)?;
    Ok(seen)
}

/// Ranges of everything a plan quantizes, and means and second moments of what layers read.
///
/// # Errors
/// As [`observe`], and values that aren't finite, by tensor.
pub fn calibrate(
    model: &Model,
    plan: &Plan,
    data: &Data,
    options: &CalibrateOptions,
    progress: &mut dyn FnMut(),
) -> Result<Calibration> {
    let histogram = options.observer.observer.histogram;
    let mut channels = layer_inputs(model, plan, options.correct_bias)?;
    let tensors = whole(plan, &channels, options);
    let graph = Graph::new(model.graph())?;
    let windows = match feedback(plan) {
        true => windows(&graph, plan, options.correct_bias)?,
        false => Vec::new(),
    };
    // What windows show of a tensor isn't kept a second time.
    let shown: BTreeSet<&str> = windows.iter().map(|w| w.weight.as_str()).collect();
    for (name, channels) in &mut channels {
        let mut readers = graph.consumers(name).iter().map(|&(id, _)| graph.node(id));
        if readers.all(|node| shown.contains(node.arg(1)) || !reads_channels(&graph, node)) {
            channels.gram = None;
        }
    }
    let seen = observe(model, Wanted { tensors, channels, windows }, data, histogram, options, progress)?;
    let mut calibration = finish(seen, plan, options)?;
    make_room(model, plan, &mut calibration, options.headroom)?;
    Ok(calibration)
}

/// What ranges of tensors in two terms are multiplied by at least: there the step costs next to nothing, and values beyond
/// the range much.
const FINE_HEADROOM: f32 = 2.0;

/// What the range of a tensor that has got `headroom` is multiplied by if it gets a second term after all.
pub(super) fn room_of_second_terms(headroom: f32) -> f32 {
    headroom.max(FINE_HEADROOM) / headroom
}

/// Tensors in two terms. Matrices never are: there a layer is one Gemm.
fn fine_tensors(model: &Model, plan: &Plan, ranks: &BTreeMap<String, usize>) -> Result<BTreeSet<String>> {
    let mut fine = plan.fine_tensors(&Graph::new(model.graph())?);
    fine.retain(|name| ranks.get(name).is_some_and(|&rank| rank > 2));
    Ok(fine)
}

/// Widens ranges by the room that other samples may need.
fn make_room(model: &Model, plan: &Plan, calibration: &mut Calibration, headroom: f32) -> Result<()> {
    let fine = fine_tensors(model, plan, &calibration.ranks)?;
    for (name, range) in &mut calibration.ranges {
        let by = if fine.contains(name) { headroom * room_of_second_terms(headroom) } else { headroom };
        *range = Range { lo: range.lo * by, hi: range.hi * by };
    }
    Ok(())
}

/// What has to be observed as a whole: extremes of a tensor are known from those of its channels.
fn whole(plan: &Plan, channels: &BTreeMap<String, Channels>, options: &CalibrateOptions) -> Vec<String> {
    let mut tensors = plan.observed();
    tensors.retain(|name| options.observer.observer.name != "minmax" || !channels.contains_key(name));
    tensors
}

/// What a plan needs of what was seen.
fn finish(seen: Seen, plan: &Plan, options: &CalibrateOptions) -> Result<Calibration> {
    let mut calibration = Calibration { ranks: seen.ranks, ..Default::default() };
    let grid = plan.settings.activation;
    for name in plan.observed() {
        let of_channels = || seen.channels.get(&name).and_then(|c| c.observed.as_ref()).map(Observed::whole);
        let statistics = seen.tensors.get(&name).cloned().or_else(of_channels);
        let statistics = statistics.unwrap_or_else(|| Statistics::new(false));
        calibration.ranges.insert(name.clone(), options.observer.range(&name, &statistics, grid)?);
    }
    for windows in seen.windows {
        let weight = windows.weight.clone();
        let (seen, means) = windows.seen();
        calibration.row_means.extend(means.map(|means| (weight.clone(), means)));
        calibration.windows.insert(weight, Arc::new(seen));
    }
    for (name, channels) in seen.channels {
        if options.correct_bias {
            calibration.means.insert(name.clone(), channels.means());
        }
        calibration.moments.insert(name.clone(), channels.moments());
        if let Some(input) = channels.gram.and_then(|gram| gram.input) {
            calibration.inputs.insert(name, Arc::new(input));
        }
    }
    Ok(calibration)
}

/// Whether weights are rounded by what products of channels with each other say.
fn feedback(plan: &Plan) -> bool {
    algorithm(plan.settings.weights.algorithm).is_ok_and(|a| a.gram)
}

/// What layers with rounded weights read, and where its channels are.
fn layer_inputs(model: &Model, plan: &Plan, correct_bias: bool) -> Result<BTreeMap<String, Channels>> {
    let graph = Graph::new(model.graph())?;
    let feedback = feedback(plan);
    let mut inputs: BTreeMap<String, Channels> = BTreeMap::new();
    for (id, node) in graph.nodes() {
        let axis = match plan.rounded(id) {
            Some(Kind::Conv) => Axis::Second,
            Some(Kind::Linear { .. }) => Axis::Last,
            _ => continue,
        };
        let channels = inputs.remove(node.arg(0)).unwrap_or_else(|| Channels::along(axis));
        let channels = match feedback && channels.gram.is_none() && reads_channels(&graph, node) {
            true => channels.with_gram(correct_bias),
            false => channels,
        };
        inputs.insert(node.arg(0).to_owned(), channels);
    }
    Ok(inputs)
}

/// Brings channels to like ranges, by what samples show of them: the tensors that changed. The float function stays.
/// `plan` tells what layers read.
///
/// # Errors
/// As [`observe`].
pub fn equalize_channels(
    model: &mut Model,
    plan: &Plan,
    data: &Data,
    options: &CalibrateOptions,
    progress: &mut dyn FnMut(),
) -> Result<Vec<Scaled>> {
    let mut channels = site_tensors(model)?;
    for (name, input) in layer_inputs(model, plan, options.correct_bias)? {
        channels.entry(name).or_insert_with(|| Channels::along(input.axis));
    }
    let seen = observe(model, Wanted { channels, ..Wanted::default() }, data, false, options, progress)?;
    let fine = fine_tensors(model, plan, &seen.ranks)?;
    Ok(equalize(model, &statistics(&seen), &fine)?)
}

/// Takes out of activations what their channels never fall below, and brings the weights of neighbouring layers to like
/// ranges: how many activations changed. The float function is what it was on these samples, but for values that are
/// three deviations below a channel's mean.
///
/// # Errors
/// As [`observe`].
pub fn equalize_weights(
    model: &mut Model,
    data: &Data,
    options: &CalibrateOptions,
    progress: &mut dyn FnMut(),
) -> Result<usize> {
    let graph = Graph::new(model.graph())?;
    let between = layers::tensors(&graph).into_iter().chain(absorb::tensors(&graph));
    let channels = between.map(|(name, axis)| (name, Channels::along(axis))).collect();
    let seen = observe(model, Wanted { channels, ..Wanted::default() }, data, false, options, progress)?;
    let moments = |c: &Channels| Moments { means: c.means(), squares: c.moments() };
    let moments = seen.channels.iter().map(|(name, c)| (name.clone(), moments(c))).collect();
    Ok(absorb::absorb(model, &moments)? + layers::equalize_layers(model, &statistics(&seen))?)
}

/// [`equalize_channels`] and [`calibrate`] in one run over the samples, for observers that read ranges alone: factors
/// change those in a way that is known without looking again. `plan` makes a plan of a model; the one that is given
/// back is of the equalized one.
///
/// # Errors
/// As [`observe`], values that aren't finite, by tensor, and what `plan` returns.
pub fn equalize_and_calibrate(
    model: &mut Model,
    plan: &dyn Fn(&Model) -> nibble_quant::error::Result<Plan>,
    data: &Data,
    options: &CalibrateOptions,
    progress: &mut dyn FnMut(),
) -> Result<(Plan, Calibration)> {
    let before = plan(model)?;
    let mut channels = layer_inputs(model, &before, options.correct_bias)?;
    for (name, site) in site_tensors(model)? {
        channels.entry(name).or_insert(site);
    }
    let tensors = whole(&before, &channels, options);
    let wanted = Wanted { tensors, channels, windows: Vec::new() };
    let seen = observe(model, wanted, data, false, options, progress)?;
    let fine = fine_tensors(model, &before, &seen.ranks)?;
    let scaled = equalize(model, &statistics(&seen), &fine)?;
    let after = plan(model)?;
    let mut ranges: BTreeMap<String, Range> = BTreeMap::new();
    for Scaled { tensor, of, by } in &scaled {
        let Some(channels) = seen.channels.get(of) else { continue };
        let each = channels.ranges();
        let ends = each.iter().zip(by).map(|(r, f)| [f64::from(r.lo) / f, f64::from(r.hi) / f]);
        let [lo, hi] = ends.fold([0f64; 2], |[lo, hi], [l, h]| [lo.min(l), hi.max(h)]);
        ranges.insert(tensor.clone(), Range { lo: lo as f32, hi: hi as f32 });
    }
    let mut calibration = finish(seen, &before, options)?;
    calibration.ranges.extend(ranges);
    for Scaled { tensor, of, by } in &scaled {
        if let Some(&rank) = calibration.ranks.get(of) {
            calibration.ranks.insert(tensor.clone(), rank);
        }
        if let Some(means) = calibration.means.get(of) {
            let means = means.iter().zip(by).map(|(mean, f)| mean / f).collect();
            calibration.means.insert(tensor.clone(), means);
        }
        if let Some(moments) = calibration.moments.get(of) {
            let moments = moments.iter().zip(by).map(|(moment, f)| (f64::from(*moment) / (f * f)) as f32).collect();
            calibration.moments.insert(tensor.clone(), moments);
        }
    }
    make_room(model, &after, &mut calibration, options.headroom)?;
    Ok((after, calibration))
}

/// Whether [`equalize_and_calibrate`] gives what two runs would.
pub fn one_run_is_enough(plan: &Plan, options: &CalibrateOptions) -> bool {
    options.observer.observer.name == "minmax" && !feedback(plan)
}

fn site_tensors(model: &Model) -> Result<BTreeMap<String, Channels>> {
    let mut channels = BTreeMap::new();
    for site in sites(&Graph::new(model.graph())?) {
        channels.extend(site.tensors.iter().map(|name| (name.clone(), Channels::along(site.axis))));
    }
    Ok(channels)
}

fn statistics(seen: &Seen) -> BTreeMap<String, ChannelStatistics> {
    let of = |c: &Channels| ChannelStatistics { ranges: c.ranges(), moments: c.moments() };
    seen.channels.iter().map(|(name, c)| (name.clone(), of(c))).collect()
}
