//! Whole processes: what a user types, what comes out, and with which exit code.
//!
//! Most models are tiny random checkpoints with a tokenizer of single bytes; both are made here.

#[path = "../assets.rs"]
mod assets;
mod blocks;
mod chain;
mod conversation;
mod damage;
mod doctor;
mod download;
mod interrupt;
mod json;
mod kill;
mod qat;
mod quality;
mod report;
mod rescue;
#[path = "../../quant/tests/onnx/small.rs"]
mod small;
mod smollm2;
mod support;
mod terminal;
mod usage;
mod vision;
