//! An interpreter for channels: enough ONNX to check that a rewrite leaves the function as it was.

use nibble_quant::onnx::Model;
use nibble_quant::onnx::proto::*;
use nibble_quant::onnx::tensor::{floats, ints};
use std::collections::HashMap;

pub fn ops(model: &Model) -> Vec<&str> {
    model.graph().node.iter().map(|n| n.op_type()).collect()
}

/// Runs a graph whose tensors are one number a channel: kernels of one tap, one position. Integers of
/// QuantizeLinear are what they stand for.
pub fn run(model: &Model, input: &[f64]) -> HashMap<String, Vec<f64>> {
    let graph = model.graph();
    let mut values: HashMap<String, Vec<f64>> = HashMap::new();
    for t in &graph.initializer {
        let numbers = match t.data_type().is_float() {
            true => floats(t).unwrap().into_iter().map(f64::from).collect(),
            false => ints(t).unwrap().into_iter().map(|v| v as f64).collect(),
        };
        values.insert(t.name().into(), numbers);
    }
    values.insert(graph.input[0].name().into(), input.to_vec());
    let dims =
        |name: &str| graph.initializer.iter().find(|t| t.name() == name).map(|t| t.dims.clone()).unwrap_or_default();
    for node in &graph.node {
        let v = |slot: usize| values.get(node.arg(slot)).cloned().unwrap_or_default();
        let pair = |f: fn(f64, f64) -> f64| {
            let (a, b) = (v(0), v(1));
            let n = a.len().max(b.len());
            (0..n).map(|i| f(a[i % a.len()], b[i % b.len()])).collect::<Vec<f64>>()
        };
        // (rows, k) of a weight, as rows over inputs.
        let product = |w: &[f64], n: usize, x: &[f64], at: &dyn Fn(usize, usize) -> usize| {
            (0..n).map(|o| x.iter().enumerate().map(|(i, x)| x * w[at(o, i)]).sum()).collect::<Vec<f64>>()
        };
        let x = v(0);
        let mut out = match node.op_type() {
            "Identity" | "Dropout" | "Cast" | "Flatten" | "Reshape" | "GlobalAveragePool" => x,
            "Relu" => x.iter().map(|v| v.max(0.0)).collect(),
            "Clip" => x.iter().map(|c| c.clamp(v(1)[0], v(2)[0])).collect(),
            "Add" => pair(|a, b| a + b),
            "Sub" => pair(|a, b| a - b),
            "Mul" => pair(|a, b| a * b),
            "Div" => pair(|a, b| a / b),
            "BatchNormalization" => {
                let e = f64::from(node.float("epsilon", 1e-5));
                (0..x.len()).map(|c| v(1)[c] * (x[c] - v(3)[c]) / (v(4)[c] + e).sqrt() + v(2)[c]).collect()
            }
            "Conv" => {
                let (n, groups) = (
                    dims(node.arg(1)).first().map_or(v(1).len() / x.len(), |&d| d as usize),
                    node.int("group", 1) as usize,
                );
                let (per, out) = (x.len() / groups, n / groups);
                (0..n).map(|o| (0..per).map(|i| x[o / out * per + i] * v(1)[o * per + i]).sum()).collect()
            }
            "ConvTranspose" => {
                let groups = node.int("group", 1) as usize;
                let per_out = dims(node.arg(1))[1] as usize;
                let per_in = x.len() / groups;
                let w = v(1);
                (0..per_out * groups)
                    .map(|o| {
                        (0..per_in)
                            .map(|i| {
                                x[o / per_out * per_in + i] * w[(o / per_out * per_in + i) * per_out + o % per_out]
                            })
                            .sum()
                    })
                    .collect()
            }
            "Gemm" => {
                let (w, k) = (v(1), x.len());
                let n = w.len() / k;
                match node.int("transB", 0) {
                    0 => product(&w, n, &x, &|o, i| i * n + o),
                    _ => product(&w, n, &x, &|o, i| o * k + i),
                }
            }
            "MatMul" => {
                let (w, k) = (v(1), x.len());
                let n = w.len() / k;
                product(&w, n, &x, &|o, i| i * n + o)
            }
            "QuantizeLinear" => {
                let (low, high) =
                    match graph.initializer.iter().find(|t| t.name() == node.arg(2)).map(|t| t.data_type()) {
                        Some(DataType::Uint8) => (0.0, 255.0),
                        _ => (-128.0, 127.0),
                    };
                x.iter().map(|x| ((x / v(1)[0]).round_ties_even() + v(2)[0]).clamp(low, high)).collect()
            }
            "DequantizeLinear" => {
                let (scale, zero) = (v(1), v(2));
                let axis = node.int("axis", 1) as usize;
                let shape = dims(node.arg(0));
                let inner: usize = shape.iter().skip(axis + 1).map(|&d| d as usize).product();
                let at = |i: usize| if scale.len() == 1 { 0 } else { i / inner % scale.len() };
                x.iter().enumerate().map(|(i, q)| (q - zero[at(i)]) * scale[at(i)]).collect()
            }
            other => panic!("the interpreter has no {other}"),
        };
        if matches!(node.op_type(), "Conv" | "ConvTranspose" | "Gemm") && !node.arg(2).is_empty() {
            let bias = v(2);
            out.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
        values.insert(node.out().into(), out);
    }
    values
}
