//! Checkpoints of floats: from GGUF, or rewritten by a transform.

use super::engine::{Engine, Item, Made, Work};
use super::{Options, Progress, Report};
use crate::error::Result;
use crate::format::gguf::GgufCheckpoint;
use crate::format::shards::{Bundle, Slot};
use crate::format::{Dtype, TensorInfo, TensorSource, damaged};
use std::path::Path;

/// Writes a folder with `model.safetensors` (or shards and an index) in floats of one type (F32 holds every block type's
/// values exactly, F16 and BF16 round), a manifest and the extra files of the options: configuration and tokenizer.
///
/// # Errors
/// If the type is another, a value isn't finite or doesn't fit into the type, or the output can't be written.
pub fn import_gguf(
    source: &GgufCheckpoint,
    dtype: Dtype,
    out: &Path,
    options: &Options,
    progress: &dyn Progress,
) -> Result<Report> {
    floats(source, "import", String::new(), dtype, out, options, progress)
}

/// Writes a folder with the tensors of a rewritten model in floats of one type, the source's other files and those of the
/// options, which replace the source's of the same name; `how` is the transform's name, for the manifest.
///
/// # Errors
/// As [`import_gguf`], or the source can't be read.
pub fn transform(
    source: &dyn TensorSource,
    how: &str,
    dtype: Dtype,
    out: &Path,
    options: &Options,
    progress: &dyn Progress,
) -> Result<Report> {
    let recipe = format!("rotate = \"{how}\"\n");
    floats(source, "transform", recipe, dtype, out, options, progress)
}

fn floats(
    source: &dyn TensorSource,
    by: &'static str,
    recipe: String,
    dtype: Dtype,
    out: &Path,
    options: &Options,
    progress: &dyn Progress,
) -> Result<Report> {
    if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
        return Err(damaged(source.path(), format!("{by} as {dtype}, wanted F32, F16 or BF16")));
    }
    let item = |info: &TensorInfo| Item {
        name: info.name.clone(),
        work: Work::Floats(dtype),
        bundle: Bundle {
            slots: vec![Slot { name: info.name.clone(), dtype, shape: info.shape.clone() }],
            ..Bundle::default()
        },
        stored: dtype.to_string(),
        info: info.clone(),
    };
    let items: Vec<Item> = source.infos().iter().map(item).collect();
    let made = Made { by, recipe, seed: options.seed };
    Engine { source, items: &items, made, options, progress }.run(out)
}
