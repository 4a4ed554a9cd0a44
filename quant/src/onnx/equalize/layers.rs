//! Cross-layer equalization (arXiv 1906.04721, section 4.1): channels of two layers brought to like ranges of *weights*, for
//! weights that have one scale a tensor.
//!
//! ```text
//! W1[c] / s_c,  b1[c] / s_c  --> [Relu, ReLU6, Add, ...] -->  W2[:, c] * s_c        s_c = sqrt(max |W1[c]| / max |W2[:, c]|)
//! ```
//! A ReLU6 is no obstacle where it does nothing: a channel that stays below 6 in all samples may be scaled as far as it
//! still does, with some room; one that reaches 6 is left alone. Nor does a channel ever reach beyond the largest one of
//! its tensor, whose activations have one scale too.

use super::sites::{self, Site};
use super::{ChannelStatistics, edits, read, weight};
use crate::error::Result;
use crate::onnx::weights::Rounding;
use crate::onnx::{Graph, Model, apply};
use std::collections::BTreeMap;

/// Passes over all sites: each moves what its neighbours left.
const SWEEPS: usize = 20;
/// Factors closer to one than this change nothing worth having.
const LEAST: f64 = 1e-3;
/// The largest factor between what a channel was and what it becomes.
const LARGEST: f64 = 1e3;
/// What a channel's largest value is multiplied by before it is compared with a Clip: other samples go further.
const ROOM: f64 = 1.25;

/// Tensors whose channels have to be known: by name, and where the channels are.
pub fn tensors(graph: &Graph) -> BTreeMap<String, super::Axis> {
    let sites = sites::through_clips(graph);
    sites.into_iter().flat_map(|s| s.tensors.into_iter().map(move |t| (t, s.axis))).collect()
}

/// Equalizes a folded model's layers; how many sites changed. The float function is what it was on the samples seen, but for
/// rounding.
///
/// # Errors
/// Weights whose bytes don't fit their shape, or that aren't finite.
pub fn equalize_layers(model: &mut Model, seen: &BTreeMap<String, ChannelStatistics>) -> Result<usize> {
    let found = sites::through_clips(&Graph::new(model.graph())?);
    let mut whole: Vec<Vec<f64>> = found.iter().map(|site| vec![1.0; site.channels]).collect();
    let bounds: Vec<Option<Vec<[f64; 2]>>> = found.iter().map(|site| bounds(site, seen)).collect();
    for _ in 0..SWEEPS {
        let mut moved = 0.0f64;
        for ((site, whole), bounds) in found.iter().zip(&mut whole).zip(&bounds) {
            let Some(bounds) = bounds else { continue };
            let graph = Graph::new(model.graph())?;
            let Some(wanted) = balance(&graph, site)? else { continue };
            let mut factors = Vec::with_capacity(site.channels);
            for ((factor, so_far), [least, most]) in wanted.iter().zip(whole.iter_mut()).zip(bounds) {
                let next = (*so_far * factor).clamp(*least, *most);
                factors.push(next / *so_far);
                moved = moved.max((next / *so_far).ln().abs());
                *so_far = next;
            }
            let edits = edits(&graph, site, &factors)?;
            apply(model.graph_mut(), edits)?;
        }
        if moved < LEAST {
            break;
        }
    }
    Ok(whole.iter().filter(|f| f.iter().any(|f| (f - 1.0).abs() > LEAST)).count())
}

/// What an error of each output channel costs where it is read, by weight: the sum of the squares of what it is multiplied
/// by, each times what an error there costs. All costs of a weight have a mean of 1. Nothing where each channel has a scale
/// of its own, to which the others are nothing.
///
/// # Errors
/// As [`equalize_layers`].
pub fn costs(graph: &Graph, how: Rounding) -> Result<BTreeMap<String, Vec<f64>>> {
    let mut found: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    if how.per_channel {
        return Ok(found);
    }
    let place = |weight: &str| graph.consumers(weight).first().map(|&(id, _)| id);
    let sites = sites::through_clips(graph);
    let mut makers = Vec::new();
    for site in &sites {
        let weights = site.producers.iter().filter_map(|p| p.matrix());
        makers.extend(weights.map(|(weight, _)| (place(weight), weight, site)));
    }
    // Backwards, so that what an error at a reader costs is known.
    makers.sort_by_key(|(id, ..)| std::cmp::Reverse(*id));
    for (id, name, site) in makers {
        let mut costs = vec![0.0; site.channels];
        // Of a sum, those read it who come after this part of it.
        for consumer in site.consumers.iter().filter(|c| place(c.weight()) > id) {
            let (tensor, values) = weight(graph, consumer.weight())?;
            let further = found.get(consumer.weight());
            for (index, &w) in values.iter().enumerate() {
                let (output, channel) = consumer.place(tensor, index);
                let cost = further.and_then(|costs| costs.get(output)).copied().unwrap_or(1.0);
                costs[channel] += f64::from(w) * f64::from(w) * cost;
            }
        }
        let mean = costs.iter().sum::<f64>() / site.channels.max(1) as f64;
        if mean > 0.0 {
            costs.iter_mut().for_each(|cost| *cost /= mean);
            found.insert(name.to_owned(), costs);
        }
    }
    Ok(found)
}

/// How little and how much a channel may be divided by in all; none if its tensors weren't seen.
fn bounds(site: &Site, seen: &BTreeMap<String, ChannelStatistics>) -> Option<Vec<[f64; 2]>> {
    let all: Option<Vec<&ChannelStatistics>> = site.tensors.iter().map(|name| seen.get(name)).collect();
    let all = all?.into_iter().filter(|s| s.ranges.len() == site.channels).collect::<Vec<_>>();
    if all.len() != site.tensors.len() {
        return None;
    }
    let reach = |c: usize| all.iter().map(|s| f64::from(s.ranges[c].absmax())).fold(0.0, f64::max);
    let above = |c: usize| all.iter().map(|s| f64::from(s.ranges[c].hi)).fold(0.0, f64::max);
    let largest = (0..site.channels).map(reach).fold(0.0, f64::max);
    if !largest.is_finite() {
        return None;
    }
    let bound = |c: usize| match site.ceiling.map(f64::from) {
        Some(ceiling) if above(c) * ROOM >= ceiling => [1.0, 1.0],
        Some(ceiling) => [(above(c) * ROOM / ceiling).max(1.0 / LARGEST), LARGEST],
        None if largest > 0.0 => [(reach(c) / largest).clamp(1.0 / LARGEST, 1.0), LARGEST],
        None => [1.0, 1.0],
    };
    Some((0..site.channels).map(bound).collect())
}

/// The factors that make both sides' largest weights of each channel alike; none where no weight is before the tensor.
fn balance(graph: &Graph, site: &Site) -> Result<Option<Vec<f64>>> {
    let n = site.channels;
    let (mut before, mut after) = (vec![0f32; n], vec![0f32; n]);
    let mut weighted = false;
    for producer in &site.producers {
        // Norms and biases alone are no matrix that is rounded.
        let Some((name, channel)) = producer.matrix() else { continue };
        let (tensor, values) = weight(graph, name)?;
        weighted = true;
        for (index, value) in values.iter().enumerate() {
            let largest = &mut before[channel(tensor, index)];
            *largest = largest.max(value.abs());
        }
    }
    for consumer in &site.consumers {
        for row in read(graph, consumer, n)?.rows {
            after.iter_mut().zip(row).for_each(|(largest, value)| *largest = largest.max(value));
        }
    }
    let factor = |(&a, &b): (&f32, &f32)| match a > 0.0 && b > 0.0 {
        true => (f64::from(a) / f64::from(b)).sqrt(),
        false => 1.0,
    };
    Ok(weighted.then(|| before.iter().zip(&after).map(factor).collect()))
}
