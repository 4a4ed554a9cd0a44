//! `nibble vision diagnose`, and `vision quantize` with a goal: whole processes.

use super::vision::{QUANTIZE, place};

const DIAGNOSE: [&str; 7] = ["vision", "diagnose", "model.onnx", "--calib", "calib.npy", "--data", "eval.npy"];

#[test]
fn a_model_is_diagnosed() {
    let place = place();
    let found = place.run(&[&DIAGNOSE[..], &["--json", "-o", "diagnosis.json", "--state", "state"]].concat()).json();
    assert_eq!(found["samples"], 8);
    let layers = found["layers"].as_array().unwrap();
    let nodes: Vec<&str> = layers.iter().map(|l| l["node"].as_str().unwrap()).collect();
    assert_eq!(nodes, ["Conv.c1", "Conv.c2", "Gemm.logits"]);
    for layer in layers {
        let db = |which: &str| layer[which]["sqnr_db"].as_f64().unwrap();
        assert!(db("only") > 25.0 && db("without") > 25.0, "{layer}");
        assert!(layer["only"]["kl"].as_f64().unwrap() >= 0.0 && layer["only"]["agreement"].is_f64(), "{layer}");
    }
    let both = found["sources"]["both"]["sqnr_db"].as_f64().unwrap();
    for part in ["weights", "activations"] {
        assert!(found["sources"][part]["sqnr_db"].as_f64().unwrap() > both - 1.0, "{found}");
    }
    // As `vision eval` has it of the file that `vision quantize` makes.
    place.run(&QUANTIZE).ok();
    let judged = place.run(&["vision", "eval", "model.onnx", "int8.onnx", "-d", "eval.npy", "--json"]).json();
    assert!((judged["outputs"][0]["sqnr_db"].as_f64().unwrap() - both).abs() < 0.01, "{judged}");
    let text = std::fs::read_to_string(place.path("diagnosis.json")).unwrap();
    let written: nibble_models::vision::diagnose::Diagnosis = serde_json::from_str(&text).unwrap();
    assert_eq!(serde_json::to_value(&written).unwrap(), found);
    assert_eq!((written.weights.len(), written.activations.is_empty()), (3, false));

    // Labels, and the same again out of the state.
    let classes: Vec<String> = (0..8).map(|i| (i % 5).to_string()).collect();
    std::fs::write(place.path("labels.txt"), classes.join("\n")).unwrap();
    let told = place.run(&[&DIAGNOSE[..], &["--labels", "labels.txt"]].concat());
    assert!(told.ok().contains("accuracy"), "{}", told.stdout);
    let text = place.run(&[&DIAGNOSE[..], &["--state", "state", "--top", "2"]].concat());
    assert!(text.ok().contains("activations") && text.ok().contains("Conv.c2"), "{}", text.stdout);
    let other = place.run(&[&DIAGNOSE[..], &["--state", "state", "--per-tensor"]].concat());
    assert!(other.error(1).contains("of other settings"), "{}", other.stderr);
    let again = place.run(&[&DIAGNOSE[..], &["-o", "diagnosis.json"]].concat());
    assert!(again.error(1).contains("is there already"), "{}", again.stderr);
    let dynamic = place.run(&[&DIAGNOSE[..], &["--mode", "dynamic"]].concat());
    assert!(dynamic.error(2).contains("static quantization alone"), "{}", dynamic.stderr);
}

#[test]
fn a_goal_is_reached_or_refused() {
    let place = place();
    let plain = place.run(&[&QUANTIZE[..], &["--json"]].concat()).json();
    assert!(plain["mixed"].is_null());
    let quantize = |words: &[&str]| place.run(&[&QUANTIZE[..], &["--force", "--json"], words].concat());
    let mixed = quantize(&["--target-sqnr", "48", "--judge", "eval.npy"]).json();
    let chosen = &mixed["mixed"]["chosen"];
    assert!(chosen["good"] == true && chosen["sqnr_db"].as_f64().is_none_or(|db| db >= 48.0), "{mixed}");
    assert!(!mixed["mixed"]["attempts"].as_array().unwrap().is_empty());
    assert!(mixed["quantized_nodes"].as_u64() < plain["quantized_nodes"].as_u64(), "{mixed}");
    let judged = place.run(&["vision", "eval", "model.onnx", "int8.onnx", "-d", "eval.npy", "--json"]).json();
    assert!(judged["outputs"][0]["sqnr_db"].as_f64().is_none_or(|db| db >= 48.0), "{judged}");
    let told = place.run(&[&QUANTIZE[..], &["--force", "--target-agreement", "100"]].concat());
    assert!(told.ok().contains("models measured"), "{}", told.stdout);
    let tight = quantize(&["--max-size", "0.0001"]);
    assert!(tight.error(1).contains("weights in 4 bits"), "{}", tight.stderr);
    let without = quantize(&["--max-size", "0.0001", "--target", "tensorrt"]);
    assert!(without.error(1).contains("with all layers in integers"), "{}", without.stderr);
    // Time is measured: everything fits into a hundred times the float model's, and nothing into a ten-thousandth.
    let fits = quantize(&["--max-latency", "100", "--rounds", "2"]).json();
    assert!(fits["mixed"]["chosen"]["measured"].as_f64().unwrap() <= 100.0 && fits["quantized_nodes"] == 0, "{fits}");
    assert!(quantize(&["--max-latency", "0.0001", "--rounds", "2"]).error(1).contains("with all layers in integers"));
    for (words, says) in [
        (&["--rounds", "3"][..], "--max-latency"),
        (&["--max-latency", "0.5", "--max-size", "1"], "cannot be used with"),
        (&["--target-agreement", "101"], "a share from 0 to 100"),
        (&["--target-accuracy", "90"], "--labels"),
        (&["--target-sqnr", "30", "--max-size", "1"], "cannot be used with"),
        (&["--target-sqnr", "30", "--mode", "dynamic"], "static quantization alone"),
        (&["--effort", "max", "--algorithm", "rtn"], "cannot be used with"),
        (&["--algorithm", "adaround", "--mode", "weights"], "for static quantization"),
        (&["--store", "op:Gemm=int5"], "did you mean `int4`"),
        (&["--store", "op:Gemm"], "isn't PATTERN=STORAGE"),
    ] {
        let ended = quantize(words);
        assert!(ended.error(2).contains(says), "{words:?}: {}", ended.stderr);
    }
}

#[test]
fn effort_is_one_word_for_how_weights_are_rounded() {
    let place = place();
    let bytes = |words: &[&str]| {
        place.run(&[&QUANTIZE[..], &["--force"], words].concat()).ok();
        std::fs::read(place.path("int8.onnx")).unwrap()
    };
    let [plain, gptq, learned] = [&[][..], &["--algorithm", "gptq"], &["--algorithm", "adaround"]].map(bytes);
    assert!(plain != gptq && plain != learned && gptq != learned);
    let [fast, balanced, max] = ["fast", "balanced", "max"].map(|word| bytes(&["--effort", word]));
    assert!(fast == plain && balanced == gptq && max == learned);
}
