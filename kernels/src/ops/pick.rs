//! Choices among logits: the best one, the best few.

use super::softmax::largest;
use crate::Isa;
use crate::simd::{LANES, Simd, SimdOp, dispatch};

/// Where the largest number is, the first of equals; NaN is never it. `None` if there is no number.
pub fn argmax(isa: Isa, x: &[f32]) -> Option<usize> {
    let best = dispatch(isa, Largest(x));
    x.iter().position(|&x| x == best)
}

/// The indices of the largest numbers of `x`, largest first, the first of equals first; NaN comes last.
///
/// Fills `indices`; returns how many of them are used, which is less than all only if `x` is shorter.
pub fn top_k(isa: Isa, x: &[f32], indices: &mut [u32]) -> usize {
    dispatch(isa, TopK { x, indices })
}

struct Largest<'a>(&'a [f32]);

impl SimdOp for Largest<'_> {
    type Output = f32;

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> f32 {
        largest(s, self.0)
    }
}

struct TopK<'a> {
    x: &'a [f32],
    indices: &'a mut [u32],
}

/// Whether `a` goes before an earlier `b`: equals stay in their order, NaN stands below everything.
#[inline(always)]
fn before(a: f32, b: f32) -> bool {
    a > b || (b.is_nan() && !a.is_nan())
}

impl SimdOp for TopK<'_> {
    type Output = usize;

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> usize {
        let (x, indices) = (self.x, self.indices);
        let k = indices.len().min(x.len());
        if k == 0 {
            return 0;
        }
        let mut len = 0;
        for start in (0..x.len()).step_by(LANES) {
            let group = &x[start..(start + LANES).min(x.len())];
            if len == k {
                // Most groups hold nothing that goes before the last of a full list: one comparison for all.
                let last = x[indices[k - 1] as usize];
                if !last.is_nan() && largest(s, group) <= last {
                    continue;
                }
            }
            for (i, &value) in (start..).zip(group) {
                let goes_before = |&at: &u32| before(value, x[at as usize]);
                let place = len - indices[..len].iter().rev().take_while(|at| goes_before(at)).count();
                if place == k {
                    continue;
                }
                len = (len + 1).min(k);
                indices.copy_within(place..len - 1, place + 1);
                indices[place] = i as u32;
            }
        }
        k
    }
}
