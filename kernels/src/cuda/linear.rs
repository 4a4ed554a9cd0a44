//! Products with weights, and single rows of them.

use super::data::{DeviceIndices, DeviceRows, DeviceVector};
use super::gpu::{DeviceMemory, Gpu, Launch};
use super::weight::{DeviceWeight, NumbersArgument, OutliersArgument, Stored, WeightArgument};
use super::{Cuda, SCRATCH, check, size};
use crate::KernelError;
use bytemuck::{Pod, Zeroable, bytes_of};

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
    also: [AlsoArgument; 2],
}

/// `Also` of linear.cuh.
#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
struct AlsoArgument {
    codes: u64,
    scales: NumbersArgument,
    bias: u64,
    out: u64,
    n: u32,
    first: u32,
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

/// The kernels of one kind of codes.
struct Family {
    /// Bytes of shared memory that come before what every kind needs.
    table: usize,
    gemv: Shape,
    short: Shape,
    long: Shape,
    min: Shape,
    /// For up to 16, 32 and 64 rows: any weight, and one with many outputs.
    some: [[Shape; 2]; 3],
    /// For more rows, 64 a block; tiles of 16 outputs of each of its four warps, and blocks that keep a processor busy.
    many: (&'static str, usize, usize),
    embed: &'static str,
}

/// A kernel of gemv.cuh: rows of activations and tiles of 16 outputs of a block, and its warps.
#[derive(Clone, Copy)]
struct Shape {
    kernel: &'static str,
    rows: usize,
    tiles: usize,
    warps: usize,
}

const fn shape(kernel: &'static str, rows: usize, tiles: usize, warps: usize) -> Shape {
    Shape { kernel, rows, tiles, warps }
}

const W4: Family = Family {
    table: 0,
    gemv: shape("gemv_w4", 8, 1, 8),
    short: shape("gemv_short_w4", 8, 1, 4),
    long: shape("gemv_long_w4", 8, 1, 16),
    min: shape("gemv_min_w4", 8, 1, 8),
    some: [
        [shape("gemv16_w4", 16, 1, 8), shape("gemv16_wide_w4", 16, 2, 8)],
        [shape("gemv32_w4", 32, 2, 8), shape("gemv32_wide_w4", 32, 2, 4)],
        [shape("gemv64_w4", 64, 2, 8), shape("gemv64_wide_w4", 64, 2, 4)],
    ],
    many: ("gemm64_w4", 4, 1),
    embed: "embed_w4",
};
const W4_TABLE: Family = Family {
    table: 1 << 16,
    gemv: shape("gemv_w4_table", 8, 1, 8),
    short: shape("gemv_short_w4_table", 8, 1, 8),
    long: shape("gemv_long_w4_table", 8, 1, 16),
    min: shape("gemv_min_w4_table", 8, 1, 8),
    some: [
        [shape("gemv16_w4_table", 16, 1, 8), shape("gemv16_wide_w4_table", 16, 2, 8)],
        [shape("gemv32_w4_table", 32, 2, 8), shape("gemv32_wide_w4_table", 32, 2, 4)],
        [shape("gemv64_w4_table", 64, 2, 8), shape("gemv64_wide_w4_table", 64, 2, 4)],
    ],
    many: ("gemm64_w4_table", 2, 2),
    embed: "embed_w4_table",
};
const W8: Family = Family {
    table: 0,
    gemv: shape("gemv_w8", 8, 1, 8),
    short: shape("gemv_short_w8", 8, 1, 4),
    long: shape("gemv_long_w8", 8, 1, 16),
    min: shape("gemv_min_w8", 8, 1, 8),
    some: [
        [shape("gemv16_w8", 16, 1, 8), shape("gemv16_wide_w8", 16, 2, 8)],
        [shape("gemv32_w8", 32, 2, 8), shape("gemv32_wide_w8", 32, 2, 4)],
        [shape("gemv64_w8", 64, 2, 8), shape("gemv64_wide_w8", 64, 2, 4)],
    ],
    many: ("gemm64_w8", 4, 1),
    embed: "embed_w8",
};

/// One of several products with the same activations.
pub struct DeviceProduct<'a, M> {
    /// (n, k).
    pub weight: &'a DeviceWeight<M>,
    /// (n), added to each row.
    pub bias: Option<&'a DeviceVector<M>>,
    /// (rows, n).
    pub out: &'a mut DeviceRows<M>,
}

/// Whether a product's parts fit each other; the address of its bias.
fn check_product<M: DeviceMemory>(
    x: &DeviceRows<M>,
    rows: usize,
    weight: &DeviceWeight<M>,
    bias: Option<&DeviceVector<M>>,
    out: &mut DeviceRows<M>,
) -> Result<u64, KernelError> {
    x.check("activations", rows, weight.k)?;
    out.check("a product's output", rows, weight.n)?;
    out.changes();
    if let Some(bias) = bias {
        check("a bias", bias.len, weight.n)?;
    }
    Ok(bias.map_or(0, |bias| bias.values.address()))
}

impl ProductArgument {
    fn new<G: Gpu>(
        cuda: &Cuda<G>,
        weight: &WeightArgument,
        x: &DeviceRows<G::Memory>,
        rows: usize,
        bias: u64,
        accumulate: bool,
        out: &DeviceRows<G::Memory>,
    ) -> Result<ProductArgument, KernelError> {
        Ok(ProductArgument {
            weight: *weight,
            x: x.halves.address(),
            factor: x.factors.address(),
            bias,
            out: out.values.address(),
            partial: cuda.scratch.address(),
            m: size(rows)?,
            accumulate: accumulate.into(),
            split_units: weight.units,
            splits: 1,
            also: [AlsoArgument { first: u32::MAX, ..AlsoArgument::default() }; 2],
        })
    }
}

/// Units whose scales a block of gemv.cuh holds at a time.
const PHASE: usize = 256;

impl Family {
    /// The kernel for so many rows of activations, or none if there are too many for gemv.cuh. What is best where was
    /// measured on an H100, see `benches/CUDA.md`.
    fn shape(&self, rows: usize, tiles: u32, weight: &WeightArgument, processors: u32) -> Option<Shape> {
        let (tiles, units, processors) = (tiles as usize, weight.units as usize, processors as usize);
        if rows > 8 {
            let of_size = self.some.iter().find(|of_size| rows <= of_size[0].rows)?;
            return Some(of_size[usize::from(tiles >= 3 * processors)]);
        }
        let is_table = self.table > 0;
        let many = if is_table { 8 * processors } else { 3 * processors };
        Some(match () {
            () if weight.zero_kind != 0 => self.min,
            () if tiles >= many && units <= 32 => self.short,
            () if tiles <= processors && units >= 96 => self.long,
            () => self.gemv,
        })
    }
}

impl<G: Gpu> Cuda<G> {
    /// Makes the first `rows` rows of `x` ready for products: until `x` changes, [`Cuda::multiply`] may be called with
    /// them any number of times.
    ///
    /// # Errors
    /// There are not so many.
    pub fn prepare(&self, x: &mut DeviceRows<G::Memory>, rows: usize) -> Result<(), KernelError> {
        x.check("activations", rows, x.width)?;
        if x.packed.get() >= rows { Ok(()) } else { self.pack(x, rows) }
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
        let bias = check_product(x, rows, weight, bias, out)?;
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
        self.add_outliers(x, rows, weight, out)
    }

    /// Several products of the same activations, none of which is accumulated; in one launch where they are alike and
    /// rows are few.
    ///
    /// # Errors
    /// As [`Cuda::multiply`].
    pub fn multiply_all(
        &self,
        x: &DeviceRows<G::Memory>,
        rows: usize,
        products: &mut [DeviceProduct<'_, G::Memory>],
    ) -> Result<(), KernelError> {
        if let Some(launched) = self.together(x, rows, products)? {
            products[..launched]
                .iter_mut()
                .try_for_each(|product| self.add_outliers(x, rows, product.weight, product.out))?;
            return self.multiply_all(x, rows, &mut products[launched..]);
        }
        for product in products {
            self.multiply(x, rows, product.weight, product.bias, false, product.out)?;
        }
        Ok(())
    }

    /// Launches the first of the products together, if more than one of them can be, and says how many.
    fn together(
        &self,
        x: &DeviceRows<G::Memory>,
        rows: usize,
        products: &mut [DeviceProduct<'_, G::Memory>],
    ) -> Result<Option<usize>, KernelError> {
        let Some((first, others)) = products.split_first_mut() else { return Ok(None) };
        let (family, argument) = match &first.weight.stored {
            Stored::W4(argument) => (&W4, argument),
            Stored::W4Table(argument) => (&W4_TABLE, argument),
            Stored::W8(argument) => (&W8, argument),
            Stored::F32(_) | Stored::F16(_) | Stored::Bf16(_) => return Ok(None),
        };
        let alike = |other: &DeviceProduct<'_, G::Memory>| match (&first.weight.stored, &other.weight.stored) {
            (Stored::W4(a), Stored::W4(b))
            | (Stored::W4Table(a), Stored::W4Table(b))
            | (Stored::W8(a), Stored::W8(b)) => a.is_alike(b),
            _ => false,
        };
        let count = others.iter().take(2).take_while(|other| alike(other)).count();
        if count == 0 || rows == 0 || rows > 8 || argument.zero_kind != 0 || argument.n == 0 {
            return Ok(None);
        }
        let others = &mut others[..count];
        let bias = check_product(x, rows, first.weight, first.bias, first.out)?;
        let mut product = ProductArgument::new(self, argument, x, rows, bias, false, first.out)?;
        let mut tiles = argument.n.div_ceil(16);
        for (also, other) in product.also.iter_mut().zip(others) {
            let bias = check_product(x, rows, other.weight, other.bias, other.out)?;
            let (Stored::W4(weight) | Stored::W4Table(weight) | Stored::W8(weight)) = &other.weight.stored else {
                continue;
            };
            let (codes, scales) = weight.codes_and_scales();
            *also = AlsoArgument { codes, scales, bias, out: other.out.values.address(), n: weight.n, first: tiles };
            tiles += weight.n.div_ceil(16);
        }
        self.few(family, family.shape(rows, tiles, argument, self.gpu.processors()), rows, tiles, &product)?;
        Ok(Some(1 + count))
    }

    /// Launches a kernel of gemv.cuh over so many tiles.
    fn few(
        &self,
        family: &Family,
        shape: Option<Shape>,
        rows: usize,
        tiles: u32,
        product: &ProductArgument,
    ) -> Result<bool, KernelError> {
        let Some(shape) = shape else { return Ok(false) };
        let scales = (product.weight.units as usize).min(PHASE / shape.tiles) * shape.tiles * 128;
        let mins = if product.weight.zero_kind == 0 { 0 } else { scales };
        let held = if family.table > 0 { family.table + mins } else { scales + mins };
        let shared = held.max(shape.warps * shape.tiles * 640);
        let grid = [tiles.div_ceil(size(shape.tiles)?), size(rows.div_ceil(shape.rows))?, 1];
        let launch = Launch::new(shape.kernel, grid, size(32 * shape.warps)?, bytes_of(product));
        self.gpu.launch(&launch.with_shared(size(shared)?))?;
        Ok(true)
    }

    fn add_outliers(
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
        let mut product = ProductArgument::new(self, weight, x, rows, bias, accumulate, out)?;
        let tiles = weight.n.div_ceil(16);
        let shape = family.shape(rows, tiles, weight, self.gpu.processors());
        if self.few(family, shape, rows, tiles, &product)? {
            return Ok(());
        }
        let (kernel, tiles, busy) = family.many;
        let (tokens, outputs) = (64, 4 * 16 * tiles);
        let (wide, high) = (n.div_ceil(outputs), rows.div_ceil(tokens));
        let parts = self.parts(busy, wide * high, units, rows * n);
        let split_units = units.div_ceil(parts).max(1);
        let splits = units.div_ceil(split_units).max(1);
        (product.split_units, product.splits) = (size(split_units)?, size(splits)?);
        let grid = [size(wide)?, size(high)?, size(splits)?];
        self.gpu.launch(&Launch::new(kernel, grid, 128, bytes_of(&product)))?;
        if splits > 1 {
            let grid = [size((rows * n).div_ceil(256))?, 1, 1];
            self.gpu.launch(&Launch::new("gemm_sum", grid, 256, bytes_of(&product)))?;
        }
        Ok(())
    }

    /// Parts of K that keep the device busy with so many blocks a processor, as many as the scratch holds sums of.
    fn parts(&self, busy: usize, blocks: usize, units: usize, outputs: usize) -> usize {
        let wanted = (busy * self.gpu.processors() as usize).div_ceil(blocks.max(1));
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
        indices: &mut DeviceIndices<G::Memory>,
        factor: f32,
        out: &mut DeviceRows<G::Memory>,
    ) -> Result<(), KernelError> {
        out.check("embeddings", tokens.len(), weight.k)?;
        out.changes();
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
