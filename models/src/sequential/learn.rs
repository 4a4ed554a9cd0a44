//! Rounding of a block's layers learned together, such that the block gives what it gives in floats.

use super::{Candle, FloatBlock, SequentialPlan, Streams};
use crate::block::weight_name;
use crate::error::Result;
use candle_core::{Device, Tensor, Var};
use nibble_quant::QTensor;
use nibble_quant::algo::Rounding;
use rand::SeedableRng;
use rand::seq::SliceRandom;

/// How long and how strongly is learned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Learning {
    /// Steps a block.
    pub steps: usize,
    /// Sequences of calibration text that a step takes.
    pub sequences: usize,
    /// How far an offset may come in all steps together; the rate falls to 0 evenly.
    pub reach: f32,
    /// The same of a group's factor on its scale.
    pub clip: f32,
}

impl Default for Learning {
    fn default() -> Self {
        Self { steps: 100, sequences: 2, reach: 0.5, clip: 0.05 }
    }
}

/// Of the sequences, one in this many only judges.
const HELD_OUT: usize = 8;

/// What learning did to a block: mean squared error of its output, over text that it didn't learn from, as a share of what
/// the block adds to its input.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Learned {
    /// By the algorithm that it began with.
    pub before: f64,
    /// By what was learned, which is dropped if this is no less.
    pub after: f64,
}

/// A layer as it stands.
enum Layer {
    /// Not quantized, or its algorithm doesn't learn.
    Fixed(Tensor, Option<QTensor>),
    Learning {
        weight: Vec<f32>,
        start: QTensor,
        now: Box<Rounding>,
    },
}

/// A block whose layers are quantized one after the other and then learned together.
pub(super) struct Learner<'a> {
    block: &'a FloatBlock<'a>,
    streams: &'a Streams,
    target: &'a [f32],
    plan: &'a SequentialPlan<'a>,
    /// In the order of [`crate::block::PARTS`].
    layers: Vec<Layer>,
}

impl<'a> Learner<'a> {
    pub(super) fn new(
        block: &'a FloatBlock<'a>,
        streams: &'a Streams,
        target: &'a [f32],
        plan: &'a SequentialPlan<'a>,
    ) -> Self {
        let layers = block.weights.iter().map(|weight| Layer::Fixed(weight.clone(), None)).collect();
        Learner { block, streams, target, plan, layers }
    }

    /// A layer that was quantized.
    pub(super) fn add(&mut self, part: usize, weight: Vec<f32>, tensor: QTensor, learns: bool) -> Result<()> {
        let now = if learns { Rounding::new(&weight, tensor.clone()) } else { None };
        self.layers[part] = match now {
            Some(now) => Layer::Learning { weight, start: tensor, now: Box::new(now) },
            None => Layer::Fixed(
                Tensor::from_vec(tensor.dequantize(), tensor.shape.as_slice(), &Device::Cpu)?,
                Some(tensor),
            ),
        };
        Ok(())
    }

    /// Learns; layers are as they were if that doesn't lower the error of text that it didn't learn from.
    pub(super) fn learn(&mut self) -> Result<Learned> {
        let count = self.target.len() / self.sequence().max(1);
        // All of a very short text both teaches and judges.
        let held = if count < 2 { 0 } else { (count / HELD_OUT).max(1) };
        let judges: Vec<usize> = (count - held.max(usize::from(held == 0) * count)..count).collect();
        let mut order: Vec<usize> = (0..count - held).collect();
        let mut rng = rand::rngs::StdRng::seed_from_u64(self.plan.seed ^ self.block.layer as u64);
        let Learning { steps, sequences, reach, clip } = self.plan.learning;
        let before = self.error(&judges)?;
        let mut next = order.len();
        for step in 0..steps {
            let mut batch = Vec::with_capacity(sequences);
            while batch.len() < sequences.clamp(1, order.len()) {
                if next == order.len() {
                    order.shuffle(&mut rng);
                    next = 0;
                }
                batch.push(order[next]);
                next += 1;
            }
            // Rates that fall evenly to 0 and sum up to what may be come.
            let rate = 2.0 * (steps - step) as f32 / (steps * (steps + 1)) as f32;
            self.step(&batch, rate * reach, rate * clip)?;
        }
        let after = self.error(&judges)?;
        if after.is_nan() || after >= before {
            for layer in &mut self.layers {
                if let Layer::Learning { weight, start, now } = layer
                    && let Some(begun) = Rounding::new(weight, start.clone())
                {
                    **now = begun;
                }
            }
        }
        Ok(Learned { before, after })
    }

    /// The tensors as they are now.
    pub(super) fn finish(self) -> Vec<(String, QTensor)> {
        let tensor = |(part, layer): (usize, Layer)| {
            let tensor = match layer {
                Layer::Fixed(_, tensor) => tensor?,
                Layer::Learning { now, .. } => now.finish(),
            };
            Some((weight_name(self.block.layer, part), tensor))
        };
        self.layers.into_iter().enumerate().filter_map(tensor).collect()
    }

    /// Values of a sequence.
    fn sequence(&self) -> usize {
        self.streams.n_ctx * self.block.config.hidden
    }

    /// Some sequences of a stream, (tokens, hidden).
    fn gather(&self, stream: &[f32], sequences: &[usize]) -> Candle<Tensor> {
        let each = self.sequence();
        let values: Vec<f32> = sequences.iter().flat_map(|s| &stream[s * each..(s + 1) * each]).copied().collect();
        Tensor::from_vec(values, (sequences.len() * self.streams.n_ctx, self.block.config.hidden), &Device::Cpu)
    }

    /// Weights as they stand; those that learn as variables.
    fn weights(&self) -> Candle<Vec<(Tensor, Option<Var>)>> {
        let weight = |layer: &Layer| match layer {
            Layer::Fixed(weight, _) => Ok((weight.clone(), None)),
            Layer::Learning { now, .. } => {
                let var = Var::from_vec(now.values(), now.shape().as_slice(), &Device::Cpu)?;
                Ok((var.as_tensor().clone(), Some(var)))
            }
        };
        self.layers.iter().map(weight).collect()
    }

    fn step(&mut self, sequences: &[usize], rate: f32, clip: f32) -> Result<()> {
        let weights = self.weights()?;
        let (x, y) = (self.gather(&self.streams.quantized, sequences)?, self.gather(self.target, sequences)?);
        let block = self.block;
        let out = block
            .block
            .forward(block.config, &self.streams.positions, &x, &mut |part, h| h.matmul(&weights[part].0.t()?))?;
        let gradients = (out - y)?.sqr()?.sum_all()?.backward()?;
        for (part, layer) in self.layers.iter_mut().enumerate() {
            if let (Layer::Learning { weight, now, .. }, Some(var)) = (layer, &weights[part].1)
                && let Some(gradient) = gradients.get(var)
            {
                now.step(weight, &gradient.flatten_all()?.to_vec1::<f32>()?, rate, clip);
            }
        }
        Ok(())
    }

    /// Squared error of the block's output over what it adds, squared.
    fn error(&self, sequences: &[usize]) -> Result<f64> {
        let weights = self.weights()?;
        let (mut error, mut power) = (0.0, 0.0);
        for sequence in sequences {
            let one = std::slice::from_ref(sequence);
            let (x, y) = (self.gather(&self.streams.quantized, one)?, self.gather(self.target, one)?);
            let block = self.block;
            let out = block.block.forward(block.config, &self.streams.positions, &x, &mut |part, h| {
                h.matmul(&weights[part].0.detach().t()?)
            })?;
            let square = |t: Tensor| -> Candle<f64> { Ok(t.sqr()?.sum_all()?.to_scalar::<f32>()? as f64) };
            error += square((out - &y)?)?;
            power += square((y - x)?)?;
        }
        Ok(if power > 0.0 { error / power } else { error })
    }
}
