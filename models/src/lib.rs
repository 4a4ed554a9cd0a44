//! Floor 2: model families, checkpoints, tokenizers, generation, evaluation, and ONNX graphs of vision models.

pub mod backend;
pub mod bench;
pub mod bridge;
pub mod calibrate;
pub mod config;
pub mod cpu;
pub mod cuda;
pub mod decoder;
pub mod error;
pub mod eval;
pub mod family;
pub mod generate;
pub mod graph;
pub mod hub;
pub mod model;
pub mod qat;
pub mod sample;
pub mod sensitivity;
pub mod sidecars;
pub mod stop;
pub mod synth;
pub mod template;
pub mod tokenizer;
pub mod trial;
pub mod vision;
pub mod weights;

pub use config::{Activation, LayerConfig, ModelConfig, RopeConfig, RopeFrequencies, RopeScaling};
pub use error::{ModelError, Result};
pub use family::{FAMILIES, Family};
pub use hub::{HubEvent, HubOptions};
pub use model::{Model, ModelOptions, gguf_sidecars};
pub use sample::{SampleSettings, Sampler, argmax};
pub use sidecars::Sidecars;
pub use stop::StopStrings;
pub use template::{ChatTemplate, Message, RenderOptions};
pub use tokenizer::{GgufVocab, TextStream, Tokenizer, TokenizerFiles};
