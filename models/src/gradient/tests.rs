//! The gradient pass against the decoder, and gradients against differences.

use super::*;
use crate::config::Activation;
use crate::cpu::CpuBackend;
use crate::decoder::{ContextPlan, Decoder};
use crate::synth::SynthPlan;
use crate::weights::Weights;
use nibble_kernels::{ActKind, Pool};
use nibble_quant::format;
use serde_json::json;

fn tiny(model_type: &str, fields: serde_json::Value) -> (tempfile::TempDir, ModelConfig) {
    let mut plan = SynthPlan::tiny(model_type);
    if let serde_json::Value::Object(fields) = fields {
        plan.config = fields;
    }
    let dir = tempfile::tempdir().unwrap();
    plan.write(dir.path(), None).unwrap();
    let config = ModelConfig::load(dir.path()).unwrap();
    (dir, config)
}

/// Families with everything that the decoder knows, and what no family here has.
fn models() -> Vec<(tempfile::TempDir, ModelConfig)> {
    let mut models = vec![
        tiny("llama", json!({})),
        tiny("mistral", json!({"sliding_window": 5})),
        tiny("qwen2", json!({})),
        tiny("qwen3", json!({})),
    ];
    let (dir, mut config) = tiny("llama", json!({"tie_word_embeddings": true}));
    config.activation = Activation::GeluTanh;
    config.attention_softcap = Some(0.7);
    config.logit_softcap = Some(2.0);
    config.embedding_scale = Some(3.0);
    config.residual_scale = Some(0.6);
    config.logit_scale = Some(1.7);
    config.layers[1].rope = false;
    models.push((dir, config));
    models
}

#[test]
fn logits_are_those_of_the_decoder() {
    for (dir, config) in models() {
        let source = format::open(dir.path()).unwrap();
        let tokens: Vec<u32> = (0..17).map(|i| (i * 37 + 5) % config.vocab_size as u32).collect();
        let backend = CpuBackend::new(Arc::new(Pool::new(1)), ActKind::F32);
        let decoder = Decoder::load(&config, Weights::new(&*source), backend).unwrap();
        let plan = ContextPlan {
            capacity: 17,
            chunk: 17,
            logit_rows: 17,
            kv: crate::backend::KvKind::F32,
            ..ContextPlan::default()
        };
        let mut cx = decoder.context(plan).unwrap();
        decoder.forward(&mut cx, &[(0, &tokens)], None).unwrap();
        let wanted = decoder.logits(&mut cx, &(0..17).collect::<Vec<_>>()).unwrap().into_owned();

        let model = Differentiable::load(&*source, &config, 1 << 30).unwrap();
        let ids = Tensor::new(&tokens[..], &Device::Cpu).unwrap();
        let embedded = model.embedding.index_select(&ids, 0).unwrap();
        let embedded = (embedded * config.embedding_scale.unwrap_or(1.0) as f64).unwrap();
        let logits = model.hidden(&embedded).unwrap().matmul(&model.head.t().unwrap()).unwrap();
        let logits = logits.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (scale, cap) = (config.logit_scale.unwrap_or(1.0), config.logit_softcap);
        for (got, wanted) in logits.iter().map(|z| z * scale).zip(&wanted) {
            let got = cap.map_or(got, |cap| cap * (got / cap).tanh());
            assert!((got - wanted).abs() < 2e-4, "{}: {got}, {wanted}", config.model_type);
        }
    }
}

/// A chunk of one token has one x and one g a layer, so that (u g)^2 (v x)^2 is `(u G u) (v H v) / trace H`: what
/// moving the weights along u v^T changes the log likelihood by, squared.
#[test]
fn gradients_are_what_moving_the_weights_does() {
    for (dir, config) in models() {
        let source = format::open(dir.path()).unwrap();
        let token = [7u32];
        let plan = CalibrationPlan { n_ctx: 1, tokens: None, gram_bytes: 1 << 30, bos: None, text: String::new() };
        let stats = calibrate_gradients(&*source, &config, &token, &plan, |_, _| true).unwrap().stats;
        let mut model = Differentiable::load(&*source, &config, 1 << 30).unwrap();
        let drawn = {
            let logits = log_likelihoods(&model);
            let mut left = Rng::new(SEED).unit();
            logits.iter().position(|p| {
                left -= (*p).exp();
                left < 0.0
            })
        };
        let drawn = drawn.unwrap();
        for part in ["self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] {
            let input = &stats.inputs[&format!("model.layers.1.{part}.weight")];
            let (h, g) = (input.gram().unwrap(), input.outputs().unwrap());
            let (k, n) = (h.width(), g.width());
            let direction = |i: usize, by: usize| ((i * by + 3) % 11) as f32 / 11.0 - 0.4;
            let (u, v): (Vec<f32>, Vec<f32>) =
                ((0..n).map(|i| direction(i, 5)).collect(), (0..k).map(|i| direction(i, 7)).collect());
            let form = |m: &nibble_quant::stats::Symmetric, a: &[f32]| -> f64 {
                let pairs = (0..a.len()).flat_map(|i| (0..a.len()).map(move |j| (i, j)));
                pairs.map(|(i, j)| a[i] as f64 * m.get(i, j) as f64 * a[j] as f64).sum()
            };
            let trace: f64 = (0..k).map(|i| h.get(i, i) as f64).sum();
            let wanted = (form(g, &u) * form(h, &v) / trace).sqrt();
            let outer = Tensor::from_vec(u, (n, 1), &Device::Cpu).unwrap();
            let outer = outer.matmul(&Tensor::from_vec(v, (1, k), &Device::Cpu).unwrap()).unwrap();
            let mut at = |by: f32| {
                let linear = model.layers[1].part(part);
                let kept = linear.weight.clone();
                linear.weight = (&kept + (&outer * by as f64).unwrap()).unwrap();
                let value = log_likelihoods(&model)[drawn];
                model.layers[1].part(part).weight = kept;
                value
            };
            let step = 1e-3f32;
            let got = ((at(step) - at(-step)) / (2.0 * step as f64)).abs();
            assert!((got - wanted).abs() < 0.03 * wanted + 1e-3, "{} {part}: {got}, {wanted}", config.model_type);
        }
    }
}

impl Layer {
    fn part(&mut self, name: &str) -> &mut Linear {
        let at = PARTS.iter().position(|part| *part == name).unwrap();
        &mut self.linears[at]
    }
}

/// Of each token after token 7.
fn log_likelihoods(model: &Differentiable) -> Vec<f64> {
    let c = model.config;
    let ids = Tensor::new(&[7u32], &Device::Cpu).unwrap();
    let embedded = (model.embedding.index_select(&ids, 0).unwrap() * c.embedding_scale.unwrap_or(1.0) as f64).unwrap();
    let logits = model.hidden(&embedded).unwrap().matmul(&model.head.t().unwrap()).unwrap();
    let cap = |z: f32| c.logit_softcap.map_or(z, |cap| cap * (z / cap).tanh());
    let logits = logits.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let logits: Vec<f32> = logits.into_iter().map(|z| cap(z * c.logit_scale.unwrap_or(1.0))).collect();
    let normalizer = crate::eval::log_sum_exp(&logits);
    logits.iter().map(|z| *z as f64 - normalizer).collect()
}
