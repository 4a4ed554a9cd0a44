//! Looks at a whole checkpoint: do its files agree with the manifest, do its tensors decode, are they finite.

use super::Progress;
use super::engine::{BLOCK_VALUES, refuse_non_finite};
use super::progress::Stage;
use crate::QuantError;
use crate::error::Result;
use crate::format::native::NativeSource;
use crate::format::{self, Stored, TensorSource, tensor_error};
use crate::manifest::{MANIFEST, Manifest};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// What was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// The format it was opened as.
    pub format: &'static str,
    /// Tensors that were decoded.
    pub tensors: usize,
    /// Tensors that aren't plain numbers, of which only the bytes were checked.
    pub opaque: usize,
    /// Files whose sha256 was compared; none without a manifest.
    pub files: usize,
}

/// Verifies a checkpoint file or folder of any format. `stop` is set by another thread to end it early.
///
/// # Errors
/// Names the first file that differs from the manifest, or the first tensor that doesn't decode or isn't finite;
/// [`QuantError::Stopped`].
pub fn verify(path: &Path, progress: &dyn Progress, stop: Option<&AtomicBool>) -> Result<Verified> {
    let manifest = match path.join(MANIFEST).is_file() {
        true => Some(Manifest::read(path)?),
        false => None,
    };
    let go_on = || !stop.is_some_and(|s| s.load(Ordering::Relaxed));
    if let Some(manifest) = &manifest {
        let hashed: u64 = manifest.files.values().map(|f| f.bytes).sum();
        let decoded: u64 = manifest.tensors.iter().map(|t| t.bytes).sum();
        progress.start(Stage::Verify, manifest.tensors.len(), hashed.saturating_add(decoded));
        manifest.check_files(path, &|bytes| {
            progress.advance(bytes);
            go_on()
        })?;
    }
    let format = format::detect(path)?;
    let source = (format.open)(path)?;
    if let Some(manifest) = &manifest {
        let stored: Vec<&str> = source.infos().iter().map(|i| i.name.as_str()).collect();
        if let Some(gone) = manifest.tensors.iter().find(|t| !stored.contains(&t.name.as_str())) {
            return Err(tensor_error(&gone.name, "is in the manifest but not in the weights"));
        }
    } else {
        let bytes = source.infos().iter().map(|i| i.bytes as u64).sum();
        progress.start(Stage::Verify, source.infos().len(), bytes);
    }
    let mut verified = Verified { format: format.name, tensors: 0, opaque: 0, files: 0 };
    verified.files = manifest.map_or(0, |m| m.files.len());
    let mut values = Vec::new();
    for info in source.infos() {
        if !info.stored.is_float() {
            verified.opaque += 1;
            progress.advance(info.bytes as u64);
            continue;
        }
        let (n, cols) = info.rows_cols();
        for rows in row_blocks(&*source, &info.name)? {
            if !go_on() {
                return Err(QuantError::Stopped);
            }
            let (first, count) = (rows.start, rows.len() as u64);
            source.read_rows_f32(&info.name, rows, &mut values)?;
            refuse_non_finite(&info.name, &values, first, cols)?;
            progress.advance(info.bytes as u64 * count / n.max(1) as u64);
        }
        source.release(&info.name);
        verified.tensors += 1;
    }
    Ok(verified)
}

/// Rows to read at once, in order. Tensors whose rows don't stand alone are read whole.
pub(super) fn row_blocks(
    source: &dyn TensorSource,
    name: &str,
) -> Result<impl Iterator<Item = std::ops::Range<usize>> + use<>> {
    let info = source.info(name)?;
    let (rows, cols) = info.rows_cols();
    let step = match &info.stored {
        Stored::Quantized(spec) if !NativeSource::rows_stand_alone(spec) => rows.max(1),
        _ => (BLOCK_VALUES / cols.max(1)).max(1),
    };
    Ok((0..rows).step_by(step).map(move |at| at..(at + step).min(rows)))
}
