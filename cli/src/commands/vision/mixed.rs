//! A goal instead of patterns: which layers stay float, and which get two terms, is found by measuring.

use super::data::Preparation;
use super::eval::labels;
use crate::failure::Usage;
use crate::output::Table;
use crate::progress::Meter;
use crate::session::Session;
use anyhow::Result;
use nibble_models::graph::inputs;
use nibble_models::vision::data::Data;
use nibble_models::vision::mixed::{Attempt, Goal, Judge, Mixed, Precision, allocate};
use nibble_models::vision::prepare::Prepared;
use nibble_quant::onnx::Mode;
use serde_json::{Value, json};
use std::path::PathBuf;

/// The flags.
#[derive(Debug, Clone, clap::Args)]
pub struct MixedPrecision {
    /// Leave as few layers in float as an SQNR of the first output takes
    #[arg(long, value_name = "DB", conflicts_with_all = ["target_agreement", "target_accuracy", "max_size"])]
    target_sqnr: Option<f64>,
    /// The same for the share of samples with the float model's class (or nearest neighbour)
    #[arg(long, value_name = "PERCENT", conflicts_with_all = ["target_accuracy", "max_size"])]
    target_agreement: Option<f64>,
    /// The same for the share of samples with the right class
    #[arg(long, value_name = "PERCENT", requires = "labels", conflicts_with = "max_size")]
    target_accuracy: Option<f64>,
    /// Leave as many layers in float as fit into a file of so many megabytes
    #[arg(long, value_name = "MB")]
    max_size: Option<f64>,
    /// Samples that goals are measured on [default: those of --calib]
    #[arg(long, value_name = "DATA")]
    judge: Option<PathBuf>,
    /// Classes of those samples: a text file with one number for each, in their order
    #[arg(long, value_name = "FILE", requires = "target_accuracy")]
    labels: Option<PathBuf>,
}

impl MixedPrecision {
    /// What is wanted, if anything is.
    pub fn goal(&self, mode: Mode) -> Result<Option<Goal>> {
        let share = |name: &str, percent: f64| match (0.0..=100.0).contains(&percent) {
            true => Ok(percent / 100.0),
            false => Err(Usage(format!("--{name} {percent}: a share from 0 to 100 is possible"))),
        };
        let goal = match (self.target_sqnr, self.target_agreement, self.target_accuracy, self.max_size) {
            (Some(db), ..) => Goal::Sqnr(db),
            (_, Some(percent), ..) => Goal::Agreement(share("target-agreement", percent)?),
            (_, _, Some(percent), _) => Goal::Accuracy(share("target-accuracy", percent)?),
            (.., Some(megabytes)) => Goal::Bytes((megabytes.max(0.0) * 1e6) as u64),
            _ => return Ok(None),
        };
        match mode {
            Mode::Static => Ok(Some(goal)),
            _ => Err(Usage("a goal is reached with static quantization alone".into()).into()),
        }
    }

    /// Finds the precision of each layer.
    pub fn run(
        &self,
        session: &Session,
        goal: Goal,
        prepared: &Prepared,
        calib: &Data,
        preparation: &Preparation,
        threads: usize,
    ) -> Result<Mixed> {
        let labels = self.labels.as_deref().map(labels).transpose()?;
        let own = match &self.judge {
            Some(path) => Some(preparation.open(session, path, &inputs(&prepared.model))?),
            None => None,
        };
        let data = own.as_ref().unwrap_or(calib);
        let judge = Judge { data, labels: labels.as_deref(), threads, stop: session.stop() };
        let meter = Meter::new(session, "mixed precision", "runs");
        // How many models are measured isn't known before.
        meter.begin(0, 0);
        Ok(allocate(prepared, goal, calib, &judge, &|what| meter.add_thing(what))?)
    }
}

/// What was chosen, and what was measured on the way.
pub fn to_json(mixed: &Mixed) -> Result<Value> {
    Ok(json!({"chosen": mixed.chosen, "attempts": mixed.attempts, "layers": mixed.layers}))
}

/// A line on the model and a table of layers that aren't plain integers.
pub fn text(mixed: &Mixed) -> String {
    let Attempt { sqnr_db, agreement, accuracy, time, .. } = &mixed.chosen;
    let mut words = vec![sqnr_db.map_or("no error".into(), |db| format!("{db:.2} dB"))];
    words.extend(agreement.map(|share| format!("{:.1} % agree", 100.0 * share)));
    words.extend(accuracy.map(|share| format!("{:.1} % right", 100.0 * share)));
    words.push(format!("layers' time about {:.0} % of float", 100.0 * time));
    words.push(format!("{} models measured", mixed.attempts.len()));
    let mut table = Table::new(&["layer", "operator", "precision"]);
    for choice in mixed.layers.iter().filter(|l| l.precision != Precision::Int8) {
        let word = if choice.precision == Precision::Float { "float" } else { "int8, two terms" };
        table.row(vec![choice.layer.node.clone(), choice.layer.op.clone(), word.into()]);
    }
    format!("{}\n{}", words.join(", "), table.render())
}
