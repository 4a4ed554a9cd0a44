//! [`super::QuantLinear`] on candle's GPU tensors: in candle's stream, from candle's memory into candle's memory.

use super::QuantMatmul;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDevice, DeviceId};
use candle_core::{CudaStorage, Error, Layout, Result, Shape};
use nibble_kernels::KernelError;
use nibble_kernels::cuda::driver::{Driver, DriverMemory};
use nibble_kernels::cuda::{Cuda, DeviceVector, DeviceWeight};
use std::sync::{Arc, Mutex, PoisonError};

/// Operations in a device's stream. One product at a time: they share the memory for parts of sums.
type Shared = Arc<Mutex<Cuda<Driver>>>;

/// The operations of the devices that were met so far: each has the kernels and the scratch memory once.
static DEVICES: Mutex<Vec<(DeviceId, Shared)>> = Mutex::new(Vec::new());

fn operations(device: &CudaDevice) -> Result<Shared> {
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, shared)) = devices.iter().find(|(id, _)| *id == device.id()) {
        return Ok(shared.clone());
    }
    let driver = Driver::within(device.cuda_stream()).map_err(Error::wrap)?;
    let shared = Arc::new(Mutex::new(Cuda::new(driver).map_err(Error::wrap)?));
    devices.push((device.id(), shared.clone()));
    Ok(shared)
}

/// A weight and its bias on the device that they were last asked for on.
pub(super) struct Resident {
    device: DeviceId,
    weight: DeviceWeight<DriverMemory>,
    bias: Option<DeviceVector<DriverMemory>>,
}

impl QuantMatmul {
    pub(super) fn on_cuda(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (range, rows, shape) = self.shapes(layout)?;
        let device = storage.device().clone();
        let values = storage.as_cuda_slice::<f32>()?.slice(range);
        let shared = operations(&device)?;
        let cuda = shared.lock().unwrap_or_else(PoisonError::into_inner);
        let mut resident = self.resident.lock().unwrap_or_else(PoisonError::into_inner);
        let here = match resident.take().filter(|resident| resident.device == device.id()) {
            Some(here) => here,
            None => self.move_to(&cuda, device.id()).map_err(Error::wrap)?,
        };
        let here = resident.insert(here);
        let out = cuda.product_of(&values, rows, &here.weight, here.bias.as_ref()).map_err(Error::wrap)?;
        Ok((CudaStorage::wrap_cuda_slice(out, device), shape))
    }

    fn move_to(&self, cuda: &Cuda<Driver>, device: DeviceId) -> std::result::Result<Resident, KernelError> {
        let bias = self.bias.as_deref().map(|bias| cuda.vector(bias)).transpose()?;
        Ok(Resident { device, weight: cuda.weight(&self.weight)?, bias })
    }
}
