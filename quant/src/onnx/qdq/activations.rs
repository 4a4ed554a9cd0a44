//! Tensors: a QuantizeLinear and a DequantizeLinear each, and who reads what afterwards.

use super::Writer;
use crate::error::Result;
use crate::observer::{IntType, QParams};
use crate::onnx::Edit;
use crate::onnx::graph::label;
use crate::onnx::plan::{Decision, Kind};
use crate::onnx::proto::NodeProto;
use crate::onnx::tensor::{floats, from_f32, from_u8};
use crate::{QuantError, Range};
use std::collections::{BTreeMap, BTreeSet};

impl Writer<'_> {
    /// Scales, quantized tensors, and the Relus and Clips that are in their ranges.
    pub(super) fn activations(&mut self) -> Result<()> {
        self.find_params()?;
        self.merge_clips();
        let mut after: BTreeMap<String, String> = BTreeMap::new();
        let mut parameters: BTreeMap<String, [String; 2]> = BTreeMap::new();
        let scales = self.plan.scales.clone();
        for (tensor, root) in &scales {
            let names = match parameters.get(root) {
                Some(names) => names.clone(),
                None => {
                    let names = self.write_params(root)?;
                    parameters.insert(root.clone(), names.clone());
                    names
                }
            };
            let output = self.quantize_tensor(tensor, &names);
            after.insert(tensor.clone(), output);
        }
        self.rewire(&after);
        self.constants()
    }

    fn find_params(&mut self) -> Result<()> {
        let grid = self.grid();
        let roots: BTreeSet<String> = self.plan.scales.values().cloned().collect();
        for root in roots {
            let seen = self.plan.fixed.get(&root).or_else(|| self.calibration.ranges.get(&root));
            let Some(&Range { mut lo, mut hi }) = seen else {
                return Err(QuantError::Tensor { name: root, why: "has no range; calibration never saw it".into() });
            };
            if let Some(clip) = self.plan.clips.get(&root).filter(|_| !grid.symmetric) {
                (lo, hi) = (lo.max(clip.lo), hi.min(clip.hi));
            }
            self.params.insert(root, grid.params(Range { lo, hi }));
        }
        Ok(())
    }

    /// Nodes whose effect is in a range go, and what was before them makes their output.
    fn merge_clips(&mut self) {
        if self.grid().symmetric {
            return;
        }
        for (&id, output) in &self.plan.outputs {
            let merged = self
                .graph
                .producer(output)
                .filter(|&next| next != id && matches!(self.plan.nodes[next].decision, Decision::Merged(_)));
            if let Some(next) = merged {
                self.edits.push(Edit::Remove(next));
                self.edits.push(Edit::Output { node: id, slot: 0, to: output.clone() });
            }
        }
    }

    fn write_params(&mut self, root: &str) -> Result<[String; 2]> {
        let QParams { scale, zero_point } = self.params(root)?;
        let scale_name = self.name(&format!("{root}_scale"));
        self.initializer(from_f32(&scale_name, &[], &[scale]));
        let zero_name = self.name(&format!("{root}_zero_point"));
        let zero = self.zero_point(&zero_name, zero_point);
        self.initializer(zero);
        Ok([scale_name, zero_name])
    }

    /// Adds the pair for a tensor; what readers of integers read.
    pub(super) fn quantize_tensor(&mut self, tensor: &str, [scale, zero]: &[String; 2]) -> String {
        let codes = self.name(&format!("{tensor}_QuantizeLinear_Output"));
        // What others than nodes read keeps its name: it comes out of the DequantizeLinear then.
        let made = self.plan.made.contains(tensor) && !self.graph.is_private(tensor);
        let (source, output) = match made {
            true => {
                let source = self.name(&format!("{tensor}_float"));
                let maker = self.plan.outputs.iter().find(|(_, out)| *out == tensor).map(|(&id, _)| id);
                if let Some(id) = maker {
                    // With a Clip kept after it, the Clip is what makes the tensor.
                    let id = if self.grid().symmetric { self.graph.producer(tensor).unwrap_or(id) } else { id };
                    let slot = self.graph.node(id).output.iter().position(|o| o == tensor).unwrap_or(0);
                    self.edits
                        .retain(|e| !matches!(e, Edit::Output { node, slot: s, .. } if *node == id && *s == slot));
                    self.edits.push(Edit::Output { node: id, slot, to: source.clone() });
                }
                (source, tensor.to_owned())
            }
            false => (tensor.to_owned(), self.name(&format!("{tensor}_DequantizeLinear_Output"))),
        };
        let quantize = self.activation_node(
            "QuantizeLinear",
            &format!("{tensor}_QuantizeLinear"),
            &[&source, scale, zero],
            &codes,
        );
        self.add(quantize);
        let codes = self.limited(tensor, codes);
        let dequantize = self.activation_node(
            "DequantizeLinear",
            &format!("{tensor}_DequantizeLinear"),
            &[&codes, scale, zero],
            &output,
        );
        self.add(dequantize);
        output
    }

    /// Codes of fewer bits than their type has: a QuantizeLinear knows the type's ends only, so that a Clip over integers
    /// follows it. What is before it still becomes one integer kernel.
    fn limited(&mut self, tensor: &str, codes: String) -> String {
        let grid = self.grid();
        if grid.unused == 0 {
            return codes;
        }
        let (low, high) = grid.limits();
        let ends = match self.code_limits.clone() {
            Some(ends) => ends,
            None => [("lowest_code", low), ("highest_code", high)].map(|(wanted, value)| {
                let name = self.name(wanted);
                let bound = self.zero_point(&name, value);
                self.initializer(bound)
            }),
        };
        self.code_limits = Some(ends.clone());
        let limited = self.name(&format!("{tensor}_Clip_Output"));
        self.add(NodeProto::new("Clip", &format!("{tensor}_Clip"), &[&codes, &ends[0], &ends[1]], &[&limited]));
        limited
    }

    /// Readers of a tensor read its dequantized form: all of them if it is made in integers, else those in integers.
    fn rewire(&mut self, after: &BTreeMap<String, String>) {
        for (id, node) in self.graph.nodes() {
            for (slot, name) in node.input.iter().enumerate() {
                let Some(to) = after.get(name).filter(|to| *to != name) else { continue };
                let integer = self.plan.kind(id).is_some_and(|kind| kind.data_slots(node).contains(&slot));
                if integer || self.plan.made.contains(name) {
                    self.edits.push(Edit::Input { node: id, slot, to: to.clone() });
                }
            }
        }
    }

    /// Constants that joins read: quantized with the range they have.
    fn constants(&mut self) -> Result<()> {
        let mut done: BTreeMap<String, String> = BTreeMap::new();
        let joins: Vec<usize> =
            self.graph.nodes().map(|(id, _)| id).filter(|&id| self.plan.kind(id) == Some(&Kind::Join)).collect();
        for id in joins {
            let node = self.graph.node(id);
            for slot in Kind::Join.data_slots(node) {
                let Some(tensor) = self.graph.constant(node.arg(slot)) else { continue };
                if let Some(to) = done.get(tensor.name()) {
                    self.edits.push(Edit::Input { node: id, slot, to: to.clone() });
                    continue;
                }
                let values = floats(tensor)?;
                if let Some(bad) = values.iter().find(|v| !v.is_finite()) {
                    let why = format!("{bad} in a constant that node `{}` reads", label(node));
                    return Err(QuantError::Tensor { name: tensor.name().into(), why });
                }
                let grid = self.grid();
                let params = grid.params(Range::of(&values));
                let base = tensor.name();
                let names = ["quantized", "scale", "zero_point"].map(|part| format!("{base}_{part}"));
                let names = names.map(|wanted| self.name(&wanted));
                let dims: Vec<usize> = tensor.dims.iter().map(|&d| d.max(0) as usize).collect();
                let codes: Vec<i32> = values.iter().map(|&v| grid.quantize(params, v)).collect();
                let codes = match grid.int {
                    IntType::U8 => from_u8(&names[0], &dims, &codes.iter().map(|&c| c as u8).collect::<Vec<_>>()),
                    IntType::S8 => {
                        let codes: Vec<i8> = codes.iter().map(|&c| c as i8).collect();
                        crate::onnx::tensor::from_i8(&names[0], &dims, &codes)
                    }
                    IntType::U16 => crate::onnx::tensor::from_16(&names[0], &dims, &codes, false),
                    IntType::S16 => crate::onnx::tensor::from_16(&names[0], &dims, &codes, true),
                };
                self.initializer(codes);
                self.initializer(from_f32(&names[1], &[], &[params.scale]));
                let zero = self.zero_point(&names[2], params.zero_point);
                self.initializer(zero);
                let output = self.name(&format!("{base}_DequantizeLinear_Output"));
                let node = self.activation_node(
                    "DequantizeLinear",
                    &format!("{base}_DequantizeLinear"),
                    &[&names[0], &names[1], &names[2]],
                    &output,
                );
                self.add(node);
                self.edits.push(Edit::Input { node: id, slot, to: output.clone() });
                done.insert(base.to_owned(), output);
            }
        }
        Ok(())
    }
}
