//! What products with few rows do besides: norms before them, gates after them.

use super::linear::{EPS, kinds, weight};
use super::{Device, numbers, random, rows_of};
use nibble_kernels::cuda::{Cuda, DeviceNorm, DeviceProduct, Gpu};
use nibble_kernels::ops::math::Function;

/// Rows, a gain, and the rows normed in double precision.
struct Normed {
    x: Vec<f32>,
    gain: Vec<f32>,
    exact: Vec<f64>,
}

const NORM_EPS: f32 = 1e-5;

fn normed(seed: u64, m: usize, k: usize) -> Normed {
    let mut random = random(seed);
    let x: Vec<f32> = (0..m)
        .flat_map(|row| numbers(&mut random, k).into_iter().map(move |x| x * 8f32.powi(row as i32 % 9 - 4)))
        .collect();
    let gain = numbers(&mut random, k);
    let exact = x
        .chunks(k)
        .flat_map(|x| {
            let squares: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
            let scale = 1.0 / (squares / k as f64 + f64::from(NORM_EPS)).sqrt();
            x.iter().zip(&gain).map(move |(x, g)| f64::from(*x) * scale * f64::from(*g)).collect::<Vec<_>>()
        })
        .collect();
    Normed { x, gain, exact }
}

/// A product with row `r` of a weight, and what its rounding errors are proportional to.
fn dot(x: &[f64], values: &[f64], magnitudes: &[f64], bias: f64) -> (f64, f64) {
    let products = x.iter().zip(values.iter().zip(magnitudes));
    products.fold((bias, bias.abs()), |(sum, size), (x, (w, m))| (sum + x * w, size + (x * m).abs()))
}

/// Normed rows are rounded to halves, 2^-11 relative; the norm itself and the sums are single precision.
fn bound(k: usize, size: f64) -> f64 {
    (1.0 / 2048.0 + (3.0 * k as f64 + 32.0) * EPS) * size + f64::from(f32::MIN_POSITIVE)
}

pub fn norms_before_products_need_no_launch<G: Gpu>(device: Device<G>) {
    for (processors, m, n, k) in [(2, 1, 40, 576), (2, 3, 33, 96), (2, 8, 20, 128), (132, 1, 24, 2048), (2, 2, 20, 70)]
    {
        let cuda = device(processors);
        for (at, kind) in kinds().into_iter().enumerate() {
            let rows = normed(at as u64, m, k);
            let sides: Vec<_> =
                [n, 16, 23].iter().map(|n| weight(&mut random((at + n) as u64), kind, *n, k, 32)).collect();
            let weights: Vec<_> = sides.iter().map(|side| cuda.weight(&side.packed).unwrap()).collect();
            let (x, gain) = (rows_of(&cuda, &rows.x, k), cuda.vector(&rows.gain).unwrap());
            let bias = numbers(&mut random(77), 16);
            let bias_vector = cuda.vector(&bias).unwrap();
            let mut outs: Vec<_> = weights.iter().map(|weight| cuda.rows(m, weight.n()).unwrap()).collect();
            let mut spare = cuda.rows(m, k).unwrap();
            let mut products: Vec<_> = (0..)
                .zip(weights.iter().zip(&mut outs))
                .map(|(at, (weight, out))| DeviceProduct { weight, bias: (at == 1).then_some(&bias_vector), out })
                .collect();
            let norm = DeviceNorm { x: &x, gain: &gain, eps: NORM_EPS, out: &mut spare };
            cuda.norm_and_multiply(norm, m, &mut products).unwrap_or_else(|e| panic!("{kind:?}, k {k}, m {m}: {e}"));
            for (side, (weight, out)) in sides.iter().zip(weights.iter().zip(&outs)) {
                let n = weight.n();
                for (i, found) in cuda.read_rows(out, 0..m).unwrap().into_iter().enumerate() {
                    let (t, r) = (i / n * k, i % n * k);
                    let bias = if n == 16 { f64::from(bias[i % n]) } else { 0.0 };
                    let (wanted, size) =
                        dot(&rows.exact[t..t + k], &side.values[r..r + k], &side.magnitudes[r..r + k], bias);
                    let error = (f64::from(found) - wanted).abs();
                    assert!(error <= bound(k, size), "{kind:?}, n {n}, k {k}, m {m}: {i}: {found}, wanted {wanted}");
                }
            }
        }
    }
}

pub fn gates_after_products_need_no_launch<G: Gpu>(device: Device<G>) {
    for (processors, m, n, k, function) in [
        (2, 1, 40, 96, Function::Silu),
        (2, 8, 20, 64, Function::GeluTanh),
        (1, 3, 100, 200, Function::GeluTanh),
        (132, 1, 33, 1920, Function::Silu),
        (2, 12, 20, 64, Function::Silu),
    ] {
        let cuda = device(processors);
        for (at, kind) in kinds().into_iter().enumerate() {
            gate(&cuda, kind, at as u64, (m, n, k), function);
        }
    }
}

fn gate<G: Gpu>(
    cuda: &Cuda<G>,
    kind: super::linear::Kind,
    seed: u64,
    (m, n, k): (usize, usize, usize),
    function: Function,
) {
    let rows = normed(seed, m, k);
    let [gate, up] = [1, 2].map(|side| weight(&mut random(seed + 10 * side), kind, n, k, 32));
    let [gate_weight, up_weight] = [&gate, &up].map(|side| cuda.weight(&side.packed).unwrap());
    let bias = numbers(&mut random(5), n);
    let bias_vector = cuda.vector(&bias).unwrap();
    let (mut gate_out, mut up_out) = (cuda.rows(m, n).unwrap(), cuda.rows(m, n).unwrap());
    let (x, gain) = (rows_of(cuda, &rows.x, k), cuda.vector(&rows.gain).unwrap());
    let mut spare = cuda.rows(m, k).unwrap();
    let norm = DeviceNorm { x: &x, gain: &gain, eps: NORM_EPS, out: &mut spare };
    let product = DeviceProduct { weight: &gate_weight, bias: Some(&bias_vector), out: &mut gate_out };
    let other = DeviceProduct { weight: &up_weight, bias: None, out: &mut up_out };
    cuda.norm_and_gate(norm, m, function, product, other).unwrap_or_else(|e| panic!("{kind:?}, {n} x {k}, m {m}: {e}"));
    let exact = |g: f64| match function {
        Function::Silu => g / (1.0 + (-g).exp()),
        _ => 0.5 * g * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g * g * g)).tanh()),
    };
    for (i, found) in cuda.read_rows(&gate_out, 0..m).unwrap().into_iter().enumerate() {
        let (x, r) = (&rows.exact[i / n * k..][..k], i % n * k);
        let (g, g_size) = dot(x, &gate.values[r..r + k], &gate.magnitudes[r..r + k], f64::from(bias[i % n]));
        let (u, u_size) = dot(x, &up.values[r..r + k], &up.magnitudes[r..r + k], 0.0);
        let wanted = exact(g) * u;
        // Both gates' slopes are below 1.13; their own errors grow with the argument of an exponential.
        let (g_error, u_error) = (1.13 * bound(k, g_size) + g.abs() * (g.abs() + 16.0) * 8.0 * EPS, bound(k, u_size));
        let bound = g_error * u.abs() + exact(g).abs() * u_error + g_error * u_error + 4.0 * EPS * wanted.abs();
        let error = (f64::from(found) - wanted).abs();
        assert!(error <= bound, "{kind:?}, {n} x {k}, m {m}: {i}: {found}, wanted {wanted} +- {bound}");
    }
}
