//! The driver beside others who use it: in their stream, from memory that they own into memory that they are given.

use super::{Driver, DriverMemory, refusal};
use crate::KernelError;
use crate::cuda::{Cuda, DeviceVector, DeviceWeight, check};
use cudarc::driver::{CudaSlice, CudaStream, CudaView, DevicePtr};
use std::sync::Arc;

impl Driver {
    /// Works in a stream that someone else puts work into too.
    ///
    /// # Errors
    /// Its GPU is too old.
    pub fn within(stream: Arc<CudaStream>) -> Result<Driver, KernelError> {
        Driver::with(stream)
    }

    /// Memory of someone else.
    ///
    /// # Safety
    /// From `address` on, `bytes` bytes of this GPU's memory stay allocated until the stream has done what is asked for
    /// while the result lives.
    unsafe fn foreign(&self, address: u64, bytes: usize) -> DriverMemory {
        DriverMemory { address, bytes, work: self.work.clone(), _slice: None }
    }
}

impl Cuda<Driver> {
    /// `x * weight^T (+ bias)` for `rows` rows (rows, k) that lie in someone's memory, as (rows, n) in memory of its own; put
    /// into the stream when this returns, and allocated there.
    ///
    /// # Errors
    /// Shapes don't fit each other; or the device has no memory for the result.
    pub fn product_of(
        &self,
        x: &CudaView<'_, f32>,
        rows: usize,
        weight: &DeviceWeight<DriverMemory>,
        bias: Option<&DeviceVector<DriverMemory>>,
    ) -> Result<CudaSlice<f32>, KernelError> {
        let (n, k) = (weight.n(), weight.k());
        check("activations", x.len(), rows * k)?;
        let stream = &self.gpu.work.stream;
        if rows * n * k == 0 {
            return stream.alloc_zeros(rows * n).map_err(refusal("memory for a product"));
        }
        // SAFETY: the product writes every value: all columns of all rows.
        let out = unsafe { stream.alloc::<f32>(rows * n) }.map_err(refusal("memory for a product"))?;
        {
            let ((from, _reading), (to, _writing)) = (x.device_ptr(stream), out.device_ptr(stream));
            // SAFETY: both live until the end of this block, where the work is in the stream in which they are freed.
            let (from, to) = unsafe { (self.gpu.foreign(from, 4 * x.len()), self.gpu.foreign(to, 4 * out.len())) };
            let (x, mut y) = (self.rows_over(from, rows, k)?, self.rows_over(to, rows, n)?);
            self.prepare(&x, rows)?;
            self.multiply(&x, rows, weight, bias, false, &mut y)?;
            self.gpu.work.flush()?;
        }
        Ok(out)
    }
}
