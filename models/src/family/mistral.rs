//! Mistral: one sliding window for all layers.

use crate::config::{Fields, MAX_POSITIONS, ModelConfig};
use crate::error::Result;

/// The window of a `config.json` that doesn't mention one, as in transformers. Later models write null: no window.
const DEFAULT_WINDOW: usize = 4096;

/// Reads a Mistral `config.json`.
pub(super) fn configure(fields: &Fields) -> Result<ModelConfig> {
    let mut config = ModelConfig::base(fields)?;
    let window = match (fields.has("sliding_window"), fields.get("sliding_window")) {
        (false, _) => Some(DEFAULT_WINDOW),
        (true, None) => None,
        (true, Some(_)) => Some(fields.size("sliding_window", MAX_POSITIONS)?),
    };
    for layer in &mut config.layers {
        layer.window = window;
    }
    Ok(config)
}
