//! What a transformer does between its matrix products: norms, rotations, attention, gates, choices.
//!
//! Everything takes plain row-major slices and is written once over [`Simd`](crate::simd::Simd); [`Ops`] says with
//! which instructions and threads it runs. Results depend on neither: vectors have 16 lanes and one order of summation
//! everywhere, and work is cut by its shape, never by the number of threads.
//!
//! Slices that don't fit each other are a mistake of the caller, not of data: they panic. Numbers are never refused;
//! NaN stays NaN.

pub mod attention;
pub mod elementwise;
pub mod kv;
pub mod math;
pub mod norm;
pub mod pick;
pub mod rope;
pub mod softmax;

pub use attention::{AttentionScratch, AttentionSpec};
pub use kv::{KvCache, KvKind};
pub use norm::{LayerNorm, RmsNorm};
pub use pick::{argmax, top_k};
pub use rope::RopeTable;

use crate::simd::LANES;
use crate::{Isa, Pool};

/// Values that one thread takes at a time; less than two of them aren't worth a region.
const GRAIN: usize = 4096;

/// Where operations run: a pool and an instruction set. Cheap to copy.
#[derive(Debug, Clone, Copy)]
pub struct Ops<'p> {
    pool: &'p Pool,
    isa: Isa,
}

impl<'p> Ops<'p> {
    /// Operations on this pool's threads, with the widest instructions that this process may use.
    pub fn new(pool: &'p Pool) -> Ops<'p> {
        Ops { pool, isa: Isa::best() }
    }

    /// The same with the instructions of `isa`, or portable ones where the CPU lacks them.
    pub fn with_isa(self, isa: Isa) -> Ops<'p> {
        Ops { isa, ..self }
    }

    /// The pool.
    pub fn pool(&self) -> &'p Pool {
        self.pool
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Cuts rows of `d` values into parts of about [`GRAIN`] values: `f(first row, rows)`.
    fn over_rows(&self, out: &mut [f32], d: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
        if out.len() < 2 * GRAIN {
            if !out.is_empty() {
                f(0, out);
            }
            return;
        }
        let rows = (GRAIN / d).max(1);
        self.pool.for_each_part(out, rows * d, |part, out| f(part * rows, out));
    }
}

/// How many rows of `d` values there are.
///
/// # Panics
/// If the length isn't a multiple of `d`.
fn rows_of(what: &str, len: usize, d: usize) -> usize {
    let rows = len.checked_div(d).unwrap_or(0);
    assert_eq!(rows * d, len, "{what} holds {len} values, which aren't rows of {d}");
    rows
}

/// Up to 16 values, the starting index of each group of lanes in `0..len`.
#[inline(always)]
fn lanes(len: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..len).step_by(LANES).map(move |start| start..(start + LANES).min(len))
}
