//! What a decoder is built from: `config.json` reduced to one plain struct.
//!
//! Each family ([`crate::family`]) turns its own spelling and its own defaults into a [`ModelConfig`]; the decoder reads
//! nothing else and asks for no model type. Rules follow Hugging Face transformers: unknown fields are ignored, a
//! missing field takes transformers' default where it has one and is refused by name where a guess would hide a mistake,
//! and sizes that no real model has are refused before anything is allocated from them.

mod fields;
mod rope;

use std::path::Path;

use serde_json::Value;

use crate::error::{ModelError, Result};
use crate::family;

pub use fields::Fields;
pub use rope::{RopeConfig, RopeFrequencies, RopeScaling};

/// Largest vocabulary accepted; the largest real ones hold about 262,000 tokens.
pub const MAX_VOCAB: usize = 1 << 24;
/// Largest width accepted for the residual stream and for all heads together.
pub const MAX_HIDDEN: usize = 1 << 17;
/// Largest width accepted for the feed-forward layer.
pub const MAX_FFN: usize = 1 << 20;
/// Most layers accepted.
pub const MAX_LAYERS: usize = 1 << 10;
/// Largest width accepted for one head.
pub const MAX_HEAD_DIM: usize = 1 << 10;
/// Longest context accepted.
pub const MAX_POSITIONS: usize = 1 << 28;

/// The nonlinearity of the gated feed-forward layer: `down(act(gate(x)) * up(x))`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU by its tanh approximation, `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
    GeluTanh,
}

/// What differs from layer to layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// Keys that a query sees, itself included: query `q` attends to keys `k` with `q - window < k <= q`. `None`: all.
    pub window: Option<usize>,
    /// Whether queries and keys are rotated by position in this layer.
    pub rope: bool,
}

/// A decoder-only transformer, as the decoder needs to know it.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The type that `config.json` names, such as `llama`.
    pub model_type: String,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// One entry a layer, first layer first.
    pub layers: Vec<LayerConfig>,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head; `heads * head_dim` need not equal `hidden`.
    pub head_dim: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    /// Epsilon of every RMS norm.
    pub rms_eps: f32,
    /// Norm gains are stored as `w` and applied as `1 + w` (Gemma).
    pub norm_add_one: bool,
    /// How positions rotate queries and keys.
    pub rope: RopeConfig,
    /// Context length the model was made for, in tokens.
    pub max_positions: usize,
    /// The output projection is the embedding itself.
    pub tie_embeddings: bool,
    /// Query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// The attention output projection has a bias.
    pub o_bias: bool,
    /// The feed-forward projections have a bias.
    pub mlp_bias: bool,
    /// Queries and keys go through an RMS norm over `head_dim` before they are rotated (Qwen3).
    pub qk_norm: bool,
    /// Nonlinearity of the feed-forward layer.
    pub activation: Activation,
    /// Factor on `q . k` before the softmax: `1 / sqrt(head_dim)` unless the family says otherwise.
    pub query_scale: f32,
    /// Attention scores become `cap * tanh(score / cap)` (Gemma 2).
    pub attention_softcap: Option<f32>,
    /// Logits become `cap * tanh(logit / cap)` (Gemma 2).
    pub logit_softcap: Option<f32>,
    /// Factor on embeddings as they enter the residual stream (Gemma, Granite).
    pub embedding_scale: Option<f32>,
    /// Factor on what each block adds to the residual stream (Granite).
    pub residual_scale: Option<f32>,
    /// Factor on logits, before any softcap (Granite, as the inverse of its `logits_scaling`).
    pub logit_scale: Option<f32>,
    /// Token that starts a sequence, where the model has one.
    pub bos: Option<u32>,
    /// Tokens that end a sequence; may be empty.
    pub eos: Vec<u32>,
    /// Type that the weights were published in, such as `bfloat16`.
    pub dtype: Option<String>,
}

impl ModelConfig {
    /// Reads `config.json` from `path`, a model folder or the file itself.
    ///
    /// # Errors
    /// The file can't be read or isn't a JSON object; its `model_type` is unknown; a field is missing or absurd.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = if path.is_dir() { path.join("config.json") } else { path.to_path_buf() };
        let bytes = std::fs::read(&file).map_err(ModelError::io(&file))?;
        let value = serde_json::from_slice(&bytes)
            .map_err(|e| ModelError::Damaged { path: file.clone(), why: format!("not JSON: {e}") })?;
        Self::from_json(&file, &value)
    }

    /// Takes a parsed `config.json`; `file` is what errors call it.
    ///
    /// # Errors
    /// As [`ModelConfig::load`].
    pub fn from_json(file: &Path, value: &Value) -> Result<Self> {
        let fields = Fields::new(file, value)?;
        let model_type: String = fields.required("model_type")?;
        let Some(family) = family::find(&model_type) else {
            return Err(ModelError::UnknownFamily {
                path: file.to_path_buf(),
                found: model_type,
                known: family::known_types(),
            });
        };
        (family.configure)(&fields)
    }

    /// Query heads that share one key and value head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Width of all query heads together, the rows of `q_proj`.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key heads together, the rows of `k_proj` and of `v_proj`.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Reads what every Llama-like family spells alike; a family then changes what it does otherwise.
    ///
    /// Biases, QK norm, windows and multipliers are off, and the output projection is its own unless
    /// `tie_word_embeddings` says otherwise.
    ///
    /// # Errors
    /// A field is missing or absurd.
    pub fn base(fields: &Fields) -> Result<Self> {
        let vocab_size = fields.size("vocab_size", MAX_VOCAB)?;
        let hidden = fields.size("hidden_size", MAX_HIDDEN)?;
        let layers = fields.size("num_hidden_layers", MAX_LAYERS)?;
        let heads = fields.size("num_attention_heads", MAX_HIDDEN)?;
        let kv_heads = fields.size_or("num_key_value_heads", heads, MAX_HIDDEN)?;
        let head_dim = match fields.get("head_dim") {
            Some(_) => fields.size("head_dim", MAX_HEAD_DIM)?,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                return Err(
                    fields.refuse("num_attention_heads", format!("{heads} heads do not divide {hidden} columns"))
                );
            }
        };
        if !heads.is_multiple_of(kv_heads) {
            let why = format!("{kv_heads} key heads do not divide {heads} query heads");
            return Err(fields.refuse("num_key_value_heads", why));
        }
        if heads.saturating_mul(head_dim) > MAX_HIDDEN {
            return Err(fields
                .refuse("num_attention_heads", format!("{heads} heads of {head_dim}, at most {MAX_HIDDEN} in all")));
        }
        let max_positions = fields.size("max_position_embeddings", MAX_POSITIONS)?;
        let rms_eps = fields.number("rms_norm_eps")?.unwrap_or(1e-6);
        if !(rms_eps > 0.0 && rms_eps < 1.0) {
            return Err(fields.refuse("rms_norm_eps", format!("{rms_eps}, wanted a number between 0 and 1")));
        }
        Ok(Self {
            model_type: fields.required("model_type")?,
            vocab_size,
            hidden,
            layers: vec![LayerConfig { window: None, rope: true }; layers],
            heads,
            kv_heads,
            head_dim,
            ffn: fields.size("intermediate_size", MAX_FFN)?,
            rms_eps: rms_eps as f32,
            norm_add_one: false,
            rope: RopeConfig::from_fields(fields, head_dim, max_positions)?,
            max_positions,
            tie_embeddings: fields.flag("tie_word_embeddings", false)?,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            activation: activation(fields)?,
            query_scale: 1.0 / (head_dim as f32).sqrt(),
            attention_softcap: None,
            logit_softcap: None,
            embedding_scale: None,
            residual_scale: None,
            logit_scale: None,
            bos: fields.token_ids("bos_token_id", vocab_size)?.first().copied(),
            eos: fields.token_ids("eos_token_id", vocab_size)?,
            dtype: fields.optional("dtype")?.or(fields.optional("torch_dtype")?),
        })
    }
}

/// `hidden_act`, by transformers' names.
fn activation(fields: &Fields) -> Result<Activation> {
    let name: Option<String> = match fields.optional("hidden_activation")? {
        Some(name) => Some(name),
        None => fields.optional("hidden_act")?,
    };
    match name.as_deref() {
        None | Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh" | "gelu_new") => Ok(Activation::GeluTanh),
        Some(other) => Err(fields.refuse("hidden_act", format!("`{other}`; known: silu, gelu_pytorch_tanh, gelu_new"))),
    }
}
