//! One panel as inner loops read it: scales, zero points and minimums made ready once, whatever way they are stored in,
//! and kept in the first-level cache while the panel meets its activation rows.

use crate::simd::{BYTES, LANES, Simd};
use crate::weight::{Grid, GroupNumbers, PackedZeros};
use std::cell::RefCell;

/// Panels that a thread holds at most.
pub(super) const PANELS: usize = 2;

/// Buffers that a thread uses for panel after panel.
#[derive(Default)]
pub(super) struct Scratch {
    /// (groups, 16): a group's number. Its scale is `number * factor`.
    pub(super) numbers: Vec<[f32; LANES]>,
    /// (groups, 16), or one row for all groups: what integer sums are multiplied with before they become floats, in
    /// both 16-bit halves. Ones, unless the integers are the group's numbers and `numbers` is empty.
    pub(super) integers: Vec<[i32; LANES]>,
    /// The second level where it is the same for all groups, else ones.
    pub(super) factor: [f32; LANES],
    /// (groups, 16), or one row for all groups.
    pub(super) zeros: Vec<[i32; LANES]>,
    /// (groups, 16), empty without minimums.
    pub(super) mins: Vec<[f32; LANES]>,
    /// Decoded codes of some blocks.
    pub(super) lines: Vec<[u8; BYTES]>,
    /// (rows, 16): sums of the blocks so far.
    pub(super) sums: Vec<[f32; LANES]>,
}

thread_local! {
    static SCRATCH: RefCell<[Scratch; PANELS]> = RefCell::default();
}

/// Two equal 16-bit integers in one lane.
#[inline(always)]
pub(super) fn twice(v: i32) -> i32 {
    v & 0xffff | v << 16
}

impl Scratch {
    /// Calls `f` with this thread's buffers.
    pub(super) fn with<R>(f: impl FnOnce(&mut [Scratch; PANELS]) -> R) -> R {
        SCRATCH.with_borrow_mut(f)
    }

    /// Takes in a panel's scales, zero points and minimums.
    #[inline(always)]
    pub(super) fn fill<S: Simd>(&mut self, s: S, grid: &Grid, panel: usize, multiplies: bool) {
        let groups = grid.groups;
        self.integers.clear();
        self.numbers.clear();
        self.zeros.clear();
        self.mins.clear();
        match grid.scales.row_coded(panel, groups) {
            Some(coded) if multiplies => {
                self.factor = *coded.second;
                self.integers.resize(groups, [0; LANES]);
                let bias = s.splat_i32(-coded.bias);
                for group in 0..groups {
                    let code = s.add_i32(s.to_i32(s.load_u8(&coded.codes[group])), bias);
                    let low = s.and_i32(code, s.splat_i32(0xffff));
                    s.store_i32(s.add_i32(low, s.shl(code, 16)), &mut self.integers[group]);
                }
            }
            Some(coded) => {
                self.factor = *coded.second;
                self.integers.push([twice(1); LANES]);
                self.numbers.resize(groups, [0.0; LANES]);
                let bias = s.splat(coded.bias as f32);
                for group in 0..groups {
                    s.store(s.sub(s.load_u8(&coded.codes[group]), bias), &mut self.numbers[group]);
                }
            }
            None => {
                self.factor = [1.0; LANES];
                self.integers.push([twice(1); LANES]);
                numbers(s, &mut self.numbers, grid.scales.panel(panel, groups), groups);
            }
        }
        match &grid.zeros {
            PackedZeros::Const(zero) => self.zeros.push([*zero; LANES]),
            PackedZeros::Int(rows) => {
                let rows: &[[u8; LANES]] = &rows.as_chunks().0[panel * groups..][..groups];
                self.zeros.resize(groups, [0; LANES]);
                for group in 0..groups {
                    s.store_i32(s.to_i32(s.load_u8(&rows[group])), &mut self.zeros[group]);
                }
            }
            PackedZeros::Min(mins) => {
                self.zeros.push([0; LANES]);
                numbers(s, &mut self.mins, mins.panel(panel, groups), groups);
            }
        }
    }
}

/// What finds a group's row in `rows`, which has one a group or one for all: `rows[group & mask]`.
#[inline(always)]
pub(super) fn mask<T>(rows: &[T]) -> usize {
    if rows.len() == 1 { 0 } else { usize::MAX }
}

#[inline(always)]
fn numbers<S: Simd>(s: S, to: &mut Vec<[f32; LANES]>, mut from: GroupNumbers, groups: usize) {
    to.resize(groups, [0.0; LANES]);
    for group in 0..groups {
        s.store(from.next(s, group), &mut to[group]);
    }
}
