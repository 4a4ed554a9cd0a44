//! What a conversion proves about its output, and how bits are allocated, on tiny models.

use crate::support::{Place, text};

#[test]
fn an_output_that_is_worse_than_allowed_is_not_left_behind() {
    let place = Place::new();
    place.model("float", &["--hidden", "96", "--heads", "3", "--kv-heads", "3"]);
    std::fs::write(place.path("text"), text(1200)).unwrap();
    let before = place.names();
    let words = ["quantize", "float", "-o", "out", "--scheme", "int2-g32-dq", "--eval", "text", "--max-kl", "1e-9"];
    let refused = place.run(&words);
    assert!(
        refused.error(1).contains("mean KL divergence") && refused.stderr.contains("--force"),
        "{}",
        refused.stderr
    );
    assert_eq!(place.names(), before, "neither output nor partial output");

    let kept = place.run(&[&words[..], &["--force"]].concat());
    assert!(kept.ok().contains("against its source"), "{}", kept.stdout);
    assert!(kept.stderr.contains("kept because of --force"), "{}", kept.stderr);
    place.run(&["verify", "out"]).ok();

    let judged = ["quantize", "float", "-o", "fine", "--scheme", "int8-g32", "--eval", "text", "--json"];
    let judged = [&judged[..], &["--report", "page.html"]].concat();
    let trial = &place.run(&judged).json()["trial"];
    assert_eq!(trial["eval"]["chunks"], 4);
    assert!((0.0..0.01).contains(&trial["eval"]["kl"]["mean"].as_f64().unwrap()), "{trial}");
    assert!(trial["prompt"].as_str().unwrap().starts_with("the quick"), "{trial}");
    assert!(trial["before"].is_string() && trial["after"].is_string(), "{trial}");
    let page = std::fs::read_to_string(place.path("page.html")).unwrap();
    for part in
        ["fine quantized", "from float", "model.layers.0.mlp.up_proj.weight", "perplexity x", "--report page.html"]
    {
        assert!(page.contains(part), "{part}");
    }
    assert!(place.run(&judged).error(1).contains("page.html: is there already"));
}

#[test]
fn only_calibrated_conversions_are_tried_unasked() {
    let place = Place::new();
    place.model("float", &[]);
    std::fs::write(place.path("text"), text(1200)).unwrap();
    let trial = |out: &str, words: &[&str]| {
        let words = [&["quantize", "float", "-o", out, "--json"], words].concat();
        place.run(&words).json()["trial"].clone()
    };
    assert!(trial("blind", &[]).is_null());
    assert!(trial("tried", &["--calib", "text"])["eval"]["scored"].as_u64().unwrap() > 100);
    assert!(trial("untried", &["--calib", "text", "--no-eval"]).is_null());
    std::fs::write(place.path("short"), text(100)).unwrap();
    let refused = place.run(&["quantize", "float", "-o", "none", "--eval", "short"]);
    assert!(refused.error(1).contains("256 are needed"), "{}", refused.stderr);
    assert!(!place.path("none").exists());
}

#[test]
fn bits_are_allocated_within_their_target_and_the_recipe_serves_again() {
    let place = Place::new();
    place.model("float", &["--hidden", "128", "--ffn", "256", "--heads", "4", "--kv-heads", "2"]);
    let weights = |out: &str| {
        let files = place.files(out).into_iter();
        files.filter(|(name, _)| name.ends_with(".safetensors")).collect::<Vec<_>>()
    };
    for target in [4.0, 5.1] {
        let (out, again, bits) = (format!("at-{target}"), format!("again-{target}"), target.to_string());
        let words = ["quantize", "float", "-o", &out, "--target-bpw", &bits, "--save-recipe", "recipe.toml", "--json"];
        let found = place.run(&words).json()["bits_per_linear_weight"].as_f64().unwrap();
        // One layer is 1/14 of the weights or less, and a step two bits at most.
        assert!(found <= target && found > target - 0.15, "{found} bits for {target}");
        place.run(&["quantize", "float", "-o", &again, "--recipe", "recipe.toml"]).ok();
        assert!(weights(&out) == weights(&again), "{target}");
    }
    // The same by bytes, and by what it is predicted to cost: a smaller cost takes more of them.
    let bytes = |out: &str, flag: &str, value: &str| {
        let found = place.run(&["quantize", "float", "-o", out, flag, value, "--json"]).json();
        found["bits_per_linear_weight"].as_f64().unwrap()
    };
    let weights_in_linears = 2.0 * (2.0 * 128.0 * 128.0 + 2.0 * 64.0 * 128.0 + 3.0 * 128.0 * 256.0);
    let megabytes = 4.5 * weights_in_linears / 8e6;
    let by_size = bytes("by-size", "--target-size", &megabytes.to_string());
    assert!(by_size <= 4.5 && by_size > 4.3, "{by_size}");
    let (dear, cheap) = (bytes("dear", "--target-kl", "0.2"), bytes("cheap", "--target-kl", "0.001"));
    assert!(dear <= cheap, "{dear}, {cheap}");
    assert!(place.run(&["quantize", "float", "-o", "none", "--target-kl", "0"]).error(2).contains("--target-kl"));
    let refused = place.run(&["quantize", "float", "-o", "none", "--target-bpw", "2.5"]);
    assert!(refused.error(2).contains("the smallest schemes take 3."), "{}", refused.stderr);
}

#[test]
fn a_transformed_model_says_the_same() {
    let place = Place::new();
    place.model("float", &["--hidden", "72", "--heads", "9", "--kv-heads", "3"]);
    std::fs::write(place.path("text"), text(600)).unwrap();
    for rotation in ["none", "hadamard", "cayley"] {
        place.run(&["transform", "float", "-o", rotation, "--rotate", rotation, "--seed", "3"]).ok();
        place.run(&["verify", rotation]).ok();
        let eval = ["eval", rotation, "--reference", "float", "--text", "text", "--ctx", "64", "--activations", "f32"];
        let scored = place.run(&[&eval[..], &["--json"]].concat()).json();
        assert!(scored["kl"]["mean"].as_f64().unwrap() < 1e-9, "{rotation}: {scored}");
        let config = std::fs::read_to_string(place.path(rotation).join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_str(&config).unwrap();
        assert_eq!(config["tie_word_embeddings"], false, "{rotation}");
    }
    place.run(&["calibrate", "float", "--calib", "text", "-o", "stats"]).ok();
    for scaled in ["smooth", "awq"] {
        place.run(&["transform", "float", "-o", scaled, "--rotate", scaled, "--stats", "stats"]).ok();
        let eval = ["eval", scaled, "--reference", "float", "--text", "text", "--ctx", "64", "--activations", "f32"];
        let scored = place.run(&[&eval[..], &["--json"]].concat()).json();
        assert!(scored["kl"]["mean"].as_f64().unwrap() < 1e-9, "{scaled}: {scored}");
        let refused = place.run(&["transform", "float", "-o", "none", "--rotate", scaled]);
        assert!(refused.error(2).contains("needs statistics"), "{}", refused.stderr);
    }
    let again = place.run(&["transform", "float", "-o", "hadamard"]);
    assert!(again.error(1).contains("exists already"), "{}", again.stderr);
    let quantized = place.run(&["quantize", "float", "-o", "int4"]);
    quantized.ok();
    let refused = place.run(&["transform", "int4", "-o", "none"]);
    assert!(refused.error(1).contains("wanted floats"), "{}", refused.stderr);
}

#[test]
fn layers_learn_levels_of_their_own_and_the_recipe_keeps_them() {
    let place = Place::new();
    place.model("float", &["--hidden", "64", "--ffn", "96", "--heads", "2", "--kv-heads", "2"]);
    std::fs::write(place.path("text"), text(1300)).unwrap();
    place.run(&["calibrate", "float", "--calib", "text", "-o", "stats"]).ok();
    let quantize = |out: &str, words: &[&str]| {
        let words = [&["quantize", "float", "-o", out, "--stats", "stats", "--no-eval"], words].concat();
        place.run(&words).ok();
        let files = place.files(out).into_iter();
        files.filter(|(name, _)| name.ends_with(".safetensors")).collect::<Vec<_>>()
    };
    let learned = quantize("learned", &["--save-recipe", "recipe.toml"]);
    let fixed = quantize("fixed", &["--fixed-levels"]);
    assert!(learned != fixed);
    assert!(learned == quantize("again", &["--recipe", "recipe.toml"]));
    let recipe = std::fs::read_to_string(place.path("recipe.toml")).unwrap();
    assert_eq!(recipe.matches("int8 = [").count(), 14, "one table a linear layer:\n{recipe}");
    // Nothing was observed: nothing is learned.
    place.run(&["quantize", "float", "-o", "blind", "--save-recipe", "blind.toml"]).ok();
    assert!(!std::fs::read_to_string(place.path("blind.toml")).unwrap().contains("int8 = ["));
}

#[test]
fn a_conversion_that_turns_is_a_transform_and_a_conversion() {
    let place = Place::new();
    place.model("float", &["--hidden", "72", "--heads", "9", "--kv-heads", "3"]);
    std::fs::write(place.path("text"), text(1300)).unwrap();
    place.run(&["transform", "float", "-o", "turned", "--rotate", "hadamard", "--seed", "5"]).ok();
    let calibrated = ["--calib", "text", "--effort", "max"];
    let by_blocks = ["--calib", "text", "--sequential"];
    let by_gradients = ["--calib", "text", "--gradients", "--target-bpw", "4.9"];
    let ways: [&[&str]; 4] = [&["--algorithm", "rtn"], &calibrated, &by_blocks, &by_gradients];
    for (at, words) in ways.into_iter().enumerate() {
        let quantize = |source: &str, out: &str, more: &[&str]| {
            let quantize = ["quantize", source, "-o", out, "--no-eval", "--save-recipe", "recipe.toml", "--seed", "5"];
            place.run(&[&quantize[..], words, more].concat()).ok();
        };
        let [twice, once] = [format!("twice-{at}"), format!("once-{at}")];
        quantize("turned", &twice, &[]);
        quantize("float", &once, &["--rotate", "hadamard"]);
        assert_eq!(place.run(&["diff", &twice, &once, "--json"]).json()["identical"], true, "{words:?}");
        let config = std::fs::read_to_string(place.path(&once).join("config.json")).unwrap();
        assert!(config.contains("\"tie_word_embeddings\": false"), "{config}");
        place.run(&["verify", &once]).ok();
        let recipe = std::fs::read_to_string(place.path("recipe.toml")).unwrap();
        assert!(recipe.contains("rotate = \"hadamard\""), "{recipe}");
    }
    // The recipe turns as the flag does.
    let recipe = "rotate = \"hadamard\"\n[[rule]]\nrole = \"linear\"\nscheme = \"int8-g32-dq\"\n";
    std::fs::write(place.path("own.toml"), recipe).unwrap();
    let own = ["quantize", "float", "-o", "own", "--recipe", "own.toml", "--seed", "5", "--eval", "text", "--json"];
    let kl = place.run(&own).json()["trial"]["eval"]["kl"]["mean"].as_f64().unwrap();
    assert!(kl < 1e-3, "its function is the source's: {kl}");
    std::fs::write(place.path("scales.toml"), recipe.replace("hadamard", "awq")).unwrap();
    let refused = place.run(&["quantize", "float", "-o", "none", "--recipe", "scales.toml"]);
    assert!(refused.error(2).contains("`nibble transform` does that"), "{}", refused.stderr);
    // Statistics are of one model or the other, and say so.
    let calibrate = ["calibrate", "float", "--calib", "text", "-o"];
    place.run(&[&calibrate[..], &["as-it-is"]].concat()).ok();
    place.run(&[&calibrate[..], &["turned.stats", "--rotate", "hadamard", "--seed", "5"]].concat()).ok();
    let quantize = ["quantize", "float", "--no-eval", "--effort", "max", "-o"];
    let turned = ["--rotate", "hadamard", "--seed", "5", "--stats", "turned.stats"];
    place.run(&[&quantize[..], &["from-stats"], &turned].concat()).ok();
    assert_eq!(place.run(&["diff", "once-1", "from-stats", "--json"]).json()["identical"], true);
    let others: [(&[&str], &str); 3] = [
        (&["--stats", "turned.stats"], "turned by `hadamard` with seed 5, wanted of the model as it is"),
        (&["--stats", "turned.stats", "--rotate", "hadamard"], "wanted of the model turned by `hadamard` with seed 0"),
        (
            &["--stats", "as-it-is", "--rotate", "hadamard"],
            "they are of the model as it is, wanted of the model turned",
        ),
    ];
    for (words, why) in others {
        let refused = place.run(&[&quantize[..], &["none"], words].concat());
        assert!(refused.error(2).contains(why), "{words:?}: {}", refused.stderr);
    }
    let refused = place.run(&["transform", "float", "-o", "none", "--rotate", "awq", "--stats", "turned.stats"]);
    assert!(refused.error(2).contains("wanted of the model as it is"), "{}", refused.stderr);
    let refused = place.run(&[&calibrate[..], &["imatrix.gguf", "--rotate", "hadamard"]].concat());
    assert!(refused.error(2).contains("an imatrix can't say"), "{}", refused.stderr);
    assert!(!place.path("imatrix.gguf").exists());
    assert!(!place.path("none").exists());
}

/// Lines of JSON are the texts that they hold, and a model can write its own text.
#[test]
fn calibration_reads_lines_of_json_and_what_the_model_writes_itself() {
    let place = Place::new();
    place.model("float", &["--hidden", "64", "--ffn", "96", "--heads", "2", "--kv-heads", "2"]);
    let text = text(1300);
    let (first, second) = text.split_at(text.len() / 2);
    std::fs::write(place.path("plain.txt"), format!("{first}\n\n{second}")).unwrap();
    let lines = [
        serde_json::json!({"text": first, "source": "a book"}).to_string(),
        serde_json::json!({"messages": [{"role": "user", "content": second}]}).to_string(),
    ];
    std::fs::write(place.path("lines.jsonl"), lines.join("\n") + "\n\n").unwrap();
    let calibrate = |text: &str, out: &str, more: &[&str]| {
        let words = ["calibrate", "float", "--calib", text, "-o", out, "--calib-tokens", "1024"];
        place.run(&[&words[..], more].concat())
    };
    let stats = |out: &str| {
        let bytes = std::fs::read(place.path(out)).unwrap();
        // What the text is called is the only difference.
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        bytes[8 + header..].to_vec()
    };
    for text in ["plain.txt", "lines.jsonl", "self"] {
        calibrate(text, text.split('.').next().unwrap(), &[]).ok();
    }
    assert!(stats("plain") == stats("lines"));
    assert!(stats("plain") != stats("self"));
    calibrate("self", "again", &["--threads", "3"]).ok();
    assert!(stats("self") == stats("again"), "the same text on any number of threads");
    place.run(&["calibrate", "float", "-o", "unasked", "--calib-tokens", "1024"]).ok();
    assert!(stats("self") == stats("unasked"));
    let quantize = ["quantize", "float", "--no-eval", "-o"];
    place.run(&[&quantize[..], &["by-stats", "--stats", "self"]].concat()).ok();
    place.run(&[&quantize[..], &["by-self", "--calib-tokens", "1024", "--calib"]].concat()).ok();
    assert_eq!(place.run(&["diff", "by-stats", "by-self", "--json"]).json()["identical"], true);
    place
        .run(&[&quantize[..], &["by-blocks", "--calib", "self", "--calib-tokens", "1024", "--sequential"]].concat())
        .ok();
    for (line, why) in [("{\"title\": \"none\"}", "line 2: an object without `text`"), ("{\"text\"", "line 2")] {
        std::fs::write(place.path("bad.jsonl"), format!("{}\n{line}\n", lines[0])).unwrap();
        let refused = calibrate("bad.jsonl", "none", &[]);
        assert!(refused.error(1).contains(why), "{}", refused.stderr);
    }
    let refused = place.run(&["calibrate", "float", "--calib", "self", "-o", "none", "--calib-tokens", "5"]);
    assert!(refused.error(1).contains("0 sequences"), "{}", refused.stderr);
    assert!(!place.path("none").exists());
}
