//! Equalization of a Vision Transformer: its function stays, channels come to like ranges, and one run over the samples
//! finds the ranges that two find.

use super::export::{difference, small_vit, tensor, write};
use super::{options, samples};
use nibble_models::graph::{GraphRunner, Rten, Tensor, fold_model, inputs};
use nibble_models::vision::calibrate::{
    CalibrateOptions, calibrate, equalize_and_calibrate, equalize_channels, one_run_is_enough,
};
use nibble_models::vision::data::Data;
use nibble_models::vision::export::export;
use nibble_quant::observer::choose;
use nibble_quant::onnx::{Fine, Folded, Model, Settings, fold, plan};
use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

/// A small transformer in which one channel of the values and one before a GELU are far larger than the others.
fn uneven(place: &std::path::Path) -> Model {
    let mut tensors = small_vit();
    for (name, row, by) in [
        ("vit.encoder.layer.0.attention.attention.value", 5, 60.0),
        ("vit.encoder.layer.1.intermediate.dense", 7, 60.0),
    ] {
        for part in ["weight", "bias"] {
            let name = format!("{name}.{part}");
            let old = &tensors[&name];
            let mut values = old.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let width = values.len() / old.dims()[0];
            values[row * width..(row + 1) * width].iter_mut().for_each(|v| *v *= by);
            let new = tensor(old.dims(), &values);
            tensors.insert(name, new);
        }
    }
    write(&tensors, r#"{"num_attention_heads": 2, "layer_norm_eps": 1e-6}"#, place);
    let mut model = export(place, None).unwrap();
    fold::freeze(&mut model, Some(1), &BTreeMap::new()).unwrap();
    model
}

fn logits(model: &Model, data: &Data) -> Vec<f32> {
    let wanted = ["logits".to_owned()];
    let runner = Rten::new(model, &wanted, 1).unwrap();
    let mut all = Vec::new();
    let run = |sample: &[(String, Tensor)]| runner.run(sample, &wanted).unwrap().remove(0);
    data.each(&mut |sample, _| {
        all.extend_from_slice(run(&sample).as_floats("logits").unwrap());
        Ok(true)
    })
    .unwrap();
    all
}

#[test]
fn equalization_keeps_the_function_and_one_run_finds_what_two_find() {
    let place = tempfile::tempdir().unwrap();
    let mut float = uneven(place.path());
    let map = fold_model(&mut float, 1).unwrap();
    let file = samples(&float, 6, place.path());
    let data = Data::open(&file, &inputs(&float), options()).unwrap();
    let stop = AtomicBool::new(false);
    let how = CalibrateOptions {
        observer: choose("minmax").unwrap(),
        threads: 1,
        correct_bias: true,
        headroom: 1.0,
        stop: &stop,
    };
    for fine in [Vec::new(), vec![Fine::Gelu]] {
        one_run_finds_what_two_find(&float, &map, &data, &how, &Settings { fine, ..Settings::default() });
    }
}

fn one_run_finds_what_two_find(float: &Model, map: &Folded, data: &Data, how: &CalibrateOptions, settings: &Settings) {
    let make = |model: &Model| plan(model, settings, map);
    let before = make(float).unwrap();
    assert!(one_run_is_enough(&before, how));

    let mut twice = float.clone();
    let scaled = equalize_channels(&mut twice, &before, data, how, &mut || ()).unwrap();
    let changed: Vec<(&str, &str)> = scaled.iter().map(|s| (s.tensor.as_str(), s.of.as_str())).collect();
    let of = |part: &str| changed.iter().filter(|(_, of)| of.contains(part)).collect::<Vec<_>>();
    assert!(of("layer.0.attention/Reshape").iter().any(|(tensor, of)| tensor == of), "values: {changed:?}");
    // A product is put in after a GELU, but not where its values have two terms anyway.
    let put_in = of("layer.1.mlp/act").iter().any(|(tensor, of)| tensor != of);
    assert_eq!(put_in, settings.fine.is_empty(), "{changed:?}");
    let (a, b) = (logits(float, data), logits(&twice, data));
    assert!(difference(&b, &a) < 1e-4, "{}", difference(&b, &a));

    let plan_of_two = make(&twice).unwrap();
    let two = calibrate(&twice, &plan_of_two, data, how, &mut || ()).unwrap();
    let mut once = float.clone();
    let (plan_of_one, one) = equalize_and_calibrate(&mut once, &make, data, how, &mut || ()).unwrap();
    assert_eq!(plan_of_one.nodes, plan_of_two.nodes);
    for name in plan_of_two.observed() {
        let (x, y) = (one.ranges[&name], two.ranges[&name]);
        let near = |a: f32, b: f32| (a - b).abs() <= 1e-4 * y.absmax();
        assert!(near(x.lo, y.lo) && near(x.hi, y.hi), "{name}: {x:?} and {y:?}");
    }
    for (name, means) in &two.means {
        let largest = two.ranges[name].absmax() as f64;
        assert!(one.means[name].iter().zip(means).all(|(a, b)| (a - b).abs() <= 1e-4 * largest), "{name}");
        assert_eq!(one.ranks[name], two.ranks[name], "{name}");
    }
}
