//! Statistics in a file: nibble's own, which is safetensors, or llama.cpp's imatrix.
//!
//! ```text
//! metadata   "nibble.stats" = {"version": 1, "made_from": "...", "turned": {"rotation": "hadamard", "seed": 0}, "sites": [{"tensors": [...], "rows": n, "width": k}]}
//! tensors    "<first tensor>.squares" F64 (k)   ".absmax" F32 (k)   ".gram" F32 (tiles of the lower triangle), if kept
//! ```

use super::{Input, Stats, Turn, imatrix};
use crate::error::Result;
use crate::format::{damaged, io_error};
use crate::linalg::Symmetric;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

const KEY: &str = "nibble.stats";
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    made_from: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    turned: Option<Turn>,
    sites: Vec<Site>,
}

#[derive(Serialize, Deserialize)]
struct Site {
    tensors: Vec<String>,
    rows: u64,
    width: usize,
    /// Outputs of the layer, where gradients by them were observed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    outputs: Option<usize>,
}

impl Stats {
    /// Reads a file of either kind.
    ///
    /// # Errors
    /// It can't be read, is damaged, or is of neither kind.
    pub fn read(path: &Path) -> Result<Stats> {
        let bytes = std::fs::read(path).map_err(io_error(path))?;
        if bytes.starts_with(b"GGUF") {
            return imatrix::read(path);
        }
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(|e| damaged(path, e.to_string()))?;
        let header = metadata.metadata().as_ref().and_then(|m| m.get(KEY));
        let header = header.ok_or_else(|| damaged(path, format!("no `{KEY}` in its metadata: no statistics")))?;
        let header: Header = serde_json::from_str(header).map_err(|e| damaged(path, e.to_string()))?;
        if header.version != VERSION {
            return Err(damaged(path, format!("statistics of version {}, wanted {VERSION}", header.version)));
        }
        let file = SafeTensors::deserialize(&bytes).map_err(|e| damaged(path, e.to_string()))?;
        let mut stats = Stats { made_from: header.made_from, turned: header.turned, ..Stats::default() };
        for site in header.sites {
            let input = Arc::new(site.read(&file).map_err(|why| damaged(path, why))?);
            stats.inputs.extend(site.tensors.into_iter().map(|name| (name, Arc::clone(&input))));
        }
        Ok(stats)
    }

    /// Writes a file, as an imatrix (without Gram matrices and absmax) if its name ends in `.gguf`. The file appears
    /// under its name only when it is whole.
    ///
    /// # Errors
    /// It can't be written, or is an imatrix of a turned model, which no imatrix can say.
    pub fn write(&self, path: &Path) -> Result<()> {
        let bytes = match path.extension().is_some_and(|e| e == "gguf") {
            true if self.turned.is_some() => {
                return Err(damaged(path, "an imatrix can't say how its model was turned"));
            }
            true => imatrix::bytes(self),
            false => self.bytes().map_err(|why| damaged(path, why))?,
        };
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(folder).map_err(io_error(folder))?;
        file.write_all(&bytes).and_then(|()| file.as_file().sync_all()).map_err(io_error(path))?;
        file.persist(path).map_err(|e| io_error(path)(e.error))?;
        Ok(())
    }

    fn bytes(&self) -> std::result::Result<Vec<u8>, String> {
        let mut sites = Vec::new();
        let mut parts: Vec<(String, Dtype, Vec<u8>)> = Vec::new();
        for (names, input) in self.sites() {
            let first = names.first().copied().unwrap_or_default();
            let squares = input.squares.iter().flat_map(|v| v.to_le_bytes()).collect();
            parts.push((format!("{first}.squares"), Dtype::F64, squares));
            parts.push((format!("{first}.absmax"), Dtype::F32, le_bytes(input.absmax.iter().copied())));
            if let Some(gram) = &input.gram {
                parts.push((format!("{first}.gram"), Dtype::F32, le_bytes(gram.values())));
            }
            if let Some(outputs) = &input.outputs {
                parts.push((format!("{first}.outgram"), Dtype::F32, le_bytes(outputs.values())));
            }
            let tensors = names.iter().map(|n| n.to_string()).collect();
            let outputs = input.outputs.as_ref().map(Symmetric::width);
            sites.push(Site { tensors, rows: input.rows, width: input.width(), outputs });
        }
        let (made_from, turned) = (self.made_from.clone(), self.turned.clone());
        let header = Header { version: VERSION, made_from, turned, sites };
        let header = serde_json::to_string(&header).map_err(|e| e.to_string())?;
        let views = parts.iter().map(|(name, dtype, bytes)| {
            let count = bytes.len() * 8 / dtype.bitsize();
            Ok((name.as_str(), TensorView::new(*dtype, vec![count], bytes).map_err(|e| e.to_string())?))
        });
        let views = views.collect::<std::result::Result<Vec<_>, String>>()?;
        safetensors::serialize(views, Some(HashMap::from([(KEY.to_owned(), header)]))).map_err(|e| e.to_string())
    }
}

impl Site {
    fn read(&self, file: &SafeTensors) -> std::result::Result<Input, String> {
        let first = self.tensors.first().ok_or("a site without tensors")?;
        let squares = self.numbers(file, &format!("{first}.squares"), Dtype::F64, self.width)?;
        let squares: Vec<f64> = squares.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
        let absmax = floats(self.numbers(file, &format!("{first}.absmax"), Dtype::F32, self.width)?);
        if self.rows == 0 || squares.iter().any(|s| !s.is_finite() || *s < 0.0) || !absmax.iter().all(|v| v.is_finite())
        {
            return Err(format!("statistics of `{first}` over {} rows hold impossible numbers", self.rows));
        }
        let gram = self.matrix(file, &format!("{first}.gram"), self.width)?;
        let outputs = match self.outputs {
            Some(count) => self.matrix(file, &format!("{first}.outgram"), count)?,
            None => None,
        };
        Ok(Input { rows: self.rows, squares, absmax, gram, outputs, ..Input::new(0, false) })
    }

    /// A symmetric matrix, if the file has it.
    fn matrix(&self, file: &SafeTensors, name: &str, width: usize) -> std::result::Result<Option<Symmetric>, String> {
        let Ok(view) = file.tensor(name) else { return Ok(None) };
        // A width that no file can hold would overflow what follows.
        if (width as u64).checked_mul(width as u64).is_none_or(|squared| squared / 2 > view.data().len() as u64) {
            return Err(format!("`{name}` has {} bytes; a width of {width} takes more", view.data().len()));
        }
        let count = usize::try_from(Symmetric::bytes(width) / 4).map_err(|e| e.to_string())?;
        let values = floats(self.numbers(file, name, Dtype::F32, count)?);
        if !values.iter().all(|v| v.is_finite()) {
            return Err(format!("`{name}` holds numbers that aren't finite"));
        }
        Ok(Symmetric::from_values(width, &values))
    }

    fn numbers<'a>(
        &self,
        file: &SafeTensors<'a>,
        name: &str,
        dtype: Dtype,
        count: usize,
    ) -> std::result::Result<&'a [u8], String> {
        let view = file.tensor(name).map_err(|e| format!("`{name}`: {e}"))?;
        if view.dtype() != dtype || view.shape() != [count] {
            return Err(format!("`{name}` is {:?} {:?}, wanted {dtype:?} [{count}]", view.dtype(), view.shape()));
        }
        Ok(view.data())
    }
}

fn le_bytes(values: impl Iterator<Item = f32>) -> Vec<u8> {
    values.flat_map(f32::to_le_bytes).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}
