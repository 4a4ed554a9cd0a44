//! Float and quantized values of tensors, side by side.

use crate::cpu::round_to_int8;
use crate::error::Result;
use crate::model::open;
use crate::vision::diagnose::{ChannelRange, Figures, Outlier, Sums, outliers, widen};
use nibble_kernels::{Activations, Pool};
use nibble_quant::format::source::{Stored, TensorInfo};
use nibble_quant::{QTensor, ZeroData};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Codes of a tensor that are decoded at once.
const CODES: usize = 4 << 20;

/// How a tensor's quantized values differ from its float ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorFigures {
    /// Its name, or whose input it is.
    pub name: String,
    /// (rows, columns)
    pub shape: [usize; 2],
    /// Float against quantized.
    pub figures: Figures,
    /// Range of each row of a weight, of each column of an activation.
    pub channels: Vec<ChannelRange>,
    /// Channels that reach far beyond the others.
    pub outliers: Vec<Outlier>,
}

fn range(values: &[f32]) -> [f32; 2] {
    values.iter().fold([f32::INFINITY, f32::NEG_INFINITY], |[lo, hi], v| [lo.min(*v), hi.max(*v)])
}

/// Float against int8 with a scale every 32 values, as integer kernels make them; `values` are (rows, width).
pub(super) fn activations(pool: &Pool, name: String, values: &[f32], width: usize) -> Result<TensorFigures> {
    let rows = values.len() / width.max(1);
    let mut packed = Activations::with_capacity(rows, width);
    packed.fill(rows, width, values)?;
    round_to_int8(pool, &mut packed);
    let ends = range(values);
    // Every block of 32 reaches as far as its largest value: nothing is beyond.
    let mut sums = Sums::new(ends, ends[1] - ends[0], ends);
    let mut channels = vec![ChannelRange { lo: f32::INFINITY, hi: f32::NEG_INFINITY }; width];
    for (row, values) in values.chunks_exact(width.max(1)).enumerate() {
        for ((value, rounded), channel) in values.iter().zip(packed.row(row)).zip(&mut channels) {
            sums.add(*value, *rounded);
            widen(channel, *value);
        }
    }
    let outliers = outliers(&channels);
    Ok(TensorFigures { name, shape: [rows, width], figures: sums.figures(), channels, outliers })
}

/// Every quantized weight against the one that it was made from.
pub(super) fn weights(float: &Path, quantized: &Path) -> Result<Vec<TensorFigures>> {
    let (source, made) = (open(float)?, open(quantized)?);
    let mut all = Vec::new();
    for info in made.infos().iter().filter(|info| !matches!(info.stored, Stored::Plain(_))) {
        let Some(quantized) = made.quantized_rows(&info.name)? else { continue };
        let mut weight = Weight::new(info, quantized.shape());
        let mut exact = Vec::new();
        for rows in quantized.blocks(CODES) {
            source.read_rows_f32(&info.name, rows.clone(), &mut exact)?;
            weight.add(&quantized.block(rows)?, &exact);
        }
        source.release(&info.name);
        made.release(&info.name);
        all.extend(weight.figures());
    }
    Ok(all)
}

/// A weight that is gone through.
struct Weight {
    name: String,
    shape: [usize; 2],
    sums: Option<Sums>,
    channels: Vec<ChannelRange>,
    saturated: u64,
}

impl Weight {
    fn new(info: &TensorInfo, shape: [usize; 2]) -> Weight {
        Weight { name: info.name.clone(), shape, sums: None, channels: Vec::new(), saturated: 0 }
    }

    /// Some rows, quantized and exact.
    fn add(&mut self, tensor: &QTensor, exact: &[f32]) {
        let back = tensor.dequantize();
        // The first rows say how wide bins are: those at the ends take what lies beyond.
        let sums = self.sums.get_or_insert_with(|| {
            let (reach, range) = (range(&back), range(exact));
            Sums::new(reach, reach[1] - reach[0], range)
        });
        exact.iter().zip(&back).for_each(|(exact, back)| sums.add(*exact, *back));
        let k = tensor.shape[1].max(1);
        self.channels.extend(exact.chunks(k).map(|row| {
            let [lo, hi] = range(row);
            ChannelRange { lo, hi }
        }));
        let rows: Vec<u64> = exact.par_chunks(k).enumerate().map(|(r, row)| beyond(tensor, r, row)).collect();
        self.saturated += rows.iter().sum::<u64>();
    }

    fn figures(self) -> Option<TensorFigures> {
        let mut figures = self.sums?.figures();
        figures.saturated = self.saturated as f64 / figures.count.max(1) as f64;
        let outliers = outliers(&self.channels);
        Some(TensorFigures { name: self.name, shape: self.shape, figures, channels: self.channels, outliers })
    }
}

/// Values of a row that lie more than half a step beyond the levels of their group.
fn beyond(tensor: &QTensor, r: usize, row: &[f32]) -> u64 {
    let (levels, codes) = (tensor.spec.levels(), tensor.spec.codes());
    let (first, last) = (*codes.start() as usize, *codes.end() as usize);
    let (Some(&bottom), Some(&top)) = (levels.get(first), levels.get(last)) else { return 0 };
    let (Some(second), Some(below)) = (levels.get(first + 1), levels.get(last.saturating_sub(1))) else { return 0 };
    let (low, high) = (bottom - 0.5 * (second - bottom), top + 0.5 * (top - below));
    let count = |(g, group): (usize, &[f32])| {
        let (scale, min) = (tensor.scale(r, g), tensor.min(r, g));
        // Levels of integers with a zero point count from it; the others have it in them.
        let zero = if matches!(tensor.zeros, ZeroData::Int(_)) { tensor.zero(r, g) as f32 } else { 0.0 };
        let ends = [scale * (low - zero) + min, scale * (high - zero) + min];
        let (lo, hi) = (ends[0].min(ends[1]), ends[0].max(ends[1]));
        group.iter().filter(|v| **v < lo || **v > hi).count() as u64
    };
    row.chunks(tensor.spec.group_size(row.len())).enumerate().map(count).sum()
}
