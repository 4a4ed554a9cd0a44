//! `x = scale * code + min`: two numbers a group, by weighted least squares over a scan of ranges.

use super::super::grid::{Even, Grid};
use super::{Extremes, Fit, Group, Method, Rule, factors, inverse};
use nibble_kernels::simd::{LANES, Simd};

/// Ranges tried.
const SCAN: usize = 21;
/// Times that codes and numbers are fitted to each other at the end.
const ROUNDS: usize = 3;

/// The sums that least squares needs; those over codes change with the codes.
#[derive(Clone, Copy)]
struct Sums {
    w: f32,
    x: f32,
    l: f32,
    xl: f32,
    ll: f32,
}

/// Scale and minimum.
#[derive(Clone, Copy)]
struct Line {
    scale: f32,
    min: f32,
}

#[inline(always)]
pub(super) fn fit<S: Simd>(s: S, rule: &Rule, group: Group, method: Method, range: Extremes) -> Fit {
    let lo = if rule.low_min { range.lo.min(0.0) } else { range.lo };
    // Of a lone value any scale is right; its size keeps the second level from being stretched.
    let width = if range.hi > lo { range.hi - lo } else { 0.0 };
    let grid = Even::new(s, 0.0, rule.high, 0);
    let plain = Line { scale: width / rule.high, min: lo };
    let sums_at = |line: Line| sums(s, grid, group, line);
    let mut at = sums_at(plain);
    let mut best = (plain, at.left(plain));
    if method != Method::Plain && width > 0.0 {
        for factor in factors(group.x.len(), 0.5 * rule.high, SCAN) {
            let narrow = width / factor;
            let line = Line { scale: narrow / rule.high, min: lo + 0.5 * (width - narrow) };
            let line = if rule.low_min && line.min > 0.0 { Line { min: 0.0, ..line } } else { line };
            let sums = sums_at(line);
            let line = if method == Method::Search { sums.least_squares(rule.low_min, line) } else { line };
            let left = sums.left(line);
            if left < best.1 {
                (best, at) = ((line, left), sums);
            }
        }
        if method == Method::Search {
            for _ in 0..ROUNDS {
                let sums = sums_at(best.0);
                let line = sums.least_squares(rule.low_min, best.0);
                let left = sums.left(line);
                if left >= best.1 {
                    break;
                }
                (best, at) = ((line, left), sums);
            }
        }
    }
    Fit { scale: best.0.scale, min: best.0.min, zero: 0, scale_cost: at.ll, min_cost: at.w }
}

/// The best minimum for codes that a stored scale gives, and its cost.
#[inline(always)]
pub(in crate::algo) fn refit_min<S: Simd>(s: S, rule: &Rule, group: Group, scale: f32, min: f32) -> f32 {
    let sums = sums(s, Even::new(s, 0.0, rule.high, 0), group, Line { scale, min });
    let refit = if sums.w > 0.0 { (sums.x - scale * sums.l) / sums.w } else { min };
    if rule.low_min { refit.min(0.0) } else { refit }
}

impl Sums {
    /// The line of least error for these codes.
    #[inline(always)]
    fn least_squares(self, low_min: bool, otherwise: Line) -> Line {
        let determinant = self.w * self.ll - self.l * self.l;
        if determinant <= 0.0 {
            return otherwise;
        }
        let scale = (self.w * self.xl - self.x * self.l) / determinant;
        let min = (self.ll * self.x - self.l * self.xl) / determinant;
        let line = if low_min && min > 0.0 { Line { scale: self.xl / self.ll, min: 0.0 } } else { Line { scale, min } };
        if line.scale > 0.0 { line } else { otherwise }
    }

    /// The error of a line without the constant `sum(w x^2)`.
    #[inline(always)]
    fn left(self, Line { scale, min }: Line) -> f32 {
        scale * scale * self.ll + min * min * self.w + 2.0 * (scale * min * self.l - scale * self.xl - min * self.x)
    }
}

#[inline(always)]
fn sums<S: Simd>(s: S, grid: Even<S>, group: Group, line: Line) -> Sums {
    let (by, min) = (s.splat(inverse(line.scale)), s.splat(line.min));
    let zero = s.splat(0.0);
    let (mut w_sum, mut x_sum, mut l_sum, mut xl, mut ll) = (zero, zero, zero, zero, zero);
    for (x, w) in group.x.chunks(LANES).zip(group.w.chunks(LANES)) {
        let (x, w) = (s.load_partial(x), s.load_partial(w));
        let level = grid.level(s, s.mul(s.sub(x, min), by));
        let weighted = s.mul(w, level);
        w_sum = s.add(w_sum, w);
        x_sum = s.fma(w, x, x_sum);
        l_sum = s.add(l_sum, weighted);
        xl = s.fma(weighted, x, xl);
        ll = s.fma(weighted, level, ll);
    }
    Sums { w: s.sum(w_sum), x: s.sum(x_sum), l: s.sum(l_sum), xl: s.sum(xl), ll: s.sum(ll) }
}
