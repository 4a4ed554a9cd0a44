//! Activations in two terms, weights in blocks, biases of layers that are quantized at run time, and the report on all.

use crate::interpreter::ops;
use crate::small::{constant, model, node, numbers};
use nibble_quant::Range;
use nibble_quant::observer::{IntGrid, IntType};
use nibble_quant::onnx::proto::*;
use nibble_quant::onnx::report::report;
use nibble_quant::onnx::tensor::{floats, from_f32, ints};
use nibble_quant::onnx::{Calibration, Fine, Folded, Graph, Mode, Model, Packing, Plan, Settings, plan, qdq};

const K: usize = 40;

/// Two products with biases; what the second one reads is a GELU's output.
fn mlp() -> Model {
    let nodes = vec![
        node("MatMul", &["x", "w1"], "p1"),
        node("Add", &["p1", "b1"], "h"),
        node("Gelu", &["h"], "g"),
        node("MatMul", &["g", "w2"], "p2"),
        node("Add", &["p2", "b2"], "y"),
    ];
    let constants =
        vec![constant("w1", &[K, K], 1), constant("b1", &[K], 2), constant("w2", &[K, 4], 3), constant("b2", &[4], 4)];
    model(nodes, constants, ("x", &[1, 3, K as i64]), &["y"])
}

fn planned(settings: &Settings) -> Plan {
    plan_of(&mlp(), settings)
}

fn seen(plan: &Plan) -> Calibration {
    let ranges = plan.observed().into_iter().map(|name| (name, Range { lo: -1.0, hi: 3.0 })).collect();
    let ranks = ["x", "g"].map(|name| (name.to_owned(), 3)).into();
    Calibration { ranges, ranks, ..Default::default() }
}

fn tensor<'a>(model: &'a Model, name: &str) -> &'a TensorProto {
    model.graph().initializer.iter().find(|t| t.name() == name).unwrap_or_else(|| panic!("no initializer {name}"))
}

fn fine(words: &[&str]) -> Vec<Fine> {
    words.iter().map(|w| w.parse().unwrap()).collect()
}

#[test]
fn activations_after_a_gelu_have_two_terms_and_others_where_they_are_named() {
    for (words, layers) in [
        (&["gelu"][..], &["g"][..]),
        (&["MatMul.p1"], &["x"]),
        (&["mlp"], &["g", "x"]),
        (&["all"], &["g", "x"]),
        (&["gelu", "MatMul.p1"], &["g", "x"]),
        (&[], &[]),
    ] {
        let fine = fine(words);
        let settings = Settings { fine: fine.clone(), ..Settings::default() };
        let plan = planned(&settings);
        let float = mlp();
        let graph = Graph::new(float.graph()).unwrap();
        let tensors: Vec<String> = plan.fine_tensors(&graph).into_iter().collect();
        assert_eq!(tensors, layers, "{fine:?}");
        let quantized = qdq::quantize(&float, &plan, &seen(&plan)).unwrap();
        let count = |op: &str| ops(&quantized).iter().filter(|o| **o == op).count();
        let n = layers.len();
        assert_eq!((count("MatMul"), count("Sub"), count("QuantizeLinear")), (2 + n, n, 2 + n), "{fine:?}");
        for x in layers {
            let scale = |name: &str| floats(tensor(&quantized, name)).unwrap()[0];
            let (first, rest) = (scale(&format!("{x}_scale")), scale(&format!("{x}_rest_scale")));
            // What rounding leaves is half a step at most, which the second term's integers reach.
            assert!(rest * 128.0 >= first * 0.5 && rest * 120.0 < first * 0.5, "{first} {rest}");
            assert_eq!(ints(tensor(&quantized, &format!("{x}_rest_zero_point"))).unwrap(), [128]);
        }
    }
}

#[test]
fn words_mean_the_layers_around_a_gelu() {
    let mut nodes = mlp().graph().node.clone();
    nodes.insert(0, node("MatMul", &["a", "w0"], "x"));
    nodes.push(node("MatMul", &["y", "w3"], "z"));
    let mut constants = mlp().graph().initializer.clone();
    constants.extend([constant("w0", &[K, K], 5), constant("w3", &[4, 4], 6)]);
    let model = model(nodes, constants, ("a", &[1, 3, K as i64]), &["z"]);
    let graph = Graph::new(model.graph()).unwrap();
    for (word, layers) in [("gelu", &["g"][..]), ("mlp", &["g", "x"]), ("all", &["a", "g", "x", "y"])] {
        let plan = plan_of(&model, &Settings { fine: fine(&[word]), ..Settings::default() });
        assert_eq!(plan.fine_tensors(&graph).into_iter().collect::<Vec<_>>(), layers, "{word}");
    }
}

#[test]
fn a_second_term_is_for_8_bits_in_static_mode_only() {
    let wide = Settings { activation: IntGrid::asymmetric(IntType::U16), ..Settings::default() };
    assert!(planned(&wide).fine.is_empty());
    assert!(planned(&Settings { mode: Mode::Dynamic, ..Settings::default() }).fine.is_empty());
    let unknown = Settings { fine: fine(&["MatMul.p9"]), ..Settings::default() };
    let error = plan(&mlp(), &unknown, &Folded::default()).unwrap_err().to_string();
    assert!(error.contains("pattern `MatMul.p9`: fits no node"), "{error}");
    // A matrix times a matrix becomes one Gemm, which has no place for it.
    let plan = planned(&Settings::default());
    let flat = Calibration { ranks: ["x", "g"].map(|n| (n.to_owned(), 2)).into(), ..seen(&plan) };
    let quantized = qdq::quantize(&mlp(), &plan, &flat).unwrap();
    assert!(!ops(&quantized).contains(&"Sub") && ops(&quantized).contains(&"Gemm"));
}

#[test]
fn blocks_mean_what_packed_products_mean() {
    let float = mlp();
    for bits in [4u8, 8] {
        let with = |form| Settings { mode: Mode::WeightOnly { bits, group: 32, form }, ..Settings::default() };
        let made = |form| {
            let plan = planned(&with(form));
            qdq::quantize(&float, &plan, &Calibration::default()).unwrap()
        };
        let (packed, blocks) = (made(Packing::MatMulNBits), made(Packing::Blocks));
        assert_eq!((blocks.opset(""), blocks.opset("com.microsoft")), (Some(21), None));
        let codes = tensor(&blocks, "w1_quantized");
        assert_eq!(codes.data_type(), if bits == 4 { DataType::Int4 } else { DataType::Int8 });
        assert_eq!((codes.dims.clone(), tensor(&blocks, "w1_scale").dims.clone()), (vec![40, 40], vec![2, 40]));
        let node = blocks.graph().node.iter().find(|n| n.is("DequantizeLinear")).unwrap();
        assert_eq!((node.int("axis", -1), node.int("block_size", 0)), (0, 32));
        let (codes, scales) = (ints(codes).unwrap(), floats(tensor(&blocks, "w1_scale")).unwrap());
        let of_packed = (ints(tensor(&packed, "w1_quantized")).unwrap(), floats(tensor(&packed, "w1_scale")).unwrap());
        for k in 0..K {
            for n in 0..K {
                let at = n * 64 + k;
                let code = if bits == 4 { of_packed.0[at / 2] >> (4 * (at % 2)) & 15 } else { of_packed.0[at] };
                assert_eq!(codes[k * K + n], code - (1 << (bits - 1)), "{bits} bits, ({k}, {n})");
                assert_eq!(scales[k / 32 * K + n], of_packed.1[n * 2 + k / 32]);
            }
        }
        let rows = report(&float, &blocks).unwrap().weights;
        let found: Vec<_> = rows.iter().map(|r| (r.tensor.as_str(), r.bits, r.scales)).collect();
        assert_eq!(found, [("w1", bits.into(), 80), ("w2", bits.into(), 8)]);
        // Uniform values in 16 and 256 levels: 6 dB a bit.
        let expected = if bits == 4 { 18.0..26.0 } else { 42.0..50.0 };
        assert!(rows.iter().all(|r| expected.contains(&r.sqnr_db.unwrap())), "{rows:?}");
    }
}

#[test]
fn biases_take_up_what_rounding_takes_from_the_mean_at_run_time_too() {
    let float = mlp();
    let plan = planned(&Settings { mode: Mode::Dynamic, ..Settings::default() });
    let means: Vec<f64> = numbers(9, K).into_iter().map(f64::from).collect();
    let without = qdq::quantize(&float, &plan, &Calibration::default()).unwrap();
    let knowing = Calibration { means: [("x".to_owned(), means.clone())].into(), ..Default::default() };
    let with = qdq::quantize(&float, &plan, &knowing).unwrap();
    let bias = |model: &Model| {
        let add = model.graph().node.iter().find(|n| n.name() == "Add.h").unwrap().arg(1).to_owned();
        floats(tensor(model, &add)).unwrap()
    };
    let (codes, scales) = (ints(tensor(&with, "w1_quantized")).unwrap(), floats(tensor(&with, "w1_scale")).unwrap());
    let exact = floats(tensor(&float, "w1")).unwrap();
    for n in 0..K {
        let lost: f64 = (0..K)
            .map(|k| (f64::from(exact[k * K + n]) - codes[k * K + n] as f64 * f64::from(scales[n])) * means[k])
            .sum();
        let wanted = f64::from(bias(&without)[n]) + lost;
        assert!((f64::from(bias(&with)[n]) - wanted).abs() < 1e-5, "channel {n}");
    }
    assert_ne!(bias(&with), bias(&without));
}

#[test]
fn a_report_has_every_scale_and_what_rounding_took() {
    let float = mlp();
    let plan = planned(&Settings { fine: fine(&[]), ..Settings::default() });
    let quantized = qdq::quantize(&float, &plan, &seen(&plan)).unwrap();
    let report = report(&float, &quantized).unwrap();
    let names: Vec<&str> = report.activations.iter().map(|r| r.tensor.as_str()).collect();
    assert_eq!(names, ["x", "g"]);
    for row in &report.activations {
        // The range that was seen, to half a step.
        let off = [row.range[0] + 1.0, row.range[1] - 3.0].map(f32::abs);
        assert!(off.iter().all(|&o| o <= row.scale * 0.51), "{row:?}");
    }
    assert!(report.weights.iter().all(|r| r.sqnr_db.is_some_and(|db| (40.0..50.0).contains(&db))), "{report:?}");
    // Values on the grid lose nothing.
    let mut exact = mlp();
    let whole: Vec<f32> = (0..K * 4).map(|i| (i % 255) as f32 - 127.0).collect();
    *exact.graph_mut().initializer.iter_mut().find(|t| t.name() == "w2").unwrap() = from_f32("w2", &[K, 4], &whole);
    let mut per_tensor = Settings::default();
    per_tensor.weights.per_channel = false;
    let plan = plan_of(&exact, &per_tensor);
    let quantized = qdq::quantize(&exact, &plan, &seen(&plan)).unwrap();
    let rows = nibble_quant::onnx::report::report(&exact, &quantized).unwrap().weights;
    let row = rows.iter().find(|r| r.tensor == "w2").unwrap();
    assert_eq!((row.scales, row.sqnr_db), (1, None));
}

fn plan_of(model: &Model, settings: &Settings) -> Plan {
    plan(model, settings, &Folded::default()).unwrap()
}
