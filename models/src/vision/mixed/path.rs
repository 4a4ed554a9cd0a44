//! What precisions of a layer cost, and the order in which layers are worth a better one.

use super::{Goal, LayerChoice};
use nibble_quant::onnx::plan::Stored;
use serde::{Deserialize, Serialize};

/// How a layer computes, from the least exact on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// In floats, from weights of 4 bits: the smallest there is, and no faster than floats.
    Int4,
    /// Weights and activations in 8 bits.
    Int8,
    /// Weights in 8 bits, activations in two terms of 8 bits.
    TwoTerms,
    /// In floats, from weights that are stored in half precision.
    Half,
    /// As it is.
    Float,
}

/// Time of a layer's product in integers, of one in floats. Read off ONNX Runtime's times of a ViT-S/14 (benches/VISION.md).
const INTEGER_TIME: f64 = 0.2;

/// Share of a product's power that is error where its weights are rounded to 11 bits: a third of a half of the last one's, squared.
pub(super) const HALF_ERROR: f64 = 1.0 / (3 << 24) as f64;
/// What bytes count beside time where there is no goal for them: as much as decides between what takes the same time.
const BYTES_BY_THE_WAY: f64 = 1.0 / 64.0;

impl Precision {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Precision::Int4 => "float from int4 weights",
            Precision::Int8 => "int8",
            Precision::TwoTerms => "int8, two terms",
            Precision::Half => "float from float16 weights",
            Precision::Float => "float",
        }
    }

    /// Time of a layer's product, of one in floats.
    pub(super) fn time(self) -> f64 {
        match self {
            Precision::Int8 => INTEGER_TIME,
            Precision::TwoTerms => 2.0 * INTEGER_TIME,
            Precision::Int4 | Precision::Half | Precision::Float => 1.0,
        }
    }

    /// Bytes of one weight.
    fn bytes(self) -> f64 {
        match self {
            Precision::Int4 => 0.5 + 4.0 / Stored::GROUP as f64,
            Precision::Int8 | Precision::TwoTerms => 1.0,
            Precision::Half => 2.0,
            Precision::Float => 4.0,
        }
    }
}

/// A step from one precision of a layer to a better one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Upgrade {
    pub(super) layer: usize,
    pub(super) to: Precision,
    spared: f64,
    cost: f64,
}

/// Upgrades in the order in which they are worth what they cost: time, and where there is a goal for bytes, those too, each as a share of
/// the whole float model's. A layer's own are the corners of the convex hull of its errors over its costs, so that they come in their
/// order.
pub(super) fn path(choices: &[LayerChoice], goal: Goal) -> Vec<Upgrade> {
    let multiplications: f64 = choices.iter().map(|c| c.multiplications.max(1.0)).sum();
    let weights: f64 = choices.iter().map(LayerChoice::weights).sum::<f64>().max(1.0);
    let mut path = Vec::new();
    for (layer, choice) in choices.iter().enumerate() {
        let share = [choice.multiplications.max(1.0) / multiplications, choice.weights() / weights];
        let cost = |from: Precision, to: Precision| {
            // Leaving 4 bits spares time, too, which must not pay for more bytes.
            let slow = |p: Precision| if p == Precision::Int4 { Precision::Int8.time() } else { p.time() };
            let time = (slow(to) - slow(from)) * share[0];
            let bytes = (to.bytes() - from.bytes()) / Precision::Float.bytes() * share[1];
            time + bytes * if matches!(goal, Goal::Bytes(_)) { 1.0 } else { BYTES_BY_THE_WAY }
        };
        let mut at = choice.precision;
        loop {
            let from = choice.error.get(&at).copied().unwrap_or_default();
            let better = choice.error.iter().filter(|(p, error)| **p > at && **error < from);
            let steps = better.map(|(&to, error)| Upgrade { layer, to, spared: from - error, cost: cost(at, to) });
            let worth = |u: &Upgrade| u.spared / u.cost;
            let Some(best) = steps.max_by(|a, b| worth(a).total_cmp(&worth(b))) else { break };
            at = best.to;
            path.push(best);
        }
    }
    path.sort_by(|a, b| (b.spared / b.cost).total_cmp(&(a.spared / a.cost)));
    path
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vision::diagnose::Layer;

    fn choice(start: Precision, errors: &[(Precision, f64)], multiplications: f64, weights: usize) -> LayerChoice {
        let layer = Layer {
            node: "layer".into(),
            op: "MatMul".into(),
            weight: Some("w".into()),
            shape: vec![1, weights],
            reads: vec!["x".into()],
            makes: "y".into(),
            fine: false,
            id: 0,
        };
        LayerChoice {
            layer,
            precision: start,
            error: errors.iter().copied().chain([(Precision::Half, HALF_ERROR), (Precision::Float, 0.0)]).collect(),
            multiplications,
        }
    }

    fn steps(path: &[Upgrade]) -> Vec<(usize, Precision)> {
        path.iter().map(|u| (u.layer, u.to)).collect()
    }

    #[test]
    fn a_step_that_spares_less_for_its_cost_is_left_out() {
        use Precision::*;
        // Two terms spare nearly all for a quarter of what floats cost.
        let two = choice(Int8, &[(Int8, 1.0), (TwoTerms, 0.1)], 1e6, 1000);
        // Here they spare a tenth: floats at once.
        let float = choice(Int8, &[(Int8, 1.0), (TwoTerms, 0.9)], 1e6, 1000);
        // Nothing to spare.
        let none = choice(Int8, &[(Int8, 0.0)], 1e6, 1000);
        let path = path(&[two, float, none], Goal::Sqnr(30.0));
        assert_eq!(steps(&path), [(0, TwoTerms), (1, Half), (0, Half), (0, Float), (1, Float)]);
    }

    #[test]
    fn bytes_count_only_where_they_are_wanted() {
        use Precision::*;
        // Much time and few weights, and the other way round, with the same error.
        let slow = choice(Int8, &[(Int8, 1.0)], 2e6, 1000);
        let large = choice(Int8, &[(Int8, 1.0)], 1.5e6, 9000);
        let choices = [slow, large];
        assert_eq!(steps(&path(&choices, Goal::Time(0.5)))[0].0, 1);
        assert_eq!(steps(&path(&choices, Goal::Bytes(1000)))[0].0, 0);
        // From 4 bits on, in their order, whatever is spared.
        let small = choice(Int4, &[(Int4, 1.0), (Int8, 0.01), (TwoTerms, 0.001)], 1e6, 1000);
        assert_eq!(steps(&path(&[small], Goal::Bytes(1000))), [(0, Int8), (0, TwoTerms), (0, Half), (0, Float)]);
    }
}
