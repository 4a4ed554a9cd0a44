//! The same operations on an NVIDIA GPU: kernels in `kernels/cuda`, shipped as PTX, launched over [`Gpu`].
//!
//! [`Gpu`] is what a device can do: give memory, copy, launch. With the feature `cuda`, `driver::Driver` is one, over
//! whatever driver the machine has; the tests have another one that interprets the PTX, so that every launch of this
//! module is run and checked on machines without a GPU. [`Cuda`] is the operations: it checks that what a kernel will
//! touch is there, and launches.
//!
//! ```text
//! a product   rows -> halves, each row times a power of two (by norms and gates at once)
//!             few (up to 8 rows), gemv (up to 64) or gemm; from 33 on wgmma where the device has it
//! attention   append keys and values, attend chunk by chunk, merge chunks
//! ```
//! Sums are taken in an order that depends on shapes (and on the device's number of processors), never on timing.

mod attention;
mod choice;
mod data;
#[cfg(feature = "cuda")]
pub mod driver;
mod embed;
mod few;
mod gpu;
mod linear;
mod rows;
mod weight;
mod wgmma;

pub use attention::{CacheKind, CacheShape, CudaAttention, DeviceCache, DeviceToken};
pub use choice::Largest;
pub use data::{DeviceIndices, DeviceRope, DeviceRows, DeviceTable, DeviceVector, Place};
pub use gpu::{DeviceMemory, Gpu, Launch, MODULES, Ptx};
pub use linear::{DeviceNorm, DeviceProduct};
pub use weight::DeviceWeight;

use crate::KernelError;

/// Bytes for sums of parts: of K in products, of keys in attention. More parts than fit are not made.
const SCRATCH: usize = 32 << 20;

/// The operations on one device.
#[derive(Debug)]
pub struct Cuda<G: Gpu> {
    gpu: G,
    scratch: G::Memory,
}

impl<G: Gpu> Cuda<G> {
    /// Operations on this device.
    ///
    /// # Errors
    /// The device has no memory for its scratch.
    pub fn new(gpu: G) -> Result<Cuda<G>, KernelError> {
        let scratch = gpu.allocate(SCRATCH)?;
        Ok(Cuda { gpu, scratch })
    }

    /// The device.
    pub fn gpu(&self) -> &G {
        &self.gpu
    }
}

fn check(what: &'static str, found: usize, wanted: usize) -> Result<(), KernelError> {
    if found == wanted { Ok(()) } else { Err(KernelError::Length { what, found, wanted }) }
}

fn check_room(what: &'static str, found: usize, wanted: usize) -> Result<(), KernelError> {
    if found >= wanted { Ok(()) } else { Err(KernelError::Length { what, found, wanted }) }
}

/// A size as kernels take it.
fn size(value: usize) -> Result<u32, KernelError> {
    u32::try_from(value).map_err(|_| KernelError::Cuda { why: format!("{value} is more than kernels count to") })
}

/// What kernels divide by `divisor` with: floor(2^32 / divisor) + 1; 0 stands for 1.
fn magic(divisor: usize) -> Result<u32, KernelError> {
    if divisor > 1 { size((1 << 32) / divisor + 1) } else { Ok(0) }
}
