//! Ends that no program can prepare for: SIGKILL at any moment, and files that can't grow.

use crate::assets::asset;
use crate::support::{Place, finish};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Runs, kills after ever other times, takes up again, and at last lets it finish. Says how often it was killed.
fn killed(place: &Place, words: &[&str], out: &str, kills: u64, longest: u64) -> u64 {
    let (words, mut count) = ([words, &["--resume", "--quiet"]].concat(), 0);
    for round in 0..kills {
        let mut command = place.command(&words);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        // Spread over the whole run, in an order that isn't time's: each later run finds more done.
        std::thread::sleep(Duration::from_millis(longest * (round * 7 % kills + 1) / kills));
        child.kill().unwrap();
        let ended = finish(child);
        if ended.code == 0 {
            break;
        }
        assert_eq!(ended.code, -1, "ended by itself: {}", ended.stderr);
        count += 1;
        // The name is given last: whatever has it is whole.
        if place.path(out).exists() {
            place.run(&["verify", out]).ok();
            break;
        }
    }
    if !place.path(out).exists() {
        place.run(&words).ok();
    }
    count
}

#[test]
fn a_conversion_that_was_killed_at_random_is_resumed_to_the_same_bytes() {
    let place = Place::new();
    let shape = ["--hidden", "256", "--ffn", "768", "--heads", "4", "--layers", "4"];
    place.model("float", &shape);
    let words = |out| ["quantize", "float", "-o", out, "-t", "2"];
    let started = std::time::Instant::now();
    place.run(&words("whole")).ok();
    let whole = started.elapsed().as_millis() as u64;
    let count = killed(&place, &words("out"), "out", 4, whole);
    assert!(count > 0, "{whole} ms, and never killed");
    assert!(place.files("out") == place.files("whole"), "killed {count} times");
    assert!(!place.names().iter().any(|name| name.contains("partial")), "{:?}", place.names());
}

#[test]
fn an_import_that_was_killed_is_resumed_to_the_same_bytes() {
    let Some(gguf) = asset("smollm2", "assets/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") else { return };
    let place = Place::new();
    let words = |out| ["import", gguf.to_str().unwrap(), "-o", out, "--dtype", "bf16"];
    let started = std::time::Instant::now();
    place.run(&words("whole")).ok();
    let whole = started.elapsed().as_millis() as u64;
    let count = killed(&place, &words("out"), "out", 2, whole);
    assert!(count > 0, "{whole} ms, and never killed");
    assert!(place.files("out") == place.files("whole"), "killed {count} times");
}

/// Runs in a shell that lets no file grow beyond so many kilobytes; writing further fails as on a full disk.
fn in_small_files(place: &Place, kilobytes: u64, words: &[&str]) -> crate::support::Ended {
    let mut command = Command::new("bash");
    // Without the trap the signal would end the process before it can say anything.
    command.args(["-c", &format!("trap '' XFSZ; ulimit -f {kilobytes}; exec \"$0\" \"$@\"")]);
    let program = place.command(words);
    command.arg(program.get_program()).args(program.get_args()).current_dir(place.path(""));
    finish(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

#[test]
fn weights_that_do_not_fit_leave_nothing_and_are_named() {
    let place = Place::new();
    place.model("float", &["--hidden", "256", "--ffn", "512"]);
    let before = place.names();
    let ended = in_small_files(&place, 16, &["quantize", "float", "-o", "out"]);
    assert!(ended.error(1).contains("model.safetensors"), "{}", ended.stderr);
    assert_eq!(place.names(), before, "nothing was done that could be kept");
}

#[test]
fn work_that_is_done_when_the_disk_is_full_is_kept_and_taken_up() {
    let place = Place::new();
    place.model("float", &[]);
    // The weights fit; the file that is copied after them doesn't.
    std::fs::write(place.path("float/LICENSE"), vec![b'x'; 4 << 20]).unwrap();
    let ended = in_small_files(&place, 3 << 10, &["quantize", "float", "-o", "out"]);
    assert!(ended.error(1).contains("LICENSE"), "{}", ended.stderr);
    assert!(!place.path("out").exists(), "nothing half-written has the final name");
    let partial = place.names().into_iter().find(|name| name.starts_with("out.partial-")).unwrap();
    assert!(ended.stderr.contains(&partial) && ended.stderr.contains("--resume"), "{}", ended.stderr);
    let resumed = place.run(&["quantize", "float", "-o", "out", "--resume", "--json"]).json();
    assert_eq!(resumed["resumed"], resumed["tensors"], "every tensor was done");
    place.run(&["quantize", "float", "-o", "whole"]).ok();
    assert!(place.files("out") == place.files("whole"));
}

#[test]
fn what_no_second_run_can_do_leaves_nothing() {
    let place = Place::new();
    place.model("float", &[]);
    let weights = place.path("float/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let at = json["model.norm.weight"]["data_offsets"][0].as_u64().unwrap() as usize;
    let value = &mut bytes[8 + header + at + 12..][..4];
    assert!(f32::from_le_bytes((&*value).try_into().unwrap()).is_finite());
    value.copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
    std::fs::write(&weights, bytes).unwrap();
    let before = place.names();
    let ended = place.run(&["quantize", "float", "-o", "out"]);
    let wanted = "`model.norm.weight`: value -inf at row 0, column 3";
    assert!(ended.error(1).contains(wanted), "{}", ended.stderr);
    assert_eq!(place.names(), before);
}
