//! `QuantLinear` in candle, against candle's own product with the weight in floats.

use candle_core::{DType, Device, Tensor};
use candle_nn::Module;
use nibble_kernels::{ActKind, DenseSource, PackedWeight, Pool};
use nibble_models::bridge::QuantLinear;
use nibble_quant::{AlgoInput, presets};
use std::sync::Arc;

fn numbers(len: usize, step: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * step) % 101) as f32 / 50.0 - 1.0).collect()
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    let difference = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
    difference.max(0).unwrap().to_scalar().unwrap()
}

#[test]
fn a_quantized_linear_is_candles_product_with_its_values() {
    compare(&Device::Cpu);
}

#[cfg(feature = "candle-cuda")]
#[test]
fn a_quantized_linear_on_candles_gpu_is_its_product_too() {
    match Device::new_cuda(0) {
        Ok(gpu) => compare(&gpu),
        Err(why) => {
            eprintln!("skipped: no CUDA device: {why}");
            assert!(std::env::var_os("NIBBLE_STRICT_GPU").is_none(), "a GPU is asked for: {why}");
        }
    }
}

/// Products on a device with candle's products on the CPU.
fn compare(device: &Device) {
    let (n, k) = (40, 96);
    let weight = numbers(n * k, 37);
    let preset = presets::by_name("int4-g32").unwrap();
    let spec = &preset.scheme.weight;
    let input =
        AlgoInput { name: "w", weight: &weight, shape: [n, k], spec, importance: None, calibrated: None, seed: 0 };
    let tensor = (nibble_quant::algo::algorithm("rtn").unwrap().run)(&input).unwrap();
    let bias = numbers(n, 29);
    let pool = Arc::new(Pool::new(2));
    let linear = QuantLinear::new(tensor.pack().unwrap(), Some(bias.clone()), ActKind::F32, pool).unwrap();

    let host = Device::Cpu;
    let floats = Tensor::from_vec(tensor.dequantize(), (n, k), &host).unwrap();
    let bias = Tensor::from_vec(bias, n, &host).unwrap();
    // A batch of rows, not contiguous, so that the module has to straighten it.
    let x = Tensor::from_vec(numbers(2 * 3 * k, 53), (2, k, 3), &host).unwrap().transpose(1, 2).unwrap();
    // A GPU's are straightened before: candle's own kernels aren't what is compared.
    let there = if device.is_cpu() { x.clone() } else { x.contiguous().unwrap().to_device(device).unwrap() };
    let ours = linear.forward(&there).unwrap().to_device(&host).unwrap();
    // Again, with the weight that is on the device now.
    let again = linear.forward(&there).unwrap().to_device(&host).unwrap();
    assert_eq!(largest_difference(&ours, &again), 0.0);
    assert_eq!(ours.dims(), [2, 3, n]);
    let theirs = x.contiguous().unwrap().broadcast_matmul(&floats.t().unwrap()).unwrap();
    let theirs = theirs.broadcast_add(&bias).unwrap();
    // Sums of 96 products of magnitudes up to 1: both round fewer than 200 times. A GPU rounds activations to halves.
    let halves = if device.is_cpu() { 0.0 } else { 96.0 / 2048.0 };
    assert!(largest_difference(&ours, &theirs) < 200.0 * 96.0 * f32::EPSILON + halves);
}

#[test]
fn what_does_not_fit_is_refused() {
    let weight = PackedWeight::pack_dense(4, 32, DenseSource::F32(&[0.5; 4 * 32])).unwrap();
    let pool = Arc::new(Pool::new(1));
    assert!(QuantLinear::new(weight.clone(), Some(vec![0.0; 3]), ActKind::I8, pool.clone()).is_err());
    let linear = QuantLinear::new(weight, None, ActKind::I8, pool).unwrap();
    for (shape, dtype) in [((2, 31), DType::F32), ((2, 32), DType::F64)] {
        assert!(linear.forward(&Tensor::zeros(shape, dtype, &Device::Cpu).unwrap()).is_err());
    }
}
