//! The fused kernels inside any candle model: [`QuantLinear`] is a `candle_nn::Module` over a packed weight.
//!
//! candle is the float world at the edges: autograd, `.pth` files, other people's models. The serving path
//! ([`crate::decoder`]) does not go through candle tensors.

#[cfg(feature = "candle-cuda")]
mod cuda;

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};
use nibble_kernels::{ActKind, Product};
use nibble_kernels::{Activations, PackedWeight, Pool};
use std::ops::Range;
use std::sync::Arc;

/// `y = x * weight^T + bias` with a packed weight, for f32 tensors (.., k) -> (.., n): on the CPU, and with the
/// feature `candle-cuda` on NVIDIA GPUs.
#[derive(Clone)]
pub struct QuantLinear {
    op: Arc<QuantMatmul>,
}

impl QuantLinear {
    /// Wraps a packed weight (n, k) and an optional bias (n). `act` says whether activations are quantized to int8
    /// on the way.
    ///
    /// # Errors
    /// The bias is not (n).
    pub fn new(
        weight: PackedWeight,
        bias: Option<Vec<f32>>,
        act: ActKind,
        pool: Arc<Pool>,
    ) -> candle_core::Result<Self> {
        if let Some(bias) = &bias
            && bias.len() != weight.n()
        {
            candle_core::bail!("a bias of {} values for a weight of {} rows", bias.len(), weight.n());
        }
        let op = QuantMatmul {
            weight,
            bias,
            act,
            pool,
            #[cfg(feature = "candle-cuda")]
            resident: std::sync::Mutex::default(),
        };
        Ok(QuantLinear { op: Arc::new(op) })
    }
}

impl candle_nn::Module for QuantLinear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        x.contiguous()?.apply_op1_no_bwd(self.op.as_ref())
    }
}

struct QuantMatmul {
    weight: PackedWeight,
    bias: Option<Vec<f32>>,
    act: ActKind,
    pool: Arc<Pool>,
    /// The weight's copy on a GPU.
    #[cfg(feature = "candle-cuda")]
    resident: std::sync::Mutex<Option<cuda::Resident>>,
}

impl QuantMatmul {
    /// Where the values of a contiguous (.., k) lie, how many rows they are, and the result's shape.
    fn shapes(&self, layout: &Layout) -> candle_core::Result<(Range<usize>, usize, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("{} takes contiguous tensors, got strides {:?}", self.name(), layout.stride());
        };
        let mut dims = layout.dims().to_vec();
        let (n, k) = (self.weight.n(), self.weight.k());
        let Some(last) = dims.last_mut().filter(|last| **last == k) else {
            candle_core::bail!("{} takes (.., {k}), got {:?}", self.name(), layout.shape());
        };
        *last = n;
        Ok((start..end, (end - start) / k.max(1), Shape::from(dims)))
    }
}

impl CustomOp1 for QuantMatmul {
    fn name(&self) -> &'static str {
        "nibble-quant-matmul"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let CpuStorage::F32(values) = storage else {
            candle_core::bail!("{} takes f32, got {:?}", self.name(), layout.shape());
        };
        let (range, rows, shape) = self.shapes(layout)?;
        let (n, k) = (self.weight.n(), self.weight.k());
        let mut activations = Activations::with_capacity(rows, k);
        activations.fill(rows, k, &values[range]).map_err(candle_core::Error::wrap)?;
        let mut out = vec![0f32; rows * n];
        let mut products =
            [Product { weight: &self.weight, bias: self.bias.as_deref(), accumulate: false, out: &mut out }];
        nibble_kernels::multiply(&self.pool, &mut activations, &mut products, self.act)
            .map_err(candle_core::Error::wrap)?;
        Ok((CpuStorage::F32(out), shape))
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(
        &self,
        storage: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        self.on_cuda(storage, layout)
    }
}
