//! Training small vision models, and training models further with the rounding that integers bring
//! (quantization-aware training, QAT).
//!
//! ```text
//! ONNX --fold, plan, qdq--> quantized graph --Net--> fake quantization in candle --train--> codes and scales --> ONNX
//! ```
//! [`arch`] makes models to train from scratch, [`dataset`] reads samples with labels, [`net`] is a graph as a network,
//! [`train`] the loop around it.

pub mod adaround;
pub mod arch;
pub mod checkpoint;
pub mod dataset;
pub mod loss;
pub mod net;
pub mod ops;
pub mod optimizer;
pub mod quantizer;
pub mod train;
