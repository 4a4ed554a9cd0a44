//! The model families: one row each, which turns a family's `config.json` into the [`ModelConfig`] of the one decoder.
//!
//! A family is data: its defaults, which options it switches on, and the names of its weights. Whatever it needs beyond
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
    /// What its tensors are called in a checkpoint.
    pub names: &'static WeightNames,
}

/// Names of a family's tensors, without the closing `.weight` or `.bias`; those of a layer come after `layer`.
#[derive(Debug, PartialEq, Eq)]
pub struct WeightNames {
    /// Token embedding, `(vocab_size, hidden)`.
    pub embed: &'static str,
    /// Last norm, `(hidden)`.
    pub norm: &'static str,
    /// Output projection, `(vocab_size, hidden)`; absent where it is the embedding.
    pub head: &'static str,
    /// What stands before a layer's number.
    pub layer: &'static str,
    /// Norm before attention, `(hidden)`.
    pub attn_norm: &'static str,
    /// Query projection, `(heads * head_dim, hidden)`.
    pub q: &'static str,
    /// Key projection, `(kv_heads * head_dim, hidden)`.
    pub k: &'static str,
    /// Value projection, `(kv_heads * head_dim, hidden)`.
    pub v: &'static str,
    /// Attention output projection, `(hidden, heads * head_dim)`.
    pub o: &'static str,
    /// Norm of each query head, `(head_dim)`.
    pub q_norm: &'static str,
    /// Norm of each key head, `(head_dim)`.
    pub k_norm: &'static str,
    /// Norm before the feed-forward layer, `(hidden)`.
    pub ffn_norm: &'static str,
    /// Gate projection, `(ffn, hidden)`.
    pub gate: &'static str,
    /// Up projection, `(ffn, hidden)`.
    pub up: &'static str,
    /// Down projection, `(hidden, ffn)`.
    pub down: &'static str,
}

impl WeightNames {
    /// The name of one of a layer's modules: `of(3, names.q)` is `model.layers.3.self_attn.q_proj`.
    pub fn of(&self, layer: usize, module: &str) -> String {
        format!("{}{layer}.{module}", self.layer)
    }
}

/// The names that Llama brought and most families kept.
pub static LLAMA_NAMES: WeightNames = WeightNames {
    embed: "model.embed_tokens",
    norm: "model.norm",
    head: "lm_head",
    layer: "model.layers.",
    attn_norm: "input_layernorm",
    q: "self_attn.q_proj",
    k: "self_attn.k_proj",
    v: "self_attn.v_proj",
    o: "self_attn.o_proj",
    q_norm: "self_attn.q_norm",
    k_norm: "self_attn.k_norm",
    ffn_norm: "post_attention_layernorm",
    gate: "mlp.gate_proj",
    up: "mlp.up_proj",
    down: "mlp.down_proj",
};

/// Every family this crate runs.
pub static FAMILIES: &[Family] = &[
    Family {
        name: "llama",
        model_types: &["llama"],
        summary: "Llama 2 and 3, SmolLM2 and their like: grouped-query attention, rotary positions, SwiGLU",
        configure: llama::configure,
        names: &LLAMA_NAMES,
    },
    Family {
        name: "mistral",
        model_types: &["mistral"],
        summary: "Mistral: Llama with a head width of its own and, in the first one, a sliding window",
        configure: mistral::configure,
        names: &LLAMA_NAMES,
    },
    Family {
        name: "qwen2",
        model_types: &["qwen2"],
        summary: "Qwen 2 and 2.5: Llama with biases on query, key and value",
        configure: qwen::configure_qwen2,
        names: &LLAMA_NAMES,
    },
    Family {
        name: "qwen3",
        model_types: &["qwen3"],
        summary: "Qwen 3: Llama with norms on query and key heads",
        configure: qwen::configure_qwen3,
        names: &LLAMA_NAMES,
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
