//! `nibble vision eval`: a quantized model against its reference.

use super::data::{Preparation, Shapes};
use super::engine::Engine;
use crate::arguments::Threads;
use crate::commands::Run;
use crate::failure::Usage;
use crate::output::{self, Table};
use crate::progress::Meter;
use crate::session::Session;
use anyhow::{Context, Result, bail};
use nibble_models::vision::data::Data;
use nibble_models::vision::evaluate::{Report, evaluate};
use nibble_models::vision::latency::{Latency, latencies};
use nibble_quant::onnx::Model;
use nibble_quant::onnx::select::fits;
use serde_json::json;
use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

/// Compare a model's outputs with its reference's over samples: same top class, SQNR, cosine, nearest neighbour
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: nibble vision eval model.onnx model-int8.onnx --data photos --crops 8

The embedded engine computes QuantizeLinear and DequantizeLinear as they are written; ONNX Runtime (--engine ort) fuses
them into integer kernels. top-1 is the share of samples with the same largest value, nn the share whose nearest neighbour
among the samples is the same, KL the divergence of the class probabilities in nats.")]
pub struct Eval {
    /// The float model
    #[arg(value_name = "REFERENCE.onnx")]
    reference: PathBuf,
    /// The model to judge
    #[arg(value_name = "MODEL.onnx")]
    model: PathBuf,
    /// A folder of pictures or arrays, or one of them
    #[arg(long, short, value_name = "DATA")]
    data: PathBuf,
    /// Classes of the samples: a text file with one number for each, in their order
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// Also compare these tensors; with * and ?, all of that name that both models have
    #[arg(long = "tensor", value_name = "PATTERN")]
    tensors: Vec<String>,
    /// Also measure the time of a sample in ONNX Runtime, with 1 and 2 threads, over so many rounds
    #[arg(long, value_name = "ROUNDS", num_args = 0..=1, require_equals = true, default_missing_value = "60")]
    bench: Option<NonZeroUsize>,
    /// Fail if the SQNR of an output is below this
    #[arg(long, value_name = "DB")]
    min_sqnr: Option<f64>,
    #[command(flatten)]
    engine: Engine,
    #[command(flatten)]
    shapes: Shapes,
    #[command(flatten)]
    preparation: Preparation,
    #[command(flatten)]
    threads: Threads,
}

/// Float tensors that nodes of both models make, of names that fit any of the patterns; a name without * and ? stands for
/// itself.
fn tensors(models: &[Model; 2], patterns: &[String]) -> Result<Vec<String>> {
    let made = |model: &Model| -> Vec<String> {
        let nodes = model.graph().node.iter().filter(|n| !matches!(n.op_type(), "Constant" | "QuantizeLinear"));
        nodes.flat_map(|n| n.output.iter().filter(|name| !name.is_empty()).cloned()).collect()
    };
    let other: BTreeSet<String> = made(&models[1]).into_iter().collect();
    let shared: Vec<String> = made(&models[0]).into_iter().filter(|name| other.contains(name)).collect();
    let mut found = Vec::new();
    for pattern in patterns {
        if !pattern.contains(['*', '?']) {
            found.push(pattern.clone());
            continue;
        }
        let before = found.len();
        found.extend(shared.iter().filter(|name| fits(pattern, name)).cloned());
        if found.len() == before {
            return Err(Usage(format!("--tensor `{pattern}`: both models have no tensor of such a name")).into());
        }
    }
    Ok(found)
}

/// The classes that a file says: numbers between spaces or lines.
pub fn labels(path: &Path) -> Result<Vec<usize>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))?;
    let number = |word: &str| word.parse().with_context(|| format!("{}: `{word}` is no class", path.display()));
    text.split_whitespace().map(number).collect()
}

impl Eval {
    /// Times of both models with 1 and 2 threads, as (model, threads, times).
    fn bench(&self, models: &[Model; 2], data: &Data, rounds: usize) -> Result<Vec<(String, usize, Latency)>> {
        let mut first = None;
        data.each(&mut |sample, _| {
            first = Some(sample);
            Ok(false)
        })?;
        let sample = first.unwrap_or_default();
        let outputs: Vec<String> = models[0].graph().output.iter().map(|o| o.name().to_owned()).collect();
        let paths = [&self.reference, &self.model].map(|path| path.display().to_string());
        let mut found = Vec::new();
        for threads in [1, 2] {
            let runners = self.engine.onnx_runtime(models, &[], threads)?;
            let runners: Vec<_> = runners.iter().map(Box::as_ref).collect();
            let times = latencies(&runners, &sample, &outputs, rounds)?;
            found.extend(paths.iter().cloned().zip(times).map(|(path, times)| (path, threads, times)));
        }
        Ok(found)
    }
}

impl Run for Eval {
    fn run(self, session: &Session) -> Result<()> {
        let mut models = [Model::open(&self.reference)?, Model::open(&self.model)?];
        let mut outputs: Vec<String> = models[0].graph().output.iter().map(|o| o.name().to_owned()).collect();
        for name in tensors(&models, &self.tensors)? {
            if !outputs.contains(&name) {
                outputs.push(name);
            }
        }
        for model in &mut models {
            self.shapes.freeze(model)?;
        }
        let runners = self.engine.load(&models, &outputs, self.threads.count())?;
        let [reference, other] = runners.as_slice() else { bail!("two models were to be loaded") };
        let labels = self.labels.as_deref().map(labels).transpose()?;
        let data = self.preparation.open(session, &self.data, reference.inputs())?;
        let meter = Meter::new(session, "eval", "samples");
        meter.begin(data.count()?, 0);
        let (stop, labels) = (session.stop(), labels.as_deref());
        let report =
            evaluate(reference.as_ref(), other.as_ref(), &outputs, &data, labels, stop, &mut || meter.add_thing(""))?;
        drop(meter);
        let times = match self.bench {
            Some(rounds) => self.bench(&models, &data, rounds.get())?,
            None => Vec::new(),
        };
        if session.json {
            let mut value = serde_json::to_value(&report)?;
            if self.bench.is_some() {
                let row = |(model, threads, times): &(String, usize, Latency)| {
                    json!({"model": model, "threads": threads, "lower_decile_ms": times.lower_decile_ms,
                        "median_ms": times.median_ms})
                };
                value["latency"] = times.iter().map(row).collect();
            }
            output::json(&value)?;
        } else {
            output::say(&format!("{} samples\n{}", report.samples, table(&report).render()))?;
            if !times.is_empty() {
                let mut table = Table::new(&["model", "threads", "ms, lower decile", "ms, median"]);
                for (model, threads, times) in times {
                    let ms = [times.lower_decile_ms, times.median_ms].map(|t| format!("{t:.2}"));
                    table.row([vec![model, threads.to_string()], ms.to_vec()].concat());
                }
                output::say(&table.render())?;
            }
        }
        if let Some(least) = self.min_sqnr
            && let Some(bad) = report.outputs.iter().find(|o| o.sqnr_db.is_some_and(|db| db < least))
        {
            bail!("output `{}`: {:.2} dB, below {least} dB", bad.name, bad.sqnr_db.unwrap_or_default());
        }
        Ok(())
    }
}

fn table(report: &Report) -> Table {
    let percent = |share: f64| format!("{:.1}", share * 100.0);
    let mut head = vec!["output", "SQNR dB", "cosine", "max error", "top-1 %", "top-5 %", "nn %", "KL"];
    if report.outputs.iter().any(|o| o.accuracy.is_some()) {
        head.extend(["accuracy % float", "this"]);
    }
    let mut table = Table::new(&head);
    for output in &report.outputs {
        let mut row = vec![
            output.name.clone(),
            output.sqnr_db.map_or("-".into(), |db| format!("{db:.2}")),
            format!("{:.5}", output.cosine),
            format!("{:.3e}", output.max_error),
            percent(output.top1),
            percent(output.top5),
            output.nearest.map_or("-".into(), percent),
            output.kl.map_or("-".into(), |kl| format!("{kl:.4}")),
        ];
        row.extend(output.accuracy.into_iter().flatten().map(percent));
        table.row(row);
    }
    table
}
