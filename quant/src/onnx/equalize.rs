//! Equalization: channels of an activation brought to like ranges, by factors that the weights around it take up.
//!
//! ```text
//! layer or layer norm --(1 / s_c)--> x_c / s_c  --> [Relu, Add, pooling, ...] --> layer (W[:, c] * s_c)
//! ```
//! Where nothing before it can take up a factor (a GELU, a norm that a residual reads too), a product by a constant is
//! put in if it spares half of the error. The float function stays what it was. A tensor of 8-bit integers with one scale loses its small channels beside a
//! large one; weights have a scale an output channel, so that what a producer takes up costs nothing, and what a
//! consumer takes up costs a little. How much goes where is chosen by the error that is expected of both (after
//! SmoothQuant, arXiv 2211.10438, and cross-layer equalization, arXiv 1906.04721, which fix it).

pub mod absorb;
pub mod layers;
mod sites;

pub use sites::{Axis, Consumer, Producer, Site, sites};

use super::Edit;
use super::graph::fresh;
use super::proto::*;
use super::tensor::{floats, from_f32, tensor_error};
use super::{Graph, Model, apply};
use crate::Range;
use crate::error::Result;
use std::collections::{BTreeMap, BTreeSet};

/// What was seen of a tensor's channels.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ChannelStatistics {
    /// Smallest and largest value of each channel, zero included.
    pub ranges: Vec<Range>,
    /// The second moment of each channel.
    pub moments: Vec<f32>,
}

/// Shares of the range that consumers take up, tried in this order; the first of equals is kept.
const SHARES: [f64; 11] = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];
/// The largest factor between a channel and the geometric mean of all.
const LARGEST: f64 = 1e3;

/// A tensor whose channels were divided.
#[derive(Debug, Clone, PartialEq)]
pub struct Scaled {
    /// Its name now.
    pub tensor: String,
    /// The tensor that was looked at: itself, or the one that a new product by a constant reads.
    pub of: String,
    /// What each channel was divided by.
    pub by: Vec<f64>,
}

/// A product by a constant is worth its time if it leaves at most this share of the expected error.
const WORTH: f64 = 0.5;

/// Equalizes a folded model's channels; what was seen of tensors is given by name. `fine` are tensors whose own rounding
/// costs next to nothing: no product by a constant is put in behind them. The tensors that changed, or came to be.
///
/// # Errors
/// Weights whose bytes don't fit their shape, or that aren't finite.
pub fn equalize(
    model: &mut Model,
    seen: &BTreeMap<String, ChannelStatistics>,
    fine: &BTreeSet<String>,
) -> Result<Vec<Scaled>> {
    let mut changed = Vec::new();
    let found = sites(&Graph::new(model.graph())?);
    for site in &found {
        // One site's consumer may be another's producer: each sees the weights that those before it left.
        let graph = Graph::new(model.graph())?;
        let Some((factors, _)) = factors(&graph, site, seen)? else { continue };
        let edits = edits(&graph, site, &factors)?;
        apply(model.graph_mut(), edits)?;
        let scaled = |t: &String| Scaled { tensor: t.clone(), of: t.clone(), by: factors.clone() };
        changed.extend(site.tensors.iter().map(scaled));
    }
    let tensors = found.into_iter().flat_map(|site| site.tensors);
    let taken: BTreeSet<String> = tensors.chain(fine.iter().cloned()).collect();
    for site in sites::unscaled(&Graph::new(model.graph())?, &taken) {
        let graph = Graph::new(model.graph())?;
        let Some((factors, left)) = factors(&graph, &site, seen)? else { continue };
        let Some(of) = site.tensors.first().filter(|_| left <= WORTH) else { continue };
        let mut names = graph.names();
        let [constant, node, tensor] =
            ["factors", "Equalize", "equalized"].map(|part| fresh(&mut names, &format!("{of}_{part}")));
        let mut edits = edits(&graph, &site, &factors)?;
        let reciprocals: Vec<f32> = factors.iter().map(|f| (1.0 / f) as f32).collect();
        edits.push(Edit::Initializer(from_f32(&constant, &[reciprocals.len()], &reciprocals)));
        edits.push(Edit::Add(NodeProto::new("Mul", &node, &[of, &constant], &[&tensor])));
        for &(id, slot) in graph.consumers(of) {
            if site.consumers.iter().any(|c| c.weight() == graph.node(id).arg(1)) {
                edits.push(Edit::Input { node: id, slot, to: tensor.clone() });
            }
        }
        let scaled = Scaled { tensor, of: of.clone(), by: factors };
        apply(model.graph_mut(), edits)?;
        changed.push(scaled);
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

/// The factor of each channel and the share of the expected error that is left; none if leaving them alone is expected
/// to be as good.
fn factors(graph: &Graph, site: &Site, seen: &BTreeMap<String, ChannelStatistics>) -> Result<Option<(Vec<f64>, f64)>> {
    let n = site.channels;
    let mut statistics: Vec<&ChannelStatistics> = Vec::new();
    for tensor in &site.tensors {
        match seen.get(tensor) {
            Some(s)
                if s.ranges.len() == n && s.moments.len() == n && s.ranges.iter().all(|r| r.absmax().is_finite()) =>
            {
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
        (0..n).map(|c| statistics.iter().map(|s| f64::from(s.ranges[c].absmax())).fold(0.0, f64::max)).collect();
    let of_weights: Vec<f64> = (0..n)
        .map(|c| consumers.iter().flat_map(|(_, r, _)| &r.rows).map(|row| f64::from(row[c])).fold(0.0, f64::max))
        .collect();
    let mut best: Option<(f64, Vec<f64>)> = None;
    let mut before = 0.0;
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
        if share.is_none() {
            before = error;
        }
        if best.as_ref().is_none_or(|(least, _)| error < *least) {
            best = Some((error, factors));
        }
    }
    Ok(best.filter(|(_, f)| f.iter().any(|&f| f != 1.0)).map(|(left, factors)| (factors, left / before)))
}

/// The expected squared error of a consumer's output with 8-bit activations of one scale and weights of one scale an
/// output channel: a step's square over 12 for every rounded number, times what it is multiplied by.
fn expected(seen: &ChannelStatistics, read: &Read, depthwise: bool, factors: &[f64]) -> f64 {
    let end = |of: fn(&Range) -> f32| {
        seen.ranges.iter().zip(factors).map(|(r, f)| f64::from(of(r)).abs() / f).fold(0.0, f64::max)
    };
    let activation_step = (end(|r| r.lo) + end(|r| r.hi)) / 255.0;
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
