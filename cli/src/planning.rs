//! From what was typed to a recipe.

use anyhow::{Context as _, Result};
use nibble_quant::{Keep, Recipe, Role, Rule, presets};
use std::path::PathBuf;

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
