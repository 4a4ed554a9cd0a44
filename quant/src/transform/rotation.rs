//! Orthogonal matrices that a residual stream is turned by.

use std::f64::consts::PI;
use std::ops::Range;

/// An orthogonal matrix Q.
#[derive(Debug, Clone, PartialEq)]
pub enum Rotation {
    /// No rotation.
    Identity,
    /// Q, (width, width) row-major.
    Dense(Vec<f64>),
    /// `diag(signs) (C x H)`: H the Hadamard matrix of the largest power of two that divides the width, C the cosine
    /// transform of what is left, which spreads a value nearly as evenly.
    Hadamard {
        /// (width) +1 or -1.
        signs: Vec<f64>,
        /// (odd, odd) row-major.
        cosines: Vec<f64>,
    },
}

impl Rotation {
    /// A Hadamard rotation with random signs.
    pub fn hadamard(width: usize, seed: u64) -> Rotation {
        let mut random = Random(seed);
        let signs = (0..width).map(|_| if random.next() >> 63 == 0 { 1.0 } else { -1.0 }).collect();
        let odd = odd_part(width);
        let cosine = |row: usize, col: usize| {
            let norm = if row == 0 { 1.0 } else { 2.0 } / odd as f64;
            norm.sqrt() * (PI * row as f64 * (2 * col + 1) as f64 / (2 * odd) as f64).cos()
        };
        let cosines = (0..odd * odd).map(|i| cosine(i / odd, i % odd)).collect();
        Rotation::Hadamard { signs, cosines }
    }

    /// Q = (I - A)^-1 (I + A), A skew with entries of deviation `0.1 / sqrt(width)`: each unit vector is turned by an
    /// angle of about 0.2.
    pub fn cayley(width: usize, seed: u64) -> Rotation {
        let mut random = Random(seed);
        let mut skew = vec![0.0; width * width];
        for row in 0..width {
            for col in 0..row {
                let value = 0.1 / (width as f64).sqrt() * random.normal();
                skew[row * width + col] = value;
                skew[col * width + row] = -value;
            }
        }
        let plus = |sign: f64| -> Vec<f64> {
            let one = |i: usize| f64::from(u8::from(i / width == i % width));
            skew.iter().enumerate().map(|(i, a)| one(i) + sign * a).collect()
        };
        Rotation::Dense(solve(plus(-1.0), plus(1.0), width))
    }

    /// Values `part` of the row vector `x Q`.
    pub fn turn(&self, x: &[f64], part: Range<usize>) -> Vec<f64> {
        match self {
            Rotation::Identity => x[part].to_vec(),
            Rotation::Dense(q) => {
                let mut out = vec![0.0; part.len()];
                for (x, row) in x.iter().zip(q.chunks_exact(x.len().max(1))) {
                    out.iter_mut().zip(&row[part.clone()]).for_each(|(out, q)| *out += x * q);
                }
                out
            }
            Rotation::Hadamard { signs, cosines } => {
                let odd = odd_part(x.len());
                let even = x.len().checked_div(odd).unwrap_or(0);
                let mut values: Vec<f64> = x.iter().zip(signs).map(|(x, sign)| x * sign).collect();
                values.chunks_exact_mut(even.max(1)).for_each(butterflies);
                let norm = 1.0 / (even as f64).sqrt();
                let mixed = |at: usize| {
                    let (row, col) = (at / even, at % even);
                    (0..odd).map(|o| cosines[row * odd + o] * values[o * even + col]).sum::<f64>() * norm
                };
                part.map(mixed).collect()
            }
        }
    }
}

fn odd_part(width: usize) -> usize {
    width >> width.trailing_zeros().min(usize::BITS - 1)
}

/// The Hadamard transform of a power of two of values, without its factor.
fn butterflies(values: &mut [f64]) {
    let mut step = 1;
    while step < values.len() {
        for pair in values.chunks_exact_mut(2 * step) {
            let (low, high) = pair.split_at_mut(step);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        step *= 2;
    }
}

/// M with `a M = b`, all (n, n) row-major, by elimination. I - A of a skew A is safe without exchanging rows: its
/// symmetric part is the identity, so every pivot stays at least 1.
fn solve(mut a: Vec<f64>, mut b: Vec<f64>, n: usize) -> Vec<f64> {
    for pivot in 0..n {
        let (above, below) = a.split_at_mut((pivot + 1) * n);
        let (b_above, b_below) = b.split_at_mut((pivot + 1) * n);
        let (row, b_row) = (&above[pivot * n..], &b_above[pivot * n..]);
        for (other, b_other) in below.chunks_exact_mut(n).zip(b_below.chunks_exact_mut(n)) {
            let by = other[pivot] / row[pivot];
            other[pivot..].iter_mut().zip(&row[pivot..]).for_each(|(o, r)| *o -= by * r);
            b_other.iter_mut().zip(b_row).for_each(|(o, r)| *o -= by * r);
        }
    }
    for pivot in (0..n).rev() {
        let (b_above, b_row) = b.split_at_mut(pivot * n);
        b_row[..n].iter_mut().for_each(|v| *v /= a[pivot * n + pivot]);
        for (row, other) in b_above.chunks_exact_mut(n).enumerate() {
            let by = a[row * n + pivot];
            other.iter_mut().zip(&b_row[..n]).for_each(|(o, r)| *o -= by * r);
        }
    }
    b
}

/// splitmix64: the same numbers on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A normal number, by Box and Muller's formula.
    fn normal(&mut self) -> f64 {
        let mut uniform = || ((self.next() >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        let (radius, angle) = ((-2.0 * uniform().ln()).sqrt(), 2.0 * PI * uniform());
        radius * angle.cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transform::{Kind, TRANSFORMS};

    #[test]
    fn rotations_keep_lengths_and_angles_and_turn_by_parts() {
        for transform in TRANSFORMS {
            let Kind::Rotation(rotation) = transform.kind else { continue };
            for width in [1, 2, 9, 16, 36, 72, 96] {
                let rotation = rotation(width, 3);
                let unit = |i: usize| -> Vec<f64> { (0..width).map(|j| f64::from(u8::from(i == j))).collect() };
                let rows: Vec<Vec<f64>> = (0..width).map(|i| rotation.turn(&unit(i), 0..width)).collect();
                for (i, a) in rows.iter().enumerate() {
                    for (j, b) in rows.iter().enumerate() {
                        let dot: f64 = a.iter().zip(b).map(|(a, b)| a * b).sum();
                        let wanted = f64::from(u8::from(i == j));
                        assert!((dot - wanted).abs() < 1e-12, "{} of {width}: rows {i}, {j}: {dot}", transform.name);
                    }
                    let middle = width / 3..width - width / 4;
                    assert_eq!(rotation.turn(&unit(i), middle.clone()), a[middle], "{} of {width}", transform.name);
                }
            }
        }
    }

    #[test]
    fn hadamard_spreads_a_value_and_cayley_hardly_moves_it() {
        let mut unit = vec![0.0; 576];
        unit[100] = 1.0;
        let peak = |rotation: Rotation| rotation.turn(&unit, 0..576).iter().fold(0f64, |m, v| m.max(v.abs()));
        // The flattest possible vector of 576 has values of 1/24; cosines reach sqrt(2) times that.
        assert!(peak(Rotation::hadamard(576, 0)) < 1.42 / 24.0);
        let kept = peak(Rotation::cayley(576, 0));
        assert!((0.95..0.999).contains(&kept), "{kept}");
    }

    #[test]
    fn seeds_differ() {
        for (one, other) in
            [(Rotation::hadamard(24, 0), Rotation::hadamard(24, 1)), (Rotation::cayley(24, 0), Rotation::cayley(24, 1))]
        {
            assert!(one != other);
        }
    }
}
