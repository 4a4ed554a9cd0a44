//! A checkpoint whose matrices are quantized plainly as they are read, for a model that runs long and needn't be exact.

use crate::algo::{Algorithm, algorithm};
use crate::format::source::{QuantizedRows, TensorInfo, TensorSource};
use crate::presets::by_name;
use crate::{AlgoInput, QuantError, QuantSpec, Result, Role};
use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

/// Matrices of a checkpoint in other numbers; what is quantized already stays as it is, and so do norms, routers, vectors.
pub struct Rounded<'a> {
    source: &'a dyn TensorSource,
    spec: QuantSpec,
    algorithm: &'static Algorithm,
}

impl<'a> Rounded<'a> {
    /// By this preset, to the nearest codes.
    ///
    /// # Errors
    /// There is no preset of that name, or one row can't be quantized without the others.
    pub fn new(source: &'a dyn TensorSource, scheme: &str) -> Result<Rounded<'a>> {
        let spec = by_name(scheme)?.scheme.weight.clone();
        if !spec.rows_stand_alone() {
            let why = "its rows can't be quantized one after the other".into();
            return Err(QuantError::Spec { what: format!("scheme `{scheme}`"), why });
        }
        Ok(Rounded { source, spec, algorithm: algorithm("rtn")? })
    }
}

impl TensorSource for Rounded<'_> {
    fn path(&self) -> &Path {
        self.source.path()
    }

    fn infos(&self) -> &[TensorInfo] {
        self.source.infos()
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.source.info(name)
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        self.source.bytes(name)
    }

    fn read_rows_f32(&self, name: &str, rows: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
        self.source.read_rows_f32(name, rows, out)
    }

    fn quantized_rows(&self, name: &str) -> Result<Option<QuantizedRows<'_>>> {
        let stored = self.source.quantized_rows(name)?;
        let info = self.source.info(name)?;
        let is_matrix = matches!(Role::of(name, &info.shape), Role::Linear | Role::Embedding | Role::LmHead);
        let [n, k] = info.shape[..] else { return Ok(stored) };
        if stored.is_some() || !is_matrix || !info.stored.is_float() {
            return Ok(stored);
        }
        let name = name.to_owned();
        let read = move |rows: Range<usize>| {
            let (mut weight, shape) = (Vec::new(), [rows.len(), k]);
            self.source.read_rows_f32(&name, rows, &mut weight)?;
            (self.algorithm.run)(&AlgoInput {
                name: &name,
                weight: &weight,
                shape,
                spec: &self.spec,
                importance: None,
                calibrated: None,
                seed: 0,
            })
        };
        Ok(Some(QuantizedRows { shape: [n, k], apart: true, read: Box::new(read) }))
    }

    fn release(&self, name: &str) {
        self.source.release(name);
    }
}
