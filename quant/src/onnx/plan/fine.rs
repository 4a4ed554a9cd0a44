//! Linear layers whose activations are quantized in two terms.

use super::{Decision, Kind, Mode, Plan, Settings, Target};
use crate::error::{QuantError, Result};
use crate::onnx::Graph;
use crate::onnx::fold::Folded;
use crate::onnx::groups::{Group, GroupKind};
use crate::onnx::select::Selector;
use std::collections::BTreeSet;
use std::str::FromStr;

/// Which linear layers have activations in two terms: `x` in integers, and what that leaves of `x` in integers of a
/// 255th of the step. It costs a second product and spares nearly all of the error of activations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fine {
    /// Those that read what a GELU makes: its values have one long side, and no weights before it that could take up
    /// factors.
    Gelu,
    /// Both layers of an MLP: that before a GELU, too.
    Mlp,
    /// All.
    All,
    /// Those that a pattern names.
    Named(Selector),
}

impl FromStr for Fine {
    type Err = QuantError;

    fn from_str(text: &str) -> Result<Self> {
        Ok(match text {
            "gelu" => Fine::Gelu,
            "mlp" => Fine::Mlp,
            "all" => Fine::All,
            pattern => Fine::Named(pattern.parse()?),
        })
    }
}

/// The quantized products by a matrix that the settings mean.
///
/// # Errors
/// A pattern that fits no node.
pub(super) fn layers(
    graph: &Graph,
    settings: &Settings,
    folded: &Folded,
    groups: &[Group],
    decisions: &[Decision],
) -> Result<BTreeSet<usize>> {
    let mut named = BTreeSet::new();
    for rule in &settings.fine {
        if let Fine::Named(pattern) = rule {
            named.extend(pattern.nodes(graph, folded)?);
        }
    }
    if settings.mode != Mode::Static || settings.target != Target::OnnxRuntime || settings.activation.int.bits() != 8 {
        return Ok(BTreeSet::new());
    }
    let is = |rule: Fine| settings.fine.contains(&rule);
    let gelus = || groups.iter().filter(|g| g.kind == GroupKind::Gelu);
    let inputs: BTreeSet<&str> = gelus().map(|g| g.input.as_str()).collect();
    let outputs: BTreeSet<&str> = gelus().map(|g| g.output.as_str()).collect();
    // Equalization may have put a product by a constant behind the GELU.
    let of_gelu = |name: &str| {
        let factor = graph.producer(name).map(|id| graph.node(id)).filter(|n| n.is("Mul"));
        outputs.contains(name)
            || factor.is_some_and(|n| {
                (0..2).any(|slot| outputs.contains(n.arg(slot)) && graph.constant(n.arg(1 - slot)).is_some())
            })
    };
    let meant = |id: usize, bias: Option<(usize, usize)>| {
        let node = graph.node(id);
        let made = bias.map_or(node.out(), |(add, _)| graph.node(add).out());
        named.contains(&id)
            || is(Fine::All)
            || (is(Fine::Gelu) || is(Fine::Mlp)) && of_gelu(node.arg(0))
            || is(Fine::Mlp) && inputs.contains(made)
    };
    let chosen = graph.nodes().zip(decisions).filter(|((id, node), decision)| match decision {
        Decision::Quantized(Kind::Linear { bias }) => node.is("MatMul") && meant(*id, *bias),
        _ => false,
    });
    Ok(chosen.map(|((id, _), _)| id).collect())
}

impl Plan {
    /// Tensors that only layers with [`Fine`] activations read in integers.
    pub fn fine_tensors(&self, graph: &Graph) -> BTreeSet<String> {
        let reads = |fine: bool| -> BTreeSet<String> {
            let readers = graph.nodes().filter(|(id, _)| self.kind(*id).is_some() && self.fine.contains(id) == fine);
            let slots = |(id, node)| self.kind(id).map(|k| k.data_slots(node).map(|s| node.arg(s).to_owned()));
            readers.filter_map(slots).flatten().collect()
        };
        let others = reads(false);
        reads(true).into_iter().filter(|name| !others.contains(name)).collect()
    }
}
