//! `nibble doctor`: a line for each thing that nibble needs.

use crate::support::{Ended, Place, finish};
use serde_json::Value;
use std::process::Stdio;

/// The answer in an environment with these variables.
fn doctor(place: &Place, words: &[&str], environment: &[(&str, &str)]) -> Ended {
    let mut command = place.command(&[&["doctor"], words].concat());
    command.envs(environment.iter().copied()).stdout(Stdio::piped()).stderr(Stdio::piped());
    finish(command.spawn().unwrap())
}

fn finding<'a>(findings: &'a Value, check: &str) -> &'a Value {
    let list = findings.as_array().unwrap_or_else(|| panic!("{findings}"));
    list.iter().find(|finding| finding["check"] == check).unwrap_or_else(|| panic!("no {check} in {findings}"))
}

#[test]
fn everything_is_looked_at_and_each_has_a_line() {
    let place = Place::new();
    let ended = doctor(&place, &["--offline"], &[]);
    let lines: Vec<&str> = ended.ok().lines().collect();
    let checks = ["nibble", "CPU", "kernels", "limits", "memory", "GPU", "hub", "cache", "disk"];
    assert_eq!(lines.len(), checks.len(), "{lines:?}");
    for (line, check) in lines.iter().zip(checks) {
        assert_eq!(line.split_whitespace().nth(1), Some(check), "{line}");
    }
    let json = doctor(&place, &["--offline", "--json"], &[]).json();
    let kernels = finding(&json, "kernels");
    assert_eq!(kernels["state"], "ok", "{kernels}");
    assert!(kernels["found"].as_str().unwrap().ends_with(" products of known numbers are right"), "{kernels}");
}

#[test]
fn what_is_missing_comes_with_what_would_help() {
    let place = Place::new();
    let nowhere = [("HF_ENDPOINT", "http://127.0.0.1:1"), ("HF_HUB_CACHE", "/proc/nowhere"), ("NIBBLE_ISA", "scalar")];
    let json = doctor(&place, &["--json"], &nowhere).json();
    for (check, state, found, remedy) in [
        ("hub", "absent", "127.0.0.1:1", "HF_ENDPOINT"),
        ("cache", "scarce", "/proc", "HF_HUB_CACHE"),
        ("CPU", "scarce", "in use: scalar", ""),
    ] {
        let finding = finding(&json, check);
        assert_eq!(finding["state"], state, "{finding}");
        assert!(finding["found"].as_str().unwrap().contains(found), "{finding}");
        assert!(finding["remedy"].as_str().unwrap().contains(remedy), "{finding}");
    }
    let offline = doctor(&place, &["--json"], &[("HF_HUB_OFFLINE", "1")]).json();
    assert!(finding(&offline, "hub")["found"].as_str().unwrap().contains("HF_HUB_OFFLINE"), "{offline}");
}
