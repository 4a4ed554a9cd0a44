//! Weights in groups along K, activations in floats.
//!
//! ```text
//! MatMulNBits        B       (n, groups, group * bits / 8)   offset binary, the first value of two in the low bits
//!                    scales  (n * groups)                    w = (code - 2^(bits-1)) * scale
//!
//! DequantizeLinear   x       the weight's own shape, int8 or int4, block_size = group along K
//!                    scales  the same shape with K / group in place of K                      w = code * scale
//! ```
//! ONNX Runtime makes the first out of the second by itself.

use super::{MICROSOFT, Writer};
use crate::error::Result;
use crate::onnx::Edit;
use crate::onnx::graph::label;
use crate::onnx::plan::Packing;
use crate::onnx::proto::*;
use crate::onnx::tensor::{from_4bit, from_f32, from_i8, from_u8};
use crate::onnx::weights::{Layout, Seen, codes, rows, transpose};
use crate::{FloatFormat, Granularity, Grid, OutlierSpec, QuantError, QuantSpec, ScaleFormat, Zero};

/// A weight in groups, output channels first.
struct Grouped<'a> {
    tensor: &'a TensorProto,
    layout: Layout,
    /// Output channels.
    n: usize,
    /// Values of each.
    k: usize,
    /// (n, k), 2^(bits-1) is zero.
    codes: Vec<u8>,
    /// (n, groups)
    scales: Vec<f32>,
}

impl<'a> Writer<'a> {
    /// Every linear layer that the plan quantizes.
    pub(super) fn weight_only(&mut self, bits: u8, group: usize, form: Packing) -> Result<()> {
        let layers: Vec<usize> =
            self.graph.nodes().map(|(id, _)| id).filter(|&id| self.plan.kind(id).is_some()).collect();
        for id in layers {
            match form {
                Packing::MatMulNBits => self.product_of_packed(id, bits, group, &[])?,
                Packing::Blocks => self.blocks(id, bits, group)?,
            }
        }
        Ok(())
    }

    /// A linear layer's weight in groups, with what calibration saw of the layer's input.
    fn grouped(&self, id: usize, bits: u8, group: usize) -> Result<Grouped<'a>> {
        let node = self.graph.node(id);
        let Some(tensor) = self.graph.constant(node.arg(1)) else {
            return Err(QuantError::Tensor { name: node.arg(1).into(), why: "isn't a constant".into() });
        };
        let layout = Layout::of(node);
        let (sides, values) = rows(tensor, layout)?;
        let [n, k] = sides;
        let spec = QuantSpec {
            grid: Grid::Int { bits },
            granularity: Granularity::Group(group),
            // 15 levels lose more than the sign of a scale costs.
            zero: if bits == 4 { Zero::FullRange } else { Zero::Symmetric },
            scale: ScaleFormat::Float(FloatFormat::F32),
            outliers: OutlierSpec::None,
        };
        let importance = self.importance(node, tensor);
        let inputs = self.calibration.inputs_of(&self.graph, node);
        let seen = Seen { importance: importance.as_deref(), inputs, costs: None };
        let quantized = codes(tensor, (sides, &values), &spec, self.plan.settings.weights.algorithm, seen)?;
        let groups = k.div_ceil(group);
        let scales = (0..n).flat_map(|r| (0..groups).map(move |g| (r, g))).map(|(r, g)| quantized.scale(r, g));
        let scales: Vec<f32> = scales.collect();
        Ok(Grouped { tensor, layout, n, k, codes: quantized.codes, scales })
    }

    /// MatMulNBits in place of a layer, with more attributes than it needs, where there are any.
    pub(super) fn product_of_packed(&mut self, id: usize, bits: u8, group: usize, more: &[(&str, i64)]) -> Result<()> {
        let node = self.graph.node(id);
        let Grouped { tensor, n, k, codes, scales, .. } = self.grouped(id, bits, group)?;
        let groups = k.div_ceil(group);
        let middle = 1u8 << (bits - 1);
        let mut packed = Vec::with_capacity(n * groups * group * usize::from(bits) / 8);
        for row in codes.chunks_exact(k) {
            let mut padded = row.to_vec();
            padded.resize(groups * group, middle);
            match bits {
                4 => packed.extend(padded.as_chunks::<2>().0.iter().map(|[low, high]| low | high << 4)),
                _ => packed.extend(padded),
            }
        }
        let base = tensor.name();
        let names = ["quantized", "scale"].map(|part| self.name(&format!("{base}_{part}")));
        self.initializer(from_u8(&names[0], &[n, groups, group * usize::from(bits) / 8], &packed));
        self.initializer(from_f32(&names[1], &[n * groups], &scales));
        let own = label(node);
        let input = self.input(id, 0);
        let bias = if node.arg(2).is_empty() { "" } else { node.arg(2) };
        let output = if bias.is_empty() { node.out().to_owned() } else { self.name(&format!("{own}_product")) };
        let mut product = NodeProto::new("MatMulNBits", &own, &[&input, &names[0], &names[1]], &[&output]);
        product.domain = Some(MICROSOFT.into());
        let own_attributes =
            [("K", k as i64), ("N", n as i64), ("bits", i64::from(bits)), ("block_size", group as i64)];
        let attributes = own_attributes.iter().chain(more);
        product.attribute = attributes.map(|(name, value)| AttributeProto::new_int(name, *value)).collect();
        self.add(product);
        if !bias.is_empty() {
            self.add(NodeProto::new("Add", &format!("{own}_bias"), &[&output, bias], &[node.out()]));
        }
        self.edits.push(Edit::Remove(id));
        Ok(())
    }

    /// Integers and a DequantizeLinear in place of a layer's weight.
    fn blocks(&mut self, id: usize, bits: u8, group: usize) -> Result<()> {
        let Grouped { tensor, layout, n, k, codes, scales } = self.grouped(id, bits, group)?;
        let groups = k.div_ceil(group);
        let middle = 1i16 << (bits - 1);
        let signed: Vec<i8> = codes.iter().map(|&c| (i16::from(c) - middle) as i8).collect();
        let (signed, scales, dims, scale_dims, axis) = match layout {
            Layout::Rows => (signed, scales, [n, k], [n, groups], 1),
            Layout::Columns => (transpose(&signed, n, k), transpose(&scales, n, groups), [k, n], [groups, n], 0),
        };
        let base = tensor.name();
        let names = ["quantized", "scale", "DequantizeLinear", "DequantizeLinear_Output"];
        let names = names.map(|part| self.name(&format!("{base}_{part}")));
        self.initializer(match bits {
            4 => from_4bit(&names[0], &dims, &signed, true),
            _ => from_i8(&names[0], &dims, &signed),
        });
        self.initializer(from_f32(&names[1], &scale_dims, &scales));
        let mut node = NodeProto::new("DequantizeLinear", &names[2], &[&names[0], &names[1]], &[&names[3]]);
        node.attribute =
            vec![AttributeProto::new_int("axis", axis), AttributeProto::new_int("block_size", group as i64)];
        self.add(node);
        self.edits.push(Edit::Input { node: id, slot: 1, to: names[3].clone() });
        Ok(())
    }
}
