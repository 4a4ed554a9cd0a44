//! What is done at once is, bit for bit, what is done one after the other.

use super::{Device, numbers, random, rows_of};
use half::f16;
use nibble_kernels::cuda::{CacheKind, CacheShape, Cuda, CudaAttention, DeviceProduct, DeviceRows, DeviceWeight, Gpu};
use nibble_kernels::ops::math::Function;
use nibble_kernels::ops::{AttentionSpec, RopeTable};
use nibble_kernels::{DenseSource, Levels, PackedWeight, Scales, WeightSource, Zeros};
use rand::Rng;

/// A weight (n, k) of random codes.
fn weight<G: Gpu>(cuda: &Cuda<G>, levels: Levels, zero: i32, n: usize, k: usize, seed: u64) -> DeviceWeight<G::Memory> {
    let mut random = random(seed);
    let most = if levels.bits() == 4 { 15 } else { 255 };
    let codes: Vec<u8> = (0..n * k).map(|_| random.random_range(0..=most)).collect();
    let scales: Vec<f16> = (0..n * k.div_ceil(32)).map(|_| f16::from_f32(random.random_range(0.01..1.0))).collect();
    let (scales, zeros) = (Scales::F16(&scales), Zeros::Const(zero));
    let source = WeightSource { n, k, group: 32, levels, codes: &codes, scales, zeros, outliers: None };
    cuda.weight(&PackedWeight::pack(&source).unwrap()).unwrap()
}

fn values<G: Gpu>(cuda: &Cuda<G>, rows: &DeviceRows<G::Memory>, count: usize) -> Vec<f32> {
    cuda.read_rows(rows, 0..count).unwrap()
}

pub fn products_together_are_products_apart<G: Gpu>(device: Device<G>) {
    let cuda = device(2);
    let (k, m) = (96, 3);
    let table = Levels::Table4([-32, -25, -20, -16, -12, -9, -6, -3, 0, 3, 6, 9, 13, 17, 21, 27]);
    for (levels, zero) in [(Levels::Linear4, 8), (table, 0), (Levels::Linear8, 128)] {
        let sizes = [40, 16, 23, 17];
        let weights: Vec<_> = (0u64..).zip(sizes).map(|(seed, n)| weight(&cuda, levels, zero, n, k, seed)).collect();
        // One that can't be taken together with the others.
        let other = if levels.bits() == 8 { (Levels::Linear4, 8) } else { (Levels::Linear8, 128) };
        let odd = weight(&cuda, other.0, other.1, 20, k, 9);
        let all: Vec<_> = weights.iter().chain([&odd]).collect();
        let bias = cuda.vector(&numbers(&mut random(7), 16)).unwrap();
        let x = rows_of(&cuda, &numbers(&mut random(8), m * k), k);
        let mut outs: Vec<_> = all.iter().map(|weight| cuda.rows(m, weight.n()).unwrap()).collect();
        let bias_of = |at: usize| (at == 1).then_some(&bias);
        let mut products: Vec<_> = (0..)
            .zip(all.iter().zip(&mut outs))
            .map(|(at, (weight, out))| DeviceProduct { weight, bias: bias_of(at), out })
            .collect();
        cuda.multiply_all(&x, m, &mut products).unwrap();
        for (at, (weight, out)) in all.iter().zip(&outs).enumerate() {
            let mut apart = cuda.rows(m, weight.n()).unwrap();
            cuda.multiply(&x, m, weight, bias_of(at), false, &mut apart).unwrap();
            assert_eq!(values(&cuda, out, m), values(&cuda, &apart, m), "{levels:?}, product {at}");
        }
    }
}

pub fn norms_and_gates_leave_rows_ready_for_products<G: Gpu>(device: Device<G>) {
    let cuda = device(2);
    for (m, k) in [(3, 96), (3, 200), (3, 1500), (3, 70), (40, 200), (40, 70)] {
        let weight = weight(&cuda, Levels::Linear4, 8, 18, k, 3);
        let x = rows_of(&cuda, &numbers(&mut random(4), m * k), k);
        let gain = cuda.vector(&numbers(&mut random(5), k)).unwrap();
        let up = rows_of(&cuda, &numbers(&mut random(6), m * k), k);
        for step in 0..3 {
            let mut ready = cuda.rows(m, k).unwrap();
            cuda.rms_norm(&x, &gain, 1e-5, m, &mut ready).unwrap();
            match step {
                0 => {}
                1 => cuda.gate(Function::Silu, &mut ready, &up, m).unwrap(),
                _ => cuda.gate(Function::GeluTanh, &mut ready, &up, m).unwrap(),
            }
            cuda.prepare(&ready, m).unwrap();
            let (mut found, mut wanted) = (cuda.rows(m, 18).unwrap(), cuda.rows(m, 18).unwrap());
            cuda.multiply(&ready, m, &weight, None, false, &mut found).unwrap();
            let again = rows_of(&cuda, &values(&cuda, &ready, m), k);
            cuda.prepare(&again, m).unwrap();
            cuda.multiply(&again, m, &weight, None, false, &mut wanted).unwrap();
            assert_eq!(values(&cuda, &found, m), values(&cuda, &wanted, m), "{m} rows of {k}, step {step}");
            // Fewer of them, which another kernel may want in another order.
            let (mut found, mut wanted) = (cuda.rows(2, 18).unwrap(), cuda.rows(2, 18).unwrap());
            cuda.multiply(&ready, 2, &weight, None, false, &mut found).unwrap();
            let fresh = rows_of(&cuda, &values(&cuda, &ready, 2), k);
            cuda.multiply(&fresh, 2, &weight, None, false, &mut wanted).unwrap();
            assert_eq!(values(&cuda, &found, 2), values(&cuda, &wanted, 2), "2 of {m} rows of {k}, step {step}");
        }
    }
}

pub fn rows_that_change_are_made_ready_again<G: Gpu>(device: Device<G>) {
    let cuda = device(2);
    let (m, k) = (2, 64);
    let dense = numbers(&mut random(1), 64 * k);
    let dense = cuda.weight(&PackedWeight::pack_dense(64, k, DenseSource::F32(&dense)).unwrap()).unwrap();
    let weight = weight(&cuda, Levels::Linear4, 8, 16, k, 2);
    let first = numbers(&mut random(3), m * k);
    let gain = cuda.vector(&vec![1.5; k]).unwrap();
    let ready = || {
        let x = rows_of(&cuda, &first, k);
        cuda.prepare(&x, m).unwrap();
        x
    };
    let source = ready();
    type Change<'a, M> = &'a dyn Fn(&mut DeviceRows<M>);
    let changes: [(&str, Change<'_, G::Memory>); 6] = [
        ("written", &|x| cuda.write_rows(x, &numbers(&mut random(9), m * k)).unwrap()),
        ("scaled", &|x| cuda.scale(x, 3.0, m).unwrap()),
        ("added to", &|x| cuda.add(x, &source, m).unwrap()),
        ("a product's output", &|x| cuda.multiply(&source, m, &dense, None, true, x).unwrap()),
        ("selected", &|x| cuda.select_rows(&source, &[1, 0], &mut cuda.indices(2).unwrap(), x).unwrap()),
        ("normed by heads", &|x| cuda.head_norm(x, &cuda.vector(&[2.0; 16]).unwrap(), 1e-5, m).unwrap()),
    ];
    for (what, change) in changes {
        let mut x = ready();
        change(&mut x);
        cuda.prepare(&x, m).unwrap();
        let (mut found, mut wanted) = (cuda.rows(m, 16).unwrap(), cuda.rows(m, 16).unwrap());
        cuda.multiply(&x, m, &weight, None, false, &mut found).unwrap();
        let fresh = rows_of(&cuda, &values(&cuda, &x, m), k);
        cuda.prepare(&fresh, m).unwrap();
        cuda.multiply(&fresh, m, &weight, None, false, &mut wanted).unwrap();
        assert_eq!(values(&cuda, &found, m), values(&cuda, &wanted, m), "{what}");
    }
    let mut normed = cuda.rows(m, k).unwrap();
    cuda.rms_norm(&source, &gain, 1e-5, m, &mut normed).unwrap();
    assert!(cuda.prepare(&normed, m + 1).is_err(), "more rows than there are");
}

pub fn turning_and_appending_at_once_is_both<G: Gpu>(device: Device<G>) {
    let cuda = device(2);
    for (kind, heads, kv_heads, head_dim, half) in [
        (CacheKind::F32, 4, 2, 16, 8),
        (CacheKind::F16, 3, 1, 80, 40),
        (CacheKind::F16, 2, 2, 20, 5),
        (CacheKind::Int8, 4, 1, 64, 32),
    ] {
        let rows = 3;
        let frequencies: Vec<f32> = (0..half).map(|i| 100f32.powf(-(i as f32) / half as f32)).collect();
        let rope = cuda.rope_table(&RopeTable::new(&frequencies, 20, 1.0)).unwrap();
        let shape = CacheShape { layers: 1, kv_heads, head_dim, capacity: 20, kind };
        let [q, k, v] = [(1, heads), (2, kv_heads), (3, kv_heads)]
            .map(|(seed, heads)| (numbers(&mut random(seed), rows * heads * head_dim), heads * head_dim));
        let run = |at_once: bool| {
            let caches = [cuda.cache(shape).unwrap()];
            let mut table = cuda.table(rows).unwrap();
            let places = (0..rows).map(|at| caches[0].place(at).unwrap());
            cuda.set_table(&mut table, places).unwrap();
            let [mut q, mut k, v] = [&q, &k, &v].map(|(values, width)| rows_of(&cuda, values, *width));
            let at = CudaAttention { caches: &caches, layer: 0, table: &table };
            if at_once {
                cuda.rope_and_append(at, &rope, &mut q, &mut k, &v).unwrap();
            } else {
                cuda.rope(&mut q, &rope, head_dim, &table).unwrap();
                cuda.rope(&mut k, &rope, head_dim, &table).unwrap();
                cuda.append(CudaAttention { caches: &caches, layer: 0, table: &table }, &k, &v).unwrap();
            }
            let mut out = cuda.rows(rows, heads * head_dim).unwrap();
            let spec = AttentionSpec { heads, scale: 0.3, window: None, softcap: None };
            let at = CudaAttention { caches: &caches, layer: 0, table: &table };
            cuda.attend(&spec, at, &q, &mut out).unwrap();
            [values(&cuda, &q, rows), values(&cuda, &k, rows), values(&cuda, &out, rows)]
        };
        assert_eq!(run(true), run(false), "{kind:?} {heads}/{kv_heads} x {head_dim}, {half} pairs");
    }
}
