//! Tests that cross crates, in one binary: the house checks itself, and helpers find what scripts/test.sh fetched.
#![cfg(test)]

mod architecture;
mod assets;
mod bridge;
mod cuda;
mod fetched;
mod oracle;
mod ptx;
mod qat;
mod real_weights;
#[path = "../quant/tests/onnx/small.rs"]
mod small;
mod tokens;
mod transform;
mod vision;
