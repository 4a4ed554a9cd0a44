//! What each layer's integers cost, by computing only what comes after it.
//!
//! ```text
//! float model, once a sample:   x1 -> y1 -> ... x2 -> y2 -> ... -> outputs      and y1#, y2#: the layers in integers
//! then for each layer:               y1# -----> rest of the float model -> outputs
//! ```
//! and the other way round in the quantized model. Tensors of one sample a thread are in memory, whatever the number of
//! samples; sums are added in the samples' order, so that figures don't depend on the number of threads.

use super::layers::{Layer, layers, units};
use super::state::{State, digest};
use super::tally::Tally;
use super::{LayerSensitivity, Sources};
use crate::graph::{GraphRunner, Rten, Tensor, Values};
use crate::vision::data::{Data, Sample};
use crate::vision::prepare::Prepared;
use crate::{ModelError, Result};
use nibble_quant::onnx::branch::{Rest, in_float, in_integers, rest, rounded};
use nibble_quant::onnx::isolate::{activations_alone, weights_alone};
use nibble_quant::onnx::{Edit, Graph, Model, Selector, Settings, apply};
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Scores of the whole and of the layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Sensitivity {
    /// Samples seen.
    pub samples: usize,
    /// Weights, activations, both.
    pub sources: Sources,
    /// One a unit of layers.
    pub layers: Vec<LayerSensitivity>,
    /// The tallies behind `layers`: only, without.
    pub tallies: Vec<[Tally; 2]>,
}

/// How to look for what layers cost.
pub struct SensitivityOptions<'a> {
    /// The samples' classes, in their order.
    pub labels: Option<&'a [usize]>,
    /// Threads of the engine.
    pub threads: usize,
    /// Whether layers that read the same tensor are looked at one by one.
    pub apart: bool,
    /// If there are any, only these layers are looked at.
    pub only: &'a [Selector],
    /// Set when the user wants to stop.
    pub stop: &'a AtomicBool,
}

impl SensitivityOptions<'_> {
    /// The layers of a prepared model that are looked at, and together with which others.
    ///
    /// # Errors
    /// A pattern that fits no node.
    pub fn units(&self, prepared: &Prepared) -> Result<Vec<Vec<Layer>>> {
        let graph = Graph::new(prepared.model.graph())?;
        let mut found = layers(&graph, &prepared.plan);
        let mut wanted = BTreeSet::new();
        for pattern in self.only {
            wanted.extend(pattern.nodes(&graph, &prepared.folded)?);
        }
        found.retain(|layer| self.only.is_empty() || wanted.contains(&layer.id));
        Ok(units(found, self.apart))
    }
}

/// Tensors replaced by others, and what that changes.
struct Probe {
    /// What is replaced, and by what.
    replaced: Vec<[String; 2]>,
    rest: Rest,
}

impl Probe {
    fn new(graph: &Graph, replaced: Vec<String>, by: Vec<String>) -> Probe {
        let rest = rest(graph, &replaced);
        Probe { rest, replaced: replaced.into_iter().zip(by).map(|(from, to)| [from, to]).collect() }
    }
}

/// What a sample came to.
struct Ran {
    outputs: BTreeMap<String, Tensor>,
    /// One a probe.
    tallies: Vec<Tally>,
    /// Of what probes replace.
    shapes: Shapes,
}

/// A model with a branch a layer, loaded.
struct Side {
    runner: Rten,
    outputs: Vec<String>,
    kept: Vec<String>,
    probes: Vec<Probe>,
}

impl Side {
    /// For so many samples at a time.
    fn new(
        model: &Model,
        branches: Vec<(Vec<Edit>, Probe)>,
        outputs: &[String],
        [threads, samples]: [usize; 2],
    ) -> Result<Side> {
        let mut all = model.clone();
        let (edits, probes): (Vec<_>, Vec<_>) = branches.into_iter().unzip();
        apply(all.graph_mut(), edits.into_iter().flatten().collect())?;
        let given: BTreeSet<&str> = model.graph().input.iter().map(|i| i.name()).collect();
        let mut kept: BTreeSet<String> = outputs.iter().cloned().collect();
        for Probe { replaced, rest } in &probes {
            let needed = rest.feeds.iter().chain(replaced.iter().flatten());
            kept.extend(needed.filter(|name| !given.contains(name.as_str())).cloned());
        }
        let kept: Vec<String> = kept.into_iter().collect();
        let runner = Rten::packed(&all, &kept, threads)?.side_by_side(samples);
        Ok(Side { runner, outputs: outputs.to_vec(), kept, probes })
    }

    /// The outputs, and a tally a probe against `exact` (this model's own outputs if none are given).
    fn run(
        &self,
        sample: &Sample,
        exact: Option<&BTreeMap<String, Tensor>>,
        label: Option<usize>,
        progress: &(dyn Fn() + Sync),
    ) -> Result<Ran> {
        let made = self.runner.run(sample, &self.kept)?;
        let mut values: BTreeMap<&str, &Tensor> = self.kept.iter().map(String::as_str).zip(&made).collect();
        values.extend(sample.iter().map(|(name, tensor)| (name.as_str(), tensor)));
        let get = |name: &str| {
            let missing = || ModelError::Graph { what: name.to_owned(), why: "isn't made by the graph".into() };
            values.get(name).copied().ok_or_else(missing)
        };
        let own = self.outputs.iter().map(|name| Ok((name.clone(), get(name)?.clone())));
        let own = own.collect::<Result<BTreeMap<String, Tensor>>>()?;
        let exact = exact.unwrap_or(&own);
        let mut tallies = Vec::with_capacity(self.probes.len());
        for Probe { replaced, rest } in &self.probes {
            let mut feeds = Vec::with_capacity(replaced.len() + rest.feeds.len());
            let mut changed: BTreeMap<&str, &Tensor> = BTreeMap::new();
            for [from, by] in replaced {
                feeds.push((from.as_str(), get(by)?));
                // It may be an output of the graph itself.
                changed.insert(from, get(by)?);
            }
            for name in &rest.feeds {
                feeds.push((name.as_str(), get(name)?));
            }
            let wanted: Vec<String> =
                rest.outputs.iter().filter(|name| !changed.contains_key(name.as_str())).cloned().collect();
            let made = if wanted.is_empty() { Vec::new() } else { self.runner.run_borrowed(&feeds, &wanted)? };
            changed.extend(wanted.iter().map(String::as_str).zip(&made));
            let found: Vec<&Tensor> =
                own.iter().map(|(name, tensor)| changed.get(name.as_str()).copied().unwrap_or(tensor)).collect();
            tallies.push(tally(exact, &found, &self.outputs, label)?);
            progress();
        }
        let replaced = self.probes.iter().flat_map(|p| &p.replaced);
        let shapes = replaced.map(|[name, _]| Ok((name.clone(), get(name)?.dims.clone())));
        let shapes = shapes.collect::<Result<_>>()?;
        Ok(Ran { outputs: own, tallies, shapes })
    }
}

/// `found` are in the order of the map's names; the tally goes by the outputs' own order.
fn tally(
    exact: &BTreeMap<String, Tensor>,
    found: &[&Tensor],
    outputs: &[String],
    label: Option<usize>,
) -> Result<Tally> {
    let by_name: BTreeMap<&str, (&Tensor, &Tensor)> =
        exact.iter().zip(found).map(|((name, a), b)| (name.as_str(), (a, *b))).collect();
    let (a, b): (Vec<&Tensor>, Vec<&Tensor>) =
        outputs.iter().filter_map(|name| by_name.get(name.as_str()).copied()).unzip();
    Tally::of(outputs, &a, &b, label)
}

/// All models that samples run through.
struct Bench {
    float: Side,
    quantized: Side,
    alone: [Rten; 2],
    outputs: Vec<String>,
}

impl Bench {
    fn new(prepared: &Prepared, quantized: &Model, units: &[Vec<Layer>], many: [usize; 2]) -> Result<Bench> {
        let Prepared { model, folded, plan, calibration, .. } = prepared;
        let outputs: Vec<String> = model.graph().output.iter().map(|o| o.name().to_owned()).collect();
        let (graph, after) = (Graph::new(model.graph())?, Graph::new(quantized.graph())?);
        let (mut integers, mut floats) = (Vec::new(), Vec::new());
        for (index, unit) in units.iter().enumerate() {
            let ids: Vec<usize> = unit.iter().map(|layer| layer.id).collect();
            let branch = in_integers(model, &plan.settings, folded, calibration, &ids, &format!("only{index}:"))?;
            let replaced = unit.iter().map(|layer| layer.makes.clone()).collect();
            integers.push((branch.edits, Probe::new(&graph, replaced, branch.makes)));
            let branch = in_float(model, plan, &after, &ids, &format!("without{index}:"))?;
            let replaced = unit.iter().map(|layer| rounded(&after, plan, &layer.makes)).collect();
            floats.push((branch.edits, Probe::new(&after, replaced, branch.makes)));
        }
        let alone = [weights_alone(model, quantized, plan)?, activations_alone(model, quantized, plan)?];
        let [weights, activations] = alone;
        Ok(Bench {
            float: Side::new(model, integers, &outputs, many)?,
            quantized: Side::new(quantized, floats, &outputs, many)?,
            alone: [Rten::new(&weights, &outputs, many[0])?, Rten::new(&activations, &outputs, many[0])?],
            outputs,
        })
    }

    /// Weights, activations, both, then only and without for each layer.
    fn run(&self, sample: &Sample, label: Option<usize>, progress: &(dyn Fn() + Sync)) -> Result<Vec<Tally>> {
        let Ran { outputs: exact, tallies: only, .. } = self.float.run(sample, None, label, progress)?;
        let Ran { outputs: both, tallies: without, .. } = self.quantized.run(sample, Some(&exact), label, progress)?;
        let mut tallies = Vec::with_capacity(3 + 2 * only.len());
        for runner in &self.alone {
            let found = runner.run(sample, &self.outputs)?;
            let found: BTreeMap<&String, &Tensor> = self.outputs.iter().zip(&found).collect();
            tallies.push(tally(&exact, &found.into_values().collect::<Vec<_>>(), &self.outputs, label)?);
            progress();
        }
        tallies.push(tally(&exact, &both.values().collect::<Vec<_>>(), &self.outputs, label)?);
        tallies.extend(only.into_iter().zip(without).flat_map(|(a, b)| [a, b]));
        Ok(tallies)
    }
}

/// Steps of [`sensitivity`] a sample, with so many units.
pub fn steps(units: usize) -> u64 {
    2 + 2 * units as u64
}

/// What is in a sample, in short.
fn name(sample: &Sample, label: Option<usize>) -> String {
    let mut bytes = format!("{label:?}").into_bytes();
    for (name, tensor) in sample {
        bytes.extend(format!("{name} {:?}", tensor.dims).into_bytes());
        match &tensor.values {
            Values::Float(v) => bytes.extend(v.iter().flat_map(|x| x.to_le_bytes())),
            Values::Int(v) => bytes.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        }
    }
    digest(&[&bytes])
}

/// How many samples [`in_batches`] hands on for each thread: one may take longer than another.
const WAITING: usize = 4;

/// Calls `work` on samples, a few for each thread, in their order. `made` makes something of a sample and its number.
fn in_batches<T>(
    data: &Data,
    threads: usize,
    stop: &AtomicBool,
    made: &dyn Fn(Sample, usize) -> Result<T>,
    work: &mut dyn FnMut(Vec<T>) -> Result<()>,
) -> Result<usize> {
    let (mut batch, mut count) = (Vec::new(), 0);
    data.each(&mut |sample, _| {
        if stop.load(Ordering::Relaxed) {
            return Err(nibble_quant::QuantError::Stopped.into());
        }
        batch.push(made(sample, count)?);
        count += 1;
        if batch.len() == WAITING * threads.max(1) {
            work(std::mem::take(&mut batch))?;
        }
        Ok(true)
    })?;
    work(batch)?;
    Ok(count)
}

/// What `work` makes of each item, in their order, on so many threads. After an error none begins another one.
fn on_threads<T: Sync, R: Send>(items: &[T], threads: usize, work: impl Fn(&T) -> Result<R> + Sync) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let take = || {
        let mut made = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { return made };
            let result = work(item);
            if result.is_err() {
                next.store(items.len(), Ordering::Relaxed);
            }
            made.push((index, result));
        }
    };
    let mut all = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads.clamp(1, items.len().max(1))).map(|_| scope.spawn(take)).collect();
        let made = threads.into_iter().map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        made.flatten().collect::<Vec<_>>()
    });
    all.sort_by_key(|(index, _)| *index);
    all.into_iter().map(|(_, result)| result).collect()
}

/// Dimensions by tensor.
pub type Shapes = BTreeMap<String, Vec<usize>>;

/// What nodes cost alone in integers, each with settings of its own, and the shapes of what they make. `progress` is called
/// once a sample and node.
///
/// # Errors
/// As [`sensitivity`].
pub fn effects(
    prepared: &Prepared,
    cases: &[(usize, Settings)],
    data: &Data,
    threads: usize,
    stop: &AtomicBool,
    progress: &(dyn Fn() + Sync),
) -> Result<(Vec<Tally>, Shapes)> {
    let Prepared { model, folded, plan, calibration, .. } = prepared;
    let graph = Graph::new(model.graph())?;
    let outputs: Vec<String> = model.graph().output.iter().map(|o| o.name().to_owned()).collect();
    let mut branches = Vec::new();
    for (index, (id, settings)) in cases.iter().enumerate() {
        let made = plan.output(&graph, *id);
        let branch = in_integers(model, settings, folded, calibration, &[*id], &format!("only{index}:"))?;
        branches.push((branch.edits, Probe::new(&graph, vec![made], branch.makes)));
    }
    let side = Side::new(model, branches, &outputs, [threads, data.count()? as usize])?;
    let mut sums = vec![Tally::default(); cases.len()];
    let mut dims = BTreeMap::new();
    in_batches(data, threads, stop, &|sample, _| Ok(sample), &mut |batch: Vec<Sample>| {
        let found = on_threads(&batch, threads, |sample| side.run(sample, None, None, progress))?;
        for Ran { tallies, shapes, .. } in found {
            sums.iter_mut().zip(&tallies).for_each(|(sum, tally)| sum.add(tally));
            dims = shapes;
        }
        Ok(())
    })?;
    Ok((sums, dims))
}

/// Runs every sample through the models. `progress` is called [`steps`] times a sample, by any thread.
///
/// # Errors
/// A sample that can't be read or run, fewer labels than samples, a state of other models, or the wish to stop.
pub fn sensitivity(
    prepared: &Prepared,
    data: &Data,
    options: &SensitivityOptions,
    state: &mut State,
    progress: &(dyn Fn() + Sync),
) -> Result<Sensitivity> {
    let &SensitivityOptions { labels, threads, stop, .. } = options;
    let units = options.units(prepared)?;
    let quantized = prepared.quantize()?;
    let bench = Bench::new(prepared, &quantized, &units, [threads, data.count()? as usize])?;
    let cases = 3 + 2 * units.len();
    let named: Vec<Vec<&str>> = units.iter().map(|unit| unit.iter().map(|l| l.node.as_str()).collect()).collect();
    let models = [prepared.model.proto.encode_to_vec(), quantized.proto.encode_to_vec()];
    state.begin(&digest(&[&models[0], &models[1], format!("{named:?}").as_bytes()]))?;
    let state = Mutex::new(state);
    let held = || state.lock().unwrap_or_else(PoisonError::into_inner);
    let mut sums = vec![Tally::default(); cases];
    let labelled = |sample: Sample, index: usize| {
        let label = labels.map(|labels| {
            labels.get(index).copied().ok_or_else(|| ModelError::Setting {
                what: "labels".into(),
                why: format!("{} of them, there are more samples", labels.len()),
            })
        });
        let label = label.transpose()?;
        let name = name(&sample, label);
        Ok((sample, label, name))
    };
    let samples = in_batches(data, threads, stop, &labelled, &mut |batch: Vec<(Sample, Option<usize>, String)>| {
        let one = |(sample, label, name): &(Sample, Option<usize>, String)| {
            let known = held().get(name, cases).cloned();
            if let Some(known) = known {
                (0..steps(units.len())).for_each(|_| progress());
                return Ok(known);
            }
            if stop.load(Ordering::Relaxed) {
                return Err(nibble_quant::QuantError::Stopped.into());
            }
            let found = bench.run(sample, *label, progress)?;
            // At once, so that no sample's work is lost with another's.
            held().keep(vec![(name.clone(), found.clone())])?;
            Ok(found)
        };
        let found = on_threads(&batch, threads, one)?;
        for tallies in &found {
            sums.iter_mut().zip(tallies).for_each(|(sum, tally)| sum.add(tally));
        }
        Ok(())
    })?;
    let both = sums[2];
    let sources = Sources {
        weights: sums[0].score(),
        activations: sums[1].score(),
        both: both.score(),
        float_accuracy: (both.labelled > 0).then(|| both.right[0] as f64 / both.labelled as f64),
    };
    let tallies: Vec<[Tally; 2]> = sums[3..].as_chunks::<2>().0.to_vec();
    let row = |(unit, [only, without]): (Vec<Layer>, &[Tally; 2])| {
        let with = unit.iter().skip(1).map(|layer| layer.node.clone()).collect();
        let layer = unit.into_iter().next()?;
        Some(LayerSensitivity { layer, with, only: only.score(), without: without.score() })
    };
    let layers = units.into_iter().zip(&tallies).filter_map(row).collect();
    Ok(Sensitivity { samples, sources, layers, tallies })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_order_and_nothing_begins_after_an_error() {
        let items: Vec<u64> = (0..40).collect();
        for threads in [1, 3, 64] {
            // Later ones are done sooner.
            let slow = |&i: &u64| {
                std::thread::sleep(std::time::Duration::from_micros(50 * (40 - i)));
                Ok(2 * i)
            };
            let made = on_threads(&items, threads, slow).unwrap();
            assert_eq!(made, items.iter().map(|i| 2 * i).collect::<Vec<_>>(), "{threads} threads");
            let begun = AtomicUsize::new(0);
            let fail = |_: &u64| {
                begun.fetch_add(1, Ordering::Relaxed);
                Err::<(), _>(nibble_quant::QuantError::Stopped.into())
            };
            assert!(on_threads(&items, threads, fail).is_err());
            assert!(begun.into_inner() <= threads.min(items.len()), "{threads} threads");
        }
        assert!(on_threads(&items[..0], 2, |i| Ok(*i)).unwrap().is_empty());
    }
}
