//! Layers that compute in floats from weights that are stored in fewer bits.

use super::{Kind, Plan, Settings, Target};
use crate::error::{QuantError, Result};
use crate::names;
use crate::onnx::Graph;
use crate::onnx::fold::Folded;
use crate::onnx::proto::NodeProto;
use crate::onnx::select::Selector;
use std::collections::BTreeMap;
use std::str::FromStr;

/// How the weight of a layer that computes in floats is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// In half precision, which runtimes widen once, when they load it.
    Half,
    /// 4 bits, a scale for each [`Stored::GROUP`] values along K: ONNX Runtime's MatMulNBits. Linear layers only.
    Int4,
    /// The same, and the runtime may round activations to 8 bits, a scale for each of these groups (MatMulNBits with
    /// accuracy_level 4).
    Int4Int8,
}

impl Stored {
    /// Values that share a scale in 4 bits.
    pub const GROUP: usize = 32;

    /// Each with the word for it.
    pub const ALL: [(&'static str, Stored); 3] =
        [("float16", Stored::Half), ("int4", Stored::Int4), ("int4-int8", Stored::Int4Int8)];

    /// The word for it.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, stored)| *stored == self).map_or("", |(name, _)| name)
    }

    /// Whether a layer of this kind can have its weight so.
    pub fn possible(self, kind: Kind) -> bool {
        match kind {
            Kind::Linear { .. } => true,
            Kind::Conv => self == Stored::Half,
            _ => false,
        }
    }
}

impl FromStr for Stored {
    type Err = QuantError;

    fn from_str(text: &str) -> Result<Self> {
        let known = Self::ALL.iter().find(|(name, _)| *name == text).map(|(_, stored)| *stored);
        let words = || Self::ALL.iter().map(|(name, _)| *name);
        known.ok_or_else(|| QuantError::Spec { what: format!("storage `{text}`"), why: names::unknown(text, words()) })
    }
}

/// Layers that settings mean, each with how its weight is stored; the first pattern that fits decides.
///
/// # Errors
/// A pattern that fits no layer that can have its weight so, or a form that the target doesn't read.
pub(super) fn layers(
    graph: &Graph,
    settings: &Settings,
    folded: &Folded,
    kind: &dyn Fn(&NodeProto) -> Result<Option<Kind>>,
) -> Result<BTreeMap<usize, (Kind, Stored)>> {
    let mut found = BTreeMap::new();
    for (pattern, stored) in &settings.stored {
        if *stored != Stored::Half && settings.target == Target::TensorRt {
            let why = "TensorRT has no MatMulNBits".to_owned();
            return Err(QuantError::Spec { what: format!("{} weights", stored.name()), why });
        }
        let mut fits = false;
        for id in pattern.nodes(graph, folded)? {
            if let Some(kind) = kind(graph.node(id))?.filter(|kind| stored.possible(*kind)) {
                fits = true;
                found.entry(id).or_insert((kind, *stored));
            }
        }
        if !fits {
            let why = format!("fits no layer whose weight can be stored as {}", stored.name());
            return Err(QuantError::Spec { what: format!("pattern `{pattern}`"), why });
        }
    }
    Ok(found)
}

impl Plan {
    /// The kind of a layer whose weight is rounded, whatever it computes in.
    pub fn rounded(&self, id: usize) -> Option<&Kind> {
        let stored = || self.stored.get(&id).filter(|(_, stored)| *stored != Stored::Half).map(|(kind, _)| kind);
        self.kind(id).or_else(stored)
    }
}

/// A pattern and how the weights of what it means are stored: `PATTERN=WORD`.
pub fn rule(text: &str) -> Result<(Selector, Stored)> {
    let Some((pattern, word)) = text.rsplit_once('=') else {
        return Err(QuantError::Spec { what: format!("`{text}`"), why: "isn't PATTERN=STORAGE".into() });
    };
    Ok((pattern.parse()?, word.parse()?))
}
