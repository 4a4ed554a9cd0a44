//! A quantized graph in the operators that rten computes fast. It multiplies what DequantizeLinear makes of integers in
//! floats; the same products in integers are exact, and take a third of the time where a processor has instructions for
//! them.
//!
//! ```text
//! MatMul(DequantizeLinear(x), DequantizeLinear(w))   ->   MatMulInteger(x, w) as floats * (scale of x * scales of w)
//! QuantizeLinear(x)                                  ->   clamp(x / s + 1.5 * 2^23 - (1.5 * 2^23 - z), 0, 255) as uint8
//! ```
//! Floats from 2^23 on are whole: adding such a number rounds to the nearest even one, as QuantizeLinear does. It divides, and so is
//! divided here: a product with the reciprocal may fall to the other side of a tie.

use crate::Result;
use nibble_quant::onnx::graph::fresh;
use nibble_quant::onnx::proto::{AttributeProto, DataType, NodeProto, TensorProto};
use nibble_quant::onnx::tensor::{floats, from_f32, ints, scalar};
use nibble_quant::onnx::{Edit, Graph, Model, apply};
use std::collections::BTreeSet;

/// 1.5 * 2^23.
const WHOLE: f32 = 12_582_912.0;

/// Whether rten multiplies bytes exactly: without these instructions it adds up pairs in 16 bits, which overflow.
pub(super) fn exact() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::is_x86_feature_detected!("avx512vnni") && std::is_x86_feature_detected!("avx512vl");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// The model with these operators; every tensor that it had goes by its name.
///
/// # Errors
/// A graph that is none, or constants whose bytes don't fit their shape.
pub(super) fn spelled_out(model: &Model) -> Result<Model> {
    let graph = Graph::new(model.graph())?;
    let mut names = graph.names();
    let mut edits = Vec::new();
    for (id, node) in graph.nodes() {
        let spelled = match node.op_type() {
            "QuantizeLinear" => quantize(&graph, node, &mut names)?,
            "MatMul" => product(&graph, node, &mut names)?,
            _ => continue,
        };
        if let Some(spelled) = spelled {
            edits.push(Edit::Remove(id));
            edits.extend(spelled);
        }
    }
    let mut model = model.clone();
    apply(model.graph_mut(), edits)?;
    Ok(model)
}

/// A constant of unsigned bytes, as `wanted` of its number.
fn byte(graph: &Graph, name: &str) -> Result<Option<i64>> {
    match graph.constant(name).filter(|t| t.data_type() == DataType::Uint8) {
        Some(tensor) => Ok(match ints(tensor)?.as_slice() {
            &[one] => Some(one),
            _ => None,
        }),
        None => Ok(None),
    }
}

fn single(tensor: Option<&TensorProto>) -> Result<Option<f32>> {
    let Some(tensor) = tensor.filter(|t| t.dims.iter().all(|&d| d == 1)) else { return Ok(None) };
    Ok(Some(scalar(tensor)?))
}

fn cast(name: &str, from: &str, to: &str, ty: DataType) -> NodeProto {
    NodeProto::new("Cast", name, &[from], &[to]).with(AttributeProto::new_int("to", ty as i64))
}

fn quantize(graph: &Graph, node: &NodeProto, names: &mut BTreeSet<String>) -> Result<Option<Vec<Edit>>> {
    let (Some(scale), Some(zero)) = (single(graph.constant(node.arg(1)))?, byte(graph, node.arg(2))?) else {
        return Ok(None);
    };
    let out = node.out();
    let mut edits = Vec::new();
    let mut last = node.arg(0).to_owned();
    let constants: [(&str, &[f32]); 4] =
        [("Div", &[scale]), ("Add", &[WHOLE]), ("Sub", &[WHOLE - zero as f32]), ("Clip", &[0.0, 255.0])];
    for (op, values) in constants {
        let mut inputs = vec![last];
        for &value in values {
            let name = fresh(names, &format!("{out}_{op}"));
            edits.push(Edit::Initializer(from_f32(&name, &[], &[value])));
            inputs.push(name);
        }
        last = fresh(names, &format!("{out}_{op}_Output"));
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        edits.push(Edit::Add(NodeProto::new(op, &last, &inputs, &[&last])));
    }
    edits.push(Edit::Add(cast(&format!("{out}_Cast"), &last, out, DataType::Uint8)));
    Ok(Some(edits))
}

fn product(graph: &Graph, node: &NodeProto, names: &mut BTreeSet<String>) -> Result<Option<Vec<Edit>>> {
    let made = |slot: usize| {
        let id = graph.producer(node.arg(slot))?;
        Some(graph.node(id)).filter(|n| n.is("DequantizeLinear"))
    };
    let (Some(x), Some(w)) = (made(0), made(1)) else { return Ok(None) };
    let (Some(scale), Some(_)) = (single(graph.constant(x.arg(1)))?, byte(graph, x.arg(2))?) else { return Ok(None) };
    let weight = graph.constant(w.arg(0)).filter(|t| t.data_type() == DataType::Int8 && t.dims.len() == 2);
    let (Some(weight), Some(scales)) = (weight, graph.constant(w.arg(1))) else { return Ok(None) };
    // A scale a column, or one: along the other side sums can't be taken before scales are.
    let columns = weight.dims.get(1).copied().unwrap_or_default();
    let by_column = scales.dims == [columns] && matches!(w.int("axis", 1), 1 | -1);
    if !(by_column || scales.dims.is_empty()) || w.arg(2).is_empty() || w.attr("block_size").is_some() {
        return Ok(None);
    }
    let both: Vec<f32> = floats(scales)?.iter().map(|s| s * scale).collect();
    let dims: Vec<usize> = if scales.dims.is_empty() { vec![] } else { vec![both.len()] };
    let out = node.out();
    let [scale, sums, as_floats] = ["scale", "sums", "floats"].map(|part| fresh(names, &format!("{out}_{part}")));
    Ok(Some(vec![
        Edit::Initializer(from_f32(&scale, &dims, &both)),
        Edit::Add(NodeProto::new("MatMulInteger", &sums, &[x.arg(0), w.arg(0), x.arg(2), w.arg(2)], &[&sums])),
        Edit::Add(cast(&as_floats, &sums, &as_floats, DataType::Float)),
        Edit::Add(NodeProto::new("Mul", &format!("{out}_scaled"), &[&as_floats, &scale], &[out])),
    ]))
}
