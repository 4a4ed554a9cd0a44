//! How close a quantized model's outputs are to the float model's.

use super::data::Data;
use crate::graph::{GraphRunner, Values};
use crate::{ModelError, Result};
use std::sync::atomic::{AtomicBool, Ordering};

/// Embeddings that are kept for the search of nearest neighbours, in values.
const KEPT: usize = 1 << 26;

/// Figures of one output over all samples.
#[derive(Debug, Clone, serde::Serialize)]
pub struct OutputReport {
    /// The output's name.
    pub name: String,
    /// Power of the float model's values over that of the difference, in dB; `None` if there is no difference.
    pub sqnr_db: Option<f64>,
    /// Mean over samples of the cosine between the two.
    pub cosine: f64,
    /// The largest difference.
    pub max_error: f32,
    /// Share of samples with the same largest value.
    pub top1: f64,
    /// Share of samples whose largest float value is among the 5 largest.
    pub top5: f64,
    /// Share of samples whose nearest neighbour (largest cosine, itself left out) is the same; `None` for less than
    /// three samples, or outputs too large to keep.
    pub nearest: Option<f64>,
    /// Mean over samples of the divergence of the class probabilities from the float model's (Kullback-Leibler, nats, after
    /// a softmax); `None` for outputs that aren't (batch, classes).
    pub kl: Option<f64>,
    /// Share of samples with the label as the largest value: float model, other model.
    pub accuracy: Option<[f64; 2]>,
}

/// Figures of all float outputs.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Report {
    /// Samples seen.
    pub samples: usize,
    /// One an output.
    pub outputs: Vec<OutputReport>,
}

#[derive(Default)]
struct Sums {
    /// Whether the output holds floats.
    floats: bool,
    signal: f64,
    noise: f64,
    cosine: f64,
    max_error: f32,
    /// Divergences of rows of class scores, and how many there were.
    kl: (f64, usize),
    top1: usize,
    top5: usize,
    right: [usize; 2],
    kept: [Vec<Vec<f32>>; 2],
    overflow: bool,
}

pub(super) fn argmax(values: &[f32]) -> usize {
    values.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (i, &v)| if v > best.1 { (i, v) } else { best }).0
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    let norm = (dot(a, a) * dot(b, b)).sqrt();
    if norm == 0.0 { f64::from(u8::from(a == b)) } else { dot(a, b) / norm }
}

/// The divergence of `softmax(b)` from `softmax(a)`, in nats.
pub(super) fn divergence(a: &[f32], b: &[f32]) -> f64 {
    let log_total = |scores: &[f32]| {
        let largest = f64::from(scores.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        largest + scores.iter().map(|&s| (f64::from(s) - largest).exp()).sum::<f64>().ln()
    };
    let (of_a, of_b) = (log_total(a), log_total(b));
    let terms = a.iter().zip(b).map(|(&x, &y)| {
        let log_p = f64::from(x) - of_a;
        log_p.exp() * (log_p - (f64::from(y) - of_b))
    });
    terms.sum()
}

/// Runs both models on every sample. `labels` are the samples' classes, in their order.
///
/// # Errors
/// A sample that can't be read or run, outputs of different shapes, fewer labels than samples, or the wish to stop.
pub fn evaluate(
    reference: &dyn GraphRunner,
    other: &dyn GraphRunner,
    outputs: &[String],
    data: &Data,
    labels: Option<&[usize]>,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(),
) -> Result<Report> {
    let mut sums: Vec<Sums> = outputs.iter().map(|_| Sums::default()).collect();
    let mut index = 0;
    let samples = data.each(&mut |sample, _| {
        if stop.load(Ordering::Relaxed) {
            return Err(nibble_quant::QuantError::Stopped.into());
        }
        let label = match labels {
            Some(labels) => Some(*labels.get(index).ok_or_else(|| ModelError::Setting {
                what: "labels".into(),
                why: format!("{} of them, there are more samples", labels.len()),
            })?),
            None => None,
        };
        let [a, b] = [reference.run(&sample, outputs)?, other.run(&sample, outputs)?];
        for (((name, sums), a), b) in outputs.iter().zip(&mut sums).zip(&a).zip(&b) {
            let dims = &a.dims;
            if *dims != b.dims {
                let why = format!("has shape {dims:?} in one model and {:?} in the other", b.dims);
                return Err(ModelError::Graph { what: name.clone(), why });
            }
            if let (Values::Float(a), Values::Float(b)) = (&a.values, &b.values) {
                sums.add(a, b, label);
                if let [rows, classes] = dims[..]
                    && classes > 1
                {
                    let pairs = a.chunks_exact(classes).zip(b.chunks_exact(classes));
                    sums.kl.0 += pairs.map(|(a, b)| divergence(a, b)).sum::<f64>();
                    sums.kl.1 += rows;
                }
            }
        }
        index += 1;
        progress();
        Ok(true)
    })?;
    let report = |(name, sums): (&String, Sums)| sums.report(name, samples, labels.is_some());
    let outputs = outputs.iter().zip(sums).filter(|(_, sums)| sums.floats).map(report).collect();
    Ok(Report { samples, outputs })
}

impl Sums {
    fn add(&mut self, a: &[f32], b: &[f32], label: Option<usize>) {
        self.floats = true;
        for (&x, &y) in a.iter().zip(b) {
            self.signal += f64::from(x) * f64::from(x);
            self.noise += (f64::from(x) - f64::from(y)).powi(2);
            self.max_error = self.max_error.max((x - y).abs());
        }
        self.cosine += cosine(a, b);
        let (wanted, found) = (argmax(a), argmax(b));
        self.top1 += usize::from(wanted == found);
        let above = b.iter().filter(|&&v| b.get(wanted).is_some_and(|&w| v > w)).count();
        self.top5 += usize::from(above < 5);
        if let Some(label) = label {
            self.right[0] += usize::from(wanted == label);
            self.right[1] += usize::from(found == label);
        }
        self.overflow |= (self.kept[0].len() + 1) * a.len() > KEPT;
        if self.overflow {
            self.kept = Default::default();
        } else {
            self.kept[0].push(a.to_vec());
            self.kept[1].push(b.to_vec());
        }
    }

    fn report(self, name: &str, samples: usize, labelled: bool) -> OutputReport {
        let share = |count: usize| count as f64 / samples.max(1) as f64;
        let nearest = (!self.overflow && samples >= 3).then(|| {
            let [a, b] = &self.kept;
            let neighbour = |all: &[Vec<f32>], query: &[f32], own: usize| {
                let others = all.iter().enumerate().filter(|(i, _)| *i != own);
                others.map(|(i, v)| (cosine(query, v), i)).max_by(|x, y| x.0.total_cmp(&y.0)).map(|(_, i)| i)
            };
            share((0..a.len()).filter(|&i| neighbour(a, &a[i], i) == neighbour(a, &b[i], i)).count())
        });
        OutputReport {
            name: name.to_owned(),
            sqnr_db: (self.noise > 0.0).then(|| 10.0 * (self.signal / self.noise).log10()),
            cosine: self.cosine / samples.max(1) as f64,
            max_error: self.max_error,
            top1: share(self.top1),
            top5: share(self.top5),
            nearest,
            kl: (self.kl.1 > 0).then(|| self.kl.0 / self.kl.1 as f64),
            accuracy: labelled.then(|| self.right.map(share)),
        }
    }
}
