//! An ONNX graph as a network in training: its float initializers are parameters, its nodes are candle's operators.
//!
//! ```text
//! float graph                 Conv, Relu, ...                      parameters as they are; batch norms in training
//! quantized graph (qdq)       QuantizeLinear -> DequantizeLinear   fake quantization of activations
//!                             DequantizeLinear of int8, int32      fake quantization of a float weight, bias
//! ```
//! The quantized graph is the one that [`nibble_quant::onnx::qdq`] writes: what is trained has exactly the structure of
//! what is exported, and export only fills in codes and scales.

mod build;
mod export;
mod operators;
mod renorm;
mod value;

pub use build::QatSettings;
pub use operators::{OPERATORS, Operator};
pub use value::{Call, Value};

use super::ops::{self, BatchStatistics};
use super::quantizer::{ActivationQuantizer, BiasQuantizer, Mode, WeightQuantizer};
use crate::{ModelError, Result};
use candle_core::{Tensor, Var};
use nibble_quant::onnx::Model;
use nibble_quant::onnx::proto::NodeProto;
use renorm::Renorm;
use std::collections::{BTreeMap, HashMap};

/// Share of a batch's statistics in the running ones of a batch norm.
const MOMENTUM: f32 = 0.1;

/// One thing to compute.
enum Step {
    /// A node, by position in the model's graph.
    Node { id: usize, operator: &'static Operator },
    /// A Conv, by position, with a batch norm in training.
    Conv { id: usize, renorm: usize },
    /// A MatMul, by position, whose product nothing but the addition of a bias reads.
    Linear { id: usize, bias: String, output: String },
    /// GELU written out: its input, its output.
    Gelu { input: String, output: String },
    /// A layer norm written out: its input, gain and offset, its output.
    LayerNorm { input: String, affine: [String; 2], epsilon: f32, output: String },
    /// A pair of QuantizeLinear and DequantizeLinear.
    Quantize { quantizer: usize, input: String, output: String },
    /// A batch norm with running statistics.
    BatchNorm { id: usize, state: usize },
}

/// Running statistics of a batch norm, and the initializers that hold them.
pub struct NormState {
    /// Means and variances, by name of the initializer.
    pub initializers: [String; 2],
    /// What they are now.
    pub running: BatchStatistics,
}

/// A network.
pub struct Net {
    model: Model,
    steps: Vec<Step>,
    /// For each step, tensors that nothing reads after it.
    finished: Vec<Vec<String>>,
    constants: HashMap<String, Value>,
    parameters: BTreeMap<String, Var>,
    activations: Vec<ActivationQuantizer>,
    weights: Vec<WeightQuantizer>,
    biases: Vec<BiasQuantizer>,
    norms: Vec<NormState>,
    renorms: Vec<Renorm>,
    /// Whether [`Renorm`]s go by the statistics of the batch.
    normalizes: bool,
    input: String,
    output: String,
    /// The graph takes one sample.
    single: bool,
    /// Several can be run together all the same.
    together: bool,
}

impl Net {
    /// Float parameters, by initializer.
    pub fn parameters(&self) -> &BTreeMap<String, Var> {
        &self.parameters
    }

    /// Everything that is learned: parameters, and scales where they are.
    pub fn learned(&self) -> impl Iterator<Item = &Var> {
        let weights = self.weights.iter().filter(|w| w.learn).map(|w| &w.scale);
        let activations = self.activations.iter().filter(|a| a.learn).map(|a| &a.scale);
        self.parameters.values().chain(weights).chain(activations)
    }

    /// For each weight in channels its position, and the bias that is added to them: (weight, bias).
    pub fn layers(&self) -> impl Iterator<Item = (usize, Option<&str>)> {
        let added = |weight: &WeightQuantizer| {
            self.steps.iter().find_map(|step| match step {
                Step::Linear { id, bias, .. } if self.model.graph().node[*id].arg(1) == weight.output => {
                    Some(bias.as_str())
                }
                _ => None,
            })
        };
        self.weights.iter().enumerate().map(move |(at, weight)| {
            let own = self.biases.iter().find(|bias| bias.layer[1] == at).map(|bias| bias.parameter.as_str());
            (at, own.or_else(|| added(weight)))
        })
    }

    /// Quantizers of activations.
    pub fn activations(&self) -> &[ActivationQuantizer] {
        &self.activations
    }

    /// Quantizers of weights.
    pub fn weights(&self) -> &[WeightQuantizer] {
        &self.weights
    }

    /// Running statistics of batch norms.
    pub fn norms(&self) -> &[NormState] {
        &self.norms
    }

    /// Samples that may run together, of `wanted`: all, or one where the graph's batch size is fixed and its operators
    /// go by it.
    pub fn together(&self, wanted: usize) -> usize {
        if self.single && !self.together { 1 } else { wanted.max(1) }
    }

    /// The name of the input.
    pub fn input(&self) -> &str {
        &self.input
    }

    pub(super) fn state_mut(&mut self) -> (&mut [ActivationQuantizer], &mut [WeightQuantizer], &mut [NormState]) {
        (&mut self.activations, &mut self.weights, &mut self.norms)
    }

    /// Whether anything is quantized.
    pub fn is_quantized(&self) -> bool {
        !(self.activations.is_empty() && self.weights.is_empty())
    }

    /// Lets ranges of activations follow what they see in training, or freezes them.
    pub fn follow(&mut self, follows: bool) {
        self.activations.iter_mut().for_each(|a| a.follows = follows && !a.learn);
    }

    /// Lets batch norms in training go by the statistics of their batches, or freezes them.
    pub fn normalize(&mut self, normalizes: bool) {
        self.normalizes = normalizes;
    }

    /// Batch norms to be go by what was seen in [`Mode::Observe`].
    ///
    /// # Errors
    /// What candle refuses.
    pub fn conclude(&mut self) -> Result<()> {
        for renorm in &mut self.renorms {
            let at = |e: candle_core::Error| ModelError::Graph { what: "batch norms".into(), why: e.to_string() };
            renorm.conclude(&mut self.norms[renorm.norm]).map_err(at)?;
        }
        Ok(())
    }

    /// Keeps learned scales above nothing: after each step of an optimizer.
    ///
    /// # Errors
    /// What candle refuses.
    pub fn restrain(&mut self) -> Result<()> {
        self.activations.iter_mut().try_for_each(ActivationQuantizer::restrain)
    }

    /// The first output for a batch.
    ///
    /// # Errors
    /// An operator that refuses its inputs, by node.
    pub fn forward(&mut self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let mut values = self.run(x, mode)?;
        match values.remove(&self.output) {
            Some(Value::Float(y)) => Ok(y),
            _ => Err(ModelError::Graph { what: self.output.clone(), why: "isn't a tensor of floats".into() }),
        }
    }

    fn run(&mut self, x: &Tensor, mode: Mode) -> Result<HashMap<String, Value>> {
        let mut values: HashMap<String, Value> = HashMap::with_capacity(2 * self.steps.len());
        values.insert(self.input.clone(), x.clone().into());
        for (name, var) in &self.parameters {
            values.insert(name.clone(), var.as_tensor().clone().into());
        }
        self.quantize_parameters(&mut values, mode)?;
        let samples = if self.single { x.dim(0).unwrap_or(1) } else { 1 };
        for at in 0..self.steps.len() {
            let (name, value) = self.step(at, &values, (mode, samples))?;
            values.insert(name, value);
            for name in &self.finished[at] {
                values.remove(name);
            }
        }
        Ok(values)
    }

    fn quantize_parameters(&mut self, values: &mut HashMap<String, Value>, mode: Mode) -> Result<()> {
        let missing = |name: &str| ModelError::Graph { what: name.into(), why: "isn't a parameter".into() };
        let parameters = &self.parameters;
        let of = |name: &str| parameters.get(name).map(Var::as_tensor).ok_or_else(|| missing(name));
        let folded = self.folded()?;
        let norm_of = |weight: usize| self.renorms.iter().position(|renorm| renorm.weight == weight);
        for (at, weight) in self.weights.iter_mut().enumerate() {
            let mut float = of(&weight.parameter)?;
            let mut bias = match &weight.bias {
                Some((bias, input)) => Some((of(bias)?, self.activations[*input].params()?.scale)),
                None => None,
            };
            if let Some(norm) = norm_of(at) {
                let [of_weight, of_bias] = &folded[norm];
                float = of_weight;
                bias = bias.map(|(_, scale)| (of_bias, scale));
            }
            weight.settle(float, bias)?;
            values.insert(weight.output.clone(), weight.pass(float, mode)?.into());
        }
        for (at, bias) in self.biases.iter().enumerate() {
            let [input, weight] = bias.layer;
            let float = match self.renorms.iter().position(|renorm| renorm.bias == at) {
                Some(norm) => &folded[norm][1],
                None => of(&bias.parameter)?,
            };
            let quantized = bias.pass(float, &self.activations[input], &self.weights[weight], mode)?;
            values.insert(bias.output.clone(), quantized.into());
        }
        Ok(())
    }

    /// Weights and biases with the norms that follow them folded in, one pair a norm.
    fn folded(&self) -> Result<Vec<[Tensor; 2]>> {
        let fold = |renorm: &Renorm| {
            let name = &self.weights[renorm.weight].parameter;
            let missing = || ModelError::Graph { what: name.clone(), why: "isn't a parameter".into() };
            let weight = self.parameters.get(name).ok_or_else(missing)?;
            let folded = renorm.fold(weight.as_tensor(), &self.norms[renorm.norm].running);
            folded.map_err(|e| ModelError::Graph { what: name.clone(), why: e.to_string() })
        };
        self.renorms.iter().map(fold).collect()
    }

    fn step(
        &mut self,
        at: usize,
        values: &HashMap<String, Value>,
        (mode, samples): (Mode, usize),
    ) -> Result<(String, Value)> {
        let constants = &self.constants;
        let value = |name: &str| values.get(name).or_else(|| constants.get(name));
        let float = |name: &str| match value(name) {
            Some(Value::Float(x)) => Ok(x),
            _ => Err(ModelError::Graph { what: name.into(), why: "isn't a tensor of floats".into() }),
        };
        let call = |id: usize| {
            let node: &NodeProto = &self.model.graph().node[id];
            Call { node, inputs: node.input.iter().map(|name| value(name)).collect(), samples }
        };
        match &self.steps[at] {
            Step::Node { id, operator } => {
                let call = call(*id);
                Ok((call.node.out().to_owned(), (operator.run)(&call)?))
            }
            Step::Conv { id, renorm } => {
                let call = call(*id);
                let normalizes = self.normalizes && mode == Mode::Train;
                let y = operators::convolve(&call, if normalizes { None } else { call.optional(2)? })?;
                let renorm = &mut self.renorms[*renorm];
                let y = match mode {
                    _ if normalizes => call.of(renorm.normalize(&y, &mut self.norms[renorm.norm]))?,
                    Mode::Observe => {
                        call.of(renorm.observe(&y))?;
                        y
                    }
                    _ => y,
                };
                Ok((call.node.out().to_owned(), y.into()))
            }
            Step::Linear { id, bias, output } => {
                let call = call(*id);
                let bias = float(bias)?;
                let mut y = call.of(ops::linear(call.tensor(0)?, call.tensor(1)?, Some(bias)))?;
                while y.rank() < bias.rank() {
                    y = call.of(y.unsqueeze(0))?;
                }
                Ok((output.clone(), y.into()))
            }
            Step::Gelu { input, output } => {
                let y = ops::gelu(float(input)?);
                let y = y.map_err(|e| ModelError::Graph { what: output.clone(), why: e.to_string() })?;
                Ok((output.clone(), y.into()))
            }
            Step::LayerNorm { input, affine: [gain, offset], epsilon, output } => {
                let y = ops::layer_norm(float(input)?, float(gain)?, float(offset)?, *epsilon);
                let y = y.map_err(|e| ModelError::Graph { what: output.clone(), why: e.to_string() })?;
                Ok((output.clone(), y.into()))
            }
            Step::Quantize { quantizer, input, output } => {
                let x = float(input)?;
                Ok((output.clone(), self.activations[*quantizer].pass(x, mode)?.into()))
            }
            Step::BatchNorm { id, state } => {
                let call = call(*id);
                let (x, gain, offset) = (call.tensor(0)?, call.tensor(1)?, call.tensor(2)?);
                let epsilon = call.node.float("epsilon", 1e-5);
                let state = &mut self.norms[*state];
                let given = (mode != Mode::Train).then(|| state.running.clone());
                let (y, seen) = call.of(ops::batch_norm(x, gain, offset, given, epsilon))?;
                if mode == Mode::Train {
                    let moved = |old: &mut f32, new: f32| *old += MOMENTUM * (new - *old);
                    // What is kept is the unbiased variance, as PyTorch has it.
                    let unbiased = seen.count as f32 / seen.count.saturating_sub(1).max(1) as f32;
                    state.running.means.iter_mut().zip(&seen.means).for_each(|(old, &new)| moved(old, new));
                    let variances = state.running.variances.iter_mut().zip(&seen.variances);
                    variances.for_each(|(old, &new)| moved(old, new * unbiased));
                }
                Ok((call.node.out().to_owned(), y.into()))
            }
        }
    }
}
