//! Floor 1: what numbers mean and how they are stored.
//!
//! [`QuantSpec`] is the arithmetic of one tensor as data, [`QTensor`] a tensor in that arithmetic: file formats decode
//! to it, algorithms produce it, kernels pack from it. It lives for one tensor at a time, so that a conversion's memory
//! is bounded by its largest tensor.

pub mod algo;
pub mod bits;
pub mod convert;
pub mod error;
mod first;
pub mod format;
mod linalg;
pub mod manifest;
mod names;
pub mod nf4;
pub mod observer;
pub mod onnx;
mod pack;
pub mod presets;
pub mod qtensor;
pub mod recipe;
pub mod role;
pub mod scheme;
pub mod spec;
pub mod stats;
pub mod transform;

pub use algo::{ALGORITHMS, AlgoInput, Algorithm};
pub use error::{QuantError, Result};
pub use observer::{OBSERVERS, Observer};
pub use presets::{PRESETS, Preset};
pub use qtensor::{QTensor, ScaleData, ZeroData};
pub use recipe::{Decision, Keep, Recipe, Rule};
pub use role::Role;
pub use scheme::{Activation, KvFormat, QuantScheme};
pub use spec::{
    FloatFormat, Granularity, Grid, OutlierSpec, QuantSpec, Range, ScaleFormat, Span, SpecBytes, Table, Zero,
};
