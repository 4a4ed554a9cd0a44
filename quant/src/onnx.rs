//! ONNX models: read, indexed, edited as data, written.
//!
//! ```text
//! file --decode--> Model --index--> Graph --plan--> edits --apply--> Model --save--> file
//! ```
//! Weights stay ranges of the mapped file until something changes them, and what isn't understood is passed through.

pub mod branch;
pub mod edit;
pub mod equalize;
pub mod file;
pub mod fold;
pub mod graph;
pub mod groups;
pub mod isolate;
pub mod opset;
pub mod plan;
pub mod proto;
pub mod qdq;
pub mod report;
pub mod select;
pub mod tensor;
pub mod weights;
pub mod wire;

pub use edit::{Edit, apply};
pub use file::{External, Model};
pub use fold::{Folded, fold};
pub use graph::Graph;
pub use plan::{Fine, Mode, Packing, Plan, Settings, Target, plan};
pub use qdq::Calibration;
pub use select::Selector;
