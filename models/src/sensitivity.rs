//! What a model loses when some of its layers are quantized and the others aren't: measured, and spent on where bits go.
//!
//! With gradients in the statistics a layer's cost is read off them: half of the error on both sides, in nats. Without,
//! layers of one kind in one stretch of the model make a class. Each class is quantized alone, and the divergence of the
//! model's predictions from its own in floats is what the class costs. Within a class the cost goes by the layers' output
//! errors, and another precision changes it as it changes these; both are measured on a part of each layer's rows.

use crate::config::ModelConfig;
use crate::cpu::CpuBackend;
use crate::decoder::Decoder;
use crate::error::Result;
use crate::eval::{EvalPlan, Predictions};
use crate::weights::Weights;
use nibble_kernels::{ActKind, Pool};
use nibble_quant::format::source::{Dtype, Stored, TensorInfo, TensorSource, decode_rows};
use nibble_quant::recipe::allocate::{Offer, allocate};
use nibble_quant::stats::{Stats, Symmetric};
use nibble_quant::{AlgoInput, QuantError, QuantSpec, Recipe, Role, Rule, algo, presets};
use rayon::prelude::*;
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Stretches that the layers of a model are cut into.
const STRETCHES: usize = 6;
/// Rows of a layer that its errors are measured on.
const ROWS: usize = 96;
/// Schemes that a layer may get beside the one that was asked for, by bits.
const LADDER: &[&str] = &["int3-nl-g32-dq", "int4-nl-g32-dq", "int5-g32-dq", "int6-g32-dq", "int8-g32-dq"];

/// What an allocation is to meet.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// Bits that the linear layers' weights may take on average, with all that is stored for them.
    Bits(f64),
    /// Bytes that they may take together.
    Bytes(u64),
    /// Nats that they may be predicted to cost; as few bytes as meet them.
    Divergence(f64),
}

/// How bits are to be allocated.
#[derive(Debug, Clone)]
pub struct AllocationPlan<'a> {
    /// What is to be met.
    pub target: Target,
    /// The text that divergence is measured on, at least one chunk of it.
    pub tokens: &'a [u32],
    /// How it is cut up.
    pub eval: EvalPlan,
    /// Threads that models run on.
    pub threads: usize,
}

/// What was found and decided.
#[derive(Debug, Clone)]
pub struct Allocation {
    /// The recipe with a rule for each layer that doesn't get the scheme that was asked for.
    pub recipe: Recipe,
    /// Every layer that bits were allocated to, in the order of the file.
    pub layers: Vec<Allocated>,
    /// Bits a weight that they take.
    pub bits: f64,
    /// The divergence that all layers together are predicted to cause, in nats, if their errors don't meet.
    pub predicted: f64,
}

/// One layer's share.
#[derive(Debug, Clone)]
pub struct Allocated {
    /// Its name.
    pub name: String,
    /// What its class costs when it alone is quantized by the scheme that was asked for, in nats.
    pub class: f64,
    /// What the layer costs by the scheme it gets, in nats.
    pub cost: f64,
    /// The scheme it gets.
    pub scheme: String,
}

/// A linear layer, and what it may become.
struct Layer<'a> {
    info: &'a TensorInfo,
    class: (String, usize),
    /// Output error by the scheme that was asked for, and by each of the ladder's.
    own: f64,
    errors: Vec<f64>,
}

/// Measures classes and gives every layer that `recipe` would quantize by its own scheme for linear layers one of the
/// ladder. `progress` is told the classes done and of how many; it answers whether to go on.
///
/// # Errors
/// The model can't be run, no layer is left to the recipe's rule for linear layers, or the target is below what the
/// smallest schemes take.
pub fn allocate_bits(
    source: &dyn TensorSource,
    config: &ModelConfig,
    recipe: &Recipe,
    stats: &Stats,
    plan: &AllocationPlan,
    mut progress: impl FnMut(usize, usize) -> bool,
) -> Result<Allocation> {
    let refuse = |why: String| QuantError::Spec { what: plan.target.flag().into(), why };
    let at =
        recipe.rules.iter().position(|r| r.pattern.is_none() && r.role == Some(Role::Linear) && r.scheme.is_some());
    let at = at.ok_or_else(|| refuse("the recipe has no rule for linear layers".into()))?;
    let wanted = presets::by_name(recipe.rules[at].scheme.as_deref().unwrap_or_default())?;
    let mut ladder: Vec<_> = LADDER.iter().map(|name| presets::by_name(name)).collect::<Result<_, _>>()?;
    if !LADDER.contains(&wanted.name) {
        ladder.push(wanted);
    }
    let mut layers = Vec::new();
    for info in source.infos().iter().filter(|info| info.shape.len() == 2) {
        let first = recipe.rules.iter().position(|rule| rule.matches(&info.name, Role::of(&info.name, &info.shape)));
        if first == Some(at) {
            layers.push(Layer { info, class: class(&info.name, config.layers.len()), own: 0.0, errors: Vec::new() });
        }
    }
    if layers.is_empty() {
        return Err(refuse("no layer is quantized by the recipe's rule for linear layers".into()).into());
    }
    let weights: usize = layers.iter().map(|layer| layer.info.elements()).sum();
    let bytes = |layer: &Layer| {
        let (rows, cols) = layer.info.rows_cols();
        ladder.iter().map(move |preset| preset.scheme.weight.bytes([rows, cols])).collect::<Vec<u64>>()
    };
    let sum = |of: fn(Vec<u64>) -> Option<u64>| layers.iter().filter_map(|layer| of(bytes(layer))).sum::<u64>();
    let (least, most) = (sum(|each| each.into_iter().min()), sum(|each| each.into_iter().max()));
    let budget = match plan.target {
        Target::Bits(bits) => (bits * weights as f64 / 8.0) as u64,
        Target::Bytes(bytes) => bytes,
        Target::Divergence(_) => most,
    };
    let too_small = || {
        let (least, given) = (least as f64 * 8.0 / weights as f64, budget as f64 * 8.0 / weights as f64);
        refuse(format!("{given:.3} bits a weight; the smallest schemes take {least:.3}"))
    };
    if least > budget {
        return Err(too_small().into());
    }
    for layer in &mut layers {
        let specs = ladder.iter().map(|preset| &preset.scheme.weight);
        layer.own = output_error(source, layer.info, &wanted.scheme.weight, stats)?;
        layer.errors = specs.map(|spec| output_error(source, layer.info, spec, stats)).collect::<Result<_>>()?;
    }

    let in_nats = layers.iter().all(|layer| both_sides(layer.info, stats).is_some());
    let classes = match in_nats {
        true => costs_by_gradients(&layers),
        false => measured(source, config, &layers, &wanted.scheme.weight, stats, plan, &mut progress)?,
    };

    // What a unit of a layer's output error costs is its class's alone: layers without error have no share in it.
    let offers: Vec<Vec<Offer>> = layers
        .iter()
        .map(|layer| {
            let (cost, errors) = classes[&layer.class];
            let unit = if errors > 0.0 { cost.max(0.0) / errors } else { 0.0 };
            let offer = |(bytes, error): (u64, &f64)| Offer { bytes, loss: unit * error };
            bytes(layer).into_iter().zip(&layer.errors).map(offer).collect()
        })
        .collect();
    let chosen = match plan.target {
        Target::Divergence(nats) => least_that_meets(&offers, (least, most), nats)
            .ok_or_else(|| refuse(format!("{nats} nats; the largest schemes are predicted to cost more")))?,
        Target::Bits(_) | Target::Bytes(_) => allocate(&offers, budget).ok_or_else(too_small)?,
    };
    let (mut rules, mut allocated, mut taken) = (Vec::new(), Vec::new(), 0);
    for ((layer, offers), choice) in layers.iter().zip(&offers).zip(chosen) {
        taken += offers[choice].bytes;
        let (name, scheme) = (layer.info.name.clone(), ladder[choice].name.to_owned());
        if scheme != wanted.name {
            rules.push(Rule {
                pattern: Some(name.clone()),
                scheme: Some(scheme.clone()),
                algorithm: recipe.rules[at].algorithm.clone(),
                why: Some("allocated by what its layers were measured to cost".into()),
                ..Rule::default()
            });
        }
        allocated.push(Allocated { name, class: classes[&layer.class].0, cost: offers[choice].loss, scheme });
    }
    let mut recipe = recipe.clone();
    recipe.rules.splice(at..at, rules);
    let predicted = allocated.iter().map(|layer| layer.cost).sum();
    Ok(Allocation { recipe, layers: allocated, bits: taken as f64 * 8.0 / weights as f64, predicted })
}

/// Cost and output error of each class.
type Costs = BTreeMap<(String, usize), (f64, f64)>;

/// Each class alone, quantized by `spec`, against the model in floats.
fn measured(
    source: &dyn TensorSource,
    config: &ModelConfig,
    layers: &[Layer],
    spec: &QuantSpec,
    stats: &Stats,
    plan: &AllocationPlan,
    progress: &mut impl FnMut(usize, usize) -> bool,
) -> Result<Costs> {
    let pool = Arc::new(Pool::new(plan.threads));
    let load = |source: &dyn TensorSource| {
        Decoder::load(config, Weights::new(source), CpuBackend::new(Arc::clone(&pool), ActKind::F32))
    };
    let float = Predictions::of(&load(source)?, plan.tokens, plan.eval)?;
    let mut classes = Costs::new();
    for layer in layers {
        classes.entry(layer.class.clone()).or_default().1 += layer.own;
    }
    let count = classes.len();
    for (done, (class, (cost, _))) in classes.iter_mut().enumerate() {
        let members = layers.iter().filter(|layer| layer.class == *class).map(|layer| layer.info);
        let overlay = Overlay::new(source, members, spec, stats)?;
        *cost = float.divergence_of(&load(&overlay)?)?;
        if !progress(done + 1, count) {
            return Err(QuantError::Stopped.into());
        }
    }
    Ok(classes)
}

/// Output errors that are nats already.
fn costs_by_gradients(layers: &[Layer]) -> Costs {
    let mut classes = Costs::new();
    for layer in layers {
        let (cost, error) = classes.entry(layer.class.clone()).or_default();
        (*cost, *error) = (*cost + layer.own, *error + layer.own);
    }
    classes
}

/// The smallest choice whose losses together are at most `nats`, by halving the budget.
fn least_that_meets(offers: &[Vec<Offer>], (mut low, mut high): (u64, u64), nats: f64) -> Option<Vec<usize>> {
    let at = |budget: u64| {
        let chosen = allocate(offers, budget)?;
        let loss: f64 = chosen.iter().zip(offers).map(|(choice, offers)| offers[*choice].loss).sum();
        (loss <= nats).then_some(chosen)
    };
    let mut best = at(high)?;
    while low < high {
        let middle = low + (high - low) / 2;
        match at(middle) {
            Some(chosen) => (best, high) = (chosen, middle),
            None => low = middle + 1,
        }
    }
    Some(best)
}

impl Target {
    /// The flag that it is typed with.
    fn flag(self) -> &'static str {
        match self {
            Target::Bits(_) => "--target-bpw",
            Target::Bytes(_) => "--target-size",
            Target::Divergence(_) => "--target-kl",
        }
    }
}

/// What was observed of gradients by a layer's outputs.
fn both_sides<'a>(info: &TensorInfo, stats: &'a Stats) -> Option<&'a Symmetric> {
    stats.inputs.get(&info.name)?.outputs().filter(|outputs| outputs.width() == info.rows_cols().0)
}

/// A layer's kind, and the stretch of the model that it lies in.
fn class(name: &str, layers: usize) -> (String, usize) {
    let number = |word: &str| word.parse::<usize>().ok();
    let layer = name.split('.').find_map(number).unwrap_or(0);
    let kind = name.split('.').filter(|word| number(word).is_none()).collect::<Vec<_>>().join(".");
    (kind, layer * STRETCHES / layers.max(1))
}

/// Values of some rows of a tensor by a spec, searched, with the rows as they were.
fn searched(
    source: &dyn TensorSource,
    info: &TensorInfo,
    rows: Range<usize>,
    spec: &QuantSpec,
    stats: &Stats,
) -> Result<(Vec<f32>, Vec<f32>)> {
    let mut weight = Vec::new();
    source.read_rows_f32(&info.name, rows.clone(), &mut weight)?;
    let importance = stats.inputs.get(&info.name).map(|input| input.mean_squares());
    let shape = [rows.len(), info.rows_cols().1];
    let input = AlgoInput {
        name: &info.name,
        weight: &weight,
        shape,
        spec,
        importance: importance.as_deref(),
        calibrated: None,
        seed: 0,
    };
    let values = (algo::algorithm("search")?.run)(&input)?.dequantize();
    Ok((weight, values))
}

/// The output error of a layer, estimated from its first rows: second moments times squared errors, summed; where gradients
/// by its outputs were observed, each row by what it costs, such that the sum is in nats.
fn output_error(source: &dyn TensorSource, info: &TensorInfo, spec: &QuantSpec, stats: &Stats) -> Result<f64> {
    let (rows, cols) = info.rows_cols();
    let some = rows.min(ROWS);
    let (weight, values) = searched(source, info, 0..some, spec, stats)?;
    source.release(&info.name);
    let moments = stats.inputs.get(&info.name).map(|input| input.mean_squares());
    let moment = |i: usize| moments.as_ref().map_or(1.0, |m| m[i] as f64);
    let error = |(w, q): (&[f32], &[f32])| -> f64 {
        w.iter().zip(q).enumerate().map(|(i, (w, q))| moment(i) * (*w as f64 - *q as f64).powi(2)).sum()
    };
    let errors = weight.chunks(cols.max(1)).zip(values.chunks(cols.max(1))).map(error);
    Ok(match both_sides(info, stats) {
        None => errors.sum::<f64>() * rows as f64 / some.max(1) as f64,
        Some(outputs) => {
            let cost = |row: usize| outputs.get(row, row) as f64;
            let all: f64 = (0..rows).map(cost).sum();
            let seen: f64 = (0..some).map(cost).sum();
            let trace: f64 = moments.iter().flatten().map(|m| *m as f64).sum();
            let sum: f64 = errors.enumerate().map(|(row, error)| cost(row) * error).sum();
            // The outputs' matrix is a sum over tokens, moments are a mean.
            let count = stats.inputs.get(&info.name).map_or(1, |input| input.rows()).max(1) as f64;
            match seen > 0.0 && trace > 0.0 {
                true => 0.5 * sum * (all / seen) / (trace * count),
                false => 0.0,
            }
        }
    })
}

/// A checkpoint with some tensors as they are after quantization.
struct Overlay<'a> {
    source: &'a dyn TensorSource,
    infos: Vec<TensorInfo>,
    replaced: HashMap<String, Vec<u8>>,
}

impl<'a> Overlay<'a> {
    fn new<'i>(
        source: &'a dyn TensorSource,
        members: impl Iterator<Item = &'i TensorInfo>,
        spec: &QuantSpec,
        stats: &Stats,
    ) -> Result<Self> {
        let members: Vec<&TensorInfo> = members.collect();
        let quantized = |info: &&TensorInfo| -> Result<(String, Vec<u8>)> {
            let (_, values) = searched(source, info, 0..info.rows_cols().0, spec, stats)?;
            Ok((info.name.clone(), values.iter().flat_map(|v| v.to_le_bytes()).collect()))
        };
        let replaced: HashMap<String, Vec<u8>> = members.par_iter().map(quantized).collect::<Result<_>>()?;
        let infos = source.infos().iter().map(|info| match replaced.get(&info.name) {
            Some(bytes) => TensorInfo { stored: Stored::Plain(Dtype::F32), bytes: bytes.len(), ..info.clone() },
            None => info.clone(),
        });
        Ok(Overlay { source, infos: infos.collect(), replaced })
    }
}

impl TensorSource for Overlay<'_> {
    fn path(&self) -> &Path {
        self.source.path()
    }

    fn infos(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn info(&self, name: &str) -> nibble_quant::Result<&TensorInfo> {
        let found = self.infos.iter().find(|info| info.name == name);
        found.ok_or_else(|| QuantError::NoTensor { name: name.to_owned(), path: self.path().to_owned() })
    }

    fn bytes(&self, name: &str) -> nibble_quant::Result<Cow<'_, [u8]>> {
        match self.replaced.get(name) {
            Some(bytes) => Ok(Cow::Borrowed(bytes)),
            None => self.source.bytes(name),
        }
    }

    fn read_rows_f32(&self, name: &str, rows: Range<usize>, out: &mut Vec<f32>) -> nibble_quant::Result<()> {
        match self.replaced.get(name) {
            Some(bytes) => decode_rows(self.info(name)?, bytes, rows, out),
            None => self.source.read_rows_f32(name, rows, out),
        }
    }

    fn release(&self, name: &str) {
        self.source.release(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_kinds_in_stretches_of_the_model() {
        let of = |name: &str| class(name, 30);
        assert_eq!(of("model.layers.0.mlp.up_proj.weight"), of("model.layers.4.mlp.up_proj.weight"));
        assert_ne!(of("model.layers.4.mlp.up_proj.weight"), of("model.layers.5.mlp.up_proj.weight"));
        assert_ne!(of("model.layers.4.mlp.up_proj.weight"), of("model.layers.4.mlp.down_proj.weight"));
        assert_eq!(of("model.layers.29.mlp.up_proj.weight").1, STRETCHES - 1);
        assert_eq!(class("model.layers.1.mlp.up_proj.weight", 2).1, STRETCHES / 2);
    }
}
