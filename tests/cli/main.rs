//! Whole processes: what a user types, what comes out, and with which exit code.
//!
//! Models are tiny random checkpoints with a tokenizer of single bytes; both are made here.

mod chain;
mod conversation;
mod damage;
mod interrupt;
mod json;
mod support;
mod usage;
