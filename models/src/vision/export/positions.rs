//! A table of positions for pictures of another size: bicubic interpolation as PyTorch's `interpolate` does it
//! (`align_corners=False`, `antialias=False`) and ONNX's Resize with `cubic_coeff_a` -0.75.

/// Cubic convolution's parameter (Keys 1981).
const A: f64 = -0.75;

/// The weights of the four neighbours of a place `t` past the second of them.
fn weights(t: f64) -> [f64; 4] {
    let near = |x: f64| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f64| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)]
}

/// Where each of `to` places reads among `from`, edges repeated.
fn taps(from: usize, to: usize) -> Vec<[(usize, f64); 4]> {
    let scale = from as f64 / to as f64;
    let clamp = |i: i64| i.clamp(0, from as i64 - 1) as usize;
    (0..to)
        .map(|i| {
            let place = (i as f64 + 0.5) * scale - 0.5;
            let first = place.floor();
            let w = weights(place - first);
            [0, 1, 2, 3].map(|k| (clamp(first as i64 + k as i64 - 1), w[k]))
        })
        .collect()
}

/// A square table (from * from, channels) at another size: (to * to, channels).
pub(super) fn resize(table: &[f32], channels: usize, from: usize, to: usize) -> Vec<f32> {
    if from == to {
        return table.to_vec();
    }
    let taps = taps(from, to);
    let mut out = Vec::with_capacity(to * to * channels);
    for rows in &taps {
        for columns in &taps {
            for c in 0..channels {
                let sum: f64 = rows
                    .iter()
                    .flat_map(|&(y, wy)| columns.iter().map(move |&(x, wx)| (y * from + x, wy * wx)))
                    .map(|(at, w)| f64::from(table[at * channels + c]) * w)
                    .sum();
                out.push(sum as f32);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::{resize, weights};

    #[test]
    fn one_value_stays_one_and_a_slope_stays_symmetric() {
        for (from, to) in [(4, 7), (9, 5), (5, 5)] {
            let flat = resize(&vec![3.0; from * from * 2], 2, from, to);
            assert!(flat.iter().all(|v| (v - 3.0).abs() < 1e-6) && flat.len() == to * to * 2);
            let slope: Vec<f32> = (0..from * from).map(|i| (i % from) as f32).collect();
            let resized = resize(&slope, 1, from, to);
            for i in 0..to {
                let ends = resized[i] + resized[to - 1 - i];
                assert!((ends - (from as f32 - 1.0)).abs() < 1e-5, "{from} to {to}, {i}: {ends}");
            }
        }
    }

    #[test]
    fn weights_are_those_of_keys_kernel() {
        // Halfway, and at a neighbour itself.
        assert_eq!(weights(0.5), [-0.09375, 0.59375, 0.59375, -0.09375]);
        assert_eq!(weights(0.0), [0.0, 1.0, 0.0, 0.0]);
        for t in [0.1, 0.25, 0.9] {
            assert!((weights(t).iter().sum::<f64>() - 1.0).abs() < 1e-12);
        }
    }
}
