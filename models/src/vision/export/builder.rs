//! Nodes and weights of a graph in the making, and the layers that transformers share.

use super::Checkpoint;
use crate::config::Fields;
use crate::{ModelError, Result};
use nibble_quant::onnx::Model;
use nibble_quant::onnx::proto::*;
use nibble_quant::onnx::tensor::{from_f32, from_i64};

/// Operator set of exported models: the first with LayerNormalization.
const OPSET: i64 = 17;

pub(super) struct Builder<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    nodes: Vec<NodeProto>,
    initializers: Vec<TensorProto>,
}

/// What lies between the two products of a transformer's feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Activation {
    Gelu,
    GeluTanh,
    QuickGelu,
    Silu,
    Relu,
}

impl Activation {
    /// As `config.json` calls it; GELU where it doesn't.
    pub(super) fn of(config: Option<&Fields>) -> Result<Activation> {
        let Some(config) = config else { return Ok(Activation::Gelu) };
        Ok(match config.optional::<String>("hidden_act")?.as_deref() {
            None | Some("gelu") => Activation::Gelu,
            Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_fast") => Activation::GeluTanh,
            Some("quick_gelu") => Activation::QuickGelu,
            Some("silu" | "swish") => Activation::Silu,
            Some("relu") => Activation::Relu,
            Some(other) => {
                let why = format!("`{other}`; known: gelu, gelu_new, gelu_pytorch_tanh, quick_gelu, silu, relu");
                return Err(config.refuse("hidden_act", why));
            }
        })
    }
}

/// Sizes of an attention layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    pub(super) hidden: usize,
    pub(super) heads: usize,
}

impl Heads {
    /// # Errors
    /// The heads don't divide the hidden size.
    pub(super) fn new(checkpoint: &Checkpoint, hidden: usize, heads: usize) -> Result<Heads> {
        match heads > 0 && hidden.is_multiple_of(heads) {
            true => Ok(Heads { hidden, heads }),
            false => Err(checkpoint.damaged(format!("{heads} attention heads don't divide {hidden} channels"))),
        }
    }
}

impl<'a> Builder<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint) -> Builder<'a> {
        Builder { checkpoint, nodes: Vec::new(), initializers: Vec::new() }
    }

    pub(super) fn damaged(&self, why: String) -> ModelError {
        self.checkpoint.damaged(why)
    }

    /// A tensor of the checkpoint becomes an initializer of its name: its shape.
    pub(super) fn weight(&mut self, name: &str) -> Result<Vec<usize>> {
        let (dims, values) = self.checkpoint.tensor(name)?;
        self.constant(name, &dims, &values);
        Ok(dims)
    }

    /// A vector of the checkpoint becomes an initializer of its name.
    pub(super) fn vector(&mut self, name: &str, n: usize) -> Result<()> {
        let values = self.checkpoint.exactly(name, &[n])?;
        self.constant(name, &[n], &values);
        Ok(())
    }

    pub(super) fn constant(&mut self, name: &str, dims: &[usize], values: &[f32]) -> String {
        if !self.initializers.iter().any(|t| t.name() == name) {
            self.initializers.push(from_f32(name, dims, values));
        }
        name.to_owned()
    }

    pub(super) fn ints(&mut self, name: &str, dims: &[usize], values: &[i64]) -> String {
        if !self.initializers.iter().any(|t| t.name() == name) {
            self.initializers.push(from_i64(name, dims, values));
        }
        name.to_owned()
    }

    /// Adds a node with one output, whose name it returns.
    pub(super) fn node(&mut self, op: &str, name: &str, inputs: &[&str], attributes: Vec<AttributeProto>) -> String {
        let output = format!("{name}_output");
        self.node_to(op, name, inputs, &output, attributes)
    }

    /// Adds a node whose output has this name.
    pub(super) fn node_to(
        &mut self,
        op: &str,
        name: &str,
        inputs: &[&str],
        output: &str,
        attributes: Vec<AttributeProto>,
    ) -> String {
        let mut node = NodeProto::new(op, name, inputs, &[output]);
        node.attribute = attributes;
        self.nodes.push(node);
        output.to_owned()
    }

    /// `x w^T + b` from `{name}.weight` (n, k) and `{name}.bias` (n), if there is one.
    pub(super) fn linear(&mut self, name: &str, x: &str, n: usize, k: usize) -> Result<String> {
        let weight = self.checkpoint.exactly(&format!("{name}.weight"), &[n, k])?;
        let bias = format!("{name}.bias");
        let bias = match self.checkpoint.shape(&bias) {
            Some(_) => Some(self.checkpoint.exactly(&bias, &[n])?),
            None => None,
        };
        Ok(self.product(name, x, n, k, &weight, bias.as_deref()))
    }

    /// `x w^T + b` of rows `rows` of a weight (all, k): one of several layers that a checkpoint stores as one.
    pub(super) fn part(&mut self, stored: &str, name: &str, x: &str, rows: [usize; 3], k: usize) -> Result<String> {
        let [all, from, n] = rows;
        let weight = self.checkpoint.exactly(&format!("{stored}.weight"), &[all, k])?;
        let bias = format!("{stored}.bias");
        let bias = match self.checkpoint.shape(&bias) {
            Some(_) => Some(self.checkpoint.exactly(&bias, &[all])?),
            None => None,
        };
        let bias = bias.as_ref().map(|b| &b[from..from + n]);
        Ok(self.product(name, x, n, k, &weight[from * k..(from + n) * k], bias))
    }

    /// A MatMul by the transposed weight, and an Add of the bias: what runtimes expect of inputs of any rank.
    fn product(&mut self, name: &str, x: &str, n: usize, k: usize, weight: &[f32], bias: Option<&[f32]>) -> String {
        let columns: Vec<f32> = (0..k).flat_map(|j| (0..n).map(move |i| weight[i * k + j])).collect();
        let weight = self.constant(&format!("{name}.weight"), &[k, n], &columns);
        let product = self.node("MatMul", &format!("{name}/MatMul"), &[x, &weight], Vec::new());
        match bias {
            Some(bias) => {
                let bias = self.constant(&format!("{name}.bias"), &[n], bias);
                self.node("Add", &format!("{name}/Add"), &[&product, &bias], Vec::new())
            }
            None => product,
        }
    }

    pub(super) fn layer_norm(&mut self, name: &str, x: &str, hidden: usize, epsilon: f32) -> Result<String> {
        let output = format!("{name}_output");
        self.layer_norm_to(name, x, hidden, epsilon, &output)
    }

    pub(super) fn layer_norm_to(
        &mut self,
        name: &str,
        x: &str,
        hidden: usize,
        epsilon: f32,
        output: &str,
    ) -> Result<String> {
        let (gain, offset) = (format!("{name}.weight"), format!("{name}.bias"));
        self.vector(&gain, hidden)?;
        self.vector(&offset, hidden)?;
        let attributes = vec![AttributeProto::new_int("axis", -1), AttributeProto::new_float("epsilon", epsilon)];
        Ok(self.node_to("LayerNormalization", name, &[x, &gain, &offset], output, attributes))
    }

    /// Before opset 20 GELU is written out; runtimes know its chain.
    pub(super) fn activation(&mut self, name: &str, x: &str, kind: Activation) -> String {
        let of = |step: &str| format!("{name}/{step}");
        let none = Vec::new;
        match kind {
            Activation::Relu => self.node("Relu", name, &[x], none()),
            Activation::Silu => {
                let gate = self.node("Sigmoid", &of("Sigmoid"), &[x], none());
                self.node("Mul", &of("Mul"), &[x, &gate], none())
            }
            Activation::QuickGelu => {
                let factor = self.constant("quick_gelu", &[], &[1.702]);
                let scaled = self.node("Mul", &of("Mul"), &[x, &factor], none());
                let gate = self.node("Sigmoid", &of("Sigmoid"), &[&scaled], none());
                self.node("Mul", &of("Mul_1"), &[x, &gate], none())
            }
            Activation::Gelu => {
                let root = self.constant("root_two", &[], &[std::f32::consts::SQRT_2]);
                let (one, half) = (self.constant("one", &[], &[1.0]), self.constant("half", &[], &[0.5]));
                let scaled = self.node("Div", &of("Div"), &[x, &root], none());
                let erf = self.node("Erf", &of("Erf"), &[&scaled], none());
                let sum = self.node("Add", &of("Add"), &[&erf, &one], none());
                let product = self.node("Mul", &of("Mul"), &[x, &sum], none());
                self.node("Mul", &of("Mul_1"), &[&product, &half], none())
            }
            Activation::GeluTanh => {
                // x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))
                let three = self.constant("three", &[], &[3.0]);
                let cubic = self.constant("cubic", &[], &[0.044_715]);
                let root = self.constant("root", &[], &[(2.0 / std::f32::consts::PI).sqrt()]);
                let (one, half) = (self.constant("one", &[], &[1.0]), self.constant("half", &[], &[0.5]));
                let cube = self.node("Pow", &of("Pow"), &[x, &three], none());
                let scaled = self.node("Mul", &of("Mul"), &[&cube, &cubic], none());
                let inner = self.node("Add", &of("Add"), &[x, &scaled], none());
                let inner = self.node("Mul", &of("Mul_1"), &[&inner, &root], none());
                let tanh = self.node("Tanh", &of("Tanh"), &[&inner], none());
                let sum = self.node("Add", &of("Add_1"), &[&tanh, &one], none());
                let product = self.node("Mul", &of("Mul_2"), &[x, &sum], none());
                self.node("Mul", &of("Mul_3"), &[&product, &half], none())
            }
        }
    }

    /// `softmax(q k^T / sqrt(d) [+ mask]) v` over heads; q, k and v are (batch, tokens, hidden).
    pub(super) fn attention(&mut self, name: &str, [q, k, v]: [&str; 3], mask: Option<&str>, sizes: Heads) -> String {
        let of = |step: &str| format!("{name}/{step}");
        let Heads { hidden, heads } = sizes;
        let head = hidden / heads;
        let split = self.ints("split_heads", &[4], &[0, 0, heads as i64, head as i64]);
        let join = self.ints("join_heads", &[3], &[0, 0, hidden as i64]);
        let scale = self.constant("attention_scale", &[], &[(1.0 / (head as f64).sqrt()) as f32]);
        let mut by_head = |x: &str, step: &str, order: [i64; 4]| {
            let shaped = self.node("Reshape", &of(&format!("{step}/Reshape")), &[x, &split], Vec::new());
            let order = vec![AttributeProto::new_ints("perm", &order)];
            self.node("Transpose", &of(&format!("{step}/Transpose")), &[&shaped], order)
        };
        let q = by_head(q, "q", [0, 2, 1, 3]);
        let k = by_head(k, "k", [0, 2, 3, 1]);
        let v = by_head(v, "v", [0, 2, 1, 3]);
        let scores = self.node("MatMul", &of("MatMul"), &[&q, &k], Vec::new());
        let mut scores = self.node("Mul", &of("Mul"), &[&scores, &scale], Vec::new());
        if let Some(mask) = mask {
            scores = self.node("Add", &of("Add"), &[&scores, mask], Vec::new());
        }
        let axis = vec![AttributeProto::new_int("axis", -1)];
        let shares = self.node("Softmax", &of("Softmax"), &[&scores], axis);
        let mixed = self.node("MatMul", &of("MatMul_1"), &[&shares, &v], Vec::new());
        let order = vec![AttributeProto::new_ints("perm", &[0, 2, 1, 3])];
        let turned = self.node("Transpose", &of("Transpose"), &[&mixed], order);
        self.node("Reshape", &of("Reshape"), &[&turned, &join], Vec::new())
    }

    /// The model.
    pub(super) fn finish(
        &mut self,
        name: &str,
        inputs: Vec<ValueInfoProto>,
        outputs: Vec<ValueInfoProto>,
    ) -> Result<Model> {
        let graph = GraphProto {
            name: Some(name.into()),
            node: std::mem::take(&mut self.nodes),
            initializer: std::mem::take(&mut self.initializers),
            input: inputs,
            output: outputs,
            ..Default::default()
        };
        let mut model = Model::default();
        model.proto.ir_version = Some(8);
        model.proto.producer_name = Some("nibble".into());
        model.proto.graph = Some(graph);
        model.import("", OPSET);
        nibble_quant::onnx::Graph::new(model.graph())?;
        Ok(model)
    }
}

/// A dimension of an input or output.
pub(super) enum Dim {
    Fixed(usize),
    Open(&'static str),
}

/// A value of a graph.
pub(super) fn value(name: &str, ty: DataType, dims: &[Dim]) -> ValueInfoProto {
    let dim = |d: &Dim| match d {
        Dim::Fixed(n) => DimensionValue::Value(*n as i64),
        Dim::Open(symbol) => DimensionValue::Param((*symbol).into()),
    };
    let dims = dims.iter().map(|d| Dimension { value: Some(dim(d)), denotation: None }).collect();
    let tensor = TensorType { elem_type: Some(ty as i32), shape: Some(TensorShapeProto { dim: dims }) };
    ValueInfoProto {
        name: Some(name.into()),
        r#type: Some(TypeProto { value: Some(TypeValue::Tensor(tensor)), denotation: None }),
        ..Default::default()
    }
}
