//! What is quantized, decided before anything is changed: pure, printable, and the only place that knows the rules.
//!
//! ```text
//! anchors   Conv, Gemm, MatMul with constant weights: integers whatever surrounds them
//! joins     Add, Mul, Concat, pooling, Sigmoid, ...: integers only between integers, else they would add rounding for
//!           no speed
//! passes    Reshape, Transpose, MaxPool, ...: as joins, and their output has the input's scale
//! ```
//! The rules are those of ONNX Runtime's CPU provider, read in its optimized graphs: a Conv becomes one integer kernel
//! only if its output is quantized, a linear layer needs none; a Relu or Clip is the range of what is before it.

mod fine;
mod kinds;
mod stored;
mod units;

pub use fine::Fine;
pub use kinds::{Clip, Kind};
pub use stored::{Stored, rule};

use super::fold::Folded;
use super::graph::label;
use super::groups::{Group, groups};
use super::select::{self, Selector};
use super::weights::Rounding;
use super::{Graph, Model};
use crate::Range;
use crate::error::Result;
use crate::observer::{IntGrid, IntType};
use std::collections::{BTreeMap, BTreeSet};

/// How weights and activations become integers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Activations quantized with scales found by calibration: QuantizeLinear and DequantizeLinear around operators.
    Static,
    /// Activations of linear layers quantized at run time, with a scale a tensor.
    Dynamic,
    /// Weights of linear layers only, in groups along K.
    WeightOnly {
        /// 4 or 8.
        bits: u8,
        /// Values that share a scale: a power of 2, at least 16.
        group: usize,
        /// How the file says it.
        form: Packing,
    },
}

/// How packed weights stand in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Packing {
    /// ONNX Runtime's operator MatMulNBits.
    #[default]
    MatMulNBits,
    /// Integers and a DequantizeLinear with blocks, of ONNX's own opset 21; 4 bits two a byte.
    Blocks,
}

/// For which runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Target {
    /// ONNX Runtime on a CPU.
    #[default]
    OnnxRuntime,
    /// TensorRT: symmetric signed activations, float biases, Relu kept.
    TensorRt,
}

/// What is wanted.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How.
    pub mode: Mode,
    /// For what.
    pub target: Target,
    /// The grid of activations.
    pub activation: IntGrid,
    /// How 8-bit weights are rounded.
    pub weights: Rounding,
    /// If there are any, only these anchors are quantized.
    pub include: Vec<Selector>,
    /// These nodes stay float.
    pub exclude: Vec<Selector>,
    /// Layers that compute in floats, and how their weights are stored; the first pattern that fits a layer decides.
    pub stored: Vec<(Selector, Stored)>,
    /// Products of two activations, as in attention, are quantized too.
    pub attention: bool,
    /// Convolutions where they are known to become slower.
    pub force_conv: bool,
    /// Linear layers whose activations are quantized in two terms; those that any of them means.
    pub fine: Vec<Fine>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            mode: Mode::Static,
            target: Target::OnnxRuntime,
            activation: IntGrid::asymmetric(IntType::U8),
            weights: Rounding { per_channel: true, bits: 8, pairs: false, algorithm: "rtn" },
            include: Vec::new(),
            exclude: Vec::new(),
            stored: Vec::new(),
            attention: false,
            force_conv: false,
            fine: vec![Fine::Gelu],
        }
    }
}

/// What becomes of a node.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// It computes in integers.
    Quantized(Kind),
    /// It is part of the node before it, whose output has its range.
    Merged(Clip),
    /// It stays as it is, and why.
    Float(String),
}

/// One node of a [`Plan`].
#[derive(Debug, Clone, PartialEq)]
pub struct PlannedNode {
    /// Its name, or operator and output.
    pub name: String,
    /// Its operator.
    pub op: String,
    /// What it is a part of.
    pub group: Option<&'static str>,
    /// What becomes of it.
    pub decision: Decision,
}

/// What becomes of every node and tensor of a folded graph.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What was wanted.
    pub settings: Settings,
    /// One a node, in the graph's order.
    pub nodes: Vec<PlannedNode>,
    /// Tensors that get a scale, each with the one whose scale it has: itself, or what it passes on.
    pub scales: BTreeMap<String, String>,
    /// Ranges that are known without looking: of Sigmoid and Softmax.
    pub fixed: BTreeMap<String, Range>,
    /// Tensors whose range is cut: the Relu or Clip after a node is in it.
    pub clips: BTreeMap<String, Clip>,
    /// Tensors that a quantized node makes in integers.
    pub(super) made: BTreeSet<String>,
    /// Linear layers whose activations have two terms.
    pub fine: BTreeSet<usize>,
    /// Layers that compute in floats from weights that aren't stored as they are.
    pub stored: BTreeMap<usize, (Kind, Stored)>,
    /// For each node that makes integers, the name of what it makes: its output, or that of a Clip merged into it.
    pub(super) outputs: BTreeMap<usize, String>,
    /// Recognized groups of nodes.
    pub groups: Vec<Group>,
}

/// Plans a folded model.
///
/// # Errors
/// A graph that is none, settings that contradict each other, or a pattern that fits nothing.
pub fn plan(model: &Model, settings: &Settings, folded: &Folded) -> Result<Plan> {
    let graph = Graph::new(model.graph())?;
    let excluded = select::all(&settings.exclude, &graph, folded)?;
    let included = match settings.include.as_slice() {
        [] => None,
        some => Some(select::all(some, &graph, folded)?),
    };
    check(settings)?;
    let as_static = Settings { mode: Mode::Static, attention: false, ..settings.clone() };
    let stored = stored::layers(&graph, settings, folded, &|node| Ok(kinds::kind(&graph, node, &as_static)?.ok()))?;
    let mut candidates: Vec<Result<Kind, String>> = Vec::with_capacity(model.graph().node.len());
    for (id, node) in graph.nodes() {
        candidates.push(match kinds::kind(&graph, node, settings)? {
            Ok(_) if let Some((_, form)) = stored.get(&id) => Err(format!("its weight is stored as {}", form.name())),
            Ok(_) if excluded.contains(&id) => Err("excluded".into()),
            Ok(kind) if kind.is_anchor() && included.as_ref().is_some_and(|i| !i.contains(&id)) => {
                Err("not among those included".into())
            }
            other => other,
        });
    }
    let groups = groups(&graph);
    let mut member: BTreeMap<usize, &'static str> = BTreeMap::new();
    for group in &groups {
        member.extend(group.nodes.iter().map(|&id| (id, group.kind.name())));
    }
    let units = units::resolve(&graph, candidates, settings)?;
    let fine = fine::layers(&graph, settings, folded, &groups, &units.decisions)?;
    let nodes = graph
        .nodes()
        .zip(units.decisions)
        .map(|((id, node), decision)| PlannedNode {
            name: label(node),
            op: node.op_type().to_owned(),
            group: member.get(&id).copied(),
            decision,
        })
        .collect();
    Ok(Plan {
        settings: settings.clone(),
        nodes,
        scales: units.scales,
        fixed: units.fixed,
        clips: units.clips,
        made: units.made,
        outputs: units.outputs,
        fine,
        stored,
        groups,
    })
}

impl Plan {
    /// Tensors whose values have to be observed.
    pub fn observed(&self) -> Vec<String> {
        let roots: BTreeSet<&String> = self.scales.values().filter(|root| !self.fixed.contains_key(*root)).collect();
        roots.into_iter().cloned().collect()
    }

    /// The kind of a node that is quantized.
    pub fn kind(&self, node: usize) -> Option<&Kind> {
        match &self.nodes.get(node)?.decision {
            Decision::Quantized(kind) => Some(kind),
            _ => None,
        }
    }

    /// How many nodes compute in integers.
    pub fn quantized(&self) -> usize {
        self.nodes.iter().filter(|n| matches!(n.decision, Decision::Quantized(_))).count()
    }
}

/// Refuses settings that contradict each other.
fn check(settings: &Settings) -> Result<()> {
    let refuse = |what: &str, why: String| Err(crate::QuantError::Spec { what: what.into(), why });
    let grid = settings.activation;
    if !matches!(settings.weights.bits, 2..=8) {
        return refuse("weight bits", format!("{} in use; 2 to 8 are possible", settings.weights.bits));
    }
    match settings.mode {
        Mode::WeightOnly { bits, .. } if bits != 4 && bits != 8 => {
            refuse("weight bits", format!("{bits}; 4 or 8 are possible"))
        }
        Mode::WeightOnly { group, .. } if !group.is_power_of_two() || group < 16 => {
            refuse("group", format!("{group} values; a power of 2 from 16 on is possible"))
        }
        _ if settings.target == Target::TensorRt && !(grid.symmetric && grid.int == IntType::S8) => {
            refuse("target tensorrt", "wants symmetric s8 activations".into())
        }
        Mode::Dynamic | Mode::WeightOnly { .. } if settings.target == Target::TensorRt => {
            refuse("target tensorrt", "has static scales only".into())
        }
        _ => Ok(()),
    }
}
