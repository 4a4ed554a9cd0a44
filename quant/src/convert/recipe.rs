//! A recipe's decisions as a plan.

use super::plan::{Choice, Plan, Quantize, plan_with};
use crate::error::Result;
use crate::format::{Dtype, TensorInfo, TensorSource};
use crate::recipe::{Action, Keep, Recipe};
use crate::{AlgoInput, Granularity, OutlierSpec, QuantSpec, ScaleFormat, algo};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::sync::Arc;

/// Second moments of what each column of a tensor is multiplied by, by tensor name.
pub type Importance = HashMap<String, Arc<[f32]>>;

/// Plans a conversion by a recipe. Columns are weighted by `importance` where it has a tensor.
///
/// # Errors
/// If a rule matches nothing, a spec contradicts itself, or the source is quantized already.
pub fn plan(source: &dyn TensorSource, recipe: &Recipe, importance: &Importance, seed: u64) -> Result<Plan> {
    let names = source.infos().iter().map(|info| (info.name.as_str(), info.shape.as_slice()));
    let decisions = recipe.plan(names)?;
    let decisions: HashMap<&str, _> = source.infos().iter().map(|i| i.name.as_str()).zip(decisions).collect();
    plan_with(source, &|info| {
        let Some(decision) = decisions.get(info.name.as_str()) else {
            return Ok(Choice::Keep("no rule matches".to_owned()));
        };
        match &decision.action {
            Action::Keep(Keep::Original) => Ok(Choice::Keep(decision.why.clone())),
            Action::Keep(Keep::F16) => Ok(Choice::Convert(Dtype::F16, decision.why.clone())),
            Action::Keep(Keep::Bf16) => Ok(Choice::Convert(Dtype::BF16, decision.why.clone())),
            Action::Keep(Keep::F32) => Ok(Choice::Convert(Dtype::F32, decision.why.clone())),
            Action::Quantize { name, scheme, algorithm } => {
                let how = quantize(info, &scheme.weight, algorithm, importance.get(&info.name), seed)?;
                let label = format!("{name} {}", how.label);
                Ok(Choice::Quantize(Quantize { label, why: decision.why.clone(), ..how }))
            }
        }
    })
}

fn quantize(
    info: &TensorInfo,
    spec: &QuantSpec,
    algorithm: &'static str,
    importance: Option<&Arc<[f32]>>,
    seed: u64,
) -> Result<Quantize> {
    let algorithm = algo::algorithm(algorithm)?;
    let weights = importance.cloned();
    let with = spec.clone();
    let quantizer = move |name: &str, shape: [usize; 2], values: &[f32]| {
        let importance = weights.as_deref();
        (algorithm.run)(&AlgoInput { name, weight: values, shape, spec: &with, importance, seed })
    };
    let observed = importance.map(|i| format!(" importance {}", digest(i))).unwrap_or_default();
    Ok(Quantize {
        spec: spec.clone(),
        quantizer: Arc::new(quantizer),
        label: format!("{}{observed}", algorithm.name),
        why: info.name.clone(),
        rows_stand_alone: rows_stand_alone(spec),
    })
}

/// Whether a block of rows gives the same codes as the whole tensor: no number spans rows.
fn rows_stand_alone(spec: &QuantSpec) -> bool {
    spec.granularity != Granularity::Tensor
        && !matches!(spec.scale, ScaleFormat::Dynamic { .. })
        && !matches!(spec.outliers, OutlierSpec::Columns { .. })
}

/// The first digits of the numbers' sha256, for the fingerprint.
fn digest(values: &[f32]) -> String {
    let mut hash = Sha256::new();
    values.iter().for_each(|v| hash.update(v.to_le_bytes()));
    crate::manifest::hex(&hash.finalize()[..6])
}
