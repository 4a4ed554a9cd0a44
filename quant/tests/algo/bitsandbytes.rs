//! NF4 with double quantization against what bitsandbytes stores, bit for bit: see scripts/goldens/bitsandbytes.py.

use nibble_quant::algo::{AlgoInput, algorithm};
use nibble_quant::{QTensor, ScaleData, nf4, presets};
use serde::Deserialize;
use sha2::{Digest, Sha256};

#[derive(Deserialize)]
struct Golden {
    shape: [usize; 2],
    weights: String,
    codes: String,
    absmax: String,
    nested_codes: String,
    nested_absmax: String,
    nested_map: String,
    offset: String,
    restored_absmax: String,
    values: String,
    values_nested: String,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("../data/bitsandbytes.json")).unwrap()
}

/// The script's weights: four 16-bit draws added up, some rows enlarged, and a few blocks made by hand.
fn weights([n, k]: [usize; 2]) -> Vec<f32> {
    let mut state = 1u64;
    let mut draw = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 48) as i64
    };
    let mut x: Vec<f32> = (0..n * k)
        .map(|i| {
            let x = ((0..4).map(|_| draw()).sum::<i64>() - 131070) as f32 * 2f32.powi(-18);
            if i / k % 7 == 3 { x * x * x } else { x }
        })
        .collect();
    x[5 * 64..6 * 64].fill(0.0);
    let middles: Vec<f32> = nf4::NF4.windows(2).map(|w| (w[0] + w[1]) / 2.0).collect();
    for i in 0..64 {
        x[6 * 64 + i] = middles[[0, 7, 14][i % 3]];
    }
    x[7 * 64] = -9.0;
    x
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}

fn floats(hex: &str) -> Vec<f32> {
    bytes(hex).chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn digest(values: &[f32]) -> String {
    let mut hash = Sha256::new();
    values.iter().for_each(|v| hash.update(v.to_le_bytes()));
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

fn quantize(preset: &str, golden: &Golden) -> QTensor {
    let preset = presets::by_name(preset).unwrap();
    let weight = weights(golden.shape);
    assert_eq!(digest(&weight), golden.weights, "the two ends made different weights");
    let input = AlgoInput {
        name: "w",
        weight: &weight,
        shape: golden.shape,
        spec: &preset.scheme.weight,
        importance: None,
        calibrated: None,
        seed: 0,
    };
    (algorithm(preset.algorithm).unwrap().run)(&input).unwrap()
}

/// The first element of a pair sits in the high nibble.
fn packed(codes: &[u8]) -> Vec<u8> {
    codes.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

#[test]
fn nf4_codes_and_absmax_are_those_of_bitsandbytes() {
    let golden = golden();
    let tensor = quantize("nf4-g64", &golden);
    assert!(packed(&tensor.codes) == bytes(&golden.codes));
    let ScaleData::Float(scales) = &tensor.scales else { panic!("{:?}", tensor.scales) };
    assert!(*scales == floats(&golden.absmax));
    assert_eq!(digest(&tensor.dequantize()), golden.values);
}

#[test]
fn qlora_stores_what_bitsandbytes_stores() {
    let golden = golden();
    assert_eq!(digest(nf4::dynamic_map()), golden.nested_map);
    let tensor = quantize("qlora", &golden);
    assert!(packed(&tensor.codes) == bytes(&golden.codes));
    let ScaleData::Dynamic { codes, absmax, offset } = &tensor.scales else { panic!("{:?}", tensor.scales) };
    assert!(*codes == bytes(&golden.nested_codes));
    assert_eq!(*absmax, floats(&golden.nested_absmax));
    assert_eq!([*offset], *floats(&golden.offset));
    let groups = tensor.groups();
    let restored: Vec<f32> = (0..codes.len()).map(|i| tensor.scale(i / groups, i % groups)).collect();
    assert_eq!(digest(&restored), golden.restored_absmax);
    assert_eq!(digest(&tensor.dequantize()), golden.values_nested);
}
