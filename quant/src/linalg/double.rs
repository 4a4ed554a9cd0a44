//! The Cholesky factor in f64, for matrices that f32 takes for singular.

use super::{LANES, Symmetric, TILE};
use rayon::prelude::*;

impl Symmetric {
    /// [`Symmetric::cholesky`] with every sum in f64, rounded in the end: twice the memory, and several times as long.
    pub(super) fn cholesky_in_f64(&self, order: &[u32], scale: f32, damping: f32) -> Option<Symmetric> {
        let n = order.len();
        let row = |r: usize| -> Vec<f64> {
            let value = |c: usize| scale as f64 * self.get(order[r] as usize, order[c] as usize) as f64;
            (0..=r).map(|c| value(c) + if r == c { damping as f64 } else { 0.0 }).collect()
        };
        let mut l: Vec<Vec<f64>> = (0..n).into_par_iter().map(row).collect();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        for j in 0..n {
            let (done, rest) = l.split_at_mut(j + 1);
            let own = &mut done[j];
            let left = own[j] - dot(&own[..j], &own[..j]);
            if left <= 0.0 || !left.is_finite() {
                return None;
            }
            own[j] = left.sqrt();
            let own: &[f64] = own;
            rest.par_iter_mut().with_min_len(16).for_each(|row| row[j] = (row[j] - dot(&row[..j], &own[..j])) / own[j]);
        }
        let mut rounded = Symmetric::new(self.width);
        rounded.rows.par_iter_mut().enumerate().for_each(|(i, row)| {
            for (at, value) in row.iter_mut().enumerate() {
                let (r, c) = (i * LANES + at % LANES, at / TILE * LANES + at % TILE / LANES);
                let padding = if r == c { 1.0 } else { 0.0 };
                let known = l.get(r).map(|row| row.get(c).copied().unwrap_or(0.0));
                *value = known.map_or(padding, |v| v as f32);
            }
        });
        // A pivot that f32 doesn't hold would divide by nothing.
        (0..n).all(|a| rounded.get(a, a) > 0.0).then_some(rounded)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Feedback;
    use super::*;

    /// All ones and a little on the diagonal, which f32 loses: its factor in closed form.
    #[test]
    fn what_f32_loses_is_factored_in_f64() {
        for width in [2, 16, 17, 40] {
            let mut matrix = Symmetric::new(width);
            (0..width).for_each(|a| (0..=a).for_each(|b| matrix.set(a, b, 1.0)));
            let (order, little): (Vec<u32>, f64) = ((0..width as u32).collect(), 2f64.powi(-30));
            assert!(matrix.cholesky(&order, 1.0, little as f32).is_none(), "{width}");
            let l = matrix.cholesky_in_f64(&order, 1.0, little as f32).unwrap();
            for j in 0..width {
                // What the columns before leave of the ones: e / (j + e).
                let e = if j == 0 { 1.0 } else { little / (j as f64 + little) };
                let (pivot, below) = ((e + little).sqrt(), e / (e + little).sqrt());
                let near = |got: f32, want: f64| (got as f64 - want).abs() <= 1e-4 * want;
                assert!(near(l.get(j, j), pivot), "{width}, {j}: {} for {pivot}", l.get(j, j));
                assert!((j + 1..width).all(|r| near(l.get(r, j), below)), "{width}, {j}");
            }
            assert!(Feedback::new(&matrix, order, 1.0, little as f32).is_some());
        }
    }
}
