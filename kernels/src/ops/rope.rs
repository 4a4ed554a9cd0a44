//! Rotary position embedding (arXiv 2104.09864): pairs of a head's values turn by an angle that grows with position.
//!
//! ```text
//! one head: | x1: half values | x2: half values | the rest stays |      (the "NeoX" pairing of halves)
//! x1' = x1 cos(p f) - x2 sin(p f)      x2' = x2 cos(p f) + x1 sin(p f)     f = inv_freq[i], i < half
//! ```

use super::{Ops, lanes, rows_of};
use crate::simd::{Simd, SimdOp, dispatch};

/// Cosines and sines for every position that a context can hold.
#[derive(Debug, Clone)]
pub struct RopeTable {
    half: usize,
    positions: usize,
    cos: Vec<f32>, // (positions, half)
    sin: Vec<f32>, // (positions, half)
}

impl RopeTable {
    /// Tables for positions `0..positions`; `inv_freq` (half) are radians a position, already scaled for long
    /// contexts if the model says so, and `scale` multiplies cosines and sines (the attention factor of YaRN and
    /// LongRoPE, else 1).
    ///
    /// Angles are computed in double precision, so that position 100000 is as exact as position 1.
    pub fn new(inv_freq: &[f32], positions: usize, scale: f32) -> RopeTable {
        let half = inv_freq.len();
        let mut cos = Vec::with_capacity(positions * half);
        let mut sin = Vec::with_capacity(positions * half);
        for position in 0..positions {
            for &frequency in inv_freq {
                let (s, c) = (position as f64 * f64::from(frequency)).sin_cos();
                cos.push((c * f64::from(scale)) as f32);
                sin.push((s * f64::from(scale)) as f32);
            }
        }
        RopeTable { half, positions, cos, sin }
    }

    /// How many positions there are.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// How many values of a head turn: twice the number of frequencies.
    pub fn rotary_dim(&self) -> usize {
        2 * self.half
    }

    /// (positions, half) cosines, and sines.
    pub fn values(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    /// (half) cosines and sines of a position.
    fn row(&self, position: usize) -> (&[f32], &[f32]) {
        let at = position * self.half..(position + 1) * self.half;
        (&self.cos[at.clone()], &self.sin[at])
    }
}

impl Ops<'_> {
    /// Turns `x` (rows, heads, head_dim) in place; row i stands at position `start + i`.
    ///
    /// # Panics
    /// If `x` isn't rows of heads x head_dim, if a position is outside of the table, or if more values would turn
    /// than a head has.
    pub fn rope(&self, table: &RopeTable, x: &mut [f32], heads: usize, head_dim: usize, start: usize) {
        let width = heads * head_dim;
        let rows = rows_of("rope's input", x.len(), width);
        assert!(table.rotary_dim() <= head_dim, "{} of {head_dim} values turn", table.rotary_dim());
        assert!(start + rows <= table.positions, "positions {start}.. + {rows} of {}", table.positions);
        if rows == 0 || table.half == 0 {
            return;
        }
        self.over_rows(x, width, |row, x| {
            dispatch(self.isa, Rotate { table, x, width, head_dim, first: start + row });
        });
    }
}

struct Rotate<'a> {
    table: &'a RopeTable,
    x: &'a mut [f32],
    width: usize,
    head_dim: usize,
    /// Position of the first row.
    first: usize,
}

impl SimdOp for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let half = self.table.half;
        for (i, row) in self.x.chunks_mut(self.width).enumerate() {
            let (cos, sin) = self.table.row(self.first + i);
            for head in row.chunks_mut(self.head_dim) {
                let (x1, x2) = head[..2 * half].split_at_mut(half);
                for at in lanes(half) {
                    let (c, n) = (s.load_partial(&cos[at.clone()]), s.load_partial(&sin[at.clone()]));
                    let (a, b) = (s.load_partial(&x1[at.clone()]), s.load_partial(&x2[at.clone()]));
                    s.store_partial(s.fnma(b, n, s.mul(a, c)), &mut x1[at.clone()]);
                    s.store_partial(s.fma(a, n, s.mul(b, c)), &mut x2[at]);
                }
            }
        }
    }
}
