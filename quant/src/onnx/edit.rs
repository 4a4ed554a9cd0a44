//! Changes to a graph, as data: decided by reading an index, printed if wanted, then applied all at once.

use super::graph::{Graph, sort};
use super::proto::*;
use crate::QuantError;
use crate::error::Result;
use std::collections::{HashMap, HashSet};

/// One change. Nodes are named by their position before any of the changes.
#[derive(Debug, Clone, PartialEq)]
pub enum Edit {
    /// A new node; its place follows from what it reads.
    Add(NodeProto),
    /// A node goes.
    Remove(usize),
    /// A node reads another tensor.
    Input {
        /// The node.
        node: usize,
        /// Which of its inputs; one past the last adds one.
        slot: usize,
        /// The tensor it reads from now on.
        to: String,
    },
    /// A node's output gets another name; readers are changed by edits of their own.
    Output {
        /// The node.
        node: usize,
        /// Which of its outputs.
        slot: usize,
        /// The name.
        to: String,
    },
    /// A node's attribute is set.
    Attribute {
        /// The node.
        node: usize,
        /// The attribute; one of the same name is replaced.
        attribute: Box<AttributeProto>,
    },
    /// An initializer is added, or replaced if there is one of its name.
    Initializer(TensorProto),
}

/// Applies changes, drops initializers and shapes that nothing refers to any more, puts nodes in order and checks.
///
/// # Errors
/// A change of a node or slot that isn't there, two different changes of one slot, or a graph that is no longer one: a
/// tensor made twice, never made, or made from itself.
pub fn apply(graph: &mut GraphProto, edits: Vec<Edit>) -> Result<()> {
    let refuse = |why: String| QuantError::Spec { what: "graph edit".into(), why };
    let count = graph.node.len();
    let before = used(graph);
    let mut removed = HashSet::new();
    let mut set: HashMap<(usize, bool, usize), String> = HashMap::new();
    let mut added = Vec::new();
    let mut position: HashMap<String, usize> =
        graph.initializer.iter().enumerate().map(|(i, t)| (t.name().to_owned(), i)).collect();
    for edit in edits {
        if let Edit::Remove(node) | Edit::Input { node, .. } | Edit::Output { node, .. } | Edit::Attribute { node, .. } =
            &edit
            && *node >= count
        {
            return Err(refuse(format!("node {node} of {count}")));
        }
        if let Edit::Input { node, slot, to } | Edit::Output { node, slot, to } = &edit {
            let key = (*node, matches!(edit, Edit::Input { .. }), *slot);
            if let Some(other) = set.insert(key, to.clone()).filter(|other| other != to) {
                return Err(refuse(format!("slot {slot} of node {node} becomes `{other}` and `{to}`")));
            }
        }
        match edit {
            Edit::Add(node) => added.push(node),
            Edit::Remove(node) => drop(removed.insert(node)),
            Edit::Input { node, slot, to } => {
                let inputs = &mut graph.node[node].input;
                match inputs.get_mut(slot) {
                    Some(input) => *input = to,
                    None => {
                        inputs.resize(slot, String::new());
                        inputs.push(to);
                    }
                }
            }
            Edit::Output { node, slot, to } => match graph.node[node].output.get_mut(slot) {
                Some(output) => *output = to,
                None => return Err(refuse(format!("output {slot} of node {node}"))),
            },
            Edit::Attribute { node, attribute } => {
                let attributes = &mut graph.node[node].attribute;
                match attributes.iter_mut().find(|a| a.name() == attribute.name()) {
                    Some(found) => *found = *attribute,
                    None => attributes.push(*attribute),
                }
            }
            Edit::Initializer(tensor) => match position.get(tensor.name()) {
                Some(&at) => graph.initializer[at] = tensor,
                None => {
                    position.insert(tensor.name().to_owned(), graph.initializer.len());
                    graph.initializer.push(tensor);
                }
            },
        }
    }
    let mut id = 0;
    graph.node.retain(|_| {
        id += 1;
        !removed.contains(&(id - 1))
    });
    graph.node.append(&mut added);
    sort(graph)?;
    let after = used(graph);
    let dead = |name: &str| before.contains(name) && !after.contains(name);
    graph.initializer.retain(|t| !dead(t.name()));
    let mut alive: HashSet<&str> = graph.node.iter().flat_map(|n| &n.output).map(String::as_str).collect();
    alive.extend(graph.initializer.iter().map(TensorProto::name));
    let keep: Vec<bool> = graph.value_info.iter().map(|info| alive.contains(info.name())).collect();
    let mut keep = keep.into_iter();
    graph.value_info.retain(|_| keep.next().unwrap_or(true));
    Graph::new(graph).map(drop)
}

/// Tensors that something refers to.
fn used(graph: &GraphProto) -> HashSet<String> {
    let mut names: HashSet<String> = graph.output.iter().map(|o| o.name().to_owned()).collect();
    let mut graphs = vec![graph];
    while let Some(graph) = graphs.pop() {
        names.extend(graph.output.iter().map(|o| o.name().to_owned()));
        for node in &graph.node {
            names.extend(node.input.iter().cloned());
            graphs.extend(node.attribute.iter().flat_map(|a| a.g.iter().chain(&a.graphs)));
        }
    }
    names
}
