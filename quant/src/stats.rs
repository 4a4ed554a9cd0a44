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
    feedback: Mutex<Weak<linalg::Feedback>>,
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

/// How damping is raised where a Gram matrix isn't positive definite in f32. The last one is twice the mean of its
/// diagonal: the rounding of n columns in f32 is about sqrt(n) * 2^-24 of the largest value there, so what this doesn't
/// help, such as an input that was always zero, f64 doesn't help either.
const RAISES: [f32; 3] = [1.0, 3.0, 10.0];

impl Input {
    /// Nothing seen yet of an input of `width` columns; with a Gram matrix of `width * width / 2` f32 if asked for.
    pub fn new(width: usize, gram: bool) -> Input {
        Input {
            rows: 0,
            squares: vec![0.0; width],
            absmax: vec![0.0; width],
            gram: gram.then(|| Symmetric::new(width)),
            feedback: Mutex::default(),
            factored: OnceLock::new(),
        }
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

    /// The Gram matrix factored for feedback of errors, columns of large second moments first; `damping` is a share of
    /// the mean of its diagonal, raised where the matrix isn't positive definite. Kept for as long as anybody uses it.
    /// `None` without a Gram matrix, or if no damping helps; [`Input::factored`] tells afterwards.
    pub(crate) fn feedback(&self, damping: f32) -> Option<Arc<linalg::Feedback>> {
        let gram = self.gram.as_ref()?;
        let held = || self.feedback.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = held().upgrade() {
            return Some(known);
        }
        // Two threads may do this twice: factoring waits for other threads, which must not wait for this one.
        let moments = self.mean_squares();
        let mean = moments.iter().map(|m| *m as f64).sum::<f64>() / moments.len().max(1) as f64;
        let mut order: Vec<u32> = (0..self.width() as u32).collect();
        order.sort_by(|a, b| moments[*a as usize].total_cmp(&moments[*b as usize]).then(b.cmp(a)));
        let scale = 1.0 / self.rows.max(1) as f32;
        let made = RAISES.iter().find_map(|raise| {
            let feedback = linalg::Feedback::new(gram, order.clone(), scale, raise * damping * mean as f32)?;
            Some((Arc::new(feedback), raise * damping))
        });
        let outcome = made.as_ref().map_or(Factored::Refused, |(_, damping)| Factored::Damped(*damping));
        self.factored.get_or_init(|| outcome);
        let made = made?.0;
        *held() = Arc::downgrade(&made);
        Some(made)
    }

    /// The matrix that a [`feedback`](Input::feedback) is the factor of.
    pub(crate) fn damped(&self, feedback: &linalg::Feedback) -> Option<linalg::Dense> {
        Some(self.gram.as_ref()?.dense(1.0 / self.rows.max(1) as f32, feedback.damping))
    }

    /// How factoring the Gram matrix went; `None` if nobody has asked for it.
    pub fn factored(&self) -> Option<Factored> {
        self.factored.get().copied()
    }
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
}

impl Stats {
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
