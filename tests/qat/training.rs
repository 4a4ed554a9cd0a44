//! Training: it learns, the same seed gives the same bits, and a checkpoint goes on as if nothing had happened.

use super::{flat, quarters};
use nibble_models::graph::fold_model;
use nibble_models::qat::arch::{ARCHITECTURES, build};
use nibble_models::qat::dataset::{Augment, Dataset};
use nibble_models::qat::net::{Net, QatSettings};
use nibble_models::qat::optimizer::Method;
use nibble_models::qat::train::{Distill, Epoch, TrainSettings, observe, score, train};
use nibble_quant::observer::choose;
use nibble_quant::onnx::Model;
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
        histogram: true,
        algorithm: "search",
        batch_norms,
        exclude: vec![],
        include: vec![],
    };
    let (sample, _) = data.batch(&[0], Augment::default(), 0).unwrap();
    let mut net = Net::quantized(&model, &folded, &how, &sample).unwrap();
    observe(&mut net, data, 64, choose("mse").unwrap(), 0).unwrap();
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
    let how = TrainSettings { distill: Some(Distill { share: 1.0, temperature: 2.0 }), rate: 5e-4, ..settings(6) };
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
