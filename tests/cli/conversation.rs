//! `nibble chat` with piped stdin, and prompts through the chat template.

use crate::support::Place;
use serde_json::Value;

fn answers(stdout: &str) -> Vec<Value> {
    stdout.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

#[test]
fn a_second_turn_computes_only_its_own_tokens() {
    let place = Place::new();
    place.model("float", &[]);
    let chat = ["chat", "float", "-n", "12", "--ignore-eos", "--json"];
    let ended = place.run_with(&chat, "hello there\nand again\n");
    ended.ok();
    let answers = answers(&ended.stdout);
    assert_eq!(answers.len(), 2);
    // <|im_start|> "user" \n "hello there" <|im_end|> \n, <|im_start|> "assistant" \n: a token a byte.
    let first = 1 + 4 + 1 + 11 + 1 + 1 + 1 + 9 + 1;
    assert_eq!(answers[0]["prompt_tokens"], first);
    // The cache may hold other bytes than the answer's text gives back, if the answer is no valid text or is trimmed; but
    // the prompt of the first turn is never computed again.
    let whole = 12 + 1 + 1 + (1 + 4 + 1 + 9 + 1 + 1) + (1 + 9 + 1);
    assert!(answers[1]["prompt_tokens"].as_u64().unwrap() <= whole * 3, "{}", answers[1]);
    assert!(answers[1]["prompt_tokens"].as_u64().unwrap() >= 1 + 4 + 1 + 9);
}

#[test]
fn a_conversation_begins_again_after_clear() {
    let place = Place::new();
    place.model("float", &[]);
    let chat = ["chat", "float", "-n", "8", "--ignore-eos", "--json"];
    let ended = place.run_with(&chat, "hello\nmore\n/clear\nhello\n/exit\nnever read\n");
    let answers = answers(ended.ok());
    assert_eq!(answers.len(), 3);
    assert_eq!(answers[0]["text"], answers[2]["text"], "the same question in the same state");
    let generated = place.run(&["generate", "float", "--chat", "-p", "hello", "-n", "8", "--ignore-eos", "--json"]);
    assert_eq!(generated.json()["text"], answers[0]["text"], "generate --chat asks as chat does");
}

#[test]
fn a_system_message_is_part_of_the_prompt() {
    let place = Place::new();
    place.model("float", &[]);
    let ended = place.run_with(&["chat", "float", "-n", "2", "--json"], "hi\n/system be kind\nhi\n");
    let answers = answers(ended.ok());
    let added = 1 + 6 + 1 + 7 + 1 + 1;
    let prompt = |i: usize| answers[i]["prompt_tokens"].as_u64().unwrap();
    // Both conversations begin with the same token, which the cache still holds.
    assert_eq!(prompt(1), prompt(0) + added - 1);
}

#[test]
fn the_oldest_turns_are_forgotten_when_the_context_is_full() {
    let place = Place::new();
    place.model("float", &[]);
    let input: String = (0..12).map(|i| format!("message number {i} of some length\n")).collect();
    let ended = place.run_with(&["chat", "float", "-n", "8", "--ctx", "160", "--ignore-eos", "--json"], &input);
    assert_eq!(answers(ended.ok()).len(), 12, "{}", ended.stderr);
    let long = "x".repeat(200) + "\nshort\n";
    let ended = place.run_with(&["chat", "float", "-n", "8", "--ctx", "160", "--ignore-eos", "--json"], &long);
    assert_eq!(answers(ended.ok()).len(), 1, "a message that can't fit is refused, the next one answered");
    assert!(ended.stderr.contains("longer than the context"), "{}", ended.stderr);
}

#[test]
fn unknown_commands_are_no_messages() {
    let place = Place::new();
    place.model("float", &[]);
    let ended = place.run_with(&["chat", "float", "-n", "2", "--json"], "/nonsense\n/help\n/retry\n\n");
    assert_eq!(ended.ok(), "");
    assert!(ended.stderr.contains("/nonsense is unknown") && ended.stderr.contains("/clear"), "{}", ended.stderr);
}

#[test]
fn retry_answers_again_with_another_seed() {
    let place = Place::new();
    place.model("float", &[]);
    let chat = ["chat", "float", "-n", "16", "--ignore-eos", "--temperature", "2", "--json"];
    let ended = place.run_with(&chat, "hello\n/retry\n");
    let answers = answers(ended.ok());
    assert_ne!(answers[0]["tokens"], answers[1]["tokens"]);
    assert_eq!(answers[1]["prompt_tokens"], 1, "the whole prompt is held; only its last token is run again");
}

#[test]
fn text_ends_before_a_stop_string() {
    let place = Place::new();
    place.model("float", &[]);
    let whole = place.run(&["generate", "float", "-p", "ab", "-n", "40", "--ignore-eos", "--json"]).json();
    let text = whole["text"].as_str().unwrap();
    let stop: String = text.chars().skip(5).take(2).collect();
    assert_eq!(stop.chars().count(), 2, "an answer of some length: {text:?}");
    let at = text.find(&stop).unwrap();
    // A backslash in a stop string begins an escape.
    let typed = stop.replace('\\', "\\\\");
    let words = ["generate", "float", "-p", "ab", "-n", "40", "--ignore-eos", "--json", "--stop", &typed];
    let cut = place.run(&words).json();
    assert_eq!(cut["text"], text[..at]);
    assert_eq!(cut["finish"], "stop");
}

#[test]
fn a_prompt_comes_from_a_file_or_stdin() {
    let place = Place::new();
    place.model("float", &[]);
    std::fs::write(place.path("prompt"), "a prompt").unwrap();
    let tail = ["-n", "6", "--ignore-eos"];
    let typed = place.run(&[&["generate", "float", "-p", "a prompt"][..], &tail].concat());
    let file = place.run(&[&["generate", "float", "-f", "prompt"][..], &tail].concat());
    let piped = place.run_with(&[&["generate", "float", "-f", "-"][..], &tail].concat(), "a prompt");
    assert_eq!(typed.ok(), file.ok());
    assert_eq!(typed.ok(), piped.ok());
}

#[test]
fn every_kind_of_cache_and_activations_answers() {
    let place = Place::new();
    place.model("float", &[]);
    place.run(&["quantize", "float", "-o", "int8", "--scheme", "int8-g32"]).ok();
    for kv in ["f16", "int8", "f32"] {
        for activations in ["int8", "f32"] {
            let words = ["generate", "int8", "-p", "x", "-n", "4", "--ignore-eos", "--kv", kv];
            let ended = place.run(&[&words[..], &["--activations", activations, "--json"]].concat());
            assert_eq!(ended.json()["completion_tokens"], 4, "{kv} {activations}");
        }
    }
}
