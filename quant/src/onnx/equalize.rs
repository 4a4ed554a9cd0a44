//! Equalization: channels of an activation brought to like ranges, by factors that the weights around it take up.
//!
//! ```text
//! layer or layer norm --(1 / s_c)--> x_c / s_c  --> [Relu, Add, pooling, ...] --> layer (W[:, c] * s_c)
//! ```
//! The float function stays what it was. A tensor of 8-bit integers with one scale loses its small channels beside a
//! large one; weights have a scale an output channel, so that what a producer takes up costs nothing, and what a
//! consumer takes up costs a little. How much goes where is chosen by the error that is expected of both (after
//! SmoothQuant, arXiv 2211.10438, and cross-layer equalization, arXiv 1906.04721, which fix it).

mod sites;

pub use sites::{Axis, Consumer, Producer, Site, sites};

use super::Edit;
use super::proto::*;
use super::tensor::{floats, from_f32, tensor_error};
use super::{Graph, Model, apply};
use crate::error::Result;
use std::collections::BTreeMap;

/// What was seen of a tensor's channels.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ChannelStatistics {
    /// The largest magnitude of each channel.
    pub absmax: Vec<f32>,
    /// The second moment of each channel.
    pub moments: Vec<f32>,
}

/// Shares of the range that consumers take up, tried in this order; the first of equals is kept.
const SHARES: [f64; 11] = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];
/// The largest factor between a channel and the geometric mean of all.
const LARGEST: f64 = 1e3;

/// Equalizes a folded model's channels; what was seen of each site's tensors is given by name. How many sites changed.
///
/// # Errors
/// Weights whose bytes don't fit their shape, or that aren't finite.
pub fn equalize(model: &mut Model, seen: &BTreeMap<String, ChannelStatistics>) -> Result<usize> {
    let mut changed = 0;
    let found = sites(&Graph::new(model.graph())?);
    for site in &found {
        // One site's consumer may be another's producer: each sees the weights that those before it left.
        let graph = Graph::new(model.graph())?;
        let Some(factors) = factors(&graph, site, seen)? else { continue };
        let edits = edits(&graph, site, &factors)?;
        apply(model.graph_mut(), edits)?;
        changed += 1;
    }
    Ok(changed)
}

fn weight<'a>(graph: &Graph<'a>, name: &str) -> Result<(&'a TensorProto, Vec<f32>)> {
    let Some(tensor) = graph.constant(name) else {
        return Err(crate::QuantError::Tensor { name: name.into(), why: "isn't a constant".into() });
    };
    let values = floats(tensor)?;
    match values.iter().find(|v| !v.is_finite()) {
        Some(bad) => Err(tensor_error(tensor, format!("has a value {bad}"))),
        None => Ok((tensor, values)),
    }
}

/// A consumer's weights by input channel: for each output, its weights by channel, `taps` of each.
struct Read {
    /// Squares summed over outputs, by channel.
    energy: Vec<f64>,
    /// For each output row, the largest magnitude by channel.
    rows: Vec<Vec<f32>>,
}

fn read(graph: &Graph, consumer: &Consumer, channels: usize) -> Result<Read> {
    let (tensor, values) = weight(graph, consumer.weight())?;
    let mut read = Read { energy: vec![0.0; channels], rows: Vec::new() };
    let outputs = consumer.outputs(tensor);
    read.rows.resize(outputs, vec![0.0; channels]);
    for (index, &w) in values.iter().enumerate() {
        let (output, channel) = consumer.place(tensor, index);
        read.energy[channel] += f64::from(w) * f64::from(w);
        let largest = &mut read.rows[output][channel];
        *largest = largest.max(w.abs());
    }
    Ok(read)
}

/// The factor of each channel, or none if leaving them alone is expected to be as good.
fn factors(graph: &Graph, site: &Site, seen: &BTreeMap<String, ChannelStatistics>) -> Result<Option<Vec<f64>>> {
    let n = site.channels;
    let mut statistics: Vec<&ChannelStatistics> = Vec::new();
    for tensor in &site.tensors {
        match seen.get(tensor) {
            Some(s) if s.absmax.len() == n && s.moments.len() == n && s.absmax.iter().all(|v| v.is_finite()) => {
                statistics.push(s);
            }
            _ => return Ok(None),
        }
    }
    let mut consumers = Vec::new();
    for consumer in &site.consumers {
        let at = site.tensors.iter().position(|t| *t == consumer.reads);
        let Some(at) = at else { return Ok(None) };
        consumers.push((statistics[at], read(graph, consumer, n)?, consumer.is_depthwise()));
    }
    let largest: Vec<f64> =
        (0..n).map(|c| statistics.iter().map(|s| f64::from(s.absmax[c])).fold(0.0, f64::max)).collect();
    let of_weights: Vec<f64> = (0..n)
        .map(|c| consumers.iter().flat_map(|(_, r, _)| &r.rows).map(|row| f64::from(row[c])).fold(0.0, f64::max))
        .collect();
    let mut best: Option<(f64, Vec<f64>)> = None;
    for share in std::iter::once(None).chain(SHARES.into_iter().map(Some)) {
        let raw: Vec<f64> = match share {
            None => vec![1.0; n],
            Some(a) => (0..n)
                .map(|c| match largest[c] > 0.0 && of_weights[c] > 0.0 {
                    true => largest[c].powf(a) / of_weights[c].powf(1.0 - a),
                    false => 1.0,
                })
                .collect(),
        };
        let mean = (raw.iter().map(|f| f.ln()).sum::<f64>() / n as f64).exp();
        let scaled = |f: &f64| if share.is_none() { 1.0 } else { (f / mean).clamp(1.0 / LARGEST, LARGEST) };
        let factors: Vec<f64> = raw.iter().map(scaled).collect();
        let error: f64 = consumers.iter().map(|(s, r, depthwise)| expected(s, r, *depthwise, &factors)).sum();
        if best.as_ref().is_none_or(|(least, _)| error < *least) {
            best = Some((error, factors));
        }
    }
    Ok(best.map(|(_, factors)| factors).filter(|f| f.iter().any(|&f| f != 1.0)))
}

/// The expected squared error of a consumer's output with 8-bit activations of one scale and weights of one scale an
/// output channel: a step's square over 12 for every rounded number, times what it is multiplied by.
fn expected(seen: &ChannelStatistics, read: &Read, depthwise: bool, factors: &[f64]) -> f64 {
    let reach = seen.absmax.iter().zip(factors).map(|(&m, f)| f64::from(m) / f).fold(0.0, f64::max);
    let activation_step = reach / 127.0;
    let through: f64 = read.energy.iter().zip(factors).map(|(e, f)| e * f * f).sum();
    let activations = activation_step * activation_step / 12.0 * through;
    let moment: Vec<f64> = seen.moments.iter().zip(factors).map(|(&m, f)| f64::from(m) / (f * f)).collect();
    let all: f64 = moment.iter().sum();
    let weights: f64 = read
        .rows
        .iter()
        .enumerate()
        .map(|(output, row)| {
            let reach = row.iter().zip(factors).map(|(&m, f)| f64::from(m) * f).fold(0.0, f64::max);
            let step = reach / 127.0;
            step * step / 12.0 * if depthwise { moment[output] } else { all }
        })
        .sum();
    activations + weights
}

fn edits(graph: &Graph, site: &Site, factors: &[f64]) -> Result<Vec<Edit>> {
    let mut edits = Vec::new();
    let mut write = |tensor: &TensorProto, values: Vec<f32>| {
        let dims: Vec<usize> = tensor.dims.iter().map(|&d| d.max(0) as usize).collect();
        edits.push(Edit::Initializer(from_f32(tensor.name(), &dims, &values)));
    };
    for producer in &site.producers {
        for (name, channel) in producer.parts() {
            let (tensor, mut values) = weight(graph, name)?;
            for (index, value) in values.iter_mut().enumerate() {
                *value = (f64::from(*value) / factors[channel(tensor, index)]) as f32;
            }
            write(tensor, values);
        }
    }
    for consumer in &site.consumers {
        let (tensor, mut values) = weight(graph, consumer.weight())?;
        for (index, value) in values.iter_mut().enumerate() {
            *value = (f64::from(*value) * factors[consumer.place(tensor, index).1]) as f32;
        }
        write(tensor, values);
    }
    Ok(edits)
}
