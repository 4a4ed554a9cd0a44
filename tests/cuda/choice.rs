//! What choices of tokens take of logits, against the host's own sorting and double precision.

use super::{Device, numbers, random, rows_of};
use nibble_kernels::cuda::Gpu;
use nibble_models::{Penalized, Penalty};

pub fn choices_are_the_first_of_the_largest<G: Gpu>(device: Device<G>) {
    let cuda = device(2);
    let width = 1500;
    let mut x = numbers(&mut random(4), 5 * width);
    x[700] = 2.0;
    x[1300] = 2.0;
    x[width] = f32::NAN;
    x[width + 1499] = f32::INFINITY;
    x[2 * width..3 * width].fill(f32::NAN);
    x[3 * width..4 * width].fill(f32::NEG_INFINITY);
    x[4 * width..5 * width].fill(f32::NAN);
    x[4 * width + 1400] = -3.0;
    x[4 * width + 1499] = 5.0;
    let rows = rows_of(&cuda, &x, width);
    let mut choices = cuda.indices(5).unwrap();
    let found = cuda.argmax(&rows, 5, width, &mut choices).unwrap();
    assert_eq!(found, [Some(700), Some(1499), None, Some(0), Some(1499)]);
    assert_eq!(cuda.argmax(&rows, 5, 1450, &mut choices).unwrap()[4], Some(1400), "only the first 1450");
}

/// A row with everything that may be among logits: equal ones, zeros of either sign, tokens that may not be chosen.
fn logits(seed: u64, width: usize) -> Vec<f32> {
    let mut x: Vec<f32> = numbers(&mut random(seed), width).iter().map(|x| (x * 200.0).round() / 8.0).collect();
    for (at, x) in x.iter_mut().enumerate() {
        match at % 97 {
            3 => *x = f32::NEG_INFINITY,
            5 => *x = 0.0,
            6 => *x = -0.0,
            _ => (),
        }
    }
    x
}

pub fn the_largest_few_are_sorted_and_all_are_weighed<G: Gpu>(device: Device<G>) {
    let cuda = device(2);
    for (width, ks) in [(1, vec![1]), (31, vec![1, 7, 31]), (2048, vec![40]), (2049, vec![1024]), (9000, vec![1, 256])]
    {
        let x = logits(width as u64, 3 * (width + 5));
        let rows = rows_of(&cuda, &x, width + 5);
        for (row, k, temperature) in ks.iter().flat_map(|k| [(0, *k, None), (2, *k, Some(0.7f32))]) {
            let x = &x[row * (width + 5)..][..width];
            let mut order: Vec<u32> = (0..width as u32).collect();
            order.sort_by(|a, b| x[*b as usize].partial_cmp(&x[*a as usize]).unwrap().then(a.cmp(b)));
            let wanted: Vec<(u32, f32)> = order[..k].iter().map(|at| (*at, x[*at as usize])).collect();
            let largest = cuda.largest(&rows, (row, width), k, temperature).unwrap();
            assert_eq!(largest.found, wanted, "{k} of {width}");
            let weight = |x: &f32| ((f64::from(*x) - f64::from(wanted[0].1)) / f64::from(temperature.unwrap())).exp();
            let total: f64 = if temperature.is_some() { x.iter().map(weight).sum() } else { 0.0 };
            // An exponent of up to 50 / 0.7 has so many roundings of its own; the sum of positive numbers adds little.
            assert!((largest.total - total).abs() <= 1e-5 * total, "{} of {width}, wanted {total}", largest.total);
        }
    }
    let mut x = logits(1, 3000);
    (x[2500], x[17]) = (f32::NAN, f32::INFINITY);
    let rows = rows_of(&cuda, &x, 3000);
    let found = cuda.largest(&rows, (0, 3000), 2, None).unwrap().found;
    assert!(found[0].0 == 2500 && found[0].1.is_nan() && found[1] == (17, f32::INFINITY), "{found:?}");
    for (row, width, k) in [(1, 3000, 1), (0, 3001, 1), (0, 3000, 1025), (0, 4, 5)] {
        assert!(cuda.largest(&rows, (row, width), k, None).is_err(), "{k} of {width} of row {row}");
    }
}

pub fn penalties_are_the_hosts_to_the_last_bit<G: Gpu>(device: Device<G>) {
    let cuda = device(2);
    let x = logits(3, 2 * 700);
    let mut rows = rows_of(&cuda, &x, 700);
    let tokens: Vec<Penalized> = (0..600).map(|i| Penalized { token: (i * 7) % 700, count: 1 + i % 5 }).collect();
    let penalty = Penalty { repetition: 1.3, frequency: 0.37, presence: 0.11 };
    // Room for a tenth of them: they come in several launches.
    let mut staged = cuda.indices(120).unwrap();
    let mut wanted = x.clone();
    penalty.apply(&tokens, &mut wanted[700..]);
    let tokens: Vec<[u32; 2]> = tokens.iter().map(|t| [t.token, t.count]).collect();
    cuda.penalize(&mut rows, 1, [1.3, 0.37, 0.11], &tokens, &mut staged).unwrap();
    let found = cuda.read_rows(&rows, 0..2).unwrap();
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
    assert_eq!(bits(&found), bits(&wanted));
    let outside = cuda.penalize(&mut rows, 0, [1.0; 3], &[[700, 1]], &mut staged);
    assert!(outside.is_err(), "there is no such token");
}
