//! What a conversion would do, before it touches a value.

use super::engine::{Item, WINDOW_VALUES, Work};
use crate::error::Result;
use crate::format::native::Entry;
use crate::format::shards::{Bundle, Slot};
use crate::format::{Dtype, Stored, TensorInfo, TensorSource, damaged, io_error, tensor_error};
use crate::{Algorithm, QTensor, QuantSpec};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// Makes a tensor, or a block of its rows, from its name, shape and values.
pub type Quantizer = Arc<dyn Fn(&str, [usize; 2], &[f32]) -> Result<QTensor> + Send + Sync>;

/// What becomes of a tensor of floats.
pub enum Choice {
    /// It stays as it is, for this reason.
    Keep(String),
    /// It becomes floats of another type (F32, F16 or BF16), for this reason.
    Convert(Dtype, String),
    /// It becomes codes.
    Quantize(Quantize),
}

/// How a matrix becomes codes.
#[derive(Clone)]
pub struct Quantize {
    /// The arithmetic.
    pub spec: QuantSpec,
    /// What does it.
    pub quantizer: Quantizer,
    /// Names of scheme and algorithm, and whatever else decides the bytes: part of the fingerprint.
    pub label: String,
    /// The algorithm that was asked for, if it is one of the table; another one runs where that one lacks what it needs.
    pub wanted: Option<&'static Algorithm>,
    /// Which rule chose it.
    pub why: String,
    /// What rows have to do with each other.
    pub rows: Rows,
}

/// How the rows of a tensor may be cut into blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// Any of them give the same codes as in the whole tensor.
    Apart,
    /// The same, but what they have in common (a factor of a Gram matrix) is dear: few blocks.
    Shared,
    /// Only all together give the tensor.
    Tied,
}

impl fmt::Debug for Quantize {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} {:?}", self.label, self.spec)
    }
}

/// What happens to one tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Copied byte for byte.
    Keep,
    /// Written as floats of this type.
    Convert(Dtype),
    /// Quantized as this spec says.
    Quantize(QuantSpec),
}

/// One tensor of a plan.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanRow {
    /// Its name.
    pub name: String,
    /// Its dimensions, the slowest first.
    pub shape: Vec<usize>,
    /// How the source stores it.
    pub stored: String,
    /// What happens to it.
    pub action: Action,
    /// Names of scheme and algorithm, or the element type that is kept.
    pub label: String,
    /// Bytes in the source.
    pub bytes_before: u64,
    /// Bytes in the output.
    pub bytes_after: u64,
    /// Bits per weight in the output.
    pub bits_per_weight: f64,
    /// Which rule chose this, or why it is kept.
    pub why: String,
}

/// Everything that a conversion will do.
#[derive(Debug)]
pub struct Plan {
    /// One row a tensor, in file order.
    pub rows: Vec<PlanRow>,
    /// Bytes that the conversion's memory stays below: see [`Plan::memory_rule`].
    pub peak_memory: u64,
    pub(super) items: Vec<Item>,
}

/// What the program needs anyway: code, headers, journal, buffers of files.
const BASE_MEMORY: u64 = 64 << 20;
/// For each value in flight: 4 bytes as f32, at most 4 in the source's mapped pages, 1 as a code, at most 2 in parts,
/// and what the algorithm needs beside.
const MEMORY_PER_VALUE: u64 = 16;

impl Plan {
    /// Bytes of all tensors before and after.
    pub fn bytes(&self) -> (u64, u64) {
        self.rows.iter().fold((0, 0), |(a, b), r| (a + r.bytes_before, b + r.bytes_after))
    }

    /// Bits per weight of the quantized tensors together; `None` if there are none.
    pub fn bits_per_quantized_weight(&self) -> Option<f64> {
        let quantized = self.rows.iter().filter(|r| matches!(r.action, Action::Quantize(_)));
        let (bytes, values) = quantized.fold((0, 0), |(bytes, values), r| {
            (bytes + r.bytes_after, values + r.shape.iter().product::<usize>() as u64)
        });
        (values > 0).then(|| bytes as f64 * 8.0 / values as f64)
    }

    /// How [`Plan::peak_memory`] comes about, in words.
    pub fn memory_rule() -> String {
        format!(
            "{} MiB + {MEMORY_PER_VALUE} bytes x values in flight (at least {} Mi, or the largest block of rows) + the \
             largest tensor's bytes in the source, and calibration's Gram matrices with their factors",
            BASE_MEMORY >> 20,
            WINDOW_VALUES >> 20
        )
    }
}

/// Plans a conversion: `choose` decides about tensors of floats; everything else is kept, and so is what it would
/// quantize but isn't a matrix.
///
/// # Errors
/// If the source is quantized already, a spec contradicts itself, or two tensors would have the same name.
pub fn plan_with(source: &dyn TensorSource, choose: &dyn Fn(&TensorInfo) -> Result<Choice>) -> Result<Plan> {
    refuse_quantized(source)?;
    let mut plan = Plan { rows: Vec::new(), peak_memory: 0, items: Vec::new() };
    for info in source.infos() {
        let choice = match why_kept(info) {
            Some(why) => Choice::Keep(why.to_owned()),
            None => choose(info)?,
        };
        // Blocks are no element type: what they stand for is kept, exactly.
        let choice = match (choice, &info.stored) {
            (Choice::Keep(why), Stored::Blocks(_)) => Choice::Convert(Dtype::F32, why),
            (choice, _) => choice,
        };
        let (item, action, why) = match choice {
            Choice::Keep(why) => (kept(info)?, Action::Keep, why),
            Choice::Convert(dtype, why) => (converted(info, dtype)?, Action::Convert(dtype), why),
            Choice::Quantize(_) if info.shape.len() != 2 => (kept(info)?, Action::Keep, "not a matrix".to_owned()),
            Choice::Quantize(how) => {
                let (spec, why) = (how.spec.clone(), how.why.clone());
                (quantized(info, how)?, Action::Quantize(spec), why)
            }
        };
        let bytes_after: u64 = item.bundle.slots.iter().map(|s| s.bytes() as u64).sum();
        plan.rows.push(PlanRow {
            name: info.name.clone(),
            shape: info.shape.clone(),
            stored: info.stored.name(),
            action,
            label: item.stored.clone(),
            bytes_before: info.bytes as u64,
            bytes_after,
            bits_per_weight: if info.elements() == 0 { 0.0 } else { bytes_after as f64 * 8.0 / info.elements() as f64 },
            why,
        });
        plan.items.push(item);
    }
    let values = plan.items.iter().map(Item::largest_block).max().unwrap_or(0).max(WINDOW_VALUES);
    let source_bytes = plan.rows.iter().map(|r| r.bytes_before).max().unwrap_or(0);
    plan.peak_memory = BASE_MEMORY + MEMORY_PER_VALUE * values as u64 + source_bytes;
    Ok(plan)
}

fn why_kept(info: &TensorInfo) -> Option<&'static str> {
    match info.stored.is_float() {
        false => Some("not floats"),
        true => (info.elements() == 0).then_some("empty"),
    }
}

fn kept(info: &TensorInfo) -> Result<Item> {
    let Stored::Plain(dtype) = info.stored else {
        return Err(tensor_error(&info.name, format!("{} can't be kept as it is", info.stored.name())));
    };
    let slot = Slot { name: info.name.clone(), dtype, shape: info.shape.clone() };
    Ok(Item {
        info: info.clone(),
        name: info.name.clone(),
        // Single precision by rows: where a tensor is made as it is read, each of its blocks would make all of it.
        work: if dtype == Dtype::F32 { Work::Floats(dtype) } else { Work::Copy },
        bundle: Bundle { slots: vec![slot], ..Bundle::default() },
        stored: info.stored.name(),
    })
}

fn converted(info: &TensorInfo, dtype: Dtype) -> Result<Item> {
    if info.stored == Stored::Plain(dtype) {
        return kept(info);
    }
    if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
        return Err(tensor_error(&info.name, format!("can't be kept as {dtype}, wanted F32, F16 or BF16")));
    }
    let slot = Slot { name: info.name.clone(), dtype, shape: info.shape.clone() };
    Ok(Item {
        info: info.clone(),
        name: info.name.clone(),
        work: Work::Floats(dtype),
        bundle: Bundle { slots: vec![slot], ..Bundle::default() },
        stored: dtype.to_string(),
    })
}

fn quantized(info: &TensorInfo, how: Quantize) -> Result<Item> {
    how.spec.validate()?;
    let entry = Entry { spec: how.spec.clone(), shape: info.shape.clone(), reordered: false };
    Ok(Item {
        info: info.clone(),
        name: info.name.clone(),
        bundle: entry.bundle(&info.name)?,
        stored: how.label.clone(),
        work: Work::Quantize(how),
    })
}

/// Quantizing twice adds errors up: codes are refused, in nibble's form or announced by config.json. GGUF's blocks are
/// taken for the floats they stand for, since for many models they are all there is.
fn refuse_quantized(source: &dyn TensorSource) -> Result<()> {
    let path = source.path();
    if let Some(info) = source.infos().iter().find(|i| matches!(i.stored, Stored::Quantized(_))) {
        let why = format!("tensor `{}` is {} already, wanted floats", info.name, info.stored.name());
        return Err(damaged(path, why));
    }
    let config = path.join("config.json");
    if !config.is_file() {
        return Ok(());
    }
    match quantization_method(&config)? {
        Some(method) => Err(damaged(path, format!("config.json says it is quantized already ({method})"))),
        None => Ok(()),
    }
}

fn quantization_method(config: &Path) -> Result<Option<String>> {
    let text = std::fs::read(config).map_err(io_error(config))?;
    let json: serde_json::Value = serde_json::from_slice(&text).map_err(|e| damaged(config, e.to_string()))?;
    let found = json.get("quantization_config").filter(|q| !q.is_null());
    Ok(found.map(|q| q["quant_method"].as_str().unwrap_or("by an unnamed method").to_owned()))
}
