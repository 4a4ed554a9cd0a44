//! Ctrl-C: nothing half done keeps a final name, and what was done can be taken up again.

use crate::support::{Ended, Place, finish};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub fn signal(child: &Child, name: &str) {
    let sent = Command::new("sh").arg("-c").arg(format!("kill -{name} {}", child.id())).status().unwrap();
    assert!(sent.success(), "kill -{name}");
}

/// Starts a conversion, interrupts it as soon as it has begun to write, and says how it ended: none if it was done
/// before.
fn interrupted(place: &Place, words: &[&str], out: &str) -> Option<Ended> {
    let mut command = place.command(words);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    let partial = format!("{out}.partial-");
    let begun = || {
        place.names().iter().any(|name| {
            // The journal's first line is its head; a second one is a finished tensor.
            let journal = std::fs::read_to_string(place.path(name).join(".journal")).unwrap_or_default();
            name.contains(&partial) && journal.lines().count() > 1
        })
    };
    while !begun() {
        if child.try_wait().unwrap().is_some() {
            return None;
        }
        assert!(started.elapsed() < Duration::from_secs(120), "the conversion never began");
        std::thread::sleep(Duration::from_millis(1));
    }
    signal(&child, "INT");
    let ended = finish(child);
    (ended.code != 0).then_some(ended)
}

#[test]
fn an_interrupted_conversion_leaves_no_output_and_is_resumed_to_the_same_bytes() {
    let place = Place::new();
    // A machine may be too fast for a small model: then a larger one.
    for layers in ["8", "32", "96"] {
        let (source, out, whole) = (format!("float-{layers}"), format!("out-{layers}"), format!("whole-{layers}"));
        place.model(&source, &["--hidden", "512", "--ffn", "1024", "--heads", "8", "--layers", layers]);
        let words = ["quantize", &source, "-o", &out, "-t", "1"];
        let Some(ended) = interrupted(&place, &words, &out) else { continue };
        assert!(ended.error(130).contains("stopped"), "{}", ended.stderr);
        assert!(!place.path(&out).exists(), "no half output under the final name");
        let resumed = place.run(&[&words[..], &["--resume", "--json"]].concat()).json();
        assert!(resumed["resumed"].as_u64().unwrap() >= 1, "{resumed}");
        place.run(&["quantize", &source, "-o", &whole]).ok();
        assert!(place.files(&out) == place.files(&whole), "resumed and uninterrupted runs write the same bytes");
        assert!(!place.names().iter().any(|name| name.contains("partial")), "{:?}", place.names());
        return;
    }
    panic!("no model was large enough to be interrupted");
}

#[test]
fn an_interrupted_answer_keeps_what_was_said() {
    let place = Place::new();
    place.model("float", &[]);
    let words = ["generate", "float", "-p", "x", "-n", "100000", "--ignore-eos", "--ctx", "100000"];
    let mut command = place.command(&words);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).unwrap();
    signal(&child, "INT");
    let ended = finish(child);
    assert!(ended.error(130).contains("stopped"), "{}", ended.stderr);
    assert!(ended.stdout.ends_with('\n'), "the terminal's next line begins at its left");
}

#[test]
fn a_second_interrupt_ends_the_process_at_once() {
    let place = Place::new();
    place.model("float", &[]);
    // Waiting for a message, nothing looks at the first one.
    let mut command = place.command(&["chat", "float"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    std::io::Write::write_all(&mut input, b"hello\n").unwrap();
    let mut first = [0];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).unwrap();
    // However the two fall relative to the answer's end, at most three end the process.
    for _ in 0..3 {
        signal(&child, "INT");
        std::thread::sleep(Duration::from_millis(300));
        if child.try_wait().unwrap().is_some() {
            break;
        }
    }
    drop(input);
    assert_eq!(finish(child).code, 130);
}
