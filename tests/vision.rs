//! ONNX models as onnxruntime sees them: folding and export leave the function as it was, and what a plan calls integer
//! is integer in the graph that onnxruntime runs.

mod diagnose;
mod equalize;
mod export;
mod mixed;
#[cfg(feature = "ort")]
mod ort;
mod toolbox;

use crate::assets::{asset, repository};
use crate::fetched::oracle;
use crate::small::{constant, model, node, numbers, value};
use nibble_models::graph::{GraphRunner, Rten, Tensor, Values, fold_model, inputs};
use nibble_models::vision::calibrate::{CalibrateOptions, calibrate, equalize_channels};
use nibble_models::vision::data::{Data, DataOptions};
use nibble_models::vision::export::export;
use nibble_models::vision::picture::preprocess;
use nibble_quant::observer::{IntGrid, IntType, choose};
use nibble_quant::onnx::plan::Stored;
use nibble_quant::onnx::proto::{AttributeProto, NodeProto};
use nibble_quant::onnx::tensor::from_f32;
use nibble_quant::onnx::{External, Mode, Model, Packing, Settings, fold, plan, qdq};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// Runs scripts/oracles/onnx_run.py; `None` where the oracles are missing.
pub fn onnxruntime(words: &[&str]) -> Option<Value> {
    let mut python = oracle()?;
    let output = python.arg(repository().join("scripts/oracles/onnx_run.py")).args(words).output().unwrap();
    assert!(output.status.success(), "{words:?}\n{}", String::from_utf8_lossy(&output.stderr));
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

/// Operators of a model's optimized graph, after onnx's own checker has passed it.
fn operators(model: &Model, place: &Path) -> Option<BTreeMap<String, u64>> {
    let path = place.join("model.onnx");
    model.save(&path, External::Auto).unwrap();
    let counts = onnxruntime(&["ops", path.to_str().unwrap()])?;
    Some(serde_json::from_value(counts[0].clone()).unwrap())
}

fn write_npy(path: &Path, dims: &[usize], values: &[f32]) {
    candle_core::Tensor::from_slice(values, dims, &candle_core::Device::Cpu).unwrap().write_npy(path).unwrap();
}

/// Random samples for a model's only input, in a file.
fn samples(model: &Model, count: usize, place: &Path) -> PathBuf {
    let input = &inputs(model)[0];
    let dims: Vec<usize> = std::iter::once(count).chain(input.dims[1..].iter().map(|d| d.unwrap())).collect();
    let path = place.join("samples.npy");
    write_npy(&path, &dims, &numbers(7, dims.iter().product()));
    path
}

fn options() -> DataOptions {
    DataOptions {
        preprocess: preprocess("unit").unwrap(),
        crops: 0,
        seed: 0,
        bgr: false,
        limit: None,
        tokenizer: None,
        tokens: 128,
    }
}

/// Folds, equalizes, plans, calibrates and quantizes.
fn quantize(float: &Model, settings: &Settings, data: &Path, observer: &str, threads: usize) -> Model {
    let mut folded = float.clone();
    let map = fold_model(&mut folded, threads).unwrap();
    let stop = AtomicBool::new(false);
    let calibrating = CalibrateOptions {
        observer: choose(observer).unwrap(),
        threads,
        correct_bias: true,
        headroom: 1.0,
        stop: &stop,
    };
    let data = Data::open(data, &inputs(&folded), options()).unwrap();
    if settings.mode == Mode::Static {
        let before = plan(&folded, settings, &map).unwrap();
        equalize_channels(&mut folded, &before, &data, &calibrating, &mut || ()).unwrap();
    }
    let plan = plan(&folded, settings, &map).unwrap();
    let calibration = calibrate(&folded, &plan, &data, &calibrating, &mut || ()).unwrap();
    qdq::quantize(&folded, &plan, &calibration).unwrap()
}

fn ints(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto::new_ints(name, values)
}

fn padded(input: &str, weight: &str, bias: &str, output: &str) -> NodeProto {
    node("Conv", &[input, weight, bias], output).with(ints("kernel_shape", &[3, 3])).with(ints("pads", &[1, 1, 1, 1]))
}

/// A residual network over 8 x 8 pixels: 4 Convs (one depthwise), an Add, pooling, a classifier; ReLU6 and Relu.
fn cnn() -> Model {
    let nodes = vec![
        padded("x", "w1", "b1", "c1"),
        node("Clip", &["c1", "zero", "six"], "r1"),
        padded("r1", "w2", "b2", "c2").with(AttributeProto::new_int("group", 16)),
        node("Relu", &["c2"], "r2"),
        padded("r2", "w3", "b3", "c3"),
        node("Add", &["c3", "r1"], "sum"),
        padded("sum", "w4", "b4", "c4"),
        node("Relu", &["c4"], "r4"),
        node("GlobalAveragePool", &["r4"], "pool"),
        node("Flatten", &["pool"], "flat"),
        node("Gemm", &["flat", "fc", "fb"], "logits").with(AttributeProto::new_int("transB", 1)),
    ];
    let constants = vec![
        constant("w1", &[16, 3, 3, 3], 1),
        constant("b1", &[16], 2),
        constant("w2", &[16, 1, 3, 3], 3),
        constant("b2", &[16], 4),
        constant("w3", &[16, 16, 3, 3], 5),
        constant("b3", &[16], 6),
        constant("w4", &[32, 16, 3, 3], 7),
        constant("b4", &[32], 8),
        constant("fc", &[10, 32], 9),
        constant("fb", &[10], 10),
        from_f32("zero", &[], &[0.0]),
        from_f32("six", &[], &[6.0]),
    ];
    finish(model(nodes, constants, ("x", &[1, 3, 8, 8]), &["logits"]), &[1, 10])
}

/// Two linear layers with a Relu between, over an input of this shape; MatMul and Add, or Gemm.
fn mlp(dims: &[i64], gemm: bool) -> Model {
    let linear = |x: &str, n: usize, y: &str| match gemm {
        true => vec![node("Gemm", &[x, &format!("w{n}"), &format!("b{n}")], y)],
        false => vec![
            node("MatMul", &[x, &format!("w{n}")], &format!("p{n}")),
            node("Add", &[&format!("b{n}"), &format!("p{n}")], y),
        ],
    };
    let nodes = [linear("x", 1, "h"), vec![node("Relu", &["h"], "r")], linear("r", 2, "y")].concat();
    let constants = vec![
        constant("w1", &[32, 64], 1),
        constant("b1", &[64], 2),
        constant("w2", &[64, 16], 3),
        constant("b2", &[16], 4),
    ];
    let out = [&dims[..dims.len() - 1], &[16]].concat();
    finish(model(nodes, constants, ("x", dims), &["y"]), &out)
}

/// [`mlp`] with a GELU written out in place of the Relu.
fn gelu() -> Model {
    let mut made = mlp(&[1, 5, 32], false);
    let graph = made.graph_mut();
    let at = graph.node.iter().position(|n| n.is("Relu")).unwrap();
    let written = [
        node("Div", &["h", "root"], "scaled"),
        node("Erf", &["scaled"], "erf"),
        node("Add", &["erf", "one"], "sum"),
        node("Mul", &["h", "sum"], "twice"),
        node("Mul", &["twice", "half"], "r"),
    ];
    graph.node.splice(at..=at, written);
    for (name, value) in [("root", std::f32::consts::SQRT_2), ("one", 1.0), ("half", 0.5)] {
        graph.initializer.push(from_f32(name, &[], &[value]));
    }
    made
}

/// onnx's checker wants outputs with types.
fn finish(mut model: Model, dims: &[i64]) -> Model {
    let outputs = &mut model.graph_mut().output;
    *outputs = outputs.iter().map(|output| value(output.name(), dims)).collect();
    model
}

/// Integers that every processor computes alike: without VNNI sums of two products saturate.
fn alike() -> Settings {
    let mut settings = Settings::default();
    settings.weights.pairs = true;
    settings
}

/// A model's name, the model, how it is quantized, and how many of which operators onnxruntime makes of it.
type Fused = (&'static str, Model, Settings, &'static [(&'static str, u64)]);

#[test]
fn what_a_plan_calls_integer_is_integer_in_onnxruntime() {
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    let u8s = alike();
    let dynamic = Settings { mode: Mode::Dynamic, ..u8s.clone() };
    let blocks =
        |bits| Settings { mode: Mode::WeightOnly { bits, group: 32, form: Packing::Blocks }, ..Settings::default() };
    let packed = |bits| Settings {
        mode: Mode::WeightOnly { bits, group: 32, form: Packing::MatMulNBits },
        ..Settings::default()
    };
    // The last layer.
    let one = |stored| Settings { stored: vec![("weight:w2".parse().unwrap(), stored)], ..alike() };
    // The model, how, and which operators must be there how often; Conv, MatMul and Gemm in float must not.
    let cases: Vec<Fused> = vec![
        (
            "cnn",
            cnn(),
            u8s.clone(),
            &[("QLinearConv", 4), ("QLinearAdd", 1), ("QLinearGlobalAveragePool", 1), ("QGemm", 1)],
        ),
        ("gemms", mlp(&[1, 32], true), u8s.clone(), &[("QGemm", 2)]),
        ("products of rank 2", mlp(&[1, 32], false), u8s.clone(), &[("QGemm", 2)]),
        ("products of rank 3", mlp(&[1, 5, 32], false), u8s.clone(), &[("MatMulIntegerToFloat", 2)]),
        ("products of rank 4", mlp(&[1, 2, 5, 32], false), u8s.clone(), &[("MatMulIntegerToFloat", 2)]),
        ("dynamic products", mlp(&[1, 5, 32], false), dynamic.clone(), &[("DynamicQuantizeMatMul", 2)]),
        ("dynamic gemms", mlp(&[1, 32], true), dynamic, &[("DynamicQuantizeMatMul", 2)]),
        ("after a GELU", gelu(), u8s, &[("MatMulIntegerToFloat", 3), ("DynamicQuantizeMatMul", 0)]),
        ("4-bit blocks", mlp(&[1, 5, 32], false), blocks(4), &[("MatMulNBits", 2)]),
        ("8-bit blocks", mlp(&[1, 5, 32], false), blocks(8), &[("MatMulNBits", 2)]),
        ("4-bit weights", mlp(&[1, 5, 32], false), packed(4), &[("MatMulNBits", 2)]),
        ("8-bit weights", mlp(&[1, 5, 32], false), packed(8), &[("MatMulNBits", 2)]),
        (
            "4-bit weights of some",
            mlp(&[1, 5, 32], false),
            one(Stored::Int4),
            &[("MatMulNBits", 1), ("MatMulIntegerToFloat", 1)],
        ),
        ("4-bit weights of a gemm", mlp(&[1, 32], true), one(Stored::Int4Int8), &[("MatMulNBits", 1), ("QGemm", 1)]),
    ];
    for (name, float, settings, wanted) in cases {
        let data = samples(&float, 8, place);
        let quantized = quantize(&float, &settings, &data, "minmax", 1);
        let Some(found) = operators(&quantized, place) else { return };
        for (op, count) in wanted {
            assert_eq!(found.get(*op).unwrap_or(&0), count, "{name}: {found:?}");
        }
        for op in ["Conv", "FusedConv", "MatMul", "Gemm", "FusedMatMul", "Relu", "Clip"] {
            let left = matches!((op, name), ("Relu", n) if !n.contains("cnn") && n != "gemms");
            assert!(left || !found.contains_key(op), "{name} has {op} in float: {found:?}");
        }
        let (a, b) = (place.join("float.onnx"), place.join("model.onnx"));
        float.save(&a, External::Auto).unwrap();
        let compared =
            onnxruntime(&["compare", a.to_str().unwrap(), b.to_str().unwrap(), data.to_str().unwrap()]).unwrap();
        let db = 10.0 * (compared["signal"].as_f64().unwrap() / compared["noise"].as_f64().unwrap()).log10();
        // 7 and 8 bits of uniform values are 40 to 48 dB; several layers, min-max ranges and 4-bit weights cost theirs.
        let least = if name.starts_with('4') { 12.0 } else { 25.0 };
        assert!(db > least, "{name}: {db:.1} dB");
    }
}

#[test]
fn other_grids_load_in_onnxruntime() {
    let place = tempfile::tempdir().unwrap();
    let float = cnn();
    let data = samples(&float, 4, place.path());
    for (int, symmetric) in [(IntType::S8, false), (IntType::S8, true), (IntType::U16, false), (IntType::S16, true)] {
        let settings = Settings { activation: IntGrid { int, symmetric, unused: 0 }, ..Settings::default() };
        let quantized = quantize(&float, &settings, &data, "percentile:99.9", 1);
        if operators(&quantized, place.path()).is_none() {
            return;
        }
    }
}

#[test]
fn the_same_bytes_come_out_for_any_number_of_threads() {
    let place = tempfile::tempdir().unwrap();
    for (float, observer) in [(cnn(), "entropy"), (cnn(), "minmax"), (mlp(&[1, 5, 32], false), "mse")] {
        let data = samples(&float, 8, place.path());
        let one = quantize(&float, &Settings::default(), &data, observer, 1);
        for threads in [2, 3] {
            let other = quantize(&float, &Settings::default(), &data, observer, threads);
            assert!(other.proto == one.proto, "{observer}, {threads}");
        }
    }
}

#[test]
fn a_value_that_is_not_finite_is_named_by_tensor() {
    let place = tempfile::tempdir().unwrap();
    let mut float = cnn();
    let bias = float.graph_mut().initializer.iter_mut().find(|t| t.name() == "b3").unwrap();
    *bias = from_f32("b3", &[16], &[f32::INFINITY; 16]);
    let data = samples(&float, 2, place.path());
    let map = fold_model(&mut float, 1).unwrap();
    let plan = plan(&float, &Settings::default(), &map).unwrap();
    let stop = AtomicBool::new(false);
    let calibrating = CalibrateOptions {
        observer: choose("minmax").unwrap(),
        threads: 1,
        correct_bias: true,
        headroom: 1.0,
        stop: &stop,
    };
    let data = Data::open(&data, &inputs(&float), options()).unwrap();
    let error = calibrate(&float, &plan, &data, &calibrating, &mut || ()).unwrap_err().to_string();
    assert!(error.contains("tensor `c3`") || error.contains("tensor `sum`"), "{error}");
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let stopped = calibrate(&float, &plan, &data, &calibrating, &mut || ()).unwrap_err().to_string();
    assert_eq!(stopped, "stopped");
}

/// Folds a model and compares the two in onnxruntime: differences of float rounding only.
fn same_after_folding(float: &Model, samples_wanted: usize, place: &Path) {
    let data = samples(float, samples_wanted, place);
    let mut folded = float.clone();
    let before = folded.graph().node.len();
    fold_model(&mut folded, 2).unwrap();
    assert!(folded.graph().node.len() < before);
    let (a, b) = (place.join("a.onnx"), place.join("b.onnx"));
    float.save(&a, External::Auto).unwrap();
    folded.save(&b, External::Auto).unwrap();
    let Some(compared) = onnxruntime(&["compare", a.to_str().unwrap(), b.to_str().unwrap(), data.to_str().unwrap()])
    else {
        return;
    };
    let (signal, noise) = (compared["signal"].as_f64().unwrap(), compared["noise"].as_f64().unwrap());
    assert!(signal > 0.0 && noise <= signal * 1e-8, "{compared}");
}

#[test]
fn efficientnet_is_exported_and_folds_to_the_same_function() {
    let pth = "assets/efficientnet/efficientnet-lite0-57934424.pth";
    let Some(checkpoint) = asset("efficientnet", pth) else { return };
    let place = tempfile::tempdir().unwrap();
    let mut float = export(&checkpoint, None).unwrap();
    let count = |model: &Model, op: &str| model.graph().node.iter().filter(|n| n.is(op)).count();
    assert_eq!((count(&float, "Conv"), count(&float, "Add"), count(&float, "Clip")), (49, 9, 33));
    fold::freeze(&mut float, Some(1), &BTreeMap::new()).unwrap();
    same_after_folding(&float, 2, place.path());
    fold_model(&mut float, 2).unwrap();
    assert_eq!(count(&float, "BatchNormalization"), 0);

    // A checkpoint that ends early, or in the middle of a number.
    let bytes = std::fs::read(&checkpoint).unwrap();
    for keep in [0, 14, 15, 100, 42_486, 47_000, 50_000, bytes.len() / 2, bytes.len() - 1] {
        let cut = place.path().join("cut.pth");
        std::fs::write(&cut, &bytes[..keep]).unwrap();
        let error = export(&cut, None).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("cut.pth"), "{keep} bytes: {error}");
    }
}

#[test]
fn a_vision_transformer_folds_to_the_same_function() {
    let Some(path) = asset("vit", "assets/vit/vit_s_focus.onnx") else { return };
    let place = tempfile::tempdir().unwrap();
    let mut float = Model::open(&path).unwrap();
    fold::freeze(&mut float, Some(1), &BTreeMap::new()).unwrap();
    same_after_folding(&float, 1, place.path());
    fold_model(&mut float, 2).unwrap();
    let count = |op: &str| float.graph().node.iter().filter(|n| n.is(op)).count();
    // Shapes are constants, LayerScale is in the weights, the positional table is resized once.
    assert_eq!((count("Shape"), count("Gather"), count("Constant")), (0, 0, 0), "batch and size are fixed");
    assert_eq!(count("BatchNormalization"), 0);
    let groups = nibble_quant::onnx::groups::groups(&nibble_quant::onnx::Graph::new(float.graph()).unwrap());
    let of = |kind: &str| groups.iter().filter(|g| g.kind.name() == kind).count();
    assert_eq!((of("layer-norm"), of("gelu"), of("attention")), (25, 12, 12));
}

#[test]
fn the_engine_returns_what_is_asked_for_in_order() {
    let float = mlp(&[2, 32], true);
    let names: Vec<String> = ["y", "r", "y"].map(String::from).to_vec();
    let runner = Rten::new(&float, &names, 1).unwrap();
    let x = Tensor { dims: vec![2, 32], values: Values::Float(numbers(3, 64)) };
    let results = runner.run(&[("x".into(), x.clone())], &names).unwrap();
    assert_eq!(results.iter().map(|t| t.dims.clone()).collect::<Vec<_>>(), [[2, 16], [2, 64], [2, 16]]);
    assert_eq!(results[0], results[2]);
    assert!(results[1].as_floats("r").unwrap().iter().all(|&v| v >= 0.0));
    let wrong = Tensor { dims: vec![2, 31], values: Values::Float(numbers(3, 62)) };
    for (feeds, wanted, says) in [
        (vec![], "y", "graph"),
        (vec![("q".to_owned(), x.clone())], "y", "q"),
        (vec![("x".to_owned(), wrong)], "y", "x"),
        (vec![("x".to_owned(), x)], "nowhere", "nowhere"),
    ] {
        let error = runner.run(&feeds, &[wanted.to_owned()]).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}
