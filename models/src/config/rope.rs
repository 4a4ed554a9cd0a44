//! Rotary positions: the angle that each pair of a head turns by a token, and how long contexts rescale it.
//!
//! Pair `i` of a head turns by `position * inv_freq[i]`, with `inv_freq[i] = theta^(-2 i / rotary_dim)` before scaling
//! (Su et al. 2021). Rotation is by halves (NeoX): pair `i` is columns `i` and `i + rotary_dim / 2`.

use std::f64::consts::PI;

use super::{Fields, MAX_POSITIONS};
use crate::error::Result;

/// How positions rotate queries and keys.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Leading columns of each head that are rotated; even, at most `head_dim`. The rest pass through.
    pub rotary_dim: usize,
    /// Rescaling for contexts longer than those trained on first.
    pub scaling: RopeScaling,
}

/// Rescaling of the frequencies for long contexts.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Frequencies as they are.
    None,
    /// Every frequency divided by `factor` (position interpolation, Chen et al. 2023).
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear blend between.
    Llama3 {
        /// The divisor of wavelengths beyond `original / low_freq`.
        factor: f64,
        /// Turns in the original context below which a frequency is divided whole.
        low_freq: f64,
        /// Turns in the original context above which a frequency is kept whole.
        high_freq: f64,
        /// Context length trained on first, in tokens.
        original: f64,
    },
    /// YaRN (Peng et al. 2023): a ramp over pairs between divided and kept frequencies, and warmer attention.
    Yarn {
        /// The divisor of slow pairs.
        factor: f64,
        /// Turns in the original context above which a pair is kept whole.
        beta_fast: f64,
        /// Turns in the original context below which a pair is divided whole.
        beta_slow: f64,
        /// Context length trained on first, in tokens.
        original: f64,
        /// Whether the ramp's ends are rounded outwards to whole pairs.
        truncate: bool,
        /// Factor on the cosines and sines.
        attention_factor: f64,
    },
}

/// The angles of one head, ready for a table of cosines and sines.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeFrequencies {
    /// Radians a position, one a pair: `(rotary_dim / 2)`.
    pub inv_freq: Vec<f32>,
    /// Factor on every cosine and sine; 1 except for YaRN.
    pub attention_factor: f32,
}

impl RopeConfig {
    /// Reads the rotary settings in both spellings: `rope_theta` with `rope_scaling`, or `rope_parameters`.
    ///
    /// # Errors
    /// A value is missing or absurd, or the kind of scaling is unknown.
    pub fn from_fields(fields: &Fields, head_dim: usize, max_positions: usize) -> Result<Self> {
        let (block, inner) = match fields.nested("rope_parameters")? {
            Some(inner) => ("rope_parameters", Some(inner)),
            None => ("rope_scaling", fields.nested("rope_scaling")?),
        };
        let inner = inner.as_ref();
        if let Some(by_layer) = inner.and_then(|b| b.names().find(|n| n.ends_with("_attention"))) {
            return Err(
                fields.refuse(block, format!("has its own entry for `{by_layer}` layers, wanted one for all layers"))
            );
        }
        let find = |name: &str, default: f64| match inner.filter(|b| b.get(name).is_some()) {
            Some(inner) => inner.positive(name, Some(default)),
            None => fields.positive(name, Some(default)),
        };
        let theta = find("rope_theta", 10_000.0)?;
        if theta <= 1.0 {
            return Err(fields.refuse("rope_theta", format!("{theta}, wanted a number above 1")));
        }
        let rotary_dim = (find("partial_rotary_factor", 1.0)? * head_dim as f64) as usize;
        if rotary_dim == 0 || rotary_dim > head_dim || !rotary_dim.is_multiple_of(2) {
            let why = format!("{rotary_dim} rotated columns, wanted an even number up to {head_dim}");
            return Err(fields.refuse("head_dim", why));
        }
        let scaling = match inner {
            Some(inner) => scaling(inner, max_positions)?,
            None => RopeScaling::None,
        };
        Ok(Self { theta, rotary_dim, scaling })
    }

    /// The scaled frequencies of one head.
    pub fn frequencies(&self) -> RopeFrequencies {
        let dim = self.rotary_dim as f64;
        let base = |i: usize| self.theta.powf(-2.0 * i as f64 / dim);
        let pairs = self.rotary_dim / 2;
        let collect = |f: &dyn Fn(usize) -> f64| (0..pairs).map(|i| f(i) as f32).collect();
        let (inv_freq, attention_factor) = match self.scaling {
            RopeScaling::None => (collect(&base), 1.0),
            RopeScaling::Linear { factor } => (collect(&|i| base(i) / factor), 1.0),
            RopeScaling::Llama3 { factor, low_freq, high_freq, original } => {
                let scaled = |i| {
                    let f = base(i);
                    let turns = original * f / (2.0 * PI);
                    let keep = ((turns - low_freq) / (high_freq - low_freq)).clamp(0.0, 1.0);
                    f * ((1.0 - keep) / factor + keep)
                };
                (collect(&scaled), 1.0)
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original, truncate, attention_factor } => {
                // The pair, counted in columns, that makes `turns` turns in the original context.
                let pair = |turns: f64| dim * (original / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
                let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                let width = if low == high { 0.001 } else { high - low };
                let scaled = |i| {
                    let divide = ((i as f64 - low) / width).clamp(0.0, 1.0);
                    base(i) * (divide / factor + 1.0 - divide)
                };
                (collect(&scaled), attention_factor)
            }
        };
        RopeFrequencies { inv_freq, attention_factor: attention_factor as f32 }
    }
}

/// The scaling that a `rope_scaling` or `rope_parameters` block asks for.
fn scaling(block: &Fields, max_positions: usize) -> Result<RopeScaling> {
    // `type` is the spelling before transformers 4.43.
    let kind: Option<String> = match block.optional("rope_type")? {
        Some(kind) => Some(kind),
        None => block.optional("type")?,
    };
    match kind.as_deref() {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: block.positive("factor", None)? }),
        Some("llama3") => {
            let low_freq = block.positive("low_freq_factor", None)?;
            let high_freq = block.positive("high_freq_factor", None)?;
            if high_freq <= low_freq {
                let why = format!("{high_freq}, wanted a number above `low_freq_factor`, {low_freq}");
                return Err(block.refuse("high_freq_factor", why));
            }
            Ok(RopeScaling::Llama3 {
                factor: block.positive("factor", None)?,
                low_freq,
                high_freq,
                original: block.size("original_max_position_embeddings", MAX_POSITIONS)? as f64,
            })
        }
        Some("yarn") => yarn(block, max_positions),
        Some(other) => Err(block.refuse("rope_type", format!("`{other}`; known: default, linear, llama3, yarn"))),
    }
}

fn yarn(block: &Fields, max_positions: usize) -> Result<RopeScaling> {
    let original = block.size_or("original_max_position_embeddings", max_positions, MAX_POSITIONS)? as f64;
    let factor = block.positive("factor", Some(max_positions as f64 / original))?;
    let warmth = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    let attention_factor = match (block.number("mscale")?, block.number("mscale_all_dim")?) {
        (Some(m), Some(all)) if m != 0.0 && all != 0.0 => warmth(m) / warmth(all),
        _ => warmth(1.0),
    };
    let beta_fast = block.positive("beta_fast", Some(32.0))?;
    let beta_slow = block.positive("beta_slow", Some(1.0))?;
    if beta_fast < beta_slow {
        return Err(block.refuse("beta_fast", format!("{beta_fast}, wanted at least `beta_slow`, {beta_slow}")));
    }
    Ok(RopeScaling::Yarn {
        factor,
        beta_fast,
        beta_slow,
        original,
        truncate: block.flag("truncate", true)?,
        attention_factor: block.positive("attention_factor", Some(attention_factor))?,
    })
}
