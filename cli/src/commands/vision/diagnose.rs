//! `nibble vision diagnose`: where a quantized model's error comes from.

use super::data::{Preparation, Shapes};
use super::eval::labels;
use super::page::page;
use super::recipe::{Recipe, open};
use crate::arguments::Threads;
use crate::commands::Run;
use crate::failure::Usage;
use crate::findings::Findings;
use crate::output::{self, Table};
use crate::progress::Meter;
use crate::session::Session;
use anyhow::Result;
use nibble_models::graph::inputs;
use nibble_models::vision::diagnose::{
    Diagnosis, LayerSensitivity, Outlier, Score, SensitivityOptions, State, numbers, sensitivity, steps,
};
use nibble_quant::onnx::{Mode, Selector};
use std::path::PathBuf;

/// Find out where the error of a model in integers comes from: weights or activations, which layers, which tensors
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example: nibble vision diagnose model.onnx --calib photos --data others --crops 8 -o diagnosis.json

The model is quantized as `nibble vision quantize` would with the same flags; nothing is written but what -o, --report and --state name.
`only` is the error with one layer in integers and the rest in float, `without` that with one layer in float and the rest
in integers. Each is found by running again what comes after the layer. Layers that read the same tensor count as one.
--state FILE keeps what is done after every few samples; the same command goes on from there."
)]
pub struct Diagnose {
    /// The float model
    #[arg(value_name = "MODEL.onnx")]
    model: PathBuf,
    /// Samples to judge by: a folder of pictures or arrays, or one of them
    #[arg(long, short, value_name = "DATA")]
    data: PathBuf,
    /// Classes of the samples: a text file with one number for each, in their order
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// Look at layers that read the same tensor (queries, keys and values) one by one
    #[arg(long)]
    apart: bool,
    /// Look only at layers that fit this pattern (may be repeated)
    #[arg(long, value_name = "PATTERN")]
    only: Vec<Selector>,
    #[command(flatten)]
    findings: Findings,
    #[command(flatten)]
    recipe: Recipe,
    #[command(flatten)]
    shapes: Shapes,
    #[command(flatten)]
    preparation: Preparation,
    #[command(flatten)]
    threads: Threads,
}

impl Run for Diagnose {
    fn run(self, session: &Session) -> Result<()> {
        self.findings.check()?;
        self.threads.set_for_conversion()?;
        // Every run frees tensors of the sizes that the next one wants.
        nibble_kernels::keep_freed_memory();
        let threads = self.threads.count();
        if self.recipe.settings()?.mode != Mode::Static {
            return Err(Usage("--mode: static quantization alone can be diagnosed".into()).into());
        }
        let labels = self.labels.as_deref().map(labels).transpose()?;
        let opened = open(session, &self.model, &self.shapes, threads)?;
        let (prepared, _) = self.recipe.prepare(session, opened, &self.preparation, threads)?;
        let calib = self.recipe.samples(session, &self.preparation, &prepared.model)?;
        let data = self.preparation.open(session, &self.data, &inputs(&prepared.model))?;
        let count = data.count()?;
        let mut state = self.findings.state().map(State::open).transpose()?.unwrap_or_default();
        let (stop, labels) = (session.stop(), labels.as_deref());
        let how = SensitivityOptions { labels, threads, apart: self.apart, only: &self.only, stop };
        let meter = Meter::new(session, "diagnose", "runs");
        meter.begin(count * steps(how.units(&prepared)?.len()), 0);
        let found = sensitivity(&prepared, &data, &how, &mut state, &|| meter.add_thing("layers"))?;
        let options = self.recipe.options(session, threads)?;
        meter.begin(count + calib.count()?, 0);
        let (activations, weights) = numbers(&prepared, &calib, &data, &options, &mut || meter.add_thing("numbers"))?;
        drop(meter);
        let diagnosis =
            Diagnosis { samples: found.samples, sources: found.sources, layers: found.layers, activations, weights };
        self.findings.save(&diagnosis, || page(&self.model, &diagnosis))?;
        if session.json {
            return output::json(&serde_json::to_value(&diagnosis)?);
        }
        print(&diagnosis, self.findings.top)
    }
}

fn decibels(value: Option<f64>) -> String {
    value.map_or("-".into(), |db| format!("{db:.2}"))
}

/// A layer's node, and how many are looked at with it.
pub(super) fn name(row: &LayerSensitivity) -> String {
    match row.with.len() {
        0 => row.layer.node.clone(),
        more => format!("{} and {more} more", row.layer.node),
    }
}

/// The first few.
fn outliers(all: &[Outlier]) -> String {
    let named = all.iter().take(3).map(|o| format!("{} ({:.0}x)", o.channel, o.times));
    named.collect::<Vec<_>>().join(" ")
}

/// SQNR, and what there is of divergence, agreement and accuracy.
fn cells(score: &Score) -> Vec<String> {
    let percent = |share: Option<f64>| share.map(|s| format!("{:.1}", 100.0 * s));
    let mut cells = vec![decibels(score.sqnr_db)];
    cells.extend(score.kl.map(|kl| format!("{kl:.5}")));
    cells.extend(percent(score.agreement));
    cells.extend(percent(score.accuracy));
    cells
}

/// The columns that a score has.
fn columns(score: &Score) -> Vec<&'static str> {
    let mut columns = vec!["SQNR dB"];
    columns.extend(score.kl.map(|_| "KL"));
    columns.extend(score.agreement.map(|_| "top-1 %"));
    columns.extend(score.accuracy.map(|_| "accuracy %"));
    columns
}

fn print(diagnosis: &Diagnosis, top: usize) -> Result<()> {
    let sources = &diagnosis.sources;
    let head = columns(&sources.both);
    let mut table = Table::new(&[vec!["in integers"], head.clone()].concat());
    for (name, score) in [("weights", &sources.weights), ("activations", &sources.activations), ("both", &sources.both)]
    {
        table.row([vec![name.to_owned()], cells(score)].concat());
    }
    output::say(&format!("{} samples\n{}", diagnosis.samples, table.render()))?;
    if let Some(accuracy) = sources.float_accuracy {
        output::say(&format!("float: accuracy {:.1} %", 100.0 * accuracy))?;
    }
    let mut layers: Vec<_> = diagnosis.layers.iter().collect();
    let key = |db: Option<f64>| db.unwrap_or(f64::INFINITY);
    layers.sort_by(|a, b| key(a.only.sqnr_db).total_cmp(&key(b.only.sqnr_db)));
    let first: Vec<String> = head.iter().map(|c| format!("only: {c}")).collect();
    let mut table = Table::new(
        &["layer", "operator"]
            .into_iter()
            .chain(first.iter().map(String::as_str))
            .chain(["without: dB"])
            .collect::<Vec<_>>(),
    );
    for row in layers.iter().take(top) {
        let own = vec![name(row), row.layer.op.clone()];
        table.row([own, cells(&row.only), vec![decibels(row.without.sqnr_db)]].concat());
    }
    output::say(&table.render())?;
    let mut tensors: Vec<_> = diagnosis.activations.iter().collect();
    tensors.sort_by(|a, b| key(a.figures.sqnr_db).total_cmp(&key(b.figures.sqnr_db)));
    let mut table =
        Table::new(&["activation", "SQNR dB", "range", "reach", "beyond it %", "outlier channels", "best observer"]);
    for row in tensors.iter().take(top) {
        let ends = |[lo, hi]: [f32; 2]| format!("{lo:.3}..{hi:.3}");
        let best = row.observers.iter().max_by(|a, b| key(a.sqnr_db).total_cmp(&key(b.sqnr_db)));
        table.row(vec![
            row.tensor.clone(),
            decibels(row.figures.sqnr_db),
            ends(row.figures.range),
            ends(row.figures.reach),
            format!("{:.4}", 100.0 * row.figures.saturated),
            outliers(&row.outliers),
            best.map_or(String::new(), |o| format!("{} {}", o.observer, decibels(o.sqnr_db))),
        ]);
    }
    output::say(&table.render())?;
    let mut weights: Vec<_> = diagnosis.weights.iter().collect();
    weights.sort_by(|a, b| key(a.figures.sqnr_db).total_cmp(&key(b.figures.sqnr_db)));
    let mut table = Table::new(&["weight", "of", "SQNR dB", "max error", "outlier channels"]);
    for row in weights.iter().take(top) {
        table.row(vec![
            row.tensor.clone(),
            row.node.clone(),
            decibels(row.figures.sqnr_db),
            format!("{:.2e}", row.figures.max_error),
            outliers(&row.outliers),
        ]);
    }
    output::say(&table.render())
}
