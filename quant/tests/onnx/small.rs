//! Small models.

use nibble_quant::onnx::proto::*;
use nibble_quant::onnx::tensor::from_f32;
use nibble_quant::onnx::{Graph, Model};

pub fn value(name: &str, dims: &[i64]) -> ValueInfoProto {
    let dim = |&d: &i64| Dimension { value: Some(DimensionValue::Value(d)), denotation: None };
    let shape = TensorShapeProto { dim: dims.iter().map(dim).collect() };
    let tensor = TensorType { elem_type: Some(DataType::Float as i32), shape: Some(shape) };
    ValueInfoProto {
        name: Some(name.into()),
        r#type: Some(TypeProto { value: Some(TypeValue::Tensor(tensor)), denotation: None }),
        ..Default::default()
    }
}

/// Numbers that look random and repeat.
pub fn numbers(seed: u32, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 * 2.0 - 1.0
        })
        .collect()
}

/// A model of opset 17 from nodes, constants, one input and outputs.
pub fn model(nodes: Vec<NodeProto>, constants: Vec<TensorProto>, input: (&str, &[i64]), outputs: &[&str]) -> Model {
    let graph = GraphProto {
        name: Some("small".into()),
        node: nodes,
        initializer: constants,
        input: vec![value(input.0, input.1)],
        output: outputs.iter().map(|n| ValueInfoProto { name: Some((*n).into()), ..Default::default() }).collect(),
        ..Default::default()
    };
    let mut model = Model::default();
    model.proto.ir_version = Some(8);
    model.proto.graph = Some(graph);
    model.import("", 17);
    Graph::new(model.graph()).unwrap();
    model
}

pub fn node(op: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto::new(op, &format!("{op}.{output}"), inputs, &[output])
}

pub fn constant(name: &str, dims: &[usize], seed: u32) -> TensorProto {
    from_f32(name, dims, &numbers(seed, dims.iter().product()))
}
