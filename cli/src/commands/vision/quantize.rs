//! `nibble vision quantize`: fold, plan, calibrate, write.

use super::data::{Preparation, Shapes};
use super::mixed::{MixedPrecision, text, to_json};
use super::quantized::{self, Made};
use super::recipe::{Recipe, open};
use crate::arguments::Threads;
use crate::commands::Run;
use crate::failure::Usage;
use crate::output::{self, Table};
use crate::progress::Meter;
use crate::session::Session;
use anyhow::Result;
use nibble_quant::onnx::plan::{Decision, PlannedNode};
use nibble_quant::onnx::report::{Report, report};
use nibble_quant::onnx::{External, Mode, Plan, plan};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Instant;

/// Quantize an ONNX model to 8-bit integers, with scales found by running it over samples
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: nibble vision quantize model.onnx -o model-int8.onnx --calib photos --crops 8

Static quantization (the default) needs --calib: a folder of pictures, or .npy, .npz and .safetensors files of inputs.
With --calib, dynamic quantization equalizes channels and corrects biases, too.
Patterns of --include and --exclude are names of nodes with * and ?, or op:CONV, or weight:NAME.
--dry-run shows what would become of every node, and why.
With --target-..., --max-size or --max-latency, layers that cost most in integers get activations in two terms, or stay float, until the
model reaches what is wanted, measured on the samples of --judge.")]
pub struct Quantize {
    /// The float model
    #[arg(value_name = "MODEL.onnx")]
    model: PathBuf,
    /// The quantized model to write
    #[arg(long, short, value_name = "OUT.onnx", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// Replace it if it is there
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    recipe: Recipe,
    #[command(flatten)]
    mixed: MixedPrecision,
    /// Show range and step of every activation, and what rounding took from every weight (with --json it is always there)
    #[arg(long)]
    tensors: bool,
    /// Also write a page (HTML, one file): the whole on the samples of --judge or --calib, each layer, each tensor
    #[arg(long, value_name = "FILE.html", requires = "output")]
    report: Option<PathBuf>,
    /// Show what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    shapes: Shapes,
    #[command(flatten)]
    preparation: Preparation,
    #[command(flatten)]
    threads: Threads,
}

impl Run for Quantize {
    fn run(self, session: &Session) -> Result<()> {
        let started = Instant::now();
        for path in self.output.iter().chain(&self.report).filter(|_| !self.dry_run) {
            output::may_write(path, self.force)?;
        }
        self.threads.set_for_conversion()?;
        let threads = self.threads.count();
        let opened = open(session, &self.model, &self.shapes, threads)?;
        if self.dry_run {
            let plan = plan(&opened.0, &self.recipe.settings()?, &opened.1)?;
            return show(session, &plan, opened.1.into.len());
        }
        let mode = self.recipe.settings()?.mode;
        let goal = self.mixed.goal(mode)?;
        if self.report.is_some() && mode != Mode::Static {
            return Err(Usage("--report: static quantization alone has figures of activations".into()).into());
        }
        let (prepared, samples) = self.recipe.prepare(session, opened, &self.preparation, threads)?;
        let samples_of = match goal.is_some() || self.report.is_some() {
            true => {
                let calib = self.recipe.samples(session, &self.preparation, &prepared.model)?;
                Some((calib, self.mixed.judge(session, &prepared, &self.preparation)?))
            }
            false => None,
        };
        let samples_of = samples_of.as_ref().map(|(calib, own)| [calib, own.as_ref().unwrap_or(calib)]);
        let mixed = match (goal, samples_of) {
            (Some(goal), Some(data)) => Some(self.mixed.run(session, goal, &prepared, data, threads)?),
            _ => None,
        };
        let plain;
        let (prepared, quantized) = match &mixed {
            Some(mixed) => (&mixed.prepared, &mixed.model),
            None => {
                plain = prepared.quantize()?;
                (&prepared, &plain)
            }
        };
        let plan = &prepared.plan;
        let Some(output) = &self.output else { return Ok(()) };
        let tensors = match session.json || self.tensors {
            true => report(&prepared.model, quantized)?,
            false => Report::default(),
        };
        quantized.save(output, External::Auto)?;
        if let (Some(path), Some([calib, data])) = (&self.report, samples_of) {
            let options = self.recipe.options(session, threads)?;
            let files = [self.model.as_path(), output.as_path()];
            let made = Made { files, prepared, quantized, mixed: mixed.as_ref(), data, calib, options };
            let meter = Meter::new(session, "report", "samples");
            meter.begin(quantized::steps(&made)?, 0);
            quantized::page(&made, &mut || meter.add_thing(""))?.save(path)?;
        }
        let bytes = |path: &PathBuf| std::fs::metadata(path).map(|m| m.len()).unwrap_or_default();
        let seconds = started.elapsed().as_secs_f64();
        if session.json {
            let mixed = mixed.as_ref().map(to_json).transpose()?;
            return output::json(&json!({
                "path": output, "mixed": mixed, "quantized_nodes": plan.quantized(), "nodes": plan.nodes.len(),
                "samples": samples, "bytes_in": bytes(&self.model), "bytes_out": bytes(output), "seconds": seconds,
                "peak_rss_bytes": output::peak_rss(), "activations": tensors.activations, "weights": tensors.weights,
            }));
        }
        if self.tensors {
            print_report(&tensors)?;
        }
        if let Some(mixed) = &mixed {
            output::say(&text(mixed))?;
        }
        let peak = output::peak_rss().map_or(String::new(), |rss| format!(", peak {}", output::bytes(rss)));
        session.remark(format!("{}{peak}", crate::progress::duration(seconds)));
        if let Some(caution) = self.recipe.caution() {
            session.remark(caution);
        }
        output::say(&format!(
            "{}: {} of {} nodes in integers, {} -> {}",
            output.display(),
            plan.quantized(),
            plan.nodes.len(),
            output::bytes(bytes(&self.model)),
            output::bytes(bytes(output))
        ))
    }
}

/// Prints what became of each tensor.
fn print_report(report: &Report) -> Result<()> {
    let mut table = Table::new(&["activation", "from", "to", "step", "zero point"]);
    for row in &report.activations {
        let numbers = [row.range[0], row.range[1], row.scale].map(|v| format!("{v:.4e}"));
        table.row([vec![row.tensor.clone()], numbers.to_vec(), vec![row.zero_point.to_string()]].concat());
    }
    output::say(&table.render())?;
    let mut table = Table::new(&["constant", "bits", "scales", "SQNR dB"]);
    for row in &report.weights {
        let db = row.sqnr_db.map_or("-".into(), |db| format!("{db:.1}"));
        table.row(vec![row.tensor.clone(), row.bits.to_string(), row.scales.to_string(), db]);
    }
    output::say(&table.render())
}

fn words(decision: &Decision) -> (String, String) {
    match decision {
        Decision::Quantized(kind) => ("integer".into(), kind.name().into()),
        Decision::Merged(clip) => ("merged".into(), format!("range {}..{} of the node before", clip.lo, clip.hi)),
        Decision::Float(why) => ("float".into(), why.clone()),
    }
}

fn node_json(node: &PlannedNode) -> Value {
    let (becomes, why) = words(&node.decision);
    json!({"node": node.name, "op": node.op, "group": node.group, "becomes": becomes, "why": why})
}

fn show(session: &Session, plan: &Plan, folded: usize) -> Result<()> {
    if session.json {
        return output::json(&json!({
            "folded": folded, "nodes": plan.nodes.iter().map(node_json).collect::<Vec<_>>(),
            "quantized_tensors": plan.scales,
        }));
    }
    let mut table = Table::new(&["node", "operator", "part of", "becomes", "why"]);
    for node in &plan.nodes {
        let (becomes, why) = words(&node.decision);
        table.row(vec![node.name.clone(), node.op.clone(), node.group.unwrap_or_default().into(), becomes, why]);
    }
    output::say(&table.render())?;
    output::say(&format!(
        "{folded} nodes folded away; {} of {} nodes in integers, {} tensors quantized",
        plan.quantized(),
        plan.nodes.len(),
        plan.scales.len()
    ))
}
