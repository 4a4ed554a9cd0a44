//! What one call of a kernel computes, and the one way its results reach memory.

use crate::act::Activations;
use crate::simd::{LANES, Simd};
use crate::{PANEL, PackedWeight};
use std::marker::PhantomData;
use std::ops::Range;

/// Some panels of a weight by some rows of activations.
pub struct Tile<'a> {
    pub(super) weight: &'a PackedWeight,
    pub(super) x: &'a Activations,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) output: Output<'a>,
    pub(super) panels: Range<usize>,
    pub(super) rows: Range<usize>,
}

/// An (m, n) output that several threads write to, each other places.
#[derive(Clone, Copy)]
pub(super) struct Output<'a> {
    start: *mut f32,
    len: usize,
    n: usize,
    accumulate: bool,
    borrows: PhantomData<&'a mut [f32]>,
}

// SAFETY: it stands for an exclusive borrow of floats, which may move to other threads; `Tile` is the only writer and
// tiles that run at the same time have no (panel, row) in common.
unsafe impl Send for Output<'_> {}
// SAFETY: as above.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    /// `out` is (m, n) row-major.
    pub(super) fn new(out: &'a mut [f32], n: usize, accumulate: bool) -> Self {
        Output { start: out.as_mut_ptr(), len: out.len(), n, accumulate, borrows: PhantomData }
    }

    /// Stores the outputs of one row and panel, on top of what is there if the product accumulates.
    #[inline(always)]
    fn put<S: Simd>(self, s: S, panel: usize, row: usize, mut sums: S::F32) {
        let first = panel * PANEL;
        let (at, len) = (row * self.n + first, PANEL.min(self.n - first));
        assert!(at + len <= self.len);
        // SAFETY: the range was just checked against the borrowed slice; tiles that run at the same time have no
        // (panel, row) in common, so nobody else reads or writes these floats now.
        let out = unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) };
        if self.accumulate {
            sums = s.add(sums, s.load_partial(out));
        }
        s.store_partial(sums, out);
    }
}

impl Tile<'_> {
    /// Takes the sums of 16 weight rows by one activation row: adds outliers, bias and what was there, and stores.
    #[inline(always)]
    pub(super) fn finish<S: Simd>(&self, s: S, panel: usize, row: usize, mut sums: S::F32) {
        if !self.weight.outliers.cols.is_empty() {
            let mut lanes = [0.0; LANES];
            s.store(sums, &mut lanes);
            let x = self.x.row(row);
            for (lane, sum) in lanes.iter_mut().enumerate() {
                for (col, value) in self.weight.outliers_of(panel * PANEL + lane) {
                    *sum += value * x[col];
                }
            }
            sums = s.load(&lanes);
        }
        if let Some(bias) = self.bias {
            let first = panel * PANEL;
            sums = s.add(sums, s.load_partial(&bias[first..bias.len().min(first + PANEL)]));
        }
        self.output.put(s, panel, row, sums);
    }
}

/// A kernel's inner function: `MR` activation rows from `row` on by one panel. Kernels loop over it with [`walk`].
pub(super) trait Inner<S: Simd> {
    fn rows<const MR: usize>(&self, s: S, panel: usize, row: usize);
}

/// Covers a panel's rows with `inner`, `MR` at a time and the rest in smaller powers of two.
#[inline(always)]
pub(super) fn walk<S: Simd, const MR: usize>(s: S, panel: usize, rows: Range<usize>, inner: &impl Inner<S>) {
    let Range { start: mut row, end } = rows;
    while end - row >= MR {
        inner.rows::<MR>(s, panel, row);
        row += MR;
    }
    if MR > 4 && end - row >= 4 {
        inner.rows::<4>(s, panel, row);
        row += 4;
    }
    if MR > 2 && end - row >= 2 {
        inner.rows::<2>(s, panel, row);
        row += 2;
    }
    while row < end {
        inner.rows::<1>(s, panel, row);
        row += 1;
    }
}
