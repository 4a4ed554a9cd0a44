//! Qwen 2, 2.5 and 3: dense models whose later layers may have a sliding window.

use crate::config::{Fields, LayerConfig, MAX_LAYERS, MAX_POSITIONS, ModelConfig};
use crate::error::Result;

/// Transformers' value where `use_sliding_window` is on and `sliding_window` isn't written.
const DEFAULT_WINDOW: usize = 4096;
/// Transformers' value where `max_window_layers` isn't written.
const DEFAULT_WINDOW_LAYERS: usize = 28;
/// Transformers' value where Qwen3's `head_dim` isn't written.
const QWEN3_HEAD_DIM: usize = 128;

/// Reads a Qwen 2 or 2.5 `config.json`: biases on query, key and value are part of the architecture.
pub(super) fn configure_qwen2(fields: &Fields) -> Result<ModelConfig> {
    let mut config = ModelConfig::base(fields)?;
    config.qkv_bias = true;
    set_windows(fields, &mut config.layers)?;
    Ok(config)
}

/// Reads a Qwen 3 `config.json`: norms on query and key heads are part of the architecture.
pub(super) fn configure_qwen3(fields: &Fields) -> Result<ModelConfig> {
    if !fields.has("head_dim") {
        return Err(fields.refuse("head_dim", format!("missing; Qwen 3 models say {QWEN3_HEAD_DIM}")));
    }
    let mut config = ModelConfig::base(fields)?;
    let attention_bias = fields.flag("attention_bias", false)?;
    config.qkv_bias = attention_bias;
    config.o_bias = attention_bias;
    config.qk_norm = true;
    set_windows(fields, &mut config.layers)?;
    Ok(config)
}

/// The layers with a window: those that `layer_types` names, else those from `max_window_layers` on, and none at all
/// unless `use_sliding_window` is on.
fn set_windows(fields: &Fields, layers: &mut [LayerConfig]) -> Result<()> {
    let width = match (fields.flag("use_sliding_window", false)?, fields.has("sliding_window")) {
        (false, _) => return Ok(()),
        (true, false) => DEFAULT_WINDOW,
        (true, true) if fields.get("sliding_window").is_none() => return Ok(()),
        (true, true) => fields.size("sliding_window", MAX_POSITIONS)?,
    };
    if let Some(kinds) = fields.optional::<Vec<String>>("layer_types")? {
        if kinds.len() != layers.len() {
            let why = format!("{} entries, wanted one for each of {} layers", kinds.len(), layers.len());
            return Err(fields.refuse("layer_types", why));
        }
        for (layer, kind) in layers.iter_mut().zip(&kinds) {
            layer.window = match kind.as_str() {
                "full_attention" => None,
                "sliding_attention" => Some(width),
                other => {
                    let why = format!("`{other}`; known: full_attention, sliding_attention");
                    return Err(fields.refuse("layer_types", why));
                }
            };
        }
        return Ok(());
    }
    let first = match fields.get("max_window_layers").and_then(serde_json::Value::as_u64) {
        Some(0) => 0,
        _ => fields.size_or("max_window_layers", DEFAULT_WINDOW_LAYERS, MAX_LAYERS)?,
    };
    for layer in layers.iter_mut().skip(first) {
        layer.window = Some(width);
    }
    Ok(())
}
