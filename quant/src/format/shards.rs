//! Safetensors files of a known layout, filled in any order.
//!
//! All sizes are known before the first value is computed: headers are written first, then each tensor's bytes go to
//! their own place, so that the files' bytes don't depend on the order of work or the number of threads.

use super::safetensors::{INDEX, WEIGHTS};
use super::source::Dtype;
use super::{OutputDir, damaged, io_error};
use crate::error::Result;
use ::safetensors::tensor::{Metadata, TensorInfo};
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Hugging Face's usual limit of a shard.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// A tensor to be stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Slot {
    /// Its name in the file.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its dimensions, the slowest first.
    pub shape: Vec<usize>,
}

impl Slot {
    /// Bytes it takes. Shapes come from validated sources, whose products fit.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Tensors that must lie in the same shard (one tensor, or the parts of a quantized one), and what the shard's
/// `__metadata__` says about them.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Bundle {
    /// The tensors.
    pub slots: Vec<Slot>,
    /// Keys and values for the header.
    pub metadata: BTreeMap<String, String>,
}

/// Where everything goes.
#[derive(Debug, Clone)]
pub struct Layout {
    files: Vec<FileLayout>,
    /// Slot name -> (file, first byte, bytes).
    places: HashMap<String, (usize, u64, usize)>,
}

#[derive(Debug, Clone)]
struct FileLayout {
    name: String,
    head: Vec<u8>,
    len: u64,
}

impl Layout {
    /// Fills shards of at most `shard_bytes` of tensor data with the bundles, in order; a larger bundle gets a shard of
    /// its own. `common` goes into every header. Within a shard wider types come first, so that all are aligned.
    ///
    /// # Errors
    /// If two slots have the same name.
    pub fn new(bundles: &[Bundle], common: &BTreeMap<String, String>, shard_bytes: u64) -> Result<Self> {
        let mut groups: Vec<Vec<&Bundle>> = vec![Vec::new()];
        let mut filled = 0u64;
        for bundle in bundles {
            let bytes: u64 = bundle.slots.iter().map(|s| s.bytes() as u64).sum();
            if filled > 0 && filled + bytes > shard_bytes {
                groups.push(Vec::new());
                filled = 0;
            }
            filled += bytes;
            if let Some(last) = groups.last_mut() {
                last.push(bundle);
            }
        }
        let count = groups.len();
        let mut layout = Self { files: Vec::with_capacity(count), places: HashMap::new() };
        for (at, group) in groups.iter().enumerate() {
            let name = match count {
                1 => WEIGHTS.to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", at + 1),
            };
            layout.add(name, group, common)?;
        }
        Ok(layout)
    }

    fn add(&mut self, file: String, bundles: &[&Bundle], common: &BTreeMap<String, String>) -> Result<()> {
        let mut slots: Vec<&Slot> = bundles.iter().flat_map(|b| &b.slots).collect();
        slots.sort_by_key(|s| std::cmp::Reverse(s.dtype.bitsize()));
        let mut at = 0;
        let mut infos = Vec::with_capacity(slots.len());
        for slot in &slots {
            let end = at + slot.bytes();
            let info = TensorInfo { dtype: slot.dtype, shape: slot.shape.clone(), data_offsets: (at, end) };
            infos.push((slot.name.clone(), info));
            at = end;
        }
        let pairs: BTreeMap<&String, &String> = common.iter().chain(bundles.iter().flat_map(|b| &b.metadata)).collect();
        let head = header(&pairs, &infos);
        Metadata::new(None, infos).map_err(|e| damaged(Path::new(&file), e.to_string()))?;
        let mut at = head.len() as u64;
        for slot in slots {
            let place = (self.files.len(), at, slot.bytes());
            if self.places.insert(slot.name.clone(), place).is_some() {
                return Err(damaged(Path::new(&file), format!("two tensors would be called `{}`", slot.name)));
            }
            at += slot.bytes() as u64;
        }
        self.files.push(FileLayout { name: file, head, len: at });
        Ok(())
    }

    /// Bytes of all files together, the index aside.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(|f| f.len).sum()
    }

    /// File names, in order.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.files.iter().map(|f| f.name.as_str())
    }

    /// `model.safetensors.index.json`, if there are several shards.
    pub fn index(&self) -> Option<Vec<u8>> {
        if self.files.len() == 1 {
            return None;
        }
        let map: BTreeMap<&String, &String> =
            self.places.iter().map(|(name, place)| (name, &self.files[place.0].name)).collect();
        let total: usize = self.places.values().map(|p| p.2).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
        Some(format!("{index:#}\n").into_bytes())
    }
}

/// Length, JSON, and spaces up to a multiple of 8. The crate's own writer orders metadata by a random hash; sorted keys
/// give the same bytes every time.
fn header(metadata: &BTreeMap<&String, &String>, infos: &[(String, TensorInfo)]) -> Vec<u8> {
    let mut map = serde_json::Map::new();
    if !metadata.is_empty() {
        map.insert("__metadata__".into(), json!(metadata));
    }
    for (name, info) in infos {
        map.insert(name.clone(), json!(info));
    }
    let mut text = serde_json::Value::Object(map).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut head = (text.len() as u64).to_le_bytes().to_vec();
    head.extend(text);
    head
}

/// The files of a [`Layout`], open for writing at any place.
#[derive(Debug)]
pub struct ShardFiles<'a> {
    layout: &'a Layout,
    files: Vec<(PathBuf, File)>,
}

impl<'a> ShardFiles<'a> {
    /// Creates the files in their full length with their headers, keeps what an earlier run has written to them, and
    /// writes the index.
    ///
    /// # Errors
    /// If a file can't be written.
    pub fn create(layout: &'a Layout, out: &OutputDir) -> Result<Self> {
        let mut files = Vec::with_capacity(layout.files.len());
        for file in &layout.files {
            let path = out.partial().join(&file.name);
            let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
            let handle = open.map_err(io_error(&path))?;
            handle.set_len(file.len).map_err(io_error(&path))?;
            handle.write_all_at(&file.head, 0).map_err(io_error(&path))?;
            files.push((path, handle));
        }
        if let Some(index) = layout.index() {
            out.write(Path::new(INDEX), &index)?;
        }
        Ok(Self { layout, files })
    }

    /// Writes bytes of a slot, from its byte `from` on.
    ///
    /// # Errors
    /// If they don't fit into the slot or can't be written.
    pub fn write(&self, name: &str, from: usize, bytes: &[u8]) -> Result<()> {
        let (path, file, at) = self.place(name, from, bytes.len())?;
        file.write_all_at(bytes, at).map_err(io_error(path))
    }

    /// Reads bytes of a slot back.
    ///
    /// # Errors
    /// If they lie outside of the slot or can't be read.
    pub fn read(&self, name: &str, from: usize, bytes: &mut [u8]) -> Result<()> {
        let (path, file, at) = self.place(name, from, bytes.len())?;
        file.read_exact_at(bytes, at).map_err(io_error(path))
    }

    fn place(&self, name: &str, from: usize, len: usize) -> Result<(&Path, &File, u64)> {
        let Some(&(file, at, size)) = self.layout.places.get(name) else {
            return Err(damaged(Path::new(WEIGHTS), format!("tensor `{name}` has no place in the output")));
        };
        let (path, handle) = &self.files[file];
        match from.checked_add(len) {
            Some(end) if end <= size => Ok((path, handle, at + from as u64)),
            _ => Err(damaged(path, format!("tensor `{name}`: {len} bytes from {from}, its size is {size}"))),
        }
    }
}
