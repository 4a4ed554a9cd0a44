//! Activation codes: the nearest ones, the same everywhere, and nothing breaks them.

use crate::cases::{self, KINDS, Weight};
use nibble_kernels::{ActKind, Activations, BLOCK, Isa, KernelError, Pool, Product, TILED_ROWS, WeightKind, multiply};
use rand::{Rng, SeedableRng, rngs::StdRng};

const ACTS: [ActKind; 3] = [ActKind::F32, ActKind::I8, ActKind::Bf16];

#[test]
fn codes_are_the_nearest_on_their_blocks_grid() {
    let mut rng = StdRng::seed_from_u64(6);
    let pool = Pool::new(2);
    for k in [1, 31, 32, 33, 96, 576] {
        for (m, tile) in [(1, 1), (3, 1), (3, 4), (9, 8)] {
            let rows = cases::activations(&mut rng, m, k);
            let mut x = Activations::with_capacity(m, k);
            x.fill(m, k, &rows).unwrap();
            assert!(x.codes(0).is_none());
            x.prepare(&pool, ActKind::I8, tile);
            for row in 0..m {
                let (codes, scales) = cases::codes(&x, row);
                assert_eq!((codes.len(), scales.len()), (k.next_multiple_of(BLOCK), k.div_ceil(BLOCK)));
                for (b, block) in rows[row * k..][..k].chunks(BLOCK).enumerate() {
                    let most = block.iter().fold(0.0f32, |most, v| most.max(v.abs()));
                    // Below 2^-120 a block counts as zero.
                    let tiny = most < 2f32.powi(-120);
                    assert_eq!(scales[b], if tiny { 0.0 } else { most / 127.0 });
                    for (i, v) in block.iter().enumerate() {
                        let code = if tiny { 0.0 } else { (v * (127.0 / most)).round_ties_even() };
                        assert_eq!(f32::from(codes[b * BLOCK + i]), code, "value {v} in a block of magnitude {most}");
                        // Half a step, and the rounding of the reciprocal and of its product with the value.
                        let bound = f64::from(scales[b]) * (0.5 + 127.0 * 3.0 / f64::from(1 << 24));
                        let error = (f64::from(*v) - f64::from(code) * f64::from(scales[b])).abs();
                        assert!(tiny || error <= bound, "value {v}, code {code}, scale {}", scales[b]);
                    }
                }
                assert!(codes[k..].iter().all(|code| *code == 0));
                for (b, block) in x.codes(row).unwrap().enumerate() {
                    let sum = |from: usize, to: usize, places: [usize; 2]| -> i16 {
                        let quads = &block.quads[from..to];
                        quads.iter().map(|quad| places.iter().map(|p| i16::from(quad[*p])).sum::<i16>()).sum()
                    };
                    let pair = |from, to| [sum(from, to, [0, 1]), sum(from, to, [2, 3])];
                    assert_eq!(block.pair, pair(0, 8), "block {b}");
                    assert_eq!(block.half_pairs, [pair(0, 4), pair(4, 8)], "block {b}");
                }
            }
        }
    }
}

#[test]
fn a_value_that_is_not_finite_spoils_its_row_and_no_other() {
    let mut rng = StdRng::seed_from_u64(7);
    let pool = Pool::new(2);
    let (m, n, k) = (TILED_ROWS + 3, 20, 70);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for kind in KINDS {
            for act in ACTS {
                let mut weight = Weight::random(&mut rng, kind, n, k);
                if let cases::Numeric::Grid { zeros, outliers, .. } = &mut weight.numeric {
                    (*zeros, *outliers) = (cases::Offset::Const(0), None);
                }
                let packed = weight.pack().unwrap();
                let mut rows: Vec<f32> = (0..m * k).map(|_| rng.random_range(-1.0..1.0)).collect();
                rows[3 * k + 41] = bad;
                let mut x = Activations::with_capacity(m, k);
                x.fill(m, k, &rows).unwrap();
                let mut out = vec![0.5; m * n];
                let product = Product { weight: &packed, bias: None, accumulate: false, out: &mut out };
                multiply(&pool, &mut x, &mut [product], act).unwrap();
                for (at, v) in out.iter().enumerate() {
                    let tiled = act == ActKind::Bf16 && kind.is_quantized() && Isa::best() == Isa::Amx;
                    let coded = (act != ActKind::F32 && kind.has_byte_levels()) || tiled;
                    match at / n {
                        3 if coded || bad.is_nan() => assert!(v.is_nan(), "{kind:?} {act:?}: {v}"),
                        3 => assert!(!v.is_finite() || weight.parts(at % n, 41).1 == 0.0, "{kind:?} {act:?}: {v}"),
                        _ => assert!(v.is_finite(), "{kind:?} {act:?}: {v}"),
                    }
                }
            }
        }
    }
}

#[test]
fn reuse_leaves_nothing_behind() {
    let mut rng = StdRng::seed_from_u64(8);
    let pool = Pool::new(1);
    let mut reused = Activations::with_capacity(40, 576);
    let bytes = reused.bytes();
    for (m, k) in [(8, 576), (40, 576), (1, 33), (17, 31), (8, 65), (2, 576), (33, 65), (1, 1)] {
        let packed = Weight::random(&mut rng, WeightKind::W4Lin, 5, k).pack().unwrap();
        let rows = cases::activations(&mut rng, m, k);
        let mut fresh = Activations::with_capacity(m, k);
        fresh.fill(m, k, &rows).unwrap();
        // Written around `fill`, with rubbish in the padding.
        reused.reshape(m, k);
        let stride = reused.stride();
        for (row, to) in reused.values_mut().chunks_mut(stride).enumerate() {
            to.fill(f32::NAN);
            to[..k].copy_from_slice(&rows[row * k..][..k]);
        }
        for act in ACTS {
            let outs = [&mut fresh, &mut reused].map(|x| {
                let mut out = vec![f32::NAN; m * 5];
                let product = Product { weight: &packed, bias: None, accumulate: false, out: &mut out };
                multiply(&pool, x, &mut [product], act).unwrap();
                out
            });
            assert_eq!(outs[0], outs[1], "({m}, {k}) {act:?}");
        }
        assert_eq!(reused.bytes(), bytes, "grew for ({m}, {k})");
    }
}

#[test]
fn rows_of_another_length_are_refused() {
    let mut x = Activations::with_capacity(2, 3);
    let refused = x.fill(2, 3, &[0.0; 5]);
    assert_eq!(refused, Err(KernelError::Length { what: "activations", found: 5, wanted: 6 }));
    let refused = x.fill(usize::MAX, 3, &[0.0; 5]);
    assert_eq!(refused, Err(KernelError::Length { what: "activations", found: 5, wanted: usize::MAX }));
}
