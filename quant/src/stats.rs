//! What calibration keeps of the inputs of linear layers, and the file it is kept in.
//!
//! For a layer y = W x the error that a change D of W makes, averaged over inputs, is the trace of D E[x x^T] D^T. Its
//! diagonal, the second moments of the columns, weights searches; all of it, the Gram matrix, is what GPTQ works with.
//! Layers that read the same input (q, k and v) share one record.

mod file;
mod imatrix;

pub use crate::linalg::Symmetric;

use crate::error::Result;
use crate::{QuantError, linalg};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

/// Rows that one sum of outer products takes.
const ROWS: usize = 256;

/// Statistics of one input, over all rows (tokens) that were seen.
#[derive(Debug)]
pub struct Input {
    rows: u64,
    squares: Vec<f64>,
    absmax: Vec<f32>,
    gram: Option<Symmetric>,
    outputs: Option<Symmetric>,
    /// With the damping that was asked for.
    feedback: Mutex<(f32, Weak<linalg::Feedback>)>,
    factored: OnceLock<Factored>,
}

/// How factoring a Gram matrix for GPTQ went.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Factored {
    /// With this damping, a share of the mean of its diagonal.
    Damped(f32),
    /// Not at all: it isn't positive definite, whatever is added.
    Refused,
}

/// How damping is raised where a Gram matrix isn't positive definite, neither in f32 nor in f64. The last one is twice the
/// mean of its diagonal: what this doesn't help is an input that was always zero.
const RAISES: [f32; 3] = [1.0, 3.0, 10.0];

impl Input {
    /// Nothing seen yet of an input of `width` columns; with a Gram matrix of `width * width / 2` f32 if asked for.
    pub fn new(width: usize, gram: bool) -> Input {
        Input {
            rows: 0,
            squares: vec![0.0; width],
            absmax: vec![0.0; width],
            gram: gram.then(|| Symmetric::new(width)),
            outputs: None,
            feedback: Mutex::default(),
            factored: OnceLock::new(),
        }
    }

    /// Nothing seen yet of an input of `width` columns and of gradients by `outputs` outputs; with matrices of both.
    pub fn both(width: usize, outputs: usize) -> Input {
        Input { outputs: Some(Symmetric::new(outputs)), ..Input::new(width, true) }
    }

    /// Takes in rows of activations x, (rows, width), and gradients g of a loss by what the layer made of them, (rows,
    /// outputs). Second moments and the Gram matrix count each row `|g|^2` times, the outputs' matrix `|x|^2` times: so
    /// that one times the other, over the trace of either, is the nearest that a product of two easily comes to
    /// `E[g g^T (x) x x^T]`.
    ///
    /// # Errors
    /// As [`Input::observe`], or rows of gradients that don't fit.
    pub fn observe_gradients(&mut self, name: &str, x: &[f32], g: &[f32]) -> Result<()> {
        let (width, refuse) = (self.width(), |why: String| QuantError::Tensor { name: name.into(), why });
        let rows = x.len().checked_div(width).unwrap_or(0);
        let outputs = g.len().checked_div(rows).unwrap_or(0);
        let fits = rows > 0 && rows * width == x.len() && rows * outputs == g.len();
        if !fits || self.outputs.as_ref().is_some_and(|matrix| matrix.width() != outputs) {
            return Err(refuse(format!("{} gradients for {} activations in rows of {width}", g.len(), x.len())));
        }
        if let Some(at) = x.iter().chain(g).position(|v| !v.is_finite()) {
            let which = if at < x.len() { "input" } else { "gradient" };
            return Err(refuse(format!("its {which} is not finite at place {at}")));
        }
        let length = |row: &[f32]| row.iter().map(|v| *v as f64 * *v as f64).sum::<f64>().sqrt() as f32;
        let scaled = |of: &[f32], by: &[f32], width: usize, per: usize| -> Vec<f32> {
            let rows = of.chunks_exact(width).zip(by.chunks_exact(per));
            let rows = rows.flat_map(|(row, other)| {
                let by = length(other);
                row.iter().map(move |v| v * by)
            });
            rows.collect()
        };
        x.chunks_exact(width).for_each(|row| {
            self.absmax.iter_mut().zip(row).for_each(|(absmax, v)| *absmax = absmax.max(v.abs()));
        });
        if outputs == 0 {
            return Ok(());
        }
        self.rows += rows as u64;
        let inputs = scaled(x, g, width, outputs);
        for row in inputs.chunks_exact(width) {
            self.squares.iter_mut().zip(row).for_each(|(square, v)| *square += *v as f64 * *v as f64);
        }
        if let Some(gram) = &mut self.gram {
            inputs.chunks(ROWS * width).for_each(|x| gram.add_outer(x));
        }
        if let Some(matrix) = &mut self.outputs {
            scaled(g, x, outputs, width).chunks(ROWS * outputs).for_each(|g| matrix.add_outer(g));
        }
        Ok(())
    }

    /// Takes in rows of activations, (rows, width).
    ///
    /// # Errors
    /// Not whole rows, or a value that isn't finite; `name` says whose.
    pub fn observe(&mut self, name: &str, x: &[f32]) -> Result<()> {
        let (width, refuse) = (self.width(), |why: String| QuantError::Tensor { name: name.into(), why });
        if width == 0 || !x.len().is_multiple_of(width) {
            return Err(refuse(format!("{} activations to observe, wanted rows of {width}", x.len())));
        }
        if let Some(at) = x.iter().position(|v| !v.is_finite()) {
            return Err(refuse(format!("its input is {} at column {}, wanted finite ones", x[at], at % width)));
        }
        self.rows += (x.len() / width) as u64;
        for row in x.chunks_exact(width) {
            for ((square, absmax), v) in self.squares.iter_mut().zip(&mut self.absmax).zip(row) {
                *square += *v as f64 * *v as f64;
                *absmax = absmax.max(v.abs());
            }
        }
        if let Some(gram) = &mut self.gram {
            x.chunks(ROWS * width).for_each(|x| gram.add_outer(x));
        }
        Ok(())
    }

    /// Takes the mean of the rows, which count so much together, away from them: what is left is of deviations from it.
    pub fn centre(&mut self, mean: &[f64], count: f64) {
        self.squares.iter_mut().zip(mean).for_each(|(square, m)| *square = (*square - count * m * m).max(0.0));
        if let Some(gram) = &mut self.gram {
            let scaled: Vec<f32> = mean.iter().map(|m| (m * count.sqrt()) as f32).collect();
            gram.subtract_outer(&scaled);
        }
    }

    /// Takes in what another one has seen: sums differ from those of both together by their rounding, n * 2^-53 of
    /// them for second moments and n * 2^-24 for Gram matrices, over n rows. A Gram matrix is kept if both have one.
    ///
    /// # Errors
    /// They have different widths; `name` says whose.
    pub fn merge(&mut self, name: &str, other: &Input) -> Result<()> {
        if self.width() != other.width() {
            let why = format!("statistics of {} columns don't merge with {}", other.width(), self.width());
            return Err(QuantError::Tensor { name: name.into(), why });
        }
        self.rows += other.rows;
        self.squares.iter_mut().zip(&other.squares).for_each(|(a, b)| *a += b);
        self.absmax.iter_mut().zip(&other.absmax).for_each(|(a, b)| *a = a.max(*b));
        match (&mut self.gram, &other.gram) {
            (Some(own), Some(others)) => own.add(others),
            _ => self.gram = None,
        }
        Ok(())
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.squares.len()
    }

    /// Rows seen.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Second moments of the columns.
    pub fn mean_squares(&self) -> Vec<f32> {
        self.squares.iter().map(|s| (s / self.rows.max(1) as f64) as f32).collect()
    }

    /// Largest magnitudes of the columns.
    pub fn absmax(&self) -> &[f32] {
        &self.absmax
    }

    /// The Gram matrix `sum x x^T`, if it was kept.
    pub fn gram(&self) -> Option<&Symmetric> {
        self.gram.as_ref()
    }

    /// `sum g g^T` over gradients of the loss by the outputs of the layer that reads this input, if they were observed.
    pub fn outputs(&self) -> Option<&Symmetric> {
        self.outputs.as_ref()
    }

    /// The Gram matrix factored for feedback of errors, columns of large second moments first; `damping` is a share of
    /// the mean of its diagonal, raised where the matrix isn't positive definite. Kept for as long as anybody uses it.
    /// `None` without a Gram matrix, or if no damping helps; [`Input::factored`] tells afterwards.
    pub(crate) fn feedback(&self, damping: f32) -> Option<Arc<linalg::Feedback>> {
        let gram = self.gram.as_ref()?;
        let held = || self.feedback.lock().unwrap_or_else(PoisonError::into_inner);
        let known = held().clone();
        if let Some(known) = known.1.upgrade().filter(|_| known.0 == damping) {
            return Some(known);
        }
        // Two threads may do this twice: factoring waits for other threads, which must not wait for this one.
        let made = factor(gram, 1.0 / self.rows.max(1) as f32, damping).map(|(made, by)| (Arc::new(made), by));
        let outcome = made.as_ref().map_or(Factored::Refused, |(_, damping)| Factored::Damped(*damping));
        self.factored.get_or_init(|| outcome);
        let made = made?.0;
        *held() = (damping, Arc::downgrade(&made));
        Some(made)
    }

    /// The matrix that a [`feedback`](Input::feedback) is the factor of.
    pub(crate) fn damped(&self, feedback: &linalg::Feedback) -> Option<linalg::Dense> {
        Some(self.gram.as_ref()?.dense(1.0 / self.rows.max(1) as f32, feedback.damping))
    }

    /// The outputs' matrix, with its diagonal scaled to a mean of 1, factored and in rows.
    pub(crate) fn outputs_feedback(&self, damping: f32) -> Option<(linalg::Feedback, linalg::Dense)> {
        let outputs = self.outputs.as_ref()?;
        let mean = (0..outputs.width()).map(|i| outputs.get(i, i) as f64).sum::<f64>() / outputs.width().max(1) as f64;
        let scale = if mean > 0.0 { (1.0 / mean) as f32 } else { 0.0 };
        let (feedback, _) = factor(outputs, scale, damping)?;
        let dense = outputs.dense(scale, feedback.damping);
        Some((feedback, dense))
    }

    /// How factoring the Gram matrix went; `None` if nobody has asked for it.
    pub fn factored(&self) -> Option<Factored> {
        self.factored.get().copied()
    }
}

/// `scale` times the matrix factored, with the damping that it took as a share of the mean of its diagonal; large
/// diagonal values are processed first.
fn factor(matrix: &Symmetric, scale: f32, damping: f32) -> Option<(linalg::Feedback, f32)> {
    let diagonal: Vec<f32> = (0..matrix.width()).map(|i| scale * matrix.get(i, i)).collect();
    let mean = diagonal.iter().map(|m| *m as f64).sum::<f64>() / diagonal.len().max(1) as f64;
    let mut order: Vec<u32> = (0..matrix.width() as u32).collect();
    order.sort_by(|a, b| diagonal[*a as usize].total_cmp(&diagonal[*b as usize]).then(b.cmp(a)));
    RAISES.iter().find_map(|raise| {
        let made = linalg::Feedback::new(matrix, order.clone(), scale, raise * damping * mean as f32)?;
        Some((made, raise * damping))
    })
}

/// Bytes of the Gram matrix of an input of `width` columns.
pub fn gram_bytes(width: usize) -> u64 {
    Symmetric::bytes(width)
}

/// Statistics of the inputs of a model's linear layers.
#[derive(Debug, Clone, Default)]
pub struct Stats {
    /// By tensor; tensors that read the same input share one.
    pub inputs: BTreeMap<String, Arc<Input>>,
    /// What they were made from, in words.
    pub made_from: String,
    /// How the model was turned before it was observed.
    pub turned: Option<Turn>,
}

/// A rotation of the residual stream, a row of [`TRANSFORMS`](crate::transform::TRANSFORMS).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// The row's name.
    pub rotation: String,
    /// Where its random numbers start.
    pub seed: u64,
}

impl Stats {
    /// Refuses statistics of a model that was turned otherwise than the one that they are to be used for.
    ///
    /// # Errors
    /// It was.
    pub fn check_turn(&self, wanted: Option<&Turn>) -> Result<()> {
        let words = |turn: Option<&Turn>| match turn {
            Some(Turn { rotation, seed }) => format!("the model turned by `{rotation}` with seed {seed}"),
            None => "the model as it is".into(),
        };
        if self.turned.as_ref() == wanted {
            return Ok(());
        }
        let why = format!("they are of {}, wanted of {}", words(self.turned.as_ref()), words(wanted));
        Err(QuantError::Spec { what: "statistics".into(), why })
    }

    /// Bytes that a conversion holds for these: all Gram matrices, and for each thread the largest one four times, as a
    /// factor in the making and as it is used, and in rows.
    pub fn conversion_bytes(&self, threads: usize) -> u64 {
        let grams = self.sites().into_iter().filter(|(_, input)| input.gram().is_some());
        let bytes: Vec<u64> = grams.map(|(_, input)| gram_bytes(input.width())).collect();
        bytes.iter().sum::<u64>() + 4 * threads as u64 * bytes.iter().max().copied().unwrap_or(0)
    }

    /// The inputs with the tensors that read them, by the first of these.
    pub fn sites(&self) -> Vec<(Vec<&str>, &Arc<Input>)> {
        let mut sites: Vec<(Vec<&str>, &Arc<Input>)> = Vec::new();
        for (name, input) in &self.inputs {
            match sites.iter_mut().find(|(_, known)| Arc::ptr_eq(known, input)) {
                Some((names, _)) => names.push(name),
                None => sites.push((vec![name], input)),
            }
        }
        sites
    }
}
