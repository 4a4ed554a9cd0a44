//! Laws of the row operations: each equals its f64 reference within a derived bound, on every usable instruction set
//! and any number of threads with the same bits, over tails and outputs poisoned with NaN.

#[path = "ops/attention.rs"]
mod attention;
#[path = "ops/kv.rs"]
mod kv;
#[path = "ops/math.rs"]
mod math;
#[path = "ops/pick.rs"]
mod pick;
#[path = "shared/quick.rs"]
mod quick;
#[path = "ops/rows.rs"]
mod rows;
#[path = "ops/sums.rs"]
mod sums;

use nibble_kernels::{Isa, Ops, Pool};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::sync::LazyLock;

/// Half a unit in the last place of 1: the relative error of one rounding.
const U: f64 = 1.0 / (1 << 24) as f64;

/// Numbers of (rows) that make no full vector, one, several, and more than one part of work.
const WIDTHS: [usize; 9] = [1, 7, 16, 17, 64, 100, 576, 1000, 4099];

static POOLS: LazyLock<[Pool; 3]> = LazyLock::new(|| [Pool::new(1), Pool::new(2), Pool::new(5)]);

/// Runs `f` on every instruction set and several numbers of threads (quick laws: two); all must give the same bits.
/// Hands them back.
fn same_everywhere(mut f: impl FnMut(Ops<'_>) -> Vec<f32>) -> Vec<f32> {
    let mut first: Option<Vec<f32>> = None;
    for pool in if quick::quick() { &POOLS[1..2] } else { &POOLS[..] } {
        for isa in Isa::usable() {
            let result = f(Ops::new(pool).with_isa(isa));
            let first = first.get_or_insert_with(|| result.clone());
            assert_eq!(first.len(), result.len());
            for (i, (a, b)) in first.iter().zip(&result).enumerate() {
                // The sign and payload of NaN differ between instructions; that it is NaN doesn't.
                let same = a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
                assert!(same, "{isa} on {} threads differs at {i}: {a} and {b}", pool.threads());
            }
        }
    }
    first.expect("there is always the scalar instruction set")
}

fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// Numbers of about unit size with a few large ones, as activations have.
fn activations(rng: &mut StdRng, n: usize) -> Vec<f32> {
    (0..n)
        .map(|_| {
            let x = rng.random_range(-1.0_f32..1.0) + rng.random_range(-1.0_f32..1.0);
            if rng.random_range(0..200) == 0 { x * 50.0 } else { x }
        })
        .collect()
}

#[track_caller]
fn assert_close(found: f32, wanted: f64, bound: f64, what: impl std::fmt::Display) {
    let error = (f64::from(found) - wanted).abs();
    assert!(error <= bound, "{what}: {found}, expected {wanted}; off by {error:e}, bound {bound:e}");
}
