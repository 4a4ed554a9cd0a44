//! Codes that make up for each other's errors along rows and along columns.
//!
//! What a change D of a layer's weights does to the loss is to second order vec(D)^T E[g g^T (x) x x^T] vec(D), x its input
//! and g the gradient by its outputs. Taken for the product of a matrix H over columns and one G over rows it is
//! tr(G D H D^T): errors of one row can be made up for by another whose outputs work in the same direction. Codes are
//! rounded in turn with feedback on both sides ([`Pair`]), then lowered one by one as in [`descent`].

use super::fit::{Method, Rule};
use super::gptq::{self, DAMPING};
use super::{AlgoInput, descent, rows};
use crate::error::Result;
use crate::linalg::{DecideOne, Dense, Feedback, Pair};
use crate::stats::Input;
use crate::{OutlierSpec, QTensor};
use std::sync::Arc;

/// What is added to the diagonal of G, as a share of its mean.
const OUTPUTS_DAMPING: f32 = 0.2;

/// By both sides where gradients were observed, and no outliers are kept beside the grid; otherwise by inputs alone.
pub(super) fn quantize(input: &AlgoInput) -> Result<QTensor> {
    let Some(sides) = sides(input) else { return gptq::quantize_and_descend(input) };
    let (calibrated, cols, (rows, g)) = sides;
    let searched = rows::quantize(input, Method::Search)?;
    let Some(h) = calibrated.damped(&cols) else { return Ok(searched) };
    let mut tensor = searched.clone();
    recode(input, &mut tensor, &Pair { rows: &rows, cols: &cols });
    let tensor = descent::refine_both(input, tensor, &h, &g);
    let error = |tensor: &QTensor| descent::error_on_both_sides(input, tensor, &h, &g);
    Ok(if error(&tensor) <= error(&searched) { tensor } else { searched })
}

/// What was observed, the factor over columns, and the matrix over rows with its factor.
type Sides<'a> = (&'a Input, Arc<Feedback>, (Feedback, Dense));

fn sides<'a>(input: &AlgoInput<'a>) -> Option<Sides<'a>> {
    let calibrated = input.calibrated.filter(|c| c.width() == input.shape[1])?;
    calibrated.outputs().filter(|outputs| outputs.width() == input.shape[0])?;
    if input.weight.is_empty() || input.spec.outliers != OutlierSpec::None {
        return None;
    }
    Some((calibrated, calibrated.feedback(DAMPING)?, calibrated.outputs_feedback(OUTPUTS_DAMPING)?))
}

/// Codes chosen again under a tensor's numbers.
fn recode(input: &AlgoInput, tensor: &mut QTensor, pair: &Pair) {
    let k = input.shape[1];
    let rule = Rule::new(input.spec);
    let mut codes = std::mem::take(&mut tensor.codes);
    let padded = pair.cols.padded();
    let mut placed = vec![0f32; input.shape[0] * padded];
    for (placed, row) in placed.chunks_mut(padded).zip(&pair.rows.order) {
        let row = &input.weight[*row as usize * k..(*row as usize + 1) * k];
        placed.iter_mut().zip(&pair.cols.order).for_each(|(to, col)| *to = row[*col as usize]);
    }
    pair.run(&placed, &mut Chooser { tensor, rule: &rule, pair, k, codes: &mut codes });
    tensor.codes = codes;
}

/// What the walk asks at every place.
struct Chooser<'a> {
    tensor: &'a QTensor,
    rule: &'a Rule,
    pair: &'a Pair<'a>,
    k: usize,
    codes: &'a mut [u8],
}

impl DecideOne for Chooser<'_> {
    #[inline(always)]
    fn decide(&mut self, row: usize, at: usize, best: f32) -> f32 {
        // Padding.
        let Some(&col) = self.pair.cols.order.get(at) else { return best };
        let Some(&row) = self.pair.rows.order.get(row) else { return best };
        let (row, col) = (row as usize, col as usize);
        let g = col / self.tensor.spec.group_size(self.k);
        let (code, value) = gptq::Line::of(self.tensor, row, g).nearest(self.rule, best);
        self.codes[row * self.k + col] = code;
        value
    }
}
