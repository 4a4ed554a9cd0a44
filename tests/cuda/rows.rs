//! Norms, rotations, gates and choices against double precision.

use super::{Device, numbers, random, rows_of};
use nibble_kernels::cuda::{Gpu, Place};
use nibble_kernels::ops::RopeTable;
use nibble_kernels::ops::math::Function;

/// Single precision's rounding error, relative.
const EPS: f64 = 1.0 / (1u64 << 24) as f64;

fn close(what: &str, found: &[f32], wanted: &[f64], bound: impl Fn(usize) -> f64) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (i, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        let error = (f64::from(*found) - wanted).abs();
        assert!(error <= bound(i), "{what}: {i}: {found}, wanted {wanted} +- {}", bound(i));
    }
}

pub fn norms_divide_rows_and_heads_by_their_root_mean_square<G: Gpu>(device: Device<G>) {
    let cuda = device(2);
    let mut random = random(1);
    for (rows, width, heads) in [(1, 64, 1), (3, 96, 3), (5, 130, 13), (2, 1500, 5)] {
        let x = numbers(&mut random, rows * width);
        let gain = numbers(&mut random, width);
        let norm = |x: &[f32], gain: &[f32]| -> Vec<f64> {
            let squares: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
            let scale = 1.0 / (squares / x.len() as f64 + 1e-5).sqrt();
            x.iter().zip(gain).map(|(x, g)| f64::from(*x) * scale * f64::from(*g)).collect()
        };
        // The mean's rounding errors enter by half of them.
        let bound = |wanted: &[f64], i: usize| (width as f64 / 2.0 + 8.0) * EPS * wanted[i].abs() + 1e-30;
        let rows_x = rows_of(&cuda, &x, width);
        let mut out = cuda.rows(rows, width).unwrap();
        cuda.rms_norm(&rows_x, &cuda.vector(&gain).unwrap(), 1e-5, rows, &mut out).unwrap();
        let wanted: Vec<f64> = x.chunks(width).flat_map(|x| norm(x, &gain)).collect();
        close("rms norm", &cuda.read_rows(&out, 0..rows).unwrap(), &wanted, |i| bound(&wanted, i));

        let head = &gain[..width / heads];
        let mut in_place = rows_of(&cuda, &x, width);
        cuda.head_norm(&mut in_place, &cuda.vector(head).unwrap(), 1e-5, rows).unwrap();
        let wanted: Vec<f64> = x.chunks(head.len()).flat_map(|x| norm(x, head)).collect();
        close("head norm", &cuda.read_rows(&in_place, 0..rows).unwrap(), &wanted, |i| bound(&wanted, i));
    }
}

pub fn rotation_turns_pairs_and_leaves_the_rest<G: Gpu>(device: Device<G>) {
    let cuda = device(2);
    let mut random = random(2);
    for (heads, head_dim, half) in [(4, 16, 8), (3, 20, 5), (1, 128, 64)] {
        let frequencies: Vec<f32> = (0..half).map(|i| 10000f32.powf(-(i as f32) / half as f32)).collect();
        let table = RopeTable::new(&frequencies, 50, 1.0);
        let positions = [7usize, 0, 49, 8];
        let x = numbers(&mut random, positions.len() * heads * head_dim);
        let mut rows = rows_of(&cuda, &x, heads * head_dim);
        let mut places = cuda.table(8).unwrap();
        cuda.set_table(&mut places, positions.iter().map(|p| Place::at(*p).unwrap())).unwrap();
        cuda.rope(&mut rows, &cuda.rope_table(&table).unwrap(), head_dim, &places).unwrap();
        let mut wanted: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        for (head, values) in wanted.chunks_mut(head_dim).enumerate() {
            for d in 0..half {
                let (sin, cos) = (positions[head / heads] as f64 * f64::from(frequencies[d])).sin_cos();
                let (a, b) = (values[d], values[d + half]);
                (values[d], values[d + half]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
        close("rope", &cuda.read_rows(&rows, 0..4).unwrap(), &wanted, |_| 8.0 * EPS);
        cuda.set_table(&mut places, [Place::at(50).unwrap()].into_iter()).unwrap();
        let refused = cuda.rope(&mut rows, &cuda.rope_table(&table).unwrap(), head_dim, &places);
        assert!(refused.is_err(), "a position past the table");
    }
}

pub fn gates_sums_and_caps_are_their_formulas<G: Gpu>(device: Device<G>) {
    let cuda = device(2);
    let mut random = random(3);
    let (rows, width) = (3, 100);
    let mut x = numbers(&mut random, rows * width);
    x.iter_mut().enumerate().for_each(|(i, x)| *x *= 0.1 + (i % 40) as f32);
    x[..4].copy_from_slice(&[0.0, -100.0, 100.0, -1e-20]);
    let y = numbers(&mut random, rows * width);
    let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|x| f64::from(*x)).collect() };
    let (x64, y64) = (wide(&x), wide(&y));
    let zip = |f: &dyn Fn(f64, f64) -> f64| -> Vec<f64> { x64.iter().zip(&y64).map(|(x, y)| f(*x, *y)).collect() };
    let silu = |x: f64, y: f64| x / (1.0 + (-x).exp()) * y;
    let gelu = |x: f64, y: f64| {
        let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
        0.5 * x * (1.0 + inner.tanh()) * y
    };
    let up = rows_of(&cuda, &y, width);
    let run = |operation: &dyn Fn(&mut _)| {
        let mut rows_x = rows_of(&cuda, &x, width);
        operation(&mut rows_x);
        cuda.read_rows(&rows_x, 0..rows).unwrap()
    };
    // An exponential's error grows with its argument, which is below 64 where it matters.
    let bound = |i: usize| 128.0 * EPS * (x64[i] * y64[i]).abs() + 1e-30;
    close("silu", &run(&|x| cuda.gate(Function::Silu, x, &up, rows).unwrap()), &zip(&silu), bound);
    // 1 + tanh cancels where tanh is close to -1.
    close("gelu", &run(&|x| cuda.gate(Function::GeluTanh, x, &up, rows).unwrap()), &zip(&gelu), bound);
    let sum = zip(&|x, y| x + y);
    close("add", &run(&|x| cuda.add(x, &up, rows).unwrap()), &sum, |i| EPS * sum[i].abs());
    let scaled = zip(&|x, _| x * 1.5);
    close("scale", &run(&|x| cuda.scale(x, 1.5, rows).unwrap()), &scaled, |i| EPS * scaled[i].abs());
    let capped = zip(&|x, _| 30.0 * (x / 30.0).tanh());
    close("softcap", &run(&|x| cuda.softcap(x, 30.0, rows).unwrap()), &capped, |_| 30.0 * 8.0 * EPS);
    let mut rows_x = rows_of(&cuda, &x, width);
    assert!(cuda.gate(Function::Exp, &mut rows_x, &up, rows).is_err(), "no gate");
}

pub fn selected_rows_are_copies<G: Gpu>(device: Device<G>) {
    let cuda = device(2);
    let x = numbers(&mut random(5), 4 * 300);
    let rows = rows_of(&cuda, &x, 300);
    let mut indices = cuda.indices(3).unwrap();
    let mut out = cuda.rows(3, 300).unwrap();
    cuda.select_rows(&rows, &[3, 0, 3], &mut indices, &mut out).unwrap();
    let found = cuda.read_rows(&out, 0..3).unwrap();
    assert_eq!(found, [&x[900..], &x[..300], &x[900..]].concat());
    assert!(cuda.select_rows(&rows, &[4], &mut indices, &mut out).is_err(), "a row that isn't there");
}
