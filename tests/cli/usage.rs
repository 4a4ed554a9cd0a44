//! What is refused, with which exit code, and in which words.

use crate::support::Place;
use serde_json::Value;

/// The commands that `nibble --help` lists.
fn commands(place: &Place) -> Vec<String> {
    let help = place.run(&["--help"]);
    let listed = help.ok().lines().skip_while(|line| !line.starts_with("Commands:")).skip(1);
    let names = listed.take_while(|line| line.starts_with("  ")).filter(|line| !line.starts_with("    "));
    names.filter_map(|line| line.split_whitespace().next()).map(str::to_owned).filter(|name| name != "help").collect()
}

#[test]
fn every_command_has_help_with_an_example_and_refuses_unknown_flags() {
    let place = Place::new();
    let commands = commands(&place);
    for wanted in ["import", "quantize", "generate", "chat", "bench", "eval", "inspect", "verify", "diff", "schemes"] {
        assert!(commands.iter().any(|name| name == wanted), "no {wanted} in {commands:?}");
    }
    for name in &commands {
        let help = place.run(&[name, "--help"]);
        assert!(help.ok().contains(&format!("nibble {name}")), "{name} shows no example:\n{}", help.stdout);
        assert!(help.stdout.contains("--json"), "{name} lacks --json");
        place.run(&[name, "--no-such-flag"]).error(2);
        let ended = place.run(&[name, "--no-such-flag", "--json"]);
        ended.error(2);
        let value: Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(value["error"].as_str().unwrap().contains("--no-such-flag"), "{value}");
    }
}

#[test]
fn wrong_words_are_refused_with_exit_code_two() {
    let place = Place::new();
    place.model("float", &[]);
    let cases: &[(&[&str], &[&str])] = &[
        (&["quantise", "float"], &["quantise", "quantize"]),
        (&["quantize", "float"], &["--output"]),
        (&["quantize", "float", "-o", "x", "--scheme", "int44"], &["int44", "int4"]),
        (&["quantize", "float", "-o", "x", "--lm-head-scheme", "imt8-g32"], &["imt8", "int8-g32"]),
        (&["quantize", "float", "-o", "x", "--threads", "0"], &["--threads"]),
        (&["quantize", "float", "-o", "x", "--threads", "many"], &["many"]),
        (&["generate", "float"], &["prompt"]),
        (&["generate", "float", "-p", "a", "-f", "b"], &["--file"]),
        (&["generate", "float", "-p", "a", "--stop", "\\q"], &["\\q"]),
        (&["generate", "float", "-p", "a", "--kv", "f8"], &["f8", "int8"]),
        (&["generate", "float", "-p", "a", "--system", "s"], &["--chat"]),
        (&["generate", "float", "-p", "a", "--temperature", "hot"], &["hot"]),
        (&["bench", "float", "-p", "1,x"], &["x"]),
        (&["bench", "float", "-r", "0"], &["0"]),
        (&["eval", "float"], &["--text"]),
        (&["eval", "float", "--text", "t", "--max-kl", "1"], &["--reference"]),
        (&["schemes", "--shape", "12"], &["12", "ROWSxCOLUMNS"]),
        (&["kernels", "--time", "--assert", "gemm_*=fast"], &["gemm_*=fast", "PATTERN=SHARE"]),
        (&["kernels", "--assert", "gemm_*=0.5"], &["--time"]),
        (&["synth"], &["--output"]),
        (&[], &["Usage"]),
    ];
    for (words, wanted) in cases {
        let ended = place.run(words);
        assert_eq!(ended.code, 2, "{words:?}:\n{}\n{}", ended.stderr, ended.stdout);
        for word in *wanted {
            assert!(ended.stderr.contains(word), "{words:?} doesn't say {word}:\n{}", ended.stderr);
        }
        assert_eq!(ended.stdout, "", "{words:?}: stdout is for results");
    }
    assert_eq!(place.names(), ["float"], "nothing was written");
}

#[test]
fn an_unknown_instruction_set_is_refused() {
    let place = Place::new();
    let run = |word: &str| {
        let mut command = place.command(&["schemes"]);
        command.env("NIBBLE_ISA", word).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        crate::support::finish(command.spawn().unwrap())
    };
    let refused = run("sse9");
    for word in ["NIBBLE_ISA=sse9", "scalar", "avx2"] {
        assert!(refused.error(2).contains(word), "{}", refused.stderr);
    }
    run("scalar").ok();
    run("").ok();
}

#[test]
fn what_is_not_there_is_named() {
    let place = Place::new();
    place.model("float", &[]);
    std::fs::create_dir(place.path("empty")).unwrap();
    let cases: &[(&[&str], &[&str])] = &[
        (&["quantize", "gone", "-o", "out"], &["gone"]),
        (&["quantize", "./gone/deeper", "-o", "out"], &["gone/deeper"]),
        (&["quantize", "empty", "-o", "out"], &["empty", "safetensors"]),
        (&["quantize", "float", "-o", "out", "--recipe", "gone.toml"], &["gone.toml"]),
        (&["generate", "gone", "-p", "x"], &["gone"]),
        (&["generate", "float", "-f", "gone.txt"], &["gone.txt"]),
        (&["chat", "gone"], &["gone"]),
        (&["bench", "gone"], &["gone"]),
        (&["eval", "float", "--text", "gone.txt"], &["gone.txt"]),
        (&["inspect", "gone"], &["gone"]),
        (&["verify", "gone"], &["gone"]),
        (&["diff", "float", "gone"], &["gone"]),
        (&["import", "gone.gguf", "-o", "out"], &["gone.gguf"]),
        (&["synth", "-o", "new", "--tokenizer", "gone/tokenizer"], &["gone"]),
    ];
    for (words, wanted) in cases {
        let ended = place.run(words);
        for word in *wanted {
            assert!(ended.error(1).contains(word), "{words:?} doesn't say {word}:\n{}", ended.stderr);
        }
        let json = place.run(&[words, &["--json"][..]].concat());
        let value: Value = serde_json::from_str(&json.stdout).unwrap_or_else(|e| panic!("{words:?}: {e}"));
        assert!(value["error"].is_string() && value["causes"].is_array(), "{words:?}: {value}");
    }
    assert_eq!(place.names(), ["empty", "float"], "nothing was written");
}

#[test]
fn an_existing_output_is_never_touched_unasked() {
    let place = Place::new();
    place.model("float", &[]);
    place.run(&["quantize", "float", "-o", "out", "--scheme", "int8-g32"]).ok();
    let before = place.files("out");
    let refused = place.run(&["quantize", "float", "-o", "out", "--scheme", "int4-g32"]);
    assert!(refused.error(1).contains("out") && refused.stderr.contains("--force"), "{}", refused.stderr);
    assert!(place.files("out") == before);
    place.run(&["quantize", "float", "-o", "out", "--scheme", "int4-g32", "--force"]).ok();
    assert!(place.files("out") != before);

    let source = place.files("float");
    for out in ["float", "./float", "float/inside"] {
        for extra in [&[][..], &["--force"]] {
            let refused = place.run(&[&["quantize", "float", "-o", out][..], extra].concat());
            assert!(refused.error(1).contains("float"), "{}", refused.stderr);
        }
    }
    assert!(place.files("float") == source, "the source is as it was");
    // A folder that isn't a checkpoint may hold anything; --force is not permission to remove that.
    std::fs::create_dir(place.path("photos")).unwrap();
    std::fs::write(place.path("photos/cat.jpg"), "cat").unwrap();
    place.run(&["quantize", "float", "-o", "photos", "--force"]).error(1);
    assert_eq!(std::fs::read(place.path("photos/cat.jpg")).unwrap(), b"cat");

    let refused = place.run(&["synth", "-o", "float"]);
    assert!(refused.error(1).contains("exists"), "{}", refused.stderr);
    assert!(place.files("float") == source);
}

#[test]
fn settings_out_of_range_are_named() {
    let place = Place::new();
    place.model("float", &[]);
    let generate = |extra: &[&str]| place.run(&[&["generate", "float", "-p", "x", "-n", "2"][..], extra].concat());
    assert!(generate(&["--temperature=-1"]).error(1).contains("temperature"));
    assert!(generate(&["--top-p", "1.5"]).error(1).contains("top_p"));
    assert!(generate(&["--repetition-penalty", "0"]).error(1).contains("repetition_penalty"));
    assert!(generate(&["--temperature", "nan"]).error(1).contains("temperature"));
    assert!(
        generate(&["--ctx", "0"]).error(1).contains("context") || generate(&["--ctx", "0"]).stderr.contains("zero")
    );
    let long = "x".repeat(100);
    let refused = place.run(&["generate", "float", "-p", &long, "--ctx", "50"]);
    assert!(refused.error(1).contains("50"), "{}", refused.stderr);
    std::fs::write(place.path("text"), "too short").unwrap();
    let refused = place.run(&["eval", "float", "--text", "text"]);
    assert!(refused.error(1).contains("512"), "{}", refused.stderr);
    std::fs::write(place.path("bytes"), [0xff, 0xfe, 0x00]).unwrap();
    assert!(place.run(&["eval", "float", "--text", "bytes"]).error(1).contains("UTF-8"));
}

#[test]
fn a_family_that_is_not_run_is_refused_by_name_but_converted() {
    let place = Place::new();
    place.model("float", &[]);
    let config = std::fs::read_to_string(place.path("float/config.json")).unwrap();
    std::fs::write(place.path("float/config.json"), config.replace("\"llama\"", "\"palm9\"")).unwrap();
    let refused = place.run(&["generate", "float", "-p", "x"]);
    assert!(refused.error(1).contains("palm9") && refused.stderr.contains("llama"), "{}", refused.stderr);
    place.run(&["quantize", "float", "-o", "out"]).ok();
    assert_eq!(place.run(&["inspect", "out", "--json"]).json()["config"]["model_type"], "palm9");
}

#[test]
fn limits_of_an_evaluation_decide_the_exit_code() {
    let place = Place::new();
    place.model("float", &[]);
    place.run(&["quantize", "float", "-o", "int4"]).ok();
    std::fs::write(place.path("text"), crate::support::text(300)).unwrap();
    let eval = |extra: &[&str]| {
        let words = ["eval", "int4", "--reference", "float", "--text", "text", "--ctx", "64"];
        place.run(&[&words[..], extra].concat())
    };
    eval(&["--max-kl", "100", "--max-ppl-ratio", "100"]).ok();
    assert!(eval(&["--max-kl", "0"]).error(1).contains("KL"));
    assert!(eval(&["--max-ppl-ratio", "0.1"]).error(1).contains("perplexity"));
    let diff = place.run(&["diff", "float", "int4", "--below", "90", "--strict"]);
    assert!(diff.error(1).contains("below 90"), "{}", diff.stderr);
    assert!(diff.stdout.contains("<--"), "{}", diff.stdout);
}

#[test]
#[cfg(not(feature = "cuda"))]
fn a_gpu_is_refused_by_a_build_without_it() {
    let place = Place::new();
    place.model("float", &[]);
    std::fs::write(place.path("text"), "some words").unwrap();
    for words in [
        &["generate", "float", "-p", "a", "--device", "cuda"][..],
        &["chat", "float", "--device", "cuda"],
        &["eval", "float", "--text", "text", "--device", "cuda"],
        &["bench", "float", "--device", "cuda"],
    ] {
        let said = place.run(words).error(2).to_owned();
        assert!(said.contains("--features cuda"), "{words:?}: {said}");
    }
}
