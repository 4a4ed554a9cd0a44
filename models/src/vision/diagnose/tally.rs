//! How far outputs are from the float model's, as sums that add up over samples.

use crate::graph::{Tensor, Values};
use crate::vision::evaluate::{argmax, divergence};
use crate::{ModelError, Result};
use serde::{Deserialize, Serialize};

/// Sums over samples and float outputs. Classes are the last dimension of the first output of two dimensions.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Tally {
    /// Squares of the exact values.
    pub signal: f64,
    /// Squares of the differences.
    pub noise: f64,
    /// Divergences of class probabilities, nats.
    pub kl: f64,
    /// Rows of class scores.
    pub rows: u64,
    /// Rows with the same largest class.
    pub same: u64,
    /// Samples with a label.
    pub labelled: u64,
    /// Those whose label is the largest class; of the float model, and here.
    pub right: [u64; 2],
}

/// What a [`Tally`] says.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Score {
    /// Power of the float outputs over that of the difference, in dB; `None` where there is no difference.
    pub sqnr_db: Option<f64>,
    /// Mean divergence of class probabilities from the float model's, nats; `None` for outputs that aren't classes.
    pub kl: Option<f64>,
    /// Share of rows of class scores with the same largest class.
    pub agreement: Option<f64>,
    /// Share of samples whose label is the largest class, where there are labels.
    pub accuracy: Option<f64>,
}

impl Tally {
    /// Of one sample.
    ///
    /// # Errors
    /// Outputs of different shapes, by name.
    pub fn of(names: &[String], exact: &[&Tensor], found: &[&Tensor], label: Option<usize>) -> Result<Tally> {
        let mut tally = Tally::default();
        for ((name, a), b) in names.iter().zip(exact).zip(found) {
            if a.dims != b.dims {
                let why = format!("has shape {:?} in one model and {:?} in the other", a.dims, b.dims);
                return Err(ModelError::Graph { what: name.clone(), why });
            }
            let (Values::Float(x), Values::Float(y)) = (&a.values, &b.values) else { continue };
            for (&x, &y) in x.iter().zip(y) {
                tally.signal += f64::from(x).powi(2);
                tally.noise += (f64::from(x) - f64::from(y)).powi(2);
            }
            let &[_, classes] = a.dims.as_slice() else { continue };
            if tally.rows > 0 || classes < 2 {
                continue;
            }
            for (x, y) in x.chunks_exact(classes).zip(y.chunks_exact(classes)) {
                tally.kl += divergence(x, y);
                tally.rows += 1;
                let (wanted, given) = (argmax(x), argmax(y));
                tally.same += u64::from(wanted == given);
                if let Some(label) = label {
                    tally.labelled += 1;
                    tally.right[0] += u64::from(wanted == label);
                    tally.right[1] += u64::from(given == label);
                }
            }
        }
        Ok(tally)
    }

    /// Takes in another one.
    pub fn add(&mut self, other: &Tally) {
        self.signal += other.signal;
        self.noise += other.noise;
        self.kl += other.kl;
        self.rows += other.rows;
        self.same += other.same;
        self.labelled += other.labelled;
        self.right = [self.right[0] + other.right[0], self.right[1] + other.right[1]];
    }

    /// The figures.
    pub fn score(&self) -> Score {
        let share = |count: u64, of: u64| (of > 0).then(|| count as f64 / of as f64);
        Score {
            sqnr_db: (self.noise > 0.0).then(|| 10.0 * (self.signal / self.noise).log10()),
            kl: (self.rows > 0).then(|| self.kl / self.rows as f64),
            agreement: share(self.same, self.rows),
            accuracy: share(self.right[1], self.labelled),
        }
    }
}
