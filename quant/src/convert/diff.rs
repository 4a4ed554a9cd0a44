//! How far apart two checkpoints are, tensor by tensor.

use super::verify::row_blocks;
use crate::error::Result;
use crate::format::{TensorSource, tensor_error};
use rayon::prelude::*;

/// One tensor of two checkpoints; the first is the reference.
#[derive(Debug, Clone, PartialEq)]
pub struct Difference {
    /// Its name.
    pub name: String,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// How each side stores it.
    pub stored: [String; 2],
    /// 10 log10 of the reference's power over the difference's; infinite where they are equal.
    pub sqnr_db: f64,
    /// Largest absolute difference.
    pub max_error: f64,
    /// Cosine of the angle between the two as vectors; 1 where both are zero.
    pub cosine: f64,
}

/// Sums over one block of rows.
#[derive(Default, Clone, Copy)]
struct Sums {
    aa: f64,
    bb: f64,
    ab: f64,
    error: f64,
    max: f64,
}

/// Compares all tensors that are numbers, in the reference's file order, `each` being told as they are done.
///
/// # Errors
/// If one side lacks a tensor of the other, shapes differ, or one can't be read.
pub fn diff(
    reference: &dyn TensorSource,
    other: &dyn TensorSource,
    each: &mut dyn FnMut(&Difference),
) -> Result<Vec<Difference>> {
    if let Some(extra) = other.infos().iter().find(|i| reference.info(&i.name).is_err()) {
        return Err(tensor_error(&extra.name, format!("isn't in {}", reference.path().display())));
    }
    let mut differences = Vec::new();
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for info in reference.infos().iter().filter(|i| i.stored.is_float()) {
        let found = other.info(&info.name)?;
        if found.shape != info.shape {
            return Err(tensor_error(&info.name, format!("shapes {:?} and {:?}", info.shape, found.shape)));
        }
        let mut total = Sums::default();
        // The side whose rows don't stand alone decides how many are read at once.
        let mut blocks: Vec<_> = row_blocks(reference, &info.name)?.collect();
        let others: Vec<_> = row_blocks(other, &info.name)?.collect();
        if others.len() < blocks.len() {
            blocks = others;
        }
        for rows in blocks {
            reference.read_rows_f32(&info.name, rows.clone(), &mut a)?;
            other.read_rows_f32(&info.name, rows, &mut b)?;
            total = total.plus(sums(&a, &b));
        }
        reference.release(&info.name);
        other.release(&info.name);
        let difference = Difference {
            name: info.name.clone(),
            shape: info.shape.clone(),
            stored: [info.stored.name(), found.stored.name()],
            sqnr_db: if total.error == 0.0 { f64::INFINITY } else { 10.0 * (total.aa / total.error).log10() },
            max_error: total.max,
            cosine: total.cosine(),
        };
        each(&difference);
        differences.push(difference);
    }
    Ok(differences)
}

/// Sums by chunks in parallel, added up in order: the same for any number of threads.
fn sums(a: &[f32], b: &[f32]) -> Sums {
    let chunk = |(a, b): (&[f32], &[f32])| {
        a.iter().zip(b).fold(Sums::default(), |s, (a, b)| {
            let (a, b) = (*a as f64, *b as f64);
            let error = a - b;
            s.plus(Sums { aa: a * a, bb: b * b, ab: a * b, error: error * error, max: error.abs() })
        })
    };
    let chunks: Vec<Sums> = a.par_chunks(1 << 14).zip(b.par_chunks(1 << 14)).map(chunk).collect();
    chunks.into_iter().fold(Sums::default(), Sums::plus)
}

impl Sums {
    fn plus(self, o: Self) -> Self {
        Self {
            aa: self.aa + o.aa,
            bb: self.bb + o.bb,
            ab: self.ab + o.ab,
            error: self.error + o.error,
            max: self.max.max(o.max),
        }
    }

    fn cosine(&self) -> f64 {
        match (self.aa == 0.0, self.bb == 0.0) {
            (true, true) => 1.0,
            (false, false) => self.ab / (self.aa.sqrt() * self.bb.sqrt()),
            _ => 0.0,
        }
    }
}
