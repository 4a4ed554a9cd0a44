//! Layers that were quantized a block of the model at a time, ahead of the conversion that writes them: each block in a
//! file of its own, so that a run that was stopped goes on with the next one.

use super::levels::OWN;
use crate::error::Result;
use crate::format::native::{self, Entry, NativeSource};
use crate::format::source::TensorSource;
use crate::format::{damaged, io_error, tensor_error};
use crate::manifest::hex;
use crate::recipe::{Action, Recipe, Rule};
use crate::{QTensor, QuantSpec};
use safetensors::tensor::TensorView;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The metadata key of what decided the tensors.
const KEY: &str = "nibble.blocks";

/// A folder of quantized blocks.
#[derive(Debug)]
pub struct Blocks {
    folder: PathBuf,
    fingerprint: String,
    files: Vec<NativeSource>,
}

impl Blocks {
    /// What tells runs apart: a source's headers, and the length and time of change of its files, and whatever else decides
    /// the tensors, in `words`.
    ///
    /// # Errors
    /// The source's files can't be found.
    pub fn fingerprint_of(source: &dyn TensorSource, words: &str) -> Result<String> {
        let mut hash = Sha256::new();
        hash.update(env!("CARGO_PKG_VERSION"));
        for info in source.infos() {
            hash.update(format!("{}\0{}\0{:?}\n", info.name, info.stored.name(), info.shape));
        }
        for (path, len, changed) in crate::format::weight_stamps(source.path())? {
            hash.update(format!("{path}\0{len}\0{changed}\n"));
        }
        hash.update(words);
        Ok(hex(&hash.finalize()[..6]))
    }

    /// Opens a folder, or makes it, with the blocks that are there under the same `fingerprint`; others are written over.
    ///
    /// # Errors
    /// The folder can't be made.
    pub fn open(folder: &Path, fingerprint: &str) -> Result<Blocks> {
        std::fs::create_dir_all(folder).map_err(io_error(folder))?;
        let mut blocks = Blocks { folder: folder.to_owned(), fingerprint: fingerprint.to_owned(), files: Vec::new() };
        // What is damaged or of another run is made again.
        while let Ok(file) = NativeSource::open(&blocks.path(blocks.files.len()))
            && file.files().metadata().get(KEY).map(String::as_str) == Some(fingerprint)
        {
            blocks.files.push(file);
        }
        Ok(blocks)
    }

    fn path(&self, block: usize) -> PathBuf {
        self.folder.join(format!("block-{block:05}.safetensors"))
    }

    /// Blocks that are done.
    pub fn done(&self) -> usize {
        self.files.len()
    }

    /// What decided the tensors.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Keeps the tensors of the next block.
    ///
    /// # Errors
    /// The file can't be written, or a tensor contradicts its spec.
    pub fn push(&mut self, tensors: &[(String, QTensor)]) -> Result<()> {
        let path = self.path(self.files.len());
        let mut metadata: HashMap<String, String> = native::common_metadata().into_iter().collect();
        metadata.insert(KEY.to_owned(), self.fingerprint.clone());
        let mut parts = Vec::new();
        for (name, tensor) in tensors {
            let entry =
                Entry { spec: tensor.spec.clone(), shape: tensor.shape.to_vec(), reordered: tensor.order.is_some() };
            let bundle = entry.bundle(name)?;
            metadata.extend(bundle.metadata);
            parts.extend(bundle.slots.into_iter().zip(native::encode(name, tensor)?));
        }
        let views = parts.iter().map(|(slot, part)| {
            let view = TensorView::new(slot.dtype, slot.shape.clone(), &part.bytes);
            Ok((slot.name.as_str(), view.map_err(|e| tensor_error(&slot.name, e.to_string()))?))
        });
        let views = views.collect::<Result<Vec<_>>>()?;
        let bytes = safetensors::serialize(views, Some(metadata)).map_err(|e| damaged(&path, e.to_string()))?;
        let mut file = tempfile::NamedTempFile::new_in(&self.folder).map_err(io_error(&self.folder))?;
        file.write_all(&bytes).and_then(|()| file.as_file().sync_all()).map_err(io_error(&path))?;
        file.persist(&path).map_err(|e| io_error(&path)(e.error))?;
        self.files.push(NativeSource::open(&path)?);
        Ok(())
    }

    /// A tensor of that name, if a block has it.
    ///
    /// # Errors
    /// Its file is damaged.
    pub fn tensor(&self, name: &str) -> Result<Option<QTensor>> {
        match self.files.iter().find(|file| file.entry(name).is_some()) {
            Some(file) => file.quantized_rows(name)?.map(|rows| rows.all()).transpose(),
            None => Ok(None),
        }
    }

    /// The arithmetic of a tensor, if a block has it.
    pub fn spec(&self, name: &str) -> Option<&QuantSpec> {
        self.files.iter().find_map(|file| file.entry(name)).map(|entry| &entry.spec)
    }

    /// The recipe with a scheme of its own for each tensor here whose arithmetic isn't what its rule says: levels that
    /// were learned.
    ///
    /// # Errors
    /// A rule contradicts itself.
    pub fn recipe(&self, source: &dyn TensorSource, recipe: &Recipe) -> Result<Recipe> {
        let mut made = recipe.clone();
        let mut rules = Vec::new();
        for info in source.infos() {
            let Some(spec) = self.spec(&info.name) else { continue };
            let decision = recipe.decide(&info.name, &info.shape)?;
            let Action::Quantize { name, mut scheme, algorithm } = decision.action else { continue };
            if scheme.weight == *spec {
                continue;
            }
            scheme.weight = spec.clone();
            let own = format!("{name}{OWN}{}", info.name);
            made.schemes.insert(own.clone(), scheme);
            rules.push(Rule {
                pattern: Some(info.name.clone()),
                scheme: Some(own),
                algorithm: Some(algorithm.to_owned()),
                why: Some(format!("levels of its own; {}", decision.why)),
                ..Rule::default()
            });
        }
        made.rules.splice(0..0, rules);
        Ok(made)
    }

    /// Removes the folder.
    ///
    /// # Errors
    /// It can't be removed.
    pub fn remove(&self) -> Result<()> {
        std::fs::remove_dir_all(&self.folder).map_err(io_error(&self.folder))
    }
}
