//! Floor 2: model families, checkpoints, tokenizers, generation and evaluation.

pub mod config;
pub mod error;
pub mod family;
pub mod hub;
pub mod sample;
pub mod stop;
pub mod template;
pub mod tokenizer;

pub use config::{Activation, LayerConfig, ModelConfig, RopeConfig, RopeFrequencies, RopeScaling};
pub use error::{ModelError, Result};
pub use family::{FAMILIES, Family, WeightNames};
pub use hub::{HubEvent, HubOptions};
pub use sample::{SampleSettings, Sampler, argmax};
pub use stop::StopStrings;
pub use template::{ChatTemplate, Message, RenderOptions};
pub use tokenizer::{GgufVocab, TextStream, Tokenizer, TokenizerFiles};
