//! Weights in fewer bits of layers that compute in floats.
//!
//! ```text
//! float16      w (float16) -> Cast -> w (float32) -> Conv, Gemm, MatMul     runtimes do the Cast once, when they load it
//! int4         MatMulNBits in place of Gemm or MatMul                       (weight_only.rs)
//! ```

use super::Writer;
use crate::QuantError;
use crate::error::Result;
use crate::onnx::Edit;
use crate::onnx::plan::Stored;
use crate::onnx::proto::*;
use crate::onnx::tensor::{floats, from_f16};
use half::f16;
use std::collections::BTreeMap;

/// MatMulNBits may round activations to 8 bits.
const ACTIVATIONS_IN_INT8: (&str, i64) = ("accuracy_level", 4);

impl Writer<'_> {
    /// Every layer that the plan stores so.
    pub(super) fn stored(&mut self) -> Result<()> {
        let mut halves: BTreeMap<String, String> = BTreeMap::new();
        for (&id, &(_, stored)) in &self.plan.stored {
            match stored {
                Stored::Half => {
                    let weight = self.graph.node(id).arg(1).to_owned();
                    let to = match halves.get(&weight) {
                        Some(known) => known.clone(),
                        None => self.half(&weight)?,
                    };
                    halves.insert(weight, to.clone());
                    self.edits.push(Edit::Input { node: id, slot: 1, to });
                }
                Stored::Int4 => self.product_of_packed(id, 4, Stored::GROUP, &[])?,
                Stored::Int4Int8 => self.product_of_packed(id, 4, Stored::GROUP, &[ACTIVATIONS_IN_INT8])?,
            }
        }
        Ok(())
    }

    /// A constant in half precision, and the node that widens it: what that makes.
    fn half(&mut self, weight: &str) -> Result<String> {
        let bad = |why: String| QuantError::Tensor { name: weight.into(), why };
        let tensor = self.graph.constant(weight).ok_or_else(|| bad("isn't a constant".into()))?;
        let values = floats(tensor)?;
        if let Some(value) = values.iter().find(|v| !f16::from_f32(**v).is_finite()) {
            return Err(bad(format!("has a value {value}; half precision ends at {}", f16::MAX)));
        }
        let dims: Vec<usize> = tensor.dims.iter().map(|&d| d.max(0) as usize).collect();
        let [half, wide] = ["half", "float"].map(|part| self.name(&format!("{weight}_{part}")));
        self.initializer(from_f16(&half, &dims, &values));
        let cast = NodeProto::new("Cast", &format!("{weight}_Cast"), &[&half], &[&wide]);
        self.add(cast.with(AttributeProto::new_int("to", DataType::Float as i64)));
        Ok(wide)
    }
}
