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
    for case in golden["cases"].as_array().unwrap() {
        let prompt = case["prompt"].as_str().unwrap();
        let words = ["generate", "smollm2", "-p", prompt, "-n", "40", "--temperature", "0", "--json"];
        let answer = place.run(&[&words[..], &["--activations", "f32", "--kv", "f32"]].concat()).json();
        assert_eq!(answer["text"], case["text"], "{prompt}");
        assert_eq!(answer["tokens"], case["ids"], "{prompt}");
    }
}
