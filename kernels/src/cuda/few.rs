//! Products with few rows: which kernel of `kernels/cuda/few.cuh`, and how its work is cut.

use super::data::{DeviceRows, DeviceVector, Order};
use super::gpu::{DeviceMemory, Gpu, Launch};
use super::linear::{AlsoArgument, DeviceNorm, DeviceProduct, ProductArgument, check_product};
use super::weight::{Codes, DeviceWeight, ScaleKind, Stored, WeightArgument};
use super::{Cuda, check, size};
use crate::KernelError;
use crate::ops::math::Function;
use bytemuck::bytes_of;

/// Rows at most: the columns of one of the tensor cores' products.
pub(super) const FEW: usize = 8;
/// Weights of one launch at most.
const TOGETHER: usize = 3;
/// Units of a warp that are on their way, as few.cuh has it.
const DEPTH: usize = 4;
/// Bytes for factors and the sums of rows.
const SCRATCH_BYTES: usize = 256;
/// A table, with every entry once for each bank and room for rows between.
const TABLE_BYTES: usize = 1 << 16;
/// Fours of numbers of a row that a thread makes ready.
const READS: usize = 4;
/// Units up to which half of the warps do.
const SHORT: usize = 16;

/// A kernel: its name, its warps and the bytes of a unit's scales beside its codes.
struct Kernel {
    name: &'static str,
    warps: usize,
    beside: usize,
}

const fn kernel(name: &'static str, warps: usize, beside: usize) -> Kernel {
    Kernel { name, warps, beside }
}

/// For scales in halves; in codes with one number at the second level for each row; for any weight. The first of a pair
/// is for rows of many units.
struct Kernels {
    f16: [Kernel; 2],
    coded: [Kernel; 2],
    any: Kernel,
}

const W4: Kernels = Kernels {
    f16: [kernel("few_f16_w4", 16, 64), kernel("few_f16_short_w4", 8, 64)],
    coded: [kernel("few_coded_w4", 16, 32), kernel("few_coded_short_w4", 8, 32)],
    any: kernel("few_any_w4", 8, 512),
};
const W4_TABLE: Kernels = Kernels {
    f16: [kernel("few_f16_w4_table", 16, 64), kernel("few_f16_short_w4_table", 8, 64)],
    coded: [kernel("few_coded_w4_table", 16, 32), kernel("few_coded_short_w4_table", 8, 32)],
    any: kernel("few_any_w4_table", 4, 512),
};
const W8: Kernels = Kernels {
    f16: [kernel("few_f16_w8", 16, 64), kernel("few_f16_short_w8", 8, 64)],
    coded: [kernel("few_coded_w8", 16, 32), kernel("few_coded_short_w8", 8, 32)],
    any: kernel("few_any_w8", 8, 512),
};

/// How many weights from `first` on one launch can multiply with.
pub(super) fn alike<M: DeviceMemory>(first: &DeviceWeight<M>, others: &[DeviceProduct<'_, M>]) -> usize {
    let Some((codes, argument)) = first.pure_codes() else { return 1 };
    let is_alike = |other: &&DeviceProduct<'_, M>| {
        let other = other.weight.pure_codes();
        other.is_some_and(|(kind, other)| kind == codes && other.n > 0 && argument.is_alike(other))
    };
    if argument.n == 0 { 1 } else { 1 + others.iter().take(TOGETHER - 1).take_while(is_alike).count() }
}

impl Codes {
    /// The kernel for a weight on a device whose blocks have so much shared memory, and bytes of it before what depends
    /// on how much a block does.
    fn kernel(self, weight: &WeightArgument, rows_bytes: usize, shared: usize) -> (&'static Kernel, usize) {
        let (kernels, table, quads) = match self {
            Codes::W4 => (&W4, 0, 1),
            Codes::W4Table => (&W4_TABLE, TABLE_BYTES, 1),
            Codes::W8 => (&W8, 0, 2),
        };
        // Rows lie between the table's entries.
        let held = if table > 0 { table } else { rows_bytes };
        let bytes = |k: &Kernel| held + k.warps * DEPTH * (quads * 512 + k.beside) + SCRATCH_BYTES;
        let pair = match weight.scale_kind() {
            ScaleKind::F16 => &kernels.f16,
            ScaleKind::Coded => &kernels.coded,
            ScaleKind::Any => return (&kernels.any, bytes(&kernels.any)),
        };
        let [long, short] = pair;
        // Sums of one tile for each of 8 rows have to fit as well.
        let fits = bytes(long) + 2 * long.warps * FEW * 80 <= shared;
        let kernel = if weight.units as usize > SHORT && fits { long } else { short };
        (kernel, bytes(kernel))
    }
}

/// Whether so many warps can hold rows of this width, and how many of them each row gets.
fn row_warps(width: usize, rows: usize, warps: usize) -> Option<usize> {
    let each = warps / rows.next_power_of_two();
    (each > 0 && width.is_multiple_of(4) && width.next_multiple_of(64) <= READS * 4 * 32 * each).then_some(each)
}

impl<G: Gpu> Cuda<G> {
    /// Whether products with these weights can norm the rows themselves.
    pub(super) fn norms_within(
        &self,
        norm: &DeviceNorm<'_, G::Memory>,
        rows: usize,
        products: &[DeviceProduct<'_, G::Memory>],
    ) -> Result<bool, KernelError> {
        norm.x.check("a norm's input", rows, norm.gain.len)?;
        norm.out.check("a norm's output", rows, norm.gain.len)?;
        norm.out.changes();
        Ok((1..=FEW).contains(&rows)
            && products.iter().all(|product| {
                let Some((codes, argument)) = product.weight.pure_codes() else { return false };
                let bytes = rows * argument.units as usize * 128;
                let (kernel, _) = codes.kernel(argument, bytes, self.gpu.shared() as usize);
                row_warps(norm.x.width, rows, kernel.warps).is_some()
            }))
    }

    /// Products with weights that are alike, at most three. With a norm, `x` is normed first and [`Cuda::norms_within`]
    /// has said that it can be. With a gate there are two, and the first's output becomes the gate of both.
    pub(super) fn few(
        &self,
        x: &DeviceRows<G::Memory>,
        norm: Option<(&DeviceVector<G::Memory>, f32)>,
        rows: usize,
        products: &mut [DeviceProduct<'_, G::Memory>],
        accumulate: bool,
        gate: Option<Function>,
    ) -> Result<(), KernelError> {
        let refuse = |why: &str| KernelError::Cuda { why: why.to_string() };
        let Some((first, others)) = products.split_first_mut() else { return Ok(()) };
        let Stored::Codes(codes, weight) = &first.weight.stored else { return Err(refuse("a product without codes")) };
        let bytes = rows * weight.units as usize * 128;
        let most = self.gpu.shared() as usize;
        let (kernel, fixed) = codes.kernel(weight, bytes, most);
        let row_warps = row_warps(x.width, rows, kernel.warps);
        let is_ready = norm.is_none() && x.is_ready(rows, Order::Lanes);
        if row_warps.is_none() && !is_ready {
            self.pack(x, rows)?;
        }
        let bias = check_product(x, rows, first.weight, first.bias, first.out)?;
        let mut product = ProductArgument::new(self, weight, x, rows, bias, accumulate, first.out)?;
        for (also, other) in product.also.iter_mut().zip(others) {
            let bias = check_product(x, rows, other.weight, other.bias, other.out)?;
            let Stored::Codes(_, weight) = &other.weight.stored else { return Err(refuse("a product without codes")) };
            let WeightArgument { codes, zeros, scales, mins, n, .. } = *weight;
            let out = other.out.values.address();
            *also = AlsoArgument { codes, zeros, scales, mins, bias, out, n, first: product.tiles };
            product.tiles += if gate.is_some() { 0 } else { n.div_ceil(16) };
        }
        if let (Some(each), false) = (row_warps, is_ready) {
            (product.rows, product.row_warps) = (x.values.address(), size(each)?);
        }
        if let Some((gain, eps)) = norm {
            check("a norm's gain", gain.len, x.width)?;
            (product.gain, product.eps) = (gain.values.address(), eps);
        }
        product.gate = match gate {
            None => 0,
            Some(Function::Silu) => 1,
            Some(Function::GeluTanh) => 2,
            Some(other) => {
                return Err(KernelError::Cuda { why: format!("no gate by {other:?}; known: Silu, GeluTanh") });
            }
        };
        // So many tiles a block that every processor has one block; as many as there is room for their sums.
        let fixed = if product.rows == 0 && *codes != Codes::W4Table { fixed - bytes } else { fixed };
        let tile = kernel.warps * rows * if rows == 1 { 64 } else { 80 } * if gate.is_some() { 2 } else { 1 };
        let wanted = product.tiles.div_ceil(self.gpu.processors()) as usize;
        let share = wanted.min(most.saturating_sub(fixed) / tile).max(1);
        product.share = size(share)?;
        let grid = [product.tiles.div_ceil(product.share), 1, 1];
        let launch = Launch::new(kernel.name, grid, size(32 * kernel.warps)?, bytes_of(&product));
        self.gpu.launch(&launch.with_shared(size(fixed + share * tile)?))
    }
}
