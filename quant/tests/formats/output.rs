//! An output folder appears whole or not at all.

use crate::support::*;
use nibble_quant::format::{Done, OutputDir, OutputOptions};
use std::fs;
use std::path::Path;

const A: &str = "aaaaaaaaaaaaaaaa";
const B: &str = "bbbbbbbbbbbbbbbb";
const PLAIN: OutputOptions = OutputOptions { force: false, resume: false };
const FORCE: OutputOptions = OutputOptions { force: true, resume: false };
const RESUME: OutputOptions = OutputOptions { force: false, resume: true };

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn done(name: &str) -> Done {
    Done { name: name.into(), sha256: "00".into(), note: serde_json::json!({ "x": 1 }) }
}

#[test]
fn the_target_appears_only_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("out");
    let out = OutputDir::create(&target, &[], A, PLAIN).unwrap();
    out.write(Path::new("sub/file"), b"x").unwrap();
    assert!(!target.exists());
    let committed = out.commit(|partial| {
        assert_eq!(fs::read(partial.join("sub/file")).unwrap(), b"x");
        assert!(!target.exists());
        Ok(())
    });
    assert_eq!(committed.unwrap(), target.canonicalize().unwrap());
    assert_eq!(names(dir.path()), ["out"]);
    assert_eq!(names(&target), ["sub"]);
}

#[test]
fn a_failed_verification_leaves_no_target_and_keeps_an_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("out");
    let fail = |_: &Path| Err(nibble_quant::QuantError::Stopped);
    let out = OutputDir::create(&target, &[], A, PLAIN).unwrap();
    assert!(out.commit(fail).is_err());
    assert!(!target.exists());
    drop(out);
    fs::create_dir(&target).unwrap();
    fs::write(target.join("config.json"), b"old").unwrap();
    let out = OutputDir::create(&target, &[], A, FORCE).unwrap();
    assert!(out.commit(fail).is_err());
    assert_eq!(fs::read(target.join("config.json")).unwrap(), b"old");
}

#[test]
fn an_existing_target_makes_way_only_by_force_and_only_if_it_is_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("out");
    fs::create_dir(&target).unwrap();
    fs::write(target.join("precious.txt"), b"p").unwrap();
    let why = |options| OutputDir::create(&target, &[], A, options).unwrap_err().to_string();
    assert!(why(PLAIN).contains("exists already"));
    assert!(why(FORCE).contains("doesn't look like a checkpoint"));
    fs::write(target.join("config.json"), b"{}").unwrap();
    assert!(why(PLAIN).contains("exists already"));
    let out = OutputDir::create(&target, &[], A, FORCE).unwrap();
    out.write(Path::new("new"), b"n").unwrap();
    assert_eq!(names(&target), ["config.json", "precious.txt"]);
    out.commit(|_| Ok(())).unwrap();
    assert_eq!(names(&target), ["new"]);
    assert_eq!(names(dir.path()), ["out"]);
    let file = dir.path().join("file");
    fs::write(&file, b"").unwrap();
    assert!(OutputDir::create(&file, &[], A, FORCE).unwrap_err().to_string().contains("isn't a folder"));
}

#[test]
fn an_output_that_overlaps_an_input_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in");
    fs::create_dir_all(input.join("deep")).unwrap();
    fs::write(input.join("config.json"), b"{}").unwrap();
    fs::write(input.join("w.safetensors"), b"").unwrap();
    std::os::unix::fs::symlink(&input, dir.path().join("link")).unwrap();
    fs::write(dir.path().join("config.json"), b"{}").unwrap();
    let file = input.join("w.safetensors");
    for (target, input, wanted) in [
        (input.clone(), &input, "the same"),
        (dir.path().join("link"), &input, "the same"),
        (dir.path().join("deep/../in"), &input, "the same"),
        (input.join("deep/out"), &input, "inside of the input"),
        (dir.path().join("link/out"), &input, "inside of the input"),
        (dir.path().to_owned(), &input, "holds the input"),
        (input.clone(), &file, "holds the input"),
        (file.clone(), &file, "the same"),
    ] {
        fs::create_dir_all(dir.path().join("deep")).unwrap();
        let why = OutputDir::create(&target, &[input], A, FORCE).unwrap_err().to_string();
        assert!(why.contains(wanted), "{}: {why}, wanted {wanted}", target.display());
    }
    assert_eq!(names(&input), ["config.json", "deep", "w.safetensors"]);
    OutputDir::create(&dir.path().join("other"), &[&input], A, PLAIN).unwrap();
}

#[test]
fn a_killed_run_is_taken_up_only_with_its_own_fingerprint() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("out");
    let out = OutputDir::create(&target, &[], A, PLAIN).unwrap();
    out.write(Path::new("half"), b"1").unwrap();
    out.note(&done("t1")).unwrap();
    out.note(&done("t2")).unwrap();
    let partial = out.partial().to_owned();
    let why = OutputDir::create(&target, &[], A, RESUME).unwrap_err().to_string();
    assert!(why.contains("another process"), "{why}");
    assert!(partial.join("half").exists());
    drop(out);
    // A line cut off in the middle, as after a kill.
    let journal = partial.join(".journal");
    let text = fs::read(&journal).unwrap();
    fs::write(&journal, &text[..text.len() - 4]).unwrap();
    let out = OutputDir::create(&target, &[], A, RESUME).unwrap();
    assert_eq!(out.done("t1"), Some(&done("t1")));
    assert_eq!(out.done("t2"), None);
    assert!(partial.join("half").exists());
    out.note(&done("t2")).unwrap();
    drop(out);
    let other = OutputDir::create(&target, &[], B, RESUME).unwrap();
    assert!(!other.resumed());
    drop(other);
    let out = OutputDir::create(&target, &[], A, RESUME).unwrap();
    assert_eq!(out.done("t2"), Some(&done("t2")), "a note after a torn line must be found again");
    drop(out);
    let fresh = OutputDir::create(&target, &[], A, PLAIN).unwrap();
    assert!(!fresh.resumed());
    assert!(!partial.join("half").exists());
}

#[test]
fn more_than_the_disk_holds_is_refused_before_writing() {
    let dir = tempfile::tempdir().unwrap();
    let out = OutputDir::create(&dir.path().join("out"), &[], A, PLAIN).unwrap();
    out.check_space(1000).unwrap();
    let why = out.check_space(1 << 60).unwrap_err().to_string();
    assert!(why.contains("bytes are needed, the disk has"), "{why}");
}

#[test]
fn paths_that_leave_the_folder_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = OutputDir::create(&dir.path().join("out"), &[], A, PLAIN).unwrap();
    for path in ["../x", "/tmp/x", "a/../../x"] {
        assert!(out.write(Path::new(path), b"").is_err(), "{path}");
    }
    save(&dir.path().join("f"), &[f32_tensor("a", &[1], 1)]);
    out.copy(&dir.path().join("f"), Path::new("a/b")).unwrap();
    assert_eq!(fs::read(out.partial().join("a/b")).unwrap(), fs::read(dir.path().join("f")).unwrap());
}
