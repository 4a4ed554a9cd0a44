//! From weights to codes: every algorithm is a row of [`ALGORITHMS`].
//!
//! A row of the weight is quantized in three steps. *Fit*: each group's scale (and zero point or minimum) in full
//! precision. *Store*: those numbers in the spec's format, through a second level if it has one. *Code*: the nearest
//! codes under the numbers as stored, so that the rounding of a scale is seen by its codes. Algorithms differ in how
//! they fit and store; the error they lower is weighted by the importance of each column.
//!
//! Rows are independent but for scales that span the tensor, and no sum depends on who adds it: the same input gives
//! the same bytes on any number of threads and every instruction set.

mod assemble;
mod both;
mod descent;
mod error;
mod fit;
mod gptq;
mod grid;
mod levels;
mod outliers;
mod rounding;
mod rows;
mod second;

pub use levels::learn_levels;
pub use rounding::Rounding;

use crate::error::Result;
use crate::first::first_where;
use crate::stats::Input;
use crate::{QTensor, QuantError, QuantSpec};

/// What an algorithm is given.
#[derive(Debug, Clone, Copy)]
pub struct AlgoInput<'a> {
    /// The tensor's name, for errors.
    pub name: &'a str,
    /// (n, k) weights.
    pub weight: &'a [f32],
    /// (n, k); weights of higher rank are folded to (first dimension, the rest).
    pub shape: [usize; 2],
    /// The arithmetic wanted.
    pub spec: &'a QuantSpec,
    /// (k) second moments of what each column is multiplied by, if they were observed.
    pub importance: Option<&'a [f32]>,
    /// What was observed of the tensor's input, for algorithms that need more than second moments.
    pub calibrated: Option<&'a Input>,
    /// Seed of algorithms that draw random numbers.
    pub seed: u64,
}

/// A way from weights to codes.
#[derive(Debug, Clone, Copy)]
pub struct Algorithm {
    /// The word for it in recipes and flags.
    pub name: &'static str,
    /// One line on what it does.
    pub summary: &'static str,
    /// Whether it needs a Gram matrix; without one it is the search.
    pub gram: bool,
    /// Whether its rounding is then learned on a text, block by block of the model ([`Rounding`]); `run` is what that
    /// begins with.
    pub learns: bool,
    /// Quantizes one tensor.
    pub run: fn(&AlgoInput) -> Result<QTensor>,
}

/// Every algorithm, cheapest first.
pub static ALGORITHMS: &[Algorithm] = &[
    Algorithm {
        name: "rtn",
        summary: "nearest codes under the scale that just holds a group's largest value",
        gram: false,
        learns: false,
        run: |input| rows::quantize(input, fit::Method::Plain),
    },
    Algorithm {
        name: "clip",
        summary: "nearest codes under the best of a range of smaller scales, which clip the largest values",
        gram: false,
        learns: false,
        run: |input| rows::quantize(input, fit::Method::Clip),
    },
    Algorithm {
        name: "hqq",
        summary: "the range's scale with the minimum or zero point of least errors to the power of 0.7, without data",
        gram: false,
        learns: false,
        run: |input| rows::quantize(input, fit::Method::HalfQuadratic),
    },
    Algorithm {
        name: "search",
        summary: "scales (and zeros) of least weighted error: a scan, then steps along the gradient of single codes",
        gram: false,
        learns: false,
        run: |input| rows::quantize(input, fit::Method::Search),
    },
    Algorithm {
        name: "gptq",
        summary: "searched scales, then codes that make up for each other's errors; without calibration the search alone",
        gram: true,
        learns: false,
        run: gptq::quantize,
    },
    Algorithm {
        name: "descent",
        summary: "gptq, then single codes and scales changed for as long as that lowers the error",
        gram: true,
        learns: false,
        run: gptq::quantize_and_descend,
    },
    Algorithm {
        name: "yaqa",
        summary: "descent by gradients of the loss as well: errors are made up for across rows too",
        gram: true,
        learns: false,
        run: both::quantize,
    },
    Algorithm {
        name: "autoround",
        summary: "descent, then rounding and clipping learned by signed gradients of each block's error over a text",
        gram: true,
        learns: true,
        run: gptq::quantize_and_descend,
    },
];

/// The algorithm that learned rounding begins with.
pub const BEFORE_LEARNING: &str = "descent";

/// The algorithm of that name.
pub fn algorithm(name: &str) -> Result<&'static Algorithm> {
    ALGORITHMS.iter().find(|a| a.name == name).ok_or_else(|| QuantError::Spec {
        what: format!("algorithm `{name}`"),
        why: crate::names::unknown(name, ALGORITHMS.iter().map(|a| a.name)),
    })
}

/// Codes of a tensor under given scales, one for all of it or one a row, which make up for each other's errors as `gptq` has it (and,
/// under one scale, `descent`), and the error d H d^T that is left of each row, H with its damping. Without a usable Gram matrix
/// codes are the nearest ones, and H is the identity.
///
/// # Errors
/// A spec of other scales, weights that aren't finite, or lengths that contradict the shape.
pub fn under_scales(input: &AlgoInput, scales: &[f32]) -> Result<(QTensor, Vec<f64>)> {
    gptq::under_scales(input, scales)
}

/// The error that algorithms lower: sum over rows of `sum_j weight_j * (x_j - q_j)^2`, with the weights that they use.
///
/// `quantized` is (n, k) floats.
///
/// # Panics
/// If `quantized` doesn't have the input's shape.
pub fn weighted_error(input: &AlgoInput, quantized: &[f32]) -> f64 {
    error::total(input, quantized)
}

impl AlgoInput<'_> {
    fn refuse(&self, why: String) -> QuantError {
        QuantError::Tensor { name: self.name.into(), why }
    }

    /// Refuses lengths that contradict the shape and values that aren't finite.
    fn check(&self) -> Result<()> {
        let [n, k] = self.shape;
        self.spec.validate().map_err(|e| self.refuse(e.to_string()))?;
        if n.checked_mul(k) != Some(self.weight.len()) {
            return Err(self.refuse(format!("{} values for a shape of {n} x {k}", self.weight.len())));
        }
        if n.max(k) > u32::MAX as usize {
            return Err(self.refuse(format!("a shape of {n} x {k}; 32 bits index a side")));
        }
        if let Some(at) = first_where(self.weight, |w| !w.is_finite()) {
            return Err(self.refuse(format!("{} at row {}, column {}", self.weight[at], at / k, at % k)));
        }
        let Some(importance) = self.importance else { return Ok(()) };
        if importance.len() != k {
            return Err(self.refuse(format!("importance of {} columns, the tensor has {k}", importance.len())));
        }
        match importance.iter().position(|h| !h.is_finite() || *h < 0.0) {
            Some(col) => Err(self.refuse(format!("importance {} of column {col}", importance[col]))),
            None => Ok(()),
        }
    }
}
