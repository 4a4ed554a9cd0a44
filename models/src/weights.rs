//! A model's parameters by their Hugging Face names, from any checkpoint that [`TensorSource`] opens.

use crate::backend::{DenseMatrix, Matrix};
use crate::error::{ModelError, Result};
use nibble_quant::FloatFormat;
use nibble_quant::format::source::{Dtype, Stored, TensorInfo, TensorSource};
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
            Stored::Plain(Dtype::F32) => (FloatFormat::F32, Cow::Borrowed(self.source.bytes(name)?)),
            Stored::Plain(Dtype::F16) => (FloatFormat::F16, Cow::Borrowed(self.source.bytes(name)?)),
            Stored::Plain(Dtype::BF16) => (FloatFormat::Bf16, Cow::Borrowed(self.source.bytes(name)?)),
            _ => {
                let mut values = Vec::new();
                self.source.read_f32(name, &mut values)?;
                (FloatFormat::F32, Cow::Owned(values.iter().flat_map(|v| v.to_le_bytes()).collect()))
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

fn check_shape(source: &dyn TensorSource, info: &TensorInfo, wanted: &[usize]) -> Result<()> {
    if info.shape == wanted {
        return Ok(());
    }
    Err(ModelError::Damaged {
        path: source.path().to_path_buf(),
        why: format!("tensor `{}` is {:?}; config.json asks for {wanted:?}", info.name, info.shape),
    })
}
