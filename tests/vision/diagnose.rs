//! Diagnosis: what is found by running a part again is what whole models give, and figures are those of the values.

use super::{alike, cnn, finish, gelu, mlp, options, samples};
use crate::small::{constant, model, node};
use nibble_models::graph::{GraphRunner, Rten, Tensor, Values, fold_model, inputs};
use nibble_models::vision::calibrate::CalibrateOptions;
use nibble_models::vision::data::{Data, DataOptions};
use nibble_models::vision::diagnose::{Sensitivity, SensitivityOptions, State, Tally, numbers, sensitivity};
use nibble_models::vision::prepare::{Equalize, Prepared, prepare};
use nibble_quant::observer::choose;
use nibble_quant::onnx::{Model, Selector, Settings};
use std::path::Path;
use std::sync::atomic::AtomicBool;

static STOP: AtomicBool = AtomicBool::new(false);

pub(super) fn calibrating(observer: &str) -> CalibrateOptions<'static> {
    CalibrateOptions { observer: choose(observer).unwrap(), threads: 1, correct_bias: true, headroom: 1.0, stop: &STOP }
}

pub(super) fn prepared(float: &Model, file: &Path, observer: &str) -> Prepared {
    let mut model = float.clone();
    let folded = fold_model(&mut model, 1).unwrap();
    let data = Data::open(file, &inputs(&model), options()).unwrap();
    prepare(model, folded, &alike(), &data, Equalize::Channels, &calibrating(observer), &mut || ()).unwrap()
}

/// Every layer by itself.
fn apart(threads: usize) -> SensitivityOptions<'static> {
    SensitivityOptions { labels: None, threads, apart: true, only: &[], stop: &STOP }
}

fn found(prepared: &Prepared, data: &Data, threads: usize, state: &mut State) -> Sensitivity {
    sensitivity(prepared, data, &apart(threads), state, &|| ()).unwrap()
}

/// The error of a model over samples, run whole.
fn whole(float: &Model, other: &Model, data: &Data) -> Tally {
    let outputs: Vec<String> = float.graph().output.iter().map(|o| o.name().to_owned()).collect();
    let [a, b] = [float, other].map(|model| Rten::new(model, &outputs, 1).unwrap());
    let mut sum = Tally::default();
    data.each(&mut |sample, _| {
        let [a, b] = [&a, &b].map(|runner| runner.run(&sample, &outputs).unwrap());
        let of = |all: &[Tensor]| all.to_vec();
        let (a, b) = (of(&a), of(&b));
        sum.add(&Tally::of(&outputs, &a.iter().collect::<Vec<_>>(), &b.iter().collect::<Vec<_>>(), None)?);
        Ok(true)
    })
    .unwrap();
    sum
}

fn near(a: &Tally, b: &Tally) -> bool {
    (a.signal - b.signal).abs() <= 1e-6 * b.signal && (a.noise - b.noise).abs() <= 1e-3 * b.noise + 1e-9 * b.signal
}

#[test]
fn running_what_comes_after_a_layer_gives_what_whole_models_give() {
    let place = tempfile::tempdir().unwrap();
    // Where only inputs of layers are rounded, a layer left out is the layer in float.
    for (name, float, apart) in
        [("cnn", cnn(), false), ("products", mlp(&[1, 5, 32], false), true), ("gelu", gelu(), true)]
    {
        let file = samples(&float, 5, place.path());
        let prepared = prepared(&float, &file, "minmax");
        let data = Data::open(&file, &inputs(&float), options()).unwrap();
        let sensitivity = found(&prepared, &data, 2, &mut State::none());
        assert_eq!((sensitivity.samples, sensitivity.layers.len()), (5, if name == "cnn" { 5 } else { 2 }), "{name}");
        let quantized = prepared.quantize().unwrap();
        let both = whole(&prepared.model, &quantized, &data);
        // Two ways to the same integers, whose floats are added in other orders.
        let found = sensitivity.sources.both.sqnr_db.unwrap() - both.score().sqnr_db.unwrap();
        assert!(found.abs() < 1e-4, "{name}: {found} dB apart");
        for (row, [only, without]) in sensitivity.layers.iter().zip(&sensitivity.tallies) {
            let this: Vec<Selector> = vec![row.layer.node.parse().unwrap()];
            let settings = Settings { include: this.clone(), ..alike() };
            let (_, alone) = prepared.quantize_with(&settings).unwrap();
            let wanted = whole(&prepared.model, &alone, &data);
            assert!(only.noise > 0.0 && near(only, &wanted), "{name}, {}: {only:?}, {wanted:?}", row.layer.node);
            if apart {
                let settings = Settings { exclude: this, ..alike() };
                let (_, rest) = prepared.quantize_with(&settings).unwrap();
                let wanted = whole(&prepared.model, &rest, &data);
                assert!(near(without, &wanted), "{name}, {}: {without:?}, {wanted:?}", row.layer.node);
            }
            assert!(without.noise < both.noise * 1.5, "{name}, {}", row.layer.node);
        }
        // Two halves of an error that have little to do with each other.
        let power = |score: &nibble_models::vision::diagnose::Score| 10f64.powf(-score.sqnr_db.unwrap() / 10.0);
        let sources = &sensitivity.sources;
        let (sum, all) = (power(&sources.weights) + power(&sources.activations), power(&sources.both));
        assert!(all < 2.0 * sum && sum < 2.0 * all, "{name}: {sources:?}");
    }
}

/// Two linear layers that read the input, and one that reads their sum.
fn fork() -> Model {
    let linear = |x: &str, n: usize, y: &str| {
        [
            node("MatMul", &[x, &format!("w{n}")], &format!("p{n}")),
            node("Add", &[&format!("p{n}"), &format!("b{n}")], y),
        ]
    };
    let nodes = [
        linear("x", 1, "h"),
        linear("x", 2, "g"),
        [node("Relu", &["h"], "r"), node("Add", &["r", "g"], "sum")],
        linear("sum", 3, "y"),
    ]
    .concat();
    let constants = [("w1", [32, 64]), ("w2", [32, 64]), ("w3", [64, 16])];
    let matrices = constants.iter().enumerate().map(|(i, (name, dims))| constant(name, dims, i as u32 + 1));
    let biases = [("b1", 64), ("b2", 64), ("b3", 16)].map(|(name, n)| constant(name, &[n], 9));
    finish(model(nodes, matrices.chain(biases).collect(), ("x", &[1, 5, 32]), &["y"]), &[1, 5, 16])
}

#[test]
fn layers_that_read_the_same_tensor_are_looked_at_together() {
    let place = tempfile::tempdir().unwrap();
    let float = fork();
    let file = samples(&float, 4, place.path());
    let prepared = prepared(&float, &file, "minmax");
    let data = Data::open(&file, &inputs(&float), options()).unwrap();
    let together = SensitivityOptions { apart: false, ..apart(2) };
    let found = sensitivity(&prepared, &data, &together, &mut State::none(), &|| ()).unwrap();
    let rows: Vec<(&str, &[String])> = found.layers.iter().map(|l| (l.layer.node.as_str(), &l.with[..])).collect();
    assert_eq!(rows, [("MatMul.p1", &["MatMul.p2".to_owned()][..]), ("MatMul.p3", &[][..])]);
    let both: Vec<Selector> = ["MatMul.p1", "MatMul.p2"].map(|name| name.parse().unwrap()).to_vec();
    let [only, without] = found.tallies[0];
    for (settings, tally) in
        [(Settings { include: both.clone(), ..alike() }, only), (Settings { exclude: both, ..alike() }, without)]
    {
        let (_, other) = prepared.quantize_with(&settings).unwrap();
        let wanted = whole(&prepared.model, &other, &data);
        assert!(tally.noise > 0.0 && near(&tally, &wanted), "{tally:?}, {wanted:?}");
    }
    // A pattern leaves one of them.
    let only = ["MatMul.p2".parse::<Selector>().unwrap()];
    let one = SensitivityOptions { only: &only, ..together };
    let found = sensitivity(&prepared, &data, &one, &mut State::none(), &|| ()).unwrap();
    assert_eq!((found.layers.len(), found.layers[0].layer.node.as_str()), (1, "MatMul.p2"));
}

/// Integers multiplied as integers are what they mean multiplied in floats.
#[test]
fn the_engines_fast_form_of_a_quantized_model_is_the_same_function() {
    let place = tempfile::tempdir().unwrap();
    for (name, float) in [("cnn", cnn()), ("products", mlp(&[1, 5, 32], false)), ("gelu", gelu()), ("fork", fork())] {
        let file = samples(&float, 3, place.path());
        let prepared = prepared(&float, &file, "minmax");
        let data = Data::open(&file, &inputs(&float), options()).unwrap();
        for per_channel in [true, false] {
            let mut settings = prepared.plan.settings.clone();
            settings.weights.per_channel = per_channel;
            let (_, quantized) = prepared.quantize_with(&settings).unwrap();
            let wanted: Vec<String> = quantized
                .graph()
                .node
                .iter()
                .filter(|n| ["MatMul", "QuantizeLinear"].contains(&n.op_type()))
                .map(|n| n.out().to_owned())
                .collect();
            let [plain, packed] = [Rten::new, Rten::packed].map(|new| new(&quantized, &wanted, 1).unwrap());
            data.each(&mut |sample, _| {
                let (a, b) = (plain.run(&sample, &wanted)?, packed.run(&sample, &wanted)?);
                for ((of, a), b) in wanted.iter().zip(&a).zip(&b) {
                    assert_eq!(a.dims, b.dims, "{name}, {of}");
                    match (&a.values, &b.values) {
                        (Values::Int(a), Values::Int(b)) => {
                            // A sum in another order may end on the other side of a half.
                            let off = a.iter().zip(b).filter(|(x, y)| x != y).count();
                            let most = a.iter().zip(b).map(|(x, y)| x.abs_diff(*y)).max().unwrap_or(0);
                            assert!(off * 50 <= a.len() && most <= 1, "{name}, {of}: {off} of {}, by {most}", a.len());
                        }
                        (Values::Float(a), Values::Float(b)) => {
                            let largest = a.iter().fold(0f32, |m, v| m.max(v.abs()));
                            let off = a.iter().zip(b).fold(0f32, |m, (x, y)| m.max((x - y).abs()));
                            assert!(off <= 0.02 * largest, "{name}, {of}: {off} of {largest}");
                        }
                        other => panic!("{name}, {of}: {other:?}"),
                    }
                }
                Ok(true)
            })
            .unwrap();
        }
    }
}

#[test]
fn a_diagnosis_goes_on_where_it_was_stopped_and_does_not_depend_on_threads() {
    let place = tempfile::tempdir().unwrap();
    let float = cnn();
    let file = samples(&float, 7, place.path());
    let prepared = prepared(&float, &file, "minmax");
    let data = |limit| Data::open(&file, &inputs(&float), DataOptions { limit, ..options() }).unwrap();
    let all = found(&prepared, &data(None), 1, &mut State::none());
    for threads in [2, 3] {
        assert_eq!(found(&prepared, &data(None), threads, &mut State::none()), all, "{threads}");
    }
    let path = place.path().join("state.json");
    found(&prepared, &data(Some(3)), 2, &mut State::open(&path).unwrap());
    let first = std::fs::read_to_string(&path).unwrap();
    // What was done is taken over: a figure changed in the file comes back.
    assert_eq!(found(&prepared, &data(None), 2, &mut State::open(&path).unwrap()), all);
    let noise = format!("\"noise\":{}", found(&prepared, &data(Some(1)), 1, &mut State::none()).tallies[0][0].noise);
    let changed = first.replace(&noise, "\"noise\":1e9");
    assert_ne!(changed, first);
    std::fs::write(&path, changed).unwrap();
    let other = found(&prepared, &data(None), 2, &mut State::open(&path).unwrap());
    assert!(other.tallies[0][0].noise >= 1e9);
    // Not for other models, and not out of a damaged file.
    let mut symmetric = prepared.clone();
    symmetric.plan.settings.weights.bits = 7;
    let mut state = State::open(&path).unwrap();
    let error = sensitivity(&symmetric, &data(None), &apart(1), &mut state, &|| ()).unwrap_err().to_string();
    assert!(error.contains("state.json") && error.contains("of other settings"), "{error}");
    std::fs::write(&path, &first[..first.len() / 2]).unwrap();
    assert!(State::open(&path).unwrap_err().to_string().contains("state.json: holds no state"));
    let labels = [0usize; 3];
    let labelled = SensitivityOptions { labels: Some(&labels), ..apart(1) };
    let error = sensitivity(&prepared, &data(None), &labelled, &mut State::none(), &|| ());
    assert!(error.unwrap_err().to_string().contains("3 of them"));
}

#[test]
fn figures_of_tensors_are_those_of_their_values() {
    let place = tempfile::tempdir().unwrap();
    let float = cnn();
    let file = samples(&float, 6, place.path());
    // Ranges that leave out a tenth of the values.
    let prepared = prepared(&float, &file, "percentile:80");
    let data = Data::open(&file, &inputs(&float), options()).unwrap();
    let (activations, weights) = numbers(&prepared, &data, &data, &calibrating("minmax"), &mut || ()).unwrap();
    assert_eq!((activations.len(), weights.len()), (prepared.plan.observed().len(), 5));
    let grid = prepared.plan.settings.activation;
    for row in &activations {
        let figures = &row.figures;
        for counts in [&figures.histogram.float, &figures.histogram.rounded] {
            assert_eq!(counts.iter().sum::<u64>(), figures.count, "{}", row.tensor);
        }
        let params = grid.params(prepared.calibration.ranges[&row.tensor]);
        assert!((params.scale - row.scale).abs() <= 1e-6 * row.scale, "{}", row.tensor);
        let mut values = Vec::new();
        let wanted = [row.tensor.clone()];
        let made = row.tensor != "x";
        let runner = Rten::new(&prepared.model, if made { &wanted } else { &[] }, 1).unwrap();
        data.each(&mut |sample, _| {
            let tensor = if made { runner.run(&sample, &wanted)?.remove(0) } else { sample[0].1.clone() };
            values.extend_from_slice(tensor.as_floats("")?);
            Ok(true)
        })
        .unwrap();
        let rounded: Vec<f32> = values.iter().map(|&v| params.dequantize(grid.quantize(params, v))).collect();
        let sum = |f: &dyn Fn(f64, f64) -> f64| {
            values.iter().zip(&rounded).map(|(&a, &b)| f(a.into(), b.into())).sum::<f64>()
        };
        let (signal, noise) = (sum(&|a, _| a * a), sum(&|a, b| (a - b) * (a - b)));
        let db = 10.0 * (signal / noise).log10();
        assert!((figures.sqnr_db.unwrap() - db).abs() < 0.01, "{}: {figures:?} and {db}", row.tensor);
        assert!((figures.mse - noise / values.len() as f64).abs() < 1e-3 * figures.mse, "{}", row.tensor);
        let beyond = |v: &&f32| **v > figures.reach[1] + row.scale / 2.0 || **v < figures.reach[0] - row.scale / 2.0;
        let share = values.iter().filter(beyond).count() as f64 / values.len() as f64;
        assert!((figures.saturated - share).abs() < 1e-3, "{}: {} and {share}", row.tensor, figures.saturated);
        // The range of all values cuts nothing off, so no other range of minmax's family is worse than it by much.
        let of = |name: &str| row.observers.iter().find(|o| o.observer == name).unwrap();
        assert!(of("minmax").range[1] >= of("percentile").range[1], "{}", row.tensor);
        let (lo, hi) = row.channels.iter().fold((f32::MAX, f32::MIN), |(lo, hi), c| (lo.min(c.lo), hi.max(c.hi)));
        assert_eq!([lo, hi], figures.range, "{}", row.tensor);
    }
    assert!(activations.iter().any(|row| row.figures.saturated > 0.02), "such ranges cut something off");
    for row in &weights {
        let db = row.figures.sqnr_db.unwrap();
        assert!((35.0..60.0).contains(&db) && row.figures.saturated == 0.0, "{row:?}");
        assert_eq!(row.channels.len(), row.shape[0], "{}", row.tensor);
    }
}
