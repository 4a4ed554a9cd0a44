//! A plan and ranges become edits: QuantizeLinear and DequantizeLinear where runtimes fuse them, integer weights.
//!
//! ```text
//! x -> x_QuantizeLinear -> x_DequantizeLinear -> Conv -> y -> y_QuantizeLinear -> y_DequantizeLinear -> ...
//!               w_quantized -> w_DequantizeLinear ->|
//!               b_quantized -> b_DequantizeLinear ->|
//!
//! x -> .. -> DequantizeLinear -> MatMul -> Add        rank > 2: the bias gets as many dimensions as the product, or ONNX
//!        w -> DequantizeLinear ->|          |         Runtime joins MatMul and Add to a float Gemm
//!                        b (1, 1, n) float ->
//! ```

mod activations;
mod dynamic;
mod kept_float;
mod layers;
mod stored;
mod weight_only;

use super::edit::Edit;
use super::equalize;
use super::graph::fresh;
use super::opset;
use super::plan::{Mode, Packing, Plan, Stored, Target};
use super::proto::*;
use super::tensor::{from_16, from_f32, from_i8, from_i32, from_u8};
use super::weights::{Weight, reads_channels};
use super::{Graph, Model};
use crate::error::Result;
use crate::observer::{IntGrid, IntType, QParams};
use crate::stats::Input;
use crate::{QuantError, Range};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// The domain of ONNX Runtime's own operators.
pub const MICROSOFT: &str = "com.microsoft";

/// What calibration saw.
#[derive(Debug, Clone, Default)]
pub struct Calibration {
    /// The range of each observed tensor, as its observer reads it.
    pub ranges: BTreeMap<String, Range>,
    /// Dimensions of tensors, by their number.
    pub ranks: BTreeMap<String, usize>,
    /// Second moments of layers' inputs, by tensor: what an error of each weight costs.
    pub moments: BTreeMap<String, Vec<f32>>,
    /// Means of the channels of layers' inputs, by tensor: with them the mean error of rounded weights is known, and goes
    /// into biases (arXiv 1906.04721, section 4.2).
    pub means: BTreeMap<String, Vec<f64>>,
    /// Products of the channels of layers' inputs with each other, by tensor, for algorithms that make use of them.
    pub inputs: BTreeMap<String, Arc<Input>>,
    /// The same of windows of convolutions, one a group or one an output channel, by weight.
    pub windows: BTreeMap<String, Arc<Vec<Input>>>,
    /// (n, k) means of what each value of a weight multiplies, by weight, where they aren't the same for all output
    /// channels.
    pub row_means: BTreeMap<String, Vec<f64>>,
    /// Weights that are in integers already, by tensor: rounding that was learned.
    pub weights: BTreeMap<String, Weight>,
}

impl Calibration {
    /// What was seen of the rows that a layer's weight multiplies, one a group of channels; nothing where products with
    /// each other weren't kept.
    pub fn inputs_of(&self, graph: &Graph, node: &NodeProto) -> &[Input] {
        let windows = self.windows.get(node.arg(1)).map(|inputs| inputs.as_slice());
        let channels = || self.inputs.get(node.arg(0)).filter(|_| reads_channels(graph, node));
        windows.or_else(|| channels().map(|input| std::slice::from_ref(input.as_ref()))).unwrap_or_default()
    }
}

/// The pieces that are made while edits are collected.
struct Writer<'a> {
    graph: Graph<'a>,
    plan: &'a Plan,
    calibration: &'a Calibration,
    names: BTreeSet<String>,
    edits: Vec<Edit>,
    /// Whether ONNX Runtime's own operators are used: for 16-bit activations below opset 21, and for packed weights.
    foreign: bool,
    /// Scale and zero point of each tensor that has any, by the tensor whose they are.
    params: BTreeMap<String, QParams>,
    /// For tensors in two terms, the dequantized second one.
    rests: BTreeMap<String, String>,
    /// By weight, what an error of each of its output channels costs: where one scale has to do for all of them.
    costs: BTreeMap<String, Vec<f64>>,
    /// Names of the smallest and largest code in use, once written: where activations don't use all of their type.
    code_limits: Option<[String; 2]>,
}

/// Quantizes a folded model as planned.
///
/// # Errors
/// A tensor without a range, weights that can't be quantized, a graph that is none afterwards, or an operator that means
/// something else in the operator set that is needed.
pub fn quantize(model: &Model, plan: &Plan, calibration: &Calibration) -> Result<Model> {
    let mut quantized = model.clone();
    if matches!(plan.settings.mode, Mode::WeightOnly { form: Packing::Blocks, .. }) {
        opset::raise(&mut quantized, opset::BLOCKS)?;
    }
    let (edits, foreign) = edits(&quantized, plan, calibration)?;
    super::apply(quantized.graph_mut(), edits)?;
    if plan.settings.mode == Mode::Static && plan.settings.target == Target::OnnxRuntime {
        kept_float::keep_float(&mut quantized, plan.settings.activation)?;
    }
    if foreign {
        quantized.import(MICROSOFT, 1);
    }
    Ok(quantized)
}

/// The edits that [`quantize`] applies, and whether they use ONNX Runtime's own operators.
///
/// # Errors
/// As [`quantize`].
pub fn edits(model: &Model, plan: &Plan, calibration: &Calibration) -> Result<(Vec<Edit>, bool)> {
    let graph = Graph::new(model.graph())?;
    let foreign = match plan.settings.mode {
        Mode::Static => plan.settings.activation.int.bits() == 16 && model.opset("").unwrap_or(0) < 21,
        Mode::Dynamic => false,
        Mode::WeightOnly { form, .. } => form == Packing::MatMulNBits,
    };
    let mut writer = Writer {
        costs: equalize::layers::costs(&graph, plan.settings.weights)?,
        names: graph.names(),
        graph,
        plan,
        calibration,
        edits: Vec::new(),
        foreign,
        params: BTreeMap::new(),
        rests: BTreeMap::new(),
        code_limits: None,
    };
    match plan.settings.mode {
        Mode::Static => {
            writer.activations()?;
            writer.layers()?;
        }
        Mode::Dynamic => writer.dynamic()?,
        Mode::WeightOnly { bits, group, form } => writer.weight_only(bits, group, form)?,
    }
    writer.stored()?;
    let packed = plan.stored.values().any(|(_, stored)| *stored != Stored::Half);
    Ok((writer.edits, foreign || packed))
}

impl Writer<'_> {
    fn grid(&self) -> IntGrid {
        self.plan.settings.activation
    }

    /// Scale and zero point of a tensor that has one.
    fn params(&self, tensor: &str) -> Result<QParams> {
        let root = self.plan.scales.get(tensor).map_or(tensor, String::as_str);
        let missing =
            || QuantError::Tensor { name: tensor.into(), why: "has no range; calibration never saw it".into() };
        self.params.get(root).copied().ok_or_else(missing)
    }

    fn name(&mut self, wanted: &str) -> String {
        fresh(&mut self.names, wanted)
    }

    fn add(&mut self, node: NodeProto) {
        self.edits.push(Edit::Add(node));
    }

    fn initializer(&mut self, tensor: TensorProto) -> String {
        let name = tensor.name().to_owned();
        self.edits.push(Edit::Initializer(tensor));
        name
    }

    /// A scalar of the activations' type.
    fn zero_point(&self, name: &str, value: i32) -> TensorProto {
        match self.grid().int {
            IntType::U8 => from_u8(name, &[], &[value as u8]),
            IntType::S8 => from_i8(name, &[], &[value as i8]),
            IntType::U16 => from_16(name, &[], &[value], false),
            IntType::S16 => from_16(name, &[], &[value], true),
        }
    }

    /// A node that quantizes or dequantizes activations.
    fn activation_node(&self, op: &str, name: &str, inputs: &[&str], output: &str) -> NodeProto {
        let node = NodeProto::new(op, name, inputs, &[output]);
        match self.foreign {
            true => NodeProto { domain: Some(MICROSOFT.into()), ..node },
            false => node,
        }
    }

    /// Initializers `{base}_quantized`, `_scale` and `_zero_point` and a DequantizeLinear over them: its output.
    fn dequantized(&mut self, base: &str, codes: Codes, dims: &[usize], scales: &[f32], axis: i64) -> String {
        let scale_dims: &[usize] = if scales.len() == 1 { &[] } else { &[scales.len()] };
        let names = ["quantized", "scale", "zero_point"].map(|part| {
            let wanted = if part == "quantized" { format!("{base}_quantized") } else { format!("{base}_{part}") };
            self.name(&wanted)
        });
        let zeros = scale_dims.iter().product();
        let (codes, zero) = match codes {
            Codes::Int8(codes) => (from_i8(&names[0], dims, &codes), from_i8(&names[2], scale_dims, &vec![0; zeros])),
            Codes::Int32(codes) => {
                (from_i32(&names[0], dims, &codes), from_i32(&names[2], scale_dims, &vec![0; zeros]))
            }
        };
        self.initializer(codes);
        self.initializer(from_f32(&names[1], scale_dims, scales));
        self.initializer(zero);
        let output = self.name(&format!("{base}_DequantizeLinear"));
        let node = NodeProto::new(
            "DequantizeLinear",
            &format!("{base}_DequantizeLinear"),
            &[&names[0], &names[1], &names[2]],
            &[&output],
        );
        let node = if scales.len() == 1 { node } else { node.with(AttributeProto::new_int("axis", axis)) };
        self.add(node);
        output
    }
}

/// Integers of a weight or bias.
enum Codes {
    Int8(Vec<i8>),
    Int32(Vec<i32>),
}
