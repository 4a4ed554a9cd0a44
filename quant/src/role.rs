//! What a tensor is for, by its name and rank, in the namings of Hugging Face and GGUF.

use serde::{Deserialize, Serialize};

/// What a tensor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// A matrix that inputs are multiplied by (a convolution's kernel too, folded to a matrix).
    Linear,
    /// A table that tokens or positions look rows up in.
    Embedding,
    /// The matrix that makes logits.
    LmHead,
    /// Gains of a normalization.
    Norm,
    /// The small matrix that chooses experts.
    Router,
    /// Every other vector: biases, gates, frequencies.
    Vector,
}

impl Role {
    /// The word for it in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Role::Linear => "linear",
            Role::Embedding => "embedding",
            Role::LmHead => "lm-head",
            Role::Norm => "norm",
            Role::Router => "router",
            Role::Vector => "vector",
        }
    }

    /// The role of a tensor of this name and shape.
    pub fn of(name: &str, shape: &[usize]) -> Role {
        let lower = name.to_ascii_lowercase();
        let parts: Vec<&str> = lower.split('.').collect();
        let module = match parts.as_slice() {
            [.., module, "weight" | "bias"] => *module,
            [.., last] => *last,
            [] => "",
        };
        let has = |words: &[&str]| words.iter().any(|word| module.contains(word));
        // A side of 1 doesn't make a vector a matrix: gates of shared experts are (1, k).
        let rank = shape.iter().filter(|&&side| side != 1).count();
        if rank < 2 {
            let norm = has(&["norm"]) || module.starts_with("ln_") || module == "ln";
            return if norm && lower.ends_with("weight") { Role::Norm } else { Role::Vector };
        }
        if has(&["router", "gate_inp"]) || module == "gate" {
            return Role::Router;
        }
        if has(&["lm_head", "embed_out"]) || (module == "output" && parts.len() <= 2) {
            return Role::LmHead;
        }
        if has(&["embed", "token_embd"]) || ["wte", "wpe"].contains(&module) {
            return Role::Embedding;
        }
        Role::Linear
    }
}
