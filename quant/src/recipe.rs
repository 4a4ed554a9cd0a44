//! The plan for a model: ordered rules from tensor names to schemes, the first that matches decides.
//!
//! ```toml
//! rotate = "hadamard"
//!
//! [[rule]]
//! role = "embedding"
//! scheme = "int8-g32"
//!
//! [[rule]]
//! pattern = "*.down_proj.weight"
//! scheme = "int8-g32"
//! algorithm = "rtn"
//! why = "the most sensitive layers"
//!
//! [[rule]]
//! role = "linear"
//! scheme = "default"
//!
//! [[rule]]
//! keep = "original"
//! ```

pub mod allocate;
pub mod glob;

use crate::error::Result;
use crate::transform::{Kind, Transform, transform};
use crate::{FloatFormat, QuantError, QuantScheme, Role, algo, presets};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Ordered rules, and schemes that have no preset.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// How the residual stream is turned before anything is quantized: a rotation of [`crate::transform::TRANSFORMS`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotate: Option<String>,
    /// The first rule that matches a tensor decides; what no rule matches stays as it is.
    #[serde(rename = "rule", default)]
    pub rules: Vec<Rule>,
    /// Schemes by name, looked up before the presets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub schemes: BTreeMap<String, QuantScheme>,
}

/// One rule: which tensors, and what becomes of them. Exactly one of `scheme` and `keep` is set.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Names that it matches, `*` for any run of characters and `?` for one; all names without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pattern: Option<String>,
    /// The role that it matches; all roles without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
    /// Scheme to quantize to, by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheme: Option<String>,
    /// Algorithm to quantize with; the preset's own without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub algorithm: Option<String>,
    /// Float format to keep.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<Keep>,
    /// The reason, for plans and reports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// What an unquantized tensor is stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Keep {
    /// What it came in.
    Original,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE single precision.
    F32,
}

impl Keep {
    /// The float format; `None` for the original one.
    pub fn float(self) -> Option<FloatFormat> {
        match self {
            Keep::Original => None,
            Keep::F16 => Some(FloatFormat::F16),
            Keep::Bf16 => Some(FloatFormat::Bf16),
            Keep::F32 => Some(FloatFormat::F32),
        }
    }
}

/// What becomes of one tensor, and why.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// What the tensor is for.
    pub role: Role,
    /// What becomes of it.
    pub action: Action,
    /// The rule and the reason, in words.
    pub why: String,
}

/// What becomes of a tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// It is quantized.
    Quantize {
        /// Name of the scheme.
        name: String,
        /// The arithmetic.
        scheme: QuantScheme,
        /// Name of the algorithm, one of [`crate::ALGORITHMS`].
        algorithm: &'static str,
    },
    /// It stays in floats.
    Keep(Keep),
}

impl Recipe {
    /// Linear layers in `scheme`, embeddings and the output head in 8 bits, everything small as it is.
    pub fn new(scheme: &str) -> Result<Recipe> {
        presets::by_name(scheme)?;
        let to = |role, scheme: &str, why: &str| Rule {
            role: Some(role),
            scheme: Some(scheme.into()),
            why: Some(why.into()),
            ..Rule::default()
        };
        let keep = |role, why: &str| Rule {
            role: Some(role),
            keep: Some(Keep::Original),
            why: Some(why.into()),
            ..Rule::default()
        };
        let rules = vec![
            keep(Role::Norm, "gains are few and every value passes them"),
            keep(Role::Vector, "vectors are few"),
            keep(Role::Router, "a small error would choose other experts"),
            to(Role::Embedding, presets::DEFAULT_EMBEDDING, "each token is one row: errors aren't averaged"),
            to(Role::LmHead, presets::DEFAULT_EMBEDDING, "its errors go straight to the logits"),
            to(Role::Linear, scheme, "linear layers hold most of the bytes"),
        ];
        Ok(Recipe { rules, ..Recipe::default() })
    }

    /// [`Recipe::new`] behind rules from flags, each `PATTERN=SCHEME`, `PATTERN=SCHEME:ALGORITHM` or
    /// `PATTERN=keep[:f16|bf16|f32]`.
    pub fn from_flags(scheme: &str, overrides: &[String]) -> Result<Recipe> {
        let mut recipe = Recipe::new(scheme)?;
        let rules = overrides.iter().map(|flag| Rule::from_flag(flag)).collect::<Result<Vec<_>>>()?;
        recipe.rules.splice(0..0, rules);
        recipe.validate()?;
        Ok(recipe)
    }

    /// Reads and validates a recipe; `what` names it in errors.
    pub fn from_toml(what: &str, text: &str) -> Result<Recipe> {
        let recipe: Recipe = toml::from_str(text)
            .map_err(|e| QuantError::Spec { what: what.into(), why: e.to_string().trim_end().replace('\n', " ") })?;
        recipe.validate()?;
        Ok(recipe)
    }

    /// The recipe as TOML; reading it gives the same recipe.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| QuantError::Spec { what: "recipe".into(), why: e.to_string() })
    }

    /// Refuses unknown names, specs that contradict themselves, and rules that say both or neither of `scheme` and
    /// `keep`.
    pub fn validate(&self) -> Result<()> {
        self.rotation()?;
        for scheme in self.schemes.values() {
            scheme.weight.validate()?;
        }
        self.rules.iter().enumerate().try_for_each(|(i, rule)| self.action(i, rule).map(|_| ()))
    }

    /// The rotation that it asks for.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn rotation(&self) -> Result<Option<&'static Transform>> {
        let Some(name) = &self.rotate else { return Ok(None) };
        let row = transform(name)?;
        match row.kind {
            Kind::Rotation(_) => Ok(Some(row)),
            Kind::Factors(_) => Err(QuantError::Spec {
                what: format!("rotate = `{name}`"),
                why: "it scales columns by statistics; `nibble transform` does that".into(),
            }),
        }
    }

    /// What becomes of one tensor.
    pub fn decide(&self, name: &str, shape: &[usize]) -> Result<Decision> {
        let role = Role::of(name, shape);
        for (i, rule) in self.rules.iter().enumerate() {
            if rule.matches(name, role) {
                let action = self.action(i, rule)?;
                let why = match &rule.why {
                    Some(why) => format!("{}: {why}", rule.title(i)),
                    None => rule.title(i),
                };
                return Ok(Decision { role, action, why });
            }
        }
        Ok(Decision { role, action: Action::Keep(Keep::Original), why: "no rule matches".into() })
    }

    /// What becomes of each tensor of a model. A pattern that matches none of them is refused: it is a misspelling.
    pub fn plan<'a>(&self, tensors: impl Iterator<Item = (&'a str, &'a [usize])> + Clone) -> Result<Vec<Decision>> {
        for (i, rule) in self.rules.iter().enumerate() {
            let Some(pattern) = &rule.pattern else { continue };
            if !tensors.clone().any(|(name, _)| glob::matches(pattern, name)) {
                return Err(rule.refuse(i, "no tensor has such a name".into()));
            }
        }
        tensors.map(|(name, shape)| self.decide(name, shape)).collect()
    }

    fn action(&self, i: usize, rule: &Rule) -> Result<Action> {
        let (name, keep) = match (&rule.scheme, rule.keep) {
            (Some(name), None) => (name, None),
            (None, Some(keep)) => (&String::new(), Some(keep)),
            (Some(_), Some(_)) => return Err(rule.refuse(i, "both `scheme` and `keep`".into())),
            (None, None) => return Err(rule.refuse(i, "neither `scheme` nor `keep`".into())),
        };
        if let Some(keep) = keep {
            return match &rule.algorithm {
                None => Ok(Action::Keep(keep)),
                Some(algorithm) => Err(rule.refuse(i, format!("algorithm `{algorithm}` for a tensor that is kept"))),
            };
        }
        let (name, scheme, own) = match self.schemes.get(name) {
            Some(scheme) => (name.as_str(), scheme, "search"),
            None => {
                let preset = presets::by_name(name)?;
                (preset.name, &preset.scheme, preset.algorithm)
            }
        };
        let algorithm = algo::algorithm(rule.algorithm.as_deref().unwrap_or(own))?.name;
        Ok(Action::Quantize { name: name.into(), scheme: scheme.clone(), algorithm })
    }
}

impl Rule {
    /// Whether it is for a tensor of this name and role.
    pub fn matches(&self, name: &str, role: Role) -> bool {
        self.role.is_none_or(|wanted| wanted == role) && self.pattern.as_ref().is_none_or(|p| glob::matches(p, name))
    }

    fn from_flag(flag: &str) -> Result<Rule> {
        let refuse = |why: &str| QuantError::Spec { what: format!("rule `{flag}`"), why: why.into() };
        let (pattern, to) = flag.split_once('=').ok_or_else(|| refuse("expected PATTERN=SCHEME or PATTERN=keep"))?;
        let (word, detail) = match to.split_once(':') {
            Some((word, detail)) => (word, Some(detail)),
            None => (to, None),
        };
        let mut rule = Rule { pattern: Some(pattern.into()), ..Rule::default() };
        if word == "keep" {
            rule.keep = Some(match detail {
                None | Some("original") => Keep::Original,
                Some("f16") => Keep::F16,
                Some("bf16") => Keep::Bf16,
                Some("f32") => Keep::F32,
                Some(_) => return Err(refuse("expected keep, keep:f16, keep:bf16 or keep:f32")),
            });
        } else {
            rule.scheme = Some(word.into());
            rule.algorithm = detail.map(String::from);
        }
        Ok(rule)
    }

    /// `rule 2 (role embedding)`
    fn title(&self, i: usize) -> String {
        let which = match (&self.pattern, self.role) {
            (Some(pattern), Some(role)) => format!("`{pattern}`, role {}", role.name()),
            (Some(pattern), None) => format!("`{pattern}`"),
            (None, Some(role)) => format!("role {}", role.name()),
            (None, None) => "every tensor".into(),
        };
        format!("rule {} ({which})", i + 1)
    }

    fn refuse(&self, i: usize, why: String) -> QuantError {
        QuantError::Spec { what: self.title(i), why }
    }
}
