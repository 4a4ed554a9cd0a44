//! Levels fitted to a tensor: where its values lie on the scale of their groups, weighted by what their errors cost.
//!
//! Scales and codes by the search under some levels, then each level moved to the weighted mean of what is coded by it,
//! in turns (Lloyd's algorithm), until the error no longer falls. Levels are integers of 8 bits, the largest one 127, so
//! that kernels multiply them as they are.

use super::fit::Method;
use super::{AlgoInput, error, rows};
use crate::error::Result;
use crate::{Grid, QTensor, QuantSpec, Table};
use nibble_kernels::simd::{LANES, Scalar};

/// Most rounds; the error falls by less than a thousandth a round after about eight.
const ROUNDS: usize = 12;
/// Largest level.
const TOP: f32 = 127.0;

/// Levels for the tensor, or the rows of it, that `input` gives; its spec's table is what they start from.
///
/// # Errors
/// The spec's grid isn't a table of integers, or the tensor can't be quantized by it.
pub fn learn_levels(input: &AlgoInput) -> Result<Table> {
    let mut table = match input.spec.grid {
        Grid::Table(table) if table.of_integers() => rounded(&table.levels()[..table.count()]),
        _ => {
            return Err(input.refuse(format!("levels of {} can't be learned, wanted a table of integers", input.spec)));
        }
    };
    let mut best = (f64::INFINITY, table);
    for _ in 0..ROUNDS {
        let spec = QuantSpec { grid: Grid::Table(table), ..input.spec.clone() };
        let tensor = rows::quantize(&AlgoInput { spec: &spec, ..*input }, Method::Search)?;
        let (error, means) = fit(input, &tensor, table.levels());
        if error >= best.0 * 0.999 {
            break;
        }
        best = (error, table);
        table = rounded(&means[..table.count()]);
    }
    Ok(best.1)
}

/// The weighted error, and the level that would have been best for each code there is.
fn fit(input: &AlgoInput, tensor: &QTensor, levels: [f32; LANES]) -> (f64, [f32; LANES]) {
    let k = input.shape[1].max(1);
    let size = tensor.spec.group_size(k);
    let (mut error, mut up, mut down) = (0.0, [0f64; LANES], [0f64; LANES]);
    let mut weights = vec![0.0; k];
    for (r, (x, codes)) in input.weight.chunks(k).zip(tensor.codes.chunks(k)).enumerate() {
        error::row_weights(Scalar, input, x, &mut weights);
        for (i, ((x, w), code)) in x.iter().zip(&weights).zip(codes).enumerate() {
            let (scale, code) = (tensor.scale(r, i / size) as f64, *code as usize & (LANES - 1));
            let (x, w) = (*x as f64, *w as f64);
            error += w * (x - scale * levels[code] as f64).powi(2);
            up[code] += w * scale * x;
            down[code] += w * scale * scale;
        }
    }
    let mean = |code: usize| if down[code] > 0.0 { (up[code] / down[code]) as f32 } else { levels[code] };
    (error, std::array::from_fn(mean))
}

/// Ascending integers in the proportions of the 8 or 16 `levels`, the largest magnitude 127.
fn rounded(levels: &[f32]) -> Table {
    let peak = levels.iter().fold(0f32, |m, l| m.max(l.abs())).max(f32::MIN_POSITIVE);
    let last = levels.len() - 1;
    let mut whole: Vec<i32> = levels.iter().map(|l| (l * TOP / peak).round_ties_even() as i32).collect();
    whole.sort_unstable();
    // Levels that have met are set apart, upwards and then down from the top; zero stays inside.
    for i in 1..=last {
        whole[i] = whole[i].max(whole[i - 1] + 1);
    }
    whole[last] = whole[last].clamp(1, TOP as i32);
    for i in (0..last).rev() {
        whole[i] = whole[i].min(whole[i + 1] - 1);
    }
    whole[0] = whole[0].min(-1);
    match last {
        7 => Table::Eight(std::array::from_fn(|i| whole[i] as i8)),
        _ => Table::Int8(std::array::from_fn(|i| whole[i.min(last)] as i8)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounded_levels_are_a_table_that_specs_take() {
        let spread: [f32; LANES] = std::array::from_fn(|i| i as f32 - 7.3);
        let cases =
            [[0.0; LANES], [1.0; LANES], [-3.0; LANES], spread, spread.map(|l| l * 1e-3), spread.map(|l| l.powi(3))];
        for levels in cases {
            for count in [8, 16] {
                let table = rounded(&levels[..count]);
                let made = &table.levels()[..count];
                assert!(table.count() == count && made.is_sorted_by(|a, b| a < b), "{levels:?}: {table:?}");
                assert!(made[0] < 0.0 && made[count - 1] > 0.0, "{levels:?}: {table:?}");
            }
        }
        assert_eq!(rounded(&spread.map(|l| l * 9.0)).levels()[15], 127.0);
    }
}
