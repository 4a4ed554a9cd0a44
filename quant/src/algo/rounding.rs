//! Rounding that is learned with signed gradients (AutoRound, arXiv 2309.05516).
//!
//! ```text
//! u = the weight's place among its group's codes, a fraction     value = scale * level(round(u + offset)) + min
//! ```
//! Every weight has an offset, and every group a factor on its scale. Somebody who knows the gradient of a loss by the
//! values moves them: an offset by the gradient's sign times a rate, since only its direction is trusted while
//! rounding is passed straight through; a factor by the sign of what its group's values say together. The offsets begin where
//! the codes of some other algorithm are what rounding gives, as near to no offset as that goes.

use super::fit::{Rule, inverse};
use super::grid::Places;
use crate::{FloatFormat, Granularity, OutlierSpec, QTensor, ScaleData, ScaleFormat};
use nibble_kernels::Isa;
use nibble_kernels::simd::{self, LANES, Simd, SimdOp};
use rayon::prelude::*;

/// How far an offset keeps from where its code would change, in the beginning.
const MARGIN: f32 = 0.05;
/// Offsets reach this far to either side, or to where they began.
const REACH: f32 = 0.5;
/// Factors on scales stay within this of 1.
const CLIP: f32 = 0.15;

/// A tensor whose rounding is being learned.
pub struct Rounding {
    tensor: QTensor,
    rule: Rule,
    /// (n, k) places among codes, under the scales as they are.
    places: Vec<f32>,
    /// (n, k)
    offsets: Vec<f32>,
    /// (n, groups) what scales were, and the factors on them; empty where scales are shared by rows.
    first: Vec<f32>,
    factors: Vec<f32>,
}

impl Rounding {
    /// Begins with the codes and scales of `tensor`, which `weight`, (n, k), became; `None` where values are kept beside
    /// the grid, columns are reordered, or the tensor is empty.
    pub fn new(weight: &[f32], tensor: QTensor) -> Option<Rounding> {
        let [n, k] = tensor.shape;
        let fits = weight.len() == n * k && !weight.is_empty();
        if !fits || tensor.order.is_some() || tensor.spec.outliers != OutlierSpec::None {
            return None;
        }
        let own = tensor.spec.granularity != Granularity::Tensor
            && matches!(tensor.scales, ScaleData::Float(_) | ScaleData::Coded { .. });
        let groups = tensor.groups();
        let first: Vec<f32> = match own {
            true => (0..n * groups).map(|i| tensor.scale(i / groups, i % groups)).collect(),
            false => Vec::new(),
        };
        let mut made = Rounding {
            rule: Rule::new(&tensor.spec),
            places: vec![0.0; n * k],
            offsets: vec![0.0; n * k],
            factors: vec![1.0; first.len()],
            first,
            tensor,
        };
        made.place(weight);
        let codes = made.offsets.par_iter_mut().zip(&made.places).zip(&made.tensor.codes);
        codes.for_each(|((offset, place), code)| {
            let by = *code as f32 - place;
            *offset = 0f32.clamp(by - 0.5 + MARGIN, by + 0.5 - MARGIN);
        });
        Some(made)
    }

    /// (n, k)
    pub fn shape(&self) -> [usize; 2] {
        self.tensor.shape
    }

    /// The values that the codes stand for now.
    pub fn values(&self) -> Vec<f32> {
        self.tensor.dequantize()
    }

    /// Moves offsets against `gradient`, (n, k), of the loss by the values; factors on scales by `clip`, 0 for not at all.
    /// Codes and scales are then what rounding makes of them; `weight` is what the tensor was made from.
    ///
    /// # Panics
    /// If `gradient` or `weight` haven't the tensor's shape.
    pub fn step(&mut self, weight: &[f32], gradient: &[f32], rate: f32, clip: f32) {
        let k = self.tensor.shape[1];
        assert_eq!(gradient.len(), self.places.len(), "gradient of another shape");
        if clip > 0.0 && !self.first.is_empty() {
            self.move_scales(weight, gradient, clip);
        }
        let (size, ends) = (self.tensor.spec.group_size(k), self.ends());
        let mut codes = std::mem::take(&mut self.tensor.codes);
        let tensor = &self.tensor;
        let rows = codes.par_chunks_mut(k).zip(self.places.par_chunks(k)).zip(self.offsets.par_chunks_mut(k));
        rows.zip(gradient.par_chunks(k)).enumerate().for_each(|(r, (((codes, places), offsets), gradient))| {
            let groups = codes.chunks_mut(size).zip(places.chunks(size)).zip(offsets.chunks_mut(size));
            for (g, (((codes, places), offsets), gradient)) in groups.zip(gradient.chunks(size)).enumerate() {
                let up = rate * tensor.scale(r, g).signum();
                let each = codes.iter_mut().zip(places).zip(offsets).zip(gradient);
                each.for_each(|(((code, place), offset), slope)| {
                    let to = place + *offset;
                    // Beyond the ends of the grid an offset changes nothing.
                    let by = if *slope == 0.0 || to < ends.0 - 0.5 || to > ends.1 + 0.5 { 0.0 } else { up };
                    let reach = REACH.max(offset.abs());
                    *offset = (*offset - by * slope.signum()).clamp(-reach, reach);
                    *code = (place + *offset).round_ties_even().clamp(ends.0, ends.1) as u8;
                });
            }
        });
        self.tensor.codes = codes;
    }

    /// Lowest and highest code.
    fn ends(&self) -> (f32, f32) {
        let codes = self.tensor.spec.codes();
        (*codes.start() as f32, *codes.end() as f32)
    }

    /// The tensor as it is now.
    pub fn finish(self) -> QTensor {
        self.tensor
    }

    /// Factors against the gradient by the scales: a value that isn't clipped changes with its scale by what rounding
    /// leaves of its place, a clipped one by its level.
    fn move_scales(&mut self, weight: &[f32], gradient: &[f32], clip: f32) {
        let [_, k] = self.tensor.shape;
        let (rule, ends) = (self.rule, self.ends());
        let [first, last] = [ends.0, ends.1].map(|code| code as u8);
        let (size, groups) = (self.tensor.spec.group_size(k), self.tensor.groups());
        let tensor = &self.tensor;
        let rows = self.factors.par_chunks_mut(groups).zip(weight.par_chunks(k)).zip(gradient.par_chunks(k));
        rows.enumerate().for_each(|(r, ((factors, weight), gradient))| {
            for (g, factor) in factors.iter_mut().enumerate() {
                let (scale, min, zero) = (tensor.scale(r, g), tensor.min(r, g), tensor.zero(r, g));
                let by = inverse(scale);
                let reach = rule.level(first, zero)..=rule.level(last, zero);
                let mut pull = 0.0;
                for j in g * size..((g + 1) * size).min(k) {
                    let level = rule.level(tensor.codes[r * k + j], zero);
                    let y = (weight[j] - min) * by;
                    pull += gradient[j] * if reach.contains(&y) { level - y } else { level };
                }
                let pull = pull * scale;
                if pull != 0.0 {
                    *factor = (*factor - clip * pull.signum()).clamp(1.0 - CLIP, 1.0 + CLIP);
                }
            }
        });
        store(&mut self.tensor, &self.first, &self.factors);
        self.place(weight);
    }

    /// Places under the scales as they are.
    fn place(&mut self, weight: &[f32]) {
        let (rule, tensor, k) = (&self.rule, &self.tensor, self.tensor.shape[1]);
        let isa = Isa::best();
        self.places.par_chunks_mut(k).zip(weight.par_chunks(k)).enumerate().for_each(|(row, (places, weight))| {
            simd::dispatch(isa, PlaceRow { tensor, rule, row, weight, places });
        });
    }
}

/// Places of a row's values among the codes of their groups.
struct PlaceRow<'a> {
    tensor: &'a QTensor,
    rule: &'a Rule,
    row: usize,
    weight: &'a [f32],
    places: &'a mut [f32],
}

impl SimdOp for PlaceRow<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let PlaceRow { tensor, rule, row, weight, places } = self;
        let size = tensor.spec.group_size(weight.len());
        let table = rule.table.as_ref().map(|table| Places::new(s, &table.levels));
        for (g, (places, weight)) in places.chunks_mut(size).zip(weight.chunks(size)).enumerate() {
            let (by, min) = (s.splat(inverse(tensor.scale(row, g))), s.splat(tensor.min(row, g)));
            let zero = s.splat(tensor.zero(row, g) as f32);
            for (places, weight) in places.chunks_mut(LANES).zip(weight.chunks(LANES)) {
                let y = s.mul(s.sub(s.load_partial(weight), min), by);
                let place = match table {
                    Some(table) => table.of(s, y),
                    None => s.add(y, zero),
                };
                s.store_partial(place, places);
            }
        }
    }
}

/// What is storable nearest to `first * factors` becomes a tensor's scales; none changes its sign or becomes 0.
fn store(tensor: &mut QTensor, first: &[f32], factors: &[f32]) {
    let (k, groups) = (tensor.shape[1], tensor.groups().max(1));
    let (spans, span) = (tensor.spec.spans(k), tensor.spec.span_groups(k).max(1));
    let range = tensor.spec.scale_codes();
    let wanted = first.iter().zip(factors).map(|(scale, factor)| scale * factor);
    match (&mut tensor.scales, tensor.spec.scale) {
        (ScaleData::Float(values), ScaleFormat::Float(float)) => {
            values.iter_mut().zip(wanted).for_each(|(to, scale)| *to = held(float, scale, *to));
        }
        (ScaleData::Coded { codes, second }, _) => {
            let Some(range) = range else { return };
            for (i, (code, scale)) in codes.iter_mut().zip(wanted).enumerate() {
                let unit = second[i / groups * spans + i % groups / span];
                let (low, top) = (*range.start() as f32, *range.end() as f32);
                let new = (scale * inverse(unit)).round_ties_even().clamp(low, top) as i16;
                if new.signum() == code.signum() {
                    *code = new;
                }
            }
        }
        _ => {}
    }
}

fn held(float: FloatFormat, scale: f32, old: f32) -> f32 {
    let rounded = float.round(scale);
    if rounded.is_finite() && rounded != 0.0 { rounded } else { old }
}
