//! From GGUF to Hugging Face: tensor names, the rows of queries and keys, and config.json from the metadata.
//!
//! For the architecture `llama` GGUF stores the rows of each query and key head interleaved (the two halves of a
//! rotated pair side by side); Hugging Face stores all first halves, then all second halves. Other architectures keep
//! Hugging Face's order. A file without `output.weight` ties the output to the embedding, and so does the config.

use super::gguf::{GgufSource, Metadata};
use super::source::TensorSource;
use super::{damaged, tensor_error};
use crate::error::Result;
use serde_json::{Map, Value, json};

/// A family whose GGUF files can be turned into Hugging Face checkpoints.
#[derive(Debug)]
pub struct Architecture {
    /// `general.architecture`.
    pub gguf: &'static str,
    /// `model_type` in config.json.
    pub model_type: &'static str,
    /// `architectures` in config.json.
    pub class: &'static str,
    /// Whether the rows of queries and keys are interleaved.
    pub interleaved: bool,
}

/// All of them. Mistral's files call themselves `llama`.
pub static ARCHITECTURES: &[Architecture] = &[
    Architecture { gguf: "llama", model_type: "llama", class: "LlamaForCausalLM", interleaved: true },
    Architecture { gguf: "qwen2", model_type: "qwen2", class: "Qwen2ForCausalLM", interleaved: false },
    Architecture { gguf: "qwen3", model_type: "qwen3", class: "Qwen3ForCausalLM", interleaved: false },
];

/// Tensors outside of the blocks, and those inside of block N (`blk.N.` and `model.layers.N.` before them).
const OUTER: &[(&str, &str)] =
    &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];
const INNER: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];
/// Not a weight: the factors of rotary scaling, which config.json expresses.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Where a tensor of the GGUF file goes.
#[derive(Debug, Clone, PartialEq)]
pub struct Renamed {
    /// Its name in the GGUF file.
    pub gguf: String,
    /// Its name in the Hugging Face checkpoint.
    pub name: String,
    /// Rows of a head whose interleaved order is to be undone.
    pub head: Option<usize>,
}

/// What config.json needs to know, read and checked once.
#[derive(Debug)]
pub struct Model<'a> {
    source: &'a GgufSource,
    architecture: &'static Architecture,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    layers: usize,
}

impl<'a> Model<'a> {
    /// Reads the shape of the model.
    ///
    /// # Errors
    /// If the architecture isn't in [`ARCHITECTURES`], a key is missing, or sizes contradict each other.
    pub fn new(source: &'a GgufSource) -> Result<Self> {
        let meta = source.metadata();
        let found = meta.need_str("general.architecture")?;
        let architecture = ARCHITECTURES.iter().find(|a| a.gguf == found).ok_or_else(|| {
            let known: Vec<&str> = ARCHITECTURES.iter().map(|a| a.gguf).collect();
            damaged(source.path(), format!("architecture `{found}`, wanted one of {}", known.join(", ")))
        })?;
        let mut model = Self { source, architecture, heads: 0, kv_heads: 0, head_dim: 0, layers: 0 };
        if model.u32("expert_count")?.unwrap_or(0) > 0 {
            return Err(damaged(source.path(), format!("`{found}` with experts can't be imported")));
        }
        let hidden = model.need("embedding_length")?;
        model.layers = model.need("block_count")?;
        model.heads = model.need("attention.head_count")?;
        model.kv_heads = model.u32("attention.head_count_kv")?.map_or(model.heads, |h| h as usize);
        if model.heads == 0 || model.kv_heads == 0 || !model.heads.is_multiple_of(model.kv_heads) {
            let why = format!("{} heads and {} key-value heads don't divide", model.heads, model.kv_heads);
            return Err(damaged(source.path(), why));
        }
        model.head_dim = model.u32("attention.key_length")?.map_or(hidden / model.heads, |d| d as usize);
        let values = model.u32("attention.value_length")?.map_or(model.head_dim, |d| d as usize);
        let rotated = model.u32("rope.dimension_count")?.map_or(model.head_dim, |d| d as usize);
        if model.head_dim == 0
            || !model.head_dim.is_multiple_of(2)
            || values != model.head_dim
            || rotated != model.head_dim
        {
            let why = format!("heads of {}, values of {values}, {rotated} rotated: wanted equal", model.head_dim);
            return Err(damaged(source.path(), why));
        }
        Ok(model)
    }

    /// Every tensor's new name, in file order.
    ///
    /// # Errors
    /// If a tensor has no place in a checkpoint of this family, or a head's rows don't divide it.
    pub fn tensors(&self) -> Result<Vec<Renamed>> {
        let mut renamed = Vec::new();
        for info in self.source.infos().iter().filter(|i| i.name != ROPE_FACTORS) {
            let (name, inner) = self.rename(&info.name)?;
            let interleaved = self.architecture.interleaved && matches!(inner, "attn_q" | "attn_k");
            let head = interleaved.then_some(self.head_dim);
            let heads = if inner == "attn_q" { self.heads } else { self.kv_heads };
            let rows = info.shape.first().copied().unwrap_or(0);
            if head.is_some() && rows != heads * self.head_dim {
                let why = format!("{rows} rows, wanted {heads} heads of {}", self.head_dim);
                return Err(tensor_error(&info.name, why));
            }
            renamed.push(Renamed { gguf: info.name.clone(), name, head });
        }
        Ok(renamed)
    }

    fn rename<'n>(&self, gguf: &'n str) -> Result<(String, &'n str)> {
        let unknown = || tensor_error(gguf, format!("has no place in a {} checkpoint", self.architecture.model_type));
        let (stem, kind) =
            gguf.rsplit_once('.').filter(|(_, k)| matches!(*k, "weight" | "bias")).ok_or_else(unknown)?;
        if let Some((_, name)) = OUTER.iter().find(|(from, _)| *from == stem) {
            return Ok((format!("{name}.{kind}"), stem));
        }
        let (layer, inner) = stem.strip_prefix("blk.").and_then(|s| s.split_once('.')).ok_or_else(unknown)?;
        let layer: usize = layer.parse().map_err(|_| unknown())?;
        let (_, name) = INNER.iter().find(|(from, _)| *from == inner).ok_or_else(unknown)?;
        if layer >= self.layers {
            return Err(tensor_error(gguf, format!("the model has {} layers", self.layers)));
        }
        Ok((format!("model.layers.{layer}.{name}.{kind}"), inner))
    }

    /// config.json for weights of type `dtype` (`bfloat16`, `float16`, `float32`).
    ///
    /// # Errors
    /// If a key is missing or of another type, or the rotary scaling can't be expressed.
    pub fn config(&self, dtype: &str) -> Result<Value> {
        let (meta, a) = (self.source.metadata(), self.architecture);
        let embedding = self.source.info("token_embd.weight")?;
        let theta = self.f64("rope.freq_base")?.unwrap_or(10000.0);
        let tied = !self.source.contains("output.weight");
        let biased = |inner: &str| self.source.contains(&format!("blk.0.{inner}.bias"));
        let mut config = Map::new();
        let mut set = |key: &str, value: Value| config.insert(key.to_owned(), value);
        set("architectures", json!([a.class]));
        set("model_type", json!(a.model_type));
        set("vocab_size", json!(embedding.shape.first().copied().unwrap_or(0)));
        set("hidden_size", json!(self.need("embedding_length")?));
        set("intermediate_size", json!(self.need("feed_forward_length")?));
        set("num_hidden_layers", json!(self.layers));
        set("num_attention_heads", json!(self.heads));
        set("num_key_value_heads", json!(self.kv_heads));
        set("head_dim", json!(self.head_dim));
        set("hidden_act", json!("silu"));
        set("max_position_embeddings", json!(self.need("context_length")?));
        set("rms_norm_eps", json!(short(meta.need_f64(&self.key("attention.layer_norm_rms_epsilon"))?)));
        set("rope_theta", json!(short(theta)));
        set("rope_scaling", self.rope_scaling(theta)?);
        if a.model_type != "qwen2" {
            set("attention_bias", json!(biased("attn_q")));
        }
        if a.model_type == "llama" {
            set("mlp_bias", json!(biased("ffn_gate")));
        }
        set("tie_word_embeddings", json!(tied));
        for (key, value) in self.special_tokens()? {
            set(&key, value);
        }
        set("use_cache", json!(true));
        set("torch_dtype", json!(dtype));
        Ok(Value::Object(config))
    }

    /// generation_config.json: the special tokens, all ends of a turn among them.
    ///
    /// # Errors
    /// If a token's key is of another type.
    pub fn generation_config(&self) -> Result<Value> {
        let mut config = self.special_tokens()?;
        let meta = self.source.metadata();
        let mut ends: Vec<u32> = Vec::new();
        for key in ["eos", "eot", "eom"] {
            if let Some(id) = meta.u32(&format!("tokenizer.ggml.{key}_token_id"))?.filter(|id| !ends.contains(id)) {
                ends.push(id);
            }
        }
        if ends.len() > 1 {
            config.insert("eos_token_id".to_owned(), json!(ends));
        }
        Ok(Value::Object(config))
    }

    fn special_tokens(&self) -> Result<Map<String, Value>> {
        let mut tokens = Map::new();
        for (gguf, hf) in [("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")] {
            if let Some(id) = self.source.metadata().u32(&format!("tokenizer.ggml.{gguf}_token_id"))? {
                tokens.insert(hf.to_owned(), json!(id));
            }
        }
        Ok(tokens)
    }

    fn rope_scaling(&self, theta: f64) -> Result<Value> {
        if self.source.contains(ROPE_FACTORS) {
            return self.llama3_scaling(theta);
        }
        let kind = self.source.metadata().str(&self.key("rope.scaling.type"))?.unwrap_or("none");
        let Some(factor) = self.f64("rope.scaling.factor")?.filter(|_| kind != "none") else { return Ok(Value::Null) };
        let original = self.u32("rope.scaling.original_context_length")?;
        match kind {
            "linear" => Ok(json!({ "rope_type": "linear", "factor": short(factor) })),
            "yarn" => {
                let mut scaling = json!({ "rope_type": "yarn", "factor": short(factor) });
                if let Some(original) = original {
                    scaling["original_max_position_embeddings"] = json!(original);
                }
                Ok(scaling)
            }
            other => Err(damaged(self.source.path(), format!("rotary scaling `{other}`, wanted linear or yarn"))),
        }
    }

    /// Llama 3's rule leaves only its factors in the file. The rule that yields exactly them is found again among those
    /// in use (low 1, high 4, an original context of a power of two).
    fn llama3_scaling(&self, theta: f64) -> Result<Value> {
        let mut found = Vec::new();
        (self.source as &dyn TensorSource).read_f32(ROPE_FACTORS, &mut found)?;
        let factor = found.iter().copied().fold(1.0f32, f32::max);
        if found.iter().all(|f| *f == 1.0) {
            return Ok(Value::Null);
        }
        for original in (11..=17).map(|bits| 1u32 << bits) {
            let wanted = llama3_factors(theta, self.head_dim, factor.into(), original.into());
            let close = |(f, w): (&f32, &f64)| (*f as f64 - w).abs() <= 1e-4 * w;
            if found.len() == wanted.len() && found.iter().zip(&wanted).all(close) {
                return Ok(json!({
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": original,
                }));
            }
        }
        Err(tensor_error(ROPE_FACTORS, "factors are not those of Llama 3's rotary scaling"))
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture.gguf)
    }

    fn u32(&self, key: &str) -> Result<Option<u32>> {
        self.source.metadata().u32(&self.key(key))
    }

    fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.source.metadata().f64(&self.key(key))
    }

    fn need(&self, key: &str) -> Result<usize> {
        let meta: &Metadata = self.source.metadata();
        Ok(meta.need_u32(&self.key(key))? as usize)
    }
}

/// What each rotary frequency is divided by, with low 1 and high 4 (transformers' `_compute_llama3_parameters`).
pub fn llama3_factors(theta: f64, head_dim: usize, factor: f64, original: f64) -> Vec<f64> {
    let (low, high) = (1.0, 4.0);
    let one = |i: usize| {
        let wavelength = 2.0 * std::f64::consts::PI * theta.powf(2.0 * i as f64 / head_dim as f64);
        if wavelength < original / high {
            1.0
        } else if wavelength > original / low {
            factor
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    (0..head_dim / 2).map(one).collect()
}

/// GGUF keeps f32: the shortest decimal that reads back as the same f32 (1e-5, not 9.999999747378752e-6).
fn short(value: f64) -> f64 {
    (value as f32).to_string().parse().unwrap_or(value)
}

/// Where the interleaved order has a row: row p * half + i of a head is stored as row 2i + p.
pub fn interleaved_row(row: usize, head: usize) -> usize {
    let (first, within) = (row / head * head, row % head);
    first + 2 * (within % (head / 2)) + within / (head / 2)
}

/// Undoes the interleaving in whole heads of rows.
pub fn uninterleave(rows: &mut [f32], head: usize, row: usize) {
    if row == 0 || head < 2 {
        return;
    }
    let mut copy = vec![0.0; head * row];
    for head_rows in rows.chunks_exact_mut(head * row) {
        copy.copy_from_slice(head_rows);
        for (to, out) in head_rows.chunks_exact_mut(row).enumerate() {
            let from = interleaved_row(to, head);
            out.copy_from_slice(&copy[from * row..(from + 1) * row]);
        }
    }
}
