//! GGUF to a Hugging Face checkpoint folder.

use super::engine::{Engine, Item, Made, Work};
use super::{Options, Progress, Report};
use crate::error::Result;
use crate::format::gguf::GgufSource;
use crate::format::hf_names::Model;
use crate::format::shards::{Bundle, Slot};
use crate::format::{Dtype, TensorSource, damaged};
use std::path::{Path, PathBuf};

/// How to import.
#[derive(Debug)]
pub struct ImportOptions<'a> {
    /// The type of all weights: F32 (exact for every block type), F16 or BF16.
    pub dtype: Dtype,
    /// How to write.
    pub write: Options<'a>,
    /// Files to put beside the weights (a tokenizer, a template), with their relative paths.
    pub extra: Vec<(PathBuf, Vec<u8>)>,
}

/// Writes a folder with `model.safetensors` (or shards and an index), `config.json`, `generation_config.json`, a
/// manifest and the extra files.
///
/// # Errors
/// If the file's family is unknown, a tensor has no place, a value isn't finite or doesn't fit into the type, or the
/// output can't be written.
pub fn import_gguf(
    source: &GgufSource,
    out: &Path,
    options: &ImportOptions,
    progress: &dyn Progress,
) -> Result<Report> {
    let (dtype, word) = match options.dtype {
        Dtype::F32 => (Dtype::F32, "float32"),
        Dtype::F16 => (Dtype::F16, "float16"),
        Dtype::BF16 => (Dtype::BF16, "bfloat16"),
        other => return Err(damaged(source.path(), format!("import as {other}, wanted F32, F16 or BF16"))),
    };
    let model = Model::new(source)?;
    let item = |renamed: crate::format::hf_names::Renamed| {
        let info = source.info(&renamed.gguf)?.clone();
        let slot = Slot { name: renamed.name.clone(), dtype, shape: info.shape.clone() };
        Ok(Item {
            name: renamed.name,
            work: Work::Floats { dtype, head: renamed.head },
            bundle: Bundle { slots: vec![slot], ..Bundle::default() },
            stored: dtype.to_string(),
            info,
        })
    };
    let items = model.tensors()?.into_iter().map(item).collect::<Result<Vec<_>>>()?;
    let mut extra = vec![
        (PathBuf::from("config.json"), pretty(&model.config(word)?)),
        (PathBuf::from("generation_config.json"), pretty(&model.generation_config()?)),
    ];
    extra.extend(options.extra.iter().cloned());
    let made = Made { by: "import", recipe: String::new(), seed: options.write.seed };
    let engine = Engine { source, items: &items, made, options: &options.write, progress };
    engine.run(out, &[], &extra, |dir| super::verify(dir).map(drop))
}

fn pretty(value: &serde_json::Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}
