//! Float and rounded values of every tensor, side by side.

use crate::graph::{GraphRunner, Rten, Tensor};
use crate::vision::calibrate::{CalibrateOptions, Wanted, observe};
use crate::vision::data::Data;
use crate::vision::prepare::Prepared;
use crate::{ModelError, Result};
use nibble_quant::Range;
use nibble_quant::observer::{Choice, IntGrid, OBSERVERS, QParams, Statistics};
use nibble_quant::onnx::branch::params;
use nibble_quant::onnx::isolate::weights_alone;
use nibble_quant::onnx::weights::{Layout, rows};
use nibble_quant::onnx::{Graph, Model};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

/// Bins of a histogram.
const BINS: usize = 64;
/// A channel is an outlier if it reaches so many times as far as the median channel.
const OUTLIER: f32 = 6.0;
/// Outliers that are named.
const NAMED: usize = 8;
/// Values of a sample that observers are compared on.
const COMPARED: usize = 4096;

/// Counts of float and rounded values in the same bins, evenly spaced from `lo` to `hi`; what lies beyond is in the bins
/// at the ends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Bins {
    /// Where the first bin begins.
    pub lo: f32,
    /// Where the last one ends.
    pub hi: f32,
    /// Float values.
    pub float: Vec<u64>,
    /// Rounded ones.
    pub rounded: Vec<u64>,
}

/// How far rounded values are from float ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Values seen.
    pub count: u64,
    /// Mean squared difference.
    pub mse: f64,
    /// Power of the float values over that of the difference, in dB; `None` if there is no difference.
    pub sqnr_db: Option<f64>,
    /// Cosine between the two.
    pub cosine: f64,
    /// The largest difference.
    pub max_error: f32,
    /// Smallest and largest float value.
    pub range: [f32; 2],
    /// Smallest and largest value that integers reach.
    pub reach: [f32; 2],
    /// Share of float values more than half a step beyond that.
    pub saturated: f64,
    /// Both distributions.
    pub histogram: Bins,
}

/// The reach of a channel.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ChannelRange {
    /// Smallest value.
    pub lo: f32,
    /// Largest value.
    pub hi: f32,
}

/// A channel that reaches far beyond the others.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Outlier {
    /// Which.
    pub channel: usize,
    /// How many times as far as the median channel.
    pub times: f32,
}

/// The range that an observer takes from the calibration samples, and what it comes to on the samples judged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ObservedRange {
    /// Its name in [`OBSERVERS`].
    pub observer: String,
    /// The range.
    pub range: [f32; 2],
    /// SQNR of values rounded with it, in dB.
    pub sqnr_db: Option<f64>,
}

/// Of an activation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ActivationFigures {
    /// The tensor.
    pub tensor: String,
    /// The step.
    pub scale: f32,
    /// The integer that means zero.
    pub zero_point: i32,
    /// Float against rounded.
    pub figures: Figures,
    /// Range of each channel, on the samples judged.
    pub channels: Vec<ChannelRange>,
    /// Channels that reach furthest beyond the others.
    pub outliers: Vec<Outlier>,
    /// Every observer's range.
    pub observers: Vec<ObservedRange>,
}

/// Of a weight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WeightFigures {
    /// The layer's node.
    pub node: String,
    /// The weight.
    pub tensor: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Float against rounded.
    pub figures: Figures,
    /// Range of each output channel.
    pub channels: Vec<ChannelRange>,
    /// Output channels that reach furthest beyond the others.
    pub outliers: Vec<Outlier>,
}

/// Sums of one tensor.
pub(crate) struct Sums {
    reach: [f32; 2],
    step: f32,
    bins: Bins,
    dot: f64,
    float: f64,
    rounded: f64,
    noise: f64,
    count: u64,
    saturated: u64,
    max_error: f32,
    range: [f32; 2],
}

impl Sums {
    /// For values whose integers reach so far, in bins that hold a quarter more.
    pub(crate) fn new(reach: [f32; 2], step: f32, range: [f32; 2]) -> Sums {
        let (lo, hi) = (reach[0].min(range[0]), reach[1].max(range[1]));
        let more = 0.125 * (hi - lo).max(f32::MIN_POSITIVE);
        let bins = Bins { lo: lo - more, hi: hi + more, float: vec![0; BINS], rounded: vec![0; BINS] };
        Sums {
            reach,
            step,
            bins,
            dot: 0.0,
            float: 0.0,
            rounded: 0.0,
            noise: 0.0,
            count: 0,
            saturated: 0,
            max_error: 0.0,
            range: [f32::INFINITY, f32::NEG_INFINITY],
        }
    }

    pub(crate) fn add(&mut self, exact: f32, rounded: f32) {
        let per_bin = BINS as f32 / (self.bins.hi - self.bins.lo);
        // A cast to an integer saturates: below the first bin is the first one.
        let bin = |v: f32| (((v - self.bins.lo) * per_bin) as usize).min(BINS - 1);
        let (a, b) = (bin(exact), bin(rounded));
        self.bins.float[a] += 1;
        self.bins.rounded[b] += 1;
        let (x, y) = (f64::from(exact), f64::from(rounded));
        self.dot += x * y;
        self.float += x * x;
        self.rounded += y * y;
        self.noise += (x - y) * (x - y);
        self.count += 1;
        let half = 0.5 * self.step;
        self.saturated += u64::from(exact < self.reach[0] - half || exact > self.reach[1] + half);
        self.max_error = self.max_error.max((exact - rounded).abs());
        self.range = [self.range[0].min(exact), self.range[1].max(exact)];
    }

    pub(crate) fn figures(self) -> Figures {
        let count = self.count.max(1) as f64;
        let norm = (self.float * self.rounded).sqrt();
        Figures {
            count: self.count,
            mse: self.noise / count,
            sqnr_db: decibels(self.float, self.noise),
            cosine: if norm > 0.0 { self.dot / norm } else { f64::from(u8::from(self.float == self.rounded)) },
            max_error: self.max_error,
            range: if self.count > 0 { self.range } else { [0.0; 2] },
            reach: self.reach,
            saturated: self.saturated as f64 / count,
            histogram: self.bins,
        }
    }
}

fn decibels(signal: f64, noise: f64) -> Option<f64> {
    (noise > 0.0 && signal > 0.0).then(|| 10.0 * (signal / noise).log10())
}

/// Channels that reach far beyond the median one, furthest first.
pub(crate) fn outliers(channels: &[ChannelRange]) -> Vec<Outlier> {
    let reach: Vec<f32> = channels.iter().map(|c| c.lo.abs().max(c.hi.abs())).collect();
    let mut sorted = reach.clone();
    sorted.sort_by(f32::total_cmp);
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or_default();
    let far = reach.iter().enumerate().filter(|(_, r)| median > 0.0 && **r > OUTLIER * median);
    let mut found: Vec<Outlier> = far.map(|(channel, r)| Outlier { channel, times: r / median }).collect();
    found.sort_by(|a, b| b.times.total_cmp(&a.times));
    found.truncate(NAMED);
    found
}

pub(crate) fn widen(channel: &mut ChannelRange, value: f32) {
    *channel = ChannelRange { lo: channel.lo.min(value), hi: channel.hi.max(value) };
}

/// An activation that is looked at.
struct Watched {
    name: String,
    grid: IntGrid,
    params: QParams,
    sums: Sums,
    channels: Vec<ChannelRange>,
    /// Range, parameters, and noise of each observer.
    observers: Vec<(&'static str, Range, QParams, f64)>,
    /// Power of the values that observers are compared on.
    compared: f64,
}

impl Watched {
    fn new(name: &str, grid: IntGrid, params: QParams, seen: &Statistics) -> Result<Watched> {
        let (low, high) = grid.limits();
        let reach = [params.dequantize(low), params.dequantize(high)];
        let mut observers = Vec::new();
        for observer in OBSERVERS {
            let choice = Choice { observer, parameter: observer.parameter.map_or(0.0, |p| p.default) };
            let range = choice.range(name, seen, grid)?;
            observers.push((observer.name, range, grid.params(range), 0.0));
        }
        let range = seen.range();
        Ok(Watched {
            name: name.to_owned(),
            grid,
            params,
            sums: Sums::new(reach, params.scale, [range.lo, range.hi]),
            channels: Vec::new(),
            observers,
            compared: 0.0,
        })
    }

    fn observe(&mut self, tensor: &Tensor) -> Result<()> {
        let values = tensor.as_floats(&self.name)?;
        // Pictures have their channels second, everything else last.
        let axis = if tensor.dims.len() == 4 { 1 } else { tensor.dims.len().saturating_sub(1) };
        let count = tensor.dims.get(axis).copied().unwrap_or(1).max(1);
        let inner = tensor.dims.iter().skip(axis + 1).product::<usize>().max(1);
        self.channels.resize(count, ChannelRange { lo: f32::INFINITY, hi: f32::NEG_INFINITY });
        for (index, &value) in values.iter().enumerate() {
            self.sums.add(value, self.params.dequantize(self.grid.quantize(self.params, value)));
            widen(&mut self.channels[index / inner % count], value);
        }
        for &value in values.iter().step_by(values.len().div_ceil(COMPARED).max(1)) {
            self.compared += f64::from(value).powi(2);
            for (_, _, params, noise) in &mut self.observers {
                let rounded = params.dequantize(self.grid.quantize(*params, value));
                *noise += (f64::from(value) - f64::from(rounded)).powi(2);
            }
        }
        Ok(())
    }

    fn figures(self) -> ActivationFigures {
        let observers = self.observers.into_iter().map(|(name, range, _, noise)| ObservedRange {
            observer: name.to_owned(),
            range: [range.lo, range.hi],
            sqnr_db: decibels(self.compared, noise),
        });
        ActivationFigures {
            tensor: self.name,
            scale: self.params.scale,
            zero_point: self.params.zero_point,
            figures: self.sums.figures(),
            outliers: outliers(&self.channels),
            channels: self.channels,
            observers: observers.collect(),
        }
    }
}

/// Looks at every tensor with a scale of its own, and at every quantized weight. Observers see `calib`, all else is of
/// `data`. `progress` is called after each sample of both.
///
/// # Errors
/// A sample that can't be read or run, values that aren't finite, or the wish to stop.
pub fn numbers(
    prepared: &Prepared,
    calib: &Data,
    data: &Data,
    options: &CalibrateOptions,
    progress: &mut dyn FnMut(),
) -> Result<(Vec<ActivationFigures>, Vec<WeightFigures>)> {
    let Prepared { model, plan, .. } = prepared;
    let quantized = prepared.quantize()?;
    let observed = plan.observed();
    let wanted = Wanted { tensors: observed.clone(), ..Wanted::default() };
    let seen = observe(model, wanted, calib, true, options, progress)?;
    let after = Graph::new(quantized.graph())?;
    let mut watched = Vec::new();
    for name in &observed {
        if let (Some(params), Some(statistics)) = (params(&after, name)?, seen.tensors.get(name)) {
            watched.push(Watched::new(name, plan.settings.activation, params, statistics)?);
        }
    }
    let made: Vec<String> = watched
        .iter()
        .map(|w| w.name.clone())
        .filter(|name| !model.graph().input.iter().any(|i| i.name() == name))
        .collect();
    let runner = Rten::new(model, &made, options.threads)?;
    data.each(&mut |sample, _| {
        if options.stop.load(Ordering::Relaxed) {
            return Err(nibble_quant::QuantError::Stopped.into());
        }
        let results = runner.run(&sample, &made)?;
        let mut values: BTreeMap<&str, &Tensor> = made.iter().map(String::as_str).zip(&results).collect();
        values.extend(sample.iter().map(|(name, tensor)| (name.as_str(), tensor)));
        watched.par_iter_mut().try_for_each(|w| match values.get(w.name.as_str()) {
            Some(tensor) => w.observe(tensor),
            None => Err(ModelError::Graph { what: w.name.clone(), why: "isn't made by the graph".into() }),
        })?;
        progress();
        Ok(true)
    })?;
    let activations = watched.into_iter().map(Watched::figures).collect();
    Ok((activations, weights(prepared, &quantized)?))
}

fn weights(prepared: &Prepared, quantized: &Model) -> Result<Vec<WeightFigures>> {
    let rounded = weights_alone(&prepared.model, quantized, &prepared.plan)?;
    let (before, after) = (Graph::new(prepared.model.graph())?, Graph::new(rounded.graph())?);
    let mut found = Vec::new();
    for layer in super::layers(&before, &prepared.plan) {
        let node = before.node(layer.id);
        let (Some(float), Some(other)) = (before.constant(node.arg(1)), after.constant(after.node(layer.id).arg(1)))
        else {
            continue;
        };
        let layout = Layout::of(node);
        let (([n, k], exact), (_, rounded)) = (rows(float, layout)?, rows(other, layout)?);
        let none = ChannelRange { lo: f32::INFINITY, hi: f32::NEG_INFINITY };
        let ends = |values: &[f32]| {
            values.iter().fold(none, |mut c, &v| {
                widen(&mut c, v);
                c
            })
        };
        let (whole, reach) = (ends(&exact), ends(&rounded));
        // Steps differ from channel to channel; symmetric ones cut nothing off but by rounding.
        let mut sums = Sums::new([reach.lo, reach.hi], 2.0 * reach.hi.max(-reach.lo) / 254.0, [whole.lo, whole.hi]);
        exact.iter().zip(&rounded).for_each(|(&a, &b)| sums.add(a, b));
        let channels: Vec<ChannelRange> = (0..n).map(|row| ends(&exact[row * k..(row + 1) * k])).collect();
        found.push(WeightFigures {
            node: layer.node,
            tensor: float.name().to_owned(),
            shape: layer.shape,
            figures: sums.figures(),
            outliers: outliers(&channels),
            channels,
        });
    }
    Ok(found)
}
