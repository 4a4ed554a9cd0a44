//! Products: every kernel against f64, bit for bit against each other, and several at once.

use crate::cases::{self, KINDS, Weight};
use crate::quick::{quick, thin};
use nibble_kernels::{
    ActKind, Activations, GEMMS, GemmKernel, Isa, KernelError, PackedWeight, Pool, Product, TILED_ROWS, WeightKind,
    multiply,
};
use rand::{Rng, SeedableRng, rngs::StdRng};

fn usable(weight: WeightKind) -> impl Iterator<Item = &'static GemmKernel> {
    let isas: Vec<Isa> = Isa::usable().collect();
    GEMMS.iter().filter(move |kernel| kernel.weight == weight && isas.contains(&kernel.isa))
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() }).collect()
}

#[test]
fn every_kernel_equals_its_reference_and_its_siblings_bit_for_bit() {
    let mut rng = StdRng::seed_from_u64(2);
    let pools = if quick() { vec![Pool::new(2)] } else { [1, 2, 3].map(Pool::new).into() };
    let shapes = [1, 15, 16, 17, 33].into_iter().flat_map(|n| [0, 1, 31, 32, 33, 96, 576, 896].map(|k| (n, k)));
    // Not a multiple of the kinds, or each kind would meet the same few numbers of rows for ever.
    let ms = [1, 2, 3, 4, 5, 8, 17, 0, 33, 64, 1];
    assert_ne!(ms.len() % KINDS.len(), 0);
    let mut ms = ms.into_iter().cycle();
    for (n, k) in thin(5, shapes) {
        for kind in KINDS {
            let weight = Weight::random(&mut rng, kind, n, k);
            let packed = weight.pack().unwrap();
            let m = ms.next().unwrap();
            let mut x = Activations::with_capacity(m, k);
            x.fill(m, k, &cases::activations(&mut rng, m, k)).unwrap();
            let bias: Option<Vec<f32>> = rng.random::<bool>().then(|| (0..n).map(|v| v as f32 - 3.5).collect());
            let before: Option<Vec<f32>> = rng.random::<bool>().then(|| (0..m * n).map(|v| 0.1 * v as f32).collect());
            let mut first: [Option<Vec<u32>>; 3] = [None, None, None];
            for kernel in usable(kind) {
                for pool in &pools {
                    let mut out = before.clone().unwrap_or(vec![f32::NAN; m * n]);
                    let accumulate = before.is_some();
                    let product = Product { weight: &packed, bias: bias.as_deref(), accumulate, out: &mut out };
                    kernel.multiply(pool, &mut x, product).unwrap();
                    let what = || format!("{kernel:?}, {} threads, m {m}, {weight:?}", pool.threads());
                    let seen = &mut first[kernel.act as usize];
                    if let Some(seen) = seen {
                        assert!(*seen == bits(&out), "other bits: {}", what());
                        continue;
                    }
                    *seen = Some(bits(&out));
                    for (at, found) in out.iter().enumerate() {
                        let (row, col) = (at / n, at % n);
                        let extra = [bias.as_ref().map(|b| b[col]), before.as_ref().map(|b| b[at])];
                        let wanted =
                            cases::expected(&weight, &x, kernel.act, row, col, extra.map(Option::unwrap_or_default));
                        let error = (f64::from(*found) - wanted.value).abs();
                        assert!(
                            error <= wanted.bound,
                            "y[{row}][{col}] = {found}, wanted {} within {}: {}",
                            wanted.value,
                            wanted.bound,
                            what()
                        );
                        if kernel.act == ActKind::I8 {
                            let exact = cases::exact_i8(&weight, &x, row, col, extra);
                            assert_eq!(found.to_bits(), exact.to_bits(), "y[{row}][{col}] {found} {exact}: {}", what());
                        }
                    }
                }
            }
            assert!(first[0].is_some(), "no kernel for {kind:?}");
        }
    }
}

#[test]
fn rows_packed_apart_and_put_together_are_the_same_weight() {
    let mut rng = StdRng::seed_from_u64(11);
    let pool = Pool::new(1);
    for (n, k) in thin(2, [(16, 96), (33, 64), (48, 33), (80, 320), (40, 0)]) {
        for kind in KINDS.iter().cycle().take(3 * KINDS.len()) {
            let weight = Weight::random(&mut rng, *kind, n, k);
            let whole = weight.pack().unwrap();
            let mut together = weight.rows(0..16).pack().unwrap();
            if rng.random() {
                together.reserve(n);
            }
            let mut start = 16;
            while start < n {
                let end = n.min(start + [16, 32][rng.random_range(0..2)]);
                together.append(&weight.rows(start..end).pack().unwrap()).unwrap();
                start = end;
            }
            assert_eq!((together.n(), together.k(), together.bytes()), (n, k, whole.bytes()), "{weight:?}");
            for m in [1, 3] {
                let mut x = Activations::with_capacity(m, k);
                x.fill(m, k, &cases::activations(&mut rng, m, k)).unwrap();
                for act in [ActKind::I8, ActKind::F32] {
                    let mut product = |weight: &PackedWeight| {
                        let mut out = vec![f32::NAN; m * n];
                        let product = Product { weight, bias: None, accumulate: false, out: &mut out };
                        multiply(&pool, &mut x, &mut [product], act).unwrap();
                        bits(&out)
                    };
                    assert_eq!(product(&together), product(&whole), "m {m}, {act:?}, {weight:?}");
                }
            }
        }
    }
}

#[test]
fn rows_that_do_not_fit_under_others_are_refused() {
    let mut rng = StdRng::seed_from_u64(12);
    let mut packed = |kind, n, k| Weight::random(&mut rng, kind, n, k).pack().unwrap();
    let panel = |found| KernelError::Length {
        what: "the last panel of rows that others are added to",
        found,
        wanted: nibble_kernels::PANEL,
    };
    let mut weight = packed(WeightKind::F32, 16, 64);
    let unlike = KernelError::Unlike { found: "w8", wanted: "f32" };
    assert_eq!(weight.append(&packed(WeightKind::W8, 16, 64)), Err(unlike));
    let width = KernelError::Length { what: "a row to be added", found: 96, wanted: 64 };
    assert_eq!(weight.append(&packed(WeightKind::F32, 16, 96)), Err(width));
    weight.append(&packed(WeightKind::F32, 3, 64)).unwrap();
    assert_eq!(weight.append(&packed(WeightKind::F32, 16, 64)), Err(panel(3)));
    assert_eq!(weight.n(), 19);
}

#[test]
fn many_rows_cross_several_tasks() {
    let mut rng = StdRng::seed_from_u64(3);
    let (m, n, k) = (97, 100, 2080);
    let rows = cases::activations(&mut rng, m, k);
    let mut x = Activations::with_capacity(m, k);
    x.fill(m, k, &rows).unwrap();
    for kind in [WeightKind::W4Lin, WeightKind::W8] {
        let packed = Weight::random(&mut rng, kind, n, k).pack().unwrap();
        let mut out = vec![f32::NAN; m * n];
        let product = Product { weight: &packed, bias: None, accumulate: false, out: &mut out };
        multiply(&Pool::new(3), &mut x, &mut [product], ActKind::I8).unwrap();
        // A row's outputs don't depend on its batch.
        for row in [0, 1, 15, 16, 63, 64, 95, 96] {
            let mut alone = Activations::with_capacity(1, k);
            alone.fill(1, k, &rows[row * k..][..k]).unwrap();
            let mut single = vec![f32::NAN; n];
            let product = Product { weight: &packed, bias: None, accumulate: false, out: &mut single };
            multiply(&Pool::new(2), &mut alone, &mut [product], ActKind::I8).unwrap();
            assert_eq!(bits(&single), bits(&out[row * n..][..n]), "row {row} of {kind:?}");
        }
    }
}

#[test]
fn several_products_at_once_are_the_same_products() {
    let mut rng = StdRng::seed_from_u64(4);
    let pool = Pool::new(3);
    let k = 96;
    // More than one region holds, of all kinds and odd sizes.
    let weights: Vec<_> = (0..11)
        .map(|i| Weight::random(&mut rng, KINDS[i % KINDS.len()], [1, 40, 17, 64, 0][i % 5], k).pack().unwrap())
        .collect();
    for m in [0, 1, 6, TILED_ROWS + 1] {
        for act in [ActKind::F32, ActKind::I8, ActKind::Bf16] {
            let mut x = Activations::with_capacity(m, k);
            x.fill(m, k, &cases::activations(&mut rng, m, k)).unwrap();
            let mut outs: Vec<_> = weights.iter().map(|w| vec![f32::NAN; m * w.n()]).collect();
            let mut products: Vec<_> = weights
                .iter()
                .zip(&mut outs)
                .map(|(weight, out)| Product { weight, bias: None, accumulate: false, out })
                .collect();
            multiply(&pool, &mut x, &mut products, act).unwrap();
            for (weight, out) in weights.iter().zip(&outs) {
                let mut single = vec![f32::NAN; out.len()];
                let product = Product { weight, bias: None, accumulate: false, out: &mut single };
                multiply(&pool, &mut x, &mut [product], act).unwrap();
                assert_eq!(bits(out), bits(&single), "{:?} {act:?} m {m}", weight.kind());
                assert!(out.iter().all(|v| !v.is_nan()), "{:?} {act:?} m {m}", weight.kind());
            }
        }
    }
}

#[test]
fn a_packed_row_reads_back_as_its_values() {
    let mut rng = StdRng::seed_from_u64(5);
    for (n, k) in [(1, 1), (17, 33), (33, 576), (16, 96), (3, 0)] {
        for kind in KINDS {
            let weight = Weight::random(&mut rng, kind, n, k);
            let packed = weight.pack().unwrap();
            let mut out = vec![f32::NAN; k];
            for row in 0..n {
                packed.dequantize_row(row, &mut out).unwrap();
                for col in 0..k {
                    let (scale, level, min) = weight.parts(row, col);
                    let outliers = weight.outliers(row);
                    let outlier = outliers.iter().find(|(at, _)| *at == col).map_or(0.0, |(_, v)| *v);
                    assert_eq!(out[col], scale * level + min + outlier, "{kind:?} [{row}][{col}]");
                }
            }
        }
    }
}
