//! A goal instead of patterns: which layers stay float, which get two terms and which weights of 4 bits is found by measuring.

use super::data::Preparation;
use super::engine::Engine;
use super::eval::labels;
use crate::failure::Usage;
use crate::output::Table;
use crate::progress::Meter;
use crate::session::Session;
use anyhow::Result;
use nibble_models::ModelError;
use nibble_models::graph::{GraphRunner, inputs};
use nibble_models::vision::data::{Data, Sample};
use nibble_models::vision::latency::latencies;
use nibble_models::vision::mixed::{Attempt, Goal, Judge, Mixed, Precision, allocate};
use nibble_models::vision::prepare::Prepared;
use nibble_quant::onnx::{Mode, Model};
use serde_json::{Value, json};
use std::path::PathBuf;

/// The flags.
#[derive(Debug, Clone, clap::Args)]
pub struct MixedPrecision {
    /// Leave as few layers in float as an SQNR of the first output takes
    #[arg(long, value_name = "DB", conflicts_with_all = ["target_agreement", "target_accuracy", "max_size", "max_latency"])]
    target_sqnr: Option<f64>,
    /// The same for the share of samples with the float model's class (or nearest neighbour)
    #[arg(long, value_name = "PERCENT", conflicts_with_all = ["target_accuracy", "max_size", "max_latency"])]
    target_agreement: Option<f64>,
    /// The same for the share of samples with the right class
    #[arg(long, value_name = "PERCENT", requires = "labels", conflicts_with_all = ["max_size", "max_latency"])]
    target_accuracy: Option<f64>,
    /// Make layers as exact as fits into a file of so many megabytes: float (weights in half precision), two terms, 8 bits, or weights
    /// of 4 bits
    #[arg(long, value_name = "MB", conflicts_with = "max_latency")]
    max_size: Option<f64>,
    /// Leave as many layers in float, or in two terms, as fit into this share of the float model's time, measured on --engine
    /// with one thread
    #[arg(long, value_name = "SHARE")]
    max_latency: Option<f64>,
    /// Rounds that time is measured in, the models in turns
    #[arg(long, value_name = "N", default_value_t = 15, requires = "max_latency")]
    rounds: usize,
    #[command(flatten)]
    engine: Engine,
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
        let named = [
            self.target_sqnr.map(|db| Ok(Goal::Sqnr(db))),
            self.target_agreement.map(|p| share("target-agreement", p).map(Goal::Agreement)),
            self.target_accuracy.map(|p| share("target-accuracy", p).map(Goal::Accuracy)),
            self.max_size.map(|megabytes| Ok(Goal::Bytes((megabytes.max(0.0) * 1e6) as u64))),
            self.max_latency.map(|share| Ok(Goal::Time(share))),
        ];
        let Some(goal) = named.into_iter().flatten().next().transpose()? else { return Ok(None) };
        match mode {
            Mode::Static => Ok(Some(goal)),
            _ => Err(Usage("a goal is reached with static quantization alone".into()).into()),
        }
    }

    /// Samples that goals are measured on, if there are any but those of calibration.
    pub fn judge(&self, session: &Session, prepared: &Prepared, preparation: &Preparation) -> Result<Option<Data>> {
        let open = |path: &PathBuf| preparation.open(session, path, &inputs(&prepared.model));
        self.judge.as_ref().map(open).transpose()
    }

    /// Finds the precision of each layer.
    pub fn run(
        &self,
        session: &Session,
        goal: Goal,
        prepared: &Prepared,
        [calib, data]: [&Data; 2],
        threads: usize,
    ) -> Result<Mixed> {
        let labels = self.labels.as_deref().map(labels).transpose()?;
        let first = sample(data)?;
        let timer = |model: &Model| self.time(&prepared.model, model, &first);
        let judge = Judge { data, labels: labels.as_deref(), threads, timer: Some(&timer), stop: session.stop() };
        let meter = Meter::new(session, "mixed precision", "runs");
        // How many models are measured isn't known before.
        meter.begin(0, 0);
        Ok(allocate(prepared, goal, calib, &judge, &|what| meter.add_thing(what))?)
    }
}

impl MixedPrecision {
    /// A model's time as a share of the float one's, on the engine that was asked for.
    fn time(&self, float: &Model, model: &Model, sample: &Sample) -> nibble_models::Result<f64> {
        let failed = |e: anyhow::Error| ModelError::Setting { what: "the engine".into(), why: format!("{e:#}") };
        let runners = self.engine.load(&[float.clone(), model.clone()], &[], 1).map_err(failed)?;
        let runners: Vec<&dyn GraphRunner> = runners.iter().map(AsRef::as_ref).collect();
        let outputs: Vec<String> = float.graph().output.iter().map(|o| o.name().to_owned()).collect();
        let found = latencies(&runners, sample, &outputs, self.rounds.max(1))?;
        match found.as_slice() {
            [float, this] if float.lower_decile_ms > 0.0 => Ok(this.lower_decile_ms / float.lower_decile_ms),
            _ => Err(failed(anyhow::anyhow!("took no time"))),
        }
    }
}

/// The first sample.
fn sample(data: &Data) -> Result<Sample> {
    let mut first = None;
    data.each(&mut |sample, _| {
        first = Some(sample);
        Ok(false)
    })?;
    first.ok_or_else(|| Usage("there are no samples".into()).into())
}

/// What was chosen, and what was measured on the way.
pub fn to_json(mixed: &Mixed) -> Result<Value> {
    Ok(json!({"chosen": mixed.chosen, "attempts": mixed.attempts, "layers": mixed.layers}))
}

/// A line on the model and a table of layers that aren't plain integers.
pub fn text(mixed: &Mixed) -> String {
    let Attempt { sqnr_db, agreement, accuracy, time, measured, .. } = &mixed.chosen;
    let mut words = vec![sqnr_db.map_or("no error".into(), |db| format!("{db:.2} dB"))];
    words.extend(agreement.map(|share| format!("{:.1} % agree", 100.0 * share)));
    words.extend(accuracy.map(|share| format!("{:.1} % right", 100.0 * share)));
    words.extend(measured.map(|share| format!("{:.1} % of the float model's time", 100.0 * share)));
    words.push(format!("layers' time about {:.0} % of float", 100.0 * time));
    words.push(format!("{} models measured", mixed.attempts.len()));
    let mut table = Table::new(&["layer", "operator", "precision"]);
    for choice in mixed.layers.iter().filter(|l| l.precision != Precision::Int8) {
        table.row(vec![choice.layer.node.clone(), choice.layer.op.clone(), choice.precision.name().into()]);
    }
    format!("{}\n{}", words.join(", "), table.render())
}
