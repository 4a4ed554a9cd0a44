//! The main job on tiny models: every command after the other.

use crate::support::{Place, text};

#[test]
fn a_model_is_quantized_verified_inspected_run_scored_and_compared() {
    let place = Place::new();
    place.model("float", &["--hidden", "128", "--ffn", "256"]);
    let table = place.run(&["quantize", "float", "-o", "int4", "--scheme", "int4-g32"]);
    assert!(table.ok().contains("self_attn.q_proj") && table.stdout.contains("SQNR"), "{}", table.stdout);

    let verified = place.run(&["verify", "int4"]);
    assert!(verified.ok().contains("ok"), "{}", verified.stdout);

    let inspected = place.run(&["inspect", "int4", "--json"]).json();
    assert_eq!(inspected["format"], "native");
    let bits = inspected["bits_per_linear_weight"].as_f64().unwrap();
    assert!((4.0..5.0).contains(&bits), "{bits} bits a linear weight");
    assert!(inspected["bits_per_weight_file"].as_f64().unwrap() > bits, "embedding and norms cost more");
    assert_eq!(inspected["config"]["layers"], 2);

    let answer = place.run(&["generate", "int4", "-p", "hello", "-n", "8", "--ignore-eos", "--json"]).json();
    assert_eq!(answer["completion_tokens"], 8);
    assert_eq!(answer["prompt_tokens"], 5);

    std::fs::write(place.path("text"), text(600)).unwrap();
    let eval = ["eval", "int4", "--reference", "float", "--text", "text", "--ctx", "64", "--chunks", "4", "--json"];
    let scored = place.run(&eval).json();
    assert_eq!(scored["chunks"], 4);
    assert_eq!(scored["scored"], 4 * 31);
    assert!(scored["kl"]["mean"].as_f64().unwrap() > 0.0, "quantization changes something");
    assert!(scored["ppl_ratio"].as_f64().unwrap() > 0.5);
    // A model says the same as itself when its activations are exact too.
    let same = ["eval", "float", "--reference", "float", "--text", "text", "--ctx", "64", "--activations", "f32"];
    let same = place.run(&[&same[..], &["--json"]].concat()).json();
    assert_eq!(same["kl"]["mean"], 0.0);
    assert_eq!(same["same_top1"], 1.0);

    let diff = place.run(&["diff", "float", "int4", "--json"]).json();
    let worst = diff["worst"].as_str().unwrap();
    let rows = diff["tensors"].as_array().unwrap();
    let row = rows.iter().find(|row| row["name"] == worst).unwrap();
    // Four bits of a normal variable give some 20 dB; far less would be another tensor.
    assert!((12.0..40.0).contains(&row["sqnr_db"].as_f64().unwrap()), "{row}");
    assert_eq!(diff["identical"], false);
    assert_eq!(place.run(&["diff", "float", "float", "--json"]).json()["identical"], true);
    let norm = rows.iter().find(|row| row["name"] == "model.norm.weight").unwrap();
    assert_eq!(norm["max_error"], 0.0, "norms are kept");
}

#[test]
fn calibration_serves_one_conversion_or_many() {
    let place = Place::new();
    place.model("float", &["--hidden", "96", "--ffn", "160", "--heads", "3", "--kv-heads", "3"]);
    std::fs::write(place.path("text"), text(1300)).unwrap();
    let kept = place.run(&["calibrate", "float", "--calib", "text", "-o", "stats", "--json"]).json();
    assert_eq!(kept["inputs_with_gram"], 2 * 4);
    assert!(kept["tokens"].as_u64().unwrap() >= 512, "{kept}");
    place.run(&["calibrate", "float", "--calib", "text", "-o", "imatrix.gguf"]).ok();
    let quantize = |out: &str, words: &[&str]| {
        let quantize = ["quantize", "float", "-o", out, "--scheme", "int3-g32-dq", "--no-eval"];
        place.run(&[&quantize[..], words].concat()).ok();
        place.files(out).into_iter().filter(|(name, _)| name.ends_with(".safetensors")).collect::<Vec<_>>()
    };
    let blind = quantize("blind", &[]);
    let weighted = quantize("weighted", &["--stats", "stats", "--rule", "*_proj.weight=int3-g32-dq:search"]);
    let gptq = quantize("gptq", &["--stats", "stats"]);
    let descent = quantize("descent", &["--stats", "stats", "--effort", "max"]);
    assert!(blind != weighted && weighted != gptq && blind != gptq && descent != gptq);
    assert!(gptq == quantize("at-once", &["--calib", "text", "-t", "1"]));
    assert!(weighted == quantize("imatrix", &["--stats", "imatrix.gguf"]));
    let plan = place.run(&["quantize", "float", "-o", "x", "--stats", "imatrix.gguf", "--dry-run"]);
    assert!(plan.ok().contains("no Gram matrix for GPTQ"), "{}", plan.stdout);
    assert!(plan.stderr.contains("no GPTQ for 14 tensors") && plan.stderr.contains("and 11 more"), "{}", plan.stderr);
    let error = |checkpoint: &str| {
        let eval =
            ["eval", checkpoint, "--reference", "float", "--text", "text", "--ctx", "64", "--activations", "f32"];
        place.run(&[&eval[..], &["--json"]].concat()).json()["kl"]["mean"].as_f64().unwrap()
    };
    // On the text that it was calibrated on.
    assert!(error("gptq") < error("blind"), "{} after {}", error("gptq"), error("blind"));
    std::fs::write(place.path("short"), text(100)).unwrap();
    let refused = place.run(&["calibrate", "float", "--calib", "short", "-o", "none"]);
    assert!(refused.error(1).contains("calibration text has"), "{}", refused.stderr);
    assert!(!place.path("none").exists());
}

#[test]
fn threads_do_not_change_a_byte() {
    let place = Place::new();
    place.model("float", &["--hidden", "192", "--ffn", "288", "--heads", "6", "--kv-heads", "2"]);
    for scheme in ["int4-nl-g32-dq", "int8-g32", "nf4-dq", "int4-g64-columns"] {
        let outputs = ["1", "2", "5"].map(|threads| {
            let out = format!("{scheme}-{threads}");
            place.run(&["quantize", "float", "-o", &out, "--scheme", scheme, "-t", threads]).ok();
            place.files(&out)
        });
        assert!(outputs[0] == outputs[1] && outputs[0] == outputs[2], "{scheme}: bytes differ between thread counts");
    }
}

#[test]
fn sidecars_are_carried_over_byte_for_byte() {
    let place = Place::new();
    place.model("float", &[]);
    std::fs::write(place.path("float/LICENSE"), "for everyone\r\n").unwrap();
    place.run(&["quantize", "float", "-o", "out"]).ok();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE"] {
        let read = |dir: &str| std::fs::read(place.path(dir).join(name)).unwrap();
        assert_eq!(read("float"), read("out"), "{name}");
    }
}

#[test]
fn the_same_seed_writes_the_same_text_with_any_number_of_threads() {
    let place = Place::new();
    place.model("float", &[]);
    let generate = |extra: &[&str]| {
        let words = ["generate", "float", "-p", "once", "-n", "24", "--temperature", "1.5", "--top-k", "50"];
        place.run(&[&words[..], extra].concat()).ok().to_string()
    };
    let first = generate(&["--seed", "7", "-t", "1"]);
    assert_eq!(first, generate(&["--seed", "7", "-t", "1"]));
    assert_eq!(first, generate(&["--seed", "7", "-t", "2"]));
    assert_ne!(first, generate(&["--seed", "8", "-t", "1"]), "another seed, another text");
}

#[test]
fn a_plan_is_printed_and_nothing_written() {
    let place = Place::new();
    place.model("float", &[]);
    let before = place.names();
    let plan = place.run(&["quantize", "float", "-o", "out", "--scheme", "int4-g32", "--dry-run"]);
    for wanted in ["model.embed_tokens.weight", "model.norm.weight", "peak memory"] {
        assert!(plan.ok().contains(wanted), "no {wanted} in\n{}", plan.stdout);
    }
    assert_eq!(place.names(), before);
    let json = place.run(&["quantize", "float", "-o", "out", "--dry-run", "--json"]).json();
    assert!(json["peak_memory_bytes"].as_u64().unwrap() > 0);
    let rows = json["tensors"].as_array().unwrap();
    let planned: u64 = rows.iter().map(|row| row["bytes"].as_u64().unwrap()).sum();
    place.run(&["quantize", "float", "-o", "out"]).ok();
    let inspected = place.run(&["inspect", "out", "--json"]).json();
    assert_eq!(inspected["bytes"].as_u64().unwrap(), planned, "the plan's bytes are the file's");
}

#[test]
fn tensors_named_by_a_pattern_stay_as_they_are() {
    let place = Place::new();
    place.model("float", &[]);
    place.run(&["quantize", "float", "-o", "out", "--scheme", "int4-g32", "--keep", "*down_proj*"]).ok();
    let inspected = place.run(&["inspect", "out", "--json"]).json();
    for row in inspected["tensors"].as_array().unwrap() {
        let name = row["name"].as_str().unwrap();
        if name.contains("down_proj") {
            assert_eq!(row["stored"], "F32", "{name}");
        }
        if name.contains("up_proj") {
            assert!(row["spec"].is_object(), "{name}");
        }
    }
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let place = Place::new();
    place.model("float", &[]);
    for words in [
        &["inspect", "float", "--tensors"][..],
        &["schemes"],
        &["--help"],
        &["generate", "float", "-p", "x", "-n", "64", "--ignore-eos", "--temperature", "2"],
        &["inspect", "float", "--json"],
    ] {
        let mut child = place
            .command(words)
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let ended = crate::support::finish(child);
        assert_eq!(ended.code, 0, "{words:?}: {}", ended.stderr);
        assert!(!ended.stderr.contains("panicked") && !ended.stderr.contains("error"), "{words:?}: {}", ended.stderr);
    }
}

#[test]
fn rows_that_pad_the_embedding_are_never_chosen() {
    let place = Place::new();
    place.run(&["synth", "-o", "padded", "--vocab", "4096"]).ok();
    crate::support::write_tokenizer(&place.path("padded"));
    let words = ["generate", "padded", "-p", "hello", "-n", "32", "--ignore-eos", "--temperature", "5", "--json"];
    assert_eq!(place.run(&words).json()["completion_tokens"], 32);
}
