//! Matrix products with packed weights: y = x W^T (+ bias) (+ y).
//!
//! A kernel multiplies panels of 16 weight rows by a few activation rows at a time. It is written once over
//! [`Simd`](crate::simd::Simd), three files for all of them: `int` (signed-byte activations), `float`
//! (single-precision activations) and `dense` (unquantized weights). Each row of [`GEMMS`] is one kernel for one
//! instruction set; [`select`] picks the first row that accepts the problem, and [`multiply`] runs it.
//!
//! ```text
//! one activation row     pieces of many panels, each worker takes the next one: the weight is read once, first to last
//! many activation rows   tasks of a few panels x as many rows as stay in cache; each worker takes the next one
//! ```
//! An output is one sum in one order (over K, group by group), so it depends neither on the number of threads, nor on
//! the other rows of the batch, nor on the instruction set. Tiles of bfloat16 (`tiles`, for [`ActKind::Bf16`] alone) keep the
//! first of these laws only.

mod dense;
mod float;
mod int;
mod scratch;
mod table;
mod tile;
#[cfg(target_arch = "x86_64")]
mod tiles;

pub use table::{GEMMS, GemmKernel, select};

use crate::act::{ActKind, Activations};
use crate::{Isa, KernelError, PackedWeight, Pool};
use tile::{Output, Tile};

/// Products in one parallel region.
const REGION: usize = 8;
/// Pieces that a product of a single row is cut into for each worker.
const ROW_PIECES: usize = 8;
/// Bytes of activations that stay in a core's second-level cache beside a panel.
const ROW_BYTES: usize = 160 << 10;
/// Panels of one task.
const TASK_PANELS: usize = 4;
/// Panels of one task at most, and its rows, where tiles are multiplied: a decoded panel should meet many rows, and rows
/// that were brought from afar many panels.
const TILED_TASK_PANELS: usize = 8;
const TILED_TASK_ROWS: usize = 512;
/// Activation rows come in this many, so that a task is whole tiles for every kernel.
const ROW_STEP: usize = 16;

/// One weight to multiply the activations with.
#[derive(Debug)]
pub struct Product<'a> {
    /// (n, k)
    pub weight: &'a PackedWeight,
    /// (n) added to every row.
    pub bias: Option<&'a [f32]>,
    /// Whether to add to what `out` holds.
    pub accumulate: bool,
    /// (m, n) row-major.
    pub out: &'a mut [f32],
}

/// Multiplies activations with several weights of the same k, in as few parallel regions as can be.
///
/// `out[i][j] = sum_k x[i][k] * w[j][k] (+ bias[j]) (+ out[i][j] if accumulate)`. With [`ActKind::I8`] activations are
/// turned into codes first, unless they are already.
///
/// Refuses lengths that don't fit; nothing has been written then.
pub fn multiply(pool: &Pool, x: &mut Activations, products: &mut [Product], act: ActKind) -> Result<(), KernelError> {
    multiply_by(pool, x, products, |weight, m| {
        select(weight, act, m, Isa::best()).ok_or(KernelError::NoKernel {
            weight: weight.kind().name(),
            act: act.name(),
            isa: Isa::best().name(),
        })
    })
}

impl GemmKernel {
    /// As [`multiply`] with one product and this kernel, whatever [`select`] would pick.
    ///
    /// Refuses weights that the kernel isn't for, and instructions that this CPU lacks.
    pub fn multiply(&'static self, pool: &Pool, x: &mut Activations, product: Product) -> Result<(), KernelError> {
        multiply_by(pool, x, &mut [product], |weight, _| {
            if weight.kind() == self.weight && self.isa.is_present() {
                return Ok(self);
            }
            Err(KernelError::NoKernel { weight: weight.kind().name(), act: self.act.name(), isa: self.isa.name() })
        })
    }
}

/// A product with its kernel.
#[derive(Clone, Copy)]
struct Job<'a> {
    kernel: &'static GemmKernel,
    weight: &'a PackedWeight,
    bias: Option<&'a [f32]>,
    output: Output<'a>,
}

fn multiply_by(
    pool: &Pool,
    x: &mut Activations,
    products: &mut [Product],
    choose: impl Fn(&PackedWeight, usize) -> Result<&'static GemmKernel, KernelError>,
) -> Result<(), KernelError> {
    let m = x.m();
    for product in &*products {
        let (n, k) = (product.weight.n(), product.weight.k());
        check_len("a row of activations", x.k(), k)?;
        check_len("a product's output", product.out.len(), m.saturating_mul(n))?;
        if let Some(bias) = product.bias {
            check_len("a bias", bias.len(), n)?;
        }
        choose(product.weight, m)?;
    }
    for region in products.chunks_mut(REGION) {
        let mut jobs = [const { None }; REGION];
        for (job, product) in jobs.iter_mut().zip(region) {
            let kernel = choose(product.weight, m)?;
            x.prepare(pool, kernel.act, kernel.rows);
            let output = Output::new(product.out, product.weight.n(), product.accumulate);
            *job = Some(Job { kernel, weight: product.weight, bias: product.bias, output });
        }
        if m == 1 {
            run_row(pool, x, &jobs);
        } else {
            run_rows(pool, x, &jobs);
        }
    }
    Ok(())
}

fn check_len(what: &'static str, found: usize, wanted: usize) -> Result<(), KernelError> {
    if found == wanted { Ok(()) } else { Err(KernelError::Length { what, found, wanted }) }
}

/// One activation row: panels of all jobs in a line, cut into pieces that are much shorter than the region, so that a worker
/// whose core is slower or busy takes fewer.
fn run_row(pool: &Pool, x: &Activations, jobs: &[Option<Job>]) {
    let total: usize = jobs.iter().flatten().map(Job::panels).sum();
    let pieces = total.min(pool.threads() * ROW_PIECES);
    pool.for_each(pieces, |piece| {
        let (start, end) = (total * piece / pieces, total * (piece + 1) / pieces);
        let mut first = 0;
        for job in jobs.iter().flatten() {
            let panels = start.max(first)..end.min(first + job.panels());
            if !panels.is_empty() {
                job.run(x, panels.start - first..panels.end - first, 0..1);
            }
            first += job.panels();
        }
    });
}

/// Many activation rows: tasks of some panels by some rows, rows outermost so that they stay in cache.
fn run_rows(pool: &Pool, x: &Activations, jobs: &[Option<Job>]) {
    let m = x.m();
    let rows = jobs.iter().flatten().map(|job| job.task_rows(x)).min().unwrap_or(ROW_STEP);
    let tasks = |job: &Job| job.panels().div_ceil(job.task_panels(pool));
    let total: usize = jobs.iter().flatten().map(tasks).sum();
    if total == 0 {
        return;
    }
    pool.for_each(total * m.div_ceil(rows), |task| {
        let (first, mut task) = (task / total * rows, task % total);
        for job in jobs.iter().flatten() {
            if task < tasks(job) {
                let panels = job.task_panels(pool);
                let start = task * panels;
                return job.run(x, start..job.panels().min(start + panels), first..m.min(first + rows));
            }
            task -= tasks(job);
        }
    });
}

impl Job<'_> {
    fn panels(&self) -> usize {
        self.weight.n().div_ceil(crate::PANEL)
    }

    /// Activation rows of a task.
    fn task_rows(&self, x: &Activations) -> usize {
        match self.kernel.act {
            // Only a slab of their columns is in use at a time.
            ActKind::Bf16 => TILED_TASK_ROWS,
            act => (ROW_BYTES / (x.stride() * act.bytes()).max(1) / ROW_STEP * ROW_STEP).max(ROW_STEP),
        }
    }

    /// Panels of a task.
    fn task_panels(&self, pool: &Pool) -> usize {
        match self.kernel.act {
            ActKind::Bf16 => (self.panels() / (4 * pool.threads())).next_multiple_of(2).clamp(2, TILED_TASK_PANELS),
            _ => TASK_PANELS,
        }
    }

    fn run(&self, x: &Activations, panels: std::ops::Range<usize>, rows: std::ops::Range<usize>) {
        (self.kernel.run)(&Tile { weight: self.weight, x, bias: self.bias, output: self.output, panels, rows });
    }
}
