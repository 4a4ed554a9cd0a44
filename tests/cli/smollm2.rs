//! The real SmolLM2 through the whole program, against what it says elsewhere.

use crate::assets::asset;
use crate::support::Place;
use serde_json::Value;

/// Two greedy continuations in single precision, by scripts/goldens/greedy.py.
const GOLDEN: &str = include_str!("../goldens/smollm2_greedy.json");

#[test]
fn smollm2_writes_the_golden_text() {
    let Some(gguf) = asset("smollm2", "assets/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") else { return };
    let place = Place::new();
    place.run(&["import", gguf.to_str().unwrap(), "-o", "smollm2"]).ok();
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    // The file itself runs in its own 4 bits, which stand for the same values.
    let models = ["smollm2", gguf.to_str().unwrap()];
    for (case, model) in golden["cases"].as_array().unwrap().iter().zip(models) {
        let prompt = case["prompt"].as_str().unwrap();
        let words = ["generate", model, "-p", prompt, "-n", "40", "--temperature", "0", "--json"];
        let answer = place.run(&[&words[..], &["--activations", "f32", "--kv", "f32"]].concat()).json();
        assert_eq!(answer["text"], case["text"], "{prompt}");
        assert_eq!(answer["tokens"], case["ids"], "{prompt}");
    }
    // What a GGUF file holds under its own names is what was imported under Hugging Face's.
    let difference = place.run(&["diff", models[1], models[0], "--json"]).json();
    assert_eq!(difference["identical"], true);
    // One step or two, the same weights; and what is beside them.
    for (source, out) in [(models[0], "two"), (models[1], "one")] {
        place.run(&["quantize", source, "-o", out, "--scheme", "int4-g32"]).ok();
    }
    for file in
        ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    {
        let read = |dir: &str| std::fs::read(place.path(dir).join(file)).unwrap();
        assert!(read("one") == read("two"), "{file}");
    }
}
