//! AdaRound (arXiv 2004.10568): whether each weight is rounded up or down is learned, layer by layer.
//!
//! ```text
//! W~ = s * clamp(floor(W / s) + h(V))        h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)
//! least  tr(D H D^T) + lambda sum(1 - |2 h - 1|^beta)      D = W~ - W,  H = E[x x^T] of the layer's input
//! ```
//! beta falls from 20 to 2, so that h may first be anything between 0 and 1 and has to be one of the two in the end. H is
//! all of the inputs that the squared error depends on, so that every step is over all samples; calibration keeps it for
//! GPTQ, whose scales are taken. Inputs of a convolution are its windows; a depthwise one has an H a channel. With biases
//! corrected, H is of deviations from the mean. A row that ends up worse than GPTQ's keeps that.
//!
//! The gradient is known without recording anything: that of the first term by D is 2 D H, one product a step.

use crate::vision::diagnose::layers;
use crate::vision::prepare::Prepared;
use crate::{ModelError, Result};
use candle_core::{Device, Tensor};
use nibble_quant::onnx::Graph;
use nibble_quant::onnx::equalize::layers::costs;
use nibble_quant::onnx::tensor::elements;
use nibble_quant::onnx::weights::{Layout, Seen, Weight, quantize, rows, transpose};
use nibble_quant::stats::Input;
use rayon::prelude::*;
use std::sync::atomic::{AtomicBool, Ordering};

/// How long and how strongly is learned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Learning {
    /// Steps a layer.
    pub steps: usize,
    /// Adam's rate at its highest.
    pub rate: f32,
    /// The share of the term that makes h whole, of the error at the start.
    pub lambda: f32,
}

impl Default for Learning {
    fn default() -> Self {
        Self { steps: 120, rate: 0.1, lambda: 1.0 }
    }
}

/// What learning did to a layer.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Learned {
    /// The layer's node.
    pub node: String,
    /// Expected squared error of its output, rounded as calibration has it.
    pub start: f64,
    /// The same with what was learned.
    pub learned: f64,
    /// Share of weights that are rounded another way.
    pub moved: f64,
}

/// The share of steps in which h is free.
const FREE: f32 = 0.2;
/// What is added to the diagonal of H, as a share of its mean: other samples differ from those seen.
const DAMPING: f32 = 0.05;

/// H of each group, (groups, k, k), damped.
fn moments(inputs: &[Input]) -> Result<Option<Tensor>> {
    let k = inputs.first().map_or(0, Input::width);
    let mut all = Vec::with_capacity(inputs.len() * k * k);
    for input in inputs {
        let Some(gram) = input.gram().filter(|g| g.width() == k) else { return Ok(None) };
        let n = input.rows().max(1) as f32;
        let trace: f32 = (0..k).map(|i| gram.get(i, i) / n).sum();
        let more = DAMPING * trace / k.max(1) as f32 + f32::MIN_POSITIVE;
        for i in 0..k {
            all.extend((0..k).map(|j| gram.get(i, j) / n + if i == j { more } else { 0.0 }));
        }
    }
    Ok(Some(Tensor::from_vec(all, (inputs.len(), k, k), &Device::Cpu).map_err(candle)?))
}

fn candle(e: candle_core::Error) -> ModelError {
    ModelError::Graph { what: "learned rounding".into(), why: e.to_string() }
}

/// Learns the rounding of every planned layer with weights whose inputs' products calibration kept, and keeps it in the
/// calibration. `progress` is called once a layer.
///
/// # Errors
/// Weights that can't be quantized, or the wish to stop.
pub fn learn(
    prepared: &mut Prepared,
    learning: Learning,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(),
) -> Result<Vec<Learned>> {
    let Prepared { model, plan, calibration, .. } = prepared;
    let graph = Graph::new(model.graph())?;
    let costs = costs(&graph, plan.settings.weights)?;
    let mut found = Vec::new();
    for layer in layers(&graph, plan) {
        if stop.load(Ordering::Relaxed) {
            return Err(nibble_quant::QuantError::Stopped.into());
        }
        progress();
        let node = graph.node(layer.id);
        // A weight that two layers read meets two inputs.
        let alone = layer.weight.as_ref().filter(|w| graph.consumers(w).len() == 1);
        let tensor = graph.constant(node.arg(1)).filter(|t| elements(t).is_ok_and(|n| n > 0));
        let (Some(name), Some(tensor)) = (alone, tensor) else { continue };
        let inputs = calibration.inputs_of(&graph, node);
        let layout = Layout::of(node);
        let (shape, exact) = rows(tensor, layout)?;
        let whole = !inputs.is_empty() && shape[0] % inputs.len() == 0;
        let Some(moments) = moments(inputs)?.filter(|m| whole && m.dims().get(1) == Some(&shape[1])) else { continue };
        let importance = inputs.first().filter(|_| inputs.len() == 1).map(Input::mean_squares);
        let costs = costs.get(name).map(Vec::as_slice);
        let seen = Seen { importance: importance.as_deref(), inputs, costs };
        let pairs = plan.settings.weights.pairs_of(node, tensor, layout);
        let start = quantize(tensor, layout, plan.settings.weights, seen, &[], pairs.as_ref())?;
        let mut codes = match layout {
            Layout::Rows => start.codes.clone(),
            Layout::Columns => transpose(&start.codes, shape[1], shape[0]),
        };
        let scales: Vec<f32> = (0..shape[0]).map(|row| start.scale(row)).collect();
        let most = ((1i32 << (plan.settings.weights.bits - 1)) - 1) as f32;
        let problem = Problem { exact: &exact, scales: &scales, most, shape, moments };
        let learned = problem.solve(&mut codes, learning).map_err(candle)?;
        found.push(Learned { node: layer.node.clone(), ..learned });
        if let Some(pairs) = &pairs {
            pairs.limit(&mut codes, shape[1], None);
        }
        let codes = if layout == Layout::Columns { transpose(&codes, shape[0], shape[1]) } else { codes };
        calibration.weights.insert(name.clone(), Weight { codes, ..start });
    }
    Ok(found)
}

/// One layer's rounding.
struct Problem<'a> {
    /// (rows, columns)
    exact: &'a [f32],
    /// (rows)
    scales: &'a [f32],
    /// The largest code.
    most: f32,
    shape: [usize; 2],
    /// (groups, columns, columns)
    moments: Tensor,
}

/// One weight's V, and Adam's means of its gradient and of that's square.
#[derive(Clone, Copy)]
struct Cell {
    v: f32,
    mean: f32,
    square: f32,
}

/// h(V) and its derivative.
fn soft(v: f32) -> (f32, f32) {
    let s = 1.0 / (1.0 + (-v).exp());
    let h = 1.2 * s - 0.1;
    let inside = (0.0..=1.0).contains(&h);
    (h.clamp(0.0, 1.0), if inside { 1.2 * s * (1.0 - s) } else { 0.0 })
}

impl Problem<'_> {
    /// D H, from D in floats: (rows, columns).
    fn pulls(&self, difference: Vec<f32>) -> candle_core::Result<Vec<f32>> {
        let ([n, k], groups) = (self.shape, self.moments.dims()[0]);
        let d = Tensor::from_vec(difference, (groups, n / groups.max(1), k), &Device::Cpu)?;
        d.matmul(&self.moments)?.flatten_all()?.to_vec1::<f32>()
    }

    /// The error of each row under these codes.
    fn errors(&self, codes: &[f32]) -> candle_core::Result<Vec<f64>> {
        let k = self.shape[1];
        let d: Vec<f32> =
            codes.iter().zip(self.exact).enumerate().map(|(i, (q, w))| q * self.scales[i / k] - w).collect();
        let pulls = self.pulls(d.clone())?;
        let row = |(d, p): (&[f32], &[f32])| d.iter().zip(p).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        Ok(d.chunks_exact(k).zip(pulls.chunks_exact(k)).map(row).collect())
    }

    /// Learns, and leaves the better of each row and the codes given.
    fn solve(&self, codes: &mut [i8], learning: Learning) -> candle_core::Result<Learned> {
        let k = self.shape[1];
        let scale = |i: usize| self.scales[i / k];
        let steps: Vec<f32> = self.exact.iter().enumerate().map(|(i, w)| w / scale(i)).collect();
        let floor: Vec<f32> = steps.iter().map(|s| s.floor().clamp(-self.most, self.most)).collect();
        // An h that gives back the exact weight, where that is within the codes.
        let start = |(s, f): (&f32, &f32)| {
            let h = ((s - f).clamp(0.01, 0.99) + 0.1) / 1.2;
            Cell { v: (h / (1.0 - h)).ln(), mean: 0.0, square: 0.0 }
        };
        let mut cells: Vec<Cell> = steps.iter().zip(&floor).map(start).collect();
        let before = self.errors(&codes.iter().map(|&c| f32::from(c)).collect::<Vec<_>>())?;
        let whole = before.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        let (by_error, by_wholeness) = ((2.0 / whole) as f32, learning.lambda / cells.len().max(1) as f32);
        for step in 0..learning.steps {
            let share = step as f32 / learning.steps.max(1) as f32;
            let done = ((share - FREE) / (1.0 - FREE)).max(0.0);
            let fall = |of: f32| 0.5 * (1.0 + (std::f32::consts::PI * of).cos());
            let beta = 2.0 + 18.0 * fall(done);
            let rate = learning.rate * (0.1 + 0.9 * fall(share));
            let difference: Vec<f32> = cells
                .par_iter()
                .enumerate()
                .map(|(i, cell)| ((floor[i] + soft(cell.v).0).clamp(-self.most, self.most) - steps[i]) * scale(i))
                .collect();
            let pulls = self.pulls(difference)?;
            let corrections = [0.9f32, 0.999].map(|b| 1.0 - b.powi(step as i32 + 1));
            cells.par_iter_mut().enumerate().for_each(|(i, cell)| {
                let (h, slope) = soft(cell.v);
                let within = floor[i] + h <= self.most;
                let mut gradient = if within { by_error * pulls[i] * scale(i) } else { 0.0 };
                if share >= FREE {
                    let off = 2.0 * h - 1.0;
                    gradient -= by_wholeness * 2.0 * beta * off.abs().powf(beta - 1.0) * off.signum();
                }
                gradient *= slope;
                cell.mean += 0.1 * (gradient - cell.mean);
                cell.square += 0.001 * (gradient * gradient - cell.square);
                let [mean, square] = [cell.mean / corrections[0], cell.square / corrections[1]];
                cell.v -= rate * mean / (square.sqrt() + f32::MIN_POSITIVE.sqrt());
            });
        }
        let hard = |(f, cell): (&f32, &Cell)| (f + f32::from(u8::from(cell.v >= 0.0))).clamp(-self.most, self.most);
        let chosen: Vec<f32> = floor.iter().zip(&cells).map(hard).collect();
        let after = self.errors(&chosen)?;
        let mut learned = Learned { node: String::new(), start: whole, learned: 0.0, moved: 0.0 };
        for (row, (was, is)) in before.iter().zip(&after).enumerate() {
            let better = is < was;
            learned.learned += if better { *is } else { *was };
            let range = row * k..(row + 1) * k;
            for (code, new) in codes[range.clone()].iter_mut().zip(&chosen[range]).filter(|_| better) {
                learned.moved += f64::from(u8::from(f32::from(*code) != *new));
                *code = *new as i8;
            }
        }
        learned.moved /= codes.len().max(1) as f64;
        Ok(learned)
    }
}
