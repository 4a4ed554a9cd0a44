//! A recipe's decisions as a plan.

use super::blocks::Blocks;
use super::engine::Work;
use super::levels::OWN;
use super::plan::{Choice, Plan, Quantize, Rows, plan_with};
use crate::error::Result;
use crate::format::{Dtype, TensorSource};
use crate::recipe::{Action, Keep, Recipe};
use crate::stats::{Factored, Input, Stats};
use crate::{AlgoInput, QuantSpec, algo};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::sync::Arc;

/// Plans a conversion by a recipe. Where `stats` have a tensor, its columns are weighted by them.
///
/// # Errors
/// If a rule matches nothing, a spec contradicts itself, or the source is quantized already.
pub fn plan(source: &dyn TensorSource, recipe: &Recipe, stats: &Stats, seed: u64) -> Result<Plan> {
    plan_after(source, recipe, stats, None, seed)
}

/// The same; tensors that `blocks` have are taken from there.
///
/// # Errors
/// As [`plan`].
pub fn plan_after(
    source: &dyn TensorSource,
    recipe: &Recipe,
    stats: &Stats,
    blocks: Option<&Arc<Blocks>>,
    seed: u64,
) -> Result<Plan> {
    let names = source.infos().iter().map(|info| (info.name.as_str(), info.shape.as_slice()));
    let decisions = recipe.plan(names)?;
    let digest = digest(stats);
    let decisions: HashMap<&str, _> = source.infos().iter().map(|i| i.name.as_str()).zip(decisions).collect();
    let mut plan = plan_with(source, &|info| {
        let Some(decision) = decisions.get(info.name.as_str()) else {
            return Ok(Choice::Keep("no rule matches".to_owned()));
        };
        match &decision.action {
            Action::Keep(Keep::Original) => Ok(Choice::Keep(decision.why.clone())),
            Action::Keep(Keep::F16) => Ok(Choice::Convert(Dtype::F16, decision.why.clone())),
            Action::Keep(Keep::Bf16) => Ok(Choice::Convert(Dtype::BF16, decision.why.clone())),
            Action::Keep(Keep::F32) => Ok(Choice::Convert(Dtype::F32, decision.why.clone())),
            Action::Quantize { name, scheme, algorithm } => {
                let input = stats.inputs.get(&info.name);
                let made = blocks.filter(|blocks| blocks.spec(&info.name) == Some(&scheme.weight));
                let how = match made {
                    Some(blocks) => taken(&scheme.weight, algorithm, blocks)?,
                    None => quantize(&scheme.weight, algorithm, input, seed)?,
                };
                let observed = match (made, input) {
                    (Some(blocks), _) => format!(" block by block {}", blocks.fingerprint()),
                    (None, Some(_)) => format!(" calibrated {digest}"),
                    (None, None) => String::new(),
                };
                let title = match name.split_once(OWN) {
                    Some((varied, _)) => format!("{varied} with levels of its own"),
                    None => name.clone(),
                };
                let label = format!("{title} {}{observed}", how.label);
                Ok(Choice::Quantize(Quantize { label, why: format!("{}{}", decision.why, how.why), ..how }))
            }
        }
    })?;
    plan.peak_memory += stats.conversion_bytes(rayon::current_num_threads());
    Ok(plan)
}

fn quantize(spec: &QuantSpec, algorithm: &'static str, calibrated: Option<&Arc<Input>>, seed: u64) -> Result<Quantize> {
    let gram = calibrated.is_some_and(|input| input.gram().is_some());
    let wanted = algo::algorithm(algorithm)?;
    let (algorithm, why) = match (wanted.gram && !gram, wanted.learns) {
        (true, _) => (algo::algorithm("search")?, "; no Gram matrix for GPTQ: searched"),
        (false, true) => (algo::algorithm(algo::BEFORE_LEARNING)?, "; no text to learn rounding on"),
        (false, false) => (wanted, ""),
    };
    let rows_tied = algorithm.gram && calibrated.is_some_and(|input| input.outputs().is_some());
    let importance = calibrated.map(|input| input.mean_squares());
    let (input, with) = (calibrated.cloned(), spec.clone());
    let quantizer = move |name: &str, shape: [usize; 2], values: &[f32]| {
        let (importance, calibrated) = (importance.as_deref(), input.as_deref());
        (algorithm.run)(&AlgoInput { name, weight: values, shape, spec: &with, importance, calibrated, seed })
    };
    Ok(Quantize {
        spec: spec.clone(),
        quantizer: Arc::new(quantizer),
        label: algorithm.name.to_owned(),
        wanted: Some(wanted),
        why: why.to_owned(),
        rows: match algorithm.gram {
            _ if rows_tied || !spec.rows_stand_alone() => Rows::Tied,
            true => Rows::Shared,
            false => Rows::Apart,
        },
    })
}

/// What a block of the model has already.
fn taken(spec: &QuantSpec, algorithm: &'static str, blocks: &Arc<Blocks>) -> Result<Quantize> {
    let blocks = Arc::clone(blocks);
    let quantizer = move |name: &str, shape: [usize; 2], _: &[f32]| {
        let found = blocks.tensor(name)?.filter(|tensor| tensor.shape == shape);
        found.ok_or_else(|| crate::format::tensor_error(name, "its block was quantized with another shape"))
    };
    let algorithm = algo::algorithm(algorithm)?;
    Ok(Quantize {
        spec: spec.clone(),
        quantizer: Arc::new(quantizer),
        label: algorithm.name.to_owned(),
        wanted: None,
        why: String::new(),
        rows: Rows::Tied,
    })
}

/// The tensors of a plan that were to be quantized by GPTQ and are searched instead, with the reason. Whether Gram
/// matrices could be factored shows when the plan has been carried out.
pub fn fallbacks(plan: &Plan, stats: &Stats) -> Vec<(String, &'static str)> {
    let wanted = plan
        .items
        .iter()
        .filter(|item| matches!(&item.work, Work::Quantize(how) if how.wanted.is_some_and(|a| a.gram)));
    let why = |name: &str| match stats.inputs.get(name) {
        None => Some("no statistics of its input"),
        Some(input) if input.gram().is_none() => Some("second moments without a Gram matrix"),
        Some(input) if input.factored() == Some(Factored::Refused) => Some("a Gram matrix without a Cholesky factor"),
        Some(_) => None,
    };
    wanted.filter_map(|item| Some((item.info.name.clone(), why(&item.info.name)?))).collect()
}

/// The first digits of the second moments' sha256, for the fingerprint.
fn digest(stats: &Stats) -> String {
    let mut hash = Sha256::new();
    for (name, input) in &stats.inputs {
        hash.update(name);
        hash.update(input.rows().to_le_bytes());
        hash.update([u8::from(input.gram().is_some())]);
        input.mean_squares().iter().for_each(|v| hash.update(v.to_le_bytes()));
    }
    crate::manifest::hex(&hash.finalize()[..6])
}
