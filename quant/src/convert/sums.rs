//! What quantizing changed, as sums of squares.

use crate::QTensor;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// A block's part of what is known about its tensor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Sums {
    /// Sum of squares of the values.
    signal: f64,
    /// Sum of squares of what quantization changed.
    error: f64,
}

impl Sums {
    /// Of one block: row sums in parallel, added up in order, so that they are the same for any number of threads.
    pub(super) fn of(tensor: &QTensor, values: &[f32]) -> Sums {
        let k = tensor.shape[1];
        if k == 0 {
            return Sums::default();
        }
        let row = |decoded: &mut Vec<f32>, (r, values): (usize, &[f32])| {
            decoded.resize(k, 0.0);
            tensor.dequantize_row(r, decoded);
            squares(values, decoded)
        };
        let rows: Vec<Sums> = values.par_chunks(k).enumerate().map_init(Vec::new, row).collect();
        rows.into_iter().fold(Sums::default(), Sums::and)
    }

    /// Of both together.
    pub(super) fn and(self, other: Sums) -> Sums {
        Sums { signal: self.signal + other.signal, error: self.error + other.error }
    }

    pub(super) fn sqnr_db(&self) -> Option<f64> {
        (self.error > 0.0 && self.signal > 0.0).then(|| 10.0 * (self.signal / self.error).log10())
    }
}

/// The sums of squares of values and of their differences from others, each of eight running sums.
fn squares(values: &[f32], others: &[f32]) -> Sums {
    let (mut signal, mut error) = ([0f64; 8], [0f64; 8]);
    let mut add = |i: usize, value: f32, other: f32| {
        let (value, off) = (value as f64, (value - other) as f64);
        signal[i] += value * value;
        error[i] += off * off;
    };
    let ((values, last), (others, others_last)) = (values.as_chunks::<8>(), others.as_chunks::<8>());
    for (values, others) in values.iter().zip(others) {
        (0..8).for_each(|i| add(i, values[i], others[i]));
    }
    last.iter().zip(others_last).enumerate().for_each(|(i, (value, other))| add(i, *value, *other));
    Sums { signal: signal.iter().sum(), error: error.iter().sum() }
}
