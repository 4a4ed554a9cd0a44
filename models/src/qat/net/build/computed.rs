//! Constants that an operator makes which can't be trained, and needn't be: an interpolated table of positions.

use super::{Builder, refuse};
use crate::Result;
use crate::graph::{Values, constants};
use crate::qat::net::Value;
use candle_core::{Device, Tensor};
use nibble_quant::onnx::Model;
use nibble_quant::onnx::proto::NodeProto;

impl Builder<'_> {
    /// Whether a node reads constants only; what it makes is one then.
    pub(super) fn computes_constants(&mut self, node: &NodeProto) -> bool {
        let known =
            |name: &String| name.is_empty() || self.graph.constant(name).is_some() || self.computed.contains(name);
        let constant = node.input.iter().all(known);
        if constant {
            self.computed.extend(node.output.iter().filter(|name| !name.is_empty()).cloned());
        }
        constant
    }

    /// Lets the embedded engine compute them.
    pub(super) fn compute(&mut self, model: &Model) -> Result<()> {
        if self.computed.is_empty() {
            return Ok(());
        }
        let found = constants(model, &self.computed, rayon::current_num_threads())?;
        for (name, tensor) in self.computed.iter().zip(found) {
            let value = match tensor.values {
                Values::Float(values) => {
                    Tensor::from_vec(values, tensor.dims, &Device::Cpu).map_err(|e| refuse(name, e))?.into()
                }
                Values::Int(values) => {
                    Value::Ints { dims: tensor.dims, values: values.into_iter().map(i64::from).collect() }
                }
            };
            self.net.constants.insert(name.clone(), value);
        }
        Ok(())
    }
}
