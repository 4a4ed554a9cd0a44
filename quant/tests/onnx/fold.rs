//! Folding leaves the function as it was, and says where every node went.

use crate::interpreter::{ops, run};
use crate::small::{constant, model, node, numbers, value};
use nibble_quant::onnx::fold::{Computed, fold, freeze};
use nibble_quant::onnx::proto::*;
use nibble_quant::onnx::tensor::{from_f32, from_i64};
use nibble_quant::onnx::{Graph, Model};
use std::collections::BTreeMap;

const N: usize = 6;

fn norm_parts() -> Vec<TensorProto> {
    let variance: Vec<f32> = numbers(4, N).iter().map(|v| v.abs() + 0.01).collect();
    vec![constant("g", &[N], 1), constant("o", &[N], 2), constant("m", &[N], 3), from_f32("v", &[N], &variance)]
}

fn norm(input: &str, output: &str) -> NodeProto {
    node("BatchNormalization", &[input, "g", "o", "m", "v"], output).with(AttributeProto::new_float("epsilon", 1e-3))
}

/// A layer's name, nodes, constants, and the shape of its input.
type Layer = (&'static str, Vec<NodeProto>, Vec<TensorProto>, Vec<i64>);

/// Layers by name, each from `x` to `y` with weights `w` and, if wanted, a bias `b`.
fn layers(bias: bool) -> Vec<Layer> {
    let inputs: &[&str] = if bias { &["x", "w", "b"] } else { &["x", "w"] };
    let b = || if bias { vec![constant("b", &[N], 9)] } else { Vec::new() };
    let with = |w: TensorProto| [vec![w], b()].concat();
    let group = |n: i64| AttributeProto::new_int("group", n);
    let map = vec![1, N as i64, 1, 1];
    let mut all = vec![
        ("conv", vec![node("Conv", inputs, "y")], with(constant("w", &[N, N, 1, 1], 5)), map.clone()),
        (
            "grouped",
            vec![node("Conv", inputs, "y").with(group(2))],
            with(constant("w", &[N, N / 2, 1, 1], 5)),
            map.clone(),
        ),
        (
            "depthwise",
            vec![node("Conv", inputs, "y").with(group(N as i64))],
            with(constant("w", &[N, 1, 1, 1], 5)),
            map.clone(),
        ),
        ("transposed", vec![node("ConvTranspose", inputs, "y")], with(constant("w", &[N, N, 1, 1], 5)), map.clone()),
        (
            "transposed grouped",
            vec![node("ConvTranspose", inputs, "y").with(group(3))],
            with(constant("w", &[N, N / 3, 1, 1], 5)),
            map,
        ),
        ("gemm", vec![node("Gemm", inputs, "y")], with(constant("w", &[N, N], 5)), vec![1, N as i64]),
        (
            "gemm transB",
            vec![node("Gemm", inputs, "y").with(AttributeProto::new_int("transB", 1))],
            with(constant("w", &[N, N], 5)),
            vec![1, N as i64],
        ),
    ];
    let product = match bias {
        true => vec![node("MatMul", &["x", "w"], "p"), node("Add", &["b", "p"], "y")],
        false => vec![node("MatMul", &["x", "w"], "y")],
    };
    all.push(("matmul", product, with(constant("w", &[N, N], 5)), vec![1, 2, N as i64]));
    all
}

#[test]
fn gains_and_offsets_go_into_every_kind_of_layer() {
    let after: Vec<(&str, NodeProto, bool)> = vec![
        ("norm", norm("y", "z"), true),
        ("mul", node("Mul", &["y", "c"], "z"), false),
        ("mul from the left", node("Mul", &["c", "y"], "z"), false),
        ("div", node("Div", &["y", "c"], "z"), false),
        ("add", node("Add", &["c", "y"], "z"), false),
        ("sub", node("Sub", &["y", "c"], "z"), false),
    ];
    for bias in [false, true] {
        for (name, nodes, weights, dims) in layers(bias) {
            for (then, next, is_norm) in &after {
                let matmul = name == "matmul";
                let maps = dims.len() == 4;
                if matmul && *is_norm {
                    continue;
                }
                let shape: &[usize] = if maps { &[N, 1, 1] } else { &[N] };
                let constants = [weights.clone(), norm_parts(), vec![constant("c", shape, 7)]].concat();
                let mut folded = model([nodes.clone(), vec![next.clone()]].concat(), constants, ("x", &dims), &["z"]);
                let x: Vec<f64> = numbers(11, N).into_iter().map(f64::from).collect();
                let wanted = run(&folded, &x)["z"].clone();
                let map = fold(&mut folded, None).unwrap();
                let found = run(&folded, &x)["z"].clone();
                // One rounding to f32 a weight, of sums of N + 1 terms.
                let bound = wanted.iter().fold(1.0, |m: f64, v| m.max(v.abs())) * 32.0 * f64::from(f32::EPSILON);
                for (w, f) in wanted.iter().zip(&found) {
                    assert!((w - f).abs() <= bound, "{name}, {then}, bias {bias}: {w} became {f}");
                }
                // The bias of a MatMul is an Add, so that an offset stays one.
                let left = if matmul && (bias || matches!(*then, "add" | "sub")) { 2 } else { 1 };
                if matmul && !bias && *then == "sub" {
                    continue;
                }
                assert_eq!(ops(&folded).len(), left, "{name}, {then}, bias {bias}: {:?}", ops(&folded));
                if left == 1 {
                    assert_eq!(map.survivor(next.name()), Some(folded.graph().node[0].name()));
                }
            }
        }
    }
}

#[test]
fn what_others_read_is_not_folded() {
    let conv = || node("Conv", &["x", "w"], "y");
    let weight = || constant("w", &[N, N, 1, 1], 5);
    let c = || constant("c", &[N, 1, 1], 7);
    let dims = [1, N as i64, 1, 1];
    // Also an output; read twice; a constant divided by it; a factor for each pixel.
    let cases = [
        model(vec![conv(), node("Mul", &["y", "c"], "z")], vec![weight(), c()], ("x", &dims), &["z", "y"]),
        model(
            vec![conv(), node("Mul", &["y", "c"], "z"), node("Relu", &["y"], "r")],
            vec![weight(), c()],
            ("x", &dims),
            &["z", "r"],
        ),
        model(vec![conv(), node("Div", &["c", "y"], "z")], vec![weight(), c()], ("x", &dims), &["z"]),
        model(
            vec![conv(), node("Mul", &["y", "c"], "z")],
            vec![weight(), constant("c", &[N, 2, 2], 7)],
            ("x", &dims),
            &["z"],
        ),
        model(
            vec![conv(), node("Mul", &["y", "c"], "z")],
            vec![weight(), constant("c", &[1, 1, 1, 1, 1], 7)],
            ("x", &dims),
            &["z"],
        ),
    ];
    for mut case in cases {
        let before = case.proto.clone();
        fold(&mut case, None).unwrap();
        assert_eq!(case.proto, before);
    }
}

#[test]
fn a_weight_that_two_layers_share_is_changed_for_one() {
    let nodes = vec![node("Conv", &["x", "w"], "a"), node("Mul", &["a", "c"], "b"), node("Conv", &["b", "w"], "z")];
    let constants = vec![constant("w", &[N, N, 1, 1], 5), constant("c", &[N, 1, 1], 7)];
    let mut folded = model(nodes, constants, ("x", &[1, N as i64, 1, 1]), &["z"]);
    let x: Vec<f64> = numbers(11, N).into_iter().map(f64::from).collect();
    let wanted = run(&folded, &x)["z"].clone();
    fold(&mut folded, None).unwrap();
    assert_eq!(ops(&folded), ["Conv", "Conv"]);
    assert_eq!(folded.graph().node[1].arg(1), "w");
    for (w, f) in wanted.iter().zip(&run(&folded, &x)["z"]) {
        assert!((w - f).abs() < 1e-5);
    }
}

#[test]
fn nodes_that_do_nothing_go_and_outputs_keep_their_names() {
    let cast = |to: DataType| node("Cast", &["i"], "c").with(AttributeProto::new_int("to", to as i64));
    let nodes = vec![
        node("Relu", &["x"], "r"),
        node("Identity", &["r"], "i"),
        cast(DataType::Float),
        node("Dropout", &["c"], "d"),
        node("Relu", &["d"], "e"),
        node("Identity", &["e"], "out"),
        node("Identity", &["x"], "same"),
    ];
    let mut folded = model(nodes, vec![], ("x", &[1, 4]), &["out", "same"]);
    folded.graph_mut().value_info.push(value("i", &[1, 4]));
    let map = fold(&mut folded, None).unwrap();
    // An input can't be renamed to an output, so that the last Identity stays.
    assert_eq!(ops(&folded), ["Relu", "Relu", "Identity"]);
    assert_eq!(folded.graph().node[1].out(), "out");
    assert_eq!(map.survivor("Dropout.d"), Some("Relu.r"));
    assert_eq!(map.survivor("Relu.e"), Some("Relu.e"));
}

#[test]
fn constant_nodes_become_initializers_and_unused_ones_go() {
    let with = |name: &str, a: AttributeProto| NodeProto::new("Constant", name, &[], &[name]).with(a);
    let tensor = AttributeProto {
        name: Some("value".into()),
        t: Some(from_f32("", &[2], &[1.0, 2.0])),
        r#type: Some(AttributeType::Tensor as i32),
        ..Default::default()
    };
    let nodes = vec![
        with("a", tensor),
        with("b", AttributeProto::new_float("value_float", 3.0)),
        with("unused", AttributeProto::new_int("value_int", 1)),
        node("Add", &["x", "a"], "y"),
        node("Mul", &["y", "b"], "z"),
        node("Relu", &["y"], "nobody"),
    ];
    let mut folded = model(nodes, vec![], ("x", &[1, 2]), &["z"]);
    fold(&mut folded, None).unwrap();
    assert_eq!(ops(&folded), ["Add", "Mul"]);
    let names: Vec<&str> = folded.graph().initializer.iter().map(|t| t.name()).collect();
    assert_eq!(names, ["a", "b"]);
    assert_eq!(run(&folded, &[1.0, 1.0])["z"], [6.0, 9.0]);
}

/// A reshape whose shape is computed from the input's, as exporters write it.
fn reshaping(dims: &[i64]) -> Model {
    let nodes = vec![
        node("Shape", &["x"], "s"),
        node("Gather", &["s", "zero"], "batch"),
        node("Concat", &["batch", "rest"], "shape"),
        node("Reshape", &["x", "shape"], "y"),
    ];
    model(nodes, vec![from_i64("zero", &[1], &[0]), from_i64("rest", &[1], &[-1])], ("x", dims), &["y"])
}

#[test]
fn shapes_that_are_fixed_are_computed_once_and_open_ones_are_left() {
    let mut asked = Vec::new();
    let mut evaluate = |_: &Model, wanted: &[String]| {
        asked.extend(wanted.iter().cloned());
        Ok(wanted.iter().map(|_| Computed::Ints { dims: vec![2], values: vec![3, -1] }).collect())
    };
    let mut fixed = reshaping(&[3, 4, 5]);
    let folded = fold(&mut fixed, Some(&mut evaluate)).unwrap();
    assert_eq!(ops(&fixed), ["Reshape"]);
    assert_eq!(folded.constants, 1);
    let shape = fixed.graph().initializer.iter().find(|t| t.name() == "shape").unwrap();
    assert_eq!((shape.data_type(), nibble_quant::onnx::tensor::ints(shape).unwrap()), (DataType::Int64, vec![3, -1]));
    // Only what leaves the constant part is asked for.
    assert_eq!(asked, ["shape"]);

    let mut never = |_: &Model, wanted: &[String]| panic!("{wanted:?}");
    let mut open = reshaping(&[0, 4, 5]);
    open.graph_mut().input[0] = ValueInfoProto { name: Some("x".into()), ..Default::default() };
    fold(&mut open, Some(&mut never)).unwrap();
    assert_eq!(ops(&open).len(), 4);

    // A number that 32 bits may have cut isn't believed.
    let mut cut = |_: &Model, _: &[String]| Ok(vec![Computed::Ints { dims: vec![2], values: vec![i32::MAX, -1] }]);
    let mut fixed = reshaping(&[3, 4, 5]);
    fold(&mut fixed, Some(&mut cut)).unwrap();
    assert_eq!(ops(&fixed).len(), 4);
}

#[test]
fn freezing_fixes_a_symbol_everywhere_and_refuses_contradictions() {
    let symbol = |name: &str| {
        let mut info = value(name, &[1, 3]);
        if let Some(TypeValue::Tensor(t)) = info.r#type.as_mut().and_then(|t| t.value.as_mut()) {
            t.shape.as_mut().unwrap().dim[0].value = Some(DimensionValue::Param("batch".into()));
        }
        info
    };
    let mut open = model(vec![node("Relu", &["x"], "y")], vec![], ("x", &[1, 3]), &["y"]);
    open.graph_mut().input[0] = symbol("x");
    open.graph_mut().output[0] = symbol("y");
    freeze(&mut open, Some(2), &BTreeMap::new()).unwrap();
    let graph = Graph::new(open.graph()).unwrap();
    assert_eq!(graph.shape("x"), Some(vec![Some(2), Some(3)]));
    assert_eq!(graph.shape("y"), Some(vec![Some(2), Some(3)]));
    let refused = |batch, shapes: &[(&str, Vec<usize>)]| {
        let shapes = shapes.iter().map(|(n, s)| ((*n).to_owned(), s.clone())).collect();
        freeze(&mut open.clone(), batch, &shapes).unwrap_err().to_string()
    };
    assert!(refused(Some(3), &[]).contains("tensor `x`: dimension 0 is 2 in the model, 3 was asked for"));
    assert!(refused(None, &[("q", vec![1])]).contains("tensor `q`: is no input"));
    assert!(refused(None, &[("x", vec![1])]).contains("has 2 dimensions, a shape of 1 was given"));
}

#[test]
fn bad_batch_norms_are_refused_by_tensor() {
    let build = |variance: TensorProto| {
        let constants = [vec![constant("w", &[N, N, 1, 1], 5)], norm_parts()[..3].to_vec(), vec![variance]].concat();
        model(vec![node("Conv", &["x", "w"], "y"), norm("y", "z")], constants, ("x", &[1, N as i64, 1, 1]), &["z"])
    };
    let negative = from_f32("v", &[N], &[1.0, 1.0, -2.0, 1.0, 1.0, 1.0]);
    let error = fold(&mut build(negative), None).unwrap_err().to_string();
    assert!(error.contains("tensor `v`: variance -2 of channel 2"), "{error}");
    let error = fold(&mut build(constant("v", &[N - 1], 1)), None).unwrap_err().to_string();
    assert!(error.contains("tensor `v`: 5 values for 6 channels of `BatchNormalization.z`"), "{error}");
}

/// Scores of 2 heads over 3 places, from keys with a bias.
fn attention(axis: i64, perm: [i64; 4], heads: [i64; 4], scale: &[usize]) -> Model {
    let ints = |name: &str, values: &[i64]| from_i64(name, &[values.len()], values);
    let transpose = |perm: [i64; 4]| AttributeProto::new_ints("perm", &perm);
    let nodes = vec![
        node("MatMul", &["x", "wk"], "k"),
        node("Add", &["k", "bk"], "kb"),
        node("Reshape", &["kb", "heads"], "kr"),
        node("Transpose", &["kr"], "kt").with(transpose(perm)),
        node("MatMul", &["x", "wq"], "q"),
        node("Reshape", &["q", "heads"], "qr"),
        node("Transpose", &["qr"], "qt").with(transpose([0, 2, 1, 3])),
        node("MatMul", &["qt", "kt"], "scores"),
        node("Mul", &["scores", "scale"], "scaled"),
        node("Add", &["scaled", "mask"], "masked"),
        node("Softmax", &["masked"], "y").with(AttributeProto::new_int("axis", axis)),
    ];
    let constants = vec![
        constant("wk", &[8, 8], 1),
        constant("bk", &[8], 2),
        constant("wq", &[8, 8], 3),
        constant("scale", scale, 4),
        constant("mask", &[1, 1, 1, 3], 5),
        ints("heads", &heads),
    ];
    model(nodes, constants, ("x", &[1, 3, 8]), &["y"])
}

#[test]
fn biases_of_keys_go_where_a_softmax_over_keys_follows() {
    let with = |axis, perm, heads, scale: &[usize]| {
        let mut model = attention(axis, perm, heads, scale);
        let folded = fold(&mut model, None).unwrap();
        let adds = ops(&model).iter().filter(|o| **o == "Add").count();
        (adds == 1, folded.into.get("Add.kb").cloned())
    };
    let plain = ([0, 2, 3, 1], [0, 0, 2, 4]);
    let gone = (true, Some(Some("MatMul.k".to_owned())));
    assert_eq!(with(-1, plain.0, plain.1, &[1]), gone);
    assert_eq!(with(3, plain.0, [1, -1, 2, 4], &[]), gone);
    // Over queries; keys' places among heads; heads that don't divide the bias; a scale for each key.
    for (axis, perm, heads, scale) in [
        (2, plain.0, plain.1, &[1][..]),
        (-1, [0, 1, 3, 2], plain.1, &[1]),
        (-1, plain.0, [0, -1, 1, 4], &[1]),
        (-1, plain.0, plain.1, &[3]),
    ] {
        assert_eq!(with(axis, perm, heads, scale), (false, None), "{axis} {perm:?} {heads:?} {scale:?}");
    }
    let mut read_twice = attention(-1, plain.0, plain.1, &[1]);
    read_twice.graph_mut().output.push(value("kb", &[1, 3, 8]));
    fold(&mut read_twice, None).unwrap();
    assert!(ops(&read_twice).iter().filter(|o| **o == "Add").count() == 2);
}
