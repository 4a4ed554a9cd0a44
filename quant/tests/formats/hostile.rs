//! Damaged files: an error that names the file or a tensor, or data that decodes; never a panic.

use crate::native;
use crate::support::*;
use nibble_quant::QuantError;
use nibble_quant::convert::{Silent, verify};
use nibble_quant::format::{self, Dtype};
use rand::Rng;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// Reads everything there is to read.
fn read_all(path: &Path) -> Result<usize, QuantError> {
    let source = format::open(path)?;
    let mut values = Vec::new();
    for info in source.infos() {
        // Values of a type that isn't a number are an error that names the tensor; others must decode.
        match source.read_f32(&info.name, &mut values) {
            Ok(()) => assert_eq!(values.len(), info.elements(), "{}", info.name),
            Err(why) => assert!(why.to_string().contains(&info.name), "{why}"),
        }
        if let Err(why) = source.quantized(&info.name) {
            assert!(why.to_string().contains(&info.name), "{why}");
        }
    }
    Ok(source.infos().len())
}

fn survives(what: &str, path: &Path) -> Result<usize, String> {
    let result = catch_unwind(AssertUnwindSafe(|| read_all(path)));
    let result = result.unwrap_or_else(|_| panic!("{what}: panicked"));
    result.map_err(|why| why.to_string())
}

struct Case {
    dir: tempfile::TempDir,
    /// What is opened.
    open: PathBuf,
    /// The file that is damaged.
    file: PathBuf,
    good: Vec<u8>,
    /// Bytes before the tensors' data, in which damage is interesting.
    head: usize,
}

fn cases() -> Vec<(&'static str, Case)> {
    let case = |dir: tempfile::TempDir, open: &str, file: &str, head: usize| {
        let (open, file) = (dir.path().join(open), dir.path().join(file));
        let good = fs::read(&file).unwrap();
        let head = if head == 0 { 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize } else { head };
        Case { dir, open, file, good, head }
    };
    let gguf = tempfile::tempdir().unwrap();
    let array = [&8u32.to_le_bytes()[..], &2u64.to_le_bytes(), &string("a"), &string("bc")].concat();
    let bytes = Gguf::new()
        .str("general.architecture", "llama")
        .raw("tokens", 9, &array)
        .u32("n", 7)
        .tensor("a.weight", &[32, 2], 2, vec![1; 36])
        .tensor("b.weight", &[4], 0, f32_bytes(&[1.0; 4]))
        .bytes();
    fs::write(gguf.path().join("m.gguf"), &bytes).unwrap();
    let single = tempfile::tempdir().unwrap();
    save(&single.path().join("m.safetensors"), &[f32_tensor("a", &[3, 4], 1), f32_tensor("b", &[2], 2)]);
    let sharded = tempfile::tempdir().unwrap();
    save(&sharded.path().join("1.safetensors"), &[f32_tensor("a", &[3, 4], 1)]);
    save(&sharded.path().join("2.safetensors"), &[("b".into(), Dtype::BF16, vec![2], vec![0; 4])]);
    let text = index(&[("a", "1.safetensors"), ("b", "2.safetensors")]);
    fs::write(sharded.path().join("model.safetensors.index.json"), &text).unwrap();
    let own = tempfile::tempdir().unwrap();
    let specs = native::specs();
    let picks = [2, 12, 14, 15, 16].map(|i| (format!("t{i}"), native::random(&specs[i], [3, 77], i as u64)));
    native::write(own.path(), &picks);
    vec![
        ("gguf", case(gguf, "m.gguf", "m.gguf", bytes.len() - 80)),
        ("safetensors", case(single, "m.safetensors", "m.safetensors", 0)),
        ("index", case(sharded, "", "model.safetensors.index.json", text.len())),
        ("native", case(own, "m", "m/model.safetensors", 0)),
    ]
}

#[test]
fn a_file_cut_short_anywhere_is_refused() {
    for (name, case) in cases() {
        assert!(survives(name, &case.open).is_ok(), "{name}");
        let step = (case.good.len() / 400).max(1);
        for len in (0..case.head.min(case.good.len())).step_by(step).chain([case.good.len() - 1]) {
            fs::write(&case.file, &case.good[..len]).unwrap();
            let why = survives(&format!("{name} cut to {len}"), &case.open).expect_err("accepted");
            assert!(why.contains(case.dir.path().to_str().unwrap()), "{name} cut to {len}: {why}");
        }
    }
}

#[test]
fn flipped_bits_and_changed_bytes_never_panic() {
    let hook = std::panic::take_hook();
    let mut refused = 0;
    for (name, case) in cases() {
        let mut rng = rng(7);
        for round in 0..400 {
            let mut bytes = case.good.clone();
            for _ in 0..rng.random_range(1..4) {
                // Mostly in the head, where lengths, names and offsets are.
                let end = if rng.random_range(0..4) == 0 { bytes.len() } else { case.head };
                let at = rng.random_range(0..end);
                match rng.random_range(0..3) {
                    0 => bytes[at] ^= 1 << rng.random_range(0..8),
                    1 => bytes[at] = rng.random(),
                    _ => bytes[at] = *b"0129{}[]\",:-e".get(rng.random_range(0..13)).unwrap(),
                }
            }
            fs::write(&case.file, &bytes).unwrap();
            refused += survives(&format!("{name} round {round}"), &case.open).is_err() as usize;
        }
    }
    std::panic::set_hook(hook);
    assert!(refused > 400, "damage must be noticed most of the time, was {refused} of 1600");
}

#[test]
fn things_that_are_no_checkpoints_are_told_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let folder = |files: &[&str]| {
        let path = tempfile::tempdir_in(dir.path()).unwrap().keep();
        files.iter().for_each(|f| fs::write(path.join(f), b"x").unwrap());
        path
    };
    for (path, wanted) in [
        (dir.path().join("absent"), "No such file"),
        (folder(&[]), "without weights"),
        (folder(&["config.json"]), "without weights"),
        (folder(&["pytorch_model.bin"]), "PyTorch"),
        (folder(&["m.gguf"]), "`m.gguf`: name the file"),
        (folder(&["model.onnx"]).join("model.onnx"), "an ONNX graph, wanted one of gguf, native, safetensors"),
        (folder(&["notes.txt"]).join("notes.txt"), "no checkpoint"),
    ] {
        let why = verify(&path, &Silent, None).unwrap_err().to_string();
        assert!(why.contains(wanted), "{why}, wanted {wanted}");
    }
}
