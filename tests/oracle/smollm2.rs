//! The real SmolLM2, imported to single precision.

use super::{largest_difference, oracle};
use crate::assets::asset;
use nibble_models::backend::KvKind;
use nibble_models::decoder::ContextPlan;
use nibble_models::{Model, ModelOptions, argmax, gguf_sidecars};
use nibble_quant::convert::{Options, Silent, import_gguf};
use nibble_quant::format::Dtype;
use nibble_quant::format::gguf::GgufCheckpoint;

/// Two greedy continuations, by scripts/goldens/greedy.py.
const GOLDEN: &str = include_str!("../goldens/smollm2_greedy.json");

/// Both sides round sums of up to 1536 products, some 200 matrix products deep. A sum's rounding error is of the order
/// sqrt(1536) / 2 units of 2^-24 of its size, and independent errors of 200 products add up to sqrt(200) times that: 2e-5
/// of the logits' size. A wrong rotation, norm or mask shows in the first digit.
const BOUND: f32 = 1e-4;

/// Decode steps compared after each prompt.
const STEPS: usize = 8;

#[test]
fn smollm2_is_candles_llama_on_the_same_weights() {
    let Some(gguf) = asset("smollm2", "assets/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") else { return };
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("smollm2");
    let source = GgufCheckpoint::open(&gguf).unwrap();
    let extra = gguf_sidecars(&source, "float32").unwrap().into_files();
    let options = Options { extra, ..Options::default() };
    import_gguf(&source, Dtype::F32, &dir, &options, &Silent).unwrap();
    let model = Model::load(&dir, &ModelOptions { threads: Some(2), ..ModelOptions::exact() }).unwrap();
    let decoder = model.decoder();
    let golden: serde_json::Value = serde_json::from_str(GOLDEN).unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let tokens = |field: &str| -> Vec<u32> { serde_json::from_value(case[field].clone()).unwrap() };
        let (prompt, answer) = (tokens("prompt_ids"), tokens("ids"));
        // candle keeps keys and values in the model: each conversation has its own.
        let mut oracle = oracle(&dir, "llama");
        let plan = ContextPlan { capacity: 128, chunk: 16, kv: KvKind::F32, ..ContextPlan::default() };
        let mut cx = decoder.context(plan).unwrap();
        let mut check = |tokens: &[u32], offset: usize, next: u32| {
            decoder.prefill(&mut cx, 0, tokens).unwrap();
            let ours = decoder.last_logits(&mut cx).unwrap().into_owned();
            let theirs = oracle(tokens, offset).unwrap();
            let scale = theirs.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let difference = largest_difference(&ours, &theirs) / scale;
            assert!(difference < BOUND, "after {offset} + {} tokens: {difference} of {scale}", tokens.len());
            // NumPy's, candle's and ours: three that agree on the next token.
            assert_eq!(argmax(&theirs).unwrap(), next, "after {offset} tokens");
            assert_eq!(argmax(&ours).unwrap(), next, "after {offset} tokens");
        };
        check(&prompt, 0, answer[0]);
        for (i, pair) in answer.windows(2).take(STEPS).enumerate() {
            check(&pair[..1], prompt.len() + i, pair[1]);
        }
    }
}
