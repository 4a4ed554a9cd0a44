//! From a checkpoint without a graph to a float ONNX model: what the layers' names and shapes don't say is the
//! architecture's, written down here.
//!
//! EfficientNet-Lite (Google's EfficientNet without squeeze-and-excite and with ReLU6): a stem, 16 or more inverted
//! residual blocks, a head, global pooling and a classifier. Convolutions pad as TensorFlow's SAME does.

use super::pth::{self, Weights};
use crate::{ModelError, Result};
use nibble_quant::onnx::Model;
use nibble_quant::onnx::proto::*;
use nibble_quant::onnx::tensor::from_f32;
use std::path::Path;

/// Operator set of exported models.
const OPSET: i64 = 17;
/// Strides of the seven stages; a stage ends where the number of channels changes.
const STRIDES: [usize; 7] = [1, 2, 2, 2, 1, 2, 1];
/// TensorFlow's batch norms.
const EPSILON: f32 = 1e-3;

/// Reads a checkpoint and makes an ONNX model of it, for pictures of `size` pixels a side.
///
/// # Errors
/// A file that can't be read, or of an architecture that isn't known here.
pub fn export(path: &Path, size: usize) -> Result<Model> {
    let weights = pth::read(path)?;
    let known = ["_conv_stem.weight", "_blocks.0._depthwise_conv.weight", "_conv_head.weight", "_fc.weight"];
    if let Some(missing) = known.iter().find(|name| !weights.contains_key(**name)) {
        return Err(ModelError::Damaged {
            path: path.to_owned(),
            why: format!("isn't an EfficientNet-Lite, the one architecture that is exported: no tensor `{missing}`"),
        });
    }
    let mut builder = Builder { weights: &weights, path, nodes: Vec::new(), initializers: Vec::new(), side: size };
    builder.efficientnet_lite()
}

struct Builder<'a> {
    weights: &'a Weights,
    path: &'a Path,
    nodes: Vec<NodeProto>,
    initializers: Vec<TensorProto>,
    /// Pixels a side, at this point.
    side: usize,
}

impl Builder<'_> {
    fn damaged(&self, why: String) -> ModelError {
        ModelError::Damaged { path: self.path.to_owned(), why }
    }

    /// Makes an initializer of a tensor: its shape.
    fn weight(&mut self, name: &str) -> Result<Vec<usize>> {
        let Some((dims, values)) = self.weights.get(name) else {
            return Err(self.damaged(format!("no tensor `{name}`")));
        };
        self.initializers.push(from_f32(name, dims, values));
        Ok(dims.clone())
    }

    fn node(&mut self, op: &str, name: &str, inputs: &[&str], attributes: Vec<AttributeProto>) -> String {
        let output = format!("{name}_output");
        let mut node = NodeProto::new(op, name, inputs, &[&output]);
        node.attribute = attributes;
        self.nodes.push(node);
        output
    }

    /// Convolution, batch norm, and ReLU6 if wanted.
    fn conv(&mut self, conv: &str, norm: &str, input: &str, stride: usize, relu: bool) -> Result<(String, usize)> {
        let weight = format!("{conv}.weight");
        let dims = self.weight(&weight)?;
        let &[channels, per_group, kernel, _] = dims.as_slice() else {
            return Err(self.damaged(format!("tensor `{weight}` has shape {dims:?}, a convolution was wanted")));
        };
        let depthwise = conv.ends_with("_depthwise_conv") && per_group == 1;
        let out = self.side.div_ceil(stride);
        let padding = ((out.max(1) - 1) * stride + kernel).saturating_sub(self.side) as i64;
        let (before, after) = (padding / 2, padding - padding / 2);
        self.side = out;
        let attributes = vec![
            AttributeProto::new_ints("kernel_shape", &[kernel as i64; 2]),
            AttributeProto::new_ints("strides", &[stride as i64; 2]),
            AttributeProto::new_ints("pads", &[before, before, after, after]),
            AttributeProto::new_int("group", if depthwise { channels as i64 } else { 1 }),
        ];
        let y = self.node("Conv", conv, &[input, &weight], attributes);
        let parts = ["weight", "bias", "running_mean", "running_var"].map(|part| format!("{norm}.{part}"));
        for part in &parts {
            if self.weight(part)? != [channels] {
                return Err(self.damaged(format!("tensor `{part}` isn't one number for {channels} channels")));
            }
        }
        let [scale, bias, mean, var] = &parts;
        let y = self.node(
            "BatchNormalization",
            norm,
            &[&y, scale, bias, mean, var],
            vec![AttributeProto::new_float("epsilon", EPSILON)],
        );
        let y = if relu { self.node("Clip", &format!("{conv}.relu6"), &[&y, "zero", "six"], Vec::new()) } else { y };
        Ok((y, channels))
    }

    fn efficientnet_lite(&mut self) -> Result<Model> {
        let size = self.side;
        self.initializers.push(from_f32("zero", &[], &[0.0]));
        self.initializers.push(from_f32("six", &[], &[6.0]));
        let (mut x, mut channels) = self.conv("_conv_stem", "_bn0", "image", 2, true)?;
        let (mut stage, mut last) = (0, 0);
        for index in 0.. {
            let block = format!("_blocks.{index}");
            let Some((dims, _)) = self.weights.get(&format!("{block}._project_conv.weight")) else { break };
            let out = dims.first().copied().unwrap_or(0);
            let first = index == 0 || out != last;
            if first && index > 0 {
                stage += 1;
            }
            let Some(&stride) = STRIDES.get(stage) else {
                return Err(self.damaged(format!("more than {} stages at `{block}`", STRIDES.len())));
            };
            let stride = if first { stride } else { 1 };
            let input = x.clone();
            if self.weights.contains_key(&format!("{block}._expand_conv.weight")) {
                (x, _) = self.conv(&format!("{block}._expand_conv"), &format!("{block}._bn0"), &x, 1, true)?;
            }
            (x, _) = self.conv(&format!("{block}._depthwise_conv"), &format!("{block}._bn1"), &x, stride, true)?;
            (x, _) = self.conv(&format!("{block}._project_conv"), &format!("{block}._bn2"), &x, 1, false)?;
            if stride == 1 && channels == out {
                x = self.node("Add", &format!("{block}.add"), &[&x, &input], Vec::new());
            }
            (channels, last) = (out, out);
        }
        (x, _) = self.conv("_conv_head", "_bn1", &x, 1, true)?;
        x = self.node("GlobalAveragePool", "pool", &[&x], Vec::new());
        x = self.node("Flatten", "flatten", &[&x], vec![AttributeProto::new_int("axis", 1)]);
        let classes = self.weight("_fc.weight")?.first().copied().unwrap_or(0);
        self.weight("_fc.bias")?;
        let mut head = NodeProto::new("Gemm", "_fc", &[&x, "_fc.weight", "_fc.bias"], &["logits"]);
        head.attribute.push(AttributeProto::new_int("transB", 1));
        self.nodes.push(head);
        let graph = GraphProto {
            name: Some("efficientnet-lite".into()),
            node: std::mem::take(&mut self.nodes),
            initializer: std::mem::take(&mut self.initializers),
            input: vec![value("image", &[3, size, size])],
            output: vec![value("logits", &[classes])],
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

/// A float value of a batch of any size.
fn value(name: &str, dims: &[usize]) -> ValueInfoProto {
    let batch = Dimension { value: Some(DimensionValue::Param("batch".into())), denotation: None };
    let fixed = dims.iter().map(|&d| Dimension { value: Some(DimensionValue::Value(d as i64)), denotation: None });
    let shape = TensorShapeProto { dim: std::iter::once(batch).chain(fixed).collect() };
    let tensor = TensorType { elem_type: Some(DataType::Float as i32), shape: Some(shape) };
    ValueInfoProto {
        name: Some(name.into()),
        r#type: Some(TypeProto { value: Some(TypeValue::Tensor(tensor)), denotation: None }),
        ..Default::default()
    }
}
