//! ONNX Runtime as an engine: the same values as onnxruntime in Python, any tensor by name, and errors with names.

use super::{cnn, mlp, numbers, onnxruntime, samples, write_npy};
use crate::assets::onnx_runtime;
use nibble_models::graph::{GraphRunner, Ort, OrtLibrary, Rten, Tensor, Values};
use nibble_models::vision::latency::latencies;
use nibble_quant::onnx::External;

#[test]
fn onnx_runtime_gives_what_it_gives_in_python_and_any_tensor_by_name() {
    let Some(path) = onnx_runtime() else { return };
    let library = OrtLibrary::open(&path).unwrap();
    let place = tempfile::tempdir().unwrap();
    let float = cnn();
    let data = samples(&float, 1, place.path());
    let (model, out) = (place.path().join("cnn.onnx"), place.path().join("out.npy"));
    float.save(&model, External::Auto).unwrap();
    onnxruntime(&["run", model.to_str().unwrap(), data.to_str().unwrap(), out.to_str().unwrap()]).unwrap();
    let wanted = candle_core::Tensor::read_npy(&out).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();

    let x = Tensor { dims: vec![1, 3, 8, 8], values: Values::Float(numbers(7, 192)) };
    let feeds = [("x".to_owned(), x)];
    let kept: Vec<String> = ["logits", "pool", "r1"].map(String::from).to_vec();
    let runner = Ort::new(&library, &float, &kept, 1).unwrap();
    let found = runner.run(&feeds, &kept).unwrap();
    assert_eq!(
        found.iter().map(|t| t.dims.clone()).collect::<Vec<_>>(),
        [vec![1, 10], vec![1, 32, 1, 1], vec![1, 16, 8, 8]]
    );
    drop(library);
    let library = OrtLibrary::open(&path).unwrap();
    let plain = Ort::new(&library, &float, &[], 1).unwrap().run(&feeds, &kept[..1]).unwrap();
    assert_eq!(plain[0].as_floats("logits").unwrap(), wanted);
    // The embedded engine computes the same function.
    let other = Rten::new(&float, &kept, 1).unwrap().run(&feeds, &kept).unwrap();
    for ((name, a), b) in kept.iter().zip(&found).zip(&other) {
        let (a, b) = (a.as_floats(name).unwrap(), b.as_floats(name).unwrap());
        let (signal, noise) = a.iter().zip(b).fold((0.0, 0.0), |(s, n), (x, y)| (s + x * x, n + (x - y) * (x - y)));
        assert!(noise <= signal * 1e-9, "{name}: {noise} of {signal}");
    }
    let times = latencies(&[&runner, &runner], &feeds, &kept[..1], 3).unwrap();
    assert!(times.len() == 2 && times.iter().all(|t| 0.0 < t.lower_decile_ms && t.lower_decile_ms <= t.median_ms));
}

#[test]
fn what_onnx_runtime_refuses_is_said_by_name() {
    let Some(path) = onnx_runtime() else { return };
    let place = tempfile::tempdir().unwrap();
    let nowhere = place.path().join("libonnxruntime.so");
    let error = OrtLibrary::open(&nowhere).err().unwrap().to_string();
    assert!(error.contains("libonnxruntime.so"), "{error}");
    write_npy(&nowhere, &[2], &[1.0, 2.0]);
    let error = OrtLibrary::open(&nowhere).err().map(|e| e.to_string());
    // Another test of this process may have the library open already, and a process has one.
    assert!(error.is_none_or(|e| e.contains("not ONNX Runtime's library")), "a file of numbers is no library");

    let library = OrtLibrary::open(&path).unwrap();
    let runner = Ort::new(&library, &mlp(&[2, 32], true), &[], 1).unwrap();
    let x = |name: &str, dims: &[usize], values| (name.to_owned(), Tensor { dims: dims.to_vec(), values });
    let floats = |n| Values::Float(vec![0.5; n]);
    let y = ["y".to_owned()];
    for (feed, wanted, says) in [
        (x("z", &[2, 32], floats(64)), "y", "z: is no input"),
        (x("x", &[2, 32], Values::Int(vec![1; 64])), "y", "x:"),
        (x("x", &[2, 31], floats(62)), "y", "Got: 31 Expected: 32"),
        (x("x", &[2, 32], floats(64)), "nothing", "nothing"),
    ] {
        let error = runner.run(&[feed], &[wanted.to_owned()]).unwrap_err().to_string();
        assert!(error.contains(says), "{says}: {error}");
    }
    assert_eq!(runner.run(&[x("x", &[2, 32], floats(64))], &y).unwrap()[0].dims, [2, 16]);
    let mut broken = mlp(&[2, 32], true);
    broken.graph_mut().node[0].op_type = Some("NoSuchOperator".into());
    let error = Ort::new(&library, &broken, &[], 1).err().unwrap().to_string();
    assert!(error.contains("ONNX Runtime can't load it") && error.contains("NoSuchOperator"), "{error}");
}
