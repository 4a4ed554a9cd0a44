//! AdaRound (arXiv 2004.10568): whether each weight is rounded up or down is learned, layer by layer.
//!
//! ```text
//! W~ = s * clamp(floor(W / s) + h(V))        h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)
//! least  tr(D H D^T) + lambda sum(1 - |2 h - 1|^beta)      D = W~ - W,  H = E[x x^T] of the layer's input
//! ```
//! beta falls from 20 to 2, so that h may first be anything between 0 and 1 and has to be one of the two in the end. H is
//! all of the inputs that the squared error depends on, so that every step is over all samples. Inputs of a convolution
//! are its windows; a depthwise one has an H a channel. With biases corrected, H is of deviations from the mean. A row
//! that ends up worse than rounded to the nearest keeps that.

use super::optimizer::{Group, Method, Optimizer, cosine};
use crate::graph::{GraphRunner, Rten};
use crate::vision::calibrate::CalibrateOptions;
use crate::vision::data::Data;
use crate::vision::diagnose::{Layer, layers};
use crate::vision::prepare::Prepared;
use crate::{ModelError, Result};
use candle_core::{D, Device, Tensor, Var};
use nibble_quant::onnx::Graph;
use nibble_quant::onnx::proto::NodeProto;
use nibble_quant::onnx::tensor::elements;
use nibble_quant::onnx::weights::{Layout, Rounding, Seen, Weight, quantize, rows, transpose};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

/// How long and how strongly is learned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Learning {
    /// Steps a layer.
    pub steps: usize,
    /// Adam's rate at its highest.
    pub rate: f64,
    /// The share of the term that makes h whole, of the error of rounding to the nearest.
    pub lambda: f64,
}

impl Default for Learning {
    fn default() -> Self {
        Self { steps: 250, rate: 0.05, lambda: 1.0 }
    }
}

/// What learning did to a layer.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Learned {
    /// The layer's node.
    pub node: String,
    /// Expected squared error of its output, rounded to the nearest.
    pub nearest: f64,
    /// The same with what was learned.
    pub learned: f64,
    /// Share of weights that are rounded the other way.
    pub moved: f64,
}

/// Places of a sample that a layer's input is taken from: neighbours are much alike.
const PLACES: usize = 192;
/// The share of steps in which h is free.
const FREE: f64 = 0.2;
/// What is added to the diagonal of H, as a share of its mean: other samples differ from those seen.
const DAMPING: f32 = 0.05;

/// Where a layer's input is in a tensor, and what is known of it: sums over (groups, rows, values of a window).
struct Window {
    reads: String,
    /// Group, and the shape of a window: channels of a group, height and width. Linear layers have windows of one value.
    groups: usize,
    channels: usize,
    kernel: [usize; 2],
    strides: [usize; 2],
    dilations: [usize; 2],
    pads: [usize; 2],
    second: bool,
    gram: Vec<Vec<f32>>,
    sums: Vec<Vec<f64>>,
    count: f64,
}

impl Window {
    fn of(node: &NodeProto, layer: &Layer) -> Option<Window> {
        let pair = |name: &str, default: usize| -> Option<[usize; 2]> {
            match node.attr(name).map(|a| a.ints.as_slice()) {
                None | Some([]) => Some([default; 2]),
                Some(&[a, b, ..]) => Some([usize::try_from(a).ok()?, usize::try_from(b).ok()?]),
                Some(_) => None,
            }
        };
        let reads = layer.reads.first()?.clone();
        let linear = |channels: usize| Window {
            reads: reads.clone(),
            groups: 1,
            channels,
            kernel: [1; 2],
            strides: [1; 2],
            dilations: [1; 2],
            pads: [0; 2],
            second: false,
            gram: Vec::new(),
            sums: Vec::new(),
            count: 0.0,
        };
        match (node.op_type(), layer.shape.as_slice()) {
            ("Conv", &[_, channels, height, width]) => Some(Window {
                groups: usize::try_from(node.int("group", 1)).ok().filter(|&g| g > 0)?,
                kernel: [height, width],
                strides: pair("strides", 1)?,
                dilations: pair("dilations", 1)?,
                pads: pair("pads", 0)?,
                second: true,
                ..linear(channels)
            }),
            ("Gemm", &[n, k]) => Some(linear(if node.int("transB", 0) != 0 { k } else { n })),
            ("MatMul", &[k, _]) => Some(linear(k)),
            _ => None,
        }
    }

    fn width(&self) -> usize {
        self.channels * self.kernel[0] * self.kernel[1]
    }

    /// Takes in windows of one sample's tensor, at some of its places.
    fn observe(&mut self, values: &[f32], dims: &[usize], sample: usize) -> Result<()> {
        let wrong = || ModelError::Graph { what: self.reads.clone(), why: format!("has shape {dims:?}") };
        // As (batch, channels, height, width), by strides.
        let (channels, height, width, steps) = match (dims, self.second) {
            (&[_, c, h, w], true) => (c, h, w, [c * h * w, h * w, w, 1]),
            (_, false) => {
                let c = dims.last().copied().ok_or_else(wrong)?;
                let rows = values.len() / c.max(1);
                (c, rows, 1, [values.len(), 1, c, c])
            }
            _ => return Err(wrong()),
        };
        if channels != self.channels * self.groups {
            return Err(wrong());
        }
        let side = |axis: usize, size: usize| {
            let reach = self.dilations[axis] * (self.kernel[axis].max(1) - 1) + 1;
            (size + 2 * self.pads[axis]).saturating_sub(reach) / self.strides[axis].max(1) + 1
        };
        let (outs_y, outs_x) = (side(0, height), side(1, width));
        let places = outs_y * outs_x;
        let step = places.div_ceil(PLACES).max(1);
        let k = self.width();
        let mut rows: Vec<Vec<f32>> = vec![Vec::new(); self.groups];
        for place in (sample * 7 % step..places).step_by(step) {
            let (y, x) = (place / outs_x * self.strides[0], place % outs_x * self.strides[1]);
            for channel in 0..channels {
                for (i, j) in (0..self.kernel[0]).flat_map(|i| (0..self.kernel[1]).map(move |j| (i, j))) {
                    let at = [y + i * self.dilations[0], x + j * self.dilations[1]];
                    let inside = at[0].checked_sub(self.pads[0]).zip(at[1].checked_sub(self.pads[1]));
                    let inside = inside.filter(|&(y, x)| y < height && x < width);
                    let index = inside.map(|(y, x)| channel * steps[1] + y * steps[2] + x * steps[3]);
                    let value = index.and_then(|index| values.get(index)).copied().unwrap_or(0.0);
                    rows[channel / self.channels].push(value);
                }
            }
        }
        let count = rows.first().map_or(0, |r| r.len() / k.max(1));
        self.gram.resize(self.groups, vec![0.0; k * k]);
        self.sums.resize(self.groups, vec![0.0; k]);
        for ((gram, sums), rows) in self.gram.iter_mut().zip(&mut self.sums).zip(&rows) {
            for row in rows.chunks_exact(k) {
                sums.iter_mut().zip(row).for_each(|(sum, &v)| *sum += f64::from(v));
            }
            let x = Tensor::from_slice(rows, (count, k), &Device::Cpu).map_err(candle)?;
            let product = x.t().and_then(|t| t.contiguous()).and_then(|t| t.matmul(&x)).map_err(candle)?;
            let product = product.flatten_all().and_then(|p| p.to_vec1::<f32>()).map_err(candle)?;
            gram.iter_mut().zip(product).for_each(|(sum, p)| *sum += p);
        }
        self.count += count as f64;
        Ok(())
    }

    /// H as (groups, k, k): of deviations from the mean if `centred`, damped.
    fn moments(&self, centred: bool) -> Result<Tensor> {
        let k = self.width();
        let mut all = Vec::with_capacity(self.groups * k * k);
        for (gram, sums) in self.gram.iter().zip(&self.sums) {
            let n = self.count.max(1.0);
            let start = all.len();
            for (i, row) in gram.chunks_exact(k).enumerate() {
                all.extend(row.iter().enumerate().map(|(j, &g)| {
                    let mean = if centred { sums[i] / n * (sums[j] / n) } else { 0.0 };
                    (f64::from(g) / n - mean) as f32
                }));
            }
            let trace: f32 = (0..k).map(|i| all[start + i * k + i].max(0.0)).sum();
            let more = DAMPING * trace / k.max(1) as f32 + f32::MIN_POSITIVE;
            (0..k).for_each(|i| all[start + i * k + i] += more);
        }
        Tensor::from_vec(all, (self.gram.len(), k, k), &Device::Cpu).map_err(candle)
    }
}

fn candle(e: candle_core::Error) -> ModelError {
    ModelError::Graph { what: "learned rounding".into(), why: e.to_string() }
}

/// Learns the rounding of every planned layer with weights, and keeps it in the calibration. `progress` is called once a
/// sample and once a layer.
///
/// # Errors
/// A sample that can't be read or run, or the wish to stop.
pub fn learn(
    prepared: &mut Prepared,
    data: &Data,
    options: &CalibrateOptions,
    learning: Learning,
    progress: &mut dyn FnMut(),
) -> Result<Vec<Learned>> {
    let Prepared { model, plan, calibration, .. } = prepared;
    let graph = Graph::new(model.graph())?;
    let mut windows: Vec<(Layer, Window)> = Vec::new();
    for layer in layers(&graph, plan) {
        // A weight that two layers read meets two inputs.
        let alone = layer.weight.as_deref().is_some_and(|w| graph.consumers(w).len() == 1);
        if let Some(window) = Window::of(graph.node(layer.id), &layer).filter(|_| alone) {
            windows.push((layer, window));
        }
    }
    let mut wanted: Vec<String> = windows.iter().map(|(_, w)| w.reads.clone()).collect();
    wanted.sort();
    wanted.dedup();
    wanted.retain(|name| !model.graph().input.iter().any(|i| i.name() == name));
    let runner = Rten::new(model, &wanted, options.threads)?;
    let mut index = 0;
    data.each(&mut |sample, _| {
        if options.stop.load(Ordering::Relaxed) {
            return Err(nibble_quant::QuantError::Stopped.into());
        }
        let made = runner.run(&sample, &wanted)?;
        let mut values: BTreeMap<&str, &crate::graph::Tensor> = wanted.iter().map(String::as_str).zip(&made).collect();
        values.extend(sample.iter().map(|(name, tensor)| (name.as_str(), tensor)));
        for (_, window) in &mut windows {
            let Some(tensor) = values.get(window.reads.as_str()) else { continue };
            window.observe(tensor.as_floats(&window.reads)?, &tensor.dims, index)?;
        }
        index += 1;
        progress();
        Ok(true)
    })?;
    let rounding = Rounding { algorithm: "search", ..plan.settings.weights };
    let mut found = Vec::new();
    for (layer, window) in &windows {
        if options.stop.load(Ordering::Relaxed) {
            return Err(nibble_quant::QuantError::Stopped.into());
        }
        let node = graph.node(layer.id);
        let Some(tensor) = graph.constant(node.arg(1)).filter(|t| elements(t).is_ok_and(|n| n > 0)) else { continue };
        let first = node.is("Conv") || node.is("Gemm") && node.int("transB", 0) != 0;
        let layout = if first { Layout::Rows } else { Layout::Columns };
        let (shape, exact) = rows(tensor, layout)?;
        let moments = window.moments(options.correct_bias)?;
        let importance: Vec<f32> = diagonal(&moments)?;
        // Convolutions of several groups have several diagonals, and one search.
        let seen = Seen { importance: (window.groups == 1).then_some(&importance[..]), input: None };
        let start = quantize(tensor, layout, rounding, seen, &[])?;
        let mut codes = match layout {
            Layout::Rows => start.codes.clone(),
            Layout::Columns => transpose(&start.codes, shape[1], shape[0]),
        };
        let scales: Vec<f32> = (0..shape[0]).map(|row| start.scale(row)).collect();
        let most = ((1i32 << (rounding.bits - 1)) - 1) as f32;
        let problem = Problem { exact: &exact, scales: &scales, most, shape, groups: window.groups, moments };
        let learned = problem.solve(&mut codes, learning)?;
        found.push(Learned { node: layer.node.clone(), ..learned });
        let codes = if layout == Layout::Columns { transpose(&codes, shape[0], shape[1]) } else { codes };
        if let Some(name) = &layer.weight {
            calibration.weights.insert(name.clone(), Weight { codes, ..start });
        }
        progress();
    }
    Ok(found)
}

fn diagonal(moments: &Tensor) -> Result<Vec<f32>> {
    let (groups, k, _) = moments.dims3().map_err(candle)?;
    let all = moments.flatten_all().and_then(|m| m.to_vec1::<f32>()).map_err(candle)?;
    Ok((0..groups * k).map(|i| all[i / k * k * k + i % k * (k + 1)].max(0.0)).collect())
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
    groups: usize,
    /// (groups, columns, columns)
    moments: Tensor,
}

impl Problem<'_> {
    /// Weights in steps, as (groups, rows of a group, columns).
    fn tensor(&self, values: Vec<f32>) -> candle_core::Result<Tensor> {
        let [n, k] = self.shape;
        Tensor::from_vec(values, (self.groups, n / self.groups.max(1), k), &Device::Cpu)
    }

    /// The error of each row, from differences in steps.
    fn errors(&self, difference: &Tensor) -> candle_core::Result<Tensor> {
        difference.matmul(&self.moments)?.mul(difference)?.sum(D::Minus1)
    }

    /// Learns from the codes given, and leaves the better ones of each row.
    fn solve(&self, codes: &mut [i8], learning: Learning) -> Result<Learned> {
        self.attempt(codes, learning).map_err(candle)
    }

    fn attempt(&self, codes: &mut [i8], learning: Learning) -> candle_core::Result<Learned> {
        let [_, k] = self.shape;
        let steps: Vec<f32> = self.exact.iter().enumerate().map(|(i, w)| w / self.scales[i / k]).collect();
        let floor: Vec<f32> = steps.iter().map(|s| s.floor().clamp(-self.most, self.most)).collect();
        // An h that gives back the exact weight, where that is within the codes.
        let start = steps.iter().zip(&floor).map(|(s, f)| {
            let h = ((s - f).clamp(0.01, 0.99) + 0.1) / 1.2;
            (h / (1.0 - h)).ln()
        });
        let var = Var::from_tensor(&self.tensor(start.collect())?)?;
        let exact = self.tensor(steps.clone())?;
        let base = self.tensor(floor.clone())?;
        let scales: Vec<f32> = (0..steps.len()).map(|i| self.scales[i / k]).collect();
        let scales = self.tensor(scales)?;
        let nearest: Vec<f32> = codes.iter().map(|&c| f32::from(c)).collect();
        let of = |codes: Vec<f32>| self.errors(&self.tensor(codes)?.sub(&exact)?.mul(&scales)?);
        let before = of(nearest)?.flatten_all()?.to_vec1::<f32>()?;
        let whole = before.iter().map(|&e| f64::from(e)).sum::<f64>().max(f64::MIN_POSITIVE);
        let group = Group { name: "rounding".into(), var: var.clone(), rate: 1.0, decays: false };
        let mut optimizer = Optimizer::new(vec![group], Method::AdamW { decay: 0.0 });
        let soft = |v: &Tensor| candle_nn::ops::sigmoid(v)?.affine(1.2, -0.1)?.clamp(0f32, 1f32);
        let free = (FREE * learning.steps as f64) as usize;
        for step in 0..learning.steps {
            let h = soft(var.as_tensor())?;
            let difference = base.add(&h)?.clamp(-self.most, self.most)?.sub(&exact)?.mul(&scales)?;
            let mut loss = (self.errors(&difference)?.sum_all()? / whole)?;
            if step >= free {
                let done = (step - free) as f64 / (learning.steps - free).max(1) as f64;
                let beta = 2.0 + 18.0 * 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
                let between = (1.0 - h.affine(2.0, -1.0)?.abs()?.powf(beta)?)?.mean_all()?;
                loss = (loss + (between * learning.lambda)?)?;
            }
            let grads = loss.backward()?;
            let rate = learning.rate * (0.1 + 0.9 * cosine(step, 1, learning.steps));
            optimizer.step(&grads, rate).map_err(|e| candle_core::Error::Msg(e.to_string()))?;
        }
        let h = soft(var.as_tensor())?.flatten_all()?.to_vec1::<f32>()?;
        let hard = |(f, h): (&f32, &f32)| (f + f32::from(u8::from(*h >= 0.5))).clamp(-self.most, self.most);
        let chosen: Vec<f32> = floor.iter().zip(&h).map(hard).collect();
        let after = of(chosen.clone())?.flatten_all()?.to_vec1::<f32>()?;
        let mut learned = Learned { node: String::new(), nearest: whole, learned: 0.0, moved: 0.0 };
        for (row, (was, is)) in before.iter().zip(&after).enumerate() {
            let better = is < was;
            learned.learned += f64::from(if better { *is } else { *was });
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
