//! The files beside the weights: configuration, tokenizer, templates, licence. They are carried over byte for byte.

use super::Sidecar;
use crate::error::Result;
use crate::format::{damaged, io_error};
use crate::manifest::MANIFEST;
use std::path::Path;

/// Weights in whatever form: not carried over, they are what is converted (or another copy of it).
const WEIGHT_ENDINGS: &[&str] = &[
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".h5",
    ".msgpack",
    ".ot",
    ".npz",
];
/// Folders in checkpoints are flat; more depth than this is a loop or a mistake.
const MAX_DEPTH: usize = 8;

/// All sidecar files of a checkpoint folder (none for a file), with their relative paths, sorted. Hidden files stay
/// behind, links are followed to files only.
///
/// # Errors
/// If a folder can't be read.
pub fn sidecars(path: &Path) -> Result<Vec<Sidecar>> {
    let mut found = Vec::new();
    if path.is_dir() {
        walk(path, Path::new(""), 0, &mut found)?;
    }
    found.sort();
    Ok(found)
}

fn walk(root: &Path, relative: &Path, depth: usize, found: &mut Vec<Sidecar>) -> Result<()> {
    let dir = root.join(relative);
    if depth > MAX_DEPTH {
        return Err(damaged(&dir, format!("folders nested more than {MAX_DEPTH} deep")));
    }
    for entry in std::fs::read_dir(&dir).map_err(io_error(&dir))? {
        let entry = entry.map_err(io_error(&dir))?;
        let name = entry.file_name();
        let text = name.to_string_lossy();
        if text.starts_with('.') || WEIGHT_ENDINGS.iter().any(|e| text.ends_with(e)) {
            continue;
        }
        let inside = relative.join(&name);
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            walk(root, &inside, depth + 1, found)?;
        } else if entry.path().is_file() && inside != Path::new(MANIFEST) {
            found.push((entry.path(), inside));
        }
    }
    Ok(())
}
