//! Laws of the ONNX side: files, tensors, graphs, folding, QDQ.

#[path = "onnx/file.rs"]
mod file;
#[path = "onnx/fold.rs"]
mod fold;
#[path = "onnx/graph.rs"]
mod graph;
#[path = "onnx/interpreter.rs"]
mod interpreter;
#[path = "onnx/opset.rs"]
mod opset;
#[path = "onnx/qdq.rs"]
mod qdq;
#[path = "onnx/small.rs"]
mod small;
#[path = "onnx/terms.rs"]
mod terms;
