//! Windows of what a convolution reads: the rows of the matrix that its weights multiply, and their products with each
//! other. Neighbours in a picture are much alike, so that errors of weights can make up for each other.
//!
//! ```text
//! x (batch, groups * c, height, width)  ->  for each group, a row (c * kh * kw) a place of the output
//! ```
//! Where a Relu or Clip comes after a convolution, an output beyond its ends is cut off, and an error of it costs nothing:
//! there each output channel has rows of its own, those where it is within (as in the objective of AdaRound, arXiv
//! 2004.10568, section 3.4). The others count as zeros, so that what is cut off nearly always weighs little.

use crate::{ModelError, Result};
use nibble_quant::onnx::plan::{Clip, Kind};
use nibble_quant::onnx::tensor::floats;
use nibble_quant::onnx::weights::reads_channels;
use nibble_quant::onnx::{Graph, Plan};
use nibble_quant::stats::Input;

/// Places of one sample that are taken: neighbours are much alike.
pub(super) const PLACES: usize = 192;
/// Values of all groups' Gram matrices at most.
const LARGEST: usize = 1 << 25;
/// The same with a matrix for each output channel.
const LARGEST_APART: usize = 1 << 20;

/// The windows of one convolution, and what was seen of them.
#[derive(Debug)]
pub struct Windows {
    /// The tensor that it reads.
    pub reads: String,
    /// The weight that multiplies them.
    pub weight: String,
    groups: usize,
    /// Of a group.
    channels: usize,
    kernel: [usize; 2],
    strides: [usize; 2],
    dilations: [usize; 2],
    pads: [usize; 2],
    /// The first sample's mean of each channel, or nothing: with biases corrected only deviations from the mean cost
    /// anything.
    shift: Vec<f32>,
    centred: bool,
    samples: usize,
    cut: Option<Cut>,
    /// One a group, or one an output channel where outputs are cut.
    seen: Vec<Input>,
}

/// A convolution whose outputs are cut by what comes after it.
#[derive(Debug)]
struct Cut {
    /// (n, k)
    weight: Vec<f32>,
    /// (n)
    bias: Vec<f32>,
    ends: Clip,
    /// (n, k) sums of the rows whose output is within the ends, and (n) their number.
    sums: Vec<f64>,
    counts: Vec<f64>,
}

/// What a row counts whose output is beyond the ends: other samples have other rows.
const BEYOND: f32 = 0.05;

impl Cut {
    /// The rows of one output channel's group, those that lead beyond the ends made small.
    fn within(&mut self, channel: usize, rows: &[f32], kept: &mut Vec<f32>) {
        let k = self.sums.len() / self.counts.len().max(1);
        let weight = &self.weight[channel * k..(channel + 1) * k];
        let sums = &mut self.sums[channel * k..(channel + 1) * k];
        kept.clear();
        for row in rows.chunks_exact(k) {
            let y = self.bias[channel] + row.iter().zip(weight).map(|(x, w)| x * w).sum::<f32>();
            let by = if y > self.ends.lo && y < self.ends.hi { 1.0 } else { BEYOND };
            let share = by.sqrt();
            kept.extend(row.iter().map(|x| x * share));
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(x * by));
            self.counts[channel] += f64::from(by);
        }
    }

    /// (n, k) means.
    fn means(&self) -> Vec<f64> {
        let k = self.sums.len() / self.counts.len().max(1);
        let rows = self.sums.chunks_exact(k.max(1)).zip(&self.counts);
        rows.flat_map(|(sums, &count)| sums.iter().map(move |sum| sum / count.max(f64::MIN_POSITIVE))).collect()
    }
}

impl Windows {
    /// Of a convolution that reads more than single channels or whose outputs are cut, if its matrices aren't too large.
    fn of(graph: &Graph, plan: &Plan, id: usize, centred: bool) -> Result<Option<Windows>> {
        let node = graph.node(id);
        let pair = |name: &str, default: usize| -> Option<[usize; 2]> {
            match node.attr(name).map(|a| a.ints.as_slice()) {
                None | Some([]) => Some([default; 2]),
                Some(&[a, b, ..]) => Some([usize::try_from(a).ok()?, usize::try_from(b).ok()?]),
                Some(_) => None,
            }
        };
        let Some(weight) = graph.constant(node.arg(1)) else { return Ok(None) };
        let dims: Option<Vec<usize>> = weight.dims.iter().map(|&d| usize::try_from(d).ok()).collect();
        let Some(&[n, channels, height, width]) = dims.as_deref() else { return Ok(None) };
        let groups = usize::try_from(node.int("group", 1)).ok().filter(|&g| g > 0 && n > 0 && n % g == 0);
        let k = channels.checked_mul(height).and_then(|k| k.checked_mul(width)).filter(|&k| k > 0);
        let (Some(groups), Some(k)) = (groups, k) else { return Ok(None) };
        let shape = pair("strides", 1).zip(pair("dilations", 1)).zip(pair("pads", 0));
        let Some(((strides, dilations), pads)) = shape.filter(|_| node.attr("auto_pad").is_none()) else {
            return Ok(None);
        };
        let size = |matrices: usize| k.checked_mul(k).and_then(|s| s.checked_mul(matrices)).unwrap_or(usize::MAX);
        let cut = match plan.clips.get(&plan.output(graph, id)) {
            Some(&ends) if size(n) <= LARGEST_APART => {
                let bias = graph.constant(node.arg(2)).map(floats).transpose()?.unwrap_or_else(|| vec![0.0; n]);
                let weight = floats(weight)?;
                let fits = weight.len() == n * k && bias.len() == n;
                fits.then(|| Cut { weight, bias, ends, sums: vec![0.0; n * k], counts: vec![0.0; n] })
            }
            _ => None,
        };
        if cut.is_none() && (reads_channels(graph, node) || size(groups) > LARGEST) {
            return Ok(None);
        }
        let matrices = if cut.is_some() { n } else { groups };
        Ok(Some(Windows {
            reads: node.arg(0).to_owned(),
            weight: weight.name().to_owned(),
            groups,
            channels,
            kernel: [height, width],
            strides,
            dilations,
            pads,
            shift: Vec::new(),
            centred,
            samples: 0,
            cut,
            seen: (0..matrices).map(|_| Input::new(k, true)).collect(),
        }))
    }

    /// What was seen, one a group or one an output channel; and (n, k) means of the rows of those whose outputs are cut.
    pub(super) fn seen(mut self) -> (Vec<Input>, Option<Vec<f64>>) {
        let Some(cut) = self.cut.filter(|_| self.centred) else { return (self.seen, None) };
        let means = cut.means();
        let each = self.seen.iter_mut().zip(means.chunks_exact(means.len() / cut.counts.len().max(1)));
        each.zip(&cut.counts).for_each(|((input, mean), &count)| input.centre(mean, count));
        (self.seen, Some(means))
    }

    /// Takes in windows of one sample's tensor, (batch, channels, height, width), at some of its places.
    ///
    /// # Errors
    /// Another shape, or values that aren't finite.
    pub(super) fn observe(&mut self, values: &[f32], dims: &[usize]) -> Result<()> {
        let wrong = || ModelError::Graph { what: self.reads.clone(), why: format!("has shape {dims:?}") };
        let &[batch, channels, height, width] = dims else { return Err(wrong()) };
        let plane = height * width;
        if channels != self.channels * self.groups || values.len() != batch * channels * plane {
            return Err(wrong());
        }
        if self.shift.is_empty() {
            self.shift = vec![0.0; channels];
            // With outputs cut, each has means of its own, which are taken away in the end.
            let wanted = self.centred && self.cut.is_none();
            for (c, shift) in self.shift.iter_mut().enumerate().filter(|_| wanted) {
                let of = (0..batch).flat_map(|b| &values[(b * channels + c) * plane..][..plane]);
                *shift = (of.map(|&v| f64::from(v)).sum::<f64>() / (batch * plane).max(1) as f64) as f32;
            }
        }
        let side = |axis: usize, size: usize| {
            let reach = self.dilations[axis] * (self.kernel[axis].max(1) - 1) + 1;
            (size + 2 * self.pads[axis]).saturating_sub(reach) / self.strides[axis].max(1) + 1
        };
        let outs = [side(0, height), side(1, width)];
        let places = batch * outs[0] * outs[1];
        let step = places.div_ceil(PLACES).max(1);
        let taps: Vec<[usize; 2]> =
            (0..self.kernel[0]).flat_map(|i| (0..self.kernel[1]).map(move |j| [i, j])).collect();
        // From sample to sample another first place, so that no column of a picture is left out.
        let first = self.samples * 7 % step;
        let (mut rows, mut kept) = (Vec::new(), Vec::new());
        let of_group = self.seen.len() / self.groups;
        for (group, seen) in self.seen.chunks_mut(of_group).enumerate() {
            rows.clear();
            for place in (first..places).step_by(step) {
                let (b, at) = (place / (outs[0] * outs[1]), place % (outs[0] * outs[1]));
                let corner = [at / outs[1] * self.strides[0], at % outs[1] * self.strides[1]];
                for c in group * self.channels..(group + 1) * self.channels {
                    let of = &values[(b * channels + c) * plane..][..plane];
                    rows.extend(taps.iter().map(|tap| {
                        let at = [0, 1].map(|a| (corner[a] + tap[a] * self.dilations[a]).checked_sub(self.pads[a]));
                        let inside = at[0].zip(at[1]).filter(|&(y, x)| y < height && x < width);
                        // Beside the picture there are zeros.
                        inside.map_or(0.0, |(y, x)| of[y * width + x]) - self.shift[c]
                    }));
                }
            }
            for (place, seen) in seen.iter_mut().enumerate() {
                let rows = match &mut self.cut {
                    Some(cut) => {
                        cut.within(group * of_group + place, &rows, &mut kept);
                        &kept
                    }
                    None => &rows,
                };
                seen.observe(&self.reads, rows)?;
            }
        }
        self.samples += 1;
        Ok(())
    }
}

/// The windows of all convolutions that a plan quantizes; those that share a weight with another layer are left out.
///
/// # Errors
/// Weights whose bytes don't fit their shape.
pub(super) fn windows(graph: &Graph, plan: &Plan, centred: bool) -> Result<Vec<Windows>> {
    let convolutions = graph.nodes().filter(|(id, _)| plan.kind(*id) == Some(&Kind::Conv));
    let alone = convolutions.filter(|(_, node)| graph.consumers(node.arg(1)).len() == 1);
    alone.filter_map(|(id, _)| Windows::of(graph, plan, id, centred).transpose()).collect()
}
