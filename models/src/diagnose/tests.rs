//! Laws of diagnoses, on tiny models.

use super::*;
use crate::synth::SynthPlan;
use nibble_quant::convert::{self, Options, Silent};
use nibble_quant::stats::Stats;
use nibble_quant::{Recipe, Rule, format};
use std::path::PathBuf;

fn rule(pattern: &str, scheme: &str) -> Rule {
    Rule { pattern: Some(pattern.into()), scheme: Some(scheme.into()), ..Rule::default() }
}

/// A model, and the same with some tensors quantized.
fn pair(rules: Vec<Rule>) -> (tempfile::TempDir, PathBuf, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let (float, quantized) = (dir.path().join("float"), dir.path().join("quantized"));
    SynthPlan::tiny("llama").write(&float, None).unwrap();
    let source = format::open(&float).unwrap();
    let recipe = Recipe { rules, ..Recipe::default() };
    let plan = convert::plan(&*source, &recipe, &Stats::default(), 0).unwrap();
    convert::quantize(&plan, &*source, "", &quantized, &Options::default(), &Silent).unwrap();
    (dir, float, quantized)
}

fn plan(tokens: &[u32]) -> DiagnosisPlan<'_> {
    DiagnosisPlan {
        tokens,
        eval: EvalPlan { n_ctx: 16, chunks: Some(3), bos: None },
        activations: ActKind::F32,
        pool: Arc::new(Pool::new(1)),
    }
}

fn tokens() -> Vec<u32> {
    (0..64).map(|i| (i * i * 13 + 7) % 320).collect()
}

fn run(float: &Path, quantized: &Path, state: &mut State) -> Result<Diagnosis> {
    diagnose(float, quantized, &plan(&tokens()), state, &mut |_| true)
}

/// With one layer quantized, that layer alone is all of the error, all but it none, and of the others it is the other way round.
#[test]
fn the_layer_that_is_quantized_is_found() {
    const GUILTY: &str = "model.layers.1.mlp.up_proj.weight";
    let (_dir, float, quantized) = pair(vec![rule(GUILTY, "int3-g32-dq")]);
    let found = run(&float, &quantized, &mut State::default()).unwrap();
    let all = found.sources.weights.kl;
    assert!(all > 1e-5, "{all}");
    assert!(found.floor.kl.abs() < 1e-9 && found.floor.same_top1 == 1.0);
    assert_eq!(found.layers.len(), 2 * PARTS.len());
    let near = |a: f64, b: f64| (a - b).abs() < 1e-3 * all;
    for layer in &found.layers {
        let (only, without) = if layer.name == GUILTY { (all, 0.0) } else { (0.0, all) };
        assert!(near(layer.only.kl, only) && near(layer.without.kl, without), "{layer:?}, {all}");
    }
    assert_eq!(found.weights.iter().map(|w| w.name.as_str()).collect::<Vec<_>>(), [GUILTY]);
    // Activations of every place in every layer, 8 bits for every 32 values: 40 to 60 dB.
    assert_eq!(found.activations.len(), 8);
    for tensor in &found.activations {
        let db = tensor.figures.sqnr_db.unwrap();
        assert!((35.0..60.0).contains(&db), "{}: {db} dB", tensor.name);
    }
    assert!(found.sources.activations.kl > 0.0 && found.sources.both.kl > 0.0);
}

/// Figures of a weight against sums over all of it.
#[test]
fn figures_of_weights_are_sums_over_all_values() {
    let (_dir, float, quantized) = pair(vec![rule("*_proj.weight", "int4-nl-g32-dq"), rule("*embed*", "int8-g32")]);
    let (source, made) = (format::open(&float).unwrap(), format::open(&quantized).unwrap());
    let all = numbers::weights(&float, &quantized).unwrap();
    assert_eq!(all.len(), 2 * PARTS.len() + 1);
    for tensor in all {
        let (mut exact, mut back) = (Vec::new(), Vec::new());
        source.read_f32(&tensor.name, &mut exact).unwrap();
        made.read_f32(&tensor.name, &mut back).unwrap();
        let square = |v: f64| v * v;
        let noise: f64 = exact.iter().zip(&back).map(|(a, b)| square(*a as f64 - *b as f64)).sum();
        let power: f64 = exact.iter().map(|a| square(*a as f64)).sum();
        let db = 10.0 * (power / noise).log10();
        let figures = &tensor.figures;
        assert!((figures.sqnr_db.unwrap() - db).abs() < 1e-6 && figures.count == exact.len() as u64, "{}", tensor.name);
        assert!((figures.mse - noise / exact.len() as f64).abs() < 1e-12);
        assert!(figures.saturated < 0.2 && figures.histogram.float.iter().sum::<u64>() == figures.count);
        assert_eq!(tensor.channels.len(), tensor.shape[0]);
    }
}

#[test]
fn a_diagnosis_goes_on_where_it_was_stopped() {
    let (dir, float, quantized) = pair(vec![rule("*_proj.weight", "int4-nl-g32-dq")]);
    let whole = run(&float, &quantized, &mut State::default()).unwrap();
    let file = dir.path().join("state.json");
    let mut left = steps(2) - 10;
    let mut stop = |count: usize| {
        left = left.saturating_sub(count);
        left > 0
    };
    let stopped = diagnose(&float, &quantized, &plan(&tokens()), &mut State::open(&file).unwrap(), &mut stop);
    assert!(stopped.is_err());
    let kept = std::fs::read_to_string(&file).unwrap();
    assert!(kept.contains("model.layers.0.") && !kept.contains("model.layers.1."), "{kept}");
    assert_eq!(run(&float, &quantized, &mut State::open(&file).unwrap()).unwrap(), whole);
    // A state of other settings is refused.
    let other = DiagnosisPlan { activations: ActKind::I8, ..plan(&[5; 64]) };
    assert!(diagnose(&float, &quantized, &other, &mut State::open(&file).unwrap(), &mut |_| true).is_err());
    std::fs::write(&file, "not a state").unwrap();
    assert!(State::open(&file).is_err());
}

#[test]
fn steps_are_as_many_as_were_told() {
    let (_dir, float, quantized) = pair(vec![rule("*down_proj.weight", "int8-g32")]);
    let mut told = 0;
    diagnose(&float, &quantized, &plan(&tokens()), &mut State::default(), &mut |count| {
        told += count;
        true
    })
    .unwrap();
    assert_eq!(told, steps(2));
}
