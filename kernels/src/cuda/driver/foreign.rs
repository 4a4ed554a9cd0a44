//! The driver beside others who use it: in their stream, on memory that they own.

use super::{Driver, DriverMemory};
use crate::KernelError;
use cudarc::driver::CudaStream;
use std::sync::Arc;

impl Driver {
    /// Works in a stream that someone else puts work into too. [`Driver::flush`] has to come before theirs that needs what
    /// was asked for here.
    ///
    /// # Errors
    /// Its GPU is too old.
    pub fn within(stream: Arc<CudaStream>) -> Result<Driver, KernelError> {
        Driver::with(stream)
    }

    /// Puts everything that was asked for into the stream.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn flush(&self) -> Result<(), KernelError> {
        self.work.flush()
    }

    /// Memory of someone else.
    ///
    /// # Safety
    /// From `address` on, `bytes` bytes of this GPU's memory stay allocated until the stream has done what is asked for
    /// while the result lives.
    pub unsafe fn foreign(&self, address: u64, bytes: usize) -> DriverMemory {
        DriverMemory { address, bytes, work: self.work.clone(), _slice: None }
    }
}
