//! `x = scale * level`: one number a group.
//!
//! For fixed levels the best scale is `d = sum(w x l) / sum(w l^2)`, and what is left of the error is
//! `sum(w x^2) - F` with `F = sum(w x l)^2 / sum(w l^2)`. The search maximises F: over a scan of scales, 16 side by side,
//! then by moving the one code that raises F most by one level, as long as one does.

use super::super::grid::{Even, Grid};
use super::{Extremes, Fit, Group, Levels, Method, Rule, SUMMED, factors, inverse, lanes, least};
use nibble_kernels::simd::{LANES, Simd};

/// Longest group whose single codes are stepped; in longer ones a step changes next to nothing.
const STEPPED: usize = 1024;
/// Longest group in which steps make up for a coarser scan: 8 scales of either sign instead of 16.
const COARSE: usize = 64;

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
    scratch: &mut Levels,
) -> Fit {
    let peak = range.peak();
    // The end of the grid that reaches furthest, and the other one.
    let (end, other) = if rule.high >= -rule.low { (rule.high, rule.low) } else { (rule.low, rule.high) };
    let scale = if rule.signed && end != -other { peak / end } else { peak.abs() / end.abs() };
    let mut best = Candidate::plain(scale);
    if method != Method::Plain {
        // The levels of a table are few, whatever units they are in.
        let reach = if rule.table.is_some() { 8.0 } else { rule.high };
        let plain = inverse(scale);
        let turned = match rule.signed {
            true if end == -other => -plain,
            true => other / peak,
            false => plain,
        };
        if rule.signed && method == Method::Search && group.x.len() <= COARSE {
            let mut ends = [plain; LANES];
            ends[LANES / 2..].fill(turned);
            let factors = factors(s, group.x.len(), reach, LANES / 2);
            best.offer(s, grid, group, s.mul(factors, s.load(&ends)), method);
        } else {
            let factors = factors(s, group.x.len(), reach, LANES);
            best.offer(s, grid, group, s.mul(factors, s.splat(plain)), method);
            if rule.signed {
                best.offer(s, grid, group, s.mul(factors, s.splat(turned)), method);
            }
        }
    }
    best.finish(s, grid, group, method, scratch)
}

/// Integers with a zero point: the same with shifted ends, over the zero points next to the plain one.
#[inline(always)]
pub(super) fn fit_zero<S: Simd>(
    s: S,
    rule: &Rule,
    group: Group,
    method: Method,
    range: Extremes,
    scratch: &mut Levels,
) -> Fit {
    let range = range.with_zero();
    let scale = (range.hi - range.lo) / rule.high;
    let plain = inverse(scale);
    let mut zero = (-range.lo * plain).round_ties_even().clamp(0.0, rule.high);
    let mut best = Candidate::plain(scale);
    if method != Method::Plain {
        let inverses = s.mul(factors(s, group.x.len(), 0.5 * rule.high, LANES), s.splat(plain));
        // The middle of the range stays in the middle of the grid.
        let centre = s.fnma(s.splat(0.5 * (range.hi + range.lo)), inverses, s.splat(0.5 * rule.high));
        let centre = s.to_f32(s.to_i32(centre));
        for shift in [0.0, -1.0, 1.0] {
            let zeros = s.min(s.max(s.add(centre, s.splat(shift)), s.splat(0.0)), s.splat(rule.high));
            if let Some(lane) = best.offer(s, Even::around(s, zeros, rule.high), group, inverses, method) {
                zero = lanes(s, zeros)[lane];
            }
        }
    }
    let grid = Even::around(s, s.splat(zero), rule.high);
    Fit { zero: zero as i32, ..best.finish(s, grid, group, method, scratch) }
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
    /// The scale to fall back on; the scans offer it again.
    #[inline(always)]
    fn plain(scale: f32) -> Candidate {
        Candidate { inverse: inverse(scale), scale, sums: Sums { xl: 0.0, ll: 0.0 }, left: f32::INFINITY }
    }

    /// Takes the best of 16 inverse scales if it is better; says which lane that was.
    #[inline(always)]
    fn offer<S: Simd, G: Grid<S>>(
        &mut self,
        s: S,
        grid: G,
        group: Group,
        inverses: S::F32,
        method: Method,
    ) -> Option<usize> {
        let (xl, ll) = sums(s, grid, group, inverses);
        let (zero, never) = (s.splat(0.0), s.splat(f32::INFINITY));
        let left = match method {
            Method::Search => {
                let explained = s.div(s.mul(xl, xl), ll);
                let along = s.lt(zero, s.mul(xl, inverses));
                s.select(along, s.sub(zero, explained), never)
            }
            Method::Plain | Method::Clip | Method::HalfQuadratic => {
                let scale = s.div(s.splat(1.0), inverses);
                s.mul(scale, s.fma(scale, ll, s.mul(s.splat(-2.0), xl)))
            }
        };
        let lane = least(s, left, self.left)?;
        let inverse = lanes(s, inverses)[lane];
        *self = Candidate {
            inverse,
            scale: super::inverse(inverse),
            sums: Sums { xl: lanes(s, xl)[lane], ll: lanes(s, ll)[lane] },
            left: lanes(s, left)[lane],
        };
        Some(lane)
    }

    #[inline(always)]
    fn finish<S: Simd, G: Grid<S>>(mut self, s: S, grid: G, group: Group, method: Method, scratch: &mut Levels) -> Fit {
        let mut scale = self.scale;
        if method == Method::Search && self.sums.ll > 0.0 {
            if group.x.len() <= STEPPED {
                self.sums = steps(s, grid, group, self.inverse, self.sums, scratch);
            }
            // Squares of tiny or huge values leave f32; the scanned scale is good enough there.
            let fitted = self.sums.scale();
            scale = if fitted.is_finite() && fitted != 0.0 { fitted } else { scale };
        }
        Fit { scale, scale_cost: self.sums.ll, ..Fit::default() }
    }
}

/// `sum(w x l)` and `sum(w l^2)` under 16 inverse scales.
#[inline(always)]
fn sums<S: Simd, G: Grid<S>>(s: S, grid: G, group: Group, inverses: S::F32) -> (S::F32, S::F32) {
    let (mut xl, mut ll) = (s.splat(0.0), s.splat(0.0));
    for (x, w) in group.x.chunks(SUMMED).zip(group.w.chunks(SUMMED)) {
        let (mut some_xl, mut some_ll) = (s.splat(0.0), s.splat(0.0));
        for (&x, &w) in x.iter().zip(w) {
            let x = s.splat(x);
            let level = grid.level(s, s.mul(x, inverses));
            let weighted = s.mul(s.splat(w), level);
            some_xl = s.fma(weighted, x, some_xl);
            some_ll = s.fma(weighted, level, some_ll);
        }
        (xl, ll) = (s.add(xl, some_xl), s.add(ll, some_ll));
    }
    (xl, ll)
}

/// Steps single codes by one level, each once, while F rises; the sums that are reached.
#[inline(always)]
fn steps<S: Simd, G: Grid<S>>(s: S, grid: G, group: Group, inverse: f32, sums: Sums, scratch: &mut Levels) -> Sums {
    let len = group.x.len();
    scratch.reserve(len);
    let by = s.splat(inverse);
    for start in (0..len).step_by(LANES) {
        let chunk = start..(start + LANES).min(len);
        let level = grid.level(s, s.mul(s.load_partial(&group.x[chunk.clone()]), by));
        let [below, above] = grid.beside(s, level);
        s.store_partial(level, &mut scratch.at[chunk.clone()]);
        s.store_partial(below, &mut scratch.below[chunk.clone()]);
        s.store_partial(above, &mut scratch.above[chunk]);
    }
    let mut sums = sums;
    for _ in 0..len {
        let before = sums.explained();
        let Some(Step { at, to }) = best_step(s, group, sums, before * (1.0 + 1e-6), scratch) else { break };
        // Sums are updated as the vector did it, but F is compared once more: rounding must not loop.
        let (x, w, from) = (group.x[at], group.w[at], scratch.at[at]);
        let after = Sums { xl: sums.xl + w * x * (to - from), ll: sums.ll + w * (to * to - from * from) };
        if after.explained() <= before * (1.0 + 1e-6) {
            break;
        }
        // It may step back.
        let [below, above] = if from < to { [from, to] } else { [to, from] };
        (scratch.at[at], scratch.below[at], scratch.above[at]) = (to, below, above);
        sums = after;
    }
    sums
}

struct Step {
    at: usize,
    to: f32,
}

/// The single step to a neighbouring level, towards the value, that raises F most, if beyond `than`.
#[inline(always)]
fn best_step<S: Simd>(s: S, group: Group, sums: Sums, than: f32, scratch: &Levels) -> Option<Step> {
    let len = group.x.len();
    let (xl, ll) = (s.splat(sums.xl), s.splat(sums.ll));
    let scale = sums.scale();
    let (by, zero) = (s.splat(scale), s.splat(0.0));
    let sign = s.splat(scale.signum());
    let mut best = s.splat(than);
    let (mut best_at, mut best_to) = (zero, zero);
    for start in (0..len).step_by(LANES) {
        let chunk = start..(start + LANES).min(len);
        let (x, w) = (s.load_partial(&group.x[chunk.clone()]), s.load_partial(&group.w[chunk.clone()]));
        let l = s.load_partial(&scratch.at[chunk.clone()]);
        // Where the value lies from its level, in the direction of rising levels.
        let off = s.mul(s.fnma(by, l, x), sign);
        let (below, above) = (s.load_partial(&scratch.below[chunk.clone()]), s.load_partial(&scratch.above[chunk]));
        let to = s.select(s.lt(zero, off), above, below);
        let xl = s.fma(s.mul(w, x), s.sub(to, l), xl);
        let ll = s.fma(w, s.sub(s.mul(to, to), s.mul(l, l)), ll);
        let explained = s.div(s.mul(xl, xl), ll);
        let better = s.lt(best, explained);
        best = s.select(better, explained, best);
        best_at = s.select(better, s.splat(start as f32), best_at);
        best_to = s.select(better, to, best_to);
    }
    let most = s.largest(best);
    if most <= than {
        return None;
    }
    let lane = lanes(s, best).iter().position(|&one| one == most)?;
    let at = lanes(s, best_at)[lane] as usize + lane;
    (at < len).then_some(Step { at, to: lanes(s, best_to)[lane] })
}
