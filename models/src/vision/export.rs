//! From a checkpoint without a graph to a float ONNX model: what the layers' names and shapes don't say is the
//! architecture's, written down in the files below.
//!
//! ```text
//! .pth, .safetensors, a folder --names--> architecture --builder--> nodes and weights --> Model
//! ```
//! Weights that `nibble quantize` has rounded are decoded: the graph then shows what that costs.

mod bert;
mod builder;
mod efficientnet;
mod positions;
mod vit;

use super::pth;
use crate::config::Fields;
use crate::{ModelError, Result};
use nibble_quant::format;
use nibble_quant::format::source::TensorSource;
use nibble_quant::onnx::Model;
use std::path::{Path, PathBuf};

/// An architecture that is exported.
pub struct Architecture {
    /// The word for it.
    pub name: &'static str,
    /// What checkpoints it reads.
    pub summary: &'static str,
    /// A tensor that no other architecture has, with what stands before it in some checkpoints.
    marks: &'static [&'static str],
    build: fn(&Checkpoint, Option<usize>) -> Result<Model>,
}

/// Every architecture, the most particular first.
pub static ARCHITECTURES: &[Architecture] = &[
    Architecture {
        name: "efficientnet-lite",
        summary: "EfficientNet-Lite (a .pth with ImageNet weights)",
        marks: &["_conv_stem.weight"],
        build: |checkpoint, size| efficientnet::build(checkpoint, size.unwrap_or(224)),
    },
    Architecture {
        name: "vit",
        summary: "ViT, DeiT and DINOv2, as Hugging Face or timm name their tensors",
        marks: &["embeddings.patch_embeddings.projection.weight", "patch_embed.proj.weight"],
        build: vit::build,
    },
    Architecture {
        name: "bert",
        summary: "BERT and sentence encoders of its kind, as Hugging Face names their tensors",
        marks: &["embeddings.word_embeddings.weight"],
        build: |checkpoint, _| bert::build(checkpoint),
    },
];

/// Reads a checkpoint and makes an ONNX model of it, for pictures of `size` pixels a side where it takes pictures (the
/// architecture's own size by default).
///
/// # Errors
/// A file that can't be read, an architecture that isn't known here, or tensors that contradict it.
pub fn export(path: &Path, size: Option<usize>) -> Result<Model> {
    let checkpoint = Checkpoint::open(path)?;
    for architecture in ARCHITECTURES {
        if architecture.marks.iter().any(|mark| checkpoint.prefix_of(mark).is_some()) {
            return (architecture.build)(&checkpoint, size);
        }
    }
    let known: Vec<&str> = ARCHITECTURES.iter().map(|a| a.summary).collect();
    Err(checkpoint.damaged(format!("of no architecture that is exported; those are: {}", known.join("; "))))
}

/// Named tensors, and the configuration beside them if there is one.
pub(super) struct Checkpoint {
    path: PathBuf,
    tensors: Tensors,
    config: Option<(PathBuf, serde_json::Value)>,
}

enum Tensors {
    Read(pth::Weights),
    Mapped(Box<dyn TensorSource>),
}

impl Checkpoint {
    fn open(path: &Path) -> Result<Checkpoint> {
        let pickled = path.extension().is_some_and(|e| matches!(e.to_str(), Some("pth" | "pt" | "bin")));
        let tensors = match pickled {
            true => Tensors::Read(pth::read(path)?),
            false => Tensors::Mapped(format::open(path)?),
        };
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new(".")) };
        let file = folder.join("config.json");
        let config = match file.is_file() && !pickled {
            true => {
                let bytes = std::fs::read(&file).map_err(ModelError::io(&file))?;
                let value = serde_json::from_slice(&bytes)
                    .map_err(|e| ModelError::Damaged { path: file.clone(), why: e.to_string() })?;
                Some((file, value))
            }
            false => None,
        };
        Ok(Checkpoint { path: path.to_owned(), tensors, config })
    }

    fn damaged(&self, why: impl Into<String>) -> ModelError {
        ModelError::Damaged { path: self.path.clone(), why: why.into() }
    }

    fn names(&self) -> Vec<&str> {
        match &self.tensors {
            Tensors::Read(weights) => weights.keys().map(String::as_str).collect(),
            Tensors::Mapped(source) => source.infos().iter().map(|info| info.name.as_str()).collect(),
        }
    }

    /// What stands before a name: nothing, or the name of a model around this one and a dot.
    fn prefix_of(&self, name: &str) -> Option<String> {
        let mut found: Vec<&str> = self.names().into_iter().filter_map(|n| n.strip_suffix(name)).collect();
        found.retain(|p| p.is_empty() || p.ends_with('.'));
        found.sort_by_key(|p| p.len());
        found.first().map(|p| (*p).to_owned())
    }

    /// A tensor's shape.
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match &self.tensors {
            Tensors::Read(weights) => weights.get(name).map(|(dims, _)| dims.clone()),
            Tensors::Mapped(source) => source.info(name).ok().map(|info| info.shape.clone()),
        }
    }

    /// A float tensor.
    fn tensor(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>)> {
        match &self.tensors {
            Tensors::Read(weights) => {
                weights.get(name).cloned().ok_or_else(|| self.damaged(format!("no tensor `{name}`")))
            }
            Tensors::Mapped(source) => {
                let dims = source.info(name)?.shape.clone();
                let mut values = Vec::new();
                source.read_f32(name, &mut values)?;
                source.release(name);
                Ok((dims, values))
            }
        }
    }

    /// A float tensor of one shape.
    fn exactly(&self, name: &str, wanted: &[usize]) -> Result<Vec<f32>> {
        let (dims, values) = self.tensor(name)?;
        match dims == wanted {
            true => Ok(values),
            false => Err(self.damaged(format!("tensor `{name}` has shape {dims:?}, {wanted:?} was wanted"))),
        }
    }

    /// The configuration's fields.
    fn config(&self) -> Result<Option<Fields<'_>>> {
        self.config.as_ref().map(|(path, value)| Fields::new(path, value)).transpose()
    }
}
