//! Conversions that go through a model block by block, and diagnoses of what came out, on tiny models.

use crate::support::{Place, text};
use serde_json::Value;

fn place() -> Place {
    let place = Place::new();
    place.model("float", &["--hidden", "64", "--ffn", "96", "--heads", "2", "--kv-heads", "2"]);
    std::fs::write(place.path("text"), text(1300)).unwrap();
    place
}

#[test]
fn rounding_is_learned_and_leaves_nothing_beside_the_output() {
    let place = place();
    let words = ["quantize", "float", "-o", "out", "--calib", "text", "--no-eval", "--algorithm", "autoround"];
    let made = place.run(&[&words[..], &["--learn-steps", "8", "--save-recipe", "recipe.toml"]].concat());
    made.ok();
    assert!(made.stderr.contains("learning leaves"), "{}", made.stderr);
    place.run(&["verify", "out"]).ok();
    assert!(!place.path("out.blocks").exists());
    let stored = &place.run(&["inspect", "out", "--json"]).json()["tensors"];
    let learned = stored.as_array().unwrap().iter().filter(|t| !t["spec"].is_null()).count();
    assert!(learned > 14, "every linear layer, embedding and head: {stored}");
    // The recipe names the levels that were learned: made again by it, with the same text, they are the same.
    let again = ["quantize", "float", "-o", "again", "--calib", "text", "--no-eval", "--recipe", "recipe.toml"];
    place.run(&[&again[..], &["--learn-steps", "8"]].concat()).ok();
    let weights = |of: &str| {
        let files = place.files(of).into_iter();
        files.filter(|(name, _)| name.ends_with(".safetensors")).collect::<Vec<_>>()
    };
    assert!(weights("out") == weights("again"));

    let other = ["quantize", "float", "-o", "other", "--calib", "text", "--no-eval", "--sequential"];
    place.run(&other).ok();
    place.run(&["verify", "other"]).ok();
    assert!(weights("other") != weights("out"));
    let judged =
        ["quantize", "float", "-o", "none", "--calib", "text", "--sequential", "--eval", "text", "--max-kl", "1e-9"];
    assert!(place.run(&judged).error(1).contains("mean KL divergence"));
    assert!(!place.path("none.blocks").exists());
    let refused = place.run(&["quantize", "float", "-o", "none", "--algorithm", "autoround"]);
    assert!(refused.error(1).contains("--calib"), "{}", refused.stderr);
    let refused = place.run(&["quantize", "float", "-o", "none", "--sequential"]);
    assert!(refused.error(2).contains("--calib"), "{}", refused.stderr);
    let refused = place.run(&["quantize", "float", "-o", "none", "--algorithm", "magic"]);
    assert!(refused.error(2).contains("autoround"), "{}", refused.stderr);
    assert!(!place.path("none").exists());
}

#[test]
fn a_diagnosis_names_the_layer_that_is_quantized() {
    const GUILTY: &str = "model.layers.1.mlp.down_proj.weight";
    let place = place();
    let rules = format!("[[rule]]\npattern = \"{GUILTY}\"\nscheme = \"int3-g32-dq\"\n[[rule]]\nkeep = \"original\"\n");
    std::fs::write(place.path("one.toml"), rules).unwrap();
    place.run(&["quantize", "float", "-o", "out", "--recipe", "one.toml"]).ok();
    let words = ["diagnose", "out", "--reference", "float", "--text", "text", "--ctx", "64", "--activations", "f32"];
    let words = [&words[..], &["--state", "state.json", "-o", "all.json", "--report", "page.html"]].concat();
    let said = place.run(&words);
    let first = said.ok().lines().find(|line| line.contains("model.layers.")).unwrap();
    assert!(first.contains(GUILTY), "{}", said.stdout);
    let all: Value = serde_json::from_str(&std::fs::read_to_string(place.path("all.json")).unwrap()).unwrap();
    assert_eq!(all["layers"].as_array().unwrap().len(), 14);
    assert_eq!(all["weights"].as_array().unwrap().len(), 1);
    let page = std::fs::read_to_string(place.path("page.html")).unwrap();
    for part in [GUILTY, "Where the error comes from", "nibble diagnose out", "input of"] {
        assert!(page.contains(part), "{part}");
    }
    assert!(!page.contains("://"), "nothing is fetched");
    assert!(place.run(&words).error(1).contains("is there already"));
    let again = place.run(&[&words[..], &["--force", "--json"]].concat()).json();
    for part in ["sources", "layers"] {
        assert_eq!(again[part], all[part], "what the state holds is what was found");
    }
}
