//! From what was typed to a recipe, and from a recipe to a plan.

use anyhow::{Context as _, Result};
use nibble_quant::convert::{self, Choice, Plan, Quantize};
use nibble_quant::format::TensorSource;
use nibble_quant::recipe::{self, Decision, Keep};
use nibble_quant::{AlgoInput, Recipe, Role, Rule, ScaleFormat, algo, presets};
use std::path::PathBuf;
use std::sync::Arc;

/// Which tensors become what.
#[derive(Debug, Clone, clap::Args)]
pub struct Wishes {
    /// Scheme of the linear layers, see `nibble schemes`
    #[arg(long, short, value_name = "NAME", default_value = presets::DEFAULT)]
    pub scheme: String,
    /// Scheme of embeddings, or `keep`
    #[arg(long, value_name = "NAME", default_value = presets::DEFAULT_EMBEDDING)]
    pub embedding_scheme: String,
    /// Scheme of the output head, or `keep`
    #[arg(long, value_name = "NAME", default_value = presets::DEFAULT_EMBEDDING)]
    pub lm_head_scheme: String,
    /// Leave tensors of such names as they are: * is any run of characters (may be given several times)
    #[arg(long, value_name = "PATTERN")]
    pub keep: Vec<String>,
    /// A rule of its own: PATTERN=SCHEME, PATTERN=SCHEME:ALGORITHM or PATTERN=keep (may be given several times)
    #[arg(long, value_name = "PATTERN=SCHEME")]
    pub rule: Vec<String>,
    /// Take all rules from a TOML file instead
    #[arg(long, value_name = "FILE", conflicts_with_all = ["scheme", "embedding_scheme", "lm_head_scheme", "rule", "keep"])]
    pub recipe: Option<PathBuf>,
}

impl Wishes {
    /// The recipe: the file's, or rules from flags, the more special ones first.
    pub fn recipe(&self) -> Result<Recipe> {
        if let Some(file) = &self.recipe {
            let text = std::fs::read_to_string(file).with_context(|| format!("can't read {}", file.display()))?;
            return Ok(Recipe::from_toml(&file.display().to_string(), &text)?);
        }
        let keeps = self.keep.iter().map(|pattern| format!("{pattern}=keep"));
        let flags: Vec<String> = keeps.chain(self.rule.iter().cloned()).collect();
        let mut recipe = Recipe::from_flags(&self.scheme, &flags)?;
        for (role, scheme) in [(Role::Embedding, &self.embedding_scheme), (Role::LmHead, &self.lm_head_scheme)] {
            for rule in recipe.rules.iter_mut().filter(|rule| rule.pattern.is_none() && rule.role == Some(role)) {
                set(rule, scheme);
            }
        }
        recipe.validate()?;
        Ok(recipe)
    }
}

fn set(rule: &mut Rule, scheme: &str) {
    match scheme {
        "keep" => (rule.scheme, rule.keep) = (None, Some(Keep::Original)),
        name => rule.scheme = Some(name.to_string()),
    }
}

/// What a recipe does with every tensor of a checkpoint.
pub fn plan(source: &dyn TensorSource, recipe: &Recipe, seed: u64) -> Result<Plan> {
    let names = source.infos().iter().map(|info| (info.name.as_str(), info.shape.as_slice()));
    let decisions = recipe.plan(names)?;
    let index = |name: &str| source.infos().iter().position(|info| info.name == name);
    let choose = |info: &nibble_quant::format::TensorInfo| {
        let decision = match index(&info.name).and_then(|at| decisions.get(at)) {
            Some(decision) => decision.clone(),
            None => recipe.decide(&info.name, &info.shape)?,
        };
        choice(decision, seed)
    };
    Ok(convert::plan_with(source, &choose)?)
}

fn choice(decision: Decision, seed: u64) -> nibble_quant::Result<Choice> {
    let (name, scheme, algorithm) = match decision.action {
        recipe::Action::Keep(Keep::Original) => return Ok(Choice::Keep(decision.why)),
        recipe::Action::Keep(other) => {
            let why = format!("keep = {other:?}: only `original` is supported by this conversion").to_lowercase();
            return Err(nibble_quant::QuantError::Spec { what: decision.why, why });
        }
        recipe::Action::Quantize { name, scheme, algorithm } => (name, scheme, algo::algorithm(algorithm)?),
    };
    let spec = scheme.weight;
    // Scales that are stored against one number a tensor, or that are one a tensor, need all rows at once.
    let rows_stand_alone = !matches!(spec.scale, ScaleFormat::Dynamic { .. })
        && spec.granularity != nibble_quant::Granularity::Tensor
        && !matches!(spec.outliers, nibble_quant::OutlierSpec::Columns { .. });
    let with = spec.clone();
    let quantizer = move |name: &str, shape: [usize; 2], weight: &[f32]| {
        (algorithm.run)(&AlgoInput { name, weight, shape, spec: &with, importance: None, seed })
    };
    Ok(Choice::Quantize(Quantize {
        spec,
        quantizer: Arc::new(quantizer),
        label: format!("{name} ({})", algorithm.name),
        why: decision.why,
        rows_stand_alone,
    }))
}
