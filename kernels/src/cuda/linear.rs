//! Products with weights, and single rows of them.

use super::gpu::{DeviceMemory, Gpu, Launch};
use super::rows::{DeviceIndices, DeviceRows, DeviceVector};
use super::weight::{DeviceWeight, OutliersArgument, Stored, WeightArgument};
use super::{Cuda, SCRATCH, check, size};
use crate::KernelError;
use bytemuck::{Pod, Zeroable, bytes_of};

/// Rows of activations that one pass over the weight serves without tensor-core tiles of tokens.
const FEW: usize = 8;
/// Warps of a block of few rows.
const MOST_WARPS: usize = 8;
/// Least units of K (64 values) in a part: fewer aren't worth adding.
const LEAST_PART: usize = 4;

/// `Product` of linear.cuh.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ProductArgument {
    weight: WeightArgument,
    x: u64,
    factor: u64,
    bias: u64,
    out: u64,
    partial: u64,
    m: u32,
    accumulate: u32,
    split_units: u32,
    splits: u32,
}

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

/// The kernels of one kind of codes: for few rows, then for tiles of 16, 32 and 64.
struct Family {
    few: &'static str,
    tiles: [&'static str; 3],
    embed: &'static str,
}

const W4: Family = Family { few: "gemv_w4", tiles: ["gemm16_w4", "gemm32_w4", "gemm64_w4"], embed: "embed_w4" };
const W4_TABLE: Family = Family {
    few: "gemv_w4_table",
    tiles: ["gemm16_w4_table", "gemm32_w4_table", "gemm64_w4_table"],
    embed: "embed_w4_table",
};
const W8: Family = Family { few: "gemv_w8", tiles: ["gemm16_w8", "gemm32_w8", "gemm64_w8"], embed: "embed_w8" };

/// Tokens and outputs of a block of each of [`Family::tiles`].
const TILES: [(usize, usize); 3] = [(16, 64), (32, 64), (64, 128)];

impl<G: Gpu> Cuda<G> {
    /// Makes the first `rows` rows of `x` ready for products: until `x` changes, [`Cuda::multiply`] may be called with
    /// them any number of times.
    ///
    /// # Errors
    /// There are not so many.
    pub fn prepare(&self, x: &mut DeviceRows<G::Memory>, rows: usize) -> Result<(), KernelError> {
        x.check("activations", rows, x.width)?;
        self.pack(x, rows)
    }

    /// `out = x * weight^T (+ bias) (+ out if accumulate)`, for `rows` rows of `x` that [`Cuda::prepare`] was called
    /// with.
    ///
    /// # Errors
    /// Shapes don't fit each other.
    pub fn multiply(
        &self,
        x: &DeviceRows<G::Memory>,
        rows: usize,
        weight: &DeviceWeight<G::Memory>,
        bias: Option<&DeviceVector<G::Memory>>,
        accumulate: bool,
        out: &mut DeviceRows<G::Memory>,
    ) -> Result<(), KernelError> {
        x.check("activations", rows, weight.k)?;
        out.check("a product's output", rows, weight.n)?;
        if let Some(bias) = bias {
            check("a bias", bias.len, weight.n)?;
        }
        let bias = bias.map_or(0, |bias| bias.values.address());
        if weight.n == 0 {
            return Ok(());
        }
        match &weight.stored {
            Stored::W4(argument) => self.coded(&W4, argument, x, rows, bias, accumulate, out)?,
            Stored::W4Table(argument) => self.coded(&W4_TABLE, argument, x, rows, bias, accumulate, out)?,
            Stored::W8(argument) => self.coded(&W8, argument, x, rows, bias, accumulate, out)?,
            Stored::F32(at) => self.dense("dense_f32", *at, weight, x, rows, bias, accumulate, out)?,
            Stored::F16(at) => self.dense("dense_f16", *at, weight, x, rows, bias, accumulate, out)?,
            Stored::Bf16(at) => self.dense("dense_bf16", *at, weight, x, rows, bias, accumulate, out)?,
        }
        if let Some(outliers) = weight.outliers {
            let (n, k) = (size(weight.n)?, size(weight.k)?);
            let argument = OutlierArgument { outliers, x: x.values.address(), out: out.values.address(), n, k };
            let grid = [n.div_ceil(8), size(rows)?, 1];
            self.gpu.launch(&Launch::new("outliers_add", grid, 256, bytes_of(&argument)))?;
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)] // a product, and which kernels it is for
    fn coded(
        &self,
        family: &Family,
        weight: &WeightArgument,
        x: &DeviceRows<G::Memory>,
        rows: usize,
        bias: u64,
        accumulate: bool,
        out: &mut DeviceRows<G::Memory>,
    ) -> Result<(), KernelError> {
        let (n, units) = (weight.n as usize, weight.units as usize);
        let mut product = ProductArgument {
            weight: *weight,
            x: x.halves.address(),
            factor: x.factors.address(),
            bias,
            out: out.values.address(),
            partial: self.scratch.address(),
            m: size(rows)?,
            accumulate: accumulate.into(),
            split_units: weight.units,
            splits: 1,
        };
        if rows <= FEW {
            let threads = 32 * size(units.clamp(1, MOST_WARPS))?;
            let grid = [size(n.div_ceil(16))?, 1, 1];
            return self.gpu.launch(&Launch::new(family.few, grid, threads, bytes_of(&product)));
        }
        let kind = TILES.iter().position(|(tokens, _)| rows <= *tokens).unwrap_or(TILES.len() - 1);
        let (tokens, outputs) = TILES[kind];
        let (wide, high) = (n.div_ceil(outputs), rows.div_ceil(tokens));
        let parts = self.parts(wide * high, units, rows * n);
        let split_units = units.div_ceil(parts).max(1);
        let splits = units.div_ceil(split_units).max(1);
        (product.split_units, product.splits) = (size(split_units)?, size(splits)?);
        let grid = [size(wide)?, size(high)?, size(splits)?];
        self.gpu.launch(&Launch::new(family.tiles[kind], grid, 128, bytes_of(&product)))?;
        if splits > 1 {
            let grid = [size((rows * n).div_ceil(256))?, 1, 1];
            self.gpu.launch(&Launch::new("gemm_sum", grid, 256, bytes_of(&product)))?;
        }
        Ok(())
    }

    /// Parts of K that keep the device busy: about two blocks a processor, as many as the scratch holds sums of.
    fn parts(&self, blocks: usize, units: usize, outputs: usize) -> usize {
        let wanted = (2 * self.gpu.processors() as usize).div_ceil(blocks.max(1));
        wanted.min(units / LEAST_PART).min(SCRATCH / (outputs * 4).max(1)).max(1)
    }

    #[allow(clippy::too_many_arguments)] // a product, and which kernel it is for
    fn dense(
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
        indices: &DeviceIndices<G::Memory>,
        factor: f32,
        out: &mut DeviceRows<G::Memory>,
    ) -> Result<(), KernelError> {
        out.check("embeddings", tokens.len(), weight.k)?;
        let rows = self.set_indices(indices, tokens, weight.n)?;
        let (family, argument) = match &weight.stored {
            Stored::W4(argument) => (&W4, argument),
            Stored::W4Table(argument) => (&W4_TABLE, argument),
            Stored::W8(argument) => (&W8, argument),
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
        self.gpu.launch(&Launch::new(family.embed, [size(tokens.len())?, 1, 1], 256, bytes_of(&argument)))
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
