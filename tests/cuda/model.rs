//! Whole tiny models through the interpreter: the logits and tokens of the CPU's backend.

use super::Device;
use nibble_kernels::cuda::Gpu;
use nibble_kernels::{ActKind, Pool};
use nibble_models::backend::{Backend, KvKind};
use nibble_models::cpu::CpuBackend;
use nibble_models::cuda::CudaBackend;
use nibble_models::decoder::{ContextPlan, Decoder};
use nibble_models::synth::SynthPlan;
use nibble_models::weights::Weights;
use nibble_models::{ModelConfig, SampleSettings, Sampler, argmax};
use nibble_quant::convert::{self, Options, Silent};
use nibble_quant::stats::Stats;
use nibble_quant::{Recipe, format};
use std::path::Path;
use std::sync::Arc;

const PROMPT: [u32; 11] = [1, 57, 200, 3, 3, 150, 88, 17, 254, 9, 31];
const TOKENS: usize = 4;

/// A checkpoint of random weights, quantized by a preset, or as it is.
fn checkpoint(folder: &Path, plan: &SynthPlan, scheme: Option<&str>) -> std::path::PathBuf {
    let float = folder.join("float");
    plan.write(&float, None).unwrap();
    let Some(scheme) = scheme else { return float };
    let out = folder.join("quantized");
    let source = format::open(&float).unwrap();
    let recipe = Recipe::new(scheme).unwrap();
    let plan = convert::plan(source.as_ref(), &recipe, &Stats::default(), 0).unwrap();
    convert::quantize(&plan, source.as_ref(), scheme, &out, &Options::default(), &Silent).unwrap();
    out
}

/// The likeliest tokens one after another, and the logits that each was chosen from; the prompt is read in chunks.
fn continue_prompt<B: Backend>(
    path: &Path,
    backend: B,
    kv: KvKind,
    prompt: &[u32],
    chunk: usize,
) -> (Vec<u32>, Vec<Vec<f32>>) {
    let source = format::open(path).unwrap();
    let config = ModelConfig::load(path).unwrap();
    let decoder = Decoder::load(&config, Weights::new(source.as_ref()), backend).unwrap();
    let capacity = prompt.len() + 2 * TOKENS;
    let mut cx = decoder.context(ContextPlan { capacity, chunk, kv, ..ContextPlan::default() }).unwrap();
    decoder.prefill(&mut cx, 0, prompt).unwrap();
    let (mut tokens, mut all) = (Vec::new(), Vec::new());
    for _ in 0..TOKENS {
        let logits = decoder.last_logits(&mut cx).unwrap().into_owned();
        let token = argmax(&logits).unwrap();
        tokens.push(token);
        all.push(logits);
        decoder.forward(&mut cx, &[(0, &[token])], None).unwrap();
    }
    (tokens, all)
}

fn check<G: Gpu>(device: Device<G>, plan: &SynthPlan, scheme: Option<&str>, kv: KvKind) {
    // Chunks of 9 rows: the prompt takes the products for many rows first, then those for few.
    check_prompt(device, plan, scheme, kv, &PROMPT, 9);
}

fn check_prompt<G: Gpu>(
    device: Device<G>,
    plan: &SynthPlan,
    scheme: Option<&str>,
    kv: KvKind,
    prompt: &[u32],
    chunk: usize,
) {
    let folder = tempfile::tempdir().unwrap();
    let path = checkpoint(folder.path(), plan, scheme);
    let what = format!("{} {scheme:?} {kv:?}", plan.model_type);
    let cpu = CpuBackend::new(Arc::new(Pool::new(1)), ActKind::F32);
    let (wanted, wanted_logits) = continue_prompt(&path, cpu, kv, prompt, chunk);
    let gpu = CudaBackend::new(device(4)).unwrap();
    let (found, logits) = continue_prompt(&path, gpu, kv, prompt, chunk);
    for (step, (logits, wanted)) in logits.iter().zip(&wanted_logits).enumerate() {
        let size = wanted.iter().fold(0f32, |size, w| size.max(w.abs()));
        let error = logits.iter().zip(wanted).fold(0f32, |error, (a, b)| error.max((a - b).abs()));
        // Activations are rounded to halves before each of the seven products of two layers and the last one: 15 times
        // 2^-11 relative at the very most; int8 caches may round the other way by one step in 127.
        let bound = if kv == KvKind::Int8 { 0.02 } else { 15.0 / 2048.0 };
        assert!(error <= bound * size, "{what}: logits of step {step} differ by {error} of {size}");
    }
    assert_eq!(found, wanted, "{what}");
}

pub fn a_tiny_model_of_each_family_speaks_as_on_the_cpu<G: Gpu>(device: Device<G>) {
    for family in ["llama", "mistral", "qwen2", "qwen3"] {
        check(device, &SynthPlan::tiny(family), Some("int4-g32"), KvKind::F16);
    }
}

/// Rows enough for a prompt's own attention and for products by four warps together, where these are.
pub fn a_long_prompt_is_read_as_on_the_cpu<G: Gpu>(device: Device<G>) {
    let prompt: Vec<u32> = (0..47).map(|i| PROMPT[i % PROMPT.len()] + i as u32).collect();
    let plan = SynthPlan { tie_embeddings: false, ..SynthPlan::tiny("llama") };
    for scheme in ["int4-g32", "int4-nl-g32-dq", "int4-g32-min-dq256", "int4-g64-outliers"] {
        check_prompt(device, &plan, Some(scheme), KvKind::F16, &prompt, 40);
    }
}

pub fn every_way_to_store_weights_and_keys_speaks_as_on_the_cpu<G: Gpu>(device: Device<G>) {
    let plan = SynthPlan { heads: 9, kv_heads: 3, hidden_size: 72, ..SynthPlan::tiny("llama") };
    check(device, &plan, None, KvKind::F32);
    check(device, &plan, Some("int8"), KvKind::Int8);
    for scheme in ["int4-nl-g32-dq", "nf4-dq", "int4-g32-asym", "int4-g32-min-dq256", "int4-g64-outliers"] {
        check(device, &SynthPlan { tie_embeddings: false, ..SynthPlan::tiny("llama") }, Some(scheme), KvKind::F16);
    }
}

pub fn only_the_choice_comes_back_from_the_device<G: Gpu>(device: Device<G>) {
    let backend = CudaBackend::new(device(4)).unwrap();
    let logits = backend.buffer(2, 320).unwrap();
    let values: Vec<f32> = (0..640).map(|i| ((i * 37) % 641) as f32).collect();
    backend.cuda().write_rows(&logits, &values).unwrap();
    let wanted = [argmax(&values[..300]).unwrap(), argmax(&values[320..620]).unwrap()];
    let mut found = Vec::new();
    backend.argmax(&logits, 2, 300, &mut found).unwrap();
    assert_eq!(found, wanted);
}

pub fn tokens_are_drawn_as_from_the_hosts_copy_of_the_logits<G: Gpu>(device: Device<G>) {
    let folder = tempfile::tempdir().unwrap();
    let path = checkpoint(folder.path(), &SynthPlan::tiny("llama"), Some("int4-g32"));
    let source = format::open(&path).unwrap();
    let config = ModelConfig::load(&path).unwrap();
    let backend = CudaBackend::new(device(4)).unwrap();
    let decoder = Decoder::load(&config, Weights::new(source.as_ref()), backend).unwrap();
    let base = SampleSettings { temperature: 0.9, seed: 5, ..SampleSettings::default() };
    let penalties = SampleSettings { repetition_penalty: 1.3, frequency_penalty: 0.2, ..base.clone() };
    for settings in [
        SampleSettings { temperature: 0.0, ..penalties.clone() },
        SampleSettings { top_k: 20, top_p: 0.8, ..penalties },
        // As likely as they are here, 256 tokens don't have so much of the probability: all are looked at in the end.
        SampleSettings { top_p: 0.999, ..base.clone() },
        SampleSettings { top_p: 0.5, min_p: 0.01, ..base.clone() },
        base,
    ] {
        let plan = ContextPlan { capacity: 32, chunk: 9, kv: KvKind::F16, ..ContextPlan::default() };
        let mut cx = decoder.context(plan).unwrap();
        let vocabulary = config.vocab_size - 3;
        let [mut here, mut there] = [(); 2].map(|()| Sampler::new(settings.clone(), vocabulary).unwrap());
        PROMPT.iter().for_each(|token| [&mut here, &mut there].into_iter().for_each(|s| s.accept(*token)));
        decoder.prefill(&mut cx, 0, &PROMPT).unwrap();
        for _ in 0..TOKENS {
            let last = cx.rows().end - 1;
            let wanted = there.sample(&decoder.logits(&mut cx, &[last]).unwrap()[..vocabulary]).unwrap();
            let token = decoder.choose(&mut cx, last, &mut here).unwrap();
            assert_eq!(token, wanted, "{settings:?}");
            let mut more = Sampler::new(settings.clone(), config.vocab_size + 1).unwrap();
            assert!(decoder.choose(&mut cx, last, &mut more).is_err(), "there aren't so many logits");
            [&mut here, &mut there].into_iter().for_each(|s| s.accept(token));
            decoder.forward(&mut cx, &[(0, &[token])], None).unwrap();
        }
    }
}
