//! What `kernels/cuda/embed.cu` computes: single rows of weights, products with weights in floats, and with outliers.

use super::data::{DeviceIndices, DeviceRows};
use super::gpu::{DeviceMemory, Gpu, Launch};
use super::weight::{Codes, DeviceWeight, OutliersArgument, Stored, WeightArgument};
use super::{Cuda, size};
use crate::KernelError;
use bytemuck::{Pod, Zeroable, bytes_of};

/// `Dense` of embed.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct DenseArgument {
    weight: u64,
    x: u64,
    bias: u64,
    out: u64,
    tokens: u64,
    n: u32,
    k: u32,
    m: u32,
    accumulate: u32,
    factor: f32,
    unused: u32,
}

/// `Embed` of embed.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct EmbedArgument {
    weight: WeightArgument,
    outliers: OutliersArgument,
    tokens: u64,
    out: u64,
    width: u32,
    factor: f32,
}

/// `OutlierProduct` of embed.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct OutlierArgument {
    outliers: OutliersArgument,
    x: u64,
    out: u64,
    n: u32,
    k: u32,
}

impl Codes {
    fn embed(self) -> &'static str {
        match self {
            Codes::W4 => "embed_w4",
            Codes::W4Table => "embed_w4_table",
            Codes::W8 => "embed_w8",
        }
    }
}

impl<G: Gpu> Cuda<G> {
    /// `out += x * outliers^T`, for a weight that has any.
    pub(super) fn add_outliers(
        &self,
        x: &DeviceRows<G::Memory>,
        rows: usize,
        weight: &DeviceWeight<G::Memory>,
        out: &mut DeviceRows<G::Memory>,
    ) -> Result<(), KernelError> {
        let Some(outliers) = weight.outliers else { return Ok(()) };
        let (n, k) = (size(weight.n)?, size(weight.k)?);
        let argument = OutlierArgument { outliers, x: x.values.address(), out: out.values.address(), n, k };
        let grid = [n.div_ceil(8), size(rows)?, 1];
        self.gpu.launch(&Launch::new("outliers_add", grid, 256, bytes_of(&argument)))
    }

    #[allow(clippy::too_many_arguments)] // a product, and which kernel it is for
    /// A product with a weight in floats.
    pub(super) fn dense(
        &self,
        kernel: &'static str,
        at: u64,
        weight: &DeviceWeight<G::Memory>,
        x: &DeviceRows<G::Memory>,
        rows: usize,
        bias: u64,
        accumulate: bool,
        out: &mut DeviceRows<G::Memory>,
    ) -> Result<(), KernelError> {
        let argument = DenseArgument {
            weight: at,
            x: x.values.address(),
            bias,
            out: out.values.address(),
            tokens: 0,
            n: size(weight.n)?,
            k: size(weight.k)?,
            m: size(rows)?,
            accumulate: accumulate.into(),
            factor: 1.0,
            unused: 0,
        };
        let grid = [size(weight.n.div_ceil(8))?, size(rows.div_ceil(8))?, 1];
        self.gpu.launch(&Launch::new(kernel, grid, 256, bytes_of(&argument)))
    }

    /// Row i of `out` = factor * row `tokens[i]` of the weight.
    ///
    /// # Errors
    /// Widths differ, there is no room, or a token has no row.
    pub fn embed(
        &self,
        weight: &DeviceWeight<G::Memory>,
        tokens: &[u32],
        indices: &mut DeviceIndices<G::Memory>,
        factor: f32,
        out: &mut DeviceRows<G::Memory>,
    ) -> Result<(), KernelError> {
        out.check("embeddings", tokens.len(), weight.k)?;
        out.changes();
        let rows = self.set_indices(indices, tokens, weight.n)?;
        let (codes, argument) = match &weight.stored {
            Stored::Codes(codes, argument) => (codes, argument),
            Stored::F32(at) => return self.embed_dense("embed_f32", *at, weight, rows, tokens.len(), factor, out),
            Stored::F16(at) => return self.embed_dense("embed_f16", *at, weight, rows, tokens.len(), factor, out),
            Stored::Bf16(at) => return self.embed_dense("embed_bf16", *at, weight, rows, tokens.len(), factor, out),
        };
        let argument = EmbedArgument {
            weight: *argument,
            outliers: weight.outliers.unwrap_or_default(),
            tokens: rows,
            out: out.values.address(),
            width: size(weight.k)?,
            factor,
        };
        self.gpu.launch(&Launch::new(codes.embed(), [size(tokens.len())?, 1, 1], 256, bytes_of(&argument)))
    }

    #[allow(clippy::too_many_arguments)] // a lookup, and which kernel it is for
    fn embed_dense(
        &self,
        kernel: &'static str,
        at: u64,
        weight: &DeviceWeight<G::Memory>,
        tokens: u64,
        count: usize,
        factor: f32,
        out: &mut DeviceRows<G::Memory>,
    ) -> Result<(), KernelError> {
        let (n, k) = (size(weight.n)?, size(weight.k)?);
        let (out, m) = (out.values.address(), size(count)?);
        let argument =
            DenseArgument { weight: at, x: 0, bias: 0, out, tokens, n, k, m, accumulate: 0, factor, unused: 0 };
        self.gpu.launch(&Launch::new(kernel, [m, 1, 1], 256, bytes_of(&argument)))
    }
}
