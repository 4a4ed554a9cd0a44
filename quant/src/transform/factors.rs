//! Factors that a linear layer's columns take over from what is before it: SmoothQuant and AWQ.
//!
//! ```text
//! W <- W diag(s)      what it reads <- diag(1/s) of it: the gains of a norm, or the rows of up before down, of v before o
//! ```
//! Columns that are read large get smaller inputs and larger weights. How s is chosen is a row of
//! [`TRANSFORMS`](super::TRANSFORMS).

use super::{Place, refuse_codes};
use crate::algo::{self, AlgoInput};
use crate::error::Result;
use crate::format::{Dtype, Stored, TensorInfo, TensorSource, damaged, tensor_error};
use crate::presets;
use crate::stats::{Input, Stats};
use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// SmoothQuant's share of a column's size that goes into the weights.
const SHARE: f32 = 0.5;
/// Exponents that AWQ tries: 0 to 1 in this many steps.
const STEPS: usize = 20;
/// Rows of a layer that AWQ's errors are measured on.
const ROWS: usize = 128;
/// What AWQ's errors are measured with: the numbers of its files.
const SCHEME: &str = "int4-g128-asym";
/// Smallest factor, and one over the largest.
const LEAST: f32 = 1e-4;

/// Linear layers that read the same input, and what was observed of it.
pub struct Site<'a> {
    /// The layers' names.
    pub names: &'a [String],
    /// (n, k) weights of each; all of the same k.
    pub weights: &'a [Vec<f32>],
    /// What they read.
    pub input: &'a Input,
}

/// SmoothQuant (arXiv 2211.10438): `s = max|x|^a / max|w|^(1-a)`, over all layers that read the column.
pub(super) fn smooth(site: &Site) -> Result<Vec<f32>> {
    let k = site.input.width();
    let mut largest = vec![0f32; k];
    for row in site.weights.iter().flat_map(|weight| weight.chunks_exact(k.max(1))) {
        largest.iter_mut().zip(row).for_each(|(m, w)| *m = m.max(w.abs()));
    }
    let one = |(x, w): (&f32, &f32)| match *x > 0.0 && *w > 0.0 {
        true => (x.powf(SHARE) / w.powf(1.0 - SHARE)).clamp(LEAST, 1.0 / LEAST),
        false => 1.0,
    };
    // s multiplies weights, so that what is large in x becomes smaller.
    Ok(site.input.absmax().iter().zip(&largest).map(one).collect())
}

/// AWQ (arXiv 2306.00978): `s = size of x^a`, a the best of a grid. Errors are those of the outputs, from the Gram matrix
/// instead of runs of the model; without one, from second moments.
pub(super) fn awq(site: &Site) -> Result<Vec<f32>> {
    let k = site.input.width();
    let moments = site.input.mean_squares();
    let some: Vec<&[f32]> = site.weights.iter().map(|w| &w[..w.len().min(ROWS * k)]).collect();
    let gram = site.input.gram().map(|gram| gram.dense(1.0 / site.input.rows().max(1) as f32, 0.0));
    let spec = &presets::by_name(SCHEME)?.scheme.weight;
    let mut best = (f64::INFINITY, vec![1.0; k]);
    for step in 0..=STEPS {
        let factors = by_size(&moments, step as f32 / STEPS as f32);
        let mut error = 0.0;
        for (name, weight) in site.names.iter().zip(&some) {
            let scaled: Vec<f32> = weight.iter().enumerate().map(|(i, w)| w * factors[i % k]).collect();
            let input = AlgoInput {
                name,
                weight: &scaled,
                shape: [scaled.len() / k.max(1), k],
                spec,
                importance: None,
                calibrated: None,
                seed: 0,
            };
            let values = (algo::algorithm("rtn")?.run)(&input)?.dequantize();
            for (w, q) in weight.chunks_exact(k.max(1)).zip(values.chunks_exact(k.max(1))) {
                let d: Vec<f32> = w.iter().zip(q).zip(&factors).map(|((w, q), s)| w - q / s).collect();
                error += match &gram {
                    Some(h) => d.iter().enumerate().map(|(a, v)| (v * dot(h.row(a), &d)) as f64).sum::<f64>(),
                    None => d.iter().zip(&moments).map(|(v, m)| (v * v * m) as f64).sum(),
                };
            }
        }
        if error < best.0 {
            best = (error, factors);
        }
    }
    Ok(best.1)
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Root mean squares to a power, with the geometric mean of the largest and the smallest as 1.
fn by_size(moments: &[f32], power: f32) -> Vec<f32> {
    let sizes: Vec<f32> = moments.iter().map(|m| m.sqrt().powf(power).clamp(LEAST, 1.0 / LEAST)).collect();
    let (low, high) = sizes.iter().fold((f32::INFINITY, 0f32), |(low, high), s| (low.min(*s), high.max(*s)));
    let unit = if low > 0.0 && high.is_finite() { (low * high).sqrt() } else { 1.0 };
    sizes.into_iter().map(|s| s / unit).collect()
}

/// What a tensor's values are multiplied by.
#[derive(Default, Clone)]
struct Change {
    /// Divisors of rows (of values, in vectors).
    rows: Option<Arc<Vec<f32>>>,
    /// Factors of columns.
    cols: Option<Arc<Vec<f32>>>,
}

/// A checkpoint with factors moved, in f32.
pub struct Factored<'a> {
    source: &'a dyn TensorSource,
    infos: Vec<TensorInfo>,
    changes: HashMap<String, Change>,
}

/// Layers that read one input, by their names in a layer, and what comes before them.
const SITES: [(&[&str], &[&str]); 4] = [
    (&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], &["input_layernorm.weight"]),
    (&["self_attn.o_proj"], &["self_attn.v_proj.weight", "self_attn.v_proj.bias"]),
    (&["mlp.gate_proj", "mlp.up_proj"], &["post_attention_layernorm.weight"]),
    (&["mlp.down_proj"], &["mlp.up_proj.weight", "mlp.up_proj.bias"]),
];

impl<'a> Factored<'a> {
    /// The source with factors of `choose` at every site that was observed and has something before it of its width: o has
    /// where there are as many key heads as query heads.
    ///
    /// # Errors
    /// A tensor can't be read, is codes, or its place in the model isn't known; no site was observed.
    pub(super) fn new(
        source: &'a dyn TensorSource,
        stats: &Stats,
        choose: fn(&Site) -> Result<Vec<f32>>,
    ) -> Result<Self> {
        let infos = source.infos().iter().map(|info| {
            refuse_codes(info)?;
            if Place::of(&info.name).is_none() {
                return Err(tensor_error(&info.name, super::UNKNOWN));
            }
            Ok(TensorInfo { stored: Stored::Plain(Dtype::F32), bytes: 4 * info.elements(), ..info.clone() })
        });
        let mut made = Factored { source, infos: infos.collect::<Result<_>>()?, changes: HashMap::new() };
        for layer in 0.. {
            let at = |part: &str| format!("model.layers.{layer}.{part}");
            if source.info(&at("input_layernorm.weight")).is_err() {
                break;
            }
            for (readers, before) in SITES {
                let names: Vec<String> = readers.iter().map(|part| at(&format!("{part}.weight"))).collect();
                let before: Vec<String> = before.iter().map(|part| at(part)).collect();
                made.add(&names, &before, stats, choose)?;
            }
        }
        match made.changes.is_empty() {
            true => Err(damaged(source.path(), "the statistics are of none of its layers")),
            false => Ok(made),
        }
    }

    fn add(
        &mut self,
        names: &[String],
        before: &[String],
        stats: &Stats,
        choose: fn(&Site) -> Result<Vec<f32>>,
    ) -> Result<()> {
        let Some(input) = names.first().and_then(|name| stats.inputs.get(name)) else { return Ok(()) };
        let Some(first) = before.first().and_then(|name| self.source.info(name).ok()) else { return Ok(()) };
        let width = if first.shape.len() == 1 { first.elements() } else { first.rows_cols().0 };
        if width != input.width() {
            return Ok(());
        }
        let mut weights = Vec::new();
        for name in names {
            let cols = self.source.info(name)?.rows_cols().1;
            if cols != width {
                return Err(tensor_error(name, format!("{cols} columns, its statistics have {width}")));
            }
            let mut values = Vec::new();
            self.source.read_f32(name, &mut values)?;
            weights.push(values);
        }
        let factors = Arc::new(choose(&Site { names, weights: &weights, input })?);
        names.iter().for_each(|name| {
            self.changes.entry(name.clone()).or_default().cols = Some(Arc::clone(&factors));
            self.source.release(name);
        });
        for name in before {
            self.changes.entry(name.clone()).or_default().rows = Some(Arc::clone(&factors));
        }
        Ok(())
    }
}

impl TensorSource for Factored<'_> {
    fn path(&self) -> &Path {
        self.source.path()
    }

    fn infos(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        super::find(self, name)
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        super::made(self, name)
    }

    fn read_rows_f32(&self, name: &str, rows: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
        let info = self.info(name)?;
        self.source.read_rows_f32(name, rows.clone(), out)?;
        let Some(change) = self.changes.get(name) else { return Ok(()) };
        let vector = info.shape.len() == 1;
        let (_, cols) = info.rows_cols();
        for (r, row) in out.chunks_mut(cols.max(1)).enumerate() {
            if let Some(factors) = &change.cols {
                row.iter_mut().zip(factors.iter()).for_each(|(v, s)| *v *= s);
            }
            if let Some(divisors) = &change.rows {
                match vector {
                    true => row.iter_mut().zip(divisors.iter()).for_each(|(v, s)| *v /= s),
                    false => row.iter_mut().for_each(|v| *v /= divisors[rows.start + r]),
                }
            }
        }
        Ok(())
    }

    fn release(&self, name: &str) {
        self.source.release(name);
    }
}
