//! ONNX models: read, indexed, edited as data, written.
//!
//! ```text
//! file --decode--> Model --index--> Graph --plan--> edits --apply--> Model --save--> file
//! ```
//! Weights stay ranges of the mapped file until something changes them, and what isn't understood is passed through.

pub mod edit;
pub mod file;
pub mod fold;
pub mod graph;
pub mod proto;
pub mod tensor;
pub mod wire;

pub use edit::{Edit, apply};
pub use file::{External, Model};
pub use graph::Graph;
