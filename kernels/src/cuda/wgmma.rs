//! Products with many rows on compute capability 9.0a: which kernel of `kernels/cuda/wgmma.cuh`, and how its work is cut.

use super::gpu::{Gpu, Launch};
use super::linear::ProductArgument;
use super::weight::{Codes, ScaleKind, WeightArgument};
use super::{Cuda, size};
use crate::KernelError;
use bytemuck::bytes_of;

/// Kernels of one shape, as wgmma.cuh has it: their rows of activations, warp groups with outputs of their own, warp groups
/// that share these, turns on their way and blocks on a processor.
struct Shape {
    /// For scales in halves, in codes with one number at the second level for each row, and for any weight; of these for
    /// 4 bits, 4 bits through a table and 8 bits.
    names: [[&'static str; 3]; 3],
    rows: usize,
    outs: usize,
    ways: usize,
    stages: usize,
    blocks: usize,
}

macro_rules! names {
    ($rows:literal) => {
        [names!($rows, "f16"), names!($rows, "coded"), names!($rows, "any")]
    };
    ($rows:literal, $scales:literal) => {
        [
            concat!("wgmma", $rows, "_", $scales, "_w4"),
            concat!("wgmma", $rows, "_", $scales, "_w4_table"),
            concat!("wgmma", $rows, "_", $scales, "_w8"),
        ]
    };
}

const SHAPES: [Shape; 2] = [
    Shape { names: names!("64"), rows: 64, outs: 1, ways: 2, stages: 4, blocks: 2 },
    Shape { names: names!("128"), rows: 128, outs: 2, ways: 1, stages: 5, blocks: 1 },
];

/// Rows from which on they are faster than `gemv.cuh`, see `benches/CUDA.md`.
pub(super) const LEAST_ROWS: usize = 33;

impl Shape {
    /// Bytes of shared memory.
    fn shared(&self, codes: Codes) -> usize {
        let quads = if codes == Codes::W8 { 2 } else { 1 };
        self.stages * self.ways * (self.rows * 128 + self.outs * 4 * quads * 512)
    }

    fn name(&self, codes: Codes, weight: &WeightArgument) -> &'static str {
        let [f16, coded, any] = self.names;
        let [w4, table, w8] = match weight.scale_kind() {
            ScaleKind::F16 => f16,
            ScaleKind::Coded => coded,
            ScaleKind::Any => any,
        };
        match codes {
            Codes::W4 => w4,
            Codes::W4Table => table,
            Codes::W8 => w8,
        }
    }
}

/// Turns that it takes to begin a block, and to add parts of K.
const BEGINNING: usize = 5;
const ADDING: usize = 12;

impl<G: Gpu> Cuda<G> {
    /// A product with [`LEAST_ROWS`] rows or more, which lie in the order of steps.
    pub(super) fn by_warpgroups(
        &self,
        codes: Codes,
        rows: usize,
        mut product: ProductArgument,
    ) -> Result<(), KernelError> {
        let [.., widest] = &SHAPES;
        let shape = SHAPES.iter().find(|shape| rows <= shape.rows).unwrap_or(widest);
        let (n, units) = (product.weight.n as usize, product.weight.units as usize);
        let (wide, high) = (n.div_ceil(64 * shape.outs), rows.div_ceil(shape.rows));
        let slots = shape.blocks * self.gpu.processors() as usize;
        let turns = |parts: usize| {
            let waves = (wide * high * parts).div_ceil(slots);
            let adding = if parts > 1 { ADDING } else { 0 };
            waves * (units.div_ceil(parts).div_ceil(shape.ways) + BEGINNING) + adding
        };
        let most = self.most_parts(rows * n).min(units.div_ceil(shape.ways));
        let parts = (1..=most).min_by_key(|parts| turns(*parts)).unwrap_or(1);
        self.in_parts(parts, &mut product, |product| {
            let grid = [size(wide)?, size(high)?, product.splits];
            let threads = size(128 * shape.outs * shape.ways)?;
            let launch = Launch::new(shape.name(codes, &product.weight), grid, threads, bytes_of(product));
            self.gpu.launch(&launch.with_shared(size(shape.shared(codes))?))
        })
    }
}
