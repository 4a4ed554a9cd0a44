//! Folding: what a graph computes stays, and the nodes that a runtime would fold away by itself are gone.
//!
//! ```text
//! Constant -> initializer      Identity, Dropout, Cast to the same type -> nothing
//! nodes over constants only -> initializers (the caller's executor computes them)
//! biases of attention's keys -> nothing
//! Conv -> BatchNormalization, Conv -> Mul, MatMul -> Add -> Mul (by constants, per output channel) -> one layer
//! ```
//! Quantization comes after folding, so that a batch norm's gain is in the weights that are rounded. A node's name stays
//! good: [`Folded::into`] tells which node does the work of one that is gone.

mod affine;
mod constants;
mod keys;

use super::edit::apply;
use super::graph::Graph;
use super::proto::*;
use super::{Edit, Model};
use crate::QuantError;
use crate::error::Result;
use std::collections::{BTreeMap, HashMap};

/// A tensor that was computed; which width its numbers have follows from the graph.
#[derive(Debug, Clone, PartialEq)]
pub enum Computed {
    /// Floats, row-major.
    Floats {
        /// The shape.
        dims: Vec<usize>,
        /// As many as the shape has elements.
        values: Vec<f32>,
    },
    /// Integers or truth values, row-major.
    Ints {
        /// The shape.
        dims: Vec<usize>,
        /// As many as the shape has elements.
        values: Vec<i32>,
    },
}

/// Computes tensors that depend on constants and shapes alone: a model and names in, tensors of these names out, in
/// order. Values of the model's inputs never matter.
pub type Evaluate<'a> = &'a mut dyn FnMut(&Model, &[String]) -> Result<Vec<Computed>>;

/// What folding did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Folded {
    /// Nodes that are gone, each with the node that does its work, or nothing for one that did none.
    pub into: BTreeMap<String, Option<String>>,
    /// Initializers that replace constant parts of the graph.
    pub constants: usize,
}

impl Folded {
    /// The node that does the work of `name` now: itself, another, or none.
    pub fn survivor<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        let mut name = name;
        // A chain can't be longer than the map, and a name can't come back once its node is gone.
        for _ in 0..=self.into.len() {
            match self.into.get(name) {
                Some(Some(next)) => name = next,
                Some(None) => return None,
                None => break,
            }
        }
        Some(name)
    }
}

/// Fixes dimensions of inputs that the model leaves open: the first one of every input to `batch`, and whole shapes of
/// inputs that are named.
///
/// # Errors
/// A named input that isn't there or has another rank, or a size that contradicts the one the model fixes.
pub fn freeze(model: &mut Model, batch: Option<usize>, shapes: &BTreeMap<String, Vec<usize>>) -> Result<()> {
    let graph = model.graph_mut();
    for name in shapes.keys() {
        if !graph.input.iter().any(|i| i.name() == name) {
            return Err(QuantError::Tensor { name: name.clone(), why: "is no input of the model".into() });
        }
    }
    // Symbols are shared: fixing `batch_size` in one place fixes it everywhere.
    let mut symbols: HashMap<String, i64> = HashMap::new();
    for input in &mut graph.input {
        let name = input.name().to_owned();
        let refuse = |why: String| QuantError::Tensor { name: name.clone(), why };
        let Some(TypeValue::Tensor(TensorType { shape: Some(shape), .. })) =
            input.r#type.as_mut().and_then(|t| t.value.as_mut())
        else {
            continue;
        };
        let mut wanted: Vec<Option<usize>> = vec![None; shape.dim.len()];
        if let (Some(first), Some(batch)) = (wanted.first_mut(), batch) {
            *first = Some(batch);
        }
        if let Some(given) = shapes.get(&name) {
            if given.len() != wanted.len() {
                return Err(refuse(format!("has {} dimensions, a shape of {} was given", wanted.len(), given.len())));
            }
            wanted = given.iter().map(|&d| Some(d)).collect();
        }
        for (axis, (dim, wanted)) in shape.dim.iter_mut().zip(wanted).enumerate() {
            let Some(wanted) = wanted else { continue };
            match &dim.value {
                Some(DimensionValue::Value(fixed)) if *fixed > 0 && *fixed != wanted as i64 => {
                    return Err(refuse(format!("dimension {axis} is {fixed} in the model, {wanted} was asked for")));
                }
                Some(DimensionValue::Param(symbol)) => {
                    symbols.insert(symbol.clone(), wanted as i64);
                }
                _ => {}
            }
            dim.value = Some(DimensionValue::Value(wanted as i64));
        }
    }
    let everywhere = graph.input.iter_mut().chain(&mut graph.output).chain(&mut graph.value_info);
    for info in everywhere {
        let Some(TypeValue::Tensor(TensorType { shape: Some(shape), .. })) =
            info.r#type.as_mut().and_then(|t| t.value.as_mut())
        else {
            continue;
        };
        for dim in &mut shape.dim {
            if let Some(DimensionValue::Param(symbol)) = &dim.value
                && let Some(&fixed) = symbols.get(symbol)
            {
                dim.value = Some(DimensionValue::Value(fixed));
            }
        }
    }
    Ok(())
}

/// Folds a model's main graph. Without `evaluate`, nodes over constants stay as they are.
///
/// # Errors
/// A graph that is none (see [`Graph::new`]), constants whose bytes don't fit their shape, batch norms with a negative
/// variance, or what `evaluate` returns.
pub fn fold(model: &mut Model, evaluate: Option<Evaluate>) -> Result<Folded> {
    let mut folded = Folded::default();
    constants::own_initializers(model);
    run(model, &mut folded, constants::lift)?;
    while run(model, &mut folded, constants::bypass)? {}
    if let Some(evaluate) = evaluate {
        folded.constants += constants::compute(model, &mut folded, evaluate)?;
    }
    while run(model, &mut folded, affine::absorb)? {}
    run(model, &mut folded, keys::drop_biases)?;
    run(model, &mut folded, constants::prune)?;
    Ok(folded)
}

/// Edits of one step, and the nodes that go with them.
#[derive(Default)]
struct Step {
    edits: Vec<Edit>,
    into: Vec<(String, Option<String>)>,
}

/// Runs a step; says whether it changed anything.
fn run(model: &mut Model, folded: &mut Folded, step: fn(&Graph) -> Result<Step>) -> Result<bool> {
    let step = step(&Graph::new(model.graph())?)?;
    let changed = !step.edits.is_empty();
    apply(model.graph_mut(), step.edits)?;
    folded.into.extend(step.into);
    Ok(changed)
}
