//! Transforms leave logits as they are: every row of `TRANSFORMS` on a tiny model of every family, and on SmolLM2.

use crate::assets::asset;
use nibble_kernels::{ActKind, Pool};
use nibble_models::backend::KvKind;
use nibble_models::cpu::CpuBackend;
use nibble_models::decoder::{ContextPlan, Decoder};
use nibble_models::synth::SynthPlan;
use nibble_models::weights::Weights;
use nibble_models::{ModelConfig, gguf_sidecars};
use nibble_quant::format::gguf::GgufCheckpoint;
use nibble_quant::format::{self, TensorInfo, TensorSource};
use nibble_quant::stats::{Input, Stats};
use nibble_quant::transform::{Arguments, Kind, TRANSFORMS, transform};
use serde_json::json;
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// Logits after each of the tokens, in single precision.
fn logits(source: &dyn TensorSource, config: &ModelConfig, tokens: &[u32]) -> Vec<f32> {
    let backend = CpuBackend::new(Arc::new(Pool::new(2)), ActKind::F32);
    let decoder = Decoder::load(config, Weights::new(source), backend).unwrap();
    let (capacity, rows) = (tokens.len(), tokens.len());
    let plan = ContextPlan { capacity, chunk: rows, logit_rows: rows, kv: KvKind::F32, ..ContextPlan::default() };
    let mut cx = decoder.context(plan).unwrap();
    decoder.forward(&mut cx, &[(0, tokens)], None).unwrap();
    decoder.logits(&mut cx, &(0..rows).collect::<Vec<_>>()).unwrap().into_owned()
}

/// What another source reads, in one piece a tensor, as models are loaded from.
struct Held<'a> {
    source: &'a dyn TensorSource,
    bytes: HashMap<String, Vec<u8>>,
}

impl<'a> Held<'a> {
    fn all_of(source: &'a dyn TensorSource) -> Held<'a> {
        let read = |info: &TensorInfo| {
            let mut values = Vec::new();
            source.read_f32(&info.name, &mut values).unwrap();
            (info.name.clone(), values.iter().flat_map(|v| v.to_le_bytes()).collect())
        };
        Held { source, bytes: source.infos().iter().map(read).collect() }
    }
}

impl TensorSource for Held<'_> {
    fn path(&self) -> &Path {
        self.source.path()
    }

    fn infos(&self) -> &[TensorInfo] {
        self.source.infos()
    }

    fn info(&self, name: &str) -> nibble_quant::Result<&TensorInfo> {
        self.source.info(name)
    }

    fn bytes(&self, name: &str) -> nibble_quant::Result<Cow<'_, [u8]>> {
        Ok(Cow::Borrowed(&self.bytes[name]))
    }

    fn release(&self, _: &str) {}
}

/// The model with an output head of its own.
fn untied(config: &ModelConfig) -> ModelConfig {
    ModelConfig { tie_embeddings: false, ..config.clone() }
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert!(a.len() == b.len() && a.iter().chain(b).all(|v| v.is_finite()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn transforms_change_weights_and_no_logits() {
    for (model_type, biases) in
        [("llama", true), ("llama", false), ("mistral", false), ("qwen2", false), ("qwen3", false)]
    {
        // 72 columns are 8 x 9: a power of two and something else.
        let mut plan =
            SynthPlan { hidden_size: 72, heads: 9, kv_heads: 3, head_dim: Some(16), ..SynthPlan::tiny(model_type) };
        plan.config.insert("mlp_bias".into(), json!(false));
        plan.tie_embeddings = !biases;
        let dir = tempfile::tempdir().unwrap();
        plan.write(dir.path(), None).unwrap();
        if biases {
            add_biases(dir.path());
        }
        let source = format::open(dir.path()).unwrap();
        let config = ModelConfig::load(dir.path()).unwrap();
        let tokens: Vec<u32> = (0..24).map(|i| (i * 37 + 11) % plan.vocab_size as u32).collect();
        let wanted = logits(&*source, &config, &tokens);
        let stats = observed(&*source);
        let arguments = Arguments { seed: 5, stats: Some(&stats) };
        for row in TRANSFORMS {
            let transformed = row.apply(&*source, &arguments).unwrap();
            let rotates = matches!(row.kind, Kind::Rotation(_));
            let now = if rotates { untied(&config) } else { config.clone() };
            let found = logits(&Held::all_of(&*transformed), &now, &tokens);
            let difference = largest_difference(&found, &wanted);
            // Weights are rounded once more, to 24 bits.
            assert!(difference < 2e-5, "{model_type}, {}: logits differ by {difference}", row.name);
            let read = |source: &dyn TensorSource, name: &str| {
                let mut values = Vec::new();
                source.read_f32(name, &mut values).unwrap();
                values
            };
            for name in ["model.layers.1.input_layernorm.weight", "model.norm.weight"] {
                let ones = read(&*transformed, name).iter().all(|g| *g == 1.0);
                assert_eq!(ones, rotates, "{}: {name}", row.name);
            }
            for name in ["model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.up_proj.weight"] {
                assert!(read(&*transformed, name) != read(&*source, name), "{}: {name}", row.name);
            }
            // Read by parts it is the same.
            let (name, mut part) = ("model.layers.1.mlp.down_proj.weight", Vec::new());
            transformed.read_rows_f32(name, 10..31, &mut part).unwrap();
            let cols = transformed.info(name).unwrap().rows_cols().1;
            assert_eq!(part, read(&*transformed, name)[10 * cols..31 * cols], "{}", row.name);
        }
    }
}

const PLAIN: Arguments = Arguments { seed: 0, stats: None };

/// Statistics of inputs with a few large columns, for every linear layer.
fn observed(source: &dyn TensorSource) -> Stats {
    let mut stats = Stats::default();
    for info in source.infos().iter().filter(|info| info.name.ends_with("_proj.weight")) {
        let width = info.rows_cols().1;
        let x: Vec<f32> = (0..40 * width)
            .map(|i| (((i * 7919) % 997) as f32 / 997.0 - 0.5) * if i % width % 19 == 3 { 8.0 } else { 1.0 })
            .collect();
        let mut input = Input::new(width, true);
        input.observe(&info.name, &x).unwrap();
        stats.inputs.insert(info.name.clone(), Arc::new(input));
    }
    stats
}

#[test]
fn factors_need_statistics() {
    let dir = tempfile::tempdir().unwrap();
    SynthPlan::tiny("llama").write(dir.path(), None).unwrap();
    let source = format::open(dir.path()).unwrap();
    for name in ["smooth", "awq"] {
        let apply = |stats: Option<&Stats>| {
            let arguments = Arguments { seed: 0, stats };
            transform(name).unwrap().apply(&*source, &arguments).map(|_| ()).unwrap_err().to_string()
        };
        assert!(apply(None).contains("needs statistics"), "{}", apply(None));
        let of_none = apply(Some(&Stats::default()));
        assert!(of_none.contains("none of its layers"), "{of_none}");
    }
}

/// Gives the model biases on all projections, in a second file of weights.
fn add_biases(dir: &Path) {
    let config = dir.join("config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    (json["attention_bias"], json["mlp_bias"]) = (json!(true), json!(true));
    std::fs::write(&config, json.to_string()).unwrap();
    let file = dir.join("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut views: Vec<(String, safetensors::tensor::TensorView)> = tensors.tensors();
    let biases: Vec<(String, Vec<u8>)> = views
        .iter()
        .filter(|(name, _)| name.ends_with("_proj.weight"))
        .map(|(name, view)| {
            let values = (0..view.shape()[0]).map(|i| ((i * 29 + name.len()) % 17) as f32 / 17.0 - 0.4);
            (name.replace("weight", "bias"), values.flat_map(f32::to_le_bytes).collect())
        })
        .collect();
    for (name, bytes) in &biases {
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![bytes.len() / 4], bytes);
        views.push((name.clone(), view.unwrap()));
    }
    let whole = safetensors::serialize(views, None).unwrap();
    std::fs::write(&file, whole).unwrap();
}

#[test]
fn what_meets_the_residual_stream_in_an_unknown_way_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    SynthPlan::tiny("llama").write(dir.path(), None).unwrap();
    let file = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors();
    let renamed = |from: &str, to: &str| {
        let views = tensors.iter().map(|(name, view)| (name.replace(from, to), view.clone()));
        std::fs::write(&file, safetensors::serialize(views, None).unwrap()).unwrap();
        let source = format::open(dir.path()).unwrap();
        TRANSFORMS[0].apply(&*source, &PLAIN).map(|_| ()).unwrap_err().to_string()
    };
    let unknown = renamed("mlp.up_proj", "mlp.experts.0.up_proj");
    assert!(unknown.contains("mlp.experts.0.up_proj.weight") && unknown.contains("isn't known"), "{unknown}");
    let normless = renamed("layers.1.input_layernorm", "layers.7.input_layernorm");
    assert!(normless.contains("layers.1.input_layernorm.weight"), "{normless}");
    let misspelt = transform("hadamrd").unwrap_err().to_string();
    assert!(misspelt.contains("did you mean `hadamard`"), "{misspelt}");
}

#[test]
fn smollm2_turned_by_hadamard_predicts_the_same() {
    let Some(gguf) = asset("smollm2", "assets/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") else { return };
    let source = GgufCheckpoint::open(&gguf).unwrap();
    let json = gguf_sidecars(&source, "float32").unwrap().json("config.json").unwrap().unwrap();
    let config = ModelConfig::from_json(&gguf, &json).unwrap();
    let tokens: Vec<u32> = (0..32).map(|i| 100 + i * 331).collect();
    let wanted = logits(&source, &config, &tokens);
    let transformed = transform("hadamard").unwrap().apply(&source, &PLAIN).unwrap();
    let difference = largest_difference(&logits(&Held::all_of(&*transformed), &untied(&config), &tokens), &wanted);
    assert!(difference < 1e-3, "logits differ by {difference}");
}
