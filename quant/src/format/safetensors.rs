//! Hugging Face checkpoints: one safetensors file, or shards with an index.
//!
//! ```text
//! file:   u64 header length | JSON header, space padded | tensor bytes, no holes
//! index:  {"metadata": {...}, "weight_map": {tensor name: shard file name}}
//! ```
//! The safetensors crate validates each header once, at opening; the index is checked against the shards in both
//! directions before any tensor is read. Bytes are borrowed from the mapped files from then on.

use super::source::{Stored, TensorInfo, TensorSource};
use super::{MappedFile, damaged, io_error};
use crate::QuantError;
use crate::error::Result;
use safetensors::SafeTensors;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

/// The weights of an unsharded checkpoint.
pub const WEIGHTS: &str = "model.safetensors";
/// The index of a sharded checkpoint.
pub const INDEX: &str = "model.safetensors.index.json";
/// No JSON beside the weights is larger than this by far.
const MAX_INDEX: u64 = 256 << 20;

/// A safetensors file or a folder of them, opened and validated.
#[derive(Debug)]
pub struct SafetensorsSource {
    path: PathBuf,
    shards: Vec<MappedFile>,
    infos: Vec<TensorInfo>,
    places: Vec<Place>,
    by_name: HashMap<String, usize>,
    metadata: BTreeMap<String, String>,
}

#[derive(Debug, Clone)]
struct Place {
    shard: usize,
    range: Range<usize>,
}

impl SafetensorsSource {
    /// Opens a checkpoint: a `.safetensors` file, an index file, or a folder with `model.safetensors`, with
    /// `model.safetensors.index.json` and its shards, or with exactly one `.safetensors` file.
    ///
    /// # Errors
    /// If a file is missing or damaged, or index and shards contradict each other.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            return match path.file_name().is_some_and(|n| n.to_string_lossy().ends_with(".index.json")) {
                true => Self::open_sharded(path, path),
                false => Self::open_files(path, &[path.to_owned()]),
            };
        }
        let (single, index) = (path.join(WEIGHTS), path.join(INDEX));
        if single.is_file() {
            return Self::open_files(path, &[single]);
        }
        if index.is_file() {
            return Self::open_sharded(path, &index);
        }
        match weight_files(path)?.as_slice() {
            [] => Err(damaged(path, format!("no {WEIGHTS}, no {INDEX} and no other .safetensors file"))),
            [only] => Self::open_files(path, &[path.join(only)]),
            many => Err(damaged(path, format!("{} .safetensors files ({}, ...) but no {INDEX}", many.len(), many[0]))),
        }
    }

    /// What the shards' `__metadata__` say, later shards after earlier ones.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The opened weight files.
    pub fn shards(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|s| s.path())
    }

    fn open_sharded(path: &Path, index: &Path) -> Result<Self> {
        let wanted = read_index(index)?;
        let dir = index.parent().unwrap_or(Path::new(""));
        let files: Vec<&str> = {
            let mut files: Vec<&str> = wanted.values().map(String::as_str).collect();
            files.sort_unstable();
            files.dedup();
            files
        };
        let missing: Vec<&str> = files.iter().copied().filter(|f| !dir.join(f).is_file()).collect();
        if let Some(first) = missing.first() {
            let why = format!("{} of {} shards are missing, the first is `{first}`", missing.len(), files.len());
            return Err(damaged(index, why));
        }
        let paths: Vec<PathBuf> = files.iter().map(|f| dir.join(f)).collect();
        let source = Self::open_files(path, &paths)?;
        for (info, place) in source.infos.iter().zip(&source.places) {
            let found = files[place.shard];
            match wanted.get(&info.name) {
                None => {
                    return Err(damaged(index, format!("`{found}` holds tensor `{}`, not in the index", info.name)));
                }
                Some(file) if file != found => {
                    let why = format!("tensor `{}` is in `{found}`, the index says `{file}`", info.name);
                    return Err(damaged(index, why));
                }
                Some(_) => {}
            }
        }
        if let Some((name, file)) = wanted.iter().find(|(name, _)| !source.by_name.contains_key(*name)) {
            return Err(damaged(index, format!("tensor `{name}` isn't in `{file}`")));
        }
        Ok(source)
    }

    fn open_files(path: &Path, files: &[PathBuf]) -> Result<Self> {
        let mut source = Self {
            path: path.to_owned(),
            shards: Vec::with_capacity(files.len()),
            infos: Vec::new(),
            places: Vec::new(),
            by_name: HashMap::new(),
            metadata: BTreeMap::new(),
        };
        for file in files {
            source.add(MappedFile::open(file)?)?;
        }
        Ok(source)
    }

    fn add(&mut self, shard: MappedFile) -> Result<()> {
        let path = shard.path();
        let bytes = shard.bytes()?;
        let (header_len, header) = SafeTensors::read_metadata(bytes).map_err(|e| damaged(path, e.to_string()))?;
        let start = header_len + 8;
        // The crate keeps the last of two equal names; the format allows none.
        if let Err(e) = serde_json::from_slice::<UniqueKeys<IgnoredAny>>(&bytes[8..start]) {
            return Err(damaged(path, e.to_string()));
        }
        if let Some(extra) = header.metadata() {
            self.metadata.extend(extra.iter().map(|(k, v)| (k.clone(), v.clone())));
        }
        for name in header.offset_keys() {
            let Some(info) = header.info(&name) else { continue };
            let (from, to) = info.data_offsets;
            let at = self.infos.len();
            if let Some(before) = self.by_name.insert(name.clone(), at) {
                let other = self.shards[self.places[before].shard].path().display();
                return Err(damaged(path, format!("tensor `{name}` is also in {other}")));
            }
            self.places.push(Place { shard: self.shards.len(), range: start + from..start + to });
            let stored = Stored::Plain(info.dtype);
            self.infos.push(TensorInfo { name, stored, shape: info.shape.clone(), bytes: to - from });
        }
        self.shards.push(shard);
        Ok(())
    }

    fn find(&self, name: &str) -> Result<usize> {
        let missing = || QuantError::NoTensor { path: self.path.clone(), name: name.to_owned() };
        self.by_name.get(name).copied().ok_or_else(missing)
    }
}

impl SafetensorsSource {
    /// A tensor's bytes in the mapped file.
    pub(crate) fn mapped(&self, name: &str) -> Result<&[u8]> {
        let place = &self.places[self.find(name)?];
        Ok(&self.shards[place.shard].bytes()?[place.range.clone()])
    }
}

impl TensorSource for SafetensorsSource {
    fn path(&self) -> &Path {
        &self.path
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
            let place = &self.places[at];
            self.shards[place.shard].release(place.range.clone());
        }
    }
}

/// The files a checkpoint's weights are in, as far as names tell: the file itself, or those of a folder, sorted.
pub(crate) fn weight_paths(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_dir() {
        return Ok(weight_files(path)?.into_iter().map(|name| path.join(name)).collect());
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let ours = name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
    Ok(if ours { vec![path.to_owned()] } else { Vec::new() })
}

/// Names of the `.safetensors` files of a folder, sorted.
fn weight_files(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io_error(dir))? {
        let name = entry.map_err(io_error(dir))?.file_name();
        if let Some(name) = name.to_str().filter(|n| n.ends_with(".safetensors")) {
            names.push(name.to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// An index's tensor name -> shard file name, with file names that can't leave the folder.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: UniqueKeys<String>,
    }
    let len = std::fs::metadata(path).map_err(io_error(path))?.len();
    if len > MAX_INDEX {
        return Err(damaged(path, format!("{len} bytes, wanted at most {MAX_INDEX}")));
    }
    let text = std::fs::read(path).map_err(io_error(path))?;
    let index: Index = serde_json::from_slice(&text).map_err(|e| damaged(path, e.to_string()))?;
    let map: BTreeMap<String, String> = index.weight_map.0.into_iter().collect();
    for (name, file) in &map {
        let mut parts = Path::new(file).components();
        let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
        if !plain || file.contains(['/', '\\', '\0']) {
            return Err(damaged(
                path,
                format!("tensor `{name}` points to `{file}`, wanted a file name in this folder"),
            ));
        }
    }
    Ok(map)
}

/// A JSON object of which no key is given twice.
struct UniqueKeys<V>(Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueKeys<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys<V>(std::marker::PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Keys<V> {
            type Value = UniqueKeys<V>;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object without repeated keys")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut seen = HashSet::new();
                let mut pairs = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, V>()? {
                    if !seen.insert(key.clone()) {
                        return Err(serde::de::Error::custom(format!("key `{key}` is given twice")));
                    }
                    pairs.push((key, value));
                }
                Ok(UniqueKeys(pairs))
            }
        }
        deserializer.deserialize_map(Keys(std::marker::PhantomData))
    }
}
