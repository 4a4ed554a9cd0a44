//! EfficientNet-Lite (Google's EfficientNet without squeeze-and-excite and with ReLU6): a stem, 16 or more inverted
//! residual blocks, a head, global pooling and a classifier. Convolutions pad as TensorFlow's SAME does.

use super::Checkpoint;
use super::builder::{Builder, Dim, value};
use crate::Result;
use nibble_quant::onnx::Model;
use nibble_quant::onnx::proto::*;

/// Strides of the seven stages; a stage ends where the number of channels changes.
const STRIDES: [usize; 7] = [1, 2, 2, 2, 1, 2, 1];
/// TensorFlow's batch norms.
const EPSILON: f32 = 1e-3;

pub(super) fn build(checkpoint: &Checkpoint, size: usize) -> Result<Model> {
    let mut net = Net { b: Builder::new(checkpoint), side: size };
    net.build(size)
}

struct Net<'a> {
    b: Builder<'a>,
    /// Pixels a side, at this point.
    side: usize,
}

impl Net<'_> {
    /// Convolution, batch norm, and ReLU6 if wanted.
    fn conv(&mut self, conv: &str, norm: &str, input: &str, stride: usize, relu: bool) -> Result<(String, usize)> {
        let weight = format!("{conv}.weight");
        let dims = self.b.weight(&weight)?;
        let &[channels, per_group, kernel, _] = dims.as_slice() else {
            return Err(self.b.damaged(format!("tensor `{weight}` has shape {dims:?}, a convolution was wanted")));
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
        let y = self.b.node("Conv", conv, &[input, &weight], attributes);
        let parts = ["weight", "bias", "running_mean", "running_var"].map(|part| format!("{norm}.{part}"));
        for part in &parts {
            self.b.vector(part, channels)?;
        }
        let [scale, bias, mean, var] = &parts;
        let epsilon = vec![AttributeProto::new_float("epsilon", EPSILON)];
        let y = self.b.node("BatchNormalization", norm, &[&y, scale, bias, mean, var], epsilon);
        if !relu {
            return Ok((y, channels));
        }
        let (zero, six) = (self.b.constant("zero", &[], &[0.0]), self.b.constant("six", &[], &[6.0]));
        Ok((self.b.node("Clip", &format!("{conv}.relu6"), &[&y, &zero, &six], Vec::new()), channels))
    }

    fn build(&mut self, size: usize) -> Result<Model> {
        let (mut x, mut channels) = self.conv("_conv_stem", "_bn0", "image", 2, true)?;
        let (mut stage, mut last) = (0, 0);
        for index in 0.. {
            let block = format!("_blocks.{index}");
            let Some(dims) = self.b.checkpoint.shape(&format!("{block}._project_conv.weight")) else { break };
            let out = dims.first().copied().unwrap_or(0);
            let first = index == 0 || out != last;
            if first && index > 0 {
                stage += 1;
            }
            let Some(&stride) = STRIDES.get(stage) else {
                return Err(self.b.damaged(format!("more than {} stages at `{block}`", STRIDES.len())));
            };
            let stride = if first { stride } else { 1 };
            let input = x.clone();
            if self.b.checkpoint.shape(&format!("{block}._expand_conv.weight")).is_some() {
                (x, _) = self.conv(&format!("{block}._expand_conv"), &format!("{block}._bn0"), &x, 1, true)?;
            }
            (x, _) = self.conv(&format!("{block}._depthwise_conv"), &format!("{block}._bn1"), &x, stride, true)?;
            (x, _) = self.conv(&format!("{block}._project_conv"), &format!("{block}._bn2"), &x, 1, false)?;
            if stride == 1 && channels == out {
                x = self.b.node("Add", &format!("{block}.add"), &[&x, &input], Vec::new());
            }
            (channels, last) = (out, out);
        }
        (x, _) = self.conv("_conv_head", "_bn1", &x, 1, true)?;
        x = self.b.node("GlobalAveragePool", "pool", &[&x], Vec::new());
        x = self.b.node("Flatten", "flatten", &[&x], vec![AttributeProto::new_int("axis", 1)]);
        let classes = self.b.weight("_fc.weight")?.first().copied().unwrap_or(0);
        self.b.vector("_fc.bias", classes)?;
        let transposed = vec![AttributeProto::new_int("transB", 1)];
        self.b.node_to("Gemm", "_fc", &[&x, "_fc.weight", "_fc.bias"], "logits", transposed);
        let side = || Dim::Fixed(size);
        let image = value("image", DataType::Float, &[Dim::Open("batch"), Dim::Fixed(3), side(), side()]);
        let logits = value("logits", DataType::Float, &[Dim::Open("batch"), Dim::Fixed(classes)]);
        self.b.finish("efficientnet-lite", vec![image], vec![logits])
    }
}
