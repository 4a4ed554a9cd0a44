//! Full-precision numbers for one group: its scale and zero point or minimum.

mod affine;
mod half_quadratic;
mod scaled;

pub(super) use affine::refit_min;

use super::grid::{Even, Table, Uneven};
use crate::{Grid, QuantSpec, ScaleFormat, Zero};
use nibble_kernels::simd::{LANES, Simd};

/// Values that are summed before their sums are: long groups lose no digits.
const SUMMED: usize = 512;

/// How a group's numbers are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    /// The range of the values.
    Plain,
    /// The best of smaller ranges.
    Clip,
    /// The range, with the minimum or zero point that HQQ finds; grids without one are clipped.
    HalfQuadratic,
    /// The least weighted error.
    Search,
}

/// A group's numbers before they are stored.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Fit {
    /// Signed where the spec has signed scales.
    pub(super) scale: f32,
    /// 0 without minimums; never above 0 where minimums are coded.
    pub(super) min: f32,
    /// 0 without zero points.
    pub(super) zero: i32,
    /// `sum w * level^2`: what a unit of squared error in the scale costs.
    pub(super) scale_cost: f32,
    /// `sum w`: what a unit of squared error in the minimum costs.
    pub(super) min_cost: f32,
}

/// The values of a group and what their errors cost.
#[derive(Clone, Copy)]
pub(super) struct Group<'a> {
    pub(super) x: &'a [f32],
    pub(super) w: &'a [f32],
}

/// Scratch for a group's levels, and those next to them.
#[derive(Debug, Default)]
pub(super) struct Levels {
    at: Vec<f32>,
    below: Vec<f32>,
    above: Vec<f32>,
}

impl Levels {
    /// With room for groups of this length.
    pub(super) fn reserve(&mut self, len: usize) {
        [&mut self.at, &mut self.below, &mut self.above].into_iter().for_each(|levels| levels.resize(len, 0.0));
    }
}

/// A spec's grid and zero as the fits need them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rule {
    pub(super) zero: Zero,
    pub(super) table: Option<Table>,
    /// Lowest and highest level; codes with a zero point or minimum.
    pub(super) low: f32,
    pub(super) high: f32,
    /// Code of level 0 of symmetric integers.
    pub(super) middle: i32,
    /// Whether scales may be negative.
    pub(super) signed: bool,
    /// Whether minimums share a sign, so that none may be above 0.
    pub(super) low_min: bool,
}

impl Rule {
    pub(super) fn new(spec: &QuantSpec) -> Rule {
        let (codes, middle) = (spec.codes(), spec.middle());
        let table = match spec.grid {
            Grid::Table(table) => Some(Table::new(table.levels())),
            Grid::Int { .. } => None,
        };
        let (low, high) = match table {
            Some(Table { levels, .. }) => (levels[0], levels[LANES - 1]),
            None => ((*codes.start() as i32 - middle) as f32, (*codes.end() as i32 - middle) as f32),
        };
        let low_min = !matches!(spec.scale, ScaleFormat::Float(_));
        Rule { zero: spec.zero, table, low, high, middle, signed: spec.signed_scales(), low_min }
    }

    /// Lowest and highest level and the code of level 0 of an even grid with this zero point, if it has any.
    #[inline(always)]
    pub(super) fn ends(&self, zero: Option<u8>) -> (f32, f32, i32) {
        match zero {
            Some(zero) => (-(zero as f32), self.high - zero as f32, zero as i32),
            None => (self.low, self.high, self.middle),
        }
    }

    /// What a code means before scale and minimum; `zero` is the code of level 0.
    #[inline(always)]
    pub(super) fn level(&self, code: u8, zero: i32) -> f32 {
        match &self.table {
            Some(table) => table.level(code),
            None => (code as i32 - zero) as f32,
        }
    }

    /// Fits one group.
    #[inline(always)]
    pub(super) fn fit<S: Simd>(&self, s: S, group: Group, method: Method, scratch: &mut Levels) -> Fit {
        let range = Extremes::of(s, group.x);
        if range.lo == 0.0 && range.hi == 0.0 {
            return Fit::default();
        }
        match (self.zero, &self.table) {
            (Zero::Min, _) if method == Method::HalfQuadratic => half_quadratic::fit(self, group, range),
            (Zero::Int, _) if method == Method::HalfQuadratic => half_quadratic::fit_zero(self, group, range),
            (Zero::Min, _) => affine::fit(s, self, group, method, range),
            (Zero::Int, _) => scaled::fit_zero(s, self, group, method, range, scratch),
            (_, Some(table)) => scaled::fit(s, self, Uneven::new(s, table), group, method, range, scratch),
            _ => scaled::fit(s, self, Even::new(s, self.low, self.high, 0), group, method, range, scratch),
        }
    }
}

/// The range of a group's values; `lo` and `hi` don't include 0 by themselves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extremes {
    pub(super) lo: f32,
    pub(super) hi: f32,
}

impl Extremes {
    #[inline(always)]
    fn of<S: Simd>(s: S, x: &[f32]) -> Extremes {
        let first = s.splat(x.first().copied().unwrap_or(0.0));
        let (mut lo, mut hi) = (first, first);
        let mut whole = x.chunks_exact(LANES);
        for x in whole.by_ref() {
            let x = s.load_partial(x);
            (lo, hi) = (s.min(x, lo), s.max(x, hi));
        }
        let (mut low, mut high) = (-s.largest(s.sub(s.splat(0.0), lo)), s.largest(hi));
        for &x in whole.remainder() {
            (low, high) = (low.min(x), high.max(x));
        }
        Extremes { lo: low, hi: high }
    }

    /// With 0 inside.
    fn with_zero(self) -> Extremes {
        Extremes { lo: self.lo.min(0.0), hi: self.hi.max(0.0) }
    }

    /// The value of largest magnitude.
    fn peak(self) -> f32 {
        if self.hi >= -self.lo { self.hi } else { self.lo }
    }
}

/// 1 / scale, or 0 where that would overflow: such groups are all zero.
#[inline(always)]
pub(super) fn inverse(scale: f32) -> f32 {
    let inverse = 1.0 / scale;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// How much smaller than the plain scale the scans go, as factors on its inverse: evenly, as many as are asked for, and
/// again from the first. Long groups have lone large values, and clip them; a fine grid, with `reach` levels a side, clips
/// hardly any.
#[inline(always)]
fn factors<S: Simd>(s: S, len: usize, reach: f32, count: usize) -> S::F32 {
    let (from, to) = match len {
        _ if reach > 24.0 => (0.97, 1.13),
        0..=48 => (0.88, 1.24),
        49..=160 => (0.92, 1.48),
        _ => (0.96, 2.4),
    };
    let mut all = [0.0; LANES];
    for (i, factor) in all.iter_mut().enumerate() {
        *factor = from + (to - from) * (i % count) as f32 / (count - 1) as f32;
    }
    s.load(&all)
}

/// The lane of the least number, if it is less than `than`; the first of several.
#[inline(always)]
pub(super) fn least<S: Simd>(s: S, of: S::F32, than: f32) -> Option<usize> {
    // NaN is never the least.
    let of = s.select(s.lt(of, s.splat(f32::INFINITY)), of, s.splat(f32::INFINITY));
    let least = -s.largest(s.sub(s.splat(0.0), of));
    if least < than { lanes(s, of).iter().position(|&one| one == least) } else { None }
}

/// The numbers of all lanes.
#[inline(always)]
pub(super) fn lanes<S: Simd>(s: S, of: S::F32) -> [f32; LANES] {
    let mut all = [0.0; LANES];
    s.store(of, &mut all);
    all
}
