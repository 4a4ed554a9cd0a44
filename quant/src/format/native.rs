//! nibble's own checkpoint: the source's folder with its weights in codes.
//!
//! ```text
//! every sidecar file                as it was, byte for byte (config.json too)
//! model.safetensors                 or shards with an index
//!   __metadata__: nibble.version    "1"
//!                 nibble:NAME       {"spec": ..., "shape": [...], "reordered": false}      for each quantized tensor
//!   NAME.codes, NAME.scales, ...    its parts, see `parts`; other tensors as they were
//! manifest.json                     sizes and sha256 of all files, recipe, source, one row a tensor
//! ```

pub mod parts;

pub use parts::{Part, encode, part_slots};

use super::safetensors::SafetensorsSource;
use super::shards::{Bundle, Slot};
use super::source::{QuantizedRows, Stored, TensorInfo, TensorSource};
use super::{MappedFile, damaged, tensor_error};
use crate::QuantError;
use crate::error::Result;
use crate::{QTensor, QuantSpec, ScaleFormat};
use parts::decode;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::path::Path;

/// The metadata key that marks nibble's files, and the version this code writes.
pub const VERSION_KEY: &str = "nibble.version";
/// The only version there is.
pub const VERSION: &str = "1";
/// A quantized tensor's entry in the metadata: this and the tensor's name.
const ENTRY: &str = "nibble:";

/// What the header says about a quantized tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Its arithmetic.
    pub spec: QuantSpec,
    /// Its dimensions; the codes' are [`fold`]ed to two.
    pub shape: Vec<usize>,
    /// Whether its columns were reordered: there is an `order` part.
    #[serde(default)]
    pub reordered: bool,
}

impl Entry {
    /// The tensor's parts and header entry, as the writer stores them.
    pub fn bundle(&self, name: &str) -> Result<Bundle> {
        let slots = part_slots(&self.spec, self.folded(name)?, self.reordered)
            .into_iter()
            .map(|p| Slot { name: format!("{name}.{}", p.suffix), dtype: p.dtype, shape: p.shape })
            .collect();
        let text = serde_json::to_string(self).map_err(|e| tensor_error(name, e.to_string()))?;
        Ok(Bundle { slots, metadata: BTreeMap::from([(format!("{ENTRY}{name}"), text)]) })
    }

    fn folded(&self, name: &str) -> Result<[usize; 2]> {
        fold(&self.shape).ok_or_else(|| tensor_error(name, format!("shape {:?} can't be quantized", self.shape)))
    }
}

/// (first dimension, product of the rest), if there are at least two dimensions and the products don't overflow.
pub fn fold(shape: &[usize]) -> Option<[usize; 2]> {
    let [n, rest @ ..] = shape else { return None };
    let k = rest.iter().try_fold(1usize, |a, b| a.checked_mul(*b))?;
    // 8 bits a code is the most that any part takes for a value; the sizes of all parts together stay countable.
    let countable = n.checked_mul(k)?.checked_mul(16).is_some();
    (!rest.is_empty() && countable).then_some([*n, k])
}

/// Whether the header of the first weight file carries nibble's mark.
pub(super) fn detect(path: &Path) -> bool {
    let Ok(files) = super::safetensors::weight_paths(path) else { return false };
    let first = files.first().and_then(|f| MappedFile::open(f).ok());
    let Some(bytes) = first.as_ref().and_then(|f| f.bytes().ok()) else { return false };
    let header = ::safetensors::SafeTensors::read_metadata(bytes);
    header.is_ok_and(|(_, h)| h.metadata().as_ref().is_some_and(|m| m.contains_key(VERSION_KEY)))
}

/// What every shard's header begins with.
pub fn common_metadata() -> BTreeMap<String, String> {
    BTreeMap::from([(VERSION_KEY.to_owned(), VERSION.to_owned()), ("format".to_owned(), "pt".to_owned())])
}

/// An opened native checkpoint: quantized tensors under their own names, the others as they are.
#[derive(Debug)]
pub struct NativeSource {
    files: SafetensorsSource,
    infos: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
    entries: HashMap<String, Entry>,
}

impl NativeSource {
    /// Opens a folder or file and checks that every quantized tensor has exactly the parts its spec asks for.
    ///
    /// # Errors
    /// If it isn't nibble's, is of another version, or a part is missing, superfluous or of the wrong type or shape.
    pub fn open(path: &Path) -> Result<Self> {
        let files = SafetensorsSource::open(path)?;
        match files.metadata().get(VERSION_KEY).map(String::as_str) {
            Some(VERSION) => {}
            Some(other) => return Err(damaged(path, format!("nibble format {other}, wanted {VERSION}"))),
            None => return Err(damaged(path, format!("no `{VERSION_KEY}` in the header: not a nibble checkpoint"))),
        }
        let mut entries = HashMap::new();
        let mut owner: HashMap<String, String> = HashMap::new();
        for (key, text) in files.metadata() {
            let Some(name) = key.strip_prefix(ENTRY) else { continue };
            let entry: Entry = serde_json::from_str(text).map_err(|e| tensor_error(name, e.to_string()))?;
            entry.spec.validate().map_err(|e| tensor_error(name, e.to_string()))?;
            for slot in entry.bundle(name)?.slots {
                check_part(&files, name, &slot)?;
                if let Some(other) = owner.insert(slot.name.clone(), name.to_owned()) {
                    return Err(tensor_error(name, format!("shares its part `{}` with `{other}`", slot.name)));
                }
            }
            entries.insert(name.to_owned(), entry);
        }
        let (infos, by_name) = infos(&files, &entries, &owner)?;
        Ok(Self { files, infos, by_name, entries })
    }

    /// What the header says about a quantized tensor; `None` for one that was kept as it was.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    /// The files that hold the weights.
    pub fn files(&self) -> &SafetensorsSource {
        &self.files
    }

    /// Whether a block of rows can be decoded alone. With dynamic scales rows share an absmax.
    pub fn rows_stand_alone(spec: &QuantSpec) -> bool {
        !matches!(spec.scale, ScaleFormat::Dynamic { .. })
    }

    /// Rows of a quantized tensor as a tensor of its own, where rows stand alone.
    fn rows(&self, name: &str, entry: &Entry, rows: Range<usize>) -> Result<QTensor> {
        let shape = entry.folded(name)?;
        decode(name, &entry.spec, shape, rows, entry.reordered, &mut |suffix| {
            self.files.mapped(&format!("{name}.{suffix}"))
        })
    }
}

/// Quantized tensors take the place of their codes in file order; every stored tensor is a part or stands alone.
fn infos(
    files: &SafetensorsSource,
    entries: &HashMap<String, Entry>,
    owner: &HashMap<String, String>,
) -> Result<(Vec<TensorInfo>, HashMap<String, usize>)> {
    let mut infos: Vec<TensorInfo> = Vec::new();
    let mut seen = HashSet::new();
    for info in files.infos() {
        let Some(name) = owner.get(&info.name) else {
            infos.push(info.clone());
            continue;
        };
        let (Some(entry), true) = (entries.get(name), seen.insert(name)) else { continue };
        let slots = entry.bundle(name)?.slots;
        infos.push(TensorInfo {
            name: name.clone(),
            stored: Stored::Quantized(Box::new(entry.spec.clone())),
            shape: entry.shape.clone(),
            bytes: slots.iter().map(Slot::bytes).sum(),
        });
    }
    let mut by_name = HashMap::with_capacity(infos.len());
    for (at, info) in infos.iter().enumerate() {
        if by_name.insert(info.name.clone(), at).is_some() {
            return Err(tensor_error(&info.name, "is stored both quantized and as it was"));
        }
    }
    Ok((infos, by_name))
}

fn check_part(files: &SafetensorsSource, name: &str, slot: &Slot) -> Result<()> {
    let found = files.info(&slot.name).map_err(|_| tensor_error(name, format!("part `{}` is missing", slot.name)))?;
    if found.stored != Stored::Plain(slot.dtype) || found.shape != slot.shape {
        let why = format!(
            "part `{}` is {} {:?}, the spec asks for {} {:?}",
            slot.name,
            found.stored.name(),
            found.shape,
            slot.dtype,
            slot.shape
        );
        return Err(tensor_error(name, why));
    }
    Ok(())
}

impl TensorSource for NativeSource {
    fn path(&self) -> &Path {
        self.files.path()
    }

    fn infos(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        let missing = || QuantError::NoTensor { path: self.path().to_owned(), name: name.to_owned() };
        self.by_name.get(name).map(|&at| &self.infos[at]).ok_or_else(missing)
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        match self.entries.get(name) {
            Some(_) => Err(tensor_error(name, "is stored in parts, wanted one piece")),
            None => {
                self.info(name)?;
                self.files.bytes(name)
            }
        }
    }

    fn read_rows_f32(&self, name: &str, rows: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
        let Some(entry) = self.entries.get(name) else {
            return super::source::decode_rows(self.info(name)?, &self.bytes(name)?, rows, out);
        };
        let [n, k] = entry.folded(name)?;
        if rows.start > rows.end || rows.end > n {
            return Err(tensor_error(name, format!("rows {}..{} of {n} were asked for", rows.start, rows.end)));
        }
        out.clear();
        if !Self::rows_stand_alone(&entry.spec) {
            let whole = self.rows(name, entry, 0..n)?;
            out.resize(rows.len() * k, 0.0);
            if k > 0 {
                out.chunks_mut(k).zip(rows).for_each(|(row, r)| whole.dequantize_row(r, row));
            }
        } else {
            *out = self.rows(name, entry, rows)?.dequantize();
        }
        Ok(())
    }

    fn quantized_rows(&self, name: &str) -> Result<Option<QuantizedRows<'_>>> {
        let Some(entry) = self.entries.get(name) else { return self.info(name).map(|_| None) };
        let shape = entry.folded(name)?;
        let (apart, name) = (Self::rows_stand_alone(&entry.spec), name.to_owned());
        Ok(Some(QuantizedRows { shape, apart, read: Box::new(move |rows| self.rows(&name, entry, rows)) }))
    }

    fn release(&self, name: &str) {
        match self.entries.get(name) {
            Some(entry) => {
                let slots = entry.bundle(name).map(|b| b.slots).unwrap_or_default();
                slots.iter().for_each(|slot| self.files.release(&slot.name));
            }
            None => self.files.release(name),
        }
    }
}
