//! What is exported computes what was trained: in the embedded engine and in onnxruntime.

use super::training::{quantized, quantized_with, settings};
use super::{difference, flat, quarters};
use crate::vision::onnxruntime;
use candle_core::{D, Tensor};
use nibble_models::graph::{self, GraphRunner, Rten, Values};
use nibble_models::qat::arch::{ARCHITECTURES, build};
use nibble_models::qat::dataset::{Augment, Dataset};
use nibble_models::qat::net::Net;
use nibble_models::qat::quantizer::Mode;
use nibble_models::qat::train::{TrainSettings, train};
use nibble_quant::onnx::{External, Model};
use std::sync::atomic::AtomicBool;

fn all(data: &Dataset) -> Tensor {
    data.batch(&(0..data.len()).collect::<Vec<_>>(), Augment::default(), 0).unwrap().0
}

fn trained(model: &Model, data: &Dataset, epochs: usize) -> Model {
    let mut net = Net::float(model).unwrap();
    let stop = AtomicBool::new(false);
    train(&mut net, None, (data, None), &settings(epochs), &stop, &mut |_, _| (), &mut |_| ()).unwrap();
    net.export().unwrap()
}

fn classes(logits: &Tensor) -> Vec<u32> {
    logits.argmax(D::Minus1).unwrap().to_vec1().unwrap()
}

/// Logits of every sample in onnxruntime, one sample at a time.
fn in_onnxruntime(model: &Model, data: &Dataset, place: &std::path::Path) -> Option<Tensor> {
    let [file, samples, out] = ["model.onnx", "samples.npy", "out.npy"].map(|name| place.join(name));
    model.save(&file, External::Auto).unwrap();
    all(data).write_npy(&samples).unwrap();
    onnxruntime(&["run", file.to_str()?, samples.to_str()?, out.to_str()?])?;
    Some(Tensor::read_npy(&out).unwrap())
}

#[test]
fn float_models_are_onnxruntimes() {
    let (data, place) = (quarters(12, 2), tempfile::tempdir().unwrap());
    for architecture in ARCHITECTURES {
        let model = trained(&build(architecture.name, [1, 8, 8], 4, 3).unwrap(), &quarters(64, 1), 1);
        let ours = Net::float(&model).unwrap().forward(&all(&data), Mode::Evaluate).unwrap();
        let Some(theirs) = in_onnxruntime(&model, &data, place.path()) else { return };
        assert!(difference(&ours, &theirs) < 1e-4, "{}: {}", architecture.name, difference(&ours, &theirs));
    }
}

#[test]
fn integers_decide_as_the_network_in_training_did() {
    let (data, place) = (quarters(96, 2), tempfile::tempdir().unwrap());
    for architecture in ARCHITECTURES {
        let float = trained(&build(architecture.name, [1, 8, 8], 4, 3).unwrap(), &quarters(64, 1), 3);
        for (bits, learn, normalizing) in [(8, false, 0), (4, true, 0), (3, false, 0), (8, false, 1), (4, true, 2)] {
            let mut net = quantized_with(&float, &quarters(64, 1), bits, learn, normalizing > 0);
            let stop = AtomicBool::new(false);
            let how = TrainSettings { normalizing, ..settings(2) };
            train(&mut net, None, (&quarters(64, 1), None), &how, &stop, &mut |_, _| (), &mut |_| ()).unwrap();
            let ours = net.forward(&all(&data), Mode::Evaluate).unwrap();
            let exported = net.export().unwrap();
            let name = format!("{} with {bits} bits, {normalizing} epochs of batch norms", architecture.name);
            // The embedded engine has no Clip over integers, which limits codes of fewer bits.
            let same = |other: &Tensor| classes(&ours).iter().zip(classes(other)).filter(|(a, b)| **a == *b).count();
            let output = [exported.graph().output[0].name().to_owned()];
            let feed = graph::Tensor { dims: vec![96, 1, 8, 8], values: Values::Float(flat(&all(&data))) };
            let runner = Rten::new(&exported, &output, 1).unwrap();
            let found = runner.run(&[(net.input().to_owned(), feed)], &output);
            match found {
                Ok(mut found) => {
                    let found = found.remove(0);
                    let logits = found.as_floats("logits").unwrap().to_vec();
                    let found = Tensor::from_vec(logits, found.dims, ours.device()).unwrap();
                    // A value on the edge between two codes may fall to either side.
                    assert!(same(&found) >= 95, "{name}: {} of 96", same(&found));
                }
                Err(e) => assert!(bits < 8 && e.to_string().contains("_Clip"), "{name}: {e}"),
            }
            if let Some(theirs) = in_onnxruntime(&exported, &data, place.path()) {
                assert!(same(&theirs) >= 95, "{name}, onnxruntime: {} of 96", same(&theirs));
            }
        }
    }
}

/// Eight bits lose little, whatever is merged into ranges: the network in training is near the float one.
#[test]
fn eight_bits_are_near_the_float_model() {
    let data = quarters(64, 1);
    for architecture in ARCHITECTURES {
        let float = trained(&build(architecture.name, [1, 8, 8], 4, 3).unwrap(), &data, 3);
        let exact = Net::float(&float).unwrap().forward(&all(&data), Mode::Evaluate).unwrap();
        let rounded = quantized(&float, &data, 8, true).forward(&all(&data), Mode::Evaluate).unwrap();
        assert!(difference(&rounded, &exact) < 0.1, "{}: {}", architecture.name, difference(&rounded, &exact));
    }
}

/// Batch norms that are made anew change nothing until something is learned, and then go by the batch.
#[test]
fn new_batch_norms_are_the_identity() {
    let data = quarters(64, 1);
    let float = trained(&build("cnn", [1, 8, 8], 4, 3).unwrap(), &data, 3);
    let [mut without, mut with] = [false, true].map(|norms| quantized_with(&float, &data, 8, false, norms));
    let [a, b] = [&mut without, &mut with].map(|net| net.forward(&all(&data), Mode::Evaluate).unwrap());
    assert!(difference(&b, &a) < 0.01, "{}", difference(&b, &a));
    with.normalize(true);
    // The batch is what was observed, so its statistics are the running ones but for rounding.
    let batch = with.forward(&all(&data), Mode::Train).unwrap();
    assert!(difference(&batch, &a) < 0.05, "{}", difference(&batch, &a));
    let few = with.forward(&all(&data).narrow(0, 0, 8).unwrap(), Mode::Train).unwrap();
    let whole = a.narrow(0, 0, 8).unwrap();
    assert!(difference(&few, &whole) > 0.05, "not the batch's own: {}", difference(&few, &whole));
}

/// What is read back from an exported file is what was written: a quantized model can be looked at as a network too.
#[test]
fn an_exported_model_is_a_network_again() {
    let data = quarters(24, 2);
    let float = build("cnn", [1, 8, 8], 4, 3).unwrap();
    let mut net = quantized(&float, &data, 8, true);
    let mut again = Net::float(&net.export().unwrap()).unwrap();
    assert_eq!(again.weights().len(), net.weights().len());
    assert_eq!(again.activations().len(), net.activations().len());
    let [a, b] = [&mut net, &mut again].map(|n| n.forward(&all(&data), Mode::Evaluate).unwrap());
    assert!(difference(&b, &a) < 1e-2, "{}", difference(&b, &a));
}
