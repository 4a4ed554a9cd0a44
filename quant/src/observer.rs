//! What values a tensor takes, over any number of samples, and which range of integers they ask for.
//!
//! ```text
//! batches ---> Statistics (one a tensor or channel, merged in any order) ---> Observer ---> Range ---> QParams
//!              count, extremes, squares, histogram                            OBSERVERS     lo..hi     scale, zero
//! ```
//!
//! [`Statistics`] are all that is kept of the samples, and their size doesn't grow with them. They obey a merge law:
//! what two halves of the samples left, merged in either order, is what all of them leave in one go, so that
//! calibration can run in parallel. Rows of [`OBSERVERS`] differ only in which range they read off the statistics.

mod entropy;
mod histogram;
mod observed;
mod params;
mod percentile;
mod squared;
mod statistics;

pub use histogram::Histogram;
pub use observed::Observed;
pub use params::{IntGrid, IntType, QParams};
pub use statistics::Statistics;

use crate::error::Result;
use crate::{QuantError, Range};

/// A way to read a range off statistics.
#[derive(Debug)]
pub struct Observer {
    /// The word for it in recipes and flags.
    pub name: &'static str,
    /// One line on what it does.
    pub summary: &'static str,
    /// Whether the statistics need a histogram.
    pub histogram: bool,
    /// The number that may follow the name, as in `percentile:99.9`.
    pub parameter: Option<Parameter>,
    /// The range for a grid, zero included, within what was seen (or its mirror image). The number is the parameter.
    range: fn(&Statistics, f64, IntGrid) -> Range,
}

/// A number that an observer takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Parameter {
    /// What it says.
    pub what: &'static str,
    /// What it is where none is given.
    pub default: f64,
    /// Above this.
    pub above: f64,
    /// At most this.
    pub most: f64,
}

/// Every observer, cheapest first.
pub static OBSERVERS: &[Observer] = &[
    Observer {
        name: "minmax",
        summary: "smallest to largest value",
        histogram: false,
        parameter: None,
        range: |seen, _, _| seen.range(),
    },
    Observer {
        name: "absmax",
        summary: "the largest magnitude, both sides of zero",
        histogram: false,
        parameter: None,
        range: |seen, _, _| Range { lo: -seen.range().absmax(), hi: seen.range().absmax() },
    },
    Observer {
        name: "average",
        summary: "mean over the batches of their smallest and largest values",
        histogram: false,
        parameter: None,
        range: |seen, _, _| seen.average_range(),
    },
    Observer {
        name: "rms",
        summary: "so many times the root mean square, both sides of zero, within the extremes",
        histogram: false,
        parameter: Some(Parameter { what: "root mean squares", default: 6.0, above: 0.0, most: 1e6 }),
        range: |seen, times, _| {
            let reach = (times * seen.mean_square().sqrt()) as f32;
            Range { lo: seen.range().lo.max(-reach), hi: seen.range().hi.min(reach) }
        },
    },
    Observer {
        name: "percentile",
        summary: "the range of so many percent of the values, the same share cut off at both ends",
        histogram: true,
        parameter: Some(Parameter { what: "percent of the values", default: 99.999, above: 0.0, most: 100.0 }),
        range: percentile::range,
    },
    Observer {
        name: "entropy",
        summary: "the threshold whose quantized distribution diverges least (TensorRT's KL search, 2048 bins)",
        histogram: true,
        parameter: None,
        range: |seen, _, grid| entropy::range(seen, grid),
    },
    Observer {
        name: "mse",
        summary: "the range of least mean squared error",
        histogram: true,
        parameter: None,
        range: |seen, _, grid| squared::range(seen, grid),
    },
];

/// A row of [`OBSERVERS`] and its number.
#[derive(Debug, Clone, Copy)]
pub struct Choice {
    /// The row.
    pub observer: &'static Observer,
    /// Its parameter; unused by rows that have none.
    pub parameter: f64,
}

/// The observer of that name, `percentile`, `percentile:99.9` or `percentile=99.9`.
///
/// # Errors
/// There is none, it takes no number, or the number is out of its bounds.
pub fn choose(text: &str) -> Result<Choice> {
    let refuse = |why: String| QuantError::Spec { what: format!("observer `{text}`"), why };
    let (name, number) = match text.split_once([':', '=']) {
        Some((name, number)) => (name, Some(number)),
        None => (text, None),
    };
    let observer = OBSERVERS
        .iter()
        .find(|o| o.name == name)
        .ok_or_else(|| refuse(crate::names::unknown(name, OBSERVERS.iter().map(|o| o.name))))?;
    let parameter = match (number, observer.parameter) {
        (None, parameter) => parameter.map_or(0.0, |p| p.default),
        (Some(_), None) => return Err(refuse(format!("`{name}` takes no number"))),
        (Some(number), Some(Parameter { what, above, most, .. })) => match number.parse::<f64>() {
            Ok(value) if value > above && value <= most => value,
            _ => return Err(refuse(format!("`{number}`, wanted {what} above {above} and at most {most}"))),
        },
    };
    Ok(Choice { observer, parameter })
}

impl Choice {
    /// The range that `seen` asks for on a grid; zero is in it.
    ///
    /// # Errors
    /// `name` has seen no value, or values that aren't finite (their number is said), or statistics lack the histogram
    /// that this observer reads.
    pub fn range(&self, name: &str, seen: &Statistics, grid: IntGrid) -> Result<Range> {
        let refuse = |why: String| QuantError::Tensor { name: name.into(), why };
        if seen.not_finite() > 0 {
            let (nan, infinite) = (seen.nans(), seen.infinities());
            let of = seen.count() + seen.not_finite();
            return Err(refuse(format!("{nan} NaN and {infinite} infinite among {of} observed values")));
        }
        if seen.count() == 0 {
            return Err(refuse("no value was observed; calibration data never reached it".into()));
        }
        if self.observer.histogram && seen.histogram().is_none() {
            return Err(refuse(format!("observer `{}` needs a histogram; none was kept", self.observer.name)));
        }
        Ok((self.observer.range)(seen, self.parameter, grid))
    }

    /// Scale and zero point of a grid for what was seen.
    ///
    /// # Errors
    /// As [`Choice::range`].
    pub fn params(&self, name: &str, seen: &Statistics, grid: IntGrid) -> Result<QParams> {
        Ok(grid.params(self.range(name, seen, grid)?))
    }
}
