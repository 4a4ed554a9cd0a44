//! Looks at a whole checkpoint: do its files agree with the manifest, do its tensors decode, are they finite.

use super::Progress;
use super::engine::{BLOCK_VALUES, refuse_non_finite, window};
use super::progress::Stage;
use crate::QuantError;
use crate::error::Result;
use crate::format::native::NativeSource;
use crate::format::{self, Stored, TensorInfo, TensorSource, tensor_error};
use crate::manifest::{MANIFEST, Manifest, TensorRecord};
use rayon::prelude::*;
use std::collections::BTreeSet;
use std::ops::Range;
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
    let wanted = manifest.as_ref().map(|m| m.tensors.as_slice());
    let files = manifest.as_ref().map_or(0, |m| m.files.len());
    Ok(Verified { files, ..tensors(path, wanted, progress, stop)? })
}

/// The same without hashes: opens the checkpoint, finds the tensors that are `wanted`, and decodes all.
pub(super) fn tensors(
    path: &Path,
    wanted: Option<&[TensorRecord]>,
    progress: &dyn Progress,
    stop: Option<&AtomicBool>,
) -> Result<Verified> {
    let format = format::detect(path)?;
    let source = (format.open)(path)?;
    let infos = source.infos();
    if let Some(wanted) = wanted {
        let stored: BTreeSet<&str> = infos.iter().map(|i| i.name.as_str()).collect();
        if let Some(gone) = wanted.iter().find(|t| !stored.contains(t.name.as_str())) {
            return Err(tensor_error(&gone.name, "is in the manifest but not in the weights"));
        }
    } else {
        progress.start(Stage::Verify, infos.len(), infos.iter().map(|i| i.bytes as u64).sum());
    }
    let mut blocks = Vec::new();
    for info in infos.iter().filter(|i| i.stored.is_float()) {
        blocks.extend(row_blocks(&*source, &info.name)?.map(|rows| (info, rows)));
    }
    let decode = |values: &mut Vec<f32>, (info, rows): &(&TensorInfo, Range<usize>)| {
        if stop.is_some_and(|s| s.load(Ordering::Relaxed)) {
            return Err(QuantError::Stopped);
        }
        let (n, cols) = info.rows_cols();
        source.read_rows_f32(&info.name, rows.clone(), values)?;
        refuse_non_finite(&info.name, values, rows.start, cols)?;
        progress.advance(info.bytes as u64 * rows.len() as u64 / n.max(1) as u64);
        Ok(())
    };
    let mut rest = blocks.as_slice();
    while !rest.is_empty() {
        let (together, after) = rest.split_at(window(rest.iter().map(|(i, rows)| rows.len() * i.rows_cols().1)));
        let outcomes: Vec<Result<()>> = together.par_iter().map_init(Vec::new, decode).collect();
        outcomes.into_iter().collect::<Result<()>>()?;
        let done = |(info, rows): &&(&TensorInfo, Range<usize>)| rows.end == info.rows_cols().0;
        together.iter().filter(done).for_each(|(info, _)| source.release(&info.name));
        rest = after;
    }
    let opaque = infos.iter().filter(|i| !i.stored.is_float());
    let (count, bytes) = opaque.fold((0, 0), |(count, bytes), i| (count + 1, bytes + i.bytes as u64));
    progress.advance(bytes);
    Ok(Verified { format: format.name, tensors: infos.len() - count, opaque: count, files: 0 })
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
