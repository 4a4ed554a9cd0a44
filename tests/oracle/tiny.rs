//! Tiny seeded checkpoints of each family.

use super::{largest_difference, oracle};
use nibble_models::backend::KvKind;
use nibble_models::decoder::ContextPlan;
use nibble_models::synth::SynthPlan;
use nibble_models::{Model, ModelOptions};
use serde_json::{Value, json};

fn case(model_type: &str, change: impl FnOnce(&mut SynthPlan), fields: Value) -> SynthPlan {
    let mut plan = SynthPlan::tiny(model_type);
    change(&mut plan);
    if let Value::Object(fields) = fields {
        plan.config = fields;
    }
    plan
}

fn cases() -> Vec<(&'static str, SynthPlan)> {
    let llama3 = json!({
        "rope_theta": 500000.0, "max_position_embeddings": 131072,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32},
    });
    let qwen = json!({"sliding_window": 4096, "max_window_layers": 2, "use_sliding_window": false,
        "attention_bias": false, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6});
    vec![
        ("llama 2: as many key heads as query heads", case("llama", |p| p.kv_heads = 4, json!({}))),
        (
            "smollm2: odd widths, tied",
            case(
                "llama",
                |p| {
                    p.hidden_size = 72;
                    p.heads = 9;
                    p.kv_heads = 3;
                },
                json!({}),
            ),
        ),
        ("llama 3: rope scaling, own head", case("llama", |p| p.tie_embeddings = false, llama3)),
        (
            "mistral: explicit head width",
            case(
                "mistral",
                |p| {
                    p.head_dim = Some(32);
                    p.tie_embeddings = false;
                },
                json!({"sliding_window": null}),
            ),
        ),
        ("mistral: sliding window", case("mistral", |p| p.tie_embeddings = false, json!({"sliding_window": 7}))),
        ("qwen2: biases on q, k, v", case("qwen2", |_| (), qwen.clone())),
        ("qwen3: norms on q and k", case("qwen3", |p| p.head_dim = Some(32), qwen)),
    ]
}

#[test]
fn logits_equal_candle_transformers() {
    for (name, plan) in cases() {
        let dir = tempfile::tempdir().unwrap();
        plan.write(dir.path(), None).unwrap();
        let mut oracle = oracle(dir.path(), &plan.model_type);
        let model = Model::load(dir.path(), &ModelOptions { threads: Some(2), ..ModelOptions::exact() }).unwrap();
        let decoder = model.decoder();
        let context = ContextPlan { capacity: 64, chunk: 5, kv: KvKind::F32, ..ContextPlan::default() };
        let mut cx = decoder.context(context).unwrap();
        let tokens: Vec<u32> = (0..40).map(|i| (i * 37 + 11) % plan.vocab_size as u32).collect();

        // A prompt in chunks of 5 on our side, at once on the other; then token by token on both.
        let (prompt, rest) = tokens.split_at(23);
        decoder.prefill(&mut cx, 0, prompt).unwrap();
        let ours = decoder.last_logits(&mut cx).unwrap().into_owned();
        let theirs = oracle(prompt, 0).unwrap();
        let difference = largest_difference(&ours, &theirs);
        assert!(difference < 1e-4, "{name}: logits after the prompt differ by {difference}");
        // candle's mistral masks prompts only: a token decoded by itself sees its whole cache.
        let windowed = plan.config.get("sliding_window").is_some_and(|w| w.is_u64()) && plan.model_type == "mistral";
        for (i, token) in rest.iter().enumerate().filter(|_| !windowed) {
            decoder.forward(&mut cx, &[(0, std::slice::from_ref(token))], None).unwrap();
            let ours = decoder.last_logits(&mut cx).unwrap().into_owned();
            let theirs = oracle(&[*token], prompt.len() + i).unwrap();
            let difference = largest_difference(&ours, &theirs);
            assert!(difference < 1e-4, "{name}: logits of token {i} differ by {difference}");
        }
    }
}
