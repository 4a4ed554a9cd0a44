//! `nibble vision`: the whole way of a small ONNX model, and what it refuses.

use crate::assets::asset;
use crate::small::{constant, model, node, numbers};
use crate::support::Place;
use nibble_quant::onnx::External;
use nibble_quant::onnx::proto::AttributeProto;
use std::path::Path;

/// Samples in NumPy's format.
fn write_npy(path: &Path, dims: &[usize], values: &[f32]) {
    let shape = dims.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({shape}), }}");
    header.push_str(&" ".repeat(117 - header.len()));
    header.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.into_bytes());
    bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    std::fs::write(path, bytes).unwrap();
}

/// A folder with `model.onnx` (two Convs, a Relu, a classifier) and samples for it.
pub(super) fn place() -> Place {
    let place = Place::new();
    let nodes = vec![
        node("Conv", &["x", "w1", "b1"], "c1"),
        node("Relu", &["c1"], "r1"),
        node("Conv", &["r1", "w2"], "c2"),
        node("GlobalAveragePool", &["c2"], "pool"),
        node("Flatten", &["pool"], "flat"),
        node("Gemm", &["flat", "fc"], "logits").with(AttributeProto::new_int("transB", 1)),
    ];
    let constants = vec![
        constant("w1", &[8, 3, 1, 1], 1),
        constant("b1", &[8], 2),
        constant("w2", &[8, 8, 3, 3], 3),
        constant("fc", &[5, 8], 4),
    ];
    let float = model(nodes, constants, ("x", &[1, 3, 8, 8]), &["logits"]);
    float.save(&place.path("model.onnx"), External::Auto).unwrap();
    write_npy(&place.path("calib.npy"), &[16, 3, 8, 8], &numbers(5, 16 * 192));
    write_npy(&place.path("eval.npy"), &[8, 3, 8, 8], &numbers(6, 8 * 192));
    place
}

pub(super) const QUANTIZE: [&str; 7] = ["vision", "quantize", "model.onnx", "-o", "int8.onnx", "--calib", "calib.npy"];

#[test]
fn a_model_is_quantized_and_judged() {
    let place = place();
    let made = place.run(&[&QUANTIZE[..], &["--json"]].concat()).json();
    assert_eq!((made["samples"].as_u64(), made["nodes"].as_u64()), (Some(16), Some(6)));
    assert_eq!(made["quantized_nodes"], 5);
    let rows = |key: &str| made[key].as_array().unwrap().iter().map(|r| r["tensor"].to_string()).collect::<Vec<_>>();
    assert_eq!(rows("activations").len(), 5, "{made}");
    assert_eq!(rows("weights"), ["\"w1\"", "\"w2\"", "\"fc\""]);
    assert!(made["weights"].as_array().unwrap().iter().all(|w| w["sqnr_db"].as_f64().unwrap() > 35.0), "{made}");
    assert_eq!(made["bytes_out"], std::fs::metadata(place.path("int8.onnx")).unwrap().len());
    let judged = place.run(&["vision", "eval", "model.onnx", "int8.onnx", "-d", "eval.npy", "--json"]).json();
    let logits = &judged["outputs"][0];
    assert!((0.0..0.05).contains(&logits["kl"].as_f64().unwrap()), "{judged}");
    assert_eq!((judged["samples"].as_u64(), logits["name"].as_str()), (Some(8), Some("logits")));
    assert!(logits["sqnr_db"].as_f64().unwrap() > 25.0 && logits["cosine"].as_f64().unwrap() > 0.99, "{judged}");
    // A model is its own equal: no noise, every sample alike.
    let same = place.run(&["vision", "eval", "model.onnx", "model.onnx", "-d", "eval.npy", "--json"]).json();
    let logits = &same["outputs"][0];
    assert!(logits["sqnr_db"].is_null() && logits["top1"] == 1.0 && logits["nearest"] == 1.0, "{same}");
    assert_eq!(logits["kl"], 0.0);
    // Each tensor that both models have, by pattern; what is folded away isn't among them.
    let inside = ["vision", "eval", "model.onnx", "int8.onnx", "-d", "eval.npy", "--json", "--tensor"];
    let inside = |pattern| place.run(&[&inside[..], &[pattern]].concat());
    let outputs = inside("*").json();
    let names: Vec<&str> = outputs["outputs"].as_array().unwrap().iter().map(|o| o["name"].as_str().unwrap()).collect();
    assert_eq!(names[0], "logits");
    assert!(names.contains(&"r1") && names.contains(&"pool"), "{names:?}");
    assert!(inside("*nothing").error(2).contains("no tensor of such a name"));
    let failed = place.run(&["vision", "eval", "model.onnx", "int8.onnx", "-d", "eval.npy", "--min-sqnr", "200"]);
    assert!(failed.error(1).contains("output `logits`"), "{}", failed.stderr);

    let inspected = place.run(&["vision", "inspect", "int8.onnx", "--json"]).json();
    assert_eq!(inspected["operators"]["QuantizeLinear"], 5, "x, r1, c2, pool, flat");
    assert!(inspected["weights"].as_array().unwrap().iter().any(|w| w["type"] == "int8"));

    // Nothing is replaced unasked, and the same input gives the same bytes.
    let first = std::fs::read(place.path("int8.onnx")).unwrap();
    assert!(place.run(&QUANTIZE).error(1).contains("int8.onnx: is there already"));
    place.run(&[&QUANTIZE[..], &["--force", "--threads", "1"]].concat()).ok();
    assert_eq!(std::fs::read(place.path("int8.onnx")).unwrap(), first);
    assert_eq!(place.names(), ["calib.npy", "eval.npy", "int8.onnx", "model.onnx"], "nothing is left beside it");
}

#[test]
fn a_processor_whose_sums_saturate_is_told_of() {
    let place = place();
    for (isa, words, warned) in [("avx2", &[][..], true), ("scalar", &["--reduce-range"], false)] {
        let words = [&QUANTIZE[..], &["--force"], words].concat();
        let output = place.command(&words).env("NIBBLE_ISA", isa).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        assert_eq!(
            said.contains("no VNNI") && said.contains("--reduce-range"),
            warned && cfg!(target_arch = "x86_64"),
            "{said}"
        );
    }
}

#[test]
fn a_dry_run_says_what_becomes_of_every_node_and_writes_nothing() {
    let place = place();
    let plan = place.run(&["vision", "quantize", "model.onnx", "--dry-run", "--exclude", "op:Gemm", "--json"]).json();
    let becomes = |name: &str| {
        let nodes = plan["nodes"].as_array().unwrap();
        nodes.iter().find(|n| n["node"] == name).unwrap()["becomes"].as_str().unwrap().to_owned()
    };
    assert_eq!(
        (becomes("Conv.c1"), becomes("Relu.r1"), becomes("Gemm.logits")),
        ("integer".into(), "merged".into(), "float".into())
    );
    let text = place.run(&["vision", "quantize", "model.onnx", "--dry-run"]);
    assert!(text.ok().contains("range 0..inf of the node before"), "{}", text.stdout);
    assert_eq!(place.names(), ["calib.npy", "eval.npy", "model.onnx"]);
}

#[test]
fn wrong_words_are_refused_before_anything_runs() {
    let place = place();
    let base = &["vision", "quantize", "model.onnx", "-o", "int8.onnx"];
    let calib = &["--calib", "calib.npy"];
    for (words, code, says) in [
        (&[][..], 2, "--calib is needed"),
        (&["--calib", "nowhere"], 1, "nowhere"),
        (&["--calib", "model.onnx"], 1, "model.onnx: `.onnx`: wanted jpg"),
        (&[calib, &["--observer", "guess"][..]].concat(), 2, "observer `guess`"),
        (&[calib, &["--exclude", "Conv.c9"][..]].concat(), 2, "did you mean `Conv.c1`?"),
        (&[calib, &["--algorithm", "magic"][..]].concat(), 2, "algorithm `magic`"),
        (&[calib, &["--preprocess", "magic"][..]].concat(), 1, "preprocessing `magic`"),
        (&[calib, &["--shape", "x=1x3x9x8"][..]].concat(), 1, "dimension 2 is 8 in the model, 9 was asked for"),
        (&[calib, &["--shape", "x"][..]].concat(), 1, "wanted NAME=1x3x224x224"),
        (&["--mode", "weights", "--bits", "3"], 2, "4 or 8 are possible"),
        (&[calib, &["--headroom", "0"][..]].concat(), 2, "a factor from 0.1 to 10 is possible"),
        (&[calib, &["--fine", "Gemm.c9"][..]].concat(), 2, "pattern `Gemm.c9`: fits no node"),
        (&[calib, &["--observer", "percentile=101"][..]].concat(), 2, "observer `percentile=101`"),
    ] {
        let ended = place.run(&[&base[..], words].concat());
        assert!(ended.error(code).contains(says), "{words:?}: {}", ended.stderr);
    }
    assert!(!place.path("int8.onnx").exists());
    let ended = place.run(&["vision", "quantize", "model.onnx", "-o", "model.onnx", "--calib", "calib.npy", "--force"]);
    assert!(ended.error(1).contains("is what the model was read from"), "{}", ended.stderr);
}

#[test]
fn damaged_models_and_samples_are_named() {
    let place = place();
    let whole = std::fs::read(place.path("model.onnx")).unwrap();
    for length in [0, 1, 40, whole.len() / 2, whole.len() - 1] {
        std::fs::write(place.path("model.onnx"), &whole[..length]).unwrap();
        for words in [
            &QUANTIZE[..],
            &["vision", "inspect", "model.onnx"],
            &["vision", "eval", "model.onnx", "model.onnx", "-d", "eval.npy"],
        ] {
            let ended = place.run(words);
            assert!(ended.error(1).contains("model.onnx"), "{length} bytes, {words:?}: {}", ended.stderr);
        }
    }
    std::fs::write(place.path("model.onnx"), &whole).unwrap();
    let samples = std::fs::read(place.path("calib.npy")).unwrap();
    for length in [0, 5, 60, 128, samples.len() - 1] {
        std::fs::write(place.path("calib.npy"), &samples[..length]).unwrap();
        let ended = place.run(&QUANTIZE);
        assert!(ended.error(1).contains("calib.npy"), "{length} bytes: {}", ended.stderr);
    }
    write_npy(&place.path("calib.npy"), &[2, 3, 8, 9], &numbers(5, 2 * 3 * 72));
    let ended = place.run(&QUANTIZE);
    assert!(ended.error(1).contains("array `x` is 9 in dimension 3, the model takes 8"), "{}", ended.stderr);
    std::fs::create_dir(place.path("empty")).unwrap();
    let ended = place.run(&["vision", "quantize", "model.onnx", "-o", "int8.onnx", "--calib", "empty"]);
    assert!(ended.error(1).contains("empty: holds no file of the kinds jpg"), "{}", ended.stderr);
    std::fs::write(place.path("empty/photo.png"), b"not a picture").unwrap();
    let ended = place.run(&["vision", "quantize", "model.onnx", "-o", "int8.onnx", "--calib", "empty"]);
    assert!(ended.error(1).contains("photo.png: not a picture"), "{}", ended.stderr);
    assert!(!place.path("int8.onnx").exists());
}

#[test]
fn files_that_are_no_samples_are_said_to_be_passed_over() {
    let place = place();
    std::fs::create_dir(place.path("samples")).unwrap();
    std::fs::copy(place.path("calib.npy"), place.path("samples/calib.npy")).unwrap();
    for name in ["a.gif", "b.md"] {
        std::fs::write(place.path("samples").join(name), b"?").unwrap();
    }
    let ended = place.run(&["vision", "quantize", "model.onnx", "-o", "int8.onnx", "--calib", "samples"]);
    ended.ok();
    assert!(ended.stderr.contains("a.gif and 1 more: passed over"), "{}", ended.stderr);
}

#[test]
fn onnx_runtime_is_asked_for_by_name_and_its_absence_is_one_sentence() {
    let place = place();
    let eval = ["vision", "eval", "model.onnx", "model.onnx", "-d", "eval.npy"];
    for words in [&["--engine", "ort"][..], &["--bench=2"]] {
        let mut command = place.command(&[&eval[..], words].concat());
        command.env_remove("NIBBLE_ORT_LIBRARY");
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        let wanted = match cfg!(feature = "ort") {
            true => "--ort-library (or NIBBLE_ORT_LIBRARY) is needed",
            false => "built without ONNX Runtime; build it with `--features ort`",
        };
        assert!(said.contains(wanted), "{said}");
    }
}

#[cfg(feature = "ort")]
#[test]
fn onnx_runtime_judges_and_is_timed() {
    let Some(library) = crate::assets::onnx_runtime() else { return };
    let place = place();
    // On a processor without VNNI sums of others saturate.
    place.run(&[&QUANTIZE[..], &["--reduce-range"]].concat()).ok();
    let words =
        ["vision", "eval", "model.onnx", "int8.onnx", "-d", "eval.npy", "--json", "--engine", "ort", "--bench=2"];
    let judged = place.run(&[&words[..], &["--ort-library", library.to_str().unwrap()]].concat()).json();
    assert!(judged["outputs"][0]["sqnr_db"].as_f64().unwrap() > 25.0, "{judged}");
    let times = judged["latency"].as_array().unwrap();
    let rows: Vec<_> = times.iter().map(|t| (t["model"].as_str().unwrap(), t["threads"].as_u64().unwrap())).collect();
    assert_eq!(rows, [("model.onnx", 1), ("int8.onnx", 1), ("model.onnx", 2), ("int8.onnx", 2)]);
    assert!(times.iter().all(|t| t["lower_decile_ms"].as_f64().unwrap() > 0.0), "{judged}");
}

#[test]
fn an_encoder_quantized_as_a_checkpoint_is_judged_as_a_graph() {
    let Some(weights) = asset("minilm", "assets/minilm/model.safetensors") else { return };
    let (folder, tokenizer) = (weights.parent().unwrap(), weights.with_file_name("tokenizer.json"));
    let (folder, tokenizer) = (folder.to_str().unwrap(), tokenizer.to_str().unwrap());
    let place = Place::new();
    place.run(&["quantize", folder, "-o", "int8", "--scheme", "int8-g32-dq"]).ok();
    for (from, to) in [(folder, "float.onnx"), ("int8", "int8.onnx")] {
        place.run(&["vision", "export", from, "-o", to]).ok();
    }
    let lines =
        ["The ferry left at six, while the harbour was still grey.", "Rust has no garbage collector.", "Add salt."];
    std::fs::write(place.path("texts.txt"), lines.join("\n")).unwrap();
    let words =
        ["vision", "eval", "float.onnx", "int8.onnx", "--data", "texts.txt", "--tokenizer", tokenizer, "--json"];
    let judged = place.run(&words).json();
    let states = &judged["outputs"][0];
    // Eight bits in groups of 32 leave the weights at 44 dB, and six blocks add up what they cost.
    assert!((28.0..60.0).contains(&states["sqnr_db"].as_f64().unwrap()), "{judged}");
    assert!(states["cosine"].as_f64().unwrap() > 0.999, "{judged}");
}
