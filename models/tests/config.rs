//! Laws of reading `config.json`: transformers' rules and defaults, both spellings, refusals by name.

use std::path::Path;

use nibble_models::config::Fields;
use nibble_models::{Activation, FAMILIES, ModelConfig, ModelError, RopeConfig, RopeScaling};
use serde_json::{Value, json};

/// A small model of a type, with `changes` laid over it; a null takes the field away.
fn model(model_type: &str, changes: Value) -> Value {
    let mut value = json!({
        "model_type": model_type, "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
        "sliding_window": null, "an_unknown_field": {"is": "ignored"},
    });
    for (name, change) in changes.as_object().unwrap() {
        if let Some(name) = name.strip_prefix('-') {
            value.as_object_mut().unwrap().remove(name);
        } else {
            value[name] = change.clone();
        }
    }
    value
}

fn read(value: &Value) -> Result<ModelConfig, ModelError> {
    ModelConfig::from_json(Path::new("m/config.json"), value)
}

fn windows(config: &ModelConfig) -> Vec<Option<usize>> {
    config.layers.iter().map(|l| l.window).collect()
}

#[test]
fn every_family_reads_its_types_and_says_what_sets_it_apart() {
    for family in FAMILIES {
        for model_type in family.model_types {
            let config = read(&model(model_type, json!({}))).unwrap();
            assert_eq!(config.model_type, *model_type);
            assert_eq!((config.heads, config.kv_heads, config.head_dim, config.group()), (8, 2, 16, 4));
            assert_eq!((config.q_width(), config.kv_width(), config.layers.len()), (128, 32, 4));
            assert_eq!(
                (config.qkv_bias, config.o_bias, config.qk_norm),
                match family.name {
                    "qwen2" => (true, false, false),
                    "qwen3" => (false, false, true),
                    _ => (false, false, false),
                }
            );
            assert_eq!(windows(&config), [None; 4], "{model_type}");
            assert_eq!(config.query_scale, 0.25);
        }
    }
}

#[test]
fn real_configurations_come_out_right() {
    let smollm2 = json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536, "max_position_embeddings": 8192,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "vocab_size": 49152
    });
    let config = read(&smollm2).unwrap();
    assert_eq!((config.hidden, config.head_dim, config.rope.theta, config.tie_embeddings), (576, 64, 100_000.0, true));
    assert_eq!((config.bos, config.eos.as_slice(), config.dtype.as_deref()), (Some(1), &[2][..], Some("bfloat16")));
    assert_eq!((config.rope.scaling, config.rope.rotary_dim), (RopeScaling::None, 64));

    let llama32 = json!({
        "model_type": "llama", "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64,
        "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072, "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "tie_word_embeddings": true, "vocab_size": 128256
    });
    let config = read(&llama32).unwrap();
    assert_eq!(config.eos, [128001, 128008, 128009]);
    let wanted = RopeScaling::Llama3 { factor: 32.0, low_freq: 1.0, high_freq: 4.0, original: 8192.0 };
    assert_eq!(config.rope.scaling, wanted);
}

#[test]
fn both_spellings_of_rope_and_dtype_mean_the_same() {
    let old = model(
        "llama",
        json!({
            "rope_theta": 5e5, "torch_dtype": "float16", "partial_rotary_factor": 0.5,
            "rope_scaling": {"type": "linear", "factor": 4.0}
        }),
    );
    let new = model(
        "llama",
        json!({
            "dtype": "float16", "rope_parameters":
                {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5, "partial_rotary_factor": 0.5}
        }),
    );
    assert_eq!(read(&old).unwrap(), read(&new).unwrap());
    assert_eq!(read(&new).unwrap().rope.rotary_dim, 8);
}

#[test]
fn windows_follow_each_familys_rules() {
    let of = |model_type, changes| windows(&read(&model(model_type, changes)).unwrap());
    assert_eq!(of("mistral", json!({"sliding_window": 100})), [Some(100); 4]);
    assert_eq!(of("mistral", json!({"-sliding_window": 0})), [Some(4096); 4]);
    assert_eq!(of("llama", json!({"sliding_window": 100})), [None; 4]);
    for qwen in ["qwen2", "qwen3"] {
        assert_eq!(of(qwen, json!({"sliding_window": 100})), [None; 4]);
        let on = json!({"sliding_window": 100, "use_sliding_window": true, "max_window_layers": 3});
        assert_eq!(of(qwen, on), [None, None, None, Some(100)]);
        let all = json!({"-sliding_window": 0, "use_sliding_window": true, "max_window_layers": 0});
        assert_eq!(of(qwen, all), [Some(4096); 4]);
        let by_type = json!({
            "sliding_window": 100, "use_sliding_window": true, "max_window_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
        });
        assert_eq!(of(qwen, by_type), [Some(100), None, Some(100), None]);
    }
}

#[test]
fn options_of_the_block_are_read() {
    let config = read(&model(
        "llama",
        json!({
            "attention_bias": true, "mlp_bias": true, "hidden_act": "gelu_pytorch_tanh", "-head_dim": 0,
            "-num_key_value_heads": 0, "tie_word_embeddings": true, "bos_token_id": null, "eos_token_id": -1
        }),
    ))
    .unwrap();
    assert!(config.qkv_bias && config.o_bias && config.mlp_bias && config.tie_embeddings);
    assert_eq!((config.activation, config.head_dim, config.kv_heads), (Activation::GeluTanh, 8, 8));
    assert_eq!((config.bos, config.eos.len()), (None, 0));
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let cases = [
        ("llama", json!({"-hidden_size": 0}), "hidden_size", "missing"),
        ("llama", json!({"vocab_size": null}), "vocab_size", "missing"),
        ("llama", json!({"num_attention_heads": 0}), "num_attention_heads", "0"),
        ("llama", json!({"head_dim": 0}), "head_dim", "0"),
        ("llama", json!({"head_dim": 15}), "head_dim", "15"),
        ("llama", json!({"-head_dim": 0, "num_attention_heads": 7}), "num_attention_heads", "7 heads"),
        ("llama", json!({"num_key_value_heads": 3}), "num_key_value_heads", "3 key heads"),
        ("llama", json!({"num_key_value_heads": 16}), "num_key_value_heads", "16 key heads"),
        ("llama", json!({"hidden_size": 64.5}), "hidden_size", "64.5"),
        ("llama", json!({"hidden_size": "64"}), "hidden_size", "`64`"),
        ("llama", json!({"hidden_size": 4000000000u64}), "hidden_size", "4000000000"),
        ("llama", json!({"num_hidden_layers": -3}), "num_hidden_layers", "-3"),
        (
            "llama",
            json!({"num_attention_heads": 100000, "num_key_value_heads": 1, "head_dim": 1024}),
            "num_attention_heads",
            "100000",
        ),
        ("llama", json!({"rms_norm_eps": 0.0}), "rms_norm_eps", "0"),
        ("llama", json!({"rms_norm_eps": "small"}), "rms_norm_eps", "small"),
        ("llama", json!({"rope_theta": 0.5}), "rope_theta", "0.5"),
        ("llama", json!({"partial_rotary_factor": 0.2}), "head_dim", "rotated"),
        ("llama", json!({"hidden_act": "relu"}), "hidden_act", "relu"),
        ("llama", json!({"eos_token_id": 1000}), "eos_token_id", "1000"),
        ("llama", json!({"tie_word_embeddings": "yes"}), "tie_word_embeddings", "yes"),
        ("llama", json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}), "rope_scaling.rope_type", "dynamic"),
        ("llama", json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor", "missing"),
        ("llama", json!({"rope_scaling": {"type": "linear", "factor": 0}}), "rope_scaling.factor", "0"),
        ("llama", json!({"rope_scaling": [1]}), "rope_scaling", "a list"),
        (
            "llama",
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4,
            "high_freq_factor": 4, "original_max_position_embeddings": 8192}}),
            "rope_scaling.high_freq_factor",
            "4",
        ),
        ("llama", json!({"rope_parameters": {"full_attention": {}}}), "rope_parameters", "full_attention"),
        ("mistral", json!({"sliding_window": 0}), "sliding_window", "0"),
        (
            "qwen2",
            json!({"use_sliding_window": true, "sliding_window": 9, "layer_types": ["full_attention"]}),
            "layer_types",
            "1 entries",
        ),
        ("qwen3", json!({"-head_dim": 0}), "head_dim", "missing"),
    ];
    for (model_type, changes, field, part) in cases {
        match read(&model(model_type, changes.clone())) {
            Err(ModelError::Field { path, field: found, why }) => {
                assert_eq!((path.to_str(), found.as_str()), (Some("m/config.json"), field), "{changes}");
                assert!(why.contains(part), "{changes}: {why}");
            }
            other => panic!("{changes}: {other:?}"),
        }
    }
}

#[test]
fn an_unknown_family_is_refused_with_the_known_ones() {
    let error = read(&model("mamba", json!({}))).unwrap_err().to_string();
    assert!(error.contains("`mamba`"), "{error}");
    for family in FAMILIES {
        assert!(family.model_types.iter().all(|t| error.contains(t)), "{error}");
    }
    assert!(matches!(read(&json!([])), Err(ModelError::Damaged { .. })));
}

#[test]
fn a_cut_file_is_refused_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.json");
    let text = model("llama", json!({})).to_string();
    std::fs::write(&file, &text).unwrap();
    assert!(ModelConfig::load(folder.path()).is_ok() && ModelConfig::load(&file).is_ok());
    for cut in 0..text.len() {
        std::fs::write(&file, &text[..cut]).unwrap();
        let error = ModelConfig::load(folder.path()).unwrap_err().to_string();
        assert!(error.contains("config.json"), "{error}");
    }
    std::fs::remove_file(&file).unwrap();
    assert!(matches!(ModelConfig::load(folder.path()), Err(ModelError::Io { .. })));
}

fn rope(scaling: Value, dim: usize) -> RopeConfig {
    let value = json!({"rope_theta": 10000.0, "rope_scaling": scaling});
    let fields = Fields::new(Path::new("config.json"), &value).unwrap();
    RopeConfig::from_fields(&fields, dim, 32768).unwrap()
}

fn near(found: f32, wanted: f64) -> bool {
    (f64::from(found) - wanted).abs() <= wanted.abs() * f64::from(f32::EPSILON)
}

#[test]
fn frequencies_fall_from_one_by_powers_of_theta() {
    let plain = rope(Value::Null, 128).frequencies();
    assert_eq!((plain.inv_freq.len(), plain.inv_freq[0], plain.attention_factor), (64, 1.0, 1.0));
    assert!(near(plain.inv_freq[32], 0.01) && near(plain.inv_freq[16], 0.1));
    let linear = rope(json!({"type": "linear", "factor": 8.0}), 128).frequencies();
    assert!(plain.inv_freq.iter().zip(&linear.inv_freq).all(|(p, l)| near(*l, f64::from(*p) / 8.0)));
}

#[test]
fn llama3_scaling_keeps_fast_pairs_divides_slow_ones_and_blends_between() {
    let (factor, low, high, original) = (8.0, 1.0, 4.0, 8192.0);
    let plain = rope(Value::Null, 128).frequencies().inv_freq;
    let scaled = rope(
        json!({"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
               "original_max_position_embeddings": original as u64}),
        128,
    )
    .frequencies();
    assert_eq!(scaled.attention_factor, 1.0);
    let mut kinds = [0; 3];
    for i in 0..64 {
        let (f, found) = (10_000f64.powf(-2.0 * i as f64 / 128.0), scaled.inv_freq[i]);
        let wavelength = 2.0 * std::f64::consts::PI / f;
        let (kind, wanted) = if wavelength < original / high {
            (0, f)
        } else if wavelength > original / low {
            (1, f / factor)
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            (2, (1.0 - smooth) * f / factor + smooth * f)
        };
        kinds[kind] += 1;
        assert!(near(found, wanted), "pair {i}: {found}, wanted {wanted}");
        assert!(found <= plain[i]);
    }
    assert!(kinds.iter().all(|n| *n > 0), "{kinds:?}");
}

/// Values by the formula of transformers 4.57 (`_compute_yarn_parameters`) in f32, so compared to a few f32 units.
#[test]
fn yarn_scaling_is_that_of_transformers() {
    let yarn =
        rope(json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}), 32).frequencies();
    let golden: Vec<f64> = serde_json::from_str(include_str!("../../tests/goldens/yarn_inv_freq.json")).unwrap();
    assert_eq!(yarn.inv_freq.len(), golden.len());
    for (found, wanted) in yarn.inv_freq.iter().zip(golden) {
        assert!(
            (f64::from(*found) - wanted).abs() <= 8.0 * f64::from(f32::EPSILON) * wanted,
            "{found}, wanted {wanted}"
        );
    }
    assert!(near(yarn.attention_factor, 0.1 * 4f64.ln() + 1.0));
    let given = rope(json!({"type": "yarn", "factor": 4.0, "attention_factor": 1.5}), 32).frequencies();
    assert_eq!(given.attention_factor, 1.5);
    let deepseek =
        rope(json!({"type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}), 32).frequencies();
    assert_eq!(deepseek.attention_factor, 1.0);
}
