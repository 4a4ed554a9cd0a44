//! Dense weights in f32, bf16 or f16 by single-precision activations: one fused multiply-add a value.

use super::tile::{Inner, Tile, walk};
use crate::simd::{LANES, Simd, SimdOp};
use crate::weight::Body;
use bytemuck::Pod;
use half::{bf16, f16};

/// A float that weights are stored in.
pub(super) trait Stored: Pod {
    fn rows(body: &Body) -> Option<&[Self]>;

    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::F32;
}

impl Stored for f32 {
    fn rows(body: &Body) -> Option<&[f32]> {
        match body {
            Body::F32(rows) => Some(rows),
            _ => None,
        }
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[f32; LANES]) -> S::F32 {
        s.load(from)
    }
}

impl Stored for f16 {
    fn rows(body: &Body) -> Option<&[f16]> {
        match body {
            Body::F16(rows) => Some(rows),
            _ => None,
        }
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[f16; LANES]) -> S::F32 {
        s.load_f16(from)
    }
}

impl Stored for bf16 {
    fn rows(body: &Body) -> Option<&[bf16]> {
        match body {
            Body::Bf16(rows) => Some(rows),
            _ => None,
        }
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[bf16; LANES]) -> S::F32 {
        s.load_bf16(from)
    }
}

/// The kernel for weights stored as `T`, `MR` rows at a time.
pub(super) fn run<S: Simd, T: Stored, const MR: usize>(tile: &Tile) {
    if let (Some(s), Some(rows)) = (S::new(), T::rows(&tile.weight.body)) {
        s.vectorize(Dense::<T, MR> { tile, rows });
    }
}

struct Dense<'a, T, const MR: usize> {
    tile: &'a Tile<'a>,
    /// (panels, k, 16)
    rows: &'a [T],
}

impl<T: Stored, const MR: usize> SimdOp for Dense<'_, T, MR> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for panel in self.tile.panels.clone() {
            walk::<S, MR>(s, panel, self.tile.rows.clone(), &self);
        }
    }
}

impl<S: Simd, T: Stored, const M: usize> Inner<S> for Dense<'_, T, M> {
    #[inline(always)]
    fn rows<const MR: usize>(&self, s: S, panel: usize, row: usize) {
        let k = self.tile.x.k();
        let columns: &[[T; LANES]] = &self.rows.as_chunks().0[panel * k..][..k];
        let mut x = [&[0.0; 0][..]; MR];
        for r in 0..MR {
            x[r] = &self.tile.x.row(row + r)[..k];
        }
        let mut sums = [s.splat(0.0); MR];
        for (at, column) in columns.iter().enumerate() {
            let w = T::load(s, column);
            for r in 0..MR {
                sums[r] = s.fma(w, s.splat(x[r][at]), sums[r]);
            }
        }
        for r in 0..MR {
            self.tile.finish(s, panel, row + r, sums[r]);
        }
    }
}
