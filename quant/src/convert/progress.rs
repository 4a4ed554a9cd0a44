//! How a conversion tells what it is doing; the command line draws bars from it.

use crate::manifest::TensorRecord;

/// Told about a conversion's course, from several threads.
pub trait Progress: Sync {
    /// Work begins: this many tensors and bytes are to be read.
    fn start(&self, tensors: usize, bytes: u64);
    /// Bytes of the source were converted (or found finished by an earlier run).
    fn advance(&self, bytes: u64);
    /// A tensor is finished.
    fn tensor_done(&self, tensor: &TensorRecord);
    /// Something the user should know.
    fn message(&self, text: &str);
}

/// Says nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn start(&self, _: usize, _: u64) {}
    fn advance(&self, _: u64) {}
    fn tensor_done(&self, _: &TensorRecord) {}
    fn message(&self, _: &str) {}
}
