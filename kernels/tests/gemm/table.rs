//! The table of kernels and the bytes of a packed weight.

use crate::cases::{KINDS, Weight};
use half::f16;
use nibble_kernels::gemm::select;
use nibble_kernels::{
    ActKind, DenseSource, GEMMS, Isa, KernelError, Levels, PackedWeight, Scales, TILED_ROWS, WeightKind,
};
use nibble_kernels::{Activations, Pool, Product, WeightSource, Zeros};
use rand::{SeedableRng, rngs::StdRng};
use std::collections::HashSet;

#[test]
fn names_follow_the_grammar_and_are_unique() {
    let mut seen = HashSet::new();
    for kernel in GEMMS {
        let (weight, act, rows, isa) = (kernel.weight.name(), kernel.act.name(), kernel.rows, kernel.isa.name());
        assert_eq!(kernel.name, format!("gemm_{weight}_{act}_{rows}x16_{isa}"));
        assert!(seen.insert(kernel.name), "{} twice", kernel.name);
    }
}

#[test]
fn every_problem_has_a_kernel_on_every_instruction_set() {
    let mut rng = StdRng::seed_from_u64(9);
    for kind in KINDS {
        let weight = Weight::random(&mut rng, kind, 4, 64).pack().unwrap();
        assert_eq!(weight.kind(), kind);
        for isa in Isa::ALL {
            for act in [ActKind::F32, ActKind::I8, ActKind::Bf16] {
                for m in [1, 2, 3, TILED_ROWS, 512] {
                    let kernel = select(&weight, act, m, isa).unwrap();
                    let tiled = act == ActKind::Bf16 && kind.is_quantized() && m >= TILED_ROWS && isa == Isa::Amx;
                    let wanted = match act {
                        _ if tiled => ActKind::Bf16,
                        ActKind::I8 | ActKind::Bf16 if kind.has_byte_levels() => ActKind::I8,
                        _ => ActKind::F32,
                    };
                    assert_eq!(kernel.weight, kind);
                    assert_eq!(kernel.act, wanted, "{kernel:?}");
                    assert_eq!(kernel.rows == 1, m == 1, "{kernel:?}");
                    if cfg!(target_arch = "x86_64") {
                        // Tiles are for bfloat16 alone.
                        let wanted = if isa == Isa::Amx && !tiled { Isa::Avx512 } else { isa };
                        assert_eq!(kernel.isa, wanted, "{kernel:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_kernel_refuses_what_it_is_not_for() {
    let mut rng = StdRng::seed_from_u64(10);
    let weight = Weight::random(&mut rng, WeightKind::W8, 4, 64).pack().unwrap();
    let mut x = Activations::with_capacity(1, 64);
    x.fill(1, 64, &[1.0; 64]).unwrap();
    let pool = Pool::new(1);
    for kernel in GEMMS {
        let mut out = [f32::NAN; 4];
        let product = Product { weight: &weight, bias: None, accumulate: false, out: &mut out };
        let done = kernel.multiply(&pool, &mut x, product);
        if kernel.weight == WeightKind::W8 && kernel.isa.is_present() {
            assert_eq!(done, Ok(()));
        } else {
            let (act, isa) = (kernel.act.name(), kernel.isa.name());
            assert_eq!(done, Err(KernelError::NoKernel { weight: "w8", act, isa }));
            assert!(out.iter().all(|v| v.is_nan()));
        }
    }
}

#[test]
fn bytes_are_what_the_layout_says() {
    let (n, k) = (32, 256);
    let codes = vec![3; n * k];
    let source = |levels, scales| WeightSource {
        n,
        k,
        group: 32,
        levels,
        codes: &codes,
        scales,
        zeros: Zeros::Const(0),
        outliers: None,
    };
    let halves = vec![f16::ONE; n * 8];
    let coded = Scales::Coded { codes: &vec![9; n * 8], second: &vec![1.0; n], span: 8 };
    let bytes = |source: WeightSource| PackedWeight::pack(&source).unwrap().bytes();
    // 4.5 bits a weight, and 4.25 with a second level of one f32 a row.
    assert_eq!(bytes(source(Levels::Linear4, Scales::F16(&halves))), n * k / 2 + n * 8 * 2);
    assert_eq!(bytes(source(Levels::Linear4, coded)), n * k / 2 + n * 8 + n * 4);
    assert_eq!(bytes(source(Levels::Linear8, coded)), n * k + n * 8 + n * 4);
    let dense = PackedWeight::pack_dense(n, k, DenseSource::F16(&vec![f16::ONE; n * k])).unwrap();
    assert_eq!(dense.bytes(), n * k * 2);
    assert_eq!(dense.levels(), None);
}
