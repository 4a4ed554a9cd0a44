//! The first of many values that is bad, where most have none that is.

use rayon::prelude::*;

/// Values that are judged together.
const STRETCH: usize = 1 << 16;

/// The place of the first value that is bad. Stretches of values are judged without a branch in them, in parallel.
pub(crate) fn first_where<T: Sync>(values: &[T], bad: impl Fn(&T) -> bool + Sync) -> Option<usize> {
    let holds = |stretch: &[T]| stretch.iter().fold(false, |found, value| found | bad(value));
    let from = STRETCH * values.par_chunks(STRETCH).position_first(holds)?;
    values[from..].iter().position(bad).map(|at| from + at)
}
