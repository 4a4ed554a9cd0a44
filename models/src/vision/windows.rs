//! Windows of what a convolution reads: the rows of the matrix that its weights multiply, and their products with each
//! other. Neighbours in a picture are much alike, so that errors of weights can make up for each other.
//!
//! ```text
//! x (batch, groups * c, height, width)  ->  for each group, a row (c * kh * kw) a place of the output
//! ```

use crate::{ModelError, Result};
use nibble_quant::onnx::plan::Kind;
use nibble_quant::onnx::proto::NodeProto;
use nibble_quant::onnx::weights::reads_channels;
use nibble_quant::onnx::{Graph, Plan};
use nibble_quant::stats::Input;

/// Places of one sample that are taken: neighbours are much alike.
pub(super) const PLACES: usize = 192;
/// Values of all groups' Gram matrices at most.
const LARGEST: usize = 1 << 25;

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
    /// One a group.
    seen: Vec<Input>,
}

impl Windows {
    /// Of a convolution that reads more than single channels, if its matrices aren't too large.
    fn of(graph: &Graph, node: &NodeProto, centred: bool) -> Option<Windows> {
        let pair = |name: &str, default: usize| -> Option<[usize; 2]> {
            match node.attr(name).map(|a| a.ints.as_slice()) {
                None | Some([]) => Some([default; 2]),
                Some(&[a, b, ..]) => Some([usize::try_from(a).ok()?, usize::try_from(b).ok()?]),
                Some(_) => None,
            }
        };
        let weight = graph.constant(node.arg(1))?;
        let dims: Vec<usize> = weight.dims.iter().map(|&d| usize::try_from(d).ok()).collect::<Option<_>>()?;
        let &[n, channels, height, width] = dims.as_slice() else { return None };
        let groups = usize::try_from(node.int("group", 1)).ok().filter(|&g| g > 0 && n > 0 && n % g == 0)?;
        let k = channels.checked_mul(height)?.checked_mul(width).filter(|&k| k > 0)?;
        let fits = k.checked_mul(k)?.checked_mul(groups)? <= LARGEST && node.attr("auto_pad").is_none();
        (fits && !reads_channels(graph, node)).then_some(Windows {
            reads: node.arg(0).to_owned(),
            weight: weight.name().to_owned(),
            groups,
            channels,
            kernel: [height, width],
            strides: pair("strides", 1)?,
            dilations: pair("dilations", 1)?,
            pads: pair("pads", 0)?,
            shift: Vec::new(),
            centred,
            samples: 0,
            seen: (0..groups).map(|_| Input::new(k, true)).collect(),
        })
    }

    /// What was seen, one a group.
    pub(super) fn seen(self) -> Vec<Input> {
        self.seen
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
            for (c, shift) in self.shift.iter_mut().enumerate().filter(|_| self.centred) {
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
        let mut rows = Vec::new();
        for (group, seen) in self.seen.iter_mut().enumerate() {
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
            seen.observe(&self.reads, &rows)?;
        }
        self.samples += 1;
        Ok(())
    }
}

/// The windows of all convolutions that a plan quantizes; those that share a weight with another layer are left out.
pub(super) fn windows(graph: &Graph, plan: &Plan, centred: bool) -> Vec<Windows> {
    let convolutions = graph.nodes().filter(|(id, _)| plan.kind(*id) == Some(&Kind::Conv));
    let alone = convolutions.filter(|(_, node)| graph.consumers(node.arg(1)).len() == 1);
    alone.filter_map(|(_, node)| Windows::of(graph, node, centred)).collect()
}
