//! One panel's scales, zero points and minimums as inner loops read them: made once a panel, whatever way they are
//! stored in, and kept in the first-level cache while the panel meets its activation rows.

use crate::simd::{LANES, Simd};
use crate::weight::{Grid, GroupNumbers, PackedZeros};
use std::cell::RefCell;

/// Buffers that a thread uses for panel after panel.
#[derive(Default)]
pub(super) struct Scratch {
    /// (groups, 16)
    pub(super) scales: Vec<[f32; LANES]>,
    /// (groups, 16), or one row for all groups.
    pub(super) zeros: Vec<[i32; LANES]>,
    /// (groups, 16), empty without minimums.
    pub(super) mins: Vec<[f32; LANES]>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Scratch {
    /// Calls `f` with this thread's buffers.
    pub(super) fn with<R>(f: impl FnOnce(&mut Scratch) -> R) -> R {
        SCRATCH.with_borrow_mut(f)
    }

    /// Takes in a panel.
    #[inline(always)]
    pub(super) fn fill<S: Simd>(&mut self, s: S, grid: &Grid, panel: usize) {
        let groups = grid.groups;
        numbers(s, &mut self.scales, grid.scales.panel(panel, groups), groups);
        self.zeros.clear();
        self.mins.clear();
        match &grid.zeros {
            PackedZeros::Const(zero) => self.zeros.push([*zero; LANES]),
            PackedZeros::Int(rows) => {
                let rows: &[[u8; LANES]] = &rows.as_chunks().0[panel * groups..][..groups];
                self.zeros.resize(groups, [0; LANES]);
                for (to, row) in self.zeros.iter_mut().zip(rows) {
                    s.store_i32(s.to_i32(s.load_u8(row)), to);
                }
            }
            PackedZeros::Min(mins) => {
                self.zeros.push([0; LANES]);
                numbers(s, &mut self.mins, mins.panel(panel, groups), groups);
            }
        }
    }

    /// What finds a group's zero points: `zeros[group & mask]`.
    #[inline(always)]
    pub(super) fn mask(&self) -> usize {
        if self.zeros.len() == 1 { 0 } else { usize::MAX }
    }
}

#[inline(always)]
fn numbers<S: Simd>(s: S, to: &mut Vec<[f32; LANES]>, mut from: GroupNumbers, groups: usize) {
    to.resize(groups, [0.0; LANES]);
    for (group, to) in to.iter_mut().enumerate() {
        s.store(from.next(s, group), to);
    }
}
