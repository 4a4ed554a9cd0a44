//! Running a float model over samples and keeping what its activations ask for.
//!
//! Every tensor has statistics of its own, and samples are taken in order, so that the figures don't depend on the number
//! of threads. Memory holds one sample's tensors at a time.

use super::data::Data;
use crate::graph::{GraphRunner, Rten, Tensor};
use crate::{ModelError, Result};
use nibble_quant::observer::{Choice, Observed, Statistics};
use nibble_quant::onnx::equalize::{Axis, ChannelStatistics, equalize, sites};
use nibble_quant::onnx::plan::Kind;
use nibble_quant::onnx::{Calibration, Graph, Model, Plan};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

/// How to calibrate.
pub struct CalibrateOptions<'a> {
    /// What reads ranges off statistics.
    pub observer: Choice,
    /// Threads of the engine.
    pub threads: usize,
    /// Set when the user wants to stop.
    pub stop: &'a AtomicBool,
}

/// Statistics of tensors over samples: one a tensor, and one a channel for those where channels were asked for.
pub struct Seen {
    /// By tensor.
    pub tensors: BTreeMap<String, Statistics>,
    /// By tensor, along its channels.
    pub channels: BTreeMap<String, Channels>,
    /// Dimensions by tensor, by their number.
    pub ranks: BTreeMap<String, usize>,
    /// Samples seen.
    pub samples: usize,
}

/// Statistics of the channels of a tensor.
#[derive(Debug, Clone)]
pub struct Channels {
    axis: Axis,
    observed: Option<Observed>,
    /// Sum of each channel's values, and how many there were of each.
    sums: Vec<f64>,
    count: f64,
}

impl Channels {
    /// Along these dimensions.
    pub fn along(axis: Axis) -> Channels {
        Channels { axis, observed: None, sums: Vec::new(), count: 0.0 }
    }

    /// The largest magnitude of each channel.
    pub fn absmax(&self) -> Vec<f32> {
        self.observed.iter().flat_map(Observed::ranges).map(|r| r.absmax()).collect()
    }

    /// Second moments of the channels.
    pub fn moments(&self) -> Vec<f32> {
        self.observed.as_ref().map(Observed::mean_squares).unwrap_or_default()
    }

    /// Means of the channels.
    pub fn means(&self) -> Vec<f64> {
        self.sums.iter().map(|s| s / self.count.max(1.0)).collect()
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
            self.sums = vec![0.0; channels];
        }
        if let Some(observed) = &mut self.observed {
            observed.observe(name, values)?;
        }
        if channels * inner == 0 {
            return Ok(());
        }
        for outer in values.chunks_exact(channels * inner) {
            for (sum, channel) in self.sums.iter_mut().zip(outer.chunks_exact(inner)) {
                *sum += channel.iter().map(|&v| f64::from(v)).sum::<f64>();
            }
        }
        self.count += (values.len() / channels) as f64;
        Ok(())
    }
}

/// Runs `model` over all samples and observes tensors. `progress` is called after each sample.
///
/// # Errors
/// A sample that can't be read or run, values that aren't floats, or the user's wish to stop.
pub fn observe(
    model: &Model,
    tensors: &[String],
    channels: BTreeMap<String, Channels>,
    data: &Data,
    histogram: bool,
    options: &CalibrateOptions,
    progress: &mut dyn FnMut(),
) -> Result<Seen> {
    let mut wanted: Vec<String> = tensors.to_vec();
    wanted.extend(channels.keys().cloned());
    wanted.sort();
    wanted.dedup();
    // What is fed is known without asking for it.
    let made: Vec<String> =
        wanted.iter().filter(|name| !model.graph().input.iter().any(|i| i.name() == *name)).cloned().collect();
    let runner = Rten::new(model, &made, options.threads)?;
    let mut seen = Seen {
        tensors: tensors.iter().map(|name| (name.clone(), Statistics::new(histogram))).collect(),
        channels,
        ranks: BTreeMap::new(),
        samples: 0,
    };
    data.each(&mut |sample, file| {
        if options.stop.load(Ordering::Relaxed) {
            return Err(nibble_quant::QuantError::Stopped.into());
        }
        let results = runner.run(&sample, &made).map_err(|e| match e {
            ModelError::Graph { what, why } => {
                ModelError::Damaged { path: file.to_owned(), why: format!("{what}: {why}") }
            }
            other => other,
        })?;
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
        seen.samples += 1;
        progress();
        Ok(true)
    })?;
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
    let channels = layer_inputs(model, plan)?;
    let seen = observe(model, &plan.observed(), channels, data, histogram, options, progress)?;
    let mut calibration = Calibration { ranks: seen.ranks, ..Default::default() };
    let grid = plan.settings.activation;
    for (name, statistics) in &seen.tensors {
        calibration.ranges.insert(name.clone(), options.observer.range(name, statistics, grid)?);
    }
    for (name, channels) in &seen.channels {
        calibration.means.insert(name.clone(), channels.means());
        calibration.moments.insert(name.clone(), channels.moments());
    }
    Ok(calibration)
}

/// What quantized layers with weights read, and where its channels are.
fn layer_inputs(model: &Model, plan: &Plan) -> Result<BTreeMap<String, Channels>> {
    let graph = Graph::new(model.graph())?;
    let mut inputs = BTreeMap::new();
    for (id, node) in graph.nodes() {
        let axis = match plan.kind(id) {
            Some(Kind::Conv) => Axis::Second,
            Some(Kind::Linear { .. }) => Axis::Last,
            _ => continue,
        };
        inputs.insert(node.arg(0).to_owned(), Channels::along(axis));
    }
    Ok(inputs)
}

/// Brings channels to like ranges, by what samples show of them: how many places changed. The float function stays.
///
/// # Errors
/// As [`observe`].
pub fn equalize_channels(
    model: &mut Model,
    data: &Data,
    options: &CalibrateOptions,
    progress: &mut dyn FnMut(),
) -> Result<usize> {
    let mut channels = BTreeMap::new();
    for site in sites(&Graph::new(model.graph())?) {
        channels.extend(site.tensors.iter().map(|name| (name.clone(), Channels::along(site.axis))));
    }
    if channels.is_empty() {
        return Ok(0);
    }
    let seen = observe(model, &[], channels, data, false, options, progress)?;
    let of = |c: &Channels| ChannelStatistics { absmax: c.absmax(), moments: c.moments() };
    let statistics = seen.channels.iter().map(|(name, c)| (name.clone(), of(c))).collect();
    Ok(equalize(model, &statistics)?)
}
