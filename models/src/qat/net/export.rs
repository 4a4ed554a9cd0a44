//! What was trained, written back into the model.

use super::Net;
use crate::qat::ops::{Axis, BatchStatistics, lend};
use crate::qat::quantizer::WeightQuantizer;
use crate::{ModelError, Result};
use candle_core::Tensor;
use nibble_quant::observer::QParams;
use nibble_quant::onnx::Model;
use nibble_quant::onnx::proto::*;
use nibble_quant::onnx::tensor::{from_f32, from_i8, from_i32, from_u8};
use nibble_quant::onnx::weights::{Weight, quantize_bias};
use std::collections::{HashMap, HashSet};

fn refuse(what: &str, why: impl ToString) -> ModelError {
    ModelError::Graph { what: what.into(), why: why.to_string() }
}

fn values(tensor: &Tensor, name: &str) -> Result<Vec<f32>> {
    let values = lend(tensor, |v| Ok(v.to_vec())).map_err(|e| refuse(name, e))?;
    match values.iter().find(|v| !v.is_finite()) {
        Some(bad) => Err(refuse(name, format!("has a value {bad} after training"))),
        None => Ok(values),
    }
}

/// Codes of a weight under its scales, as QuantizeLinear rounds.
fn codes(quantizer: &WeightQuantizer, weight: &[f32]) -> Result<Weight> {
    let scales = values(quantizer.scale.as_tensor(), &quantizer.initializers[1])?;
    let (n, row) = (scales.len().max(1), (weight.len() / scales.len().max(1)).max(1));
    let code = |(i, &w): (usize, &f32)| {
        let channel = if quantizer.axis == Axis::Last { i % n } else { i / row };
        quantizer.grid.quantize(QParams { scale: scales[channel.min(n - 1)], zero_point: 0 }, w) as i8
    };
    Ok(Weight { codes: weight.iter().enumerate().map(code).collect(), channels: n, scales })
}

impl Net {
    /// The model with what was learned: float parameters, running statistics, codes and scales.
    ///
    /// # Errors
    /// A value that isn't finite, by name.
    pub fn export(&self) -> Result<Model> {
        let mut new: HashMap<String, TensorProto> = HashMap::new();
        let mut add = |tensor: TensorProto| drop(new.insert(tensor.name().to_owned(), tensor));
        let mut floats: HashMap<&str, Vec<f32>> = HashMap::new();
        for (name, var) in &self.parameters {
            let found = values(var.as_tensor(), name)?;
            add(from_f32(name, var.dims(), &found));
            floats.insert(name, found);
        }
        for (renorm, [weight, bias]) in self.renorms.iter().zip(self.folded()?) {
            for (name, tensor) in
                [(&self.weights[renorm.weight].parameter, weight), (&self.biases[renorm.bias].parameter, bias)]
            {
                floats.insert(name, values(&tensor, name)?);
            }
        }
        let of = |name: &str| floats.get(name).ok_or_else(|| refuse(name, "isn't a parameter"));
        for norm in &self.norms {
            let BatchStatistics { means, variances, .. } = &norm.running;
            add(from_f32(&norm.initializers[0], &[means.len()], means));
            add(from_f32(&norm.initializers[1], &[variances.len()], variances));
        }
        for activation in &self.activations {
            let QParams { scale, zero_point } = activation.params()?;
            add(from_f32(&activation.initializers[0], &[], &[scale]));
            add(from_u8(&activation.initializers[1], &[], &[zero_point as u8]));
        }
        let mut weights = Vec::with_capacity(self.weights.len());
        for quantizer in &self.weights {
            let weight = codes(quantizer, of(&quantizer.parameter)?)?;
            let dims = self.parameters.get(&quantizer.parameter).map(|v| v.dims().to_vec()).unwrap_or_default();
            add(from_i8(&quantizer.initializers[0], &dims, &weight.codes));
            add(scales(&quantizer.initializers[1], &weight.scales));
            weights.push(weight);
        }
        for bias in &self.biases {
            let [input, weight] = bias.layer;
            let scale = self.activations[input].params()?.scale;
            let (codes, of_bias) = quantize_bias(of(&bias.parameter)?, scale, &weights[weight]);
            add(from_i32(&bias.initializers[0], &[codes.len()], &codes));
            add(scales(&bias.initializers[1], &of_bias));
        }
        let mut model = self.model.clone();
        for initializer in &mut model.graph_mut().initializer {
            if let Some(tensor) = new.remove(initializer.name()) {
                *initializer = tensor;
            }
        }
        if self.is_quantized() {
            slim(model.graph_mut());
        }
        Ok(model)
    }
}

fn scales(name: &str, values: &[f32]) -> TensorProto {
    let along = [values.len()];
    from_f32(name, if values.len() == 1 { &[] } else { &along }, values)
}

/// Zero points of weights and biases are 0, which is what they are where they are left out: of a small model they are a
/// good part of the file. Those of a Gemm stay, as ONNX Runtime has no integer kernel for one without.
fn slim(graph: &mut GraphProto) {
    let integers: HashSet<String> = graph
        .initializer
        .iter()
        .filter(|t| matches!(t.data_type(), DataType::Int8 | DataType::Int32))
        .map(|t| t.name().to_owned())
        .collect();
    let of_gemms: HashSet<String> =
        graph.node.iter().filter(|n| n.is("Gemm")).flat_map(|n| n.input.iter().cloned()).collect();
    let mut gone: HashSet<String> = HashSet::new();
    for node in graph.node.iter_mut().filter(|n| n.is("DequantizeLinear") && !of_gemms.contains(n.out())) {
        if integers.contains(node.arg(0)) && node.input.len() == 3 && integers.contains(node.arg(2)) {
            gone.extend(node.input.pop());
        }
    }
    graph.initializer.retain(|t| !gone.contains(t.name()));
}
