//! llama.cpp's importance matrix in its GGUF form (`tools/imatrix`): second moments only.
//!
//! ```text
//! general.type = "imatrix"   imatrix.datasets = [...]   imatrix.chunk_count   imatrix.chunk_size
//! "<tensor>.in_sum2" F32 (k, matrices)   sums of squares       "<tensor>.counts" F32 (1, matrices)   rows
//! ```

use super::{Input, Stats};
use crate::error::Result;
use crate::format::gguf::GgufSource;
use crate::format::source::TensorSource;
use crate::format::{damaged, tensor_error};
use std::path::Path;
use std::sync::Arc;

/// Names within a layer: llama.cpp's and Hugging Face's.
const LAYER: &[(&str, &str)] = &[
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Reads a file whose tensors are of one matrix each (no stacked experts), under Hugging Face's names.
pub(super) fn read(path: &Path) -> Result<Stats> {
    let gguf = GgufSource::open(path)?;
    let source: &dyn TensorSource = &gguf;
    match gguf.metadata().str("general.type")? {
        Some("imatrix") => {}
        other => return Err(damaged(path, format!("general.type is {other:?}, wanted \"imatrix\""))),
    }
    let datasets = gguf.metadata().strings("imatrix.datasets")?.unwrap_or_default().join(", ");
    let mut stats = Stats { made_from: format!("imatrix of {datasets}"), ..Stats::default() };
    for info in source.infos() {
        let Some(name) = info.name.strip_suffix(".in_sum2") else { continue };
        let (mut sums, mut counts) = (Vec::new(), Vec::new());
        source.read_f32(&info.name, &mut sums)?;
        source.read_f32(&format!("{name}.counts"), &mut counts)?;
        let [rows] = counts.as_slice() else {
            return Err(tensor_error(name, format!("importance of {} matrices, wanted one", counts.len())));
        };
        let sane = |v: &f32| v.is_finite() && *v >= 0.0;
        if !rows.is_finite() || *rows < 1.0 || !sums.iter().all(sane) {
            return Err(tensor_error(name, format!("importance over {rows} rows holds impossible numbers")));
        }
        let squares: Vec<f64> = sums.iter().map(|s| *s as f64).collect();
        // No magnitude was kept: the root of the second moment is the least that it can have been.
        let absmax = squares.iter().map(|s| (s / *rows as f64).sqrt() as f32).collect();
        let input = Input { rows: *rows as u64, squares, absmax, ..Input::new(0, false) };
        stats.inputs.insert(hugging_face(name), Arc::new(input));
    }
    if stats.inputs.is_empty() {
        return Err(damaged(path, "an imatrix without a tensor"));
    }
    Ok(stats)
}

/// The file's bytes.
pub(super) fn bytes(stats: &Stats) -> Vec<u8> {
    const STRING: u32 = 8;
    const U32: u32 = 4;
    const ARRAY: u32 = 9;
    const ALIGNMENT: usize = 32;
    let most = stats.inputs.values().map(|input| input.rows).max().unwrap_or(0);
    let mut file = b"GGUF".to_vec();
    let string = |file: &mut Vec<u8>, text: &str| {
        file.extend((text.len() as u64).to_le_bytes());
        file.extend(text.as_bytes());
    };
    file.extend(3u32.to_le_bytes());
    file.extend((2 * stats.inputs.len() as u64).to_le_bytes());
    file.extend(4u64.to_le_bytes());
    string(&mut file, "general.type");
    file.extend(STRING.to_le_bytes());
    string(&mut file, "imatrix");
    string(&mut file, "imatrix.datasets");
    file.extend(ARRAY.to_le_bytes());
    file.extend(STRING.to_le_bytes());
    file.extend(1u64.to_le_bytes());
    string(&mut file, &stats.made_from);
    // Rows count tokens: as chunks of one token they say the same.
    for (key, value) in [("imatrix.chunk_count", most as u32), ("imatrix.chunk_size", 1)] {
        string(&mut file, key);
        file.extend(U32.to_le_bytes());
        file.extend(value.to_le_bytes());
    }
    let mut data: Vec<u8> = Vec::new();
    for (name, input) in &stats.inputs {
        let sums = input.squares.iter().map(|s| *s as f32).collect::<Vec<_>>();
        for (part, values) in [("in_sum2", sums), ("counts", vec![input.rows as f32])] {
            string(&mut file, &format!("{}.{part}", gguf(name)));
            file.extend(2u32.to_le_bytes());
            file.extend((values.len() as u64).to_le_bytes());
            file.extend(1u64.to_le_bytes());
            file.extend(0u32.to_le_bytes()); // F32
            file.extend((data.len() as u64).to_le_bytes());
            data.extend(values.iter().flat_map(|v| v.to_le_bytes()));
            data.resize(data.len().next_multiple_of(ALIGNMENT), 0);
        }
    }
    file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
    file.extend(data);
    file
}

fn hugging_face(name: &str) -> String {
    if name == "output.weight" {
        return "lm_head.weight".into();
    }
    let layer = name.strip_prefix("blk.").and_then(|rest| rest.strip_suffix(".weight")?.split_once('.'));
    let known = layer.and_then(|(layer, part)| Some((layer, LAYER.iter().find(|(theirs, _)| *theirs == part)?.1)));
    known.map_or_else(|| name.into(), |(layer, part)| format!("model.layers.{layer}.{part}.weight"))
}

fn gguf(name: &str) -> String {
    if name == "lm_head.weight" {
        return "output.weight".into();
    }
    let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.strip_suffix(".weight")?.split_once('.'));
    let known = layer.and_then(|(layer, part)| Some((layer, LAYER.iter().find(|(_, ours)| *ours == part)?.0)));
    known.map_or_else(|| name.into(), |(layer, part)| format!("blk.{layer}.{part}.weight"))
}
