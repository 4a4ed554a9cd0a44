//! What rescues a model that rounding broke: weights of neighbouring layers brought to like ranges, rounding that is learned.

use super::diagnose::calibrating;
use super::export::difference;
use super::{alike, cnn, gelu, mlp, numbers, onnxruntime, options, samples, write_npy};
use nibble_models::graph::{GraphRunner, Rten, fold_model, inputs};
use nibble_models::qat::adaround::{Learning, learn};
use nibble_models::vision::calibrate::equalize_weights;
use nibble_models::vision::data::Data;
use nibble_models::vision::prepare::{Equalize, Prepared, prepare};
use nibble_quant::observer::{IntGrid, IntType};
use nibble_quant::onnx::equalize::absorb::{self, Moments, absorb};
use nibble_quant::onnx::equalize::layers::costs;
use nibble_quant::onnx::plan::{Stored, Target};
use nibble_quant::onnx::tensor::{floats, from_f32};
use nibble_quant::onnx::weights::Rounding;
use nibble_quant::onnx::{External, Graph, Mode, Model, Settings};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

static STOP: AtomicBool = AtomicBool::new(false);

/// [`cnn`] whose depthwise weights differ in size from channel to channel, and what reads them the other way round: what
/// folding BatchNormalization leaves of such networks. ReLU6 is not reached, but by channel 3.
fn uneven() -> Model {
    let mut model = cnn();
    let factor = |c: usize| if c == 3 { 1.0 } else { 4f32.powi((c % 5) as i32 - 2) };
    for tensor in &mut model.graph_mut().initializer {
        let dims: Vec<usize> = tensor.dims.iter().map(|&d| d as usize).collect();
        let mut values = floats(tensor).unwrap();
        match tensor.name() {
            "w1" => values.iter_mut().for_each(|v| *v *= 0.3),
            "b1" => values.iter_mut().enumerate().for_each(|(c, v)| *v = if c == 3 { 7.0 } else { 0.1 * *v }),
            "w2" => values.iter_mut().enumerate().for_each(|(i, v)| *v *= factor(i / 9)),
            "b2" => values.iter_mut().enumerate().for_each(|(c, v)| *v *= factor(c)),
            "w3" => values.iter_mut().enumerate().for_each(|(i, v)| *v /= factor(i / 9 % 16)),
            _ => continue,
        }
        *tensor = from_f32(tensor.name(), &dims, &values);
    }
    model
}

/// Samples that are sums of four patterns: of inputs that have nothing to do with each other the nearest is the best.
fn correlated(model: &Model, count: usize, place: &Path) -> PathBuf {
    let dims: Vec<usize> =
        std::iter::once(count).chain(inputs(model)[0].dims[1..].iter().map(|d| d.unwrap())).collect();
    let size: usize = dims[1..].iter().product();
    let (patterns, shares) = (numbers(11, 4 * size), numbers(12, 4 * count));
    let value = |i: usize| (0..4).map(|k| shares[i / size * 4 + k] * patterns[k * size + i % size]).sum();
    let path = place.join("correlated.npy");
    write_npy(&path, &dims, &(0..count * size).map(value).collect::<Vec<f32>>());
    path
}

fn logits(model: &Model, data: &Data) -> Vec<f32> {
    let wanted = vec![model.graph().output[0].name().to_owned()];
    let runner = Rten::new(model, &wanted, 1).unwrap();
    let mut all = Vec::new();
    data.each(&mut |sample, _| {
        all.extend_from_slice(runner.run(&sample, &wanted)?.remove(0).as_floats("")?);
        Ok(true)
    })
    .unwrap();
    all
}

fn decibels(exact: &[f32], found: &[f32]) -> f64 {
    let square = |a: f32| f64::from(a).powi(2);
    let signal: f64 = exact.iter().map(|&a| square(a)).sum();
    let noise: f64 = exact.iter().zip(found).map(|(a, b)| square(a - b)).sum();
    10.0 * (signal / noise).log10()
}

/// Decibels of the second model's output against the first one's, in onnxruntime, if it is there.
pub(super) fn in_onnxruntime(models: [&Model; 2], samples: &Path, place: &Path) -> Option<f64> {
    let files = ["a.onnx", "b.onnx"].map(|name| place.join(name));
    models.iter().zip(&files).for_each(|(model, file)| model.save(file, External::Auto).unwrap());
    let [a, b, samples] = [&files[0], &files[1], samples].map(|path| path.to_str().unwrap());
    let compared = onnxruntime(&["compare", a, b, samples])?;
    Some(10.0 * (compared["signal"].as_f64().unwrap() / compared["noise"].as_f64().unwrap()).log10())
}

fn made(float: &Model, file: &Path, settings: &Settings, equalize: Equalize) -> Prepared {
    let mut model = float.clone();
    let folded = fold_model(&mut model, 1).unwrap();
    let data = Data::open(file, &inputs(&model), options()).unwrap();
    prepare(model, folded, settings, &data, equalize, &calibrating("minmax"), &mut || ()).unwrap()
}

#[test]
fn layers_are_equalized_through_a_relu6_that_does_nothing_and_not_through_one_that_does() {
    let place = tempfile::tempdir().unwrap();
    let float = uneven();
    let file = samples(&float, 16, place.path());
    let data = Data::open(&file, &inputs(&float), options()).unwrap();
    let mut folded = float.clone();
    fold_model(&mut folded, 1).unwrap();
    let mut equal = folded.clone();
    let changed = equalize_weights(&mut equal, &data, &calibrating("minmax"), &mut || ()).unwrap();
    assert!(changed >= 1);
    let exact = logits(&folded, &data);
    let off = difference(&logits(&equal, &data), &exact);
    assert!(off < 1e-4, "the function is what it was: {off}");
    let of = |model: &Model, name: &str| {
        let graph = model.graph();
        floats(graph.initializer.iter().find(|t| t.name() == name).unwrap()).unwrap()
    };
    // Channel 3 reaches 6: what makes it stays.
    assert_eq!(of(&equal, "w1")[81..108], of(&folded, "w1")[81..108]);
    let spread = |values: &[f32]| {
        let ends = values.chunks(9).map(|c| c.iter().fold(0f32, |m, v| m.max(v.abs())));
        ends.clone().fold(0f32, f32::max) / ends.fold(f32::MAX, f32::min)
    };
    let (before, after) = (spread(&of(&folded, "w2")), spread(&of(&equal, "w2")));
    assert!(after < before / 4.0, "{before} and {after}");

    let mut settings = Settings::default();
    settings.weights.per_channel = false;
    let [plain, rescued] = [Equalize::Nothing, Equalize::Weights].map(|equalize| {
        let quantized = made(&float, &file, &settings, equalize).quantize().unwrap();
        decibels(&exact, &logits(&quantized, &data))
    });
    assert!(rescued > plain + 3.0, "{plain:.1} dB, with equal layers {rescued:.1} dB");
}

/// Pictures of slow waves: neighbours are alike, as in photographs.
fn smooth(model: &Model, count: usize, place: &Path) -> PathBuf {
    let dims: Vec<usize> =
        std::iter::once(count).chain(inputs(model)[0].dims[1..].iter().map(|d| d.unwrap())).collect();
    let phases = numbers(21, count * dims[1] * 3);
    let value = |i: usize| {
        let (x, y, plane) = (i % dims[3], i / dims[3] % dims[2], i / (dims[3] * dims[2]));
        let at = |k: usize| phases[plane * 3 + k];
        (0.5 * at(0) * x as f32 + 0.5 * at(1) * y as f32 + 3.0 * at(2)).sin()
    };
    let path = place.join("smooth.npy");
    write_npy(&path, &dims, &(0..dims.iter().product()).map(value).collect::<Vec<f32>>());
    path
}

#[test]
fn convolutions_are_rounded_by_what_their_windows_have_in_common() {
    let place = tempfile::tempdir().unwrap();
    let float = uneven();
    let file = smooth(&float, 24, place.path());
    let data = Data::open(&file, &inputs(&float), options()).unwrap();
    let mut folded = float.clone();
    fold_model(&mut folded, 1).unwrap();
    let exact = logits(&folded, &data);
    for per_channel in [true, false] {
        let found = ["rtn", "gptq"].map(|algorithm| {
            // Few bits: what is lost is weights'.
            let weights = Rounding { per_channel, bits: 4, pairs: false, algorithm };
            let settings = Settings { weights, ..Settings::default() };
            let quantized = made(&float, &file, &settings, Equalize::Nothing).quantize().unwrap();
            decibels(&exact, &logits(&quantized, &data))
        });
        // With one scale most is lost to the range of the largest channel, whatever codes are chosen.
        let margin = if per_channel { 2.0 } else { 0.2 };
        assert!(found[1] > found[0] + margin, "a scale a channel: {per_channel}, {found:?} dB");
    }
}

#[test]
fn outputs_beyond_a_relu6_hardly_count() {
    let place = tempfile::tempdir().unwrap();
    let mut float = uneven();
    for tensor in &mut float.graph_mut().initializer {
        let dims: Vec<usize> = tensor.dims.iter().map(|&d| d as usize).collect();
        // Channel 3 is always above 6, the others lie between the ends.
        if tensor.name() == "b1" {
            let bias: Vec<f32> = (0..16).map(|c| if c == 3 { 60.0 } else { 3.0 }).collect();
            *tensor = from_f32("b1", &dims, &bias);
        }
        if tensor.name() == "w1" {
            let values: Vec<f32> = floats(tensor).unwrap().iter().map(|v| v / 30.0).collect();
            *tensor = from_f32("w1", &dims, &values);
        }
    }
    let file = smooth(&float, 8, place.path());
    let mut settings = Settings::default();
    settings.weights.algorithm = "gptq";
    let prepared = made(&float, &file, &settings, Equalize::Nothing);
    let (seen, means) = (&prepared.calibration.windows["w1"], &prepared.calibration.row_means["w1"]);
    assert_eq!((seen.len(), means.len()), (16, 16 * 27));
    let [within, beyond] = [0, 3].map(|c| seen[c].mean_squares());
    assert!(within.iter().all(|&m| m > 0.0));
    for (a, b) in within.iter().zip(&beyond) {
        assert!((b / a - 0.05).abs() < 1e-3, "{a} within, {b} beyond");
    }
    // The rows are the same for all, and so are their means, however much they count.
    for (j, mean) in means.iter().enumerate() {
        assert!((mean - means[j % 27]).abs() < 1e-5, "{j}");
    }
    // The last convolution before the sum has nothing that cuts it off, and one matrix for all channels.
    assert_eq!(prepared.calibration.windows["w3"].len(), 1);
    assert!(!prepared.calibration.row_means.contains_key("w3"));
}

#[test]
fn onnxruntime_leaves_layers_float_that_are_to_be_float() {
    let place = tempfile::tempdir().unwrap();
    let float = uneven();
    let file = smooth(&float, 8, place.path());
    let data = Data::open(&file, &inputs(&float), options()).unwrap();
    // Integers before and after: rounded with one scale, its uneven channels would be lost.
    let w2 = || "weight:w2".parse().unwrap();
    let excluded = Settings { exclude: vec![w2()], ..alike() };
    let half = Settings { stored: vec![(w2(), Stored::Half)], ..alike() };
    let mut sizes = Vec::new();
    for (settings, reads) in [(excluded, "w2"), (half, "w2_float")] {
        let prepared = made(&float, &file, &settings, Equalize::Nothing);
        let quantized = prepared.quantize().unwrap();
        assert!(quantized.graph().node.iter().any(|n| n.arg(1) == reads), "w2 isn't float");
        sizes.push(
            quantized.graph().initializer.iter().map(|t| t.raw_data.as_ref().map_or(0, |r| r.len())).sum::<usize>(),
        );
        let here = decibels(&logits(&prepared.model, &data), &logits(&quantized, &data));
        let Some(there) = in_onnxruntime([&float, &quantized], &file, place.path()) else { return };
        assert!((there - here).abs() < 1.0, "{reads}: {there} dB in onnxruntime, {here} dB here");
    }
    assert_eq!(sizes[0] - sizes[1], 2 * 16 * 9, "half precision is two bytes less a weight");
}

#[test]
fn a_gemm_makes_integers_for_a_float_operator_where_the_runtime_needs_it() {
    let mut float = mlp(&[1, 32], true);
    let folded = fold_model(&mut float, 1).unwrap();
    let ort = Settings { exclude: vec!["weight:w2".parse().unwrap()], ..Settings::default() };
    let tensorrt = Settings { target: Target::TensorRt, activation: IntGrid::symmetric(IntType::S8), ..ort.clone() };
    let dynamic = Settings { mode: Mode::Dynamic, ..ort.clone() };
    for (settings, scaled) in [(ort, true), (tensorrt, false), (dynamic, false)] {
        let plan = nibble_quant::onnx::plan(&float, &settings, &folded).unwrap();
        assert_eq!(plan.quantized(), 1);
        assert_eq!(plan.scales.contains_key("r"), scaled, "{settings:?}: {:?}", plan.scales);
    }
}

#[test]
fn weights_are_stored_as_wanted_where_layers_can_have_them_so() {
    let place = tempfile::tempdir().unwrap();
    let float = mlp(&[1, 5, 32], false);
    let file = samples(&float, 6, place.path());
    let of = |stored: Stored| Settings { stored: vec![("op:MatMul".parse().unwrap(), stored)], ..Settings::default() };
    let data = Data::open(&file, &inputs(&float), options()).unwrap();
    let mut last = f64::INFINITY;
    for stored in [Stored::Half, Stored::Int4, Stored::Int4Int8] {
        let prepared = made(&float, &file, &of(stored), Equalize::Nothing);
        let quantized = prepared.quantize().unwrap();
        assert!(!quantized.graph().node.iter().any(|n| n.is("QuantizeLinear")), "{stored:?}: nothing is in integers");
        let here = decibels(&logits(&prepared.model, &data), &logits(&quantized, &data));
        let least = if stored == Stored::Half { 60.0 } else { 12.0 };
        assert!(here > least && here <= last + 0.5, "{stored:?}: {here} dB, {last} before");
        last = here;
        let Some(there) = in_onnxruntime([&float, &quantized], &file, place.path()) else { continue };
        assert!((there - here).abs() < 1.5, "{stored:?}: {there} dB in onnxruntime, {here} dB here");
    }
    // Calibration looks at what packed weights multiply, so that GPTQ has something to go by.
    let mut settings = of(Stored::Int4);
    settings.weights.algorithm = "gptq";
    let like = correlated(&float, 24, place.path());
    let data = Data::open(&like, &inputs(&float), options()).unwrap();
    let [nearest, gptq] = [of(Stored::Int4), settings].map(|settings| {
        let prepared = made(&float, &like, &settings, Equalize::Nothing);
        decibels(&logits(&prepared.model, &data), &logits(&prepared.quantize().unwrap(), &data))
    });
    assert!(gptq > nearest + 1.0, "{nearest} dB, {gptq} with GPTQ");

    let refused = |settings: &Settings, model: &Model| {
        let mut model = model.clone();
        let folded = fold_model(&mut model, 1).unwrap();
        nibble_quant::onnx::plan(&model, settings, &folded).unwrap_err().to_string()
    };
    let conv = Settings { stored: vec![("op:Conv".parse().unwrap(), Stored::Int4)], ..Settings::default() };
    assert!(refused(&conv, &uneven()).contains("no layer whose weight can be stored as int4"));
    let gone = Settings { stored: vec![("nothing".parse().unwrap(), Stored::Half)], ..Settings::default() };
    assert!(refused(&gone, &uneven()).contains("fits no node"));
    let mut huge = float.clone();
    let weight = huge.graph_mut().initializer.iter_mut().find(|t| t.dims.len() == 2).unwrap();
    let mut values = floats(weight).unwrap();
    values[3] = 1e5;
    let dims: Vec<usize> = weight.dims.iter().map(|&d| d as usize).collect();
    *weight = from_f32(weight.name(), &dims, &values);
    let prepared = made(&huge, &file, &of(Stored::Half), Equalize::Nothing);
    let error = prepared.quantize().unwrap_err().to_string();
    assert!(error.contains("has a value 100000; half precision ends at 65504"), "{error}");
}

#[test]
fn an_output_costs_what_its_readers_make_of_it() {
    let mut model = uneven();
    fold_model(&mut model, 1).unwrap();
    let graph = Graph::new(model.graph()).unwrap();
    let mut how = Settings::default().weights;
    assert!(costs(&graph, how).unwrap().is_empty(), "a scale a channel");
    how.per_channel = false;
    let found = costs(&graph, how).unwrap();
    let values = floats(graph.constant("w3").unwrap()).unwrap();
    // w3, (16, 16, 3, 3), reads what w2 makes.
    let wanted: Vec<f64> = (0..16)
        .map(|c| {
            let taps = |o: usize| values[(o * 16 + c) * 9..][..9].iter().map(|&w| f64::from(w).powi(2)).sum::<f64>();
            (0..16).map(|o| taps(o) * found["w3"][o]).sum()
        })
        .collect();
    let mean = wanted.iter().sum::<f64>() / 16.0;
    for (wanted, cost) in wanted.iter().zip(&found["w2"]) {
        assert!((cost - wanted / mean).abs() < 1e-9 * cost, "{cost} and {}", wanted / mean);
    }
}

#[test]
fn learned_rounding_is_never_worse_than_what_it_starts_from_and_better_on_the_whole() {
    let place = tempfile::tempdir().unwrap();
    let gemm = mlp(&[1, 32], true);
    for (name, float) in [("cnn", cnn()), ("products", mlp(&[1, 5, 32], false)), ("gemms", gemm), ("gelu", gelu())] {
        let file = correlated(&float, 24, place.path());
        let data = Data::open(&file, &inputs(&float), options()).unwrap();
        let mut settings = Settings::default();
        // Few bits: what is lost is weights'.
        settings.weights.bits = 4;
        settings.weights.algorithm = "search";
        let nearest = made(&float, &file, &settings, Equalize::Nothing);
        let exact = logits(&nearest.model, &data);
        let nearest = decibels(&exact, &logits(&nearest.quantize().unwrap(), &data));
        settings.weights.algorithm = "gptq";
        let mut prepared = made(&float, &file, &settings, Equalize::Nothing);
        let learned = learn(&mut prepared, Learning::default(), &STOP, &mut || ()).unwrap();
        assert_eq!(learned.len(), if name == "cnn" { 5 } else { 2 }, "{name}");
        for row in &learned {
            assert!(row.learned <= row.start, "{name}: {row:?}");
        }
        // Windows of a picture of noise have little to do with each other; what linear layers read here has.
        let linear = name != "cnn";
        let first = &learned[0];
        assert!(!linear || first.learned < first.start && first.moved > 0.0, "{name}: {first:?}");
        let quantized = prepared.quantize().unwrap();
        let better = decibels(&exact, &logits(&quantized, &data));
        assert!(better > nearest - if linear { 0.0 } else { 0.5 }, "{name}: {nearest:.2} dB, learned {better:.2} dB");
        // The same again gives the same, and onnxruntime means it too.
        let mut again = made(&float, &file, &settings, Equalize::Nothing);
        learn(&mut again, Learning::default(), &STOP, &mut || ()).unwrap();
        assert!(again.quantize().unwrap().proto == quantized.proto, "{name}");
        let Some(found) = in_onnxruntime([&float, &quantized], &file, place.path()) else { continue };
        assert!((found - better).abs() < 1.0, "{name}: {found} dB in onnxruntime, {better} dB here");
    }
}

/// A linear layer whose outputs are far from zero, a Relu, and one that reads it.
#[test]
fn what_channels_never_fall_below_moves_into_the_next_bias() {
    let place = tempfile::tempdir().unwrap();
    for (name, mut float) in [("gemms", mlp(&[1, 32], true)), ("products", mlp(&[1, 5, 32], false))] {
        for tensor in &mut float.graph_mut().initializer {
            if tensor.name() == "b1" {
                *tensor =
                    from_f32("b1", &[64], &(0..64).map(|c| if c % 2 == 0 { 40.0 } else { 0.5 }).collect::<Vec<_>>());
            }
        }
        let file = samples(&float, 32, place.path());
        let data = Data::open(&file, &inputs(&float), options()).unwrap();
        let mut folded = float.clone();
        fold_model(&mut folded, 1).unwrap();
        let reach = |model: &Model| {
            let wanted = ["r".to_owned()];
            let runner = Rten::new(model, &wanted, 1).unwrap();
            let mut largest = 0f32;
            data.each(&mut |sample, _| {
                let r = runner.run(&sample, &wanted)?.remove(0);
                largest = r.as_floats("r")?.iter().fold(largest, |m, v| m.max(*v));
                Ok(true)
            })
            .unwrap();
            largest
        };
        let graph = Graph::new(folded.graph()).unwrap();
        let axes = absorb::tensors(&graph);
        assert_eq!(axes.keys().collect::<Vec<_>>(), ["h"], "{name}");
        // A deviation of zero: as much as can be is taken out.
        let smallest = |c: usize| {
            let wanted = ["h".to_owned()];
            let runner = Rten::new(&folded, &wanted, 1).unwrap();
            let mut least = f32::MAX;
            data.each(&mut |sample, _| {
                let h = runner.run(&sample, &wanted)?.remove(0);
                least = h.as_floats("h")?.iter().skip(c).step_by(64).fold(least, |m, v| m.min(*v));
                Ok(true)
            })
            .unwrap();
            f64::from(least).max(0.0)
        };
        let means: Vec<f64> = (0..64).map(smallest).collect();
        assert!(means.iter().step_by(2).all(|&c| c > 5.0), "{name}: {means:?}");
        let squares = means.iter().map(|m| (m * m) as f32).collect();
        let seen = [("h".to_owned(), Moments { means, squares })].into();
        let mut absorbed = folded.clone();
        assert_eq!(absorb(&mut absorbed, &seen).unwrap(), 1, "{name}");
        let off = difference(&logits(&absorbed, &data), &logits(&folded, &data));
        assert!(off < 1e-4, "{name}: {off}");
        assert!(reach(&absorbed) < 0.8 * reach(&folded), "{name}: {} of {}", reach(&absorbed), reach(&folded));
    }
}
