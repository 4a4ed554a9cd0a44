//! Going through a model block by block.

use super::*;
use crate::synth::SynthPlan;
use nibble_quant::Rule;
use nibble_quant::format;
use std::path::Path;

const N_CTX: usize = 16;

struct Tiny {
    dir: tempfile::TempDir,
    config: ModelConfig,
    tokens: Vec<u32>,
}

fn tiny(model_type: &str) -> Tiny {
    let dir = tempfile::tempdir().unwrap();
    SynthPlan::tiny(model_type).write(&dir.path().join("model"), None).unwrap();
    let config = ModelConfig::load(dir.path().join("model")).unwrap();
    let tokens = (0..12 * N_CTX as u32).map(|i| (i * i * 7 + i * 31 + 5) % config.vocab_size as u32).collect();
    Tiny { dir, config, tokens }
}

fn calibration() -> CalibrationPlan {
    CalibrationPlan { n_ctx: N_CTX, tokens: None, gram_bytes: 1 << 30, bos: Some(1), text: "numbers".into() }
}

fn recipe(algorithm: &str) -> Recipe {
    let rule = Rule {
        pattern: Some("*_proj.weight".into()),
        scheme: Some("int4-nl-g32-dq".into()),
        algorithm: Some(algorithm.into()),
        ..Rule::default()
    };
    Recipe { rules: vec![rule], ..Recipe::default() }
}

impl Tiny {
    fn run(&self, recipe: &Recipe, folder: &Path, stop_after: usize) -> (Result<()>, Blocks, Vec<BlockReport>) {
        let source = format::open(&self.dir.path().join("model")).unwrap();
        let calibration = calibration();
        let learning = Learning { steps: 30, ..Learning::default() };
        let plan = SequentialPlan { calibration: &calibration, learning, levels: true, seed: 3 };
        let mut blocks = Blocks::open(folder, "0123").unwrap();
        let mut reports = Vec::new();
        let outcome = quantize_blocks(&*source, &self.config, recipe, &self.tokens, &plan, &mut blocks, |report| {
            reports.push(report.clone());
            reports.len() < stop_after
        });
        (outcome, blocks, reports)
    }

    fn tensors(&self, blocks: &Blocks) -> Vec<QTensor> {
        let names = (0..self.config.layers.len()).flat_map(|layer| (0..PARTS.len()).map(move |part| (layer, part)));
        names.map(|(layer, part)| blocks.tensor(&weight_name(layer, part)).unwrap().unwrap()).collect()
    }
}

#[test]
fn a_run_that_was_stopped_goes_on_to_the_same_tensors() {
    for (model, algorithm) in [("llama", "autoround"), ("qwen3", "gptq"), ("qwen2", "autoround")] {
        let tiny = tiny(model);
        let recipe = recipe(algorithm);
        let (outcome, whole, reports) = tiny.run(&recipe, &tiny.dir.path().join("whole"), usize::MAX);
        outcome.unwrap();
        assert_eq!(whole.done(), tiny.config.layers.len());
        assert!(reports.iter().all(|report| !report.resumed));
        assert_eq!(reports.iter().all(|report| report.learned.is_some()), algorithm == "autoround");

        let folder = tiny.dir.path().join("stopped");
        let (outcome, part, _) = tiny.run(&recipe, &folder, 1);
        assert!(matches!(outcome, Err(ModelError::Quant(QuantError::Stopped))));
        assert_eq!(part.done(), 1);
        let (outcome, resumed, reports) = tiny.run(&recipe, &folder, usize::MAX);
        outcome.unwrap();
        assert_eq!(reports.iter().map(|report| report.resumed).collect::<Vec<_>>(), [true, false]);
        assert_eq!(tiny.tensors(&whole), tiny.tensors(&resumed), "{model}");
        // Another run's blocks aren't taken up.
        assert_eq!(Blocks::open(&folder, "other").unwrap().done(), 0);
    }
}

/// What a block gives after learning is no further from what it should give, on text that it didn't learn from; and for
/// most blocks it is nearer.
#[test]
fn learning_never_leaves_a_block_worse() {
    let tiny = tiny("llama");
    let (outcome, _, reports) = tiny.run(&recipe("autoround"), &tiny.dir.path().join("blocks"), usize::MAX);
    outcome.unwrap();
    for report in reports {
        let learned = report.learned.unwrap();
        assert!(learned.before > 0.0 && learned.before.is_finite() && learned.after.is_finite(), "{learned:?}");
    }
}

/// Nothing quantized: the stream that goes through quantized blocks is the float one, and both are the decoder's.
#[test]
fn without_rules_both_streams_are_the_decoder_s() {
    let tiny = tiny("qwen3");
    let source = format::open(&tiny.dir.path().join("model")).unwrap();
    let tokens = &tiny.tokens[..2 * N_CTX];
    let mut streams = Streams::new(&*source, &tiny.config, tokens, &calibration()).unwrap();
    for layer in 0..tiny.config.layers.len() {
        let block = FloatBlock::load(&*source, &tiny.config, layer).unwrap();
        streams.float = block.run(&streams, &streams.float, &block.weights, &mut |_, _| Ok(())).unwrap();
    }
    let model = crate::Model::load(
        tiny.dir.path().join("model"),
        &crate::ModelOptions { threads: None, activations: nibble_kernels::ActKind::F32 },
    );
    let decoder = model.unwrap().into_decoder();
    let plan = crate::decoder::ContextPlan {
        capacity: N_CTX,
        chunk: N_CTX,
        kv: crate::backend::KvKind::F32,
        ..crate::decoder::ContextPlan::default()
    };
    let mut cx = decoder.context(plan).unwrap();
    let d = tiny.config.hidden;
    for (chunk, own) in tokens.chunks(N_CTX).zip(streams.float.chunks(N_CTX * d)) {
        let mut chunk = chunk.to_vec();
        chunk[0] = 1;
        let embedded = decoder.embedded(&mut cx, &chunk).unwrap();
        let through = decoder.through(&mut cx, &embedded, 0..tiny.config.layers.len(), None).unwrap();
        for (a, b) in own.iter().zip(&through) {
            assert!((a - b).abs() < 1e-4 * (1.0 + b.abs()), "{a}, {b}");
        }
    }
}

#[test]
fn a_text_that_is_too_short_is_refused() {
    let tiny = Tiny { tokens: vec![1; N_CTX - 1], ..tiny("llama") };
    let (outcome, _, _) = tiny.run(&recipe("descent"), &tiny.dir.path().join("blocks"), usize::MAX);
    assert!(matches!(outcome, Err(ModelError::Eval { .. })));
}
