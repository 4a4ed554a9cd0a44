//! Checkpoints of random weights: real shapes and real files without anybody's model, for tests and benchmarks.
//!
//! Weights are near-normal (a sum of four uniforms) with standard deviation 1/sqrt(K), seeded, the same for any thread
//! count; norms lie around 1. The text such a model writes means nothing; its speed and memory are those of its shape.

use crate::error::{ModelError, Result};
use half::{bf16, f16};
use nibble_quant::FloatFormat;
use rayon::prelude::*;
use safetensors::tensor::{Dtype, View};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::path::Path;

/// The shape of a model of random weights.
#[derive(Debug, Clone, PartialEq)]
pub struct SynthPlan {
    /// `model_type` as in config.json: llama, mistral, qwen2, qwen3.
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layers.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of a head; hidden_size / heads if absent.
    pub head_dim: Option<usize>,
    /// Tokens.
    pub vocab_size: usize,
    /// Whether the output head is the embedding.
    pub tie_embeddings: bool,
    /// How weights are stored.
    pub dtype: FloatFormat,
    /// Where randomness starts.
    pub seed: u64,
    /// More fields for config.json, or replacements.
    pub config: serde_json::Map<String, Value>,
}

impl SynthPlan {
    /// A model of a few thousand parameters.
    pub fn tiny(model_type: &str) -> SynthPlan {
        SynthPlan {
            model_type: model_type.to_string(),
            hidden_size: 64,
            intermediate_size: 176,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: None,
            vocab_size: 320,
            tie_embeddings: true,
            dtype: FloatFormat::F32,
            seed: 1,
            config: serde_json::Map::new(),
        }
    }

    /// The 1B Llama shape that benchmarks use: 0.97 B parameters in linears, 2.1 GB in bf16.
    pub fn llama_1b() -> SynthPlan {
        SynthPlan {
            model_type: "llama".to_string(),
            hidden_size: 2048,
            intermediate_size: 8192,
            layers: 16,
            heads: 32,
            kv_heads: 8,
            head_dim: Some(64),
            vocab_size: 49152,
            tie_embeddings: true,
            dtype: FloatFormat::Bf16,
            seed: 1,
            config: serde_json::Map::new(),
        }
    }

    /// The model's config.json.
    pub fn config_json(&self) -> Value {
        let mut config = json!({
            "architectures": [architecture(&self.model_type)],
            "model_type": self.model_type,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim(),
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tie_embeddings,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": 8192,
            "hidden_act": "silu",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": match self.dtype {
                FloatFormat::F32 => "float32",
                FloatFormat::F16 => "float16",
                FloatFormat::Bf16 => "bfloat16",
            },
        });
        if let Some(fields) = config.as_object_mut() {
            fields.extend(self.config.clone());
        }
        config
    }

    fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.heads.max(1))
    }

    /// Every tensor's name and shape, in the order of the file.
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (d, f) = (self.hidden_size, self.intermediate_size);
        let (qd, kd) = (self.heads * self.head_dim(), self.kv_heads * self.head_dim());
        let mut all = vec![("model.embed_tokens.weight".to_string(), vec![self.vocab_size, d])];
        for i in 0..self.layers {
            let mut add = |name: &str, shape: &[usize]| all.push((format!("model.layers.{i}.{name}"), shape.to_vec()));
            add("input_layernorm.weight", &[d]);
            add("self_attn.q_proj.weight", &[qd, d]);
            add("self_attn.k_proj.weight", &[kd, d]);
            add("self_attn.v_proj.weight", &[kd, d]);
            if self.model_type == "qwen2" {
                add("self_attn.q_proj.bias", &[qd]);
                add("self_attn.k_proj.bias", &[kd]);
                add("self_attn.v_proj.bias", &[kd]);
            }
            if self.model_type == "qwen3" {
                add("self_attn.q_norm.weight", &[self.head_dim()]);
                add("self_attn.k_norm.weight", &[self.head_dim()]);
            }
            add("self_attn.o_proj.weight", &[d, qd]);
            add("post_attention_layernorm.weight", &[d]);
            add("mlp.gate_proj.weight", &[f, d]);
            add("mlp.up_proj.weight", &[f, d]);
            add("mlp.down_proj.weight", &[d, f]);
        }
        all.push(("model.norm.weight".to_string(), vec![d]));
        if !self.tie_embeddings {
            all.push(("lm_head.weight".to_string(), vec![self.vocab_size, d]));
        }
        all
    }

    /// Writes config.json and model.safetensors into a folder, one tensor in memory at a time. `tokenizer_from` may
    /// name a folder whose tokenizer files are copied along.
    pub fn write(&self, dir: &Path, tokenizer_from: Option<&Path>) -> Result<()> {
        let io = |path: &Path, source: std::io::Error| ModelError::Io { path: path.to_path_buf(), source };
        std::fs::create_dir_all(dir).map_err(|e| io(dir, e))?;
        let config = dir.join("config.json");
        let text = serde_json::to_string_pretty(&self.config_json()).unwrap_or_default();
        std::fs::write(&config, text).map_err(|e| io(&config, e))?;
        if let Some(from) = tokenizer_from {
            for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"] {
                let source = from.join(name);
                if source.exists() {
                    std::fs::copy(&source, dir.join(name)).map_err(|e| io(&source, e))?;
                }
            }
        }
        let file = dir.join("model.safetensors");
        let tensors = self.tensors().into_iter().enumerate().map(|(i, (name, shape))| {
            let seed = self.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (i as u64) << 40;
            (name, RandomTensor { shape, dtype: self.dtype, seed })
        });
        safetensors::serialize_to_file(tensors, None, &file).map_err(|e| io(&file, std::io::Error::other(e)))
    }
}

fn architecture(model_type: &str) -> &'static str {
    match model_type {
        "mistral" => "MistralForCausalLM",
        "qwen2" => "Qwen2ForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        _ => "LlamaForCausalLM",
    }
}

/// A tensor whose values come into being when they are written.
struct RandomTensor {
    shape: Vec<usize>,
    dtype: FloatFormat,
    seed: u64,
}

impl RandomTensor {
    fn len(&self) -> usize {
        self.shape.iter().product()
    }

    fn value(&self, index: usize) -> f32 {
        let bits = mix(self.seed.wrapping_add(index as u64));
        let uniforms = [bits & 0xffff, (bits >> 16) & 0xffff, (bits >> 32) & 0xffff, bits >> 48];
        // A sum of four uniforms on [0, 1) has mean 2 and variance 1/3.
        let sum = uniforms.iter().sum::<u64>() as f32 / 65536.0;
        let normal = (sum - 2.0) * 3f32.sqrt();
        match self.shape.as_slice() {
            [_, k] => normal / (*k as f32).sqrt(),
            _ => 1.0 + 0.1 * normal,
        }
    }
}

/// SplitMix64's output function: a bijection of 64 bits that passes for random.
fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl View for RandomTensor {
    fn dtype(&self) -> Dtype {
        match self.dtype {
            FloatFormat::F32 => Dtype::F32,
            FloatFormat::F16 => Dtype::F16,
            FloatFormat::Bf16 => Dtype::BF16,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let width = self.data_len() / self.len().max(1);
        let mut bytes = vec![0u8; self.data_len()];
        bytes.par_chunks_mut(width * 65536).enumerate().for_each(|(chunk, bytes)| {
            for (i, out) in bytes.chunks_exact_mut(width).enumerate() {
                let value = self.value(chunk * 65536 + i);
                match self.dtype {
                    FloatFormat::F32 => out.copy_from_slice(&value.to_le_bytes()),
                    FloatFormat::F16 => out.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
                    FloatFormat::Bf16 => out.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
                }
            }
        });
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.len() * if self.dtype == FloatFormat::F32 { 4 } else { 2 }
    }
}
