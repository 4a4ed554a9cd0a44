//! What training makes small: the distance to labels, and to another model's outputs.

use super::ops::softmax;
use crate::{ModelError, Result};
use candle_core::{D, Tensor};

/// Learning from another model's outputs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Distill {
    /// The teacher's share of the loss; labels have the rest. 1 without labels.
    pub share: f64,
    /// How the outputs are compared.
    pub by: Likeness,
}

/// How outputs are compared with the teacher's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Likeness {
    /// As classes: the divergence of their probabilities (arXiv 1503.02531).
    Classes {
        /// Both outputs are divided by it.
        temperature: f64,
    },
    /// As values: the squared error by the teacher's squares, sample by sample, which is what a signal-to-noise ratio is.
    Values,
}

impl Likeness {
    /// What fits outputs of so many dimensions: (samples, classes), or a vector for each of many places.
    pub fn of_rank(rank: usize) -> Likeness {
        if rank > 2 { Likeness::Values } else { Likeness::Classes { temperature: 2.0 } }
    }
}

/// (samples, ...) as (samples, values).
pub(super) fn flat(y: &Tensor) -> candle_core::Result<Tensor> {
    if y.rank() == 2 { Ok(y.clone()) } else { y.flatten_from(1) }
}

/// The loss of outputs (samples, ...), a mean over the samples: of labels, of a teacher's outputs, or of both in their shares.
///
/// # Errors
/// Neither labels nor a teacher, or shapes that differ.
pub(super) fn loss(outputs: &Tensor, labels: Option<&Tensor>, taught: Option<(&Tensor, Distill)>) -> Result<Tensor> {
    let candle = |e: candle_core::Error| ModelError::Graph { what: "training".into(), why: e.to_string() };
    let outputs = flat(outputs).map_err(candle)?;
    let hard = labels.map(|labels| candle_nn::loss::cross_entropy(&outputs, labels)).transpose().map_err(candle)?;
    let Some((teacher, Distill { share, by })) = taught else {
        return hard.ok_or_else(|| ModelError::Setting {
            what: "training".into(),
            why: "samples have no labels, and there is no teacher".into(),
        });
    };
    let soft = flat(teacher).and_then(|teacher| distance(&outputs, &teacher, by)).map_err(candle)?;
    match hard {
        Some(hard) => hard.affine(1.0 - share, 0.0).and_then(|h| soft.affine(share, 0.0)?.add(&h)).map_err(candle),
        None => Ok(soft),
    }
}

/// The mean distance of rows from the teacher's.
fn distance(outputs: &Tensor, teacher: &Tensor, by: Likeness) -> candle_core::Result<Tensor> {
    let rows = outputs.dim(0)?.max(1) as f64;
    match by {
        Likeness::Classes { temperature } => {
            let teacher = teacher.affine(1.0 / temperature, 0.0)?;
            let found = candle_nn::ops::log_softmax(&outputs.affine(1.0 / temperature, 0.0)?, D::Minus1)?;
            let apart = (candle_nn::ops::log_softmax(&teacher, D::Minus1)? - found)?;
            // T^2 keeps the gradient's size.
            (softmax(&teacher)? * apart)?.sum_all()?.affine(temperature * temperature / rows, 0.0)
        }
        Likeness::Values => {
            let error = (outputs - teacher)?.sqr()?.sum(1)?;
            let size = (teacher.sqr()?.sum(1)? + f64::from(f32::MIN_POSITIVE))?;
            (error / size)?.sum_all()?.affine(1.0 / rows, 0.0)
        }
    }
}
