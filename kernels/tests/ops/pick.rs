//! Choices against a stable sort.

use super::*;
use nibble_kernels::ops::{argmax, top_k};
use std::cmp::Ordering;

/// All indices, best first: larger before smaller, equals in order, NaN last.
fn sorted(x: &[f32]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..x.len() as u32).collect();
    order.sort_by(|&a, &b| {
        let (a, b) = (x[a as usize], x[b as usize]);
        b.partial_cmp(&a).unwrap_or_else(|| match (a.is_nan(), b.is_nan()) {
            (true, false) => Ordering::Greater,
            (false, true) => Ordering::Less,
            _ => Ordering::Equal,
        })
    });
    order
}

#[test]
fn argmax_is_the_first_of_the_largest_and_never_nan() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let cases: [(&[f32], Option<usize>); 11] = [
        (&[], None),
        (&[nan], None),
        (&[nan, nan, nan], None),
        (&[1.0], Some(0)),
        (&[-inf, nan], Some(0)),
        (&[nan, -inf], Some(1)),
        (&[nan, 1.0, 3.0, nan, 3.0], Some(2)),
        (&[-0.0, 0.0], Some(0)),
        (&[0.0, -0.0], Some(0)),
        (&[1.0, inf, nan, inf], Some(1)),
        (&[f32::MIN, -inf], Some(0)),
    ];
    for isa in Isa::usable() {
        for (x, wanted) in cases {
            assert_eq!(argmax(isa, x), wanted, "{isa}: {x:?}");
        }
        // The winner at every lane of whole vectors and tails, twice.
        for n in 1..50 {
            for at in 0..n {
                let mut x = vec![-1.0; n];
                x[at] = 2.0;
                x[n - 1] = 2.0;
                x[(at + 1) % n] = if (at + 1) % n > at { nan } else { x[(at + 1) % n] };
                assert_eq!(argmax(isa, &x), Some(at), "{isa}: {x:?}");
            }
        }
    }
}

#[test]
fn top_k_is_the_start_of_a_stable_sort() {
    let mut rng = rng(1);
    for n in [0, 1, 2, 15, 16, 17, 31, 128, 1000] {
        for k in [0, 1, 2, 8, 40, 200] {
            for kind in 0..4 {
                let x: Vec<f32> = (0..n)
                    .map(|i| match kind {
                        0 => rng.random_range(-1.0..1.0),
                        // Many equals and many NaN.
                        1 => [0.0, -0.0, 1.0, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY][rng.random_range(0..7)],
                        2 => i as f32,
                        _ => f32::NAN,
                    })
                    .collect();
                for isa in Isa::usable() {
                    let mut found = vec![u32::MAX; k];
                    let used = top_k(isa, &x, &mut found);
                    assert_eq!(used, k.min(n));
                    assert_eq!(found[..used], sorted(&x)[..used], "{isa}: {k} of {n}");
                    assert!(found[used..].iter().all(|i| *i == u32::MAX), "the rest stays");
                }
            }
        }
    }
}
