//! Training: it learns, the same seed gives the same bits, and a checkpoint goes on as if nothing had happened.

use super::{flat, quarters};
use crate::small::{constant, model, node};
use nibble_models::graph::fold_model;
use nibble_models::qat::arch::{ARCHITECTURES, build};
use nibble_models::qat::dataset::{Augment, Dataset};
use nibble_models::qat::loss::{Distill, Likeness};
use nibble_models::qat::net::{Net, QatSettings};
use nibble_models::qat::optimizer::Method;
use nibble_models::qat::quantizer::Mode;
use nibble_models::qat::train::{Epoch, TrainSettings, bearable_rate, likeness, observe, score, train};
use nibble_models::vision::calibrate::CalibrateOptions;
use nibble_models::vision::prepare::{Equalize, prepare};
use nibble_quant::observer::choose;
use nibble_quant::onnx::Model;
use nibble_quant::onnx::tensor::from_i64;
use std::sync::atomic::AtomicBool;

pub fn settings(epochs: usize) -> TrainSettings {
    TrainSettings {
        epochs,
        batch: 16,
        rate: 3e-3,
        warmup: 2,
        method: Method::AdamW { decay: 0.01 },
        seed: 5,
        augment: Augment::default(),
        distill: None,
        patience: None,
        following: 1,
        normalizing: 0,
        checkpoint: None,
        resume: false,
        stop_after: None,
    }
}

fn run(net: &mut Net, teacher: Option<&mut Net>, data: &Dataset, how: &TrainSettings) -> Vec<Epoch> {
    let stop = AtomicBool::new(false);
    train(net, teacher, (data, Some(data)), how, &stop, &mut |_, _| (), &mut |_| ()).unwrap()
}

fn learned(net: &Net) -> Vec<f32> {
    net.parameters().values().flat_map(|v| flat(v.as_tensor())).collect()
}

/// The quantized network of a float model.
pub fn quantized(float: &Model, data: &Dataset, bits: u32, learn: bool) -> Net {
    quantized_with(float, data, bits, learn, false)
}

/// The same, with batch norms after its convolutions in training or without.
pub fn quantized_with(float: &Model, data: &Dataset, bits: u32, learn: bool, batch_norms: bool) -> Net {
    let mut model = float.clone();
    let folded = fold_model(&mut model, 1).unwrap();
    let how = QatSettings {
        weight_bits: bits,
        activation_bits: bits,
        learn,
        algorithm: "search",
        batch_norms,
        exclude: vec![],
        include: vec![],
        fine: vec![],
    };
    let stop = AtomicBool::new(false);
    let observer = choose("mse").unwrap();
    let options = CalibrateOptions { observer, threads: 1, correct_bias: !learn, headroom: 1.0, stop: &stop };
    let seen = data.drawn(model.graph().input[0].name(), 64, 0).unwrap();
    let equalize = Equalize::Channels;
    let prepared = prepare(model, folded, &how.settings(), &seen, equalize, &options, &mut || ()).unwrap();
    let float = Net::float(&prepared.model).unwrap();
    let mut net = Net::quantized(&prepared, &float, &how).unwrap();
    if batch_norms {
        observe(&mut net, data, 64, 0).unwrap();
    }
    net
}

#[test]
fn both_architectures_learn_and_the_same_seed_gives_the_same_bits() {
    let data = quarters(64, 1);
    for architecture in ARCHITECTURES {
        let model = build(architecture.name, [1, 8, 8], 4, 3).unwrap();
        let mut nets = [Net::float(&model).unwrap(), Net::float(&model).unwrap()];
        // Many small steps: a transformer stands still for the first few dozen.
        let how = TrainSettings { batch: 4, rate: 1e-3, ..settings(32) };
        let epochs = nets.each_mut().map(|net| run(net, None, &data, &how));
        assert!(epochs[0][31].loss < 0.7 * epochs[0][0].loss, "{}: {:?}", architecture.name, epochs[0]);
        assert_eq!(learned(&nets[0]), learned(&nets[1]), "{}", architecture.name);
        let share = score(&mut nets[0], &data, None).unwrap().unwrap().share();
        assert!(share > 0.7, "{}: {share}, {:?}", architecture.name, epochs[0]);
        let other = TrainSettings { seed: 6, ..settings(4) };
        run(&mut nets[1], None, &data, &other);
        assert_ne!(learned(&nets[0]), learned(&nets[1]));
    }
}

#[test]
fn going_on_from_a_checkpoint_is_not_stopping() {
    let data = quarters(48, 1);
    let place = tempfile::tempdir().unwrap();
    let float = build("cnn", [1, 8, 8], 4, 3).unwrap();
    for (learn, norms) in [(false, false), (true, false), (true, true)] {
        let file = place.path().join(format!("{learn}-{norms}.safetensors"));
        let augment = Augment { shift: 1 };
        let how = TrainSettings { patience: Some(9), augment, normalizing: 2 * usize::from(norms), ..settings(3) };
        let quantized = || quantized_with(&float, &data, 4, learn, norms);
        let mut whole = quantized();
        let wanted = run(&mut whole, None, &data, &how);
        let how = TrainSettings { checkpoint: Some(file.clone()), resume: true, ..how };
        let mut first = quantized();
        run(&mut first, None, &data, &TrainSettings { stop_after: Some(1), ..how.clone() });
        let mut second = quantized();
        let found = run(&mut second, None, &data, &how);
        assert_eq!(learned(&whole), learned(&second), "scales learned: {learn}, batch norms: {norms}");
        assert_eq!(whole.export().unwrap().proto, second.export().unwrap().proto);
        let losses = |epochs: &[Epoch]| epochs.iter().map(|e| e.loss).collect::<Vec<_>>();
        assert_eq!(losses(&found), losses(&wanted));

        // A checkpoint of another training, and ones that end early.
        let stop = AtomicBool::new(false);
        let mut refused = |how: &TrainSettings| {
            let ended = train(&mut second, None, (&data, None), how, &stop, &mut |_, _| (), &mut |_| ());
            ended.unwrap_err().to_string()
        };
        let error = refused(&TrainSettings { batch: 7, ..how.clone() });
        assert!(error.contains("is of another training"), "{error}");
        let bytes = std::fs::read(&file).unwrap();
        for keep in [0, 5, 60, bytes.len() / 2, bytes.len() - 1] {
            std::fs::write(&file, &bytes[..keep]).unwrap();
            let error = refused(&how);
            assert!(error.contains(&format!("{learn}-{norms}.safetensors")), "{keep} bytes: {error}");
        }
    }
}

#[test]
fn early_stopping_takes_the_best_epoch_back() {
    let data = quarters(48, 1);
    let mut net = Net::float(&build("cnn", [1, 8, 8], 4, 3).unwrap()).unwrap();
    // All samples are right after a while, and nothing gets better.
    let how = TrainSettings { patience: Some(2), rate: 5e-3, ..settings(30) };
    let epochs = run(&mut net, None, &data, &how);
    assert!(epochs.len() < 30, "it never stopped: {epochs:?}");
    let best = epochs.iter().filter_map(|e| e.valid).fold(0.0, f64::max);
    assert_eq!(score(&mut net, &data, None).unwrap().unwrap().share(), best);
}

#[test]
fn the_float_model_teaches_without_labels() {
    let data = quarters(64, 1);
    let float = build("cnn", [1, 8, 8], 4, 3).unwrap();
    let mut teacher = Net::float(&float).unwrap();
    run(&mut teacher, None, &data, &settings(4));
    let model = teacher.export().unwrap();
    let mut student = quantized(&model, &data, 4, true);
    let unlabelled = Dataset { labels: None, ..data };
    let before = score(&mut student, &unlabelled, Some(&mut teacher)).unwrap().unwrap();
    let how = TrainSettings {
        distill: Some(Distill { share: 1.0, by: Likeness::Classes { temperature: 2.0 } }),
        rate: 5e-4,
        ..settings(6)
    };
    let epochs = run(&mut student, Some(&mut teacher), &unlabelled, &how);
    let after = score(&mut student, &unlabelled, Some(&mut teacher)).unwrap().unwrap();
    assert!(epochs[5].loss < epochs[0].loss, "{epochs:?}");
    assert!(after.right >= before.right && after.share() > 0.7, "{before:?} {after:?}");
    // Without labels and without a teacher there is nothing to learn.
    let stop = AtomicBool::new(false);
    let ended = train(&mut student, None, (&unlabelled, None), &settings(1), &stop, &mut |_, _| (), &mut |_| ());
    assert!(ended.unwrap_err().to_string().contains("no labels"));
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let ended = train(&mut student, None, (&unlabelled, None), &settings(1), &stop, &mut |_, _| (), &mut |_| ());
    assert_eq!(ended.unwrap_err().to_string(), "stopped");
}

/// A model whose output is a vector for each of four places, of one sample, and pictures for it without labels.
fn encoder() -> (Model, Dataset) {
    let nodes = vec![
        node("Reshape", &["x", "rows"], "r"),
        node("MatMul", &["r", "w"], "h"),
        node("Add", &["h", "b"], "a"),
        node("Gelu", &["a"], "g"),
        node("MatMul", &["g", "v"], "y"),
    ];
    let constants = vec![
        from_i64("rows", &[3], &[1, 4, 16]),
        constant("w", &[16, 24], 1),
        constant("b", &[24], 2),
        constant("v", &[24, 8], 3),
    ];
    (model(nodes, constants, ("x", &[1, 1, 8, 8]), &["y"]), Dataset { labels: None, ..quarters(24, 2) })
}

#[test]
fn an_encoder_is_taught_by_values_alone_or_together() {
    let (float, data) = encoder();
    let mut teacher = Net::float(&float).unwrap();
    let rank = teacher.forward(&data.batch(&[0], Augment::default(), 0).unwrap().0, Mode::Evaluate).unwrap().rank();
    assert_eq!(
        (Likeness::of_rank(rank), Likeness::of_rank(2)),
        (Likeness::Values, Likeness::Classes { temperature: 2.0 })
    );
    let distill = Some(Distill { share: 1.0, by: Likeness::Values });
    let how = TrainSettings { distill, rate: 2e-3, batch: 8, ..settings(12) };
    let mut student = quantized(&float, &data, 4, true);
    assert_eq!(student.together(8), 8);
    let before = likeness(&mut student, &data, &mut teacher).unwrap();
    let epochs = run(&mut student, Some(&mut teacher), &data, &how);
    let after = likeness(&mut student, &data, &mut teacher).unwrap();
    assert!(after > before + 1.0, "{before} dB, then {after}");
    assert_eq!(epochs[11].valid_db, Some(after));
    assert!(epochs.iter().all(|e| e.valid.is_none()));
    // The loss is what decibels are of, sample by sample.
    assert!((-10.0 * epochs[11].loss.log10() - after).abs() < 3.0, "{epochs:?}");

    // A graph that can't take several samples adds their gradients up: the same training, but for rounding.
    let mut alone = float.clone();
    alone
        .graph_mut()
        .node
        .extend([node("Reshape", &["y", "bare"], "values"), node("Reshape", &["values", "shape"], "z")]);
    alone.graph_mut().initializer.extend([from_i64("bare", &[1], &[32]), from_i64("shape", &[3], &[1, 4, 8])]);
    alone.graph_mut().output[0].name = Some("z".into());
    let [mut one, mut many] = [&alone, &float].map(|m| Net::float(m).unwrap());
    assert_eq!((one.together(8), many.together(8)), (1, 8));
    let short = TrainSettings { rate: 1e-3, method: Method::Sgd, ..settings(2) };
    let stop = AtomicBool::new(false);
    let taught = TrainSettings { distill, ..short };
    // Two other networks, which have something to learn.
    for net in [&mut one, &mut many] {
        let var = net.parameters()["w"].clone();
        var.set(&var.as_tensor().affine(0.7, 0.0).unwrap()).unwrap();
    }
    for (net, teacher) in [(&mut one, &alone), (&mut many, &float)] {
        let mut teacher = Net::float(teacher).unwrap();
        train(net, Some(&mut teacher), (&data, None), &taught, &stop, &mut |_, _| (), &mut |_| ()).unwrap();
    }
    let apart = learned(&one).iter().zip(learned(&many)).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(apart < 1e-6, "{apart}");
    assert_ne!(learned(&many), learned(&Net::float(&float).unwrap()));
}

#[test]
fn the_rate_that_a_network_bears_makes_the_loss_smaller() {
    let (float, data) = encoder();
    let mut teacher = Net::float(&float).unwrap();
    let distill = Some(Distill { share: 1.0, by: Likeness::Values });
    for (method, share) in [(Method::AdamW { decay: 0.0 }, 0.2), (Method::Sgd, 0.2)] {
        let mut student = quantized(&float, &data, 3, false);
        let how = TrainSettings { distill, method, warmup: 0, batch: 24, ..settings(8) };
        let most = bearable_rate(&mut student, Some(&mut teacher), &data, &how).unwrap().unwrap();
        let untouched = bearable_rate(&mut student, Some(&mut teacher), &data, &how).unwrap().unwrap();
        assert_eq!(most, untouched, "asking changes nothing");
        let epochs = run(&mut student, Some(&mut teacher), &data, &TrainSettings { rate: share * most, ..how.clone() });
        assert!(epochs[7].loss < 0.9 * epochs[0].loss, "{method:?}: {epochs:?}");
        // A hundred times as much is too much.
        let mut other = quantized(&float, &data, 3, false);
        let wild = run(&mut other, Some(&mut teacher), &data, &TrainSettings { rate: 100.0 * most, ..how });
        assert!(wild[1].loss > epochs[1].loss, "{method:?}: {wild:?}");
    }
}
