//! What scripts/test.sh fetched is what the tests take it for.

use crate::assets::{asset, missing};
use std::path::Path;
use std::process::Command;

/// A Python that imports the pinned oracles of scripts/requirements.txt, or `None` where they are not installed.
pub fn oracle() -> Option<Command> {
    let Some(folder) = std::env::var_os("NIBBLE_ORACLES") else {
        return missing("oracles: NIBBLE_ORACLES is not set (scripts/test.sh sets it)");
    };
    let mut python = Command::new("python3");
    python.env("PYTHONPATH", folder);
    Some(python)
}

#[test]
fn the_evaluation_and_calibration_texts_are_different_works_of_plain_english() {
    let (Some(eval), Some(calib)) = (asset("texts", "texts/eval.txt"), asset("texts", "texts/calib.txt")) else {
        return;
    };
    let words = |path: &Path| {
        let text = std::fs::read_to_string(path).expect("a fetched text is UTF-8");
        text.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let (eval, calib) = (words(&eval), words(&calib));
    assert!(eval.len() > 35_000 && calib.len() > 35_000, "{} and {} words", eval.len(), calib.len());
    let phrases = |words: &[String]| words.windows(8).map(|w| w.join(" ")).collect::<std::collections::HashSet<_>>();
    let shared = phrases(&eval).intersection(&phrases(&calib)).count();
    assert_eq!(shared, 0, "eight words in a row that both texts have");
}

#[test]
fn the_oracles_import() {
    let Some(mut python) = oracle() else { return };
    let imports = "import gguf, numpy, onnx, onnxruntime, safetensors, tokenizers";
    assert!(python.args(["-c", imports]).status().expect("python3 starts").success());
}
