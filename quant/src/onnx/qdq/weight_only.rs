//! Weights in groups along K, activations in floats: ONNX Runtime's MatMulNBits.
//!
//! ```text
//! B       (n, groups, group * bits / 8)   offset binary, the first value of two in the low bits
//! scales  (n * groups)                    w = (code - 2^(bits-1)) * scale
//! ```

use super::{MICROSOFT, Writer};
use crate::error::Result;
use crate::onnx::Edit;
use crate::onnx::graph::label;
use crate::onnx::plan::Kind;
use crate::onnx::proto::*;
use crate::onnx::tensor::{from_f32, from_u8};
use crate::onnx::weights::{Layout, Seen, codes, rows};
use crate::{FloatFormat, Granularity, Grid, OutlierSpec, QuantError, QuantSpec, ScaleFormat, Zero};

impl Writer<'_> {
    /// Every linear layer that the plan quantizes.
    pub(super) fn weight_only(&mut self, bits: u8, group: usize) -> Result<()> {
        let layers: Vec<(usize, Kind)> =
            self.graph.nodes().filter_map(|(id, _)| Some((id, *self.plan.kind(id)?))).collect();
        for (id, _) in layers {
            let node = self.graph.node(id);
            let Some(tensor) = self.graph.constant(node.arg(1)) else {
                return Err(QuantError::Tensor { name: node.arg(1).into(), why: "isn't a constant".into() });
            };
            let transposed = node.is("Gemm") && node.int("transB", 0) != 0;
            let (sides, values) = rows(tensor, if transposed { Layout::Rows } else { Layout::Columns })?;
            let [n, k] = sides;
            let spec = QuantSpec {
                grid: Grid::Int { bits },
                granularity: Granularity::Group(group),
                // 15 levels lose more than the sign of a scale costs.
                zero: if bits == 4 { Zero::FullRange } else { Zero::Symmetric },
                scale: ScaleFormat::Float(FloatFormat::F32),
                outliers: OutlierSpec::None,
            };
            let quantized =
                codes(tensor, (sides, &values), &spec, self.plan.settings.weights.algorithm, Seen::default())?;
            let groups = k.div_ceil(group);
            let middle = 1u8 << (bits - 1);
            let mut packed = Vec::with_capacity(n * groups * group * usize::from(bits) / 8);
            for row in quantized.codes.chunks_exact(k) {
                let mut padded = row.to_vec();
                padded.resize(groups * group, middle);
                match bits {
                    4 => packed.extend(padded.as_chunks::<2>().0.iter().map(|[low, high]| low | high << 4)),
                    _ => packed.extend(padded),
                }
            }
            let scales: Vec<f32> =
                (0..n).flat_map(|r| (0..groups).map(move |g| (r, g))).map(|(r, g)| quantized.scale(r, g)).collect();
            let base = tensor.name();
            let names = ["quantized", "scale"].map(|part| self.name(&format!("{base}_{part}")));
            self.initializer(from_u8(&names[0], &[n, groups, group * usize::from(bits) / 8], &packed));
            self.initializer(from_f32(&names[1], &[n * groups], &scales));
            let own = label(node);
            let bias = if node.arg(2).is_empty() { "" } else { node.arg(2) };
            let output = if bias.is_empty() { node.out().to_owned() } else { self.name(&format!("{own}_product")) };
            let mut product = NodeProto::new("MatMulNBits", &own, &[node.arg(0), &names[0], &names[1]], &[&output]);
            product.domain = Some(MICROSOFT.into());
            product.attribute = [("K", k), ("N", n), ("bits", usize::from(bits)), ("block_size", group)]
                .map(|(name, value)| AttributeProto::new_int(name, value as i64))
                .to_vec();
            self.add(product);
            if !bias.is_empty() {
                self.add(NodeProto::new("Add", &format!("{own}_bias"), &[&output, bias], &[node.out()]));
            }
            self.edits.push(Edit::Remove(id));
        }
        Ok(())
    }
}
