//! Nodes that are one step: layers with what follows them.

use super::{Builder, refuse};
use crate::Result;
use crate::qat::net::renorm::Renorm;
use crate::qat::net::{NormState, Step};
use crate::qat::ops::Axis;
use nibble_quant::onnx::graph::label;
use nibble_quant::onnx::groups::{Group, GroupKind, groups};
use nibble_quant::onnx::proto::NodeProto;
use nibble_quant::onnx::tensor::{floats, ints};

impl<'a> Builder<'a> {
    /// GELUs and layer norms written out become one step each, at their last node.
    pub(super) fn written_out(&mut self) -> Result<()> {
        for group in groups(&self.graph).into_iter().filter(|g| g.nodes.len() > 1) {
            let Some((last, inner)) = group.nodes.split_last() else { continue };
            let alone = |&id: &usize| {
                let out = self.graph.node(id).out();
                self.graph.is_private(out) && self.graph.consumers(out).iter().all(|(id, _)| group.nodes.contains(id))
            };
            if !inner.iter().all(alone) {
                continue;
            }
            let output = self.graph.node(*last).out().to_owned();
            let step = match (group.kind, self.layer_norm(&group)?) {
                (GroupKind::Gelu, _) => Step::Gelu { input: group.input, output },
                (GroupKind::LayerNorm, Some((affine, epsilon))) => {
                    Step::LayerNorm { input: group.input, affine, epsilon, output }
                }
                _ => continue,
            };
            self.skipped.extend(inner);
            self.fused.insert(self.graph.node(*last).out().to_owned(), step);
        }
        Ok(())
    }

    /// Gain, offset and epsilon of a layer norm over the last dimension, if the group is one.
    fn layer_norm(&self, group: &Group) -> Result<Option<([String; 2], f32)>> {
        let Some((gain, offset)) = group.affine.clone().filter(|_| group.kind == GroupKind::LayerNorm) else {
            return Ok(None);
        };
        let mut epsilon = None;
        for &id in &group.nodes {
            let node = self.graph.node(id);
            if node.is("ReduceMean") {
                let axes = match (node.attr("axes"), self.graph.constant(node.arg(1))) {
                    (Some(axes), _) => axes.ints.clone(),
                    (None, Some(axes)) => ints(axes)?,
                    (None, None) => return Ok(None),
                };
                if axes != [-1] {
                    return Ok(None);
                }
            }
            if node.is("Add") && epsilon.is_none() {
                let constants = (0..2).filter_map(|slot| self.graph.constant(node.arg(slot)));
                let numbers = constants.map(floats).collect::<Result<Vec<_>, _>>()?;
                epsilon = numbers.into_iter().find(|v| v.len() == 1).map(|v| v[0]);
            }
        }
        Ok(epsilon.map(|epsilon| ([gain, offset], epsilon)))
    }

    /// A batch norm for a convolution whose weight and bias are integers, if such ones are wanted.
    pub(super) fn renorm(&mut self, node: &NodeProto) -> Result<Option<usize>> {
        if !node.is("Conv") || !self.quantized.is_some_and(|(_, how)| how.batch_norms) {
            return Ok(None);
        }
        let weight = self.net.weights.iter().position(|w| w.output == node.arg(1) && w.axis != Axis::Last);
        let bias = self.net.biases.iter().position(|b| b.output == node.arg(2));
        let (Some(weight), Some(bias)) = (weight, bias) else { return Ok(None) };
        let at = |e: candle_core::Error| refuse(&label(node), e);
        let Some(offset) = self.net.parameters.get(&self.net.biases[bias].parameter) else { return Ok(None) };
        let renorm = Renorm::new([weight, bias, self.net.norms.len()], offset.as_tensor()).map_err(at)?;
        // Learned, saved and restored as all parameters and norms are; no initializer has these names.
        let name = |what: &str| format!("{} batch norm's {what}", node.out());
        let running = Renorm::unit(renorm.gain.elem_count());
        self.net.norms.push(NormState { initializers: [name("mean"), name("variance")], running });
        self.net.parameters.insert(name("gain"), renorm.gain.clone());
        self.net.parameters.insert(name("offset"), renorm.offset.clone());
        self.net.renorms.push(renorm);
        Ok(Some(self.net.renorms.len() - 1))
    }

    /// The addition of a bias that is all that reads a MatMul with a matrix, and the bias: one value a column.
    pub(super) fn biased(&self, node: &NodeProto) -> Option<(usize, &'a str)> {
        let weight = self.graph.constant(node.arg(1)).or_else(|| {
            let made = self.graph.node(self.graph.producer(node.arg(1))?);
            made.is("DequantizeLinear").then(|| self.graph.constant(made.arg(0))).flatten()
        })?;
        let &[_, columns] = weight.dims.as_slice() else { return None };
        let id = self.graph.sole_consumer(node.out()).filter(|&id| self.graph.node(id).is("Add"))?;
        let add = self.graph.node(id);
        let bias = if add.arg(0) == node.out() { add.arg(1) } else { add.arg(0) };
        let dims = &self.graph.constant(bias)?.dims;
        let fits = dims.last() == Some(&columns) && dims.iter().product::<i64>() == columns && columns > 1;
        fits.then_some((id, bias))
    }
}
