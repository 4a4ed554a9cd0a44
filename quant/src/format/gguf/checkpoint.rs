//! A GGUF file seen as the Hugging Face checkpoint that it was made from: names, order of rows, config.json.
//!
//! Nothing is copied: rows that GGUF interleaves (see [`hf_names`](crate::format::hf_names)) are put back as they are read.

use super::{GgufSource, exact};
use crate::QuantError;
use crate::error::Result;
use crate::format::hf_names::{Model, uninterleave};
use crate::format::source::{QuantizedRows, Stored, TensorInfo, TensorSource, decode_rows};
use crate::format::tensor_error;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

/// An opened GGUF file under Hugging Face's names.
#[derive(Debug)]
pub struct GgufCheckpoint {
    source: GgufSource,
    infos: Vec<TensorInfo>,
    /// Name in the GGUF file, and rows of a head whose interleaved order is undone; in the order of `infos`.
    origins: Vec<(String, Option<usize>)>,
    by_name: HashMap<String, usize>,
}

impl GgufCheckpoint {
    /// Opens a file whose architecture has a Hugging Face family.
    ///
    /// # Errors
    /// As [`GgufSource::open`]; if the architecture isn't known or a tensor has no place in its family.
    pub fn open(path: &Path) -> Result<Self> {
        let source = GgufSource::open(path)?;
        let renamed = Model::new(&source)?.tensors()?;
        let mut checkpoint =
            Self { infos: Vec::new(), origins: Vec::new(), by_name: HashMap::with_capacity(renamed.len()), source };
        for tensor in renamed {
            let found = checkpoint.source.info(&tensor.gguf)?.clone();
            // Bytes of interleaved floats can't be lent: the order of their rows is another. As blocks they are read.
            let stored = match (&found.stored, tensor.head) {
                (Stored::Plain(dtype), Some(_)) => super::blocks::plain(*dtype).map_or(found.stored, Stored::Blocks),
                _ => found.stored,
            };
            checkpoint.by_name.insert(tensor.name.clone(), checkpoint.infos.len());
            checkpoint.infos.push(TensorInfo { name: tensor.name, stored, ..found });
            checkpoint.origins.push((tensor.gguf, tensor.head));
        }
        Ok(checkpoint)
    }

    /// The file itself.
    pub fn gguf(&self) -> &GgufSource {
        &self.source
    }

    /// config.json for weights of type `dtype` (`bfloat16`, `float16`, `float32`).
    ///
    /// # Errors
    /// As [`Model::config`].
    pub fn config(&self, dtype: &str) -> Result<Value> {
        Model::new(&self.source)?.config(dtype)
    }

    /// generation_config.json.
    ///
    /// # Errors
    /// As [`Model::generation_config`].
    pub fn generation_config(&self) -> Result<Value> {
        Model::new(&self.source)?.generation_config()
    }

    fn find(&self, name: &str) -> Result<usize> {
        let missing = || QuantError::NoTensor { path: self.path().to_owned(), name: name.to_owned() };
        self.by_name.get(name).copied().ok_or_else(missing)
    }
}

impl TensorSource for GgufCheckpoint {
    fn path(&self) -> &Path {
        self.source.path()
    }

    fn infos(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        Ok(&self.infos[self.find(name)?])
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        match &self.origins[self.find(name)?] {
            (gguf, None) => self.source.bytes(gguf),
            (_, Some(_)) => Err(tensor_error(name, "is stored in another order of rows, wanted one piece")),
        }
    }

    fn read_rows_f32(&self, name: &str, rows: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
        let at = self.find(name)?;
        let (gguf, head) = &self.origins[at];
        let (info, bytes) = (&self.infos[at], self.source.mapped(gguf)?);
        let (n, cols) = info.rows_cols();
        let head = match *head {
            Some(head) if rows.start <= rows.end && rows.end <= n => head,
            // Nothing to put back, or rows that aren't there.
            _ => return decode_rows(info, bytes, rows, out),
        };
        if info.shape.len() < 2 {
            // A bias has one value a row of its matrix.
            decode_rows(info, bytes, rows, out)?;
            uninterleave(out, head, 1);
            return Ok(());
        }
        // Whole heads around the rows asked for; their number divides the tensor's, which opening has checked.
        let heads = rows.start / head * head..rows.end.next_multiple_of(head).min(n);
        decode_rows(info, bytes, heads.clone(), out)?;
        uninterleave(out, head, cols);
        out.truncate((rows.end - heads.start) * cols);
        out.drain(..(rows.start - heads.start) * cols);
        Ok(())
    }

    fn quantized_rows(&self, name: &str) -> Result<Option<QuantizedRows<'_>>> {
        let at = self.find(name)?;
        let (gguf, head) = &self.origins[at];
        exact::tensor(&self.infos[at], self.source.mapped(gguf)?, *head)
    }

    fn release(&self, name: &str) {
        if let Some(&at) = self.by_name.get(name) {
            self.source.release(&self.origins[at].0);
        }
    }
}
