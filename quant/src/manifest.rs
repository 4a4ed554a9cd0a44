//! `manifest.json`: what a checkpoint folder should hold, so that `verify` can tell.

use crate::QuantError;
use crate::error::Result;
use crate::format::{MappedFile, damaged, io_error};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Component, Path};

/// The manifest's file name.
pub const MANIFEST: &str = "manifest.json";
const MAX_MANIFEST: u64 = 256 << 20;

/// The whole manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this layout: 1.
    pub manifest: u32,
    /// Version of nibble that wrote the folder.
    pub nibble: String,
    /// `quantize` or `import`.
    pub made_by: String,
    /// Where the weights came from.
    pub source: SourceRecord,
    /// The recipe as TOML; empty for an import.
    pub recipe: String,
    /// Seed of whatever is random.
    pub seed: u64,
    /// Relative path -> size and hash of every file but this one.
    pub files: BTreeMap<String, FileRecord>,
    /// Every tensor, in file order.
    pub tensors: Vec<TensorRecord>,
}

/// Where weights came from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceRecord {
    /// Name of the folder or file, without its path.
    pub name: String,
    /// sha256 over names, sizes and headers of its weight files.
    pub fingerprint: String,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its length in bytes.
    pub bytes: u64,
    /// sha256 of its contents, in hex.
    pub sha256: String,
}

/// One tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorRecord {
    /// Its name.
    pub name: String,
    /// Its dimensions, the slowest first.
    pub shape: Vec<usize>,
    /// The spec's name, or the element type of a tensor that was kept.
    pub stored: String,
    /// Bytes in the output.
    pub bytes: u64,
    /// Bits per weight.
    pub bits_per_weight: f64,
    /// Whether the output holds codes for it.
    #[serde(default)]
    pub quantized: bool,
    /// 10 log10 of signal over error power; absent where nothing was lost or nothing was quantized.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub sqnr_db: Option<f64>,
}

impl Manifest {
    /// Reads a folder's manifest.
    ///
    /// # Errors
    /// If it is absent, damaged, or names files outside of its folder.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(MANIFEST);
        let len = std::fs::metadata(&path).map_err(io_error(&path))?.len();
        if len > MAX_MANIFEST {
            return Err(damaged(&path, format!("{len} bytes, wanted at most {MAX_MANIFEST}")));
        }
        let text = std::fs::read(&path).map_err(io_error(&path))?;
        let manifest: Self = serde_json::from_slice(&text).map_err(|e| damaged(&path, e.to_string()))?;
        if manifest.manifest != 1 {
            return Err(damaged(&path, format!("manifest version {}, wanted 1", manifest.manifest)));
        }
        let stays = |name: &str| Path::new(name).components().all(|c| matches!(c, Component::Normal(_)));
        if let Some(name) = manifest.files.keys().find(|name| !stays(name)) {
            return Err(damaged(&path, format!("file `{name}` lies outside of the folder")));
        }
        Ok(manifest)
    }

    /// The manifest's bytes.
    ///
    /// # Errors
    /// If it can't be expressed in JSON.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut text = serde_json::to_vec_pretty(self).map_err(|e| damaged(Path::new(MANIFEST), e.to_string()))?;
        text.push(b'\n');
        Ok(text)
    }

    /// Compares every file with its record; `each` is told of the bytes that were read and says whether to go on.
    ///
    /// # Errors
    /// Names the first file that is missing or differs; [`QuantError::Stopped`].
    pub fn check_files(&self, dir: &Path, each: &(dyn Fn(u64) -> bool + Sync)) -> Result<()> {
        for (name, wanted) in &self.files {
            let path = dir.join(name);
            let found = FileRecord::of(&path, each)?;
            if found.bytes != wanted.bytes {
                return Err(damaged(&path, format!("{} bytes, the manifest says {}", found.bytes, wanted.bytes)));
            }
            if found.sha256 != wanted.sha256 {
                let why = format!("sha256 {}, the manifest says {}", found.sha256, wanted.sha256);
                return Err(damaged(&path, why));
            }
        }
        Ok(())
    }
}

impl FileRecord {
    /// Measures a file; `each` is told of the bytes that were read and says whether to go on.
    ///
    /// # Errors
    /// If it can't be read; [`QuantError::Stopped`].
    pub fn of(path: &Path, each: &(dyn Fn(u64) -> bool + Sync)) -> Result<Self> {
        let file = MappedFile::open(path)?;
        let bytes = file.bytes()?;
        let mut hash = Sha256::new();
        // Let go of what was hashed, so that a large file doesn't count as this process's memory.
        const STEP: usize = 16 << 20;
        for (at, chunk) in bytes.chunks(STEP).enumerate() {
            hash.update(chunk);
            file.release(at * STEP..at * STEP + chunk.len());
            if !each(chunk.len() as u64) {
                return Err(QuantError::Stopped);
            }
        }
        Ok(Self { bytes: bytes.len() as u64, sha256: hex(&hash.finalize()) })
    }
}

/// Lowercase hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
