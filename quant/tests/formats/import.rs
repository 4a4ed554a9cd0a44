//! GGUF to Hugging Face: names, rows, config.json, and a written folder that opens again.

use crate::support::*;
use nibble_quant::convert::{Options, Silent, import_gguf, verify};
use nibble_quant::format::gguf::{BLOCKS, BlockType, GgufCheckpoint, GgufSource};
use nibble_quant::format::hf_names::{Model, llama3_factors, uninterleave};
use nibble_quant::format::{self, Dtype, TensorSource};
use std::fs;
use std::path::Path;

const HIDDEN: usize = 16;
const HEADS: usize = 4;
const KV: usize = 2;
const HEAD: usize = 6;
const VOCAB: usize = 11;

fn add(g: Gguf, name: &str, shape: &[usize], seed: u64) -> Gguf {
    let ne: Vec<u64> = shape.iter().rev().map(|d| *d as u64).collect();
    g.tensor(name, &ne, 0, f32_bytes(&weights(seed, shape.iter().product())))
}

fn model(arch: &str) -> Gguf {
    let key = |k: &str| format!("{arch}.{k}");
    let mut g = Gguf::new()
        .str("general.architecture", arch)
        .u32(&key("context_length"), 512)
        .u32(&key("embedding_length"), HIDDEN as u32)
        .u32(&key("block_count"), 1)
        .u32(&key("feed_forward_length"), 20)
        .u32(&key("attention.head_count"), HEADS as u32)
        .u32(&key("attention.head_count_kv"), KV as u32)
        .u32(&key("attention.key_length"), HEAD as u32)
        .u32(&key("attention.value_length"), HEAD as u32)
        .u32(&key("rope.dimension_count"), HEAD as u32)
        .f32(&key("attention.layer_norm_rms_epsilon"), 1e-5)
        .f32(&key("rope.freq_base"), 500000.0)
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2);
    for (name, shape) in [
        ("token_embd.weight", vec![VOCAB, HIDDEN]),
        ("blk.0.attn_norm.weight", vec![HIDDEN]),
        ("blk.0.attn_q.weight", vec![HEADS * HEAD, HIDDEN]),
        ("blk.0.attn_k.weight", vec![KV * HEAD, HIDDEN]),
        ("blk.0.attn_v.weight", vec![KV * HEAD, HIDDEN]),
        ("blk.0.attn_output.weight", vec![HIDDEN, HEADS * HEAD]),
        ("blk.0.ffn_norm.weight", vec![HIDDEN]),
        ("blk.0.ffn_gate.weight", vec![20, HIDDEN]),
        ("blk.0.ffn_up.weight", vec![20, HIDDEN]),
        ("blk.0.ffn_down.weight", vec![HIDDEN, 20]),
        ("output_norm.weight", vec![HIDDEN]),
    ] {
        g = add(g, name, &shape, name.len() as u64);
    }
    g
}

fn open(dir: &Path, g: Gguf) -> GgufSource {
    let path = dir.join("m.gguf");
    fs::write(&path, g.bytes()).unwrap();
    GgufSource::open(&path).unwrap()
}

#[test]
fn uninterleaving_undoes_what_the_converter_did() {
    // The converter: reshape (heads, 2, half, k), swap the middle two, flatten.
    for (head, k, heads) in [(6, 5, 3), (2, 1, 4), (64, 3, 2)] {
        let original = weights(1, heads * head * k);
        let mut stored = vec![f32::NAN; original.len()];
        for h in 0..heads {
            for p in 0..2 {
                for i in 0..head / 2 {
                    let (from, to) = (h * head + p * head / 2 + i, h * head + 2 * i + p);
                    stored[to * k..(to + 1) * k].copy_from_slice(&original[from * k..(from + 1) * k]);
                }
            }
        }
        uninterleave(&mut stored, head, k);
        assert_eq!(stored, original);
    }
}

#[test]
fn an_imported_folder_opens_with_every_tensor_under_its_new_name() {
    for (arch, interleaved) in [("llama", true), ("qwen2", false), ("qwen3", false)] {
        let dir = tempfile::tempdir().unwrap();
        let source = open(dir.path(), model(arch));
        let checkpoint = GgufCheckpoint::open(source.path()).unwrap();
        let text = serde_json::to_vec(&checkpoint.config("float32").unwrap()).unwrap();
        let extra = vec![("config.json".into(), text), ("tokenizer.json".into(), b"{}".to_vec())];
        let options = Options { extra, ..Options::default() };
        let report = import_gguf(&checkpoint, Dtype::F32, &dir.path().join("hf"), &options, &Silent).unwrap();
        assert_eq!(fs::read(report.path.join("tokenizer.json")).unwrap(), b"{}");
        assert_eq!(report.tensors.len(), 11);
        assert_eq!(verify(&report.path, &Silent, None).unwrap().files, 3);
        let hf = format::open(&report.path).unwrap();
        let gguf: &dyn format::TensorSource = &source;
        for (from, to, heads) in [
            ("token_embd.weight", "model.embed_tokens.weight", 0),
            ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight", HEADS),
            ("blk.0.attn_k.weight", "model.layers.0.self_attn.k_proj.weight", KV),
            ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight", 0),
            ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight", 0),
            ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight", 0),
            ("output_norm.weight", "model.norm.weight", 0),
        ] {
            let (mut wanted, mut found) = (Vec::new(), Vec::new());
            gguf.read_f32(from, &mut wanted).unwrap();
            hf.read_f32(to, &mut found).unwrap();
            if heads > 0 && interleaved {
                assert_ne!(found, wanted, "{arch} {to}");
                uninterleave(&mut wanted, HEAD, HIDDEN);
            }
            assert_eq!(found, wanted, "{arch} {to}");
            assert_eq!(hf.info(to).unwrap().shape, source_shape(&source, from));
        }
        let config: serde_json::Value =
            serde_json::from_slice(&fs::read(report.path.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["model_type"], arch);
        assert_eq!(config["head_dim"], HEAD);
        assert_eq!(config["vocab_size"], VOCAB);
        assert_eq!(config["rms_norm_eps"].as_f64(), Some(1e-5));
        assert_eq!(config["rope_theta"].as_f64(), Some(500000.0));
        assert_eq!(config["tie_word_embeddings"], true);
        assert_eq!(config["eos_token_id"], 2);
        assert_eq!(config["torch_dtype"], "float32");
    }
}

fn source_shape(source: &GgufSource, name: &str) -> Vec<usize> {
    source.info(name).unwrap().shape.clone()
}

#[test]
fn the_config_says_what_the_file_holds() {
    let dir = tempfile::tempdir().unwrap();
    let config = |g: Gguf| Model::new(&open(dir.path(), g)).unwrap().config("bfloat16").unwrap();
    assert_eq!(config(add(model("llama"), "output.weight", &[VOCAB, HIDDEN], 1))["tie_word_embeddings"], false);
    assert_eq!(config(model("llama"))["rope_scaling"], serde_json::Value::Null);
    assert_eq!(config(model("llama"))["attention_bias"], false);
    assert_eq!(config(add(model("llama"), "blk.0.attn_q.bias", &[24], 1))["attention_bias"], true);
    let linear = model("llama").str("llama.rope.scaling.type", "linear").f32("llama.rope.scaling.factor", 4.0);
    assert_eq!(config(linear)["rope_scaling"], serde_json::json!({ "rope_type": "linear", "factor": 4.0 }));
    let factors: Vec<f32> = llama3_factors(500000.0, HEAD, 32.0, 8192.0).iter().map(|f| *f as f32).collect();
    let llama3 = model("llama").tensor("rope_freqs.weight", &[3], 0, f32_bytes(&factors));
    let scaling = &config(llama3)["rope_scaling"];
    assert_eq!(scaling["rope_type"], "llama3");
    assert_eq!(scaling["factor"], 32.0);
    // With three frequencies several contexts may yield the same factors; any of them is right.
    let original = scaling["original_max_position_embeddings"].as_f64().unwrap();
    let again = llama3_factors(500000.0, HEAD, 32.0, original);
    assert!(again.iter().zip(&factors).all(|(a, b)| (a - *b as f64).abs() < 1e-3 * a));
    let end = Model::new(&open(dir.path(), model("llama").u32("tokenizer.ggml.eot_token_id", 7)))
        .unwrap()
        .generation_config()
        .unwrap();
    assert_eq!(end["eos_token_id"], serde_json::json!([2, 7]));
}

#[test]
fn llama3_s_own_parameters_are_found_again() {
    let dir = tempfile::tempdir().unwrap();
    for (factor, original) in [(8.0, 8192.0), (32.0, 8192.0), (4.0, 4096.0)] {
        let head = 64;
        let factors: Vec<f32> = llama3_factors(500000.0, head, factor, original).iter().map(|f| *f as f32).collect();
        let g = model("llama").u32("x", 1).tensor("rope_freqs.weight", &[factors.len() as u64], 0, f32_bytes(&factors));
        let mut bytes = g.bytes();
        for key in ["attention.key_length", "attention.value_length", "rope.dimension_count"] {
            let at = bytes.windows(key.len()).position(|w| w == key.as_bytes()).unwrap() + key.len() + 4;
            bytes[at..at + 4].copy_from_slice(&(head as u32).to_le_bytes());
        }
        let path = dir.path().join("m.gguf");
        fs::write(&path, bytes).unwrap();
        let source = GgufSource::open(&path).unwrap();
        let scaling = Model::new(&source).unwrap().config("float32").unwrap()["rope_scaling"].clone();
        assert_eq!(scaling["factor"], factor);
        assert_eq!(scaling["original_max_position_embeddings"].as_f64(), Some(original));
    }
}

#[test]
fn what_has_no_place_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let why = |g: Gguf| {
        let source = open(dir.path(), g);
        match Model::new(&source) {
            Err(why) => why.to_string(),
            Ok(model) => match model.tensors() {
                Err(why) => why.to_string(),
                Ok(_) => model.config("float32").unwrap_err().to_string(),
            },
        }
    };
    for (g, wanted) in [
        (model("mamba"), "architecture `mamba`, wanted one of llama, qwen2, qwen3"),
        (Gguf::new(), "`general.architecture` is missing"),
        (Gguf::new().str("general.architecture", "llama"), "`llama.embedding_length` is missing"),
        (model("llama").u32("llama.expert_count", 8), "with experts"),
        (add(model("llama"), "blk.0.ffn_gate_exps.weight", &[2, 2], 1), "`blk.0.ffn_gate_exps.weight`"),
        (add(model("llama"), "blk.1.attn_v.weight", &[2, 2], 1), "1 layers"),
        (add(model("llama"), "blk.x.attn_v.weight", &[2, 2], 1), "`blk.x.attn_v.weight`"),
        (add(model("llama"), "blk.0.attn_q.bias", &[23], 1), "23 rows"),
        (add(model("llama"), "rope_freqs.weight", &[3], 1), "rope_freqs.weight"),
        (model("llama").str("llama.rope.scaling.type", "odd").f32("llama.rope.scaling.factor", 2.0), "`odd`"),
    ] {
        let why = why(g);
        assert!(why.contains(wanted), "{why}, wanted {wanted}");
    }
}

#[test]
fn values_that_f16_cannot_hold_or_are_not_finite_are_named() {
    for (value, dtype, wanted) in [
        (1e6f32, Dtype::F16, "doesn't fit into F16"),
        (f32::NAN, Dtype::F32, "value NaN at row 1, column 2"),
        (f32::NEG_INFINITY, Dtype::BF16, "value -inf at row 1, column 2"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut embedding = weights(1, VOCAB * HIDDEN);
        embedding[HIDDEN + 2] = value;
        let g = model("llama").tensor("output.weight", &[HIDDEN as u64, VOCAB as u64], 0, f32_bytes(&embedding));
        let source = GgufCheckpoint::open(open(dir.path(), g).path()).unwrap();
        let out = dir.path().join("hf");
        let why = import_gguf(&source, dtype, &out, &Options::default(), &Silent).unwrap_err().to_string();
        assert!(why.contains("`lm_head.weight`") && why.contains(wanted), "{why}");
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["m.gguf"], "no trying again helps, so nothing is kept");
    }
}

#[test]
fn shards_and_threads_change_nothing_but_the_files() {
    let dir = tempfile::tempdir().unwrap();
    let source = GgufCheckpoint::open(open(dir.path(), model("llama")).path()).unwrap();
    let run = |out: &str, shard_bytes: u64, threads: usize| {
        let options = Options { shard_bytes, ..Options::default() };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| import_gguf(&source, Dtype::BF16, &dir.path().join(out), &options, &Silent)).unwrap().path
    };
    let one = run("one", u64::MAX, 1);
    let eight = run("eight", u64::MAX, 8);
    assert_eq!(fs::read(one.join("model.safetensors")).unwrap(), fs::read(eight.join("model.safetensors")).unwrap());
    assert_eq!(fs::read(one.join("manifest.json")).unwrap(), fs::read(eight.join("manifest.json")).unwrap());
    let many = run("many", 500, 2);
    assert!(
        many.join("model-00001-of-00009.safetensors").exists() || many.join("model.safetensors.index.json").exists()
    );
    let (a, b) = (format::open(&one).unwrap(), format::open(&many).unwrap());
    assert_eq!(a.infos().len(), b.infos().len());
    for info in a.infos() {
        assert_eq!(a.bytes(&info.name).unwrap(), b.bytes(&info.name).unwrap(), "{}", info.name);
    }
}

/// A tensor of blocks with finite scales in it.
fn blocks(g: Gguf, name: &str, [n, k]: [usize; 2], block: &BlockType) -> Gguf {
    let mut bytes: Vec<u8> = weights(5, n * k / block.values * block.bytes).iter().map(|v| v.to_bits() as u8).collect();
    for (i, block) in bytes.chunks_mut(block.bytes).enumerate() {
        block[..2].copy_from_slice(&half::f16::from_f32(0.01 * (i % 7 + 1) as f32).to_le_bytes());
        block[2..4].copy_from_slice(&half::f16::from_f32(-0.1 * (i % 5) as f32).to_le_bytes());
    }
    g.tensor(name, &[k as u64, n as u64], block.id, bytes)
}

#[test]
fn blocks_run_in_their_own_arithmetic_value_for_value() {
    let mut exact = Vec::new();
    for block in BLOCKS.iter().filter(|b| b.plain.is_none()) {
        let dir = tempfile::tempdir().unwrap();
        let shape = [HEADS * HEAD, 2 * block.values];
        let names = ["blk.0.attn_q.weight", "blk.0.ffn_up.weight"];
        let mut g = model("llama");
        g.infos.retain(|(name, ..)| !names.contains(&name.as_str()));
        let g = names.into_iter().fold(g, |g, name| blocks(g, name, shape, block));
        let checkpoint = GgufCheckpoint::open(open(dir.path(), g).path()).unwrap();
        for name in ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"] {
            let Some(tensor) = checkpoint.quantized(name).unwrap() else { continue };
            let mut values = Vec::new();
            (&checkpoint as &dyn TensorSource).read_f32(name, &mut values).unwrap();
            assert_eq!(tensor.dequantize(), values, "{} {name}", block.name);
            exact.push(block.name);
        }
    }
    exact.dedup();
    assert_eq!(exact, ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "IQ4_NL", "IQ4_XS"]);
}

#[test]
fn rows_of_a_checkpoint_s_view_are_slices_of_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let g = add(model("llama"), "blk.0.attn_q.bias", &[HEADS * HEAD], 3);
    let checkpoint = GgufCheckpoint::open(open(dir.path(), g).path()).unwrap();
    for info in checkpoint.infos() {
        let (n, cols) = info.rows_cols();
        let (mut whole, mut part) = (Vec::new(), Vec::new());
        (&checkpoint as &dyn TensorSource).read_f32(&info.name, &mut whole).unwrap();
        for rows in (0..=n).flat_map(|a| (a..=n).map(move |b| a..b)) {
            checkpoint.read_rows_f32(&info.name, rows.clone(), &mut part).unwrap();
            assert_eq!(part, whole[rows.start * cols..rows.end * cols], "{} {rows:?}", info.name);
        }
    }
    // A bias goes with the rows of its matrix.
    let (mut stored, mut bias) = (Vec::new(), Vec::new());
    (checkpoint.gguf() as &dyn TensorSource).read_f32("blk.0.attn_q.bias", &mut stored).unwrap();
    (&checkpoint as &dyn TensorSource).read_f32("model.layers.0.self_attn.q_proj.bias", &mut bias).unwrap();
    uninterleave(&mut stored, HEAD, 1);
    assert_eq!(bias, stored);
}
