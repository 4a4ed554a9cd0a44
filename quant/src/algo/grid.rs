//! The nearest level of a grid, 16 values at a time.

use nibble_kernels::simd::{LANES, Simd};

/// A grid's levels around its zero, for one instruction set.
pub(super) trait Grid<S: Simd>: Copy {
    /// The nearest level of y = x / scale; of two equally near ones the even integer, or the lower of a table.
    fn level(self, s: S, y: S::F32) -> S::F32;
    /// Its code.
    fn code(self, s: S, y: S::F32) -> S::I32;
    /// The next level above where `up`, else below; the same level at the grid's end.
    fn beside(self, s: S, level: S::F32, up: S::Mask) -> S::F32;
}

/// The place of a value among the levels of a table, a fraction: between two levels by how far it lies from one to the next,
/// beyond the ends as if they went on.
#[derive(Clone, Copy)]
pub(super) struct Places<S: Simd> {
    levels: S::F32,
    /// Where the next pair of levels begins.
    begins: S::F32,
    /// One over the distance to the next level.
    gaps: S::F32,
}

impl<S: Simd> Places<S> {
    #[inline(always)]
    pub(super) fn new(s: S, levels: &[f32; LANES]) -> Self {
        let (mut begins, mut gaps) = ([f32::INFINITY; LANES], [0f32; LANES]);
        for i in 0..LANES - 1 {
            if levels[i] < levels[i + 1] {
                gaps[i] = 1.0 / (levels[i + 1] - levels[i]);
                // After the last pair there is none.
                if i + 2 < LANES && levels[i + 1] < levels[i + 2] {
                    begins[i] = levels[i + 1];
                }
            }
        }
        Places { levels: s.load(levels), begins: s.load(&begins), gaps: s.load(&gaps) }
    }

    #[inline(always)]
    pub(super) fn of(self, s: S, y: S::F32) -> S::F32 {
        let mut at = s.splat(0.0);
        for bit in [8, 4, 2, 1] {
            let begin = s.lookup(self.begins, s.to_i32(s.add(at, s.splat((bit - 1) as f32))));
            at = s.select(s.lt(begin, y), s.add(at, s.splat(bit as f32)), at);
        }
        let index = s.to_i32(at);
        s.fma(s.sub(y, s.lookup(self.levels, index)), s.lookup(self.gaps, index), at)
    }
}

/// Evenly spaced levels `low..=high`; code = level + `zero`.
#[derive(Clone, Copy)]
pub(super) struct Even<S: Simd> {
    low: S::F32,
    high: S::F32,
    zero: S::I32,
}

impl<S: Simd> Even<S> {
    #[inline(always)]
    pub(super) fn new(s: S, low: f32, high: f32, zero: i32) -> Self {
        Even { low: s.splat(low), high: s.splat(high), zero: s.splat_i32(zero) }
    }

    #[inline(always)]
    fn round(self, s: S, y: S::F32) -> S::I32 {
        s.to_i32(s.min(s.max(y, self.low), self.high))
    }
}

impl<S: Simd> Grid<S> for Even<S> {
    #[inline(always)]
    fn level(self, s: S, y: S::F32) -> S::F32 {
        s.to_f32(self.round(s, y))
    }

    #[inline(always)]
    fn code(self, s: S, y: S::F32) -> S::I32 {
        s.add_i32(self.round(s, y), self.zero)
    }

    #[inline(always)]
    fn beside(self, s: S, level: S::F32, up: S::Mask) -> S::F32 {
        let to = s.add(level, s.select(up, s.splat(1.0), s.splat(-1.0)));
        s.min(s.max(to, self.low), self.high)
    }
}

/// The levels of a table, found by halving; where it has less than 16, the last one again and again.
#[derive(Clone, Copy)]
pub(super) struct Uneven<S: Simd> {
    levels: S::F32,
    middles: S::F32,
}

impl<S: Simd> Uneven<S> {
    #[inline(always)]
    pub(super) fn new(s: S, levels: &[f32; LANES]) -> Self {
        let mut middles = [f32::INFINITY; LANES];
        for i in 0..LANES - 1 {
            // No value lies above the middle between a level and itself.
            if levels[i] < levels[i + 1] {
                middles[i] = (levels[i] + levels[i + 1]) / 2.0;
            }
        }
        Uneven { levels: s.load(levels), middles: s.load(&middles) }
    }
}

impl<S: Simd> Grid<S> for Uneven<S> {
    #[inline(always)]
    fn level(self, s: S, y: S::F32) -> S::F32 {
        s.lookup(self.levels, self.code(s, y))
    }

    #[inline(always)]
    fn code(self, s: S, y: S::F32) -> S::I32 {
        // The code is the number of middles below y, found bit by bit; it stays a float until the end, since the
        // vocabulary selects among floats.
        let mut code = s.splat(0.0);
        for bit in [8, 4, 2, 1] {
            let middle = s.lookup(self.middles, s.to_i32(s.add(code, s.splat((bit - 1) as f32))));
            code = s.select(s.lt(middle, y), s.add(code, s.splat(bit as f32)), code);
        }
        s.to_i32(code)
    }

    #[inline(always)]
    fn beside(self, s: S, level: S::F32, up: S::Mask) -> S::F32 {
        let code = s.to_f32(self.code(s, level));
        let to = s.add(code, s.select(up, s.splat(1.0), s.splat(-1.0)));
        let to = s.min(s.max(to, s.splat(0.0)), s.splat((LANES - 1) as f32));
        s.lookup(self.levels, s.to_i32(to))
    }
}
