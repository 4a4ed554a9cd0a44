//! Samples of array files: the same ones from every format, one at a time, and damaged files said by name.

use candle_core::{DType, Device, Tensor as Array};
use nibble_models::graph::{Input, Tensor, Values};
use nibble_models::vision::data::{Data, DataOptions};
use nibble_models::vision::picture::preprocess;
use std::collections::HashMap;
use std::path::Path;

fn options(limit: Option<usize>) -> DataOptions {
    DataOptions {
        preprocess: preprocess("unit").unwrap(),
        crops: 0,
        seed: 0,
        bgr: false,
        limit,
        tokenizer: None,
        tokens: 128,
    }
}

fn input(name: &str, dims: &[usize], float: bool) -> Input {
    let dims = std::iter::once(None).chain(dims.iter().map(|&d| Some(d))).collect();
    Input { name: name.into(), dims, float }
}

fn read(path: &Path, inputs: &[Input], limit: Option<usize>) -> Result<Vec<Vec<(String, Tensor)>>, String> {
    let data = Data::open(path, inputs, options(limit)).map_err(|e| e.to_string())?;
    let mut samples = Vec::new();
    let seen = data.each(&mut |sample, _| {
        samples.push(sample);
        Ok(true)
    });
    assert_eq!(seen.map_err(|e| e.to_string())?, samples.len());
    assert_eq!(data.count().unwrap(), samples.len() as u64);
    Ok(samples)
}

#[test]
fn every_format_gives_the_same_samples() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name);
    let x = input("x", &[2, 3], true);
    let whole = Array::arange(0f32, 24., &Device::Cpu).unwrap().reshape((4, 2, 3)).unwrap();
    for dtype in [DType::F32, DType::F16, DType::F64, DType::U8, DType::I64, DType::U32] {
        let array = whole.to_dtype(dtype).unwrap();
        array.write_npy(path("x.npy")).unwrap();
        Array::write_npz(&[("x", array.clone())], path("x.npz")).unwrap();
        candle_core::safetensors::save(&HashMap::from([("x", array)]), path("x.safetensors")).unwrap();
        for file in ["x.npy", "x.npz", "x.safetensors"] {
            let samples = read(&path(file), std::slice::from_ref(&x), None).unwrap();
            assert_eq!(samples.len(), 4, "{file}");
            for (i, sample) in samples.iter().enumerate() {
                let [(name, tensor)] = sample.as_slice() else { panic!("{file}: {sample:?}") };
                let wanted: Vec<f32> = (6 * i..6 * i + 6).map(|v| v as f32).collect();
                assert_eq!((name.as_str(), tensor.dims.as_slice()), ("x", &[1, 2, 3][..]));
                assert_eq!(tensor.as_floats("x").unwrap(), wanted, "{file} {dtype:?}");
            }
            assert_eq!(read(&path(file), std::slice::from_ref(&x), Some(3)).unwrap().len(), 3);
        }
    }
    // One sample without a first axis, integers, and two inputs beside each other.
    whole.get(1).unwrap().write_npy(path("one.npy")).unwrap();
    assert_eq!(read(&path("one.npy"), &[x], None).unwrap().len(), 1);
    let ids = Array::new(&[[1i64, 2], [3, -4]], &Device::Cpu).unwrap();
    let both = [("a", ids.clone()), ("b", ids.to_dtype(DType::F32).unwrap())];
    Array::write_npz(&both, path("two.npz")).unwrap();
    let samples = read(&path("two.npz"), &[input("b", &[2], true), input("a", &[2], false)], None).unwrap();
    assert_eq!(samples.len(), 2);
    assert!(matches!(&samples[1][..], [(b, _), (a, Tensor { values: Values::Int(ids), .. })]
        if b == "b" && a == "a" && ids == &[3, -4]));
}

#[test]
fn damaged_arrays_are_said_by_name() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("x.npy");
    let x = input("x", &[3], true);
    Array::zeros((4, 3), DType::F32, &Device::Cpu).unwrap().write_npy(&file).unwrap();
    let good = std::fs::read(&file).unwrap();
    let refused = |bytes: &[u8], inputs: &[Input]| {
        std::fs::write(&file, bytes).unwrap();
        let why = read(&file, inputs, None).unwrap_err();
        assert!(why.contains("x.npy"), "{why}");
        why
    };
    for length in 0..good.len() {
        refused(&good[..length], std::slice::from_ref(&x));
    }
    assert!(refused(&[&good[..], &[0]].concat(), std::slice::from_ref(&x)).contains("49 bytes of values"));
    let text = String::from_utf8_lossy(&good).into_owned();
    let header = |from: &str, to: &str| {
        assert!(text.contains(from) && from.len() == to.len());
        let at = text.find(from).map(|chars| text[..chars].chars().count()).unwrap();
        let mut bytes = good.clone();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        bytes
    };
    for (from, to, says) in [
        ("<f4", ">f4", "`>f4`"),
        ("<f4", "<c8", "`<c8`"),
        ("'fortran_order': False", "'fortran_order': True ", "Fortran order"),
        ("(4,3,)", "(9,3,)", "wants 108"),
        ("(4,3,)", "(-4,3)", "shape (-4,3)"),
        ("'shape'", "'shabe'", "no `shape`"),
    ] {
        let why = refused(&header(from, to), std::slice::from_ref(&x));
        assert!(why.contains(says), "{says}: {why}");
    }
    assert!(refused(&good, &[input("x", &[5], true)]).contains("is 3 in dimension 1, the model takes 5"));
    assert!(refused(&good, &[input("x", &[3], true), input("y", &[3], true)]).contains("use .npz"));
}
