//! Why a quantized model isn't as good as the float one: which half of the error is whose, layer by layer, number by number.
//!
//! ```text
//! sources       weights alone in integers, activations alone, both
//! layers        one layer in integers and the rest in float; one in float and the rest in integers
//! activations   float and rounded values of each tensor: error, saturation, histograms, channels, ranges of observers
//! weights       the same of each weight
//! ```
//! Everything here is plain data with serde's traits: a report is drawn from it without running anything again.

mod layers;
mod numbers;
mod sensitivity;
mod state;
mod tally;

pub use layers::{Layer, layers, units};
pub use numbers::{ActivationFigures, Bins, ChannelRange, Figures, ObservedRange, Outlier, WeightFigures, numbers};
pub(crate) use numbers::{Sums, outliers, widen};
pub use sensitivity::{Sensitivity, SensitivityOptions, effects, sensitivity, steps};
pub use state::State;
pub use tally::{Score, Tally};

use serde::{Deserialize, Serialize};

/// The error of a model, by where it comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sources {
    /// Weights and biases in integers, activations in float.
    pub weights: Score,
    /// Activations in integers, weights and biases in float.
    pub activations: Score,
    /// The quantized model.
    pub both: Score,
    /// The float model, where there are labels.
    pub float_accuracy: Option<f64>,
}

/// What a layer's integers cost, or those of layers that read the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerSensitivity {
    /// The layer.
    #[serde(flatten)]
    pub layer: Layer,
    /// Nodes of the other layers that are looked at together with it.
    pub with: Vec<String>,
    /// It alone in integers.
    pub only: Score,
    /// It alone in float: what the layer reads isn't rounded for it, nor is what it makes.
    pub without: Score,
}

/// All that is found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// Samples that outputs were compared on.
    pub samples: usize,
    /// Weights, activations, both.
    pub sources: Sources,
    /// One a quantized layer (see [`units`]), in the graph's order.
    pub layers: Vec<LayerSensitivity>,
    /// One a tensor with a scale of its own.
    pub activations: Vec<ActivationFigures>,
    /// One a quantized weight.
    pub weights: Vec<WeightFigures>,
}
