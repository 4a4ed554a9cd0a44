//! Products with weights.

use super::data::{DeviceRows, DeviceVector, Order};
use super::few::{FEW, alike};
use super::gpu::{DeviceMemory, Gpu, Launch};
use super::weight::{Codes, DeviceWeight, NumbersArgument, Stored, WeightArgument};
use super::{Cuda, SCRATCH, check, size};
use crate::KernelError;
use crate::ops::math::Function;
use bytemuck::{Pod, Zeroable, bytes_of};

/// Least units of K (64 values) in a part: fewer aren't worth adding.
const LEAST_PART: usize = 4;

/// `Product` of linear.cuh.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct ProductArgument {
    pub(super) weight: WeightArgument,
    x: u64,
    factor: u64,
    bias: u64,
    out: u64,
    partial: u64,
    pub(super) m: u32,
    accumulate: u32,
    split_units: u32,
    pub(super) splits: u32,
    pub(super) also: [AlsoArgument; 2],
    pub(super) rows: u64,
    pub(super) gain: u64,
    pub(super) k: u32,
    pub(super) eps: f32,
    pub(super) row_warps: u32,
    pub(super) tiles: u32,
    pub(super) share: u32,
    pub(super) gate: u32,
}

/// `Also` of linear.cuh.
#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct AlsoArgument {
    pub(super) codes: u64,
    pub(super) zeros: u64,
    pub(super) scales: NumbersArgument,
    pub(super) mins: NumbersArgument,
    pub(super) bias: u64,
    pub(super) out: u64,
    pub(super) n: u32,
    pub(super) first: u32,
}

/// The kernels of one kind of codes for more than 8 rows.
struct Family {
    /// Bytes of shared memory that come before what every kind needs.
    table: usize,
    /// For up to 16, 32 and 64 rows: any weight, and one with many outputs.
    some: [[Shape; 2]; 3],
    /// For more rows, 64 a block; tiles of 16 outputs of each of its four warps, and blocks that keep a processor busy.
    many: (&'static str, usize, usize),
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
    some: [
        [shape("gemv16_w4", 16, 1, 8), shape("gemv16_wide_w4", 16, 2, 8)],
        [shape("gemv32_w4", 32, 2, 8), shape("gemv32_wide_w4", 32, 2, 4)],
        [shape("gemv64_w4", 64, 2, 8), shape("gemv64_wide_w4", 64, 2, 4)],
    ],
    many: ("gemm64_w4", 4, 1),
};
const W4_TABLE: Family = Family {
    table: 1 << 16,
    some: [
        [shape("gemv16_w4_table", 16, 1, 8), shape("gemv16_wide_w4_table", 16, 2, 8)],
        [shape("gemv32_w4_table", 32, 2, 8), shape("gemv32_wide_w4_table", 32, 2, 4)],
        [shape("gemv64_w4_table", 64, 2, 8), shape("gemv64_wide_w4_table", 64, 2, 4)],
    ],
    many: ("gemm64_w4_table", 2, 2),
};
const W8: Family = Family {
    table: 0,
    some: [
        [shape("gemv16_w8", 16, 1, 8), shape("gemv16_wide_w8", 16, 2, 8)],
        [shape("gemv32_w8", 32, 2, 8), shape("gemv32_wide_w8", 32, 2, 4)],
        [shape("gemv64_w8", 64, 2, 8), shape("gemv64_wide_w8", 64, 2, 4)],
    ],
    many: ("gemm64_w8", 4, 1),
};

impl Codes {
    fn family(self) -> &'static Family {
        match self {
            Codes::W4 => &W4,
            Codes::W4Table => &W4_TABLE,
            Codes::W8 => &W8,
        }
    }
}

/// One of several products with the same activations.
pub struct DeviceProduct<'a, M> {
    /// (n, k).
    pub weight: &'a DeviceWeight<M>,
    /// (n), added to each row.
    pub bias: Option<&'a DeviceVector<M>>,
    /// (rows, n).
    pub out: &'a mut DeviceRows<M>,
}

/// A norm before products: `x / rms(x) * gain`, row by row.
pub struct DeviceNorm<'a, M> {
    /// (rows, k).
    pub x: &'a DeviceRows<M>,
    /// (k).
    pub gain: &'a DeviceVector<M>,
    /// Added to the mean of squares.
    pub eps: f32,
    /// (rows, k): afterwards the normed rows, or nothing in particular.
    pub out: &'a mut DeviceRows<M>,
}

/// Whether a product's parts fit each other; the address of its bias.
pub(super) fn check_product<M: DeviceMemory>(
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
    pub(super) fn new<G: Gpu>(
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
            rows: 0,
            gain: 0,
            k: size(x.width)?,
            eps: 0.0,
            row_warps: 0,
            tiles: weight.n.div_ceil(16),
            share: 1,
            gate: 0,
        })
    }
}

/// Units whose scales a block of gemv.cuh holds at a time.
const PHASE: usize = 256;

impl Family {
    /// The kernel for so many rows of activations, or none if there are too many for gemv.cuh. What is best where was
    /// measured on an H100, see `benches/CUDA.md`.
    fn shape(&self, rows: usize, tiles: u32, processors: u32) -> Option<Shape> {
        let of_size = self.some.iter().find(|of_size| rows <= of_size[0].rows)?;
        Some(of_size[usize::from(tiles >= 3 * processors)])
    }
}

impl<G: Gpu> Cuda<G> {
    /// Makes the first `rows` rows of `x` ready for products, once and for all of them: until `x` changes. Products do it
    /// by themselves where nobody did.
    ///
    /// # Errors
    /// There are not so many.
    pub fn prepare(&self, x: &DeviceRows<G::Memory>, rows: usize) -> Result<(), KernelError> {
        x.check("activations", rows, x.width)?;
        if x.is_ready(rows, self.order(rows)) { Ok(()) } else { self.pack(x, rows) }
    }

    /// `out = x * weight^T (+ bias) (+ out if accumulate)`, for `rows` rows of `x`.
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
        let address = check_product(x, rows, weight, bias, out)?;
        if weight.n == 0 || rows == 0 {
            return Ok(());
        }
        match &weight.stored {
            Stored::Codes(..) if rows <= FEW => {
                self.few(x, None, rows, &mut [DeviceProduct { weight, bias, out: &mut *out }], accumulate, None)?;
            }
            Stored::Codes(codes, argument) => {
                self.prepare(x, rows)?;
                let product = ProductArgument::new(self, argument, x, rows, address, accumulate, out)?;
                match self.order(rows) {
                    Order::Steps => self.by_warpgroups(*codes, rows, product)?,
                    Order::Lanes => self.many(codes.family(), rows, product)?,
                }
            }
            Stored::F32(at) => self.dense("dense_f32", *at, weight, x, rows, address, accumulate, out)?,
            Stored::F16(at) => self.dense("dense_f16", *at, weight, x, rows, address, accumulate, out)?,
            Stored::Bf16(at) => self.dense("dense_bf16", *at, weight, x, rows, address, accumulate, out)?,
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
        let mut rest = products;
        while let Some(first) = rest.first() {
            let (together, others) = rest.split_at_mut(if rows <= FEW { alike(first.weight, &rest[1..]) } else { 1 });
            match together {
                [one] => self.multiply(x, rows, one.weight, one.bias, false, one.out)?,
                _ => self.few(x, None, rows, together, false, None)?,
            }
            rest = others;
        }
        Ok(())
    }

    /// A norm and products of what it gives, without another launch where rows are few.
    ///
    /// # Errors
    /// As [`Cuda::rms_norm`] and [`Cuda::multiply`].
    pub fn norm_and_multiply(
        &self,
        norm: DeviceNorm<'_, G::Memory>,
        rows: usize,
        products: &mut [DeviceProduct<'_, G::Memory>],
    ) -> Result<(), KernelError> {
        let is_pure = products.iter().all(|product| product.weight.pure_codes().is_some());
        if !is_pure || !self.norms_within(&norm, rows, products)? {
            self.rms_norm(norm.x, norm.gain, norm.eps, rows, norm.out)?;
            return self.multiply_all(norm.out, rows, products);
        }
        let mut rest = products;
        while let Some(first) = rest.first() {
            let (together, others) = rest.split_at_mut(alike(first.weight, &rest[1..]));
            self.few(norm.x, Some((norm.gain, norm.eps)), rows, together, false, None)?;
            rest = others;
        }
        Ok(())
    }

    /// `gate.out = function(x * gate^T) * (x * up^T)` of normed rows; without a launch for the norm or the gate where rows
    /// are few, and then nothing in particular is left in `up.out`.
    ///
    /// # Errors
    /// As [`Cuda::rms_norm`], [`Cuda::multiply`] and [`Cuda::gate`].
    pub fn norm_and_gate(
        &self,
        norm: DeviceNorm<'_, G::Memory>,
        rows: usize,
        function: Function,
        gate: DeviceProduct<'_, G::Memory>,
        up: DeviceProduct<'_, G::Memory>,
    ) -> Result<(), KernelError> {
        let mut products = [gate, up];
        let is_pair = {
            let [gate, up] = &products;
            let is_pure = gate.weight.pure_codes().is_some() && up.weight.pure_codes().is_some();
            is_pure && gate.weight.n == up.weight.n && alike(gate.weight, &products[1..]) == 2
        };
        if is_pair && (1..=FEW).contains(&rows) {
            if self.norms_within(&norm, rows, &products)? {
                return self.few(norm.x, Some((norm.gain, norm.eps)), rows, &mut products, false, Some(function));
            }
            self.rms_norm(norm.x, norm.gain, norm.eps, rows, norm.out)?;
            return self.few(norm.out, None, rows, &mut products, false, Some(function));
        }
        self.norm_and_multiply(norm, rows, &mut products)?;
        let [gate, up] = products;
        self.gate(function, gate.out, up.out, rows)
    }

    fn many(&self, family: &Family, rows: usize, mut product: ProductArgument) -> Result<(), KernelError> {
        let (n, units) = (product.weight.n as usize, product.weight.units as usize);
        let tiles = product.weight.n.div_ceil(16);
        if let Some(shape) = family.shape(rows, tiles, self.gpu.processors()) {
            return self.some(family, shape, rows, tiles, &product);
        }
        let (kernel, tiles, busy) = family.many;
        let (tokens, outputs) = (64, 4 * 16 * tiles);
        let (wide, high) = (n.div_ceil(outputs), rows.div_ceil(tokens));
        let parts = self.parts(busy, wide * high, units, rows * n);
        self.in_parts(parts, &mut product, |product| {
            let grid = [size(wide)?, size(high)?, product.splits];
            self.gpu.launch(&Launch::new(kernel, grid, 128, bytes_of(product)))
        })
    }

    /// A product whose K is cut into at most so many parts, and what adds them.
    pub(super) fn in_parts(
        &self,
        parts: usize,
        product: &mut ProductArgument,
        launch: impl FnOnce(&ProductArgument) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        let units = product.weight.units as usize;
        let split_units = units.div_ceil(parts).max(1);
        let splits = units.div_ceil(split_units).max(1);
        (product.split_units, product.splits) = (size(split_units)?, size(splits)?);
        launch(product)?;
        if splits > 1 {
            let grid = [size((product.m as usize * product.weight.n as usize).div_ceil(256))?, 1, 1];
            self.gpu.launch(&Launch::new("gemm_sum", grid, 256, bytes_of(product)))?;
        }
        Ok(())
    }

    /// Launches a kernel of gemv.cuh over so many tiles.
    fn some(
        &self,
        family: &Family,
        shape: Shape,
        rows: usize,
        tiles: u32,
        product: &ProductArgument,
    ) -> Result<(), KernelError> {
        let scales = (product.weight.units as usize).min(PHASE / shape.tiles) * shape.tiles * 128;
        let mins = if product.weight.zero_kind == 0 { 0 } else { scales };
        let held = if family.table > 0 { family.table + mins } else { scales + mins };
        let shared = held.max(shape.warps * shape.tiles * 640);
        let grid = [tiles.div_ceil(size(shape.tiles)?), size(rows.div_ceil(shape.rows))?, 1];
        let launch = Launch::new(shape.kernel, grid, size(32 * shape.warps)?, bytes_of(product));
        self.gpu.launch(&launch.with_shared(size(shared)?))
    }

    /// Parts of K that keep the device busy with so many blocks a processor, as many as the scratch holds sums of.
    fn parts(&self, busy: usize, blocks: usize, units: usize, outputs: usize) -> usize {
        let wanted = (busy * self.gpu.processors() as usize).div_ceil(blocks.max(1));
        wanted.min(units / LEAST_PART).min(self.most_parts(outputs)).max(1)
    }

    /// Parts of K whose sums the scratch holds.
    pub(super) fn most_parts(&self, outputs: usize) -> usize {
        (SCRATCH / (outputs * 4).max(1)).max(1)
    }
}
