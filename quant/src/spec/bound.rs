//! How far a value can land from where it was: the law that plain rounding is held to.
//!
//! Half a step, where the nearest level is taken; what a rounded scale makes of the step and of the end of the grid;
//! and, through a second level, the same once more for the scales themselves.

use super::{FloatFormat, Grid, OutlierSpec, QuantSpec, ScaleFormat, Zero};

/// The smallest and largest value of a set, zero included.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Range {
    /// The smallest value, or 0.
    pub lo: f32,
    /// The largest value, or 0.
    pub hi: f32,
}

impl Range {
    /// Of these values, zero included: a grid has to hold it.
    pub fn of(values: &[f32]) -> Range {
        values.iter().fold(Range::default(), |r, &v| Range { lo: r.lo.min(v), hi: r.hi.max(v) })
    }

    /// The largest magnitude.
    pub fn absmax(self) -> f32 {
        self.hi.max(-self.lo)
    }

    /// Smallest to largest.
    pub fn width(self) -> f32 {
        self.hi - self.lo
    }
}

impl QuantSpec {
    /// Bound on |x - Q(x)| for every value of a group in `group` under plain rounding (`rtn`).
    ///
    /// `shared` is the range of all the values that share the group's second-level scale: its span, the tensor with
    /// [`ScaleFormat::Dynamic`], or the group again with one level. Searched scales may clip and are held to the error
    /// of plain rounding instead. The bound holds for values whose scales are finite in the scale's format.
    pub fn error_bound(&self, group: Range, shared: Range) -> f32 {
        let (scale, worst) = (self.plain_scale(group), self.plain_scale(shared));
        let scale_error = match self.scale {
            ScaleFormat::Float(float) => rounding(float, scale),
            // The second level is the largest scale over the largest code; rounded down, that code falls short of it.
            ScaleFormat::Coded { bits, second, .. } => {
                let top = ((1u32 << if self.signed_scales() { bits - 1 } else { bits }) - 1) as f32;
                0.5 * worst / top + (top + 1.0) * rounding(second, worst / top)
            }
            // Neighbours in the dynamic map are at most 0.9 / 64 apart, and it is scaled by |scale - mean| <= worst.
            ScaleFormat::Dynamic { .. } => worst * (0.9 / 128.0 + 4.0 * f32::EPSILON),
        };
        let (steps, gap) = self.reach();
        let min = match (self.zero, self.scale) {
            (Zero::Min, ScaleFormat::Float(float)) => rounding(float, group.absmax()),
            (Zero::Min, ScaleFormat::Coded { bits, second, .. }) => {
                let (low, top) = (-shared.lo, ((1u32 << bits) - 1) as f32);
                0.5 * low / top + (top + 1.0) * rounding(second, low / top)
            }
            _ => 0.0,
        };
        let outlier = match self.outliers {
            OutlierSpec::None => 0.0,
            _ => rounding(FloatFormat::F16, group.absmax() + shared.absmax()),
        };
        let arithmetic = 8.0 * f32::EPSILON * (group.absmax() + steps * (scale + scale_error) + min);
        0.5 * gap * (scale + scale_error) + steps * scale_error + min + outlier + arithmetic
    }

    /// The scale that plain rounding takes for a group, before it is stored; positive.
    pub fn plain_scale(&self, group: Range) -> f32 {
        match self.zero {
            Zero::Symmetric | Zero::FullRange => group.absmax() / self.reach().0,
            Zero::Int | Zero::Min => group.width() / self.reach().0,
        }
    }

    /// How far the grid reaches from its zero (from its lowest code with a zero point or minimum) in levels, and the
    /// widest gap between neighbouring levels.
    fn reach(&self) -> (f32, f32) {
        match (self.grid, self.zero) {
            (Grid::Int { bits }, Zero::Symmetric) => (((1 << (bits - 1)) - 1) as f32, 1.0),
            // The far end is one level short of the near one: a value of the opposite sign and full magnitude lands a
            // whole step away, which is a gap of two halves.
            (Grid::Int { bits }, Zero::FullRange) => ((1 << (bits - 1)) as f32, 2.0),
            (Grid::Int { bits }, Zero::Int | Zero::Min) => (((1u32 << bits) - 1) as f32, 1.0),
            (Grid::Table(table), _) => {
                let levels = table.levels();
                let reach = levels[0].abs().max(levels[15].abs());
                let short = reach - levels[0].abs().min(levels[15].abs());
                let gap = levels.windows(2).map(|w| w[1] - w[0]).fold(2.0 * short, f32::max);
                (reach, gap)
            }
        }
    }
}

/// Error of a number rounded to a float format.
fn rounding(float: FloatFormat, value: f32) -> f32 {
    value.abs() * float.epsilon() + float.tiny()
}
