//! Logits against candle-transformers, which nobody here wrote, on the same files.

mod smollm2;
mod tiny;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, mistral, qwen2, qwen3};
use std::path::Path;

/// A model somebody else wrote: logits of the last position after some tokens at an offset.
type Oracle = Box<dyn FnMut(&[u32], usize) -> candle_core::Result<Vec<f32>>>;

/// candle's own model of a folder.
fn oracle(dir: &Path, model_type: &str) -> Oracle {
    let device = Device::Cpu;
    let tensors = candle_core::safetensors::load(dir.join("model.safetensors"), &device).unwrap();
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &device);
    let config = std::fs::read(dir.join("config.json")).unwrap();
    let last = |logits: Tensor| logits.flatten_all()?.to_vec1::<f32>();
    let input = move |tokens: &[u32]| Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0);
    match model_type {
        "llama" => {
            let config: llama::LlamaConfig = serde_json::from_slice(&config).unwrap();
            let config = config.into_config(false);
            let model = llama::Llama::load(vb, &config).unwrap();
            let mut cache = llama::Cache::new(true, DType::F32, &config, &device).unwrap();
            Box::new(move |tokens, offset| last(model.forward(&input(tokens)?, offset, &mut cache)?))
        }
        "mistral" => {
            // candle's mask lets a query see `window` keys before its own, transformers' counts its own among them.
            let mut config: mistral::Config = serde_json::from_slice(&config).unwrap();
            config.sliding_window = config.sliding_window.map(|window| window - 1);
            let mut model = mistral::Model::new(&config, vb).unwrap();
            Box::new(move |tokens, offset| last(model.forward(&input(tokens)?, offset)?))
        }
        "qwen2" => {
            let mut model = qwen2::ModelForCausalLM::new(&serde_json::from_slice(&config).unwrap(), vb).unwrap();
            Box::new(move |tokens, offset| last(model.forward(&input(tokens)?, offset)?))
        }
        "qwen3" => {
            let mut model = qwen3::ModelForCausalLM::new(&serde_json::from_slice(&config).unwrap(), vb).unwrap();
            Box::new(move |tokens, offset| last(model.forward(&input(tokens)?, offset)?))
        }
        other => panic!("no oracle for {other}"),
    }
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().chain(b).all(|v| v.is_finite()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
