//! Llama 2 and 3, SmolLM2: the block that the other families vary.

use crate::config::{Fields, ModelConfig};
use crate::error::Result;

/// Reads a Llama `config.json`; `attention_bias` puts a bias on all four projections.
pub(super) fn configure(fields: &Fields) -> Result<ModelConfig> {
    let mut config = ModelConfig::base(fields)?;
    let attention_bias = fields.flag("attention_bias", false)?;
    config.qkv_bias = attention_bias;
    config.o_bias = attention_bias;
    config.mlp_bias = fields.flag("mlp_bias", false)?;
    Ok(config)
}
