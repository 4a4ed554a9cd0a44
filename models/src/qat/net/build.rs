//! From a model to a network: which initializers are parameters, and what becomes of each node.

mod computed;
mod together;

use super::{Net, NormState, Step, Value, operators};
use crate::graph::inputs;
use crate::qat::ops::{Axis, BatchStatistics};
use crate::qat::quantizer::{ActivationQuantizer, BiasQuantizer, Mode, WeightQuantizer};
use crate::vision::prepare::Prepared;
use crate::{ModelError, Result};
use candle_core::{DType, Device, Tensor, Var};
use nibble_quant::Range;
use nibble_quant::observer::{IntGrid, IntType};
use nibble_quant::onnx::graph::label;
use nibble_quant::onnx::proto::*;
use nibble_quant::onnx::tensor::{floats, ints, scalar};
use nibble_quant::onnx::weights::{Layout, Rounding, Seen, quantize};
use nibble_quant::onnx::{Fine, Graph, Model, Selector, Settings};
use std::collections::{BTreeMap, HashMap, HashSet};

/// How a network is quantized.
#[derive(Debug, Clone)]
pub struct QatSettings {
    /// Bits of weights, 2 to 8.
    pub weight_bits: u32,
    /// Bits of activations, 2 to 8.
    pub activation_bits: u32,
    /// Scales are learned (LSQ).
    pub learn: bool,
    /// What weights' scales start from, if they are learned: a name in [`nibble_quant::algo::ALGORITHMS`].
    pub algorithm: &'static str,
    /// Convolutions are followed by batch norms in training, which are folded into them at the end.
    pub batch_norms: bool,
    /// Nodes that stay float.
    pub exclude: Vec<Selector>,
    /// If there are any, only these are quantized.
    pub include: Vec<Selector>,
    /// Layers that read activations in two terms.
    pub fine: Vec<Fine>,
}

impl QatSettings {
    /// The same for the planner.
    pub fn settings(&self) -> Settings {
        Settings {
            activation: IntGrid::asymmetric(IntType::U8).with_bits(self.activation_bits),
            weights: Rounding { per_channel: true, bits: self.weight_bits as u8, pairs: false, algorithm: "rtn" },
            include: self.include.clone(),
            exclude: self.exclude.clone(),
            fine: self.fine.clone(),
            ..Settings::default()
        }
    }
}

fn refuse(what: &str, why: impl ToString) -> ModelError {
    ModelError::Graph { what: what.into(), why: why.to_string() }
}

fn dims(tensor: &TensorProto) -> Vec<usize> {
    tensor.dims.iter().map(|&d| d.max(0) as usize).collect()
}

fn tensor(proto: &TensorProto) -> Result<Tensor> {
    Tensor::from_vec(floats(proto)?, dims(proto), &Device::Cpu).map_err(|e| refuse(proto.name(), e))
}

/// Whether a float initializer is learned: numbers of a mask or a formula aren't.
fn is_parameter(values: &[f32]) -> bool {
    values.len() > 1 && values.iter().all(|v| v.abs() < 1e4)
}

impl Net {
    /// The network of a float model with one input.
    ///
    /// # Errors
    /// An operator that can't be trained, by node; more inputs than one; or a graph that is none.
    pub fn float(model: &Model) -> Result<Net> {
        let mut net = build(model, None)?;
        net.find_together(model);
        Ok(net)
    }

    /// Whether a graph of one sample gives two of them what it gives each.
    fn find_together(&mut self, model: &Model) {
        let dims: Option<Vec<usize>> = inputs(model).first().and_then(|i| i.dims.iter().copied().collect());
        let Some(dims) = dims.filter(|_| self.single) else { return };
        let mut outputs = |samples: &[usize]| -> candle_core::Result<Vec<f32>> {
            let size: usize = dims.iter().product();
            // Any values that differ.
            let value = |sample: usize, i: usize| ((i % 257 * 79 + sample * 101) % 257) as f32 / 128.0 - 1.0;
            let values = samples.iter().flat_map(|&s| (0..size).map(move |i| value(s, i))).collect();
            let x = Tensor::from_vec(values, [&[samples.len()], &dims[1..]].concat(), &Device::Cpu)?;
            let y = self.forward(&x, Mode::Evaluate).map_err(candle_core::Error::wrap)?;
            y.flatten_all()?.to_vec1()
        };
        let alone = outputs(&[1]).and_then(|one| Ok([one, outputs(&[2])?].concat()));
        let (Ok(alone), Ok(both)) = (alone, outputs(&[1, 2])) else { return };
        let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v) * f64::from(v)).sum::<f64>();
        let apart = squares(&mut alone.iter().zip(&both).map(|(a, b)| a - b));
        self.together = alone.len() == both.len() && apart <= 1e-6 * squares(&mut alone.iter().copied());
    }

    /// The network of what `prepared` becomes in integers, with its float model's parameters: ranges are those of its
    /// calibration, biases are corrected if that was wanted. It was planned by [`QatSettings::settings`]; `float` is the
    /// network of its float model.
    ///
    /// # Errors
    /// As [`Net::float`], and what quantizing refuses.
    pub fn quantized(prepared: &Prepared, float: &Net, how: &QatSettings) -> Result<Net> {
        let Prepared { model, plan, .. } = prepared;
        let mut net = build(&prepared.quantize()?, Some((model, how)))?;
        net.together = float.together;
        if net.weights.is_empty() {
            return Err(refuse("graph", "nothing in it is quantized: no Conv, Gemm or MatMul with constant weights"));
        }
        for quantizer in &mut net.activations {
            quantizer.grid = plan.settings.activation;
            let root = plan.scales.get(&quantizer.name).unwrap_or(&quantizer.name);
            if let Some(clip) = plan.clips.get(root) {
                quantizer.clip = Range { lo: clip.lo, hi: clip.hi };
            }
            if let Some(&range) = plan.fixed.get(root) {
                quantizer.set_range(range)?;
                quantizer.fixed = true;
            }
            quantizer.learn = how.learn && !quantizer.fixed;
        }
        Ok(net)
    }
}

fn build(model: &Model, quantized: Option<(&Model, &QatSettings)>) -> Result<Net> {
    let graph = Graph::new(model.graph())?;
    let declared = inputs(model);
    let [input] = declared.as_slice() else {
        return Err(refuse("graph", format!("{} inputs; models with one can be trained", declared.len())));
    };
    let single = input.dims.first() == Some(&Some(1));
    let output = model.graph().output.first().map(|o| o.name().to_owned()).unwrap_or_default();
    let mut net = Net {
        model: model.clone(),
        steps: Vec::new(),
        finished: Vec::new(),
        constants: HashMap::new(),
        parameters: BTreeMap::new(),
        activations: Vec::new(),
        weights: Vec::new(),
        biases: Vec::new(),
        norms: Vec::new(),
        renorms: Vec::new(),
        normalizes: false,
        input: input.name.clone(),
        output,
        single,
        together: false,
    };
    let mut builder = Builder {
        graph,
        quantized,
        net: &mut net,
        by_scale: HashMap::new(),
        skipped: HashSet::new(),
        fused: HashMap::new(),
        computed: Vec::new(),
    };
    builder.written_out()?;
    builder.weights()?;
    builder.biases()?;
    builder.steps()?;
    builder.compute(model)?;
    builder.initializers()?;
    net.find_finished();
    Ok(net)
}

struct Builder<'a> {
    graph: Graph<'a>,
    quantized: Option<(&'a Model, &'a QatSettings)>,
    net: &'a mut Net,
    /// Quantizers of activations by the initializer of their scale.
    by_scale: HashMap<&'a str, usize>,
    /// Nodes that another step does.
    skipped: HashSet<usize>,
    /// Steps of several nodes, by the output of their last.
    fused: HashMap<String, Step>,
    /// Tensors that the embedded engine computes once.
    computed: Vec<String>,
}

impl<'a> Builder<'a> {
    /// The float initializer that a DequantizeLinear stands for, by the name that the writer gave the node.
    fn original(&self, node: &NodeProto) -> Option<&'a TensorProto> {
        let base = node.name().strip_suffix("_DequantizeLinear")?;
        self.quantized?.0.graph().initializer.iter().find(|t| t.name() == base)
    }

    /// Codes of a DequantizeLinear over an initializer, if they are of this type.
    fn codes(&self, node: &NodeProto, ty: DataType) -> Option<&'a TensorProto> {
        let codes = node.is("DequantizeLinear").then(|| self.graph.constant(node.arg(0))).flatten()?;
        (codes.data_type() == ty).then_some(codes)
    }

    fn weights(&mut self) -> Result<()> {
        let nodes: Vec<(usize, &'a NodeProto)> = self.graph.nodes().collect();
        for (id, node) in nodes {
            let Some(codes) = self.codes(node, DataType::Int8) else { continue };
            let scales = self.graph.constant(node.arg(1)).map(floats).transpose()?.unwrap_or_default();
            let rank = codes.dims.len();
            let axis = match node.int("axis", 1) {
                _ if scales.len() == 1 => Axis::Tensor,
                0 => Axis::First,
                a if a + 1 == rank as i64 && rank == 2 => Axis::Last,
                a => return Err(refuse(&label(node), format!("scales along axis {a} of {rank}"))),
            };
            let parameter = match self.original(node) {
                Some(float) => float.clone(),
                None => self.dequantized(node, codes)?,
            };
            let bits = self.quantized.map_or(8, |(_, how)| how.weight_bits);
            let learn = self.quantized.is_some_and(|(_, how)| how.learn);
            let mut quantizer = WeightQuantizer {
                parameter: parameter.name().to_owned(),
                output: node.out().to_owned(),
                initializers: [codes.name().to_owned(), node.arg(1).to_owned()],
                axis,
                grid: IntGrid::symmetric(IntType::S8).with_bits(bits),
                scale: Var::zeros(1, DType::F32, &Device::Cpu).map_err(|e| refuse(parameter.name(), e))?,
                learn,
                follows: self.quantized.is_some() && !learn,
                bias: None,
                least: Vec::new(),
            };
            let scales = match (learn, axis) {
                (true, Axis::First | Axis::Last) => {
                    let layout = if axis == Axis::First { Layout::Rows } else { Layout::Columns };
                    let algorithm = self.quantized.map_or("rtn", |(_, how)| how.algorithm);
                    let how = Rounding { per_channel: true, bits: bits as u8, pairs: false, algorithm };
                    quantize(&parameter, layout, how, Seen::default(), &[], None)?.scales
                }
                _ => scales,
            };
            quantizer.set_scales(scales)?;
            let variable = self.variable(&parameter)?;
            self.net.parameters.entry(parameter.name().to_owned()).or_insert(variable);
            self.net.weights.push(quantizer);
            self.skipped.insert(id);
        }
        Ok(())
    }

    fn variable(&self, proto: &TensorProto) -> Result<Var> {
        Var::from_tensor(&tensor(proto)?).map_err(|e| refuse(proto.name(), e))
    }

    /// What codes mean, as a float tensor of the name that the codes were made from.
    fn dequantized(&self, node: &NodeProto, codes: &TensorProto) -> Result<TensorProto> {
        let scales = self.graph.constant(node.arg(1)).map(floats).transpose()?.unwrap_or_default();
        let zero = match self.graph.constant(node.arg(2)) {
            Some(zero) => ints(zero)?.first().copied().unwrap_or(0),
            None => 0,
        };
        let shape = dims(codes);
        let values = ints(codes)?;
        let axis = usize::try_from(node.int("axis", 1)).unwrap_or(0);
        let inner: usize = shape.get(axis + 1..).unwrap_or_default().iter().product();
        let scale = |i: usize| match scales.as_slice() {
            [one] => Some(*one),
            many => many.get((i / inner.max(1)) % many.len().max(1)).copied(),
        };
        let value = |(i, &q): (usize, &i64)| scale(i).map(|s| (q - zero) as f32 * s);
        let values: Option<Vec<f32>> = values.iter().enumerate().map(value).collect();
        let values = values.ok_or_else(|| refuse(&label(node), "has no scales"))?;
        Ok(nibble_quant::onnx::tensor::from_f32(node.out(), &shape, &values))
    }

    fn biases(&mut self) -> Result<()> {
        let nodes: Vec<(usize, &'a NodeProto)> = self.graph.nodes().collect();
        for (id, node) in nodes {
            let Some(codes) = self.codes(node, DataType::Int32) else { continue };
            let Some(layer) = self.graph.sole_consumer(node.out()).map(|id| self.graph.node(id)) else {
                return Err(refuse(&label(node), "an integer bias that isn't read by one layer"));
            };
            let input = self.graph.producer(layer.arg(0)).map(|id| self.graph.node(id));
            let input = input.filter(|n| n.is("DequantizeLinear")).map(|n| n.arg(1));
            let weight = self.net.weights.iter().position(|w| w.output == layer.arg(1));
            let (Some(scale), Some(weight)) = (input, weight) else {
                return Err(refuse(&label(layer), "has an integer bias, but no quantized input and weight"));
            };
            let input = self.quantizer(scale)?;
            // What its codes say is corrected; what it was called stays.
            let mut parameter = self.dequantized(node, codes)?;
            if let Some(float) = self.original(node) {
                parameter.name = Some(float.name().to_owned());
            }
            let name = parameter.name().to_owned();
            let variable = self.variable(&parameter)?;
            self.net.parameters.entry(name.clone()).or_insert(variable);
            self.net.weights[weight].bias = Some((name.clone(), input));
            self.net.biases.push(BiasQuantizer {
                parameter: name,
                output: node.out().to_owned(),
                initializers: [codes.name().to_owned(), node.arg(1).to_owned()],
                layer: [input, weight],
            });
            self.skipped.insert(id);
        }
        Ok(())
    }

    /// The quantizer whose scale lies in an initializer.
    fn quantizer(&mut self, scale: &'a str) -> Result<usize> {
        if let Some(&at) = self.by_scale.get(scale) {
            return Ok(at);
        }
        let first = self.graph.consumers(scale).iter().map(|&(id, _)| self.graph.node(id));
        let Some(node) = first.into_iter().find(|n| n.is("QuantizeLinear")) else {
            return Err(refuse(scale, "a scale that no QuantizeLinear has"));
        };
        let name = node.name().strip_suffix("_QuantizeLinear").unwrap_or(node.arg(0)).to_owned();
        let zero = self.graph.constant(node.arg(2)).map(ints).transpose()?;
        let value = self.graph.constant(scale).map(scalar).transpose()?;
        let (Some(zero), Some(value)) = (zero.and_then(|z| z.first().copied()), value) else {
            return Err(refuse(&label(node), "scale and zero point aren't constant numbers"));
        };
        let grid = IntGrid::asymmetric(IntType::U8).with_bits(self.bits(node)?);
        let initializers = [scale.to_owned(), node.arg(2).to_owned()];
        let mut quantizer = ActivationQuantizer::new(&name, initializers, grid)?;
        let (low, high) = grid.limits();
        let end = |code: i32| (code - zero as i32) as f32 * value;
        quantizer.set_range(Range { lo: end(low), hi: end(high) })?;
        self.net.activations.push(quantizer);
        let at = self.net.activations.len() - 1;
        self.by_scale.insert(scale, at);
        Ok(at)
    }

    /// Bits of the codes that a QuantizeLinear makes: those that a Clip after it leaves.
    fn bits(&self, node: &NodeProto) -> Result<u32> {
        let clip = self.graph.sole_consumer(node.out()).map(|id| self.graph.node(id)).filter(|n| n.is("Clip"));
        let highest = clip.and_then(|n| self.graph.constant(n.arg(2))).map(ints).transpose()?;
        Ok(highest.and_then(|h| h.first().copied()).map_or(8, |h| (h + 1).max(4).ilog2()))
    }

    fn steps(&mut self) -> Result<()> {
        let nodes: Vec<(usize, &'a NodeProto)> = self.graph.nodes().collect();
        for (id, node) in nodes {
            if self.skipped.contains(&id) {
                continue;
            }
            if let Some(step) = self.fused.remove(node.out()) {
                self.net.steps.push(step);
                continue;
            }
            if node.is("MatMul")
                && let Some((add, bias)) = self.biased(node)
            {
                let (bias, output) = (bias.to_owned(), self.graph.node(add).out().to_owned());
                self.skipped.insert(add);
                self.net.steps.push(Step::Linear { id, bias, output });
                continue;
            }
            if let Some(renorm) = self.renorm(node)? {
                self.net.steps.push(Step::Conv { id, renorm });
                continue;
            }
            match node.op_type() {
                "QuantizeLinear" => self.pair(node)?,
                "DequantizeLinear" => match self.graph.constant(node.arg(0)) {
                    // A constant between integers stays what its codes say.
                    Some(codes) => {
                        let value = tensor(&self.dequantized(node, codes)?)?;
                        self.net.constants.insert(node.out().to_owned(), value.into());
                    }
                    None => return Err(refuse(&label(node), "dequantizes what no QuantizeLinear made")),
                },
                "BatchNormalization" if node.is("BatchNormalization") => self.batch_norm(id, node)?,
                _ => match operators::find(node) {
                    Some(operator) => self.net.steps.push(Step::Node { id, operator }),
                    None if self.computes_constants(node) => {}
                    None => {
                        let known: Vec<&str> = operators::OPERATORS.iter().map(|o| o.name).collect();
                        let why = format!("operator {} can't be trained; known: {}", node.op_type(), known.join(", "));
                        return Err(refuse(&label(node), why));
                    }
                },
            }
        }
        Ok(())
    }

    /// QuantizeLinear, perhaps a Clip of codes, DequantizeLinear.
    fn pair(&mut self, node: &'a NodeProto) -> Result<()> {
        let quantizer = self.quantizer(node.arg(1))?;
        let mut codes = node.out();
        for _ in 0..2 {
            let [(reader, _)] = self.graph.consumers(codes) else { break };
            let reader_node = self.graph.node(*reader);
            self.skipped.insert(*reader);
            if reader_node.is("DequantizeLinear") {
                let (input, output) = (node.arg(0).to_owned(), reader_node.out().to_owned());
                self.net.steps.push(Step::Quantize { quantizer, input, output });
                return Ok(());
            }
            codes = reader_node.out();
        }
        Err(refuse(&label(node), "isn't followed by one DequantizeLinear"))
    }

    fn batch_norm(&mut self, id: usize, node: &NodeProto) -> Result<()> {
        let names = [node.arg(3), node.arg(4)];
        let read = |name: &str| match self.graph.constant(name) {
            Some(proto) => Ok(floats(proto)?),
            None => Err(refuse(&label(node), format!("its statistics `{name}` aren't constant"))),
        };
        let running = BatchStatistics { means: read(names[0])?, variances: read(names[1])?, count: 0 };
        self.net.norms.push(NormState { initializers: names.map(str::to_owned), running });
        self.net.steps.push(Step::BatchNorm { id, state: self.net.norms.len() - 1 });
        Ok(())
    }

    /// What is read by a step and isn't quantized: parameters and constants.
    fn initializers(&mut self) -> Result<()> {
        let mut read: HashSet<&str> = HashSet::new();
        for step in &self.net.steps {
            if let Step::Node { id, .. }
            | Step::BatchNorm { id, .. }
            | Step::Conv { id, .. }
            | Step::Linear { id, .. } = step
            {
                read.extend(self.graph.node(*id).input.iter().map(String::as_str));
            }
            match step {
                Step::Linear { bias, .. } => drop(read.insert(bias)),
                Step::LayerNorm { affine, .. } => read.extend(affine.iter().map(String::as_str)),
                _ => {}
            }
        }
        let taken: HashSet<&String> = self.net.norms.iter().flat_map(|n| &n.initializers).collect();
        for proto in &self.graph.proto.initializer {
            let name = proto.name();
            if !read.contains(name) || taken.contains(&name.to_owned()) {
                continue;
            }
            if proto.data_type() == DataType::Float && is_parameter(&floats(proto)?) {
                let variable = self.variable(proto)?;
                self.net.parameters.insert(name.to_owned(), variable);
            } else if proto.data_type().is_float() {
                self.net.constants.insert(name.to_owned(), tensor(proto)?.into());
            } else {
                let value = Value::Ints { dims: dims(proto), values: ints(proto)? };
                self.net.constants.insert(name.to_owned(), value);
            }
        }
        Ok(())
    }
}

impl Net {
    /// What each step reads.
    fn reads(&self, step: &Step) -> Vec<String> {
        match step {
            Step::Node { id, .. } | Step::BatchNorm { id, .. } | Step::Conv { id, .. } => {
                self.model.graph().node[*id].input.clone()
            }
            Step::Linear { id, bias, .. } => {
                let mut read = self.model.graph().node[*id].input.clone();
                read.push(bias.clone());
                read
            }
            Step::LayerNorm { input, affine: [gain, offset], .. } => vec![input.clone(), gain.clone(), offset.clone()],
            Step::Gelu { input, .. } | Step::Quantize { input, .. } => vec![input.clone()],
        }
    }

    fn find_finished(&mut self) {
        let mut last: HashMap<String, usize> = HashMap::new();
        for (at, step) in self.steps.iter().enumerate() {
            last.extend(self.reads(step).into_iter().map(|name| (name, at)));
        }
        last.remove(&self.output);
        self.finished = vec![Vec::new(); self.steps.len()];
        for (name, at) in last {
            self.finished[at].push(name);
        }
    }
}
