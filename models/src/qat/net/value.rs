//! What flows between the nodes: float tensors, and shapes as whole numbers.

use crate::{ModelError, Result};
use candle_core::Tensor;
use nibble_quant::onnx::graph::label;
use nibble_quant::onnx::proto::NodeProto;

/// A value of a graph.
#[derive(Debug, Clone)]
pub enum Value {
    /// Floats, which have gradients.
    Float(Tensor),
    /// Whole numbers, of one dimension or none: shapes, axes, indices.
    Ints {
        /// The shape.
        dims: Vec<usize>,
        /// As many as the shape has elements.
        values: Vec<i64>,
    },
}

impl From<Tensor> for Value {
    fn from(tensor: Tensor) -> Value {
        Value::Float(tensor)
    }
}

impl Value {
    /// A list of whole numbers.
    pub fn list(values: Vec<i64>) -> Value {
        Value::Ints { dims: vec![values.len()], values }
    }
}

/// A node with its inputs.
pub struct Call<'a> {
    /// The node.
    pub node: &'a NodeProto,
    /// One an input; `None` for those left out.
    pub inputs: Vec<Option<&'a Value>>,
    /// Samples that run together where the graph says one; 1 otherwise.
    pub samples: usize,
}

impl<'a> Call<'a> {
    /// A refusal that names the node.
    pub fn refuse(&self, why: impl ToString) -> ModelError {
        ModelError::Graph { what: label(self.node), why: format!("{}: {}", self.node.op_type(), why.to_string()) }
    }

    /// Candle's errors as this node's.
    pub fn of<T>(&self, result: candle_core::Result<T>) -> Result<T> {
        // Where candle adds a backtrace, it comes after the first line.
        result.map_err(|e| self.refuse(e.to_string().lines().next().unwrap_or_default()))
    }

    /// A float input.
    pub fn tensor(&self, slot: usize) -> Result<&'a Tensor> {
        match self.inputs.get(slot).copied().flatten() {
            Some(Value::Float(tensor)) => Ok(tensor),
            Some(Value::Ints { .. }) => {
                Err(self.refuse(format!("input {slot} holds whole numbers, floats were wanted")))
            }
            None => Err(self.refuse(format!("input {slot} is missing"))),
        }
    }

    /// A float input that may be left out.
    pub fn optional(&self, slot: usize) -> Result<Option<&'a Tensor>> {
        match self.inputs.get(slot).copied().flatten() {
            None => Ok(None),
            Some(_) => self.tensor(slot).map(Some),
        }
    }

    /// Whole numbers of an input.
    pub fn ints(&self, slot: usize) -> Result<&'a [i64]> {
        match self.inputs.get(slot).copied().flatten() {
            Some(Value::Ints { values, .. }) => Ok(values),
            Some(Value::Float(_)) => Err(self.refuse(format!("input {slot} holds floats, whole numbers were wanted"))),
            None => Err(self.refuse(format!("input {slot} is missing"))),
        }
    }

    /// The one number of a float input, or what it is by default.
    pub fn number(&self, slot: usize, default: f32) -> Result<f32> {
        let Some(tensor) = self.optional(slot)? else { return Ok(default) };
        match self.of(tensor.flatten_all().and_then(|t| t.to_vec1::<f32>()))?.as_slice() {
            [one] => Ok(*one),
            many => Err(self.refuse(format!("input {slot} has {} values, one was wanted", many.len()))),
        }
    }

    /// A list of whole numbers from an attribute, or from an input where later operator sets have it.
    pub fn list(&self, attribute: &str, slot: usize) -> Result<Option<Vec<i64>>> {
        match self.node.attr(attribute) {
            Some(found) => Ok(Some(found.ints.clone())),
            None if self.inputs.get(slot).copied().flatten().is_some() => self.ints(slot).map(|v| Some(v.to_vec())),
            None => Ok(None),
        }
    }

    /// An axis counted from the front.
    pub fn axis(&self, axis: i64, rank: usize) -> Result<usize> {
        let from_front = if axis < 0 { axis + rank as i64 } else { axis };
        usize::try_from(from_front)
            .ok()
            .filter(|&a| a < rank)
            .ok_or_else(|| self.refuse(format!("axis {axis} of {rank} dimensions")))
    }
}
