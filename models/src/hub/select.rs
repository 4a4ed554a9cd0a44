//! Which files of a repository make a model that can be run: the checkpoint, its configuration and its tokenizer.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::error::ModelError;

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Files that are taken along where they are there.
const SIDECARS: &[&str] = &[
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
];

/// Why no files were chosen.
pub(super) enum Refusal {
    /// The index couldn't be fetched or read.
    Read(ModelError),
    /// The repository isn't one that can be run.
    Content(String),
}

/// The files to take out of `names`, small ones first. `read` fetches one: the index of a checkpoint in several files.
pub(super) fn files(
    names: &[String],
    read: &mut dyn FnMut(&str) -> Result<Vec<u8>, ModelError>,
) -> Result<Vec<String>, Refusal> {
    let has = |name: &str| names.iter().any(|n| n == name);
    if !has(CONFIG) {
        let ggufs = names.iter().filter(|n| n.ends_with(".gguf")).count();
        let hint =
            if ggufs > 0 { format!("; it holds {ggufs} GGUF files, fetch one and import it") } else { String::new() };
        return Err(Refusal::Content(format!("no `{CONFIG}`{hint}")));
    }
    let mut wanted = vec![CONFIG.to_owned()];
    wanted.extend(SIDECARS.iter().filter(|n| has(n)).map(|n| (*n).to_owned()));
    if has(SINGLE) {
        wanted.push(SINGLE.to_owned());
    } else if has(INDEX) {
        let index = read(INDEX).map_err(Refusal::Read)?;
        wanted.push(INDEX.to_owned());
        for shard in shards(&index).map_err(Refusal::Content)? {
            if !has(&shard) {
                return Err(Refusal::Content(format!("`{INDEX}` names `{shard}`, which isn't there")));
            }
            wanted.push(shard);
        }
    } else {
        let other = names.iter().find(|n| n.ends_with(".bin") || n.ends_with(".pth") || n.ends_with(".safetensors"));
        let hint = other.map(|n| format!("; it holds `{n}`")).unwrap_or_default();
        return Err(Refusal::Content(format!("no `{SINGLE}` and no `{INDEX}`{hint}")));
    }
    Ok(wanted)
}

/// The files that an index spreads its tensors over, in order.
fn shards(index: &[u8]) -> Result<BTreeSet<String>, String> {
    let index: Value = serde_json::from_slice(index).map_err(|e| format!("`{INDEX}` isn't JSON: {e}"))?;
    let map = index.get("weight_map").and_then(Value::as_object).ok_or(format!("`{INDEX}` has no `weight_map`"))?;
    let mut shards = BTreeSet::new();
    for (tensor, file) in map {
        match file.as_str() {
            Some(name) if name.ends_with(".safetensors") && !name.contains(['/', '\\', ':']) => {
                shards.insert(name.to_owned());
            }
            _ => return Err(format!("`{INDEX}` puts `{tensor}` in {file}, wanted the name of a safetensors file")),
        }
    }
    Ok(shards)
}
