//! GGUF v2 and v3: llama.cpp's single-file checkpoints, read only.
//!
//! ```text
//! "GGUF" u32 version  u64 tensors  u64 pairs
//! pair:    string key, u32 type, value            string: u64 length, bytes     array: u32 type, u64 length, values
//! tensor:  string name, u32 dims, u64 ne[dims] (ne[0] fastest), u32 type, u64 offset from the data's start
//! padding to general.alignment, then the tensors' data, each padded to it
//! ```
//! A file is data from strangers: every count is checked against the bytes that are left before anything is
//! allocated, products are checked, and offsets must be exactly the running padded sum, as llama.cpp demands.

pub mod blocks;
mod checkpoint;
mod exact;
pub mod metadata;
mod read;

pub use blocks::{BLOCKS, BlockType};
pub use checkpoint::GgufCheckpoint;
pub use metadata::{Array, Metadata, Value};

use super::source::{Stored, TensorInfo, TensorSource};
use super::{MappedFile, damaged};
use crate::QuantError;
use crate::error::Result;
use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

/// An opened and validated GGUF file. Shapes are turned around: the slowest dimension first, as everywhere here.
#[derive(Debug)]
pub struct GgufSource {
    file: MappedFile,
    metadata: Metadata,
    infos: Vec<TensorInfo>,
    ranges: Vec<Range<usize>>,
    by_name: HashMap<String, usize>,
}

impl GgufSource {
    /// Opens a file and validates everything but the tensors' values.
    ///
    /// # Errors
    /// If the file is damaged, of another version or byte order, or holds a tensor type that isn't in [`BLOCKS`].
    pub fn open(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path)?;
        let header = read::header(file.bytes()?).map_err(|why| damaged(path, why))?;
        let by_name = header.infos.iter().enumerate().map(|(at, info)| (info.name.clone(), at)).collect();
        let (infos, ranges) = (header.infos, header.ranges);
        Ok(Self { file, metadata: Metadata::new(path, header.pairs), infos, ranges, by_name })
    }

    /// The key-value pairs.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    fn find(&self, name: &str) -> Result<usize> {
        let missing = || QuantError::NoTensor { path: self.file.path().to_owned(), name: name.to_owned() };
        self.by_name.get(name).copied().ok_or_else(missing)
    }
}

impl GgufSource {
    /// A tensor's bytes in the mapped file.
    pub(crate) fn mapped(&self, name: &str) -> Result<&[u8]> {
        let range = self.ranges[self.find(name)?].clone();
        Ok(&self.file.bytes()?[range])
    }
}

impl TensorSource for GgufSource {
    fn path(&self) -> &Path {
        self.file.path()
    }

    fn infos(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        Ok(&self.infos[self.find(name)?])
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        self.mapped(name).map(Cow::Borrowed)
    }

    fn release(&self, name: &str) {
        if let Some(&at) = self.by_name.get(name) {
            self.file.release(self.ranges[at].clone());
        }
    }
}

/// How a block type appears in a [`TensorInfo`]: plain floats as such, the rest as blocks.
fn stored(block: &'static BlockType) -> Stored {
    block.plain.map_or(Stored::Blocks(block), Stored::Plain)
}
