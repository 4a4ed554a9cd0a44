//! `--json`: one value on stdout with the promised fields, nothing on stderr.

use crate::support::{Place, text};
use serde_json::Value;

/// Asserts that every dotted path is there and not null.
fn fields(value: &Value, paths: &[&str]) {
    for path in paths {
        let found = path.split('.').try_fold(value, |value, key| match key.parse::<usize>() {
            Ok(index) => value.get(index),
            Err(_) => value.get(key),
        });
        assert!(found.is_some_and(|v| !v.is_null()), "no {path} in {value:#}");
    }
}

#[test]
fn every_command_prints_the_promised_fields() {
    let place = Place::new();
    place.model("float", &[]);
    std::fs::write(place.path("text"), text(300)).unwrap();
    let run = |words: &[&str]| {
        let ended = place.run(&[words, &["--json"][..]].concat());
        let value = ended.json();
        assert_eq!(ended.stderr, "", "{words:?}");
        value
    };
    let quantized = run(&["quantize", "float", "-o", "int4", "--scheme", "int4-g32"]);
    let wanted = ["path", "bits_per_linear_weight", "bits_per_weight_file", "bytes_in", "bytes_out", "seconds"];
    fields(&quantized, &wanted);
    fields(&quantized, &["megabytes_per_second", "peak_rss_bytes", "classes.0.class", "classes.0.sqnr_db.mean"]);
    fields(&run(&["verify", "int4"]), &["ok", "format", "tensors", "hashed_files"]);
    let inspected = run(&["inspect", "int4"]);
    fields(&inspected, &["format", "bits_per_linear_weight", "bits_per_weight_file", "parameters", "bytes"]);
    fields(&inspected, &["tensors.0.name", "tensors.0.shape", "tensors.0.stored", "tensors.0.bits_per_weight"]);
    let answer = run(&["generate", "int4", "-p", "a", "-n", "3", "--ignore-eos"]);
    fields(&answer, &["text", "tokens.2", "finish", "tokens_per_second", "prompt_tokens", "completion_tokens", "seed"]);
    let score = run(&["eval", "int4", "--reference", "float", "--text", "text", "--ctx", "64", "--chunks", "2"]);
    fields(&score, &["ppl", "ppl_error", "reference_ppl", "ppl_ratio", "kl.mean", "kl.p99", "same_top1", "chunks"]);
    fields(&run(&["diff", "float", "int4"]), &["worst", "tensors.0.name", "tensors.0.cosine", "identical"]);
    let rows = run(&["bench", "int4", "-p", "8", "-n", "4", "-r", "2", "-t", "1,2"]);
    assert_eq!(rows.as_array().unwrap().len(), 4);
    assert_eq!(rows[0]["test"], "pp8");
    assert_eq!(rows[1]["test"], "tg4");
    fields(&rows, &["0.threads", "0.tokens_per_second", "0.sd", "0.bandwidth_share", "0.int8_share", "0.model"]);
    let schemes = run(&["schemes"]);
    fields(&schemes, &["0.name", "0.bits_per_weight", "0.summary"]);
    let kernels = run(&["kernels"]);
    fields(&kernels, &["isa", "kernels.0.name", "kernels.0.isa"]);
    fields(&run(&["synth", "-o", "other"]), &["path", "bytes"]);
}

#[test]
fn tables_are_markdown_json_or_csv() {
    let place = Place::new();
    place.model("float", &[]);
    let bench = |format: &str| {
        place.run(&["bench", "float", "-p", "4", "-n", "0", "-r", "1", "-t", "1", "-o", format]).ok().to_string()
    };
    let markdown = bench("md");
    assert!(markdown.starts_with("| model") && markdown.contains("| pp4"), "{markdown}");
    let csv = bench("csv");
    assert!(csv.starts_with("model,") && csv.lines().count() == 2, "{csv}");
    let json: Value = serde_json::from_str(&bench("json")).unwrap();
    assert_eq!(json[0]["test"], "pp4");
}

#[test]
fn a_scheme_costs_what_its_row_says() {
    let place = Place::new();
    place.model("float", &["--hidden", "256", "--ffn", "512", "--heads", "4", "--kv-heads", "4"]);
    let schemes = place.run(&["schemes", "--shape", "512x256", "--json"]).json();
    for row in schemes.as_array().unwrap() {
        let name = row["name"].as_str().unwrap();
        place.run(&["quantize", "float", "-o", name, "--scheme", name]).ok();
        let inspected = place.run(&["inspect", name, "--json"]).json();
        let tensors = inspected["tensors"].as_array().unwrap();
        let up = tensors.iter().find(|t| t["name"] == "model.layers.0.mlp.up_proj.weight").unwrap();
        let (told, found) = (row["bits_per_weight"].as_f64().unwrap(), up["bits_per_weight"].as_f64().unwrap());
        assert!((told - found).abs() < 1e-9, "{name}: {told} told, {found} in the file");
    }
}

#[test]
fn quiet_leaves_stderr_empty_and_stdout_the_same() {
    let place = Place::new();
    place.model("float", &[]);
    let words = ["generate", "float", "-p", "x", "-n", "4", "--ignore-eos"];
    let (loud, quiet) = (place.run(&words), place.run(&[&words[..], &["--quiet"]].concat()));
    assert_eq!(loud.ok(), quiet.ok());
    assert!(loud.stderr.contains("t/s"));
    assert_eq!(quiet.stderr, "");
}

#[test]
fn every_kernel_that_is_present_is_timed_and_each_problem_has_its_pick() {
    let place = Place::new();
    let words = ["kernels", "--time", "--shape", "48x64", "--rows", "5", "-t", "2", "--json"];
    let value = place.run(&words).json();
    fields(&value, &["limits.read_bytes_per_second", "limits.int8_multiply_adds_per_second"]);
    let rows = value["kernels"].as_array().unwrap();
    for row in rows {
        let timed = row["gigabytes_per_second"].as_f64();
        assert_eq!(timed.is_some_and(|speed| speed > 0.0), row["present"] == true, "{row}");
    }
    // A weight and a kind of activations have one kernel for single rows and one for many; tiles are for many rows alone.
    let mut problems: Vec<String> = rows.iter().map(|r| format!("{} {}", r["weight"], r["activations"])).collect();
    problems.sort();
    problems.dedup();
    let picked = rows.iter().filter(|row| row["picked"] == true).count();
    let (tiled, others): (Vec<_>, Vec<_>) = problems.iter().partition(|problem| problem.ends_with("\"bf16\""));
    let tiled = if value["isa"] == "amx" { tiled.len() } else { 0 };
    assert_eq!(picked, 2 * others.len() + tiled);
}

#[test]
fn a_kernel_below_the_floor_that_was_asked_for_fails_the_command() {
    let place = Place::new();
    let kernels = |floor: &str| place.run(&["kernels", "--time", "--shape", "48x64", "--rows", "5", "--assert", floor]);
    kernels("gemm_*=0").ok();
    let missed = kernels("gemm_w8_i8_1x16_*=1e9");
    let said = missed.error(1);
    assert!(said.contains("gemm_w8_i8_1x16_") && said.contains("1000000000"), "{said}");
    assert!(kernels("gemm_w9*=0.5").error(2).contains("gemm_w9*"));
}
