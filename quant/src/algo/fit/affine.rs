//! `x = scale * code + min`: two numbers a group, by weighted least squares from 16 ranges side by side.

use super::{Extremes, Fit, Group, Method, Rule, SUMMED, factors, lanes, least};
use nibble_kernels::simd::{LANES, Simd};

/// Times that numbers are fitted to codes, and codes to numbers.
const ROUNDS: usize = 3;

/// Scale and minimum in each lane.
#[derive(Clone, Copy)]
struct Lines<S: Simd> {
    scale: S::F32,
    min: S::F32,
}

/// The sums that least squares needs; those over codes differ from lane to lane.
#[derive(Clone, Copy)]
struct Sums<S: Simd> {
    w: S::F32,
    x: S::F32,
    l: S::F32,
    xl: S::F32,
    ll: S::F32,
}

#[inline(always)]
pub(super) fn fit<S: Simd>(s: S, rule: &Rule, group: Group, method: Method, range: Extremes) -> Fit {
    let lo = if rule.low_min { range.lo.min(0.0) } else { range.lo };
    // Of a lone value any scale is right; its size keeps the second level from being stretched.
    let width = if range.hi > lo { range.hi - lo } else { 0.0 };
    let plain = Fit { scale: width / rule.high, min: lo, ..Fit::default() };
    if method == Method::Plain {
        return plain;
    }
    let narrow = s.div(s.splat(width), factors(s, group.x.len(), 0.5 * rule.high, LANES));
    let min = s.fma(s.splat(0.5), s.sub(s.splat(width), narrow), s.splat(lo));
    let min = if rule.low_min { s.min(min, s.splat(0.0)) } else { min };
    let mut lines = Lines { scale: s.mul(narrow, s.splat(1.0 / rule.high)), min };
    let mut best = (s.splat(f32::INFINITY), lines, s.splat(0.0));
    let (rounds, high) = (if method == Method::Search { ROUNDS } else { 1 }, s.splat(rule.high));
    let mut weight = 0.0;
    for _ in 0..rounds {
        let sums = sums(s, high, group, lines);
        if method == Method::Search {
            lines = sums.least_squares(s, rule.low_min, lines);
        }
        let left = sums.left(s, lines);
        let better = s.lt(left, best.0);
        best = (s.select(better, left, best.0), lines.or(s, better, best.1), s.select(better, sums.ll, best.2));
        weight = lanes(s, sums.w)[0];
    }
    let (left, Lines { scale, min }, ll) = best;
    match least(s, left, f32::INFINITY) {
        Some(lane) => Fit {
            scale: lanes(s, scale)[lane],
            min: lanes(s, min)[lane],
            zero: 0,
            scale_cost: lanes(s, ll)[lane],
            min_cost: weight,
        },
        None => Fit { min_cost: weight, ..plain },
    }
}

/// The best minimum for codes that a stored scale gives.
#[inline(always)]
pub(in crate::algo) fn refit_min<S: Simd>(s: S, rule: &Rule, group: Group, scale: f32, min: f32) -> f32 {
    let sums = sums(s, s.splat(rule.high), group, Lines { scale: s.splat(scale), min: s.splat(min) });
    let (w, x, l) = (lanes(s, sums.w)[0], lanes(s, sums.x)[0], lanes(s, sums.l)[0]);
    let refit = if w > 0.0 { (x - scale * l) / w } else { min };
    if rule.low_min { refit.min(0.0) } else { refit }
}

impl<S: Simd> Lines<S> {
    /// Other ones where these aren't good.
    #[inline(always)]
    fn or(self, s: S, good: S::Mask, other: Lines<S>) -> Lines<S> {
        Lines { scale: s.select(good, self.scale, other.scale), min: s.select(good, self.min, other.min) }
    }
}

impl<S: Simd> Sums<S> {
    /// The lines of least error for these codes; `otherwise` where there is none.
    #[inline(always)]
    fn least_squares(self, s: S, low_min: bool, otherwise: Lines<S>) -> Lines<S> {
        let zero = s.splat(0.0);
        let determinant = s.fnma(self.l, self.l, s.mul(self.w, self.ll));
        let mut scale = s.div(s.fnma(self.x, self.l, s.mul(self.w, self.xl)), determinant);
        let mut min = s.div(s.fnma(self.l, self.xl, s.mul(self.ll, self.x)), determinant);
        if low_min {
            let above = s.lt(zero, min);
            scale = s.select(above, s.div(self.xl, self.ll), scale);
            min = s.select(above, zero, min);
        }
        let solved = Lines { scale, min }.or(s, s.lt(zero, determinant), otherwise);
        solved.or(s, s.lt(zero, solved.scale), otherwise)
    }

    /// The errors of lines without the constant `sum(w x^2)`.
    #[inline(always)]
    fn left(self, s: S, Lines { scale, min }: Lines<S>) -> S::F32 {
        let squares = s.fma(s.mul(scale, scale), self.ll, s.mul(s.mul(min, min), self.w));
        let cross = s.mul(s.mul(scale, min), self.l);
        let along = s.fma(scale, self.xl, s.mul(min, self.x));
        s.fma(s.splat(2.0), s.sub(cross, along), squares)
    }
}

/// The sums over codes 0..=`high` under each line.
#[inline(always)]
fn sums<S: Simd>(s: S, high: S::F32, group: Group, lines: Lines<S>) -> Sums<S> {
    let zero = s.splat(0.0);
    let one = s.div(s.splat(1.0), lines.scale);
    // Where that would overflow all codes are 0.
    let by = s.select(s.lt(s.abs(one), s.splat(f32::INFINITY)), one, zero);
    let none = Sums::<S> { w: zero, x: zero, l: zero, xl: zero, ll: zero };
    let mut total = none;
    for (x, w) in group.x.chunks(SUMMED).zip(group.w.chunks(SUMMED)) {
        let mut part = none;
        for (&x, &w) in x.iter().zip(w) {
            let (x, w) = (s.splat(x), s.splat(w));
            let y = s.mul(s.sub(x, lines.min), by);
            let level = s.to_f32(s.to_i32(s.min(s.max(y, zero), high)));
            let weighted = s.mul(w, level);
            part.w = s.add(part.w, w);
            part.x = s.fma(w, x, part.x);
            part.l = s.add(part.l, weighted);
            part.xl = s.fma(weighted, x, part.xl);
            part.ll = s.fma(weighted, level, part.ll);
        }
        total = Sums {
            w: s.add(total.w, part.w),
            x: s.add(total.x, part.x),
            l: s.add(total.l, part.l),
            xl: s.add(total.xl, part.xl),
            ll: s.add(total.ll, part.ll),
        };
    }
    total
}
