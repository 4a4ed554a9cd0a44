//! What `nibble doctor` asks a GPU.

use super::Device;
use nibble_kernels::cuda::Gpu;

pub fn the_doctors_products_are_right<G: Gpu>(device: Device<'_, G>) {
    let (count, wrong) = nibble_kernels::probe::gpu(&device(4)).unwrap();
    assert!(count >= 9 && wrong.is_empty(), "{count} products, wrong: {wrong:?}");
}
