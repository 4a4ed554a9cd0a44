//! Weights whose products can be added in pairs of 16 bits.
//!
//! x86 processors without VNNI multiply unsigned activations by signed weights and add two neighbouring products in 16 bits,
//! which saturates (PMADDUBSW): 255 (a + b) is beyond them where two weights of one sign are more than 128 together. Pairs
//! that are get smaller codes, under a wider scale where that costs less; what isn't multiplied in pairs keeps all of its bits.

use super::{AlgoInput, Layout, Seen, shape};
use crate::algo::{algorithm, under_scales};
use crate::error::Result;
use crate::observer::{IntGrid, IntType, QParams};
use crate::onnx::proto::*;
use crate::{Granularity, QuantSpec};

/// What two neighbours may come to: 255 * 128 < 2^15.
const MOST: i32 = 128;
/// How much wider scales are tried; under twice one that cuts nothing off no pair is beyond [`MOST`].
const WIDER: [f32; 9] = [1.0, 1.05, 1.1, 1.16, 1.23, 1.32, 1.45, 1.65, 2.0];

/// Which values of an output channel are multiplied and added in pairs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pairs(Vec<[u32; 2]>);

impl Pairs {
    /// Of a layer; `None` for depthwise convolutions, whose products are added in 32 bits.
    ///
    /// Kernels read a channel's values as (height, width, input channels), from an even place on each: with an odd number of input
    /// channels any two neighbours may meet.
    pub fn of(node: &NodeProto, weight: &TensorProto, layout: Layout) -> Option<Pairs> {
        let [n, k] = shape(weight, layout);
        let (taps, groups) = match node.is("Conv") {
            true => (weight.dims[2..].iter().product::<i64>().max(1) as usize, node.int("group", 1).max(1) as usize),
            false => (1, 1),
        };
        let channels = k / taps;
        if node.is("Conv") && channels == 1 && groups == n && n > 1 {
            return None;
        }
        let place = |t: usize| (t % channels * taps + t / channels) as u32;
        let step = if channels.is_multiple_of(2) || taps == 1 { 2 } else { 1 };
        Some(Pairs((1..k).step_by(step).map(|t| [place(t - 1), place(t)]).collect()))
    }

    /// Whether a channel's codes have a pair that is too large.
    fn exceeded_by(&self, codes: &[i8]) -> bool {
        self.0.iter().any(|pair| sum(codes, *pair).abs() > MOST)
    }

    /// Makes pairs that are too large smaller, the value whose error costs less by more. `codes` are rows of `k` values, `costs`
    /// (k).
    pub fn limit(&self, codes: &mut [i8], k: usize, costs: Option<&[f32]>) {
        codes.chunks_mut(k.max(1)).for_each(|row| self.limit_row(row, costs));
    }

    fn limit_row(&self, codes: &mut [i8], costs: Option<&[f32]>) {
        for &pair in &self.0 {
            let excess = sum(codes, pair).abs() - MOST;
            if excess <= 0 {
                continue;
            }
            let [a, b] = pair.map(|at| at as usize);
            let [cost_a, cost_b] = [a, b].map(|at| costs.map_or(1.0, |c| c[at]).max(f32::MIN_POSITIVE));
            let from_a = (excess as f32 * (cost_b / (cost_a + cost_b))).round() as i32;
            for (at, by) in [(a, from_a), (b, excess - from_a)] {
                codes[at] = (i32::from(codes[at]) - by * i32::from(codes[at].signum())) as i8;
            }
        }
    }
}

fn sum(codes: &[i8], [a, b]: [u32; 2]) -> i32 {
    i32::from(codes[a as usize]) + i32::from(codes[b as usize])
}

/// A weight of `n` channels of `k` values that is being quantized.
pub(super) struct Limited<'a> {
    pub name: &'a str,
    pub shape: [usize; 2],
    pub values: &'a [f32],
    pub spec: &'a QuantSpec,
    pub algorithm: &'a str,
    pub seen: Seen<'a>,
    pub pairs: &'a Pairs,
}

impl Limited<'_> {
    /// Codes (n, k) without pairs that are too large, under scales as much wider as is best for that.
    pub(super) fn limit(&self, codes: &mut [i8], scales: &mut [f32]) -> Result<()> {
        let [n, k] = self.shape;
        let grid = IntGrid::symmetric(IntType::S8);
        let together = if scales.len() == n { 1 } else { n };
        let mut changed = vec![false; n];
        let unit = (together * k).max(1);
        for (at, (codes, values)) in codes.chunks_mut(unit).zip(self.values.chunks(unit)).enumerate() {
            if !codes.chunks(k.max(1)).any(|row| self.pairs.exceeded_by(row)) {
                continue;
            }
            let base = scales[at].abs();
            let mut best: Option<(f64, f32, Vec<i8>)> = None;
            for wider in WIDER {
                let scale = base * wider;
                let params = QParams { scale, zero_point: 0 };
                let mut tried: Vec<i8> = values.iter().map(|v| grid.quantize(params, *v) as i8).collect();
                self.pairs.limit(&mut tried, k, self.seen.importance);
                let error = self.error(values, scale, &tried);
                if best.as_ref().is_none_or(|(least, ..)| error < *least) {
                    best = Some((error, scale, tried));
                }
            }
            if let Some((_, scale, tried)) = best {
                scales[at] = scale;
                codes.copy_from_slice(&tried);
                changed[at * together..(at + 1) * together].fill(true);
            }
        }
        if algorithm(self.algorithm)?.gram {
            self.recode(&changed, codes, scales)?;
        }
        Ok(())
    }

    fn error(&self, values: &[f32], scale: f32, codes: &[i8]) -> f64 {
        let k = self.shape[1];
        let one = |(at, (v, c)): (usize, (&f32, &i8))| {
            let off = f64::from(v - scale * f32::from(*c));
            off * off * self.seen.importance.map_or(1.0, |costs| f64::from(costs[at % k]))
        };
        values.iter().zip(codes).enumerate().map(one).sum()
    }

    /// The changed channels once more, with codes that make up for each other's errors.
    fn recode(&self, changed: &[bool], codes: &mut [i8], scales: &[f32]) -> Result<()> {
        let ([n, k], groups) = (self.shape, self.seen.inputs.len());
        if groups == 0 || n % groups != 0 {
            return Ok(());
        }
        for (g, input) in self.seen.inputs.iter().enumerate() {
            let rows: Vec<usize> = (g * (n / groups)..(g + 1) * (n / groups)).filter(|row| changed[*row]).collect();
            if rows.is_empty() {
                continue;
            }
            let weight: Vec<f32> = rows.iter().flat_map(|row| &self.values[row * k..(row + 1) * k]).copied().collect();
            let own: Vec<f32> = match self.spec.granularity {
                Granularity::Tensor => scales.to_vec(),
                _ => rows.iter().map(|row| scales[*row]).collect(),
            };
            let importance = input.mean_squares();
            let given = AlgoInput {
                name: self.name,
                weight: &weight,
                shape: [rows.len(), k],
                spec: self.spec,
                importance: Some(&importance),
                calibrated: Some(input),
                seed: 0,
            };
            let (tensor, _) = under_scales(&given, &own)?;
            for (row, chosen) in rows.iter().zip(tensor.codes.chunks(k)) {
                let codes = &mut codes[row * k..(row + 1) * k];
                codes.iter_mut().zip(chosen).for_each(|(to, c)| *to = (i32::from(*c) - self.spec.middle()) as i8);
                self.pairs.limit(codes, k, Some(&importance));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Rounding, Weight, quantize};
    use super::*;
    use crate::stats::Input;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    fn conv(dims: &[usize], group: i64) -> (NodeProto, TensorProto) {
        let node = NodeProto::new("Conv", "c", &["x", "w"], &["y"]).with(AttributeProto::new_int("group", group));
        let weight = crate::onnx::tensor::from_f32("w", dims, &vec![0.0; dims.iter().product()]);
        (node, weight)
    }

    #[test]
    fn pairs_are_those_that_kernels_read_together() {
        let of = |dims: &[usize], group| {
            let (node, weight) = conv(dims, group);
            Pairs::of(&node, &weight, Layout::Rows).map(|pairs| pairs.0)
        };
        assert_eq!(of(&[2, 5, 1, 1], 1), Some(vec![[0, 1], [2, 3]]));
        // (channel, tap) of a tap's two channels: 0 and 2, 1 and 3.
        assert_eq!(of(&[2, 2, 1, 2], 1), Some(vec![[0, 2], [1, 3]]));
        assert_eq!(of(&[2, 3, 1, 2], 1), Some(vec![[0, 2], [2, 4], [4, 1], [1, 3], [3, 5]]));
        assert_eq!(of(&[4, 1, 3, 3], 4), None, "depthwise");
        assert!(of(&[8, 1, 1, 2], 4).is_some(), "two outputs an input");
        let node = NodeProto::new("MatMul", "m", &["x", "w"], &["y"]);
        let weight = crate::onnx::tensor::from_f32("w", &[4, 3], &[0.0; 12]);
        assert_eq!(Pairs::of(&node, &weight, Layout::Columns), Some(Pairs(vec![[0, 1], [2, 3]])));
    }

    #[test]
    fn no_pair_is_too_large_afterwards_and_others_stay() {
        let pairs = Pairs(vec![[0, 1], [1, 2], [3, 4], [5, 6]]);
        let mut codes = [127, 127, 90, -100, -29, -127, 127];
        pairs.limit(&mut codes, 7, Some(&[1.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0]));
        assert!(!pairs.exceeded_by(&codes));
        assert_eq!(codes[5..], [-127, 127], "of two signs");
        assert!(codes[1] > codes[0] && codes[3] + codes[4] == -128, "{codes:?}");
    }

    #[test]
    fn limited_weights_are_nearer_than_those_of_seven_bits() {
        let mut rng = StdRng::seed_from_u64(5);
        let (n, k) = (12, 66);
        let values: Vec<f32> = (0..n * k).map(|_| (0..4).map(|_| rng.random::<f32>() - 0.5).sum()).collect();
        let x: Vec<f32> = (0..4 * k * k).map(|_| rng.random::<f32>()).collect();
        let mut input = Input::new(k, true);
        input.observe("x", &x).unwrap();
        let node = NodeProto::new("Gemm", "g", &["x", "w"], &["y"]).with(AttributeProto::new_int("transB", 1));
        let weight = crate::onnx::tensor::from_f32("w", &[n, k], &values);
        let inputs = [input];
        for (name, per_channel) in [("rtn", true), ("rtn", false), ("gptq", true), ("gptq", false)] {
            let made = |bits: u8, limited: bool| {
                let how = Rounding { per_channel, bits, pairs: limited, algorithm: name };
                let seen = Seen { inputs: &inputs, ..Seen::default() };
                let pairs = how.pairs_of(&node, &weight, Layout::Rows);
                assert_eq!(pairs.is_some(), limited && bits == 8);
                let made = quantize(&weight, Layout::Rows, how, seen, &[], pairs.as_ref()).unwrap();
                let d: Vec<f32> =
                    (0..n * k).map(|i| values[i] - made.scale(i / k) * f32::from(made.codes[i])).collect();
                // What a rounded layer gives wrong on what was seen.
                let off = |row: &[f32]| -> f64 {
                    let dot = |x: &[f32]| x.iter().zip(row).map(|(x, d)| f64::from(x * d)).sum::<f64>();
                    x.chunks(k).map(|x| dot(x).powi(2)).sum()
                };
                (d.chunks(k).map(off).sum::<f64>(), made)
            };
            let [(whole, full), (error, limited), (seven, _)] = [made(8, false), made(8, true), made(7, false)];
            assert!(error < 0.85 * seven && whole <= error, "{name}, {per_channel}: {whole}, {error}, {seven}");
            let pairs = Pairs::of(&node, &weight, Layout::Rows).unwrap();
            let exceeded = |made: &Weight| made.codes.chunks(k).any(|row| pairs.exceeded_by(row));
            assert!(exceeded(&full) && !exceeded(&limited), "{name}, {per_channel}");
        }
    }
}
