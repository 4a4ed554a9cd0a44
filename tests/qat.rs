//! Training with candle: operators and their gradients, graphs as networks, and what is exported.

mod data;
mod export;
mod fake;
mod graphs;
mod operators;
mod training;

use crate::small::numbers;
use candle_core::{Device, Tensor};
use nibble_models::qat::dataset::Dataset;
use std::path::PathBuf;

/// Numbers that look random, of a shape.
fn drawn(seed: u32, dims: &[usize]) -> Tensor {
    Tensor::from_vec(numbers(seed, dims.iter().product()), dims, &Device::Cpu).unwrap()
}

fn flat(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference, over the largest value.
fn difference(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let (a, b) = (flat(a), flat(b));
    let largest = b.iter().fold(1e-3f32, |m, v| m.max(v.abs()));
    a.iter().zip(&b).fold(0f32, |m, (x, y)| m.max((x - y).abs())) / largest
}

/// Pictures of 8 x 8 whose class is the quarter that is bright.
fn quarters(samples: usize, seed: u32) -> Dataset {
    let noise = numbers(seed, samples * 64);
    let labels: Vec<u32> = (0..samples as u32).map(|i| (i * 7 + 3) % 4).collect();
    let values = noise.iter().enumerate().map(|(i, n)| {
        let (label, y, x) = (labels[i / 64], i % 64 / 8, i % 8);
        let bright = (y / 4 * 2 + x / 4) as u32 == label;
        0.25 * n + if bright { 0.7 } else { 0.3 }
    });
    Dataset { path: PathBuf::from("quarters"), dims: vec![1, 8, 8], values: values.collect(), labels: Some(labels) }
}
