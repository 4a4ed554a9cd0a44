//! Floor 2: model families, checkpoints, tokenizers, generation and evaluation.

pub mod backend;
pub mod bench;
pub mod config;
pub mod decoder;
pub mod error;
pub mod eval;
pub mod family;
pub mod synth;
pub mod weights;

pub use config::{Activation, LayerConfig, ModelConfig, RopeConfig, RopeFrequencies, RopeScaling};
pub use error::{ModelError, Result};
pub use family::{FAMILIES, Family, WeightNames};
