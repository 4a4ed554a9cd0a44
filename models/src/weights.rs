//! A model's parameters by their Hugging Face names, from any checkpoint that [`TensorSource`] opens.

use crate::backend::{DenseMatrix, Matrix};
use crate::error::{ModelError, Result};
use half::f16;
use nibble_quant::FloatFormat;
use nibble_quant::format::source::{Dtype, Stored, TensorInfo, TensorSource, encode_f32};
use std::borrow::Cow;

/// A checkpoint's tensors with the shapes that a model asks for.
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    source: &'a dyn TensorSource,
}

impl<'a> Weights<'a> {
    /// Reads from this checkpoint.
    pub fn new(source: &'a dyn TensorSource) -> Weights<'a> {
        Weights { source }
    }

    /// A matrix of exactly (n, k), as it is stored.
    ///
    /// # Errors
    /// There is none of that name, its shape is another, or its type is none that a model computes with.
    pub fn matrix(&self, name: &str, n: usize, k: usize) -> Result<Matrix<'a>> {
        let info = self.source.info(name)?;
        check_shape(self.source, info, &[n, k])?;
        if let Some(rows) = self.source.quantized_rows(name)? {
            return Ok(Matrix::Quantized(rows));
        }
        let (dtype, bytes) = match &info.stored {
            Stored::Plain(Dtype::F32) => (FloatFormat::F32, self.source.bytes(name)?),
            Stored::Plain(Dtype::F16) => (FloatFormat::F16, self.source.bytes(name)?),
            Stored::Plain(Dtype::BF16) => (FloatFormat::Bf16, self.source.bytes(name)?),
            stored => {
                let mut values = Vec::new();
                self.source.read_f32(name, &mut values)?;
                let (dtype, format) = dense(stored, &values);
                (format, Cow::Owned(encode_f32(name, &values, dtype)?))
            }
        };
        Ok(Matrix::Dense(DenseMatrix { n, k, dtype, bytes }))
    }

    /// A vector of exactly `n` values.
    ///
    /// # Errors
    /// As [`Weights::matrix`].
    pub fn vector(&self, name: &str, n: usize) -> Result<Vec<f32>> {
        check_shape(self.source, self.source.info(name)?, &[n])?;
        let mut values = Vec::new();
        self.source.read_f32(name, &mut values)?;
        Ok(values)
    }

    /// Lets go of what reading a tensor has mapped in.
    pub fn release(&self, name: &str) {
        self.source.release(name);
    }
}

/// What values are held in that kernels don't take as they are stored. Codes (Q6_K) have 6 bits, and half precision rounds to 11, but
/// may not reach as far.
fn dense(stored: &Stored, values: &[f32]) -> (Dtype, FloatFormat) {
    let half = match stored {
        Stored::Blocks(block) if block.plain.is_none() => values.iter().all(|v| v.abs() <= f16::MAX.to_f32()),
        Stored::Blocks(block) => block.plain == Some(Dtype::F16),
        _ => false,
    };
    if half { (Dtype::F16, FloatFormat::F16) } else { (Dtype::F32, FloatFormat::F32) }
}

fn check_shape(source: &dyn TensorSource, info: &TensorInfo, wanted: &[usize]) -> Result<()> {
    if info.shape == wanted {
        return Ok(());
    }
    Err(ModelError::Damaged {
        path: source.path().to_path_buf(),
        why: format!("tensor `{}` is {:?}; config.json asks for {wanted:?}", info.name, info.shape),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nibble_quant::format::gguf::BLOCKS;

    #[test]
    fn codes_are_held_in_half_precision_and_floats_lose_nothing() {
        for block in BLOCKS {
            let (stored, values) = (Stored::Blocks(block), [0.25, -65504.0, 0.0]);
            let held = dense(&stored, &values).1;
            let wanted = match block.name {
                "F32" | "BF16" => FloatFormat::F32,
                _ => FloatFormat::F16,
            };
            assert_eq!(held, wanted, "{}", block.name);
            if block.plain.is_none() {
                assert_eq!(dense(&stored, &[0.25, 65536.0]).1, FloatFormat::F32, "{}", block.name);
            }
        }
        assert_eq!(dense(&Stored::Plain(Dtype::F64), &[0.5]).1, FloatFormat::F32);
    }
}
