//! `nibble inspect`: what is in a checkpoint.

use super::Run;
use crate::classes::{bits_per_weight, class, group, is_linear};
use crate::output::{self, Table};
use crate::session::Session;
use anyhow::Result;
use nibble_models::ModelConfig;
use nibble_quant::format::gguf::{GgufSource, metadata};
use nibble_quant::format::native::NativeSource;
use nibble_quant::format::safetensors::SafetensorsSource;
use nibble_quant::format::{self, Stored, TensorInfo};
use nibble_quant::manifest::{MANIFEST, Manifest};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::path::Path;

/// Longest list or text of metadata that is shown whole.
const SHORT: usize = 72;

/// Show what is in a checkpoint of any format: tensors, types, bits per weight, metadata, configuration
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: nibble inspect smol-int4 --tensors")]
pub struct Inspect {
    /// Checkpoint folder or file of any format, or ORG/NAME on the hub
    #[arg(value_name = "CHECKPOINT")]
    checkpoint: String,
    /// List every tensor instead of one row for each class
    #[arg(long)]
    tensors: bool,
    /// Show the file's metadata
    #[arg(long)]
    metadata: bool,
}

/// Sums over some tensors.
#[derive(Default, Clone, Copy)]
struct Sums {
    tensors: usize,
    weights: u64,
    bytes: u64,
}

impl Sums {
    fn of<'a>(infos: impl Iterator<Item = &'a TensorInfo>) -> Sums {
        infos.fold(Sums::default(), |sums, info| Sums {
            tensors: sums.tensors + 1,
            weights: sums.weights + info.elements() as u64,
            bytes: sums.bytes + info.bytes as u64,
        })
    }

    fn bits(self) -> f64 {
        bits_per_weight(self.bytes, self.weights)
    }
}

impl Run for Inspect {
    fn run(self, session: &Session) -> Result<()> {
        let path = crate::hub::checkpoint(session, &self.checkpoint)?;
        let format = format::detect(&path)?;
        let source = (format.open)(&path)?;
        let infos = source.infos();
        let all = Sums::of(infos.iter());
        let linears = Sums::of(infos.iter().filter(|info| is_linear(&info.name, &info.shape)));
        let metadata = metadata(format.name, &path)?;
        let schemes = schemes(&path)?;
        if session.json {
            return output::json(&json!({
                "path": path,
                "format": format.name,
                "parameters": all.weights,
                "bytes": all.bytes,
                "bits_per_linear_weight": linears.bits(),
                "bits_per_weight_file": all.bits(),
                "config": config(&path)?,
                "metadata": metadata,
                "tensors": infos.iter().map(|info| tensor_json(info, &schemes)).collect::<Result<Vec<_>>>()?,
            }));
        }
        output::say(&format!("{}: {} ({})", path.display(), format.name, format.about))?;
        output::say(&format!(
            "{} parameters in {} tensors, {}; {:.3} bits per linear weight, {:.3} over the whole file",
            output::count(all.weights),
            all.tensors,
            output::bytes(all.bytes),
            linears.bits(),
            all.bits()
        ))?;
        if let Some(config) = config(&path)?.as_object() {
            output::say(
                &config.iter().map(|(key, value)| format!("{key} {}", plain(value))).collect::<Vec<_>>().join(", "),
            )?;
        }
        output::say("")?;
        output::say(&if self.tensors { tensor_table(infos, &schemes) } else { class_table(infos, &schemes) }.render())?;
        if self.metadata {
            output::say("")?;
            for (key, value) in &metadata {
                output::say(&format!("{key}: {}", short(plain(value))))?;
            }
        }
        Ok(())
    }
}

/// Names of schemes by tensor, where a manifest tells them.
type Schemes = HashMap<String, String>;

fn schemes(path: &Path) -> Result<Schemes> {
    if !path.join(MANIFEST).is_file() {
        return Ok(Schemes::new());
    }
    Ok(Manifest::read(path)?.tensors.into_iter().map(|tensor| (tensor.name, tensor.stored)).collect())
}

/// How a tensor is stored, in words: the element type, or the scheme that its codes are in.
fn stored(info: &TensorInfo, schemes: &Schemes) -> String {
    match (&info.stored, schemes.get(&info.name)) {
        (Stored::Quantized(_), Some(scheme)) => scheme.clone(),
        (stored, _) => stored.name(),
    }
}

fn tensor_json(info: &TensorInfo, schemes: &Schemes) -> Result<Value> {
    let spec = match &info.stored {
        Stored::Quantized(spec) => serde_json::to_value(spec)?,
        _ => Value::Null,
    };
    Ok(json!({
        "name": info.name, "shape": info.shape, "stored": stored(info, schemes), "spec": spec, "bytes": info.bytes,
        "bits_per_weight": bits_per_weight(info.bytes as u64, info.elements() as u64),
    }))
}

fn tensor_table(infos: &[TensorInfo], schemes: &Schemes) -> Table {
    let mut table = Table::new(&["tensor", "shape", "stored", "bytes", "bits/weight"]);
    for info in infos {
        table.row(vec![
            info.name.clone(),
            output::shape(&info.shape),
            stored(info, schemes),
            output::bytes(info.bytes as u64),
            format!("{:.3}", bits_per_weight(info.bytes as u64, info.elements() as u64)),
        ]);
    }
    table
}

/// One row for all tensors that are for the same, of the same shape and stored alike.
fn class_table(infos: &[TensorInfo], schemes: &Schemes) -> Table {
    let groups = group(infos, |info| (class(&info.name), output::shape(&info.shape), stored(info, schemes)));
    let mut table = Table::new(&["class", "tensors", "shape", "stored", "bytes", "bits/weight"]);
    for ((class, shape, stored), members) in groups {
        let sums = Sums::of(members.into_iter());
        table.row(vec![
            class,
            sums.tensors.to_string(),
            shape,
            stored,
            output::bytes(sums.bytes),
            format!("{:.3}", sums.bits()),
        ]);
    }
    table
}

/// What config.json says, in short; null without one, or for a family that isn't run (it can still be converted).
fn config(path: &Path) -> Result<Value> {
    if !path.join("config.json").is_file() {
        return Ok(Value::Null);
    }
    let config = match ModelConfig::load(path) {
        Ok(config) => config,
        Err(nibble_models::ModelError::UnknownFamily { found, .. }) => return Ok(json!({"model_type": found})),
        Err(error) => return Err(error.into()),
    };
    Ok(json!({
        "model_type": config.model_type, "layers": config.layers.len(), "hidden": config.hidden, "ffn": config.ffn,
        "heads": config.heads, "kv_heads": config.kv_heads, "head_dim": config.head_dim,
        "vocab_size": config.vocab_size, "context": config.max_positions, "tied": config.tie_embeddings,
    }))
}

/// A file's own remarks about itself, in file order.
fn metadata(format: &str, path: &Path) -> Result<Map<String, Value>> {
    Ok(match format {
        "gguf" => {
            let source = GgufSource::open(path)?;
            source.metadata().pairs().iter().map(|(key, value)| (key.clone(), gguf_value(value))).collect()
        }
        "native" => strings(NativeSource::open(path)?.files()),
        _ => strings(&SafetensorsSource::open(path)?),
    })
}

fn strings(source: &SafetensorsSource) -> Map<String, Value> {
    // Entries of single tensors are listed with the tensors.
    let own = source.metadata().iter().filter(|(key, _)| !key.starts_with("nibble:"));
    own.map(|(key, value)| (key.clone(), json!(value))).collect()
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn short(text: String) -> String {
    let text = text.replace('\n', "\\n");
    match text.char_indices().nth(SHORT) {
        Some((at, _)) => format!("{}... ({} bytes)", &text[..at], text.len()),
        None => text,
    }
}

/// A GGUF value as JSON; of long lists only the beginning.
fn gguf_value(value: &metadata::Value) -> Value {
    use metadata::Value as Gguf;
    match value {
        // JSON's integers end at 64 bits; GGUF's do too.
        Gguf::Int(number) => i64::try_from(*number).map_or_else(|_| json!(*number as u64), |number| json!(number)),
        Gguf::Float(number) => json!(number),
        Gguf::Bool(flag) => json!(flag),
        Gguf::String(text) => json!(text),
        Gguf::Array(array) => gguf_array(array),
    }
}

fn gguf_array(array: &metadata::Array) -> Value {
    use metadata::Array;
    fn list<T: serde::Serialize>(values: &[T]) -> Value {
        match values.len() {
            0..=16 => json!(values),
            length => json!({"length": length, "first": &values[..8]}),
        }
    }
    match array {
        Array::I32(values) => list(values),
        Array::U32(values) => list(values),
        Array::I64(values) => list(values),
        Array::U64(values) => list(values),
        Array::F32(values) => list(values),
        Array::F64(values) => list(values),
        Array::Bool(values) => list(values),
        Array::String(values) => list(values),
        Array::Array(values) => Value::Array(values.iter().take(16).map(gguf_array).collect()),
    }
}
