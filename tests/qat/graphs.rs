//! ONNX graphs as networks: the embedded engine, which knows nothing of candle, computes the same.

use super::{difference, drawn, flat};
use crate::small::{constant, model, node};
use candle_core::{Device, Tensor};
use nibble_models::graph::{self, GraphRunner, Rten, Values};
use nibble_models::qat::net::{Net, OPERATORS};
use nibble_models::qat::quantizer::Mode;
use nibble_quant::onnx::Model;
use nibble_quant::onnx::proto::{AttributeProto, NodeProto, TensorProto};
use nibble_quant::onnx::tensor::{from_f32, from_i64};

/// The first output of both for one input.
fn both(model: &Model, x: &Tensor) -> [Tensor; 2] {
    let ours = Net::float(model).unwrap().forward(x, Mode::Evaluate).unwrap();
    let name = model.graph().input[0].name().to_owned();
    let wanted = [model.graph().output[0].name().to_owned()];
    let feed = graph::Tensor { dims: x.dims().to_vec(), values: Values::Float(flat(x)) };
    let found = Rten::new(model, &wanted, 1).unwrap().run(&[(name, feed)], &wanted).unwrap().remove(0);
    let theirs = Tensor::from_vec(found.as_floats("y").unwrap().to_vec(), found.dims, &Device::Cpu).unwrap();
    [ours, theirs]
}

fn ints(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto::new_ints(name, values)
}

fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto::new_int(name, value)
}

type Case = (Vec<NodeProto>, Vec<TensorProto>, &'static [i64]);

/// A small graph or two for every operator.
fn cases() -> Vec<Case> {
    let list = |name: &str, values: &[i64]| from_i64(name, &[values.len()], values);
    let one = |n: NodeProto| vec![n];
    let unary = |op: &str| node(op, &["x"], "y");
    let picture: &[i64] = &[2, 3, 6, 5];
    let rows: &[i64] = &[2, 4, 6];
    let window = |n: NodeProto| n.with(ints("kernel_shape", &[3, 2])).with(ints("strides", &[2, 1]));
    let mut all: Vec<Case> = ["Relu", "Sigmoid", "Tanh", "Erf", "Exp", "Identity", "HardSwish", "Softmax"]
        .map(|op| (one(unary(op)), vec![], rows))
        .into();
    all.extend([
        (one(unary("HardSigmoid").with(AttributeProto::new_float("alpha", 0.3))), vec![], rows),
        (one(unary("LeakyRelu").with(AttributeProto::new_float("alpha", 0.1))), vec![], rows),
        (one(unary("Flatten")), vec![], rows),
        (one(unary("GlobalAveragePool")), vec![], picture),
        (one(unary("Transpose").with(ints("perm", &[0, 3, 1, 2]))), vec![], picture),
        (one(node("Cast", &["x"], "y").with(int("to", 1))), vec![], rows),
        (vec![node("Exp", &["x"], "e"), node("Sqrt", &["e"], "y")], vec![], rows),
        (one(node("Pow", &["x", "two"], "y")), vec![from_f32("two", &[], &[2.0])], rows),
        (vec![node("Exp", &["x"], "e"), node("Pow", &["e", "p"], "y")], vec![from_f32("p", &[], &[-0.5])], rows),
        (
            one(node("Clip", &["x", "lo", "hi"], "y")),
            vec![from_f32("lo", &[], &[-0.3]), from_f32("hi", &[], &[0.4])],
            rows,
        ),
        (one(node("Add", &["x", "b"], "y")), vec![constant("b", &[6], 1)], rows),
        (one(node("Add", &["b", "x"], "y")), vec![constant("b", &[1, 4, 6], 1)], rows),
        (one(node("Add", &["x", "b"], "y")), vec![constant("b", &[4, 1], 1)], rows),
        (one(node("Add", &["x", "x"], "y")), vec![], rows),
        (one(node("Sub", &["x", "b"], "y")), vec![constant("b", &[6], 1)], rows),
        (one(node("Mul", &["x", "b"], "y")), vec![constant("b", &[4, 1], 1)], rows),
        (vec![node("Exp", &["x"], "e"), node("Div", &["b", "e"], "y")], vec![constant("b", &[6], 1)], rows),
        (one(node("MatMul", &["x", "w"], "y")), vec![constant("w", &[6, 3], 1)], rows),
        (
            vec![node("Transpose", &["x"], "t").with(ints("perm", &[0, 2, 1])), node("MatMul", &["x", "t"], "y")],
            vec![],
            rows,
        ),
        (one(node("Gemm", &["x", "w", "b"], "y")), vec![constant("w", &[6, 3], 1), constant("b", &[3], 2)], &[4, 6]),
        (
            one(node("Gemm", &["x", "w", "b"], "y")
                .with(int("transB", 1))
                .with(int("transA", 1))
                .with(AttributeProto::new_float("alpha", 0.5))
                .with(AttributeProto::new_float("beta", 2.0))),
            vec![constant("w", &[3, 4], 1), constant("b", &[3], 2)],
            &[4, 6],
        ),
        (
            one(window(node("Conv", &["x", "w", "b"], "y"))
                .with(ints("pads", &[1, 0, 0, 1]))
                .with(ints("dilations", &[1, 2]))),
            vec![constant("w", &[4, 3, 3, 2], 1), constant("b", &[4], 2)],
            picture,
        ),
        (
            one(window(node("Conv", &["x", "w"], "y")).with(int("group", 3))),
            vec![constant("w", &[3, 1, 3, 2], 1)],
            picture,
        ),
        (
            one(window(node("Conv", &["x", "w"], "y")).with(AttributeProto {
                name: Some("auto_pad".into()),
                s: Some("SAME_UPPER".into()),
                r#type: Some(3),
                ..Default::default()
            })),
            vec![constant("w", &[4, 3, 3, 2], 1)],
            picture,
        ),
        (one(window(unary("MaxPool")).with(ints("pads", &[1, 0, 1, 1]))), vec![], picture),
        (one(window(unary("AveragePool")).with(ints("pads", &[1, 0, 1, 1]))), vec![], picture),
        (
            one(window(unary("AveragePool")).with(ints("pads", &[1, 0, 1, 1])).with(int("count_include_pad", 1))),
            vec![],
            picture,
        ),
        (one(unary("ReduceMean").with(ints("axes", &[1])).with(int("keepdims", 0))), vec![], rows),
        (one(unary("ReduceMean").with(ints("axes", &[2, 3]))), vec![], picture),
        (
            one(node("LayerNormalization", &["x", "g", "b"], "y").with(AttributeProto::new_float("epsilon", 1e-3))),
            vec![constant("g", &[6], 1), constant("b", &[6], 2)],
            rows,
        ),
        (one(node("Reshape", &["x", "s"], "y")), vec![list("s", &[0, -1, 3])], rows),
        (one(node("Squeeze", &["x", "a"], "y")), vec![list("a", &[1])], &[3, 1, 4]),
        (one(node("Unsqueeze", &["x", "a"], "y")), vec![list("a", &[0, 2])], rows),
        (
            one(node("Slice", &["x", "s", "e", "a"], "y")),
            vec![list("s", &[1, -4]), list("e", &[100, -1]), list("a", &[1, 2])],
            rows,
        ),
        (one(node("Gather", &["x", "i"], "y").with(int("axis", 1))), vec![from_i64("i", &[], &[-1])], rows),
        (one(node("Gather", &["x", "i"], "y").with(int("axis", 2))), vec![list("i", &[3, 0, 3])], rows),
        (one(node("Concat", &["x", "c", "x"], "y").with(int("axis", 1))), vec![constant("c", &[2, 1, 6], 1)], rows),
        (
            // The batch's size from the graph itself: a token for every picture.
            vec![
                node("Shape", &["x"], "shape"),
                node("Gather", &["shape", "zero"], "batch"),
                node("Unsqueeze", &["batch", "first"], "list"),
                node("Concat", &["list", "rest"], "to").with(int("axis", 0)),
                node("Expand", &["token", "to"], "tokens"),
                node("Concat", &["tokens", "x"], "y").with(int("axis", 1)),
            ],
            vec![
                from_i64("zero", &[], &[0]),
                list("first", &[0]),
                list("rest", &[1, 6]),
                constant("token", &[1, 1, 6], 1),
            ],
            rows,
        ),
        (
            one(node("BatchNormalization", &["x", "g", "b", "m", "v"], "y")),
            vec![
                constant("g", &[3], 1),
                constant("b", &[3], 2),
                constant("m", &[3], 3),
                from_f32("v", &[3], &[0.5, 1.0, 2.0]),
            ],
            picture,
        ),
        (
            vec![
                node("Div", &["x", "root"], "d"),
                node("Erf", &["d"], "e"),
                node("Add", &["e", "one"], "s"),
                node("Mul", &["x", "s"], "p"),
                node("Mul", &["p", "half"], "y"),
            ],
            vec![
                from_f32("root", &[], &[std::f32::consts::SQRT_2]),
                from_f32("one", &[], &[1.0]),
                from_f32("half", &[], &[0.5]),
            ],
            rows,
        ),
    ]);
    all
}

#[test]
fn every_operator_is_the_embedded_engines() {
    // rten is built without what Dropout needs, and has no Gelu of this operator set.
    let mut seen: Vec<String> = vec!["Gelu".into(), "Dropout".into()];
    for (seed, (nodes, constants, dims)) in cases().into_iter().enumerate() {
        let ops: Vec<String> = nodes.iter().map(|n| n.op_type().to_owned()).collect();
        let model = model(nodes, constants, ("x", dims), &["y"]);
        let dims: Vec<usize> = dims.iter().map(|&d| d as usize).collect();
        let [ours, theirs] = both(&model, &drawn(seed as u32, &dims).affine(1.5, 0.1).unwrap());
        assert!(difference(&ours, &theirs) < 1e-5, "{ops:?}: {}", difference(&ours, &theirs));
        seen.extend(ops);
    }
    for operator in OPERATORS {
        assert!(seen.iter().any(|s| s == operator.name), "no case has {}", operator.name);
    }
}

/// Operators that the embedded engine lacks.
#[test]
fn gelu_is_candles_in_both_forms_and_dropout_is_nothing() {
    let x = drawn(3, &[4, 7]).affine(3.0, 0.0).unwrap();
    let tanh = AttributeProto {
        name: Some("approximate".into()),
        s: Some("tanh".into()),
        r#type: Some(3),
        ..Default::default()
    };
    for (node, wanted) in [
        (node("Gelu", &["x"], "y"), x.gelu_erf()),
        (node("Gelu", &["x"], "y").with(tanh), x.gelu()),
        (node("Dropout", &["x"], "y"), Ok(x.clone())),
    ] {
        let model = model(vec![node], vec![], ("x", &[4, 7]), &["y"]);
        let found = Net::float(&model).unwrap().forward(&x, Mode::Evaluate).unwrap();
        assert!(difference(&found, &wanted.unwrap()) < 1e-5);
    }
}

#[test]
fn what_can_not_be_trained_is_named() {
    let cases: Vec<(NodeProto, Vec<TensorProto>, &[&str])> = vec![
        (node("Elu", &["x"], "y"), vec![], &["Elu.y", "operator Elu can't be trained", "known: Add"]),
        (node("Softmax", &["x"], "y").with(int("axis", 1)), vec![], &["Softmax.y", "another dimension than the last"]),
        (node("MaxPool", &["x"], "y").with(ints("kernel_shape", &[9, 9])), vec![], &["MaxPool.y", "9"]),
        (
            node("MaxPool", &["x"], "y").with(ints("kernel_shape", &[2])),
            vec![],
            &["MaxPool.y", "a kernel of 1 dimensions"],
        ),
        (
            node("AveragePool", &["x"], "y").with(ints("kernel_shape", &[2, 2])).with(int("ceil_mode", 1)),
            vec![],
            &["AveragePool.y", "ceil_mode"],
        ),
        (node("Conv", &["x", "w"], "y"), vec![constant("w", &[4, 2, 3, 3], 1)], &["Conv.y", "in 1 groups"]),
        (node("MatMul", &["x", "w"], "y"), vec![constant("w", &[9, 2], 1)], &["MatMul.y"]),
        (node("Reshape", &["x", "s"], "y"), vec![from_i64("s", &[2], &[7, -2])], &["Reshape.y", "[7, -2]"]),
        (node("Gather", &["x", "i"], "y"), vec![from_i64("i", &[1], &[5])], &["Gather.y", "index 5 of 2"]),
        (node("ReduceMean", &["x"], "y").with(ints("axes", &[7])), vec![], &["ReduceMean.y", "axis 7 of 4"]),
        (node("Concat", &["x", "x"], "y").with(int("axis", -9)), vec![], &["Concat.y", "axis -9"]),
    ];
    for (node, constants, says) in cases {
        let model = model(vec![node], constants, ("x", &[2, 3, 4, 4]), &["y"]);
        let ended = Net::float(&model).and_then(|mut net| net.forward(&drawn(1, &[2, 3, 4, 4]), Mode::Evaluate));
        let error = ended.unwrap_err().to_string();
        assert!(says.iter().all(|s| error.contains(s)), "{error}");
    }
}

/// A layer norm in nine nodes, over the last dimension of x.
fn layer_norm_written_out(output: &str) -> (Vec<NodeProto>, Vec<TensorProto>) {
    let nodes = vec![
        node("ReduceMean", &["x"], "mean").with(ints("axes", &[-1])),
        node("Sub", &["x", "mean"], "centred"),
        node("Pow", &["centred", "two"], "squares"),
        node("ReduceMean", &["squares"], "variance").with(ints("axes", &[-1])),
        node("Add", &["variance", "epsilon"], "sum"),
        node("Sqrt", &["sum"], "deviation"),
        node("Div", &["centred", "deviation"], "normal"),
        node("Mul", &["normal", "gain"], "scaled"),
        node("Add", &["scaled", "offset"], output),
    ];
    let constants = vec![
        from_f32("two", &[], &[2.0]),
        from_f32("epsilon", &[], &[1e-3]),
        constant("gain", &[6], 3),
        constant("offset", &[6], 4),
    ];
    (nodes, constants)
}

#[test]
fn a_layer_norm_written_out_is_one_with_its_own_epsilon() {
    let (nodes, constants) = layer_norm_written_out("y");
    let written = model(nodes, constants, ("x", &[2, 4, 6]), &["y"]);
    // Small values: another epsilon would show.
    let x = drawn(5, &[2, 4, 6]).affine(0.03, 0.0).unwrap();
    let [ours, theirs] = both(&written, &x);
    assert!(difference(&ours, &theirs) < 1e-5);
    let net = Net::float(&written).unwrap();
    let names: Vec<&String> = net.parameters().keys().collect();
    assert_eq!(names, ["gain", "offset"], "the numbers of the formula aren't learned");
}

#[test]
fn what_an_operator_makes_of_constants_needs_no_gradient() {
    // A table of 2 x 2 places stretched to 4 x 4: no operator that can be trained.
    let nodes = vec![node("Resize", &["table", "", "", "sizes"], "places"), node("Add", &["x", "places"], "y")];
    let constants = vec![constant("table", &[1, 3, 2, 2], 2), from_i64("sizes", &[4], &[1, 3, 4, 4])];
    let model = model(nodes, constants, ("x", &[2, 3, 4, 4]), &["y"]);
    let [ours, theirs] = both(&model, &drawn(1, &[2, 3, 4, 4]));
    assert!(difference(&ours, &theirs) < 1e-6);
    assert!(Net::float(&model).unwrap().parameters().is_empty(), "the table is a constant");
    assert_eq!(OPERATORS.iter().filter(|o| o.name == "Resize").count(), 0);
}

#[test]
fn a_graph_of_one_sample_takes_several_where_that_is_the_same() {
    let token = || vec![constant("token", &[1, 1, 6], 2), from_i64("flat", &[3], &[1, 5, 6])];
    let joined = || node("Concat", &["token", "rows"], "all").with(int("axis", 1));
    let reshaped = |to: &'static str| node("Reshape", &["x", to], "rows");
    let summed = node("ReduceMean", &["all"], "y").with(ints("axes", &[1]));
    let whole = model(vec![reshaped("flat"), joined(), summed.clone()], token(), ("x", &[1, 6, 5]), &["y"]);
    let mut net = Net::float(&whole).unwrap();
    assert_eq!(net.together(4), 4);
    let x = drawn(3, &[4, 6, 5]);
    let all = net.forward(&x, Mode::Evaluate).unwrap();
    for i in 0..4 {
        let one = net.forward(&x.narrow(0, i, 1).unwrap(), Mode::Evaluate).unwrap();
        assert!(difference(&all.narrow(0, i, 1).unwrap(), &one) < 1e-6, "sample {i}");
    }
    // Samples would be mixed, or the shape doesn't fit more than one: one at a time.
    let mixed =
        model(vec![node("ReduceMean", &["x"], "y").with(ints("axes", &[0]))], vec![], ("x", &[1, 6, 5]), &["y"]);
    let bare = model(vec![reshaped("bare")], vec![from_i64("bare", &[2], &[5, 6])], ("x", &[1, 6, 5]), &["rows"]);
    for model in [mixed, bare] {
        assert_eq!(Net::float(&model).unwrap().together(4), 1);
    }
    // Any number is any number.
    let open = model(vec![node("Relu", &["x"], "y")], vec![], ("x", &[-1, 6]), &["y"]);
    assert_eq!(Net::float(&open).unwrap().together(4), 4);
}
