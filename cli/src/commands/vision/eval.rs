//! `nibble vision eval`: a quantized model against its reference.

use super::data::{Preparation, Shapes};
use crate::arguments::Threads;
use crate::commands::Run;
use crate::output::{self, Table};
use crate::progress::Meter;
use crate::session::Session;
use anyhow::{Context, Result, bail};
use nibble_models::graph::{GraphRunner, Rten};
use nibble_models::vision::evaluate::{Report, evaluate};
use nibble_quant::onnx::Model;
use std::path::PathBuf;

/// Compare a model's outputs with its reference's over samples: same top class, SQNR, cosine, nearest neighbour
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: nibble vision eval model.onnx model-int8.onnx --data photos --crops 8

Both models run in the embedded engine, which computes QuantizeLinear and DequantizeLinear as they are written. top-1 is
the share of samples with the same largest value, nn the share whose nearest neighbour among the samples is the same.")]
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
    /// Also compare these tensors, if both models have them
    #[arg(long = "tensor", value_name = "NAME")]
    tensors: Vec<String>,
    /// Fail if the SQNR of an output is below this
    #[arg(long, value_name = "DB")]
    min_sqnr: Option<f64>,
    #[command(flatten)]
    shapes: Shapes,
    #[command(flatten)]
    preparation: Preparation,
    #[command(flatten)]
    threads: Threads,
}

impl Run for Eval {
    fn run(self, session: &Session) -> Result<()> {
        let mut models = [Model::open(&self.reference)?, Model::open(&self.model)?];
        let mut outputs: Vec<String> = models[0].graph().output.iter().map(|o| o.name().to_owned()).collect();
        outputs.extend(self.tensors.iter().cloned());
        for model in &mut models {
            self.shapes.freeze(model)?;
        }
        let threads = self.threads.count();
        let reference = Rten::new(&models[0], &outputs, threads)?;
        let other = Rten::new(&models[1], &outputs, threads)?;
        let labels = match &self.labels {
            Some(path) => {
                let text = std::fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))?;
                let numbers = text.split_whitespace().map(|word| {
                    word.parse::<usize>().with_context(|| format!("{}: `{word}` is no class", path.display()))
                });
                Some(numbers.collect::<Result<Vec<usize>>>()?)
            }
            None => None,
        };
        let data = self.preparation.open(&self.data, reference.inputs())?;
        let meter = Meter::new(session, "eval", "samples");
        meter.begin(data.count()?, 0);
        let report = evaluate(&reference, &other, &outputs, &data, labels.as_deref(), session.stop(), &mut || {
            meter.add_thing("")
        })?;
        drop(meter);
        match session.json {
            true => output::json(&report)?,
            false => output::say(&format!("{} samples\n{}", report.samples, table(&report).render()))?,
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
    let mut head = vec!["output", "SQNR dB", "cosine", "max error", "top-1 %", "top-5 %", "nn %"];
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
        ];
        row.extend(output.accuracy.into_iter().flatten().map(percent));
        table.row(row);
    }
    table
}
