//! The arithmetic of one layer: its weight, what its input becomes, what a cache keeps.

use crate::QuantSpec;
use serde::{Deserialize, Serialize};

/// The specs of one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantScheme {
    /// The weight's arithmetic.
    pub weight: QuantSpec,
    /// What the layer's input becomes before the product.
    #[serde(default)]
    pub activation: Activation,
    /// What the key-value cache keeps, for attention layers.
    #[serde(default)]
    pub kv: KvFormat,
}

/// What a layer's input becomes before the product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// It stays in floats.
    #[default]
    Float,
    /// Signed 8-bit codes with a scale for every 32 values, found from the values at run time.
    Int8Dynamic,
}

/// What a key-value cache keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KvFormat {
    /// Half precision.
    #[default]
    F16,
    /// Signed 8-bit codes with a scale a head and position.
    Int8,
}
