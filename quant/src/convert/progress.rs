//! How a conversion tells what it is doing; the command line draws bars from it.

use crate::manifest::TensorRecord;

/// Told about a conversion's course, from several threads.
pub trait Progress: Sync {
    /// A stretch of work begins: this many tensors and bytes are to be read. A conversion has two: it converts the
    /// tensors, and reads again what it has written.
    fn start(&self, what: Stage, tensors: usize, bytes: u64);
    /// Bytes of this stretch are done (or were found finished by an earlier run).
    fn advance(&self, bytes: u64);
    /// A tensor is finished.
    fn tensor_done(&self, tensor: &TensorRecord);
    /// Something the user should know.
    fn message(&self, text: &str);
}

/// What a stretch of work is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Tensors are converted.
    Convert,
    /// Files are read again: hashed, decoded, looked at.
    Verify,
}

/// Says nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn start(&self, _: Stage, _: usize, _: u64) {}
    fn advance(&self, _: u64) {}
    fn tensor_done(&self, _: &TensorRecord) {}
    fn message(&self, _: &str) {}
}
