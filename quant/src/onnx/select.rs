//! Which nodes are meant, in words: `*/mlp/fc2/*`, `op:Conv`, `weight:backbone.*`.

use super::graph::label;
use super::{Graph, fold::Folded};
use crate::error::Result;
use crate::recipe::glob;
use crate::{QuantError, names};
use std::collections::BTreeSet;

/// A pattern over nodes; `*` stands for any characters, `?` for one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selector {
    text: String,
    by: By,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Name,
    Op,
    Weight,
}

impl std::str::FromStr for Selector {
    type Err = QuantError;

    fn from_str(text: &str) -> Result<Self> {
        let (by, pattern) = match text.split_once(':') {
            Some(("op", rest)) => (By::Op, rest),
            Some(("weight", rest)) => (By::Weight, rest),
            Some(("name", rest)) => (By::Name, rest),
            _ => (By::Name, text),
        };
        if pattern.is_empty() {
            return Err(QuantError::Spec { what: format!("pattern `{text}`"), why: "is empty".into() });
        }
        Ok(Self { text: text.to_owned(), by })
    }
}

impl std::fmt::Display for Selector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl Selector {
    fn pattern(&self) -> &str {
        match self.by {
            By::Name => self.text.strip_prefix("name:").unwrap_or(&self.text),
            By::Op | By::Weight => self.text.split_once(':').map_or("", |(_, pattern)| pattern),
        }
    }

    /// The nodes that are meant. A name that folding removed means the node that does its work now.
    ///
    /// # Errors
    /// None is: the pattern is told what it may have meant.
    pub fn nodes(&self, graph: &Graph, folded: &Folded) -> Result<BTreeSet<usize>> {
        let pattern = self.pattern();
        let mut found = BTreeSet::new();
        for (id, node) in graph.nodes() {
            let hit = match self.by {
                By::Name => glob::matches(pattern, &label(node)),
                By::Op => glob::matches(pattern, node.op_type()),
                By::Weight => {
                    let mut weights = node.input.iter().filter(|name| graph.constant(name).is_some());
                    weights.any(|name| glob::matches(pattern, name))
                }
            };
            if hit {
                found.insert(id);
            }
        }
        let mut gone = false;
        if self.by == By::Name {
            for name in folded.into.keys().filter(|name| glob::matches(pattern, name)) {
                gone = true;
                let heir = folded.survivor(name);
                found.extend(graph.nodes().filter(|(_, n)| Some(label(n).as_str()) == heir).map(|(id, _)| id));
            }
        }
        if found.is_empty() {
            let what = format!("pattern `{self}`");
            let why = match self.by {
                By::Name if gone => "means nodes that folding left nothing of".to_owned(),
                By::Name => {
                    let all: Vec<String> = graph.nodes().map(|(_, n)| label(n)).collect();
                    format!("fits no node; {}", names::unknown(pattern, all.iter().map(String::as_str).take(4096)))
                }
                By::Op => {
                    let all: BTreeSet<&str> = graph.nodes().map(|(_, n)| n.op_type()).collect();
                    format!("fits no operator of this model; it has {}", all.into_iter().collect::<Vec<_>>().join(", "))
                }
                By::Weight => "fits no initializer that a node reads".to_owned(),
            };
            return Err(QuantError::Spec { what, why: shorten(why) });
        }
        Ok(found)
    }
}

/// Whether a name fits a pattern, in which `*` stands for any characters and `?` for one.
pub fn fits(pattern: &str, name: &str) -> bool {
    glob::matches(pattern, name)
}

/// Long lists of names help nobody.
fn shorten(text: String) -> String {
    match text.char_indices().nth(400) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text,
    }
}

/// All nodes that any of the selectors means.
///
/// # Errors
/// As [`Selector::nodes`], for the first one that means none.
pub fn all(selectors: &[Selector], graph: &Graph, folded: &Folded) -> Result<BTreeSet<usize>> {
    let mut found = BTreeSet::new();
    for selector in selectors {
        found.extend(selector.nodes(graph, folded)?);
    }
    Ok(found)
}
