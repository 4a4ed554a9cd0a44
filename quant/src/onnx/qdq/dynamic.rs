//! Scales found at run time: a DynamicQuantizeLinear a tensor, and products of integers.
//!
//! ```text
//! x -> DynamicQuantizeLinear -> x_q, x_scale, x_zero_point
//! MatMulInteger(x_q, w_q, x_zero_point) -> Cast -> Mul(x_scale * w_scale) -> Add(bias)
//! ```
//! ONNX Runtime makes one operator of the second line. Where calibration saw what layers read, biases take up the mean
//! error of rounded weights.

use super::Writer;
use crate::QuantError;
use crate::error::Result;
use crate::onnx::Edit;
use crate::onnx::graph::label;
use crate::onnx::plan::Kind;
use crate::onnx::proto::*;
use crate::onnx::tensor::{floats, from_f32, from_i8};
use crate::onnx::weights::{Layout, transpose};
use std::collections::BTreeMap;

impl Writer<'_> {
    /// Every layer that the plan quantizes.
    pub(super) fn dynamic(&mut self) -> Result<()> {
        let mut inputs: BTreeMap<String, [String; 3]> = BTreeMap::new();
        let layers: Vec<(usize, Kind)> =
            self.graph.nodes().filter_map(|(id, _)| Some((id, *self.plan.kind(id)?))).collect();
        for (id, kind) in layers {
            let node = self.graph.node(id);
            let input = node.arg(0).to_owned();
            let [codes, scale, zero] = match inputs.get(&input) {
                Some(names) => names.clone(),
                None => {
                    let names = ["quantized", "scale", "zero_point"].map(|part| format!("{input}_{part}"));
                    let names = names.map(|wanted| self.name(&wanted));
                    let outputs: Vec<&str> = names.iter().map(String::as_str).collect();
                    let quantize = format!("{input}_QuantizeLinear");
                    self.add(NodeProto::new("DynamicQuantizeLinear", &quantize, &[&input], &outputs));
                    inputs.insert(input.clone(), names.clone());
                    names
                }
            };
            let conv = kind == Kind::Conv;
            let layout = Layout::of(node);
            let Some(tensor) = self.graph.constant(node.arg(1)) else {
                return Err(QuantError::Tensor { name: node.arg(1).into(), why: "isn't a constant".into() });
            };
            let weight = self.quantized(node, tensor, layout, &[])?;
            let dims: Vec<usize> = tensor.dims.iter().map(|&d| d.max(0) as usize).collect();
            let (weight_codes, dims) = match layout == Layout::Rows && !conv {
                true => (transpose(&weight.codes, dims[0], dims[1]), vec![dims[1], dims[0]]),
                false => (weight.codes.clone(), dims),
            };
            let base = tensor.name();
            let names = ["quantized", "scale", "zero_point"].map(|part| self.name(&format!("{base}_{part}")));
            // Over the channels of a Conv's output, or the last dimension of a product.
            let along = |values: &[f32]| match conv && values.len() > 1 {
                true => [vec![1, values.len()], vec![1; dims.len() - 2]].concat(),
                false if values.len() > 1 => vec![values.len()],
                false => Vec::new(),
            };
            self.initializer(from_i8(&names[0], &dims, &weight_codes));
            self.initializer(from_f32(&names[1], &along(&weight.scales), &weight.scales));
            self.initializer(from_i8(&names[2], &[], &[0]));
            let own = label(node);
            let op = if conv { "ConvInteger" } else { "MatMulInteger" };
            let mut product =
                NodeProto::new(op, &format!("{own}_quantized"), &[&codes, &names[0], &zero, &names[2]], &[]);
            if conv {
                product.attribute = node.attribute.clone();
            }
            let steps = ["output_quantized", "output_cast", "scales"].map(|part| self.name(&format!("{own}_{part}")));
            product.output = vec![steps[0].clone()];
            self.add(product);
            let to = AttributeProto::new_int("to", DataType::Float as i64);
            self.add(NodeProto::new("Cast", &format!("{own}_cast"), &[&steps[0]], &[&steps[1]]).with(to));
            self.add(NodeProto::new("Mul", &format!("{own}_scales"), &[&scale, &names[1]], &[&steps[2]]));
            let added = match kind {
                Kind::Linear { bias } => bias,
                _ => None,
            };
            if let Some((add, slot)) = added {
                let name = self.graph.node(add).arg(slot).to_owned();
                let exact = self.bias(&name)?;
                if let Some(values) = self.corrected(id, layout, &weight, exact)? {
                    let name = self.name(&format!("{name}_corrected"));
                    let to = self.initializer(from_f32(&name, &[values.len()], &values));
                    self.edits.push(Edit::Input { node: add, slot, to });
                }
            }
            let bias = if node.arg(2).is_empty() { None } else { self.graph.constant(node.arg(2)) };
            let last = if bias.is_some() { self.name(&format!("{own}_output_scaled")) } else { node.out().to_owned() };
            self.add(NodeProto::new("Mul", &format!("{own}_scaled"), &[&steps[1], &steps[2]], &[&last]));
            if let Some(bias) = bias {
                let exact = floats(bias)?;
                let values = self.corrected(id, layout, &weight, Some(exact))?.unwrap_or_default();
                let name = self.name(&format!("{}_bias", bias.name()));
                let name = self.initializer(from_f32(&name, &along(&values), &values));
                self.add(NodeProto::new("Add", &format!("{own}_bias"), &[&last, &name], &[node.out()]));
            }
            self.edits.push(Edit::Remove(id));
        }
        Ok(())
    }
}
