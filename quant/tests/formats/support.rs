//! Small files made in the test: safetensors by the crate's own writer or by hand, GGUF by hand.

use nibble_quant::format::Dtype;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use safetensors::tensor::TensorView;
use std::collections::HashMap;
use std::path::Path;

pub type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

pub fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// Normally distributed enough: sums of uniform numbers, with a rare large one.
pub fn weights(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = rng(seed);
    let one = |_| {
        let v: f32 = (0..4).map(|_| rng.random_range(-0.5f32..0.5)).sum();
        if rng.random_range(0..200) == 0 { v * 8.0 } else { v * 0.1 }
    };
    (0..len).map(one).collect()
}

pub fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()
}

pub fn f32_tensor(name: &str, shape: &[usize], seed: u64) -> Tensor {
    (name.into(), Dtype::F32, shape.to_vec(), f32_bytes(&weights(seed, shape.iter().product())))
}

pub fn save(path: &Path, tensors: &[Tensor]) {
    let views = tensors.iter().map(|(n, d, s, b)| (n.as_str(), TensorView::new(*d, s.clone(), b).unwrap()));
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// A safetensors file with a header given as text.
pub fn raw_safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

pub fn index(map: &[(&str, &str)]) -> String {
    let map: HashMap<&str, &str> = map.iter().copied().collect();
    serde_json::json!({ "metadata": {}, "weight_map": map }).to_string()
}

/// A GGUF file under construction.
pub struct Gguf {
    pub version: u32,
    pub alignment: usize,
    pub pairs: Vec<Vec<u8>>,
    pub infos: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

impl Gguf {
    pub fn new() -> Self {
        Self { version: 3, alignment: 32, pairs: Vec::new(), infos: Vec::new() }
    }

    pub fn raw(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        let mut pair = string(key);
        pair.extend(kind.to_le_bytes());
        pair.extend(value);
        self.pairs.push(pair);
        self
    }

    pub fn u32(self, key: &str, value: u32) -> Self {
        self.raw(key, 4, &value.to_le_bytes())
    }

    pub fn f32(self, key: &str, value: f32) -> Self {
        self.raw(key, 6, &value.to_le_bytes())
    }

    pub fn str(self, key: &str, value: &str) -> Self {
        self.raw(key, 8, &string(value))
    }

    /// `ne` has the fastest dimension first, as in the file.
    pub fn tensor(mut self, name: &str, ne: &[u64], kind: u32, data: Vec<u8>) -> Self {
        self.infos.push((name.into(), ne.to_vec(), kind, data));
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend((self.infos.len() as u64).to_le_bytes());
        bytes.extend((self.pairs.len() as u64).to_le_bytes());
        self.pairs.iter().for_each(|p| bytes.extend(p));
        let mut offset = 0u64;
        for (name, ne, kind, data) in &self.infos {
            bytes.extend(string(name));
            bytes.extend((ne.len() as u32).to_le_bytes());
            ne.iter().for_each(|d| bytes.extend(d.to_le_bytes()));
            bytes.extend(kind.to_le_bytes());
            bytes.extend(offset.to_le_bytes());
            offset += data.len().next_multiple_of(self.alignment) as u64;
        }
        for (_, _, _, data) in &self.infos {
            bytes.resize(bytes.len().next_multiple_of(self.alignment), 0);
            bytes.extend(data);
        }
        bytes
    }
}

pub fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}
