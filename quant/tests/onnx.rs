//! Laws of the ONNX side: files, tensors, graphs, folding, QDQ.

#[path = "onnx/file.rs"]
mod file;
#[path = "onnx/graph.rs"]
mod graph;
