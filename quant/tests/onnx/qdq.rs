//! Plans and what becomes of them: who computes in integers, in which form, and with which numbers.

use crate::interpreter::{ops, run};
use crate::small::{constant, model, node, numbers};
use nibble_quant::Range;
use nibble_quant::observer::{IntGrid, IntType};
use nibble_quant::onnx::plan::{Clip, Decision, Kind};
use nibble_quant::onnx::proto::*;
use nibble_quant::onnx::tensor::{floats, from_f32, ints};
use nibble_quant::onnx::{
    Calibration, Folded, Graph, Mode, Model, Packing, Plan, Selector, Settings, Target, fold, plan, qdq,
};

const N: usize = 6;
const MAP: [i64; 4] = [1, N as i64, 1, 1];

fn conv(input: &str, weight: &str, output: &str) -> NodeProto {
    node("Conv", &[input, weight, "b"], output)
}

fn weights() -> Vec<TensorProto> {
    vec![
        constant("w1", &[N, N, 1, 1], 1),
        constant("w2", &[N, N, 1, 1], 2),
        constant("w3", &[N, N, 1, 1], 3),
        constant("b", &[N], 4),
        constant("fc", &[4, N], 5),
        constant("fb", &[4], 6),
        from_f32("zero", &[], &[0.0]),
        from_f32("six", &[], &[6.0]),
    ]
}

/// Conv, ReLU6, Conv, Add, Conv with Relu, pooling, classifier: a residual network in small.
fn residual() -> Model {
    let nodes = vec![
        conv("x", "w1", "c1"),
        node("Clip", &["c1", "zero", "six"], "r1"),
        conv("r1", "w2", "c2"),
        node("Add", &["c2", "r1"], "sum"),
        conv("sum", "w3", "c3"),
        node("Relu", &["c3"], "r3"),
        node("GlobalAveragePool", &["r3"], "pool"),
        node("Flatten", &["pool"], "flat"),
        node("Gemm", &["flat", "fc", "fb"], "logits").with(AttributeProto::new_int("transB", 1)),
    ];
    model(nodes, weights(), ("x", &MAP), &["logits"])
}

fn planned(model: &Model, settings: &Settings) -> Plan {
    plan(model, settings, &Folded::default()).unwrap()
}

/// Ranges that hold what a graph makes of some inputs.
fn calibration(model: &Model, plan: &Plan) -> Calibration {
    let mut calibration = Calibration::default();
    for seed in 20..24 {
        let x: Vec<f64> = numbers(seed, N).into_iter().map(|v| f64::from(v) * 3.0).collect();
        let values = run(model, &x);
        for name in plan.observed() {
            let seen = Range::of(&values[&name].iter().map(|&v| v as f32).collect::<Vec<_>>());
            let range = calibration.ranges.entry(name).or_default();
            *range = Range { lo: range.lo.min(seen.lo), hi: range.hi.max(seen.hi) };
        }
    }
    calibration
}

fn decision<'a>(plan: &'a Plan, name: &str) -> &'a Decision {
    &plan.nodes.iter().find(|n| n.name == name).unwrap_or_else(|| panic!("no node {name}")).decision
}

fn tensor<'a>(model: &'a Model, name: &str) -> &'a TensorProto {
    model.graph().initializer.iter().find(|t| t.name() == name).unwrap_or_else(|| panic!("no initializer {name}"))
}

#[test]
fn a_residual_network_is_integers_from_the_first_convolution_to_the_classifier() {
    let float = residual();
    let plan = planned(&float, &Settings::default());
    for name in ["Conv.c1", "Conv.c2", "Conv.c3"] {
        assert_eq!(*decision(&plan, name), Decision::Quantized(Kind::Conv));
    }
    assert_eq!(*decision(&plan, "Clip.r1"), Decision::Merged(Clip { lo: 0.0, hi: 6.0 }));
    assert_eq!(*decision(&plan, "Relu.r3"), Decision::Merged(Clip { lo: 0.0, hi: f32::INFINITY }));
    assert_eq!(*decision(&plan, "Add.sum"), Decision::Quantized(Kind::Join));
    assert_eq!(*decision(&plan, "Flatten.flat"), Decision::Quantized(Kind::Pass));
    assert_eq!(*decision(&plan, "Gemm.logits"), Decision::Quantized(Kind::Linear { bias: None }));
    // A pass has its input's scale; the classifier's output none.
    assert_eq!(plan.scales["flat"], "pool");
    assert!(!plan.scales.contains_key("logits") && !plan.scales.contains_key("c1"));
    assert_eq!(plan.observed(), ["c2", "pool", "r1", "r3", "sum", "x"]);

    let calibration = calibration(&float, &plan);
    let quantized = qdq::quantize(&float, &plan, &calibration).unwrap();
    let index = Graph::new(quantized.graph()).unwrap();
    assert!(!ops(&quantized).iter().any(|op| matches!(*op, "Clip" | "Relu")));
    // Every integer Conv: DequantizeLinear on three inputs, one QuantizeLinear and nothing else behind it.
    for (_, conv) in index.nodes().filter(|(_, n)| n.is("Conv")) {
        for slot in 0..3 {
            let from = index.producer(conv.arg(slot)).map(|id| index.node(id).op_type());
            assert_eq!(from, Some("DequantizeLinear"), "{} input {slot}", conv.name());
        }
        let next = index.sole_consumer(conv.out()).map(|id| index.node(id).op_type());
        assert_eq!(next, Some("QuantizeLinear"), "{}", conv.name());
    }
    // Names a reader of the graph finds again.
    for name in ["x_QuantizeLinear", "x_DequantizeLinear", "w1_DequantizeLinear", "r1_QuantizeLinear"] {
        assert!(quantized.graph().node.iter().any(|n| n.name() == name), "{name}");
    }
    // Both ends of a pass are the same numbers: the same initializers.
    let flat = quantized.graph().node.iter().find(|n| n.name() == "flat_QuantizeLinear").unwrap();
    assert_eq!((flat.arg(1), flat.arg(2)), ("pool_scale", "pool_zero_point"));
    assert!(quantized.graph().initializer.iter().all(|t| t.name() != "w1"), "the float weight is gone");
    // int32 biases in units of s_x * s_w.
    let scale = floats(tensor(&quantized, "x_scale")).unwrap()[0];
    for (b, w) in
        floats(tensor(&quantized, "b_scale")).unwrap().iter().zip(floats(tensor(&quantized, "w1_scale")).unwrap())
    {
        assert_eq!(*b, scale * w);
    }

    // It computes what the float model does, within the steps of everything that is rounded on the way.
    let x: Vec<f64> = numbers(21, N).into_iter().map(|v| f64::from(v) * 3.0).collect();
    let (wanted, found) = (run(&float, &x)["logits"].clone(), run(&quantized, &x)["logits"].clone());
    let signal: f64 = wanted.iter().map(|v| v * v).sum();
    let noise: f64 = wanted.iter().zip(&found).map(|(a, b)| (a - b).powi(2)).sum();
    assert!(noise > 0.0 && 10.0 * (signal / noise).log10() > 25.0, "{wanted:?} became {found:?}");
}

#[test]
fn operators_between_float_neighbours_stay_float() {
    // The Add's other side never was integers; the pooling's reader isn't.
    let nodes = vec![
        conv("x", "w1", "c1"),
        node("Sigmoid", &["x"], "s"),
        node("Add", &["c1", "s"], "sum"),
        conv("sum", "w2", "c2"),
        node("GlobalAveragePool", &["c2"], "pool"),
        node("Erf", &["pool"], "out"),
    ];
    let float = model(nodes, weights(), ("x", &MAP), &["out"]);
    // A Conv between floats isn't worth the rounding of what it makes, unless it is asked for.
    let plan = planned(&float, &Settings::default());
    assert_eq!(plan.quantized(), 0, "{:?}", plan.nodes);
    let plan = planned(&float, &Settings { include: selectors(&["op:Conv"]), ..Settings::default() });
    for name in ["Add.sum", "GlobalAveragePool.pool", "Sigmoid.s"] {
        assert!(matches!(decision(&plan, name), Decision::Float(_)), "{name}");
    }
    let quantized = qdq::quantize(&float, &plan, &calibration_by_hand(&plan)).unwrap();
    // Readers in float of a tensor in integers read its dequantized form, or the Conv had two readers.
    let add = quantized.graph().node.iter().find(|n| n.name() == "Add.sum").unwrap();
    assert_eq!((add.arg(0), add.arg(1)), ("c1_DequantizeLinear_Output", "s"));
    assert_eq!(quantized.graph().node.iter().find(|n| n.name() == "Sigmoid.s").unwrap().arg(0), "x");
}

fn calibration_by_hand(plan: &Plan) -> Calibration {
    let ranges = plan.observed().into_iter().map(|name| (name, Range { lo: -1.0, hi: 2.0 })).collect();
    Calibration { ranges, ..Default::default() }
}

#[test]
fn an_output_of_the_graph_keeps_its_name() {
    let float = model(vec![conv("x", "w1", "y")], weights(), ("x", &MAP), &["y"]);
    let plan = planned(&float, &Settings::default());
    let quantized = qdq::quantize(&float, &plan, &calibration_by_hand(&plan)).unwrap();
    let index = Graph::new(quantized.graph()).unwrap();
    assert_eq!(index.producer("y").map(|id| index.node(id).op_type()), Some("DequantizeLinear"));
    assert_eq!(quantized.graph().node.iter().find(|n| n.is("Conv")).unwrap().out(), "y_float");

    // Also where a Relu was what made it.
    let nodes = vec![conv("x", "w1", "c"), node("Relu", &["c"], "y")];
    let float = model(nodes, weights(), ("x", &MAP), &["y"]);
    let plan = planned(&float, &Settings::default());
    let quantized = qdq::quantize(&float, &plan, &calibration_by_hand(&plan)).unwrap();
    assert!(!ops(&quantized).contains(&"Relu"));
    Graph::new(quantized.graph()).unwrap();
}

/// `x -> MatMul -> Add(bias) -> Erf`.
fn linear(dims: &[i64]) -> Model {
    let nodes = vec![node("MatMul", &["x", "w"], "p"), node("Add", &["b", "p"], "y"), node("Erf", &["y"], "out")];
    model(nodes, vec![constant("w", &[N, 4], 1), constant("b", &[4], 2)], ("x", dims), &["out"])
}

#[test]
fn linear_layers_take_the_form_that_keeps_its_integers() {
    for (rank, dims) in [(2, vec![3, N as i64]), (3, vec![1, 3, N as i64]), (4, vec![1, 2, 3, N as i64])] {
        let float = linear(&dims);
        let plan = planned(&float, &Settings::default());
        let mut calibration = calibration_by_hand(&plan);
        let lost = qdq::quantize(&float, &plan, &calibration).unwrap_err().to_string();
        assert!(lost.contains("tensor `x`: was never seen"), "{lost}");
        calibration.ranks.insert("x".into(), rank);
        let quantized = qdq::quantize(&float, &plan, &calibration).unwrap();
        if rank == 2 {
            // One Gemm with an int32 bias, under the product's name and with the sum's output.
            let gemm = quantized.graph().node.iter().find(|n| n.is("Gemm")).unwrap();
            assert_eq!((gemm.name(), gemm.out(), gemm.arg(2)), ("MatMul.p", "y", "b_DequantizeLinear"));
            assert_eq!(tensor(&quantized, "b_quantized").data_type(), DataType::Int32);
        } else {
            let bias = tensor(&quantized, &format!("b_{rank}d"));
            assert_eq!(bias.dims.len(), rank);
            assert_eq!(floats(bias).unwrap(), floats(tensor(&float, "b")).unwrap());
            assert_eq!(
                ops(&quantized).iter().filter(|op| **op == "QuantizeLinear").count(),
                1,
                "no output is quantized"
            );
        }
        let weight = tensor(&quantized, "w_quantized");
        assert_eq!((weight.data_type(), weight.dims.clone()), (DataType::Int8, vec![N as i64, 4]));
        let scales = floats(tensor(&quantized, "w_scale")).unwrap();
        for (i, (q, w)) in ints(weight).unwrap().iter().zip(floats(tensor(&float, "w")).unwrap()).enumerate() {
            let scale = scales[i % 4];
            assert!((*q as f32 * scale - w).abs() <= scale * 0.500_01, "weight {i}: {w}, code {q}");
        }
    }
}

#[test]
fn a_bias_beyond_32_bits_raises_its_weights_scale() {
    let mut float = model(vec![conv("x", "w1", "y")], weights(), ("x", &MAP), &["y"]);
    let big = [0.0, 1.0, 3e4, -3e4, 0.5, -0.5];
    *float.graph_mut().initializer.iter_mut().find(|t| t.name() == "b").unwrap() = from_f32("b", &[N], &big);
    let tiny = from_f32("w1", &[N, N, 1, 1], &numbers(1, N * N).iter().map(|w| w * 1e-4).collect::<Vec<_>>());
    *float.graph_mut().initializer.iter_mut().find(|t| t.name() == "w1").unwrap() = tiny;
    let plan = planned(&float, &Settings::default());
    let quantized = qdq::quantize(&float, &plan, &calibration_by_hand(&plan)).unwrap();
    let codes = ints(tensor(&quantized, "b_quantized")).unwrap();
    let scales = floats(tensor(&quantized, "b_scale")).unwrap();
    for c in 0..N {
        let means = codes[c] as f64 * f64::from(scales[c]);
        assert!((means - f64::from(big[c])).abs() <= f64::from(scales[c]) * 0.51, "channel {c}: {means}");
        assert!(codes[c].abs() < i64::from(i32::MAX));
    }
    // A channel of zeros has a scale that divides.
    let zero = from_f32("w1", &[N, N, 1, 1], &[0.0; N * N]);
    *float.graph_mut().initializer.iter_mut().find(|t| t.name() == "w1").unwrap() = zero;
    let quantized = qdq::quantize(&float, &plan, &calibration_by_hand(&plan)).unwrap();
    assert!(floats(tensor(&quantized, "w1_scale")).unwrap().iter().all(|s| *s >= f32::MIN_POSITIVE));
}

#[test]
fn tensorrt_gets_symmetric_activations_float_biases_and_its_relus() {
    let settings =
        Settings { target: Target::TensorRt, activation: IntGrid::symmetric(IntType::S8), ..Settings::default() };
    let float = residual();
    let plan = planned(&float, &settings);
    let quantized = qdq::quantize(&float, &plan, &calibration(&float, &plan)).unwrap();
    assert!(ops(&quantized).contains(&"Clip") && ops(&quantized).contains(&"Relu"));
    for t in quantized.graph().initializer.iter().filter(|t| t.name().ends_with("_zero_point")) {
        assert!(t.data_type() == DataType::Int8 && ints(t).unwrap().iter().all(|&z| z == 0), "{}", t.name());
    }
    assert!(quantized.graph().initializer.iter().all(|t| t.data_type() != DataType::Int32));
    let clip = quantized.graph().node.iter().find(|n| n.is("Clip")).unwrap().out().to_owned();
    assert!(
        quantized.graph().node.iter().any(|n| n.is("QuantizeLinear") && n.arg(0) == clip),
        "quantized after the Clip"
    );
    let asymmetric = Settings { activation: IntGrid::asymmetric(IntType::U8), ..settings };
    let error = plan_error(&float, &asymmetric);
    assert!(error.contains("target tensorrt: wants symmetric s8"), "{error}");
}

fn plan_error(model: &Model, settings: &Settings) -> String {
    plan(model, settings, &Folded::default()).unwrap_err().to_string()
}

fn selectors(words: &[&str]) -> Vec<Selector> {
    words.iter().map(|w| w.parse().unwrap()).collect()
}

#[test]
fn patterns_choose_by_name_operator_and_weight_and_one_that_fits_nothing_is_an_error() {
    let float = residual();
    let with = |include: &[&str], exclude: &[&str]| Settings {
        include: selectors(include),
        exclude: selectors(exclude),
        ..Settings::default()
    };
    let integer = |settings: &Settings| {
        let plan = planned(&float, settings);
        plan.nodes
            .iter()
            .filter(|n| matches!(n.decision, Decision::Quantized(_)))
            .map(|n| n.name.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(integer(&with(&["op:Gemm"], &[])), ["Gemm.logits"]);
    assert_eq!(integer(&with(&["weight:w3"], &[])), ["Conv.c3"]);
    assert_eq!(integer(&with(&["*.c1", "name:Conv.c2"], &[])), ["Conv.c1", "Conv.c2"]);
    // With one side in float the Add is, too, and the first Conv stands between floats.
    assert_eq!(integer(&with(&[], &["Conv.c2"])), ["Conv.c3", "GlobalAveragePool.pool", "Flatten.flat", "Gemm.logits"]);
    for (include, exclude, wanted) in [
        (&["Conv.c9"][..], &[][..], "pattern `Conv.c9`: fits no node; unknown; did you mean `Conv.c1`?"),
        (&[], &["op:LSTM"], "pattern `op:LSTM`: fits no operator of this model; it has Add, Clip"),
        (&[], &["weight:embedding*"], "pattern `weight:embedding*`: fits no initializer"),
    ] {
        let error = plan_error(&float, &with(include, exclude));
        assert!(error.starts_with(wanted), "{error}");
    }
    assert!("op:".parse::<Selector>().is_err() && "".parse::<Selector>().is_err());
}

#[test]
fn names_survive_folding() {
    let nodes = vec![conv("x", "w1", "c1"), node("Mul", &["c1", "gain"], "m"), node("Erf", &["m"], "y")];
    let constants = [weights(), vec![constant("gain", &[N, 1, 1], 8)]].concat();
    let mut float = model(nodes, constants, ("x", &MAP), &["y"]);
    let folded = fold(&mut float, None).unwrap();
    assert_eq!(ops(&float), ["Conv", "Erf"]);
    let settings = Settings { exclude: selectors(&["Mul.m"]), ..Settings::default() };
    let plan = plan(&float, &settings, &folded).unwrap();
    assert_eq!(*decision(&plan, "Conv.c1"), Decision::Float("excluded".into()));
}

#[test]
fn at_run_time_only_linear_layers_are_quantized_unless_forced() {
    let settings = Settings { mode: Mode::Dynamic, ..Settings::default() };
    let float = residual();
    let plan = planned(&float, &settings);
    let Decision::Float(why) = decision(&plan, "Conv.c1") else { panic!("{plan:?}") };
    assert!(why.contains("ConvInteger"), "{why}");
    assert!(plan.scales.is_empty());
    let quantized = qdq::quantize(&float, &plan, &Calibration::default()).unwrap();
    let count = |model: &Model, op: &str| ops(model).iter().filter(|o| **o == op).count();
    assert_eq!((count(&quantized, "MatMulInteger"), count(&quantized, "DynamicQuantizeLinear")), (1, 1));
    assert_eq!(tensor(&quantized, "fc_quantized").dims, [N as i64, 4], "transposed to what MatMulInteger reads");
    let forced = Settings { force_conv: true, ..settings };
    let plan = planned(&float, &forced);
    let quantized = qdq::quantize(&float, &plan, &Calibration::default()).unwrap();
    assert_eq!((count(&quantized, "ConvInteger"), count(&quantized, "Conv")), (3, 0));
    assert_eq!(count(&quantized, "DynamicQuantizeLinear"), 4, "one for each tensor that layers read");
}

#[test]
fn packed_weights_mean_what_the_algorithm_made_of_them() {
    let k = 40;
    let nodes = vec![node("MatMul", &["x", "w"], "p"), node("Add", &["p", "b"], "y")];
    let float = model(nodes, vec![constant("w", &[k, 3], 1), constant("b", &[3], 2)], ("x", &[1, 2, k as i64]), &["y"]);
    for bits in [4u8, 8] {
        let settings =
            Settings { mode: Mode::WeightOnly { bits, group: 32, form: Packing::MatMulNBits }, ..Settings::default() };
        let plan = planned(&float, &settings);
        let quantized = qdq::quantize(&float, &plan, &Calibration::default()).unwrap();
        assert_eq!(quantized.opset("com.microsoft"), Some(1));
        let product = quantized.graph().node.iter().find(|n| n.op_type() == "MatMulNBits").unwrap();
        assert_eq!((product.int("K", 0), product.int("N", 0), product.int("block_size", 0)), (40, 3, 32));
        let (codes, scales) =
            (ints(tensor(&quantized, "w_quantized")).unwrap(), floats(tensor(&quantized, "w_scale")).unwrap());
        assert_eq!(tensor(&quantized, "w_quantized").dims, [3, 2, 32 * i64::from(bits) / 8]);
        let exact = floats(tensor(&float, "w")).unwrap();
        let middle = 1 << (bits - 1);
        for n in 0..3 {
            for j in 0..64 {
                let at = n * 64 + j;
                let code = match bits {
                    4 => codes[at / 2] >> (4 * (at % 2)) & 15,
                    _ => codes[at],
                };
                let scale = scales[n * 2 + j / 32];
                let value = (code - middle) as f32 * scale;
                // The full range of 4 bits reaches a whole step less far on one side.
                let steps = if bits == 4 { 1.001 } else { 0.501 };
                let wanted = if j < k { exact[j * 3 + n] } else { 0.0 };
                assert!(
                    (value - wanted).abs() <= scale.abs() * steps,
                    "{bits} bits, channel {n}, {j}: {wanted} became {value}"
                );
            }
        }
    }
    let bad =
        Settings { mode: Mode::WeightOnly { bits: 3, group: 32, form: Packing::MatMulNBits }, ..Settings::default() };
    assert!(plan_error(&float, &bad).contains("3; 4 or 8"));
    let bad =
        Settings { mode: Mode::WeightOnly { bits: 4, group: 24, form: Packing::MatMulNBits }, ..Settings::default() };
    assert!(plan_error(&float, &bad).contains("24 values; a power of 2"));
}

#[test]
fn a_tensor_without_a_range_is_named() {
    let float = residual();
    let plan = planned(&float, &Settings::default());
    let mut calibration = calibration(&float, &plan);
    calibration.ranges.remove("sum");
    let error = qdq::quantize(&float, &plan, &calibration).unwrap_err().to_string();
    assert!(error.contains("tensor `sum`: has no range"), "{error}");
}

#[test]
fn seven_bits_of_weights_never_saturate_sums_of_two_products() {
    let float = residual();
    let mut settings = Settings::default();
    settings.weights.bits = 7;
    let plan = planned(&float, &settings);
    let quantized = qdq::quantize(&float, &plan, &calibration(&float, &plan)).unwrap();
    for name in ["w1_quantized", "w2_quantized", "w3_quantized", "fc_quantized"] {
        let codes = ints(tensor(&quantized, name)).unwrap();
        assert_eq!(codes.iter().map(|c| c.abs()).max(), Some(63), "{name}");
        assert!(2 * 255 * 63 <= i64::from(i16::MAX));
    }
    for bits in [1, 9] {
        settings.weights.bits = bits;
        let error = plan_error(&float, &settings);
        assert!(error.contains(&format!("{bits} in use; 2 to 8")), "{error}");
    }
}
