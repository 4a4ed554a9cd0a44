//! Layers: integer weights, biases, and the form of a linear layer that runtimes fuse.

use super::{Codes, Writer};
use crate::QuantError;
use crate::error::Result;
use crate::onnx::Edit;
use crate::onnx::graph::label;
use crate::onnx::plan::{Kind, Target};
use crate::onnx::proto::*;
use crate::onnx::tensor::{floats, from_f32};
use crate::onnx::weights::{Layout, Seen, Weight, least_scales, quantize, quantize_bias, rows, transpose};
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
                    let layout = Layout::of(node);
                    self.layer(id, layout, i64::from(layout == Layout::Columns), &mut written)?;
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
        let bias = self.bias(node.arg(2))?;
        let float = self.plan.settings.target == Target::TensorRt;
        let scale = self.params(node.arg(0))?.scale;
        let least = match &bias {
            Some(values) if !float => least_scales(values, scale),
            _ => Vec::new(),
        };
        let weight = self.weight(id, layout, axis, &least, written)?;
        let Some(values) = self.corrected(id, layout, &weight, bias)? else { return Ok(()) };
        let base = match node.arg(2) {
            "" => format!("{}_bias", node.arg(1)),
            name => name.to_owned(),
        };
        let to = match float {
            true => {
                let name = self.name(&format!("{base}_float"));
                self.initializer(from_f32(&name, &[values.len()], &values))
            }
            false => {
                let (codes, scales) = quantize_bias(&values, scale, &weight);
                self.dequantized(&base, Codes::Int32(codes), &[values.len()], &scales, 0)
            }
        };
        self.edits.push(Edit::Input { node: id, slot: 2, to });
        Ok(())
    }

    /// A MatMul by a matrix, whose bias is the Add after it.
    fn product(&mut self, id: usize, bias: Option<(usize, usize)>, written: &mut Written) -> Result<()> {
        let node = self.graph.node(id);
        let fine = self.plan.fine.contains(&id) && self.calibration.ranks.get(node.arg(0)).is_some_and(|&r| r > 2);
        let Some((add, slot)) = bias else {
            self.weight(id, Layout::Columns, 1, &[], written)?;
            return if fine { self.second_term(id) } else { Ok(()) };
        };
        let Some(&rank) = self.calibration.ranks.get(node.arg(0)) else {
            let why = "was never seen; its rank is needed".to_owned();
            return Err(QuantError::Tensor { name: node.arg(0).into(), why });
        };
        let name = self.graph.node(add).arg(slot).to_owned();
        let Some(values) = self.bias(&name)? else { return Ok(()) };
        let n = values.len();
        if rank == 2 && self.plan.settings.target == Target::OnnxRuntime {
            // Of two dimensions MatMul and Add are a Gemm, and one with an integer bias has an integer kernel.
            let scale = self.params(node.arg(0))?.scale;
            let weight = self.weight(id, Layout::Columns, 1, &least_scales(&values, scale), written)?;
            let values = self.corrected(id, Layout::Columns, &weight, Some(values))?.unwrap_or_default();
            let (codes, scales) = quantize_bias(&values, scale, &weight);
            let bias = self.dequantized(&name, Codes::Int32(codes), &[n], &scales, 0);
            let inputs = [self.input(id, 0), self.input(id, 1)];
            let output = self.graph.node(add).out();
            let gemm = NodeProto::new("Gemm", &label(node), &[&inputs[0], &inputs[1], &bias], &[output]);
            self.edits.extend([Edit::Remove(id), Edit::Remove(add), Edit::Add(gemm)]);
            return Ok(());
        }
        let weight = self.weight(id, Layout::Columns, 1, &[], written)?;
        let values = self.corrected(id, Layout::Columns, &weight, Some(values))?.unwrap_or_default();
        // ONNX Runtime makes a MatMul and an Add of a vector one float Gemm, and the integers are lost. It doesn't where
        // the bias has as many dimensions as the product. (A sum of two products needs none for that, but joined with a GELU a
        // vector is slower than by itself.)
        let name = self.name(&format!("{name}_{rank}d"));
        let dims = [vec![1; rank.saturating_sub(1)], vec![n]].concat();
        let to = self.initializer(from_f32(&name, &dims, &values));
        self.edits.push(Edit::Input { node: add, slot, to });
        if fine { self.second_term(id) } else { Ok(()) }
    }

    /// What a node reads after the edits so far.
    pub(super) fn input(&self, id: usize, slot: usize) -> String {
        let changed = self.edits.iter().rev().find_map(|e| match e {
            Edit::Input { node, slot: s, to } if *node == id && *s == slot => Some(to.clone()),
            _ => None,
        });
        changed.unwrap_or_else(|| self.graph.node(id).arg(slot).to_owned())
    }

    /// Adds the product of a MatMul's weight and what the integers of its activations leave of them.
    ///
    /// ```text
    /// x -> Q -> DQ -> MatMul ------------------> Add ->
    /// x - DQ -> Q (a 255th of the step) -> DQ -> MatMul ->|
    /// ```
    fn second_term(&mut self, id: usize) -> Result<()> {
        let node = self.graph.node(id);
        let x = node.arg(0).to_owned();
        let rest = match self.rests.get(&x) {
            Some(rest) => rest.clone(),
            None => {
                let first = self.params(&x)?;
                let (low, high) = self.grid().int.limits();
                let levels = f64::from(high) - f64::from(low);
                let scale = (f64::from(first.scale) / levels).max(f64::from(f32::MIN_POSITIVE)) as f32;
                let rest = self.name(&format!("{x}_rest"));
                let [scale_name, zero_name] = ["scale", "zero_point"].map(|part| self.name(&format!("{rest}_{part}")));
                self.initializer(from_f32(&scale_name, &[], &[scale]));
                let zero = self.zero_point(&zero_name, (low + high + 1) / 2);
                self.initializer(zero);
                let whole = self.input(id, 0);
                self.add(NodeProto::new("Sub", &format!("{rest}_Sub"), &[&x, &whole], &[&rest]));
                let output = self.quantize_tensor(&rest, &[scale_name, zero_name]);
                self.rests.insert(x, output.clone());
                output
            }
        };
        let weight = self.input(id, 1);
        let parts = ["first", "second"].map(|part| self.name(&format!("{}_{part}", node.out())));
        let own = label(node);
        self.edits.push(Edit::Output { node: id, slot: 0, to: parts[0].clone() });
        self.add(NodeProto::new("MatMul", &format!("{own}_rest"), &[&rest, &weight], &[&parts[1]]));
        self.add(NodeProto::new("Add", &format!("{own}_sum"), &[&parts[0], &parts[1]], &[node.out()]));
        Ok(())
    }

    /// A bias's values; none if there is none.
    pub(super) fn bias(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let Some(constant) = self.graph.constant(name) else { return Ok(None) };
        let values = floats(constant)?;
        match values.iter().find(|b| !b.is_finite()) {
            Some(bad) => Err(QuantError::Tensor { name: name.into(), why: format!("has a value {bad}") }),
            None => Ok(Some(values)),
        }
    }

    /// A layer's bias plus what the rounding of its weights takes away on average, where calibration knows the means of
    /// its input.
    pub(super) fn corrected(
        &self,
        id: usize,
        layout: Layout,
        quantized: &Weight,
        bias: Option<Vec<f32>>,
    ) -> Result<Option<Vec<f32>>> {
        let node = self.graph.node(id);
        let (Some(means), Some(tensor)) = (self.calibration.means.get(node.arg(0)), self.graph.constant(node.arg(1)))
        else {
            return Ok(bias);
        };
        let ([n, k], exact) = rows(tensor, layout)?;
        let own = self.calibration.row_means.get(tensor.name()).filter(|own| own.len() == n * k);
        let codes = match layout {
            Layout::Rows => quantized.codes.clone(),
            Layout::Columns => transpose(&quantized.codes, k, n),
        };
        let taps: usize = tensor.dims.iter().skip(2).map(|&d| d.max(1) as usize).product();
        let groups = if node.is("Conv") { node.int("group", 1).max(1) as usize } else { 1 };
        let per_group = k / taps.max(1);
        if means.len() != per_group * groups {
            return Ok(bias);
        }
        let mut values = bias.unwrap_or_else(|| vec![0.0; n]);
        for (row, value) in values.iter_mut().enumerate() {
            let first = row / (n / groups).max(1) * per_group;
            let missing: f64 = (0..k)
                .map(|j| {
                    let rounded = f64::from(codes[row * k + j]) * f64::from(quantized.scale(row));
                    let mean = own.map_or_else(|| means[first + j / taps], |own| own[row * k + j]);
                    (f64::from(exact[row * k + j]) - rounded) * mean
                })
                .sum();
            *value = (f64::from(*value) + missing) as f32;
        }
        Ok(Some(values))
    }

    /// Quantizes a layer's weight and lets the layer read it.
    fn weight(&mut self, id: usize, layout: Layout, axis: i64, least: &[f32], written: &mut Written) -> Result<Weight> {
        let node = self.graph.node(id);
        let Some(tensor) = self.graph.constant(node.arg(1)) else {
            return Err(QuantError::Tensor { name: node.arg(1).into(), why: "isn't a constant".into() });
        };
        let weight = self.quantized(node, tensor, layout, least)?;
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

    /// A layer's weight in integers, with what calibration saw of the layer's input.
    pub(super) fn quantized(
        &self,
        node: &NodeProto,
        tensor: &TensorProto,
        layout: Layout,
        least: &[f32],
    ) -> Result<Weight> {
        let enough = |w: &&Weight| least.iter().enumerate().all(|(c, least)| w.scale(c) >= *least);
        if let Some(known) = self.calibration.weights.get(tensor.name()).filter(enough) {
            return Ok(known.clone());
        }
        let pairs = self.plan.settings.weights.pairs_of(node, tensor, layout);
        let importance = self.importance(node, tensor);
        let seen = Seen {
            importance: importance.as_deref(),
            inputs: self.calibration.inputs_of(&self.graph, node),
            costs: self.costs.get(tensor.name()).map(Vec::as_slice),
        };
        quantize(tensor, layout, self.plan.settings.weights, seen, least, pairs.as_ref())
    }

    /// What an error of each value of a channel costs: the second moment of the input that it meets.
    pub(super) fn importance(&self, node: &NodeProto, weight: &TensorProto) -> Option<Vec<f32>> {
        let moments = self.calibration.moments.get(node.arg(0))?;
        if !node.is("Conv") {
            return Some(moments.clone());
        }
        let inner: usize = weight.dims[2..].iter().map(|&d| d.max(0) as usize).product();
        (node.int("group", 1) == 1).then(|| moments.iter().flat_map(|&m| std::iter::repeat_n(m, inner)).collect())
    }
}
