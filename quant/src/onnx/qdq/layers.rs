//! Layers: integer weights, biases, and the form of a linear layer that runtimes fuse.

use super::{Codes, Writer};
use crate::QuantError;
use crate::error::Result;
use crate::onnx::Edit;
use crate::onnx::graph::label;
use crate::onnx::plan::{Kind, Target};
use crate::onnx::proto::*;
use crate::onnx::tensor::{floats, from_f32};
use crate::onnx::weights::{Layout, Weight, least_scales, quantize, quantize_bias};
use std::collections::BTreeMap;

/// Weights that are written already, with their names: two layers may share one.
type Written = BTreeMap<(String, i64), (Weight, String)>;

impl Writer<'_> {
    /// Every layer with weights.
    pub(super) fn layers(&mut self) -> Result<()> {
        let mut written = Written::new();
        let layers: Vec<(usize, Kind)> =
            self.graph.nodes().filter_map(|(id, _)| Some((id, *self.plan.kind(id)?))).collect();
        for (id, kind) in layers {
            let node = self.graph.node(id);
            match kind {
                Kind::Conv => self.layer(id, Layout::Rows, 0, &mut written)?,
                Kind::Linear { .. } if node.is("Gemm") => {
                    let transposed = node.int("transB", 0) != 0;
                    let layout = if transposed { Layout::Rows } else { Layout::Columns };
                    self.layer(id, layout, i64::from(!transposed), &mut written)?;
                }
                Kind::Linear { bias } => self.product(id, bias, &mut written)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// A Conv or Gemm, whose bias is one of its inputs.
    fn layer(&mut self, id: usize, layout: Layout, axis: i64, written: &mut Written) -> Result<()> {
        let node = self.graph.node(id);
        let bias = self.bias(id, node.arg(2), node.arg(1), layout)?;
        if self.plan.settings.target == Target::TensorRt {
            self.weight(id, layout, axis, &[], written)?;
            if let Some((name, values)) = bias {
                let name = self.name(&format!("{name}_float"));
                let to = self.initializer(from_f32(&name, &[values.len()], &values));
                self.edits.push(Edit::Input { node: id, slot: 2, to });
            }
            return Ok(());
        }
        let scale = self.params(node.arg(0))?.scale;
        let least = bias.as_ref().map(|(_, values)| least_scales(values, scale)).unwrap_or_default();
        let weight = self.weight(id, layout, axis, &least, written)?;
        if let Some((name, values)) = bias {
            let (codes, scales) = quantize_bias(&values, scale, &weight);
            let to = self.dequantized(&name, Codes::Int32(codes), &[values.len()], &scales, 0);
            self.edits.push(Edit::Input { node: id, slot: 2, to });
        }
        Ok(())
    }

    /// A MatMul by a matrix, whose bias is the Add after it.
    fn product(&mut self, id: usize, bias: Option<(usize, usize)>, written: &mut Written) -> Result<()> {
        let node = self.graph.node(id);
        let Some((add, slot)) = bias else {
            self.weight(id, Layout::Columns, 1, &[], written)?;
            return Ok(());
        };
        let Some(&rank) = self.calibration.ranks.get(node.arg(0)) else {
            let why = "was never seen; its rank is needed".to_owned();
            return Err(QuantError::Tensor { name: node.arg(0).into(), why });
        };
        let Some((name, values)) = self.bias(id, self.graph.node(add).arg(slot), node.arg(1), Layout::Columns)? else {
            return Ok(());
        };
        let n = values.len();
        if rank == 2 && self.plan.settings.target == Target::OnnxRuntime {
            // Of two dimensions MatMul and Add are a Gemm, and one with an integer bias has an integer kernel.
            let scale = self.params(node.arg(0))?.scale;
            let weight = self.weight(id, Layout::Columns, 1, &least_scales(&values, scale), written)?;
            let (codes, scales) = quantize_bias(&values, scale, &weight);
            let bias = self.dequantized(&name, Codes::Int32(codes), &[n], &scales, 0);
            let input = |slot: usize| {
                let changed = self.edits.iter().rev().find_map(|e| match e {
                    Edit::Input { node, slot: s, to } if *node == id && *s == slot => Some(to.clone()),
                    _ => None,
                });
                changed.unwrap_or_else(|| node.arg(slot).to_owned())
            };
            let inputs = [input(0), input(1)];
            let output = self.graph.node(add).out();
            let gemm = NodeProto::new("Gemm", &label(node), &[&inputs[0], &inputs[1], &bias], &[output]);
            self.edits.extend([Edit::Remove(id), Edit::Remove(add), Edit::Add(gemm)]);
            return Ok(());
        }
        self.weight(id, Layout::Columns, 1, &[], written)?;
        // ONNX Runtime makes a MatMul and an Add of a vector one float Gemm, and the integers are lost. It doesn't where
        // the bias has as many dimensions as the product.
        let name = self.name(&format!("{name}_{rank}d"));
        let dims = [vec![1; rank.saturating_sub(1)], vec![n]].concat();
        let to = self.initializer(from_f32(&name, &dims, &values));
        self.edits.push(Edit::Input { node: add, slot, to });
        Ok(())
    }

    /// A layer's bias with what calibration adds to it, and its name; none if there is neither.
    fn bias(&self, id: usize, name: &str, weight: &str, layout: Layout) -> Result<Option<(String, Vec<f32>)>> {
        let constant = self.graph.constant(name);
        let missing = self.calibration.corrections.get(&label(self.graph.node(id)));
        let mut values = match (constant, missing) {
            (Some(constant), _) => floats(constant)?,
            (None, Some(_)) => {
                let dims = self.graph.constant(weight).map_or(&[][..], |t| &t.dims);
                let axis = usize::from(layout == Layout::Columns);
                vec![0.0; dims.get(axis).map_or(0, |&d| d.max(0) as usize)]
            }
            (None, None) => return Ok(None),
        };
        if let Some(missing) = missing {
            values.iter_mut().zip(missing).for_each(|(bias, add)| *bias += add);
        }
        if let Some(bad) = values.iter().find(|b| !b.is_finite()) {
            return Err(QuantError::Tensor { name: name.into(), why: format!("has a value {bad}") });
        }
        let base = constant.map_or_else(|| format!("{weight}_bias"), |t| t.name().to_owned());
        Ok(Some((base, values)))
    }

    /// Quantizes a layer's weight and lets the layer read it.
    fn weight(&mut self, id: usize, layout: Layout, axis: i64, least: &[f32], written: &mut Written) -> Result<Weight> {
        let node = self.graph.node(id);
        let Some(tensor) = self.graph.constant(node.arg(1)) else {
            return Err(QuantError::Tensor { name: node.arg(1).into(), why: "isn't a constant".into() });
        };
        let importance = self.importance(node, tensor);
        let settings = &self.plan.settings;
        let weight = quantize(tensor, layout, settings.per_channel, settings.algorithm, importance.as_deref(), least)?;
        let key = (tensor.name().to_owned(), axis);
        let to = match written.get(&key) {
            Some((same, name)) if *same == weight => name.clone(),
            _ => {
                let dims: Vec<usize> = tensor.dims.iter().map(|&d| d.max(0) as usize).collect();
                let codes = Codes::Int8(weight.codes.clone());
                let name = self.dequantized(tensor.name(), codes, &dims, &weight.scales, axis);
                written.insert(key, (weight.clone(), name.clone()));
                name
            }
        };
        self.edits.push(Edit::Input { node: id, slot: 1, to });
        Ok(weight)
    }

    /// What an error of each value of a channel costs: the second moment of the input that it meets.
    fn importance(&self, node: &NodeProto, weight: &TensorProto) -> Option<Vec<f32>> {
        let moments = self.calibration.moments.get(node.arg(0))?;
        if !node.is("Conv") {
            return Some(moments.clone());
        }
        let inner: usize = weight.dims[2..].iter().map(|&d| d.max(0) as usize).product();
        (node.int("group", 1) == 1).then(|| moments.iter().flat_map(|&m| std::iter::repeat_n(m, inner)).collect())
    }
}
