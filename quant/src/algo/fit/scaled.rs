//! `x = scale * level`: one number a group.
//!
//! For fixed levels the best scale is `d = sum(w x l) / sum(w l^2)`, and what is left of the error is
//! `sum(w x^2) - F` with `F = sum(w x l)^2 / sum(w l^2)`. The search maximises F: over a scan of scales, then by moving
//! the one code that raises F most by one level, as long as one does.

use super::super::grid::{Even, Grid};
use super::{Extremes, Fit, Group, Method, Rule, factors, inverse};
use nibble_kernels::simd::{LANES, Simd};

/// Longest group whose single codes are stepped; in longer ones a step changes next to nothing.
const STEPPED: usize = 1024;
/// Scales tried in a scan.
const SCAN: usize = 17;

/// `sum(w x l)` and `sum(w l^2)`.
#[derive(Clone, Copy)]
struct Sums {
    xl: f32,
    ll: f32,
}

impl Sums {
    #[inline(always)]
    fn explained(self) -> f32 {
        if self.ll > 0.0 { self.xl * self.xl / self.ll } else { 0.0 }
    }

    #[inline(always)]
    fn scale(self) -> f32 {
        if self.ll > 0.0 { self.xl / self.ll } else { 0.0 }
    }
}

/// Symmetric integers and tables.
#[inline(always)]
pub(super) fn fit<S: Simd, G: Grid<S>>(
    s: S,
    rule: &Rule,
    grid: G,
    group: Group,
    method: Method,
    range: Extremes,
    levels: &mut [f32],
) -> Fit {
    let peak = range.peak();
    // The end of the grid that reaches furthest, and the other one.
    let (end, other) = if rule.high >= -rule.low { (rule.high, rule.low) } else { (rule.low, rule.high) };
    let scale = if rule.signed && end != -other { peak / end } else { peak.abs() / end.abs() };
    let plain = inverse(scale);
    let mut best = Candidate::plain(sums(s, grid, group, plain), plain, scale);
    // The levels of a table are few, whatever units they are in.
    let reach = if rule.table.is_some() { 8.0 } else { rule.high };
    if method != Method::Plain {
        best.offer(s, grid, group, plain, method);
        for factor in factors(group.x.len(), reach, SCAN) {
            best.offer(s, grid, group, plain * factor, method);
        }
        if rule.signed {
            let turned = if end == -other { -plain } else { other / peak };
            for factor in factors(group.x.len(), reach, SCAN) {
                best.offer(s, grid, group, turned * factor, method);
            }
        }
    }
    best.finish(s, grid, group, method, levels)
}

/// Integers with a zero point: the same with shifted ends, over the zero points next to the plain one.
#[inline(always)]
pub(super) fn fit_zero<S: Simd>(
    s: S,
    rule: &Rule,
    group: Group,
    method: Method,
    range: Extremes,
    levels: &mut [f32],
) -> Fit {
    let range = range.with_zero();
    let scale = (range.hi - range.lo) / rule.high;
    let plain = inverse(scale);
    let zero_at = |inverse: f32| (-range.lo * inverse).round_ties_even().clamp(0.0, rule.high);
    let even = |zero: f32| Even::new(s, -zero, rule.high - zero, 0);
    let mut zero = zero_at(plain);
    let mut best = Candidate::plain(sums(s, even(zero), group, plain), plain, scale);
    if method != Method::Plain {
        best.offer(s, even(zero), group, plain, method);
        for factor in factors(group.x.len(), 0.5 * rule.high, SCAN) {
            let inverse = plain * factor;
            // The middle of the range stays in the middle of the grid.
            let centre = (0.5 * rule.high - 0.5 * (range.hi + range.lo) * inverse).round_ties_even();
            for shift in [-1.0, 0.0, 1.0] {
                let shifted = (centre + shift).clamp(0.0, rule.high);
                if best.offer(s, even(shifted), group, inverse, method) {
                    zero = shifted;
                }
            }
        }
    }
    Fit { zero: zero as i32, ..best.finish(s, even(zero), group, method, levels) }
}

/// The best inverse scale so far.
#[derive(Clone, Copy)]
struct Candidate {
    inverse: f32,
    scale: f32,
    sums: Sums,
    /// What is left of the error without the constant `sum(w x^2)`: smaller is better.
    left: f32,
}

impl Candidate {
    #[inline(always)]
    fn plain(sums: Sums, inverse: f32, scale: f32) -> Candidate {
        Candidate { inverse, scale, sums, left: scale * scale * sums.ll - 2.0 * scale * sums.xl }
    }

    /// Takes an inverse scale if it is better; says whether it was.
    #[inline(always)]
    fn offer<S: Simd, G: Grid<S>>(&mut self, s: S, grid: G, group: Group, inverse: f32, method: Method) -> bool {
        let (sums, scale) = (sums(s, grid, group, inverse), super::inverse(inverse));
        let left = match method {
            Method::Search if sums.scale() * inverse >= 0.0 => -sums.explained(),
            Method::Search => return false,
            Method::Plain | Method::Clip | Method::HalfQuadratic => Candidate::plain(sums, inverse, scale).left,
        };
        let better = left < self.left;
        if better {
            *self = Candidate { inverse, scale, sums, left };
        }
        better
    }

    #[inline(always)]
    fn finish<S: Simd, G: Grid<S>>(mut self, s: S, grid: G, group: Group, method: Method, levels: &mut [f32]) -> Fit {
        let mut scale = self.scale;
        if method == Method::Search && self.sums.ll > 0.0 {
            if group.x.len() <= STEPPED {
                self.sums = steps(s, grid, group, self.inverse, self.sums, levels);
            }
            // Squares of tiny or huge values leave f32; the scanned scale is good enough there.
            let fitted = self.sums.scale();
            scale = if fitted.is_finite() && fitted != 0.0 { fitted } else { scale };
        }
        Fit { scale, scale_cost: self.sums.ll, ..Fit::default() }
    }
}

#[inline(always)]
fn sums<S: Simd, G: Grid<S>>(s: S, grid: G, group: Group, inverse: f32) -> Sums {
    let by = s.splat(inverse);
    let (mut xl, mut ll) = (s.splat(0.0), s.splat(0.0));
    for (x, w) in group.x.chunks(LANES).zip(group.w.chunks(LANES)) {
        let (x, w) = (s.load_partial(x), s.load_partial(w));
        let level = grid.level(s, s.mul(x, by));
        let weighted = s.mul(w, level);
        xl = s.fma(weighted, x, xl);
        ll = s.fma(weighted, level, ll);
    }
    Sums { xl: s.sum(xl), ll: s.sum(ll) }
}

/// Steps single codes by one level while F rises; the sums that are reached.
#[inline(always)]
fn steps<S: Simd, G: Grid<S>>(s: S, grid: G, group: Group, inverse: f32, sums: Sums, levels: &mut [f32]) -> Sums {
    let by = s.splat(inverse);
    for (x, l) in group.x.chunks(LANES).zip(levels.chunks_mut(LANES)) {
        s.store_partial(grid.level(s, s.mul(s.load_partial(x), by)), l);
    }
    let mut sums = sums;
    for _ in 0..group.x.len() {
        let (scale, before) = (sums.scale(), sums.explained());
        let Some(step) = best_step(s, grid, group, sums, scale, levels) else { break };
        // Sums are updated as the vector did it, but F is compared once more: rounding must not loop.
        let (x, w, from) = (group.x[step.at], group.w[step.at], levels[step.at]);
        let after =
            Sums { xl: sums.xl + w * x * (step.to - from), ll: sums.ll + w * (step.to * step.to - from * from) };
        if after.explained() <= before * (1.0 + 1e-6) {
            break;
        }
        levels[step.at] = step.to;
        sums = after;
    }
    sums
}

struct Step {
    at: usize,
    to: f32,
}

/// The single step to a neighbouring level, towards the value, that raises F most.
#[inline(always)]
fn best_step<S: Simd, G: Grid<S>>(s: S, grid: G, group: Group, sums: Sums, scale: f32, levels: &[f32]) -> Option<Step> {
    let (xl, ll) = (s.splat(sums.xl), s.splat(sums.ll));
    let (by, zero) = (s.splat(scale), s.splat(0.0));
    let sign = s.splat(scale.signum());
    let mut best = s.splat(sums.explained());
    let (mut best_at, mut best_to) = (s.splat(-1.0), zero);
    let values = group.x.chunks(LANES).zip(group.w.chunks(LANES)).zip(levels.chunks(LANES));
    for (chunk, ((x, w), l)) in values.enumerate() {
        let (x, w, l) = (s.load_partial(x), s.load_partial(w), s.load_partial(l));
        // Where the value lies from its level, in the direction of rising levels.
        let off = s.mul(s.fnma(by, l, x), sign);
        let to = grid.beside(s, l, s.lt(zero, off));
        let xl = s.fma(s.mul(w, x), s.sub(to, l), xl);
        let ll = s.fma(w, s.sub(s.mul(to, to), s.mul(l, l)), ll);
        let explained = s.div(s.mul(xl, xl), ll);
        let better = s.lt(best, explained);
        best = s.select(better, explained, best);
        best_at = s.select(better, s.splat(chunk as f32), best_at);
        best_to = s.select(better, to, best_to);
    }
    let (mut gains, mut at, mut to) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
    s.store(best, &mut gains);
    s.store(best_at, &mut at);
    s.store(best_to, &mut to);
    let lane = (0..LANES).filter(|&i| at[i] >= 0.0).reduce(|a, b| if gains[b] > gains[a] { b } else { a })?;
    let index = at[lane] as usize * LANES + lane;
    (index < group.x.len()).then_some(Step { at: index, to: to[lane] })
}
