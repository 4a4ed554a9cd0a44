//! Damaged files: an error that names them, never a panic.

use crate::support::{Ended, Place};

fn refused(place: &Place, words: &[&str], named: &str) {
    let ended = place.run(words);
    assert!(ended.error(1).contains(named), "{words:?} doesn't name {named}:\n{}", ended.stderr);
}

#[test]
fn a_changed_byte_is_found_by_verify() {
    let place = Place::new();
    place.model("float", &[]);
    place.run(&["quantize", "float", "-o", "out"]).ok();
    let whole = std::fs::read(place.path("out/model.safetensors")).unwrap();
    for at in [9, whole.len() / 2, whole.len() - 1] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        std::fs::write(place.path("out/model.safetensors"), &bytes).unwrap();
        refused(&place, &["verify", "out"], "model.safetensors");
    }
    std::fs::write(place.path("out/model.safetensors"), &whole).unwrap();
    place.run(&["verify", "out"]).ok();
    std::fs::write(place.path("out/config.json"), "{}").unwrap();
    refused(&place, &["verify", "out"], "config.json");
    std::fs::remove_file(place.path("out/config.json")).unwrap();
    refused(&place, &["verify", "out"], "config.json");
}

#[test]
fn truncated_weights_are_refused_by_every_command() {
    let place = Place::new();
    place.model("float", &[]);
    std::fs::write(place.path("text"), crate::support::text(200)).unwrap();
    let whole = std::fs::read(place.path("float/model.safetensors")).unwrap();
    for length in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(place.path("float/model.safetensors"), &whole[..length]).unwrap();
        for words in [
            &["quantize", "float", "-o", "out"][..],
            &["inspect", "float"],
            &["verify", "float"],
            &["generate", "float", "-p", "x"],
            &["bench", "float"],
            &["eval", "float", "--text", "text"],
            &["diff", "float", "float"],
        ] {
            refused(&place, words, "model.safetensors");
        }
    }
    assert!(!place.path("out").exists());
}

#[test]
fn values_that_are_not_finite_are_named_by_tensor() {
    let place = Place::new();
    place.model("float", &[]);
    let file = place.path("float/model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&file, &bytes).unwrap();
    // Whatever is last in the file: every tensor is looked at, also those that stay as they are.
    refused(&place, &["quantize", "float", "-o", "out"], "NaN");
    refused(&place, &["verify", "float"], "NaN");
    assert!(!place.path("out").exists(), "nothing under the final name");
}

#[test]
fn damaged_json_is_named() {
    let place = Place::new();
    place.model("float", &[]);
    for (name, bytes) in [
        ("config.json", &b"{\"model_type\": "[..]),
        ("config.json", b""),
        ("config.json", b"[]"),
        ("config.json", b"\xff\xfe"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 99999999999}}}"),
        ("generation_config.json", b"{\"temperature\": \"hot\"}"),
        ("tokenizer_config.json", b"nope"),
    ] {
        let path = place.path("float").join(name);
        let before = std::fs::read(&path).ok();
        std::fs::write(&path, bytes).unwrap();
        refused(&place, &["generate", "float", "-p", "x", "-n", "1"], name);
        match before {
            Some(before) => std::fs::write(&path, before).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
    }
    place.run(&["generate", "float", "-p", "x", "-n", "1"]).ok();
}

#[test]
fn a_broken_template_is_named_and_no_template_said() {
    let place = Place::new();
    place.model("float", &[]);
    std::fs::write(place.path("float/chat_template.jinja"), "{% for %}").unwrap();
    refused(&place, &["chat", "float"], "chat_template.jinja");
    std::fs::remove_file(place.path("float/chat_template.jinja")).unwrap();
    std::fs::write(place.path("float/tokenizer_config.json"), "{}").unwrap();
    refused(&place, &["generate", "float", "--chat", "-p", "x"], "chat template");
    place.run(&["generate", "float", "-p", "x", "-n", "1"]).ok();
}

#[test]
fn files_that_are_no_checkpoints_are_refused() {
    let place = Place::new();
    std::fs::write(place.path("notes.txt"), "hello").unwrap();
    std::fs::write(place.path("half.gguf"), b"GGUF\x03\0\0\0").unwrap();
    std::fs::write(place.path("empty.gguf"), b"").unwrap();
    for name in ["notes.txt", "half.gguf", "empty.gguf"] {
        for command in ["inspect", "verify"] {
            refused(&place, &[command, name], name);
        }
        refused(&place, &["import", name, "-o", "out"], name);
        refused(&place, &["quantize", name, "-o", "out"], name);
    }
    assert!(!place.path("out").exists());
}

#[test]
fn a_damaged_recipe_is_named() {
    let place = Place::new();
    place.model("float", &[]);
    for (text, named) in [("rules = 7", "recipe.toml"), ("[[[", "recipe.toml"), ("unknown = 1", "unknown")] {
        std::fs::write(place.path("recipe.toml"), text).unwrap();
        let ended: Ended = place.run(&["quantize", "float", "-o", "out", "--recipe", "recipe.toml"]);
        assert!(ended.code == 1 || ended.code == 2, "{text}: {}", ended.stderr);
        assert!(ended.stderr.starts_with("error: ") && ended.stderr.contains(named), "{text}: {}", ended.stderr);
    }
}
