//! Real models and texts for tests: found in the cache, fetched by the scripts, or said to be missing.
//!
//! A test that needs one asks here first and returns when it gets `None`. The absence is printed and written to the file
//! that `NIBBLE_MISSING` names, so that scripts/test.sh counts what did not run instead of passing it over.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The repository's root folder.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// The cache folder of the scripts: `NIBBLE_CACHE`, else `.cache` in the repository.
pub fn cache() -> PathBuf {
    std::env::var_os("NIBBLE_CACHE").map_or_else(|| repository().join(".cache"), PathBuf::from)
}

/// The path of one fetched file, such as `asset("texts", "texts/eval.txt")`: `name` is what scripts/fetch_assets.sh calls
/// it and `path` lies in the cache folder. `None` when it is not there and can't be fetched.
pub fn asset(name: &str, path: &str) -> Option<PathBuf> {
    let file = cache().join(path);
    if !file.exists() {
        let fetched = Command::new("bash").arg(repository().join("scripts/fetch_assets.sh")).arg(name).status();
        if !fetched.is_ok_and(|status| status.success()) || !file.exists() {
            return missing(&format!("{name}: {path}"));
        }
    }
    Some(file)
}

/// The shared library of the oracles' onnxruntime.
#[cfg(feature = "ort")]
pub fn onnx_runtime() -> Option<PathBuf> {
    let Some(folder) = std::env::var_os("NIBBLE_ORACLES") else { return missing("oracles: NIBBLE_ORACLES is not set") };
    let folder = PathBuf::from(folder).join("onnxruntime/capi");
    let files = std::fs::read_dir(&folder).into_iter().flatten().flatten().map(|e| e.path());
    let name = |p: &PathBuf| p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let mut libraries: Vec<PathBuf> = files.filter(|p| name(p).starts_with("libonnxruntime.so")).collect();
    libraries.sort();
    libraries.pop().or_else(|| missing("onnxruntime's wheel has no libonnxruntime.so"))
}

/// Says that a test doesn't run what it is for, and counts it.
pub fn missing<T>(what: &str) -> Option<T> {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    eprintln!("MISSING for {test}: {what}");
    if let Some(log) = std::env::var_os("NIBBLE_MISSING") {
        let line = format!("{test}: {what}\n");
        let file = std::fs::OpenOptions::new().create(true).append(true).open(log);
        file.and_then(|mut f| f.write_all(line.as_bytes())).expect("the missing-assets log is writable");
    }
    None
}
