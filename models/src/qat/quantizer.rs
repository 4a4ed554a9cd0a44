//! What is quantized in a network in training: activations, weights and biases, each tied to the initializers of the
//! exported model that hold its codes and scales.

use super::ops::{Axis, FakeQuantize, clamp, fake_quantize, lend};
use crate::{ModelError, Result};
use candle_core::{Device, Tensor, Var};
use nibble_quant::Range;
use nibble_quant::observer::{IntGrid, QParams, Statistics};
use nibble_quant::onnx::weights::least_scales;

/// Share of a batch's range in the moving average of ranges, as PyTorch has it.
const MOMENTUM: f32 = 0.01;
/// A learned scale never falls below this share of the one it started with.
const LEAST_SHARE: f32 = 1e-3;

/// How activations pass a quantizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Quantized; gradients are wanted, ranges follow what they see until they are frozen.
    Train,
    /// Quantized.
    Evaluate,
    /// In floats, weights too; batch norms to be take in what they see.
    Observe,
}

fn candle(what: &str) -> impl Fn(candle_core::Error) -> ModelError + '_ {
    move |e| ModelError::Graph { what: what.into(), why: e.to_string() }
}

/// LSQ's factor for the gradient of a scale: `1 / sqrt(values that share it * largest code)`.
fn factor(values: usize, limits: (i32, i32)) -> f64 {
    1.0 / (values.max(1) as f64 * f64::from(limits.1.max(1))).sqrt()
}

/// A tensor of activations, and those that have its scale.
pub struct ActivationQuantizer {
    /// The tensor.
    pub name: String,
    /// Initializers of the exported model: scale and zero point.
    pub initializers: [String; 2],
    /// The codes.
    pub grid: IntGrid,
    /// Its range is known (Softmax, Sigmoid) and isn't learned.
    pub fixed: bool,
    /// The scale, (1).
    pub scale: Var,
    /// The code of 0.
    pub zero: i32,
    /// The Relu or Clip that is in the range: the exported graph has none, so that it is done here where nothing is rounded.
    pub clip: Range,
    /// The range that scale and zero point are made of as long as they follow it.
    pub range: Range,
    /// Whether the range follows what is seen in training.
    pub follows: bool,
    /// The scale is learned.
    pub learn: bool,
    least: f32,
}

impl ActivationQuantizer {
    pub(super) fn new(name: &str, initializers: [String; 2], grid: IntGrid) -> Result<Self> {
        let scale = Var::from_vec(vec![1f32], 1, &Device::Cpu).map_err(candle(name))?;
        Ok(Self {
            name: name.to_owned(),
            initializers,
            grid,
            fixed: false,
            scale,
            zero: 0,
            clip: Range { lo: f32::NEG_INFINITY, hi: f32::INFINITY },
            range: Range { lo: 0.0, hi: 0.0 },
            follows: false,
            learn: false,
            least: 0.0,
        })
    }

    /// Scale and zero point.
    pub fn params(&self) -> Result<QParams> {
        let scale = self.scale.as_tensor().to_vec1::<f32>().map_err(candle(&self.name))?;
        Ok(QParams { scale: scale.first().copied().unwrap_or(1.0), zero_point: self.zero })
    }

    /// Sets the range, and scale and zero point by it.
    pub fn set_range(&mut self, range: Range) -> Result<()> {
        let range = Range { lo: range.lo.max(self.clip.lo), hi: range.hi.min(self.clip.hi) };
        let QParams { scale, zero_point } = self.grid.params(range);
        self.range = range;
        self.zero = zero_point;
        self.least = scale * LEAST_SHARE;
        let scale = Tensor::new(&[scale], &Device::Cpu).map_err(candle(&self.name))?;
        self.scale.set(&scale).map_err(candle(&self.name))
    }

    /// A learned scale that fell to nothing comes back.
    pub(super) fn restrain(&mut self) -> Result<()> {
        if !self.learn {
            return Ok(());
        }
        let scale = self.params()?.scale;
        if scale >= self.least {
            return Ok(());
        }
        let least = Tensor::new(&[self.least], &Device::Cpu).map_err(candle(&self.name))?;
        self.scale.set(&least).map_err(candle(&self.name))
    }

    pub(super) fn pass(&mut self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let name = self.name.clone();
        match mode {
            Mode::Observe => return clamp(x, self.clip.lo, self.clip.hi).map_err(candle(&name)),
            Mode::Train if self.follows && !self.fixed => {
                let mut seen = Statistics::new(false);
                let read = lend(x, |x| {
                    seen.observe(x);
                    Ok(())
                });
                read.map_err(candle(&name))?;
                let (old, new) = (self.range, seen.range());
                let moved = |old: f32, new: f32| old + MOMENTUM * (new - old);
                self.set_range(Range { lo: moved(old.lo, new.lo), hi: moved(old.hi, new.hi) })?;
            }
            _ => {}
        }
        let limits = self.grid.limits();
        let batch = x.dims().first().copied().unwrap_or(1).max(1);
        let learn = (self.learn && mode == Mode::Train).then(|| factor(x.elem_count() / batch, limits));
        let how = FakeQuantize { axis: Axis::Tensor, zero: self.zero, limits, learn };
        let scale = match learn {
            Some(_) => self.scale.as_tensor().clone(),
            None => self.scale.as_tensor().detach(),
        };
        fake_quantize(x, &scale, how).map_err(candle(&name))
    }
}

/// A weight: a float parameter, and the initializers that hold its codes.
pub struct WeightQuantizer {
    /// The parameter.
    pub parameter: String,
    /// The tensor that layers read: the output of the DequantizeLinear.
    pub output: String,
    /// Initializers of the exported model: codes and scales.
    pub initializers: [String; 2],
    /// Which values share a scale.
    pub axis: Axis,
    /// The codes.
    pub grid: IntGrid,
    /// The scales, one a channel.
    pub scale: Var,
    /// Scales are learned.
    pub learn: bool,
    /// Scales are those of each channel's largest weight. Neither: they stay as they are.
    pub follows: bool,
    /// What scales must be at least, so that biases fit into 32 bits of them: the bias and its layer's input.
    pub bias: Option<(String, usize)>,
    pub(super) least: Vec<f32>,
}

impl WeightQuantizer {
    /// Starts from scales.
    pub fn set_scales(&mut self, scales: Vec<f32>) -> Result<()> {
        self.least = scales.iter().map(|s| s * LEAST_SHARE).collect();
        let n = scales.len();
        let scales = Tensor::from_vec(scales, n, &Device::Cpu).map_err(candle(&self.parameter))?;
        self.scale = Var::from_tensor(&scales).map_err(candle(&self.parameter))?;
        Ok(())
    }

    /// Brings scales where they may be: those of the largest weights if they follow them; in any case not below what a
    /// bias needs (`bias` and the scale of the layer's input).
    pub(super) fn settle(&mut self, weight: &Tensor, bias: Option<(&Tensor, f32)>) -> Result<()> {
        let mut scales = self.scale.as_tensor().to_vec1::<f32>().map_err(candle(&self.parameter))?;
        let before = scales.clone();
        if self.follows {
            let n = scales.len().max(1);
            let largest = lend(weight, |w| {
                let mut largest = vec![0f32; n];
                let row = (w.len() / n).max(1);
                for (i, w) in w.iter().enumerate() {
                    let channel = if self.axis == Axis::Last { i % n } else { i / row };
                    largest[channel] = largest[channel].max(w.abs());
                }
                Ok(largest)
            });
            let largest = largest.map_err(candle(&self.parameter))?;
            let of = |&hi: &f32| self.grid.params(Range { lo: -hi, hi }).scale;
            scales = largest.iter().map(of).collect();
        } else if self.learn {
            scales.iter_mut().zip(&self.least).for_each(|(s, least)| *s = s.max(*least));
        }
        if let Some((bias, input)) = bias {
            let least = lend(bias, |b| Ok(least_scales(b, input))).map_err(candle(&self.parameter))?;
            scales.iter_mut().zip(least).for_each(|(s, least)| *s = s.max(least));
        }
        if scales != before {
            let n = scales.len();
            let scales = Tensor::from_vec(scales, n, &Device::Cpu).map_err(candle(&self.parameter))?;
            self.scale.set(&scales).map_err(candle(&self.parameter))?;
        }
        Ok(())
    }

    pub(super) fn pass(&self, weight: &Tensor, mode: Mode) -> Result<Tensor> {
        if mode == Mode::Observe {
            return Ok(weight.clone());
        }
        let limits = self.grid.limits();
        let channels = self.scale.elem_count().max(1);
        let learn = (self.learn && mode == Mode::Train).then(|| factor(weight.elem_count() / channels, limits));
        let how = FakeQuantize { axis: self.axis, zero: 0, limits, learn };
        let scale = match learn {
            Some(_) => self.scale.as_tensor().clone(),
            None => self.scale.as_tensor().detach(),
        };
        fake_quantize(weight, &scale, how).map_err(candle(&self.parameter))
    }
}

/// A bias in 32-bit integers, whose scale is that of its layer's input times that of its weights.
pub struct BiasQuantizer {
    /// The parameter.
    pub parameter: String,
    /// The tensor that the layer reads.
    pub output: String,
    /// Initializers of the exported model: codes and scales.
    pub initializers: [String; 2],
    /// The layer's input and weight, by position.
    pub layer: [usize; 2],
}

impl BiasQuantizer {
    pub(super) fn pass(
        &self,
        bias: &Tensor,
        input: &ActivationQuantizer,
        weight: &WeightQuantizer,
        mode: Mode,
    ) -> Result<Tensor> {
        if mode == Mode::Observe {
            return Ok(bias.clone());
        }
        let step = f64::from(input.params()?.scale);
        // Half of the 32 bits: scales are kept large enough for it.
        let limits = (-(1 << 30), 1 << 30);
        let how = FakeQuantize { axis: Axis::First, zero: 0, limits, learn: None };
        let run = || {
            let scale = weight.scale.as_tensor().detach().affine(step, 0.0)?;
            let scale = scale.broadcast_as(bias.elem_count())?.contiguous()?;
            fake_quantize(bias, &scale, how)
        };
        run().map_err(candle(&self.parameter))
    }
}
