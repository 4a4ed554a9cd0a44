//! Levels learned for every tensor that a recipe puts on a table of levels, as a recipe again.

use crate::algo::{AlgoInput, learn_levels};
use crate::error::Result;
use crate::format::{TensorInfo, TensorSource};
use crate::recipe::{Action, Recipe, Rule};
use crate::stats::Stats;
use crate::{Grid, QuantError, QuantScheme, QuantSpec, Role};
use rayon::prelude::*;
use std::sync::atomic::{AtomicBool, Ordering};

/// Rows that levels are learned from, in stretches spread over the tensor.
const ROWS: usize = 128;
const STRETCH: usize = 16;

/// What sets the name of a tensor's own scheme off from the scheme that it varies.
pub const OWN: char = '@';

/// The recipe with a scheme of its own for each linear layer that it puts on a table of integer levels and whose input was
/// observed: the same scheme with levels learned for the layer. `stop` ends it early.
///
/// # Errors
/// A tensor can't be read or quantized; [`QuantError::Stopped`].
pub fn with_learned_levels(
    source: &dyn TensorSource,
    recipe: &Recipe,
    stats: &Stats,
    stop: &AtomicBool,
) -> Result<Recipe> {
    let learned = |info: &TensorInfo| -> Result<Option<(Rule, QuantScheme)>> {
        if stop.load(Ordering::Relaxed) {
            return Err(QuantError::Stopped);
        }
        let decision = recipe.decide(&info.name, &info.shape)?;
        let Action::Quantize { name, scheme, algorithm } = decision.action else { return Ok(None) };
        let Some(observed) = stats.inputs.get(&info.name).filter(|_| decision.role == Role::Linear) else {
            return Ok(None);
        };
        let Some(grid) = levels_of(source, info, &scheme.weight, &observed.mean_squares())? else { return Ok(None) };
        source.release(&info.name);
        let mut scheme = scheme;
        scheme.weight.grid = grid;
        let rule = Rule {
            pattern: Some(info.name.clone()),
            scheme: Some(format!("{name}{OWN}{}", info.name)),
            algorithm: Some(algorithm.to_owned()),
            why: Some(format!("levels of its own; {}", decision.why)),
            ..Rule::default()
        };
        Ok(Some((rule, scheme)))
    };
    let matrices = source.infos().par_iter().filter(|info| info.shape.len() == 2);
    let found: Vec<_> = matrices.map(learned).collect::<Result<_>>()?;
    let mut made = recipe.clone();
    let mut rules = Vec::new();
    for (rule, scheme) in found.into_iter().flatten() {
        made.schemes.extend(rule.scheme.clone().map(|name| (name, scheme)));
        rules.push(rule);
    }
    made.rules.splice(0..0, rules);
    Ok(made)
}

/// A table of levels learned for a tensor under a spec, with `importance` (k) of its columns; `None` if the spec's grid is
/// no table of integers.
///
/// # Errors
/// The tensor can't be read or quantized.
pub fn levels_of(
    source: &dyn TensorSource,
    info: &TensorInfo,
    spec: &QuantSpec,
    importance: &[f32],
) -> Result<Option<Grid>> {
    if !matches!(spec.grid, Grid::Table(table) if table.of_integers()) {
        return Ok(None);
    }
    let (weight, k) = some_rows(source, info)?;
    let table = learn_levels(&AlgoInput {
        name: &info.name,
        weight: &weight,
        shape: [weight.len() / k.max(1), k],
        spec,
        importance: Some(importance),
        calibrated: None,
        seed: 0,
    })?;
    Ok(Some(Grid::Table(table)))
}

fn some_rows(source: &dyn TensorSource, info: &TensorInfo) -> Result<(Vec<f32>, usize)> {
    let (rows, k) = info.rows_cols();
    let stretches = ROWS / STRETCH;
    let (mut all, mut part) = (Vec::new(), Vec::new());
    if rows <= ROWS {
        source.read_rows_f32(&info.name, 0..rows, &mut all)?;
    } else {
        for i in 0..stretches {
            let from = i * (rows - STRETCH) / (stretches - 1);
            source.read_rows_f32(&info.name, from..from + STRETCH, &mut part)?;
            all.extend_from_slice(&part);
        }
    }
    Ok((all, k))
}
