//! The nearest level of a grid, 16 values at a time.

use nibble_kernels::simd::{LANES, Simd};

/// A grid's levels around its zero, for one instruction set.
pub(super) trait Grid<S: Simd>: Copy {
    /// The nearest level of y = x / scale; of two equally near ones the even integer, or the lower of a table.
    fn level(self, s: S, y: S::F32) -> S::F32;
    /// Its code.
    fn code(self, s: S, y: S::F32) -> S::I32;
    /// The level of a code.
    fn level_of(self, s: S, code: S::I32) -> S::F32;
    /// The next levels below and above a level; at the grid's end the same one.
    fn beside(self, s: S, level: S::F32) -> [S::F32; 2];
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

    /// Levels `-zero..=high - zero` with another zero in each lane, which is a whole number; as levels alone, without codes.
    #[inline(always)]
    pub(super) fn around(s: S, zero: S::F32, high: f32) -> Self {
        Even { low: s.sub(s.splat(0.0), zero), high: s.sub(s.splat(high), zero), zero: s.splat_i32(0) }
    }

    /// Levels `low..=high` around code `middle`, moved to another zero in each lane.
    #[inline(always)]
    pub(super) fn each(s: S, (low, high): (f32, f32), middle: i32, zero: S::I32) -> Self {
        let (zeros, middle) = (s.to_f32(zero), middle as f32);
        Even { low: s.sub(s.splat(low + middle), zeros), high: s.sub(s.splat(high + middle), zeros), zero }
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
    fn level_of(self, s: S, code: S::I32) -> S::F32 {
        // Of codes and zeros below 2^24 the difference is exact.
        s.sub(s.to_f32(code), s.to_f32(self.zero))
    }

    #[inline(always)]
    fn beside(self, s: S, level: S::F32) -> [S::F32; 2] {
        [s.max(s.sub(level, s.splat(1.0)), self.low), s.min(s.add(level, s.splat(1.0)), self.high)]
    }
}

/// Levels of a table and where one turns into the next; where it has less than 16, the last one again and again.
#[derive(Debug, Clone, Copy)]
pub(super) struct Table {
    pub(super) levels: [f32; LANES],
    /// Halfway to the next level; infinite from the last one on.
    middles: [f32; LANES],
}

impl Table {
    pub(super) fn new(levels: [f32; LANES]) -> Table {
        let mut middles = [f32::INFINITY; LANES];
        for i in 0..LANES - 1 {
            // No value lies above the middle between a level and itself.
            if levels[i] < levels[i + 1] {
                middles[i] = (levels[i] + levels[i + 1]) / 2.0;
            }
        }
        Table { levels, middles }
    }

    #[inline(always)]
    pub(super) fn level(&self, code: u8) -> f32 {
        self.levels[code as usize & (LANES - 1)]
    }

    /// The code of the level nearest to `y`, the lower one of two.
    #[inline(always)]
    pub(super) fn code(&self, y: f32) -> u8 {
        self.middles.iter().filter(|middle| **middle < y).count() as u8
    }
}

/// A table, found by halving.
#[derive(Clone, Copy)]
pub(super) struct Uneven<S: Simd> {
    levels: S::F32,
    /// The middle of the table, and those of its halves.
    middle: S::F32,
    halves: [S::F32; 2],
    /// At every fourth code the middle of its four; at every other that of its two.
    fours: S::F32,
    twos: S::F32,
}

impl<S: Simd> Uneven<S> {
    #[inline(always)]
    pub(super) fn new(s: S, table: &Table) -> Self {
        let m = &table.middles;
        let mut fours = [0.0; LANES];
        fours[..LANES - 1].copy_from_slice(&m[1..]);
        Uneven {
            levels: s.load(&table.levels),
            middle: s.splat(m[7]),
            halves: [s.splat(m[3]), s.splat(m[11])],
            fours: s.load(&fours),
            twos: s.load(m),
        }
    }
}

impl<S: Simd> Grid<S> for Uneven<S> {
    #[inline(always)]
    fn level(self, s: S, y: S::F32) -> S::F32 {
        self.level_of(s, self.code(s, y))
    }

    #[inline(always)]
    fn code(self, s: S, y: S::F32) -> S::I32 {
        // The code is the number of middles below y, found bit by bit; it stays a float until the end, since the
        // vocabulary selects among floats.
        let upper = s.lt(self.middle, y);
        let half = s.lt(s.select(upper, self.halves[1], self.halves[0]), y);
        let code = s.select(upper, s.splat(8.0), s.splat(0.0));
        let code = s.select(half, s.add(code, s.splat(4.0)), code);
        let more = s.lt(s.lookup(self.fours, s.to_i32(code)), y);
        let code = s.select(more, s.add(code, s.splat(2.0)), code);
        let more = s.lt(s.lookup(self.twos, s.to_i32(code)), y);
        s.to_i32(s.select(more, s.add(code, s.splat(1.0)), code))
    }

    #[inline(always)]
    fn level_of(self, s: S, code: S::I32) -> S::F32 {
        s.lookup(self.levels, code)
    }

    #[inline(always)]
    fn beside(self, s: S, level: S::F32) -> [S::F32; 2] {
        let code = s.to_f32(self.code(s, level));
        let below = s.max(s.sub(code, s.splat(1.0)), s.splat(0.0));
        let above = s.min(s.add(code, s.splat(1.0)), s.splat((LANES - 1) as f32));
        [s.lookup(self.levels, s.to_i32(below)), s.lookup(self.levels, s.to_i32(above))]
    }
}
