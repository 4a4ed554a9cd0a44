//! The model families: one row each, which turns a family's `config.json` into the [`ModelConfig`] of the one decoder.
//!
//! A family is data: its defaults and which options it switches on. Whatever it needs beyond
//! that is an option of the decoder, for every family to use.

mod llama;
mod mistral;
mod qwen;

use crate::config::{Fields, ModelConfig};
use crate::error::Result;

/// One row of [`FAMILIES`].
#[derive(Debug)]
pub struct Family {
    /// What it is called here.
    pub name: &'static str,
    /// The values of `model_type` that it answers to.
    pub model_types: &'static [&'static str],
    /// Which models these are and what sets them apart.
    pub summary: &'static str,
    /// Reads `config.json`.
    pub configure: fn(&Fields) -> Result<ModelConfig>,
}

/// Every family this crate runs.
pub static FAMILIES: &[Family] = &[
    Family {
        name: "llama",
        model_types: &["llama"],
        summary: "Llama 2 and 3, SmolLM2 and their like: grouped-query attention, rotary positions, SwiGLU",
        configure: llama::configure,
    },
    Family {
        name: "mistral",
        model_types: &["mistral"],
        summary: "Mistral: Llama with a head width of its own and, in the first one, a sliding window",
        configure: mistral::configure,
    },
    Family {
        name: "qwen2",
        model_types: &["qwen2"],
        summary: "Qwen 2 and 2.5: Llama with biases on query, key and value",
        configure: qwen::configure_qwen2,
    },
    Family {
        name: "qwen3",
        model_types: &["qwen3"],
        summary: "Qwen 3: Llama with norms on query and key heads",
        configure: qwen::configure_qwen3,
    },
];

/// The family that answers to a `model_type`.
pub fn find(model_type: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|f| f.model_types.contains(&model_type))
}

/// Every `model_type` known, in the order of the table, separated by commas.
pub fn known_types() -> String {
    let types: Vec<&str> = FAMILIES.iter().flat_map(|f| f.model_types.iter().copied()).collect();
    types.join(", ")
}
