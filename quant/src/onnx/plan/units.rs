//! Which candidates end up in integers: the largest set in which every node that needs integer neighbours has them.

use super::{Clip, Decision, Kind, Mode, Settings, Target, kinds};
use crate::Range;
use crate::error::Result;
use crate::onnx::Graph;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// The outcome.
pub(super) struct Units {
    pub(super) decisions: Vec<Decision>,
    pub(super) scales: BTreeMap<String, String>,
    pub(super) fixed: BTreeMap<String, Range>,
    pub(super) clips: BTreeMap<String, Clip>,
    pub(super) made: BTreeSet<String>,
    pub(super) outputs: BTreeMap<usize, String>,
}

pub(super) fn resolve(graph: &Graph, mut candidates: Vec<Result<Kind, String>>, settings: &Settings) -> Result<Units> {
    let mut merged: HashMap<usize, (usize, Clip)> = HashMap::new();
    if settings.mode == Mode::Static {
        for (id, node) in graph.nodes() {
            // Only what stands right before the Clip can have its range; a MatMul's bias stands between.
            let can = match &candidates[id] {
                Ok(Kind::Conv | Kind::MatMul) => true,
                Ok(Kind::Linear { .. }) => node.is("Gemm"),
                Ok(Kind::Join) => node.is("Add"),
                _ => false,
            };
            if let Some(next) = graph.sole_consumer(node.out()).filter(|_| can)
                && let Some(clip) = kinds::clip(graph, graph.node(next))?
            {
                merged.insert(id, (next, clip));
            }
        }
    }
    let output = |id: usize| merged.get(&id).map_or(graph.node(id).out(), |&(next, _)| graph.node(next).out());
    // Everything starts as wished for, and falls when a neighbour that it needs has fallen.
    let mut integer: Vec<bool> = candidates.iter().map(Result::is_ok).collect();
    let mut quantizes: Vec<bool> = candidates.iter().map(Result::is_ok).collect();
    loop {
        let mut made: BTreeSet<&str> = BTreeSet::new();
        for (id, node) in graph.nodes().filter(|(id, _)| integer[*id] && quantizes[*id]) {
            made.insert(output(id));
            if candidates[id] == Ok(Kind::Pass) {
                made.extend(node.output.iter().map(String::as_str));
            }
        }
        // Whether integers are wanted of a tensor, by whom it is read.
        let wants = |tensor: &str| {
            graph.consumers(tensor).iter().map(|&(reader, slot)| match &candidates[reader] {
                Ok(kind) if integer[reader] => kind.data_slots(graph.node(reader)).contains(&slot),
                _ => false,
            })
        };
        let (mut unquantized, mut fallen) = (Vec::new(), Vec::new());
        for (id, node) in graph.nodes() {
            let Ok(kind) = &candidates[id] else { continue };
            if !integer[id] {
                continue;
            }
            let out = output(id);
            match kind {
                // No integer Conv without an output in integers. One between floats (the patches of a transformer) would
                // round what everything after it adds to, and save next to nothing.
                Kind::Conv => {
                    let lonely = !made.contains(node.arg(0)) && !wants(out).any(|w| w) && graph.is_private(out);
                    if lonely && settings.mode == Mode::Static && settings.include.is_empty() {
                        fallen.push(id);
                    }
                }
                Kind::Linear { .. } | Kind::MatMul => {
                    let inner = !graph.consumers(out).is_empty() && graph.is_private(out);
                    // ONNX Runtime has integer Gemms with floats out only where the graph ends.
                    let wanted = wants(out).all(|w| w)
                        || settings.mode == Mode::Static && settings.target == Target::OnnxRuntime;
                    if quantizes[id] && !(node.is("Gemm") && inner && wanted) {
                        unquantized.push(id);
                    }
                }
                Kind::Join | Kind::Pass => {
                    let mut given = kind.data_slots(node).map(|slot| node.arg(slot)).filter(|n| !n.is_empty());
                    let fed = given.all(|n| made.contains(n) || (*kind == Kind::Join && graph.constant(n).is_some()));
                    let read = node.output.iter().any(|n| wants(n).any(|w| w)) || wants(out).any(|w| w);
                    if !fed || !read || !graph.is_private(out) {
                        fallen.push(id);
                    }
                }
            }
        }
        if unquantized.is_empty() && fallen.is_empty() {
            break;
        }
        unquantized.into_iter().for_each(|id| quantizes[id] = false);
        fallen.into_iter().for_each(|id| integer[id] = false);
    }
    if settings.mode != Mode::Static {
        quantizes.iter_mut().for_each(|q| *q = false);
    }
    let mut units = Units {
        decisions: Vec::with_capacity(candidates.len()),
        scales: BTreeMap::new(),
        fixed: BTreeMap::new(),
        clips: BTreeMap::new(),
        made: BTreeSet::new(),
        outputs: BTreeMap::new(),
    };
    for (id, node) in graph.nodes().filter(|(id, _)| integer[*id]) {
        let Ok(kind) = candidates[id] else { continue };
        if settings.mode != Mode::Static {
            continue;
        }
        for slot in kind.data_slots(node) {
            let name = node.arg(slot);
            if !name.is_empty() && graph.constant(name).is_none() {
                units.scales.entry(name.to_owned()).or_insert_with(|| name.to_owned());
            }
        }
        if !quantizes[id] {
            continue;
        }
        let out = output(id).to_owned();
        if kind == Kind::Pass {
            let root = units.scales.get(node.arg(0)).cloned().unwrap_or_else(|| node.arg(0).to_owned());
            for name in node.output.iter().filter(|n| !n.is_empty()) {
                units.scales.insert(name.clone(), root.clone());
                units.made.insert(name.clone());
            }
        } else {
            units.scales.insert(out.clone(), out.clone());
            units.made.insert(out.clone());
            match node.op_type() {
                "Sigmoid" | "Softmax" => drop(units.fixed.insert(out.clone(), Range { lo: 0.0, hi: 1.0 })),
                _ => {}
            }
            if let Some((_, clip)) = merged.get(&id) {
                units.clips.insert(out.clone(), *clip);
            }
        }
        units.outputs.insert(id, out);
    }
    let gone: HashMap<usize, Clip> = merged
        .iter()
        .filter(|(id, _)| integer[**id] && quantizes[**id])
        .map(|(_, &(next, clip))| (next, clip))
        .collect();
    for (id, candidate) in candidates.iter_mut().enumerate() {
        units.decisions.push(match (gone.get(&id), candidate) {
            (Some(clip), _) => Decision::Merged(*clip),
            (None, Ok(kind)) if integer[id] => Decision::Quantized(*kind),
            (None, Ok(_)) => Decision::Float("its inputs or its readers are float".into()),
            (None, Err(why)) => Decision::Float(std::mem::take(why)),
        });
    }
    Ok(units)
}
