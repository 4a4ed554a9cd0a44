//! Groups of nodes that are one operation written out: layer norms, GELUs, attention.
//!
//! ```text
//! layer norm   ReduceMean, Sub, Pow or Mul, ReduceMean, Add, Sqrt, Div [, Mul, Add]
//! gelu         Div or Mul, Erf, Add, Mul, Mul in any order of the products
//! attention    MatMul [, Div or Mul] [, Add] , Softmax, MatMul
//! ```
//! Runtimes fuse them, and only as long as nothing is put in between.

use super::Graph;
use super::graph::label;
use super::proto::*;
use super::tensor::floats;
use std::collections::BTreeSet;

/// What a group computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupKind {
    /// `gamma * (x - mean) / sqrt(var + eps) + beta` over the last axis.
    LayerNorm,
    /// `x/2 * (1 + erf(x / sqrt 2))`.
    Gelu,
    /// `softmax(q k^T * scale [+ mask]) v`.
    Attention,
}

/// Nodes that are one operation.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// What they compute.
    pub kind: GroupKind,
    /// Their positions, ascending.
    pub nodes: Vec<usize>,
    /// The name of the first of them.
    pub name: String,
    /// What goes in (for attention: the queries).
    pub input: String,
    /// What comes out.
    pub output: String,
    /// Names of a layer norm's gain and offset, one number a channel each.
    pub affine: Option<(String, String)>,
}

impl GroupKind {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            GroupKind::LayerNorm => "layer-norm",
            GroupKind::Gelu => "gelu",
            GroupKind::Attention => "attention",
        }
    }
}

/// Every group of a graph, by its first node.
pub fn groups(graph: &Graph) -> Vec<Group> {
    let mut found: Vec<Group> = Vec::new();
    for (id, node) in graph.nodes() {
        let group = match node.op_type() {
            "LayerNormalization" => Some(whole(graph, id, GroupKind::LayerNorm)),
            "Gelu" => Some(whole(graph, id, GroupKind::Gelu)),
            "Sqrt" => layer_norm(graph, id),
            "Erf" => gelu(graph, id),
            "Softmax" => attention(graph, id),
            _ => None,
        };
        found.extend(group);
    }
    found.sort_by_key(|g| g.nodes.first().copied());
    found
}

fn whole(graph: &Graph, id: usize, kind: GroupKind) -> Group {
    let node = graph.node(id);
    let constant = |slot: usize| graph.constant(node.arg(slot)).map(|t| t.name().to_owned());
    let affine = match kind {
        GroupKind::LayerNorm => constant(1).zip(constant(2)),
        _ => None,
    };
    Group {
        kind,
        nodes: vec![id],
        name: label(node),
        input: node.arg(0).to_owned(),
        output: node.out().to_owned(),
        affine,
    }
}

fn group(graph: &Graph, kind: GroupKind, nodes: &[usize], input: &str, output: &str) -> Group {
    let nodes: BTreeSet<usize> = nodes.iter().copied().collect();
    let nodes: Vec<usize> = nodes.into_iter().collect();
    let name = nodes.first().map_or_else(String::new, |&id| label(graph.node(id)));
    Group { kind, nodes, name, input: input.to_owned(), output: output.to_owned(), affine: None }
}

/// The node that makes a tensor, if it is this operator.
fn maker(graph: &Graph, tensor: &str, op: &str) -> Option<usize> {
    graph.producer(tensor).filter(|&id| graph.node(id).is(op))
}

/// The other input of a node with two.
fn other<'a>(node: &'a NodeProto, than: &str) -> &'a str {
    if node.arg(0) == than { node.arg(1) } else { node.arg(0) }
}

fn is_number(graph: &Graph, name: &str, wanted: f32) -> bool {
    graph
        .constant(name)
        .and_then(|t| floats(t).ok())
        .is_some_and(|v| v.len() == 1 && (v[0] - wanted).abs() <= 1e-4 * wanted.abs())
}

fn layer_norm(graph: &Graph, sqrt: usize) -> Option<Group> {
    let add = maker(graph, graph.node(sqrt).arg(0), "Add")?;
    let variance = [0, 1].into_iter().find_map(|slot| maker(graph, graph.node(add).arg(slot), "ReduceMean"))?;
    let squared = graph.node(variance).arg(0);
    let square = maker(graph, squared, "Pow").or_else(|| maker(graph, squared, "Mul"))?;
    let centred = graph.node(square).arg(0);
    if graph.node(square).is("Mul") && graph.node(square).arg(1) != centred
        || graph.node(square).is("Pow") && !is_number(graph, graph.node(square).arg(1), 2.0)
    {
        return None;
    }
    let sub = maker(graph, centred, "Sub")?;
    let input = graph.node(sub).arg(0);
    let mean = maker(graph, graph.node(sub).arg(1), "ReduceMean").filter(|&m| graph.node(m).arg(0) == input)?;
    let div = graph.sole_consumer(graph.node(sqrt).out())?;
    if !graph.node(div).is("Div")
        || graph.node(div).arg(0) != centred
        || graph.node(div).arg(1) != graph.node(sqrt).out()
    {
        return None;
    }
    let mut nodes = vec![mean, sub, square, variance, add, sqrt, div];
    let mut output = graph.node(div).out();
    let mut affine = Vec::new();
    for op in ["Mul", "Add"] {
        let Some(next) = graph.sole_consumer(output).filter(|&n| graph.node(n).is(op)) else { break };
        let Some(constant) = graph.constant(other(graph.node(next), output)).filter(|t| t.dims.len() <= 1) else {
            break;
        };
        affine.push(constant.name().to_owned());
        nodes.push(next);
        output = graph.node(next).out();
    }
    let mut found = group(graph, GroupKind::LayerNorm, &nodes, input, output);
    if let [gain, offset] = affine.as_slice() {
        found.affine = Some((gain.clone(), offset.clone()));
    }
    Some(found)
}

fn gelu(graph: &Graph, erf: usize) -> Option<Group> {
    let inner = graph.producer(graph.node(erf).arg(0))?;
    let root_two = std::f32::consts::SQRT_2;
    let input = match graph.node(inner).op_type() {
        "Div" if is_number(graph, graph.node(inner).arg(1), root_two) => graph.node(inner).arg(0),
        "Mul" => {
            let slot = [0, 1].into_iter().find(|&s| is_number(graph, graph.node(inner).arg(s), 1.0 / root_two))?;
            graph.node(inner).arg(1 - slot)
        }
        _ => return None,
    };
    let add = graph.sole_consumer(graph.node(erf).out()).filter(|&n| graph.node(n).is("Add"))?;
    if !is_number(graph, other(graph.node(add), graph.node(erf).out()), 1.0) {
        return None;
    }
    let mut nodes = vec![inner, erf, add];
    let mut output = graph.node(add).out();
    // x and 1/2 come as two products, in either order, or x/2 as one that was made before.
    let (mut by_input, mut by_half) = (false, false);
    while !(by_input && by_half) {
        let Some(next) = graph.sole_consumer(output).filter(|&n| graph.node(n).is("Mul")) else { break };
        let factor = other(graph.node(next), output);
        let halved = maker(graph, factor, "Mul").filter(|&m| {
            let m = graph.node(m);
            (0..2).any(|s| m.arg(s) == input && is_number(graph, m.arg(1 - s), 0.5))
        });
        match (factor == input, is_number(graph, factor, 0.5), halved) {
            (true, ..) => by_input = true,
            (_, true, _) => by_half = true,
            (.., Some(half)) => {
                nodes.push(half);
                (by_input, by_half) = (true, true);
            }
            _ => break,
        }
        nodes.push(next);
        output = graph.node(next).out();
    }
    (by_input && by_half).then(|| group(graph, GroupKind::Gelu, &nodes, input, output))
}

fn attention(graph: &Graph, softmax: usize) -> Option<Group> {
    let mut nodes = vec![softmax];
    let mut tensor = graph.node(softmax).arg(0);
    // Back over the mask and the scaling to the product of queries and keys.
    let product = loop {
        let id = graph.producer(tensor)?;
        nodes.push(id);
        let node = graph.node(id);
        match node.op_type() {
            "MatMul" => break id,
            "Add" | "Div" | "Mul" if nodes.len() < 5 => {
                // The side that leads to a product; masks are made of constants and inputs.
                let back = |name: &str| graph.producer(name).is_some_and(|p| !graph.node(p).is("Cast"));
                tensor = if back(node.arg(0)) { node.arg(0) } else { node.arg(1) };
            }
            _ => return None,
        }
    };
    let next = graph.sole_consumer(graph.node(softmax).out())?;
    let values = match graph.node(next).op_type() {
        "MatMul" => next,
        _ => return None,
    };
    nodes.push(values);
    let (input, output) = (graph.node(product).arg(0), graph.node(values).out());
    Some(group(graph, GroupKind::Attention, &nodes, input, output))
}
