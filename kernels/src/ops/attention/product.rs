//! Both of attention's products: a few rows times panels of 16 columns, the panels widened from the cache as they pass.
//!
//! ```text
//! scores = q x keys:      a = queries (rows, head_dim), a panel = 16 positions, depth = head_dim
//! sums += weights x values: a = weights (rows, positions), a panel = 16 values,   depth = positions
//! ```

use super::Element;
use crate::simd::{LANES, Simd};

/// Rows of `out` and of `a` are this far apart.
#[derive(Clone, Copy)]
pub(super) struct Strides {
    pub(super) a: usize,
    pub(super) out: usize,
}

/// `out[r][16 p..] = (ADD: out +) sum over k of a[r][k] panels[p][k]` for all `rows` and for `panels` panels, panel p
/// being `depth` vectors from `b[p * panel_len]` on.
#[inline(always)]
pub(super) fn product<S: Simd, T: Element, const ADD: bool>(
    s: S,
    (a, rows, depth): (&[f32], usize, usize),
    (b, panels, panel_len): (&[T], usize, usize),
    out: &mut [f32],
    strides: Strides,
) {
    let mut row = 0;
    while row < rows {
        let a = &a[row * strides.a..];
        let out = &mut out[row * strides.out..];
        let b = (b, panels, panel_len);
        // Sixteen registers of eight lanes: rows x panels x 2 sums, and some for what passes.
        row += match rows - row {
            1 => strip::<S, T, ADD, 1, 4>(s, (a, depth), b, out, strides),
            2 => strip::<S, T, ADD, 2, 2>(s, (a, depth), b, out, strides),
            3 => strip::<S, T, ADD, 3, 2>(s, (a, depth), b, out, strides),
            4 | 7 | 8 => strip::<S, T, ADD, 4, 1>(s, (a, depth), b, out, strides),
            5 => strip::<S, T, ADD, 5, 1>(s, (a, depth), b, out, strides),
            _ => strip::<S, T, ADD, 6, 1>(s, (a, depth), b, out, strides),
        };
    }
}

/// M rows times all panels, N at a time; M.
#[inline(always)]
fn strip<S: Simd, T: Element, const ADD: bool, const M: usize, const N: usize>(
    s: S,
    (a, depth): (&[f32], usize),
    (b, panels, panel_len): (&[T], usize, usize),
    out: &mut [f32],
    strides: Strides,
) -> usize {
    let mut panel = 0;
    while panel < panels {
        let (b, out) = (&b[panel * panel_len..], &mut out[panel * LANES..]);
        if panel + N <= panels {
            micro::<S, T, ADD, M, N>(s, (a, depth), (b, panel_len), out, strides);
            panel += N;
        } else {
            micro::<S, T, ADD, M, 1>(s, (a, depth), (b, panel_len), out, strides);
            panel += 1;
        }
    }
    M
}

/// M rows times N panels, all sums in registers.
#[inline(always)]
fn micro<S: Simd, T: Element, const ADD: bool, const M: usize, const N: usize>(
    s: S,
    (a, depth): (&[f32], usize),
    (b, panel_len): (&[T], usize),
    out: &mut [f32],
    strides: Strides,
) {
    let mut rows: [&[f32]; M] = [&[]; M];
    for m in 0..M {
        rows[m] = &a[m * strides.a..][..depth];
    }
    let mut vectors: [&[[T; LANES]]; N] = [&[]; N];
    for n in 0..N {
        vectors[n] = &b[n * panel_len..].as_chunks::<LANES>().0[..depth];
    }
    let mut sums = [[s.splat(0.0); N]; M];
    for k in 0..depth {
        let mut wide = [s.splat(0.0); N];
        for n in 0..N {
            wide[n] = T::load(s, &vectors[n][k]);
        }
        for m in 0..M {
            let a = s.splat(rows[m][k]);
            for n in 0..N {
                sums[m][n] = s.fma(a, wide[n], sums[m][n]);
            }
        }
    }
    for m in 0..M {
        let (out, _) = out[m * strides.out..].as_chunks_mut::<LANES>();
        for n in 0..N {
            let sum = if ADD { s.add(s.load(&out[n]), sums[m][n]) } else { sums[m][n] };
            s.store(sum, &mut out[n]);
        }
    }
}
