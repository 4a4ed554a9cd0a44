//! `nibble vision quantize`: fold, plan, calibrate, write.

use super::data::{Preparation, Shapes, may_write};
use crate::arguments::Threads;
use crate::commands::Run;
use crate::failure::Usage;
use crate::output::{self, Table};
use crate::progress::Meter;
use crate::session::Session;
use anyhow::Result;
use nibble_models::graph::{fold_model, inputs};
use nibble_models::vision::calibrate::{
    CalibrateOptions, calibrate, equalize_and_calibrate, equalize_channels, one_run_is_enough,
};
use nibble_quant::observer::{self, IntGrid, IntType};
use nibble_quant::onnx::plan::{Decision, PlannedNode};
use nibble_quant::onnx::report::{Report, report};
use nibble_quant::onnx::weights::Rounding;
use nibble_quant::onnx::{
    Calibration, External, Fine, Folded, Mode, Model, Packing, Plan, Selector, Settings, Target, opset, plan, qdq,
};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Instant;

/// Quantize an ONNX model to 8-bit integers, with scales found by running it over samples
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: nibble vision quantize model.onnx -o model-int8.onnx --calib photos --crops 8

Static quantization (the default) needs --calib: a folder of pictures, or .npy, .npz and .safetensors files of inputs.
With --calib, dynamic quantization equalizes channels and corrects biases, too.
Patterns of --include and --exclude are names of nodes with * and ?, or op:CONV, or weight:NAME.
--dry-run shows what would become of every node, and why.")]
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
    /// Samples to calibrate with: a folder of pictures or arrays, or one of them
    #[arg(long, value_name = "DATA")]
    calib: Option<PathBuf>,
    /// static, dynamic (linear layers, scales found at run time), or weights (linear layers, floats computed)
    #[arg(long, value_enum, default_value_t)]
    mode: ModeWord,
    /// How ranges are found: minmax, average, percentile[:99.999], entropy, mse, ...
    #[arg(long, value_name = "NAME", default_value = "minmax")]
    observer: String,
    /// Type of activations
    #[arg(long, value_enum, default_value_t)]
    activations: TypeWord,
    /// Zero points in the middle of the activations' type
    #[arg(long)]
    symmetric: bool,
    /// One scale a weight instead of one an output channel
    #[arg(long)]
    per_tensor: bool,
    /// Weights of 7 bits, for processors without VNNI: their sums of two products saturate at 16 bits
    #[arg(long)]
    reduce_range: bool,
    /// What rounds weights: rtn, clip, search or gptq
    #[arg(long, value_name = "NAME", default_value = "rtn")]
    algorithm: String,
    /// Bits of weights with --mode weights: 4 or 8
    #[arg(long, value_name = "BITS", default_value_t = 8)]
    bits: u8,
    /// Values that share a scale with --mode weights
    #[arg(long, value_name = "N", default_value_t = 32)]
    group: usize,
    /// How the file says packed weights: ONNX Runtime's MatMulNBits, or DequantizeLinear with blocks (ONNX's own, opset 21)
    #[arg(long, value_name = "FORM", value_enum, default_value_t)]
    packing: PackingWord,
    /// Quantize only layers that fit this pattern (may be repeated)
    #[arg(long, value_name = "PATTERN")]
    include: Vec<Selector>,
    /// Leave nodes that fit this pattern in float (may be repeated)
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<Selector>,
    /// Quantize products of two activations too
    #[arg(long)]
    attention: bool,
    /// Quantize convolutions even where they become slower
    #[arg(long)]
    force_conv: bool,
    /// Take activations of these linear layers in two terms, a second product and hardly any error of activations: gelu (those
    /// that read what a GELU makes), mlp (those before GELUs too), all, or a pattern (may be repeated) [default: gelu]
    #[arg(long, value_name = "WHICH", conflicts_with = "no_fine")]
    fine: Vec<Fine>,
    /// Take activations of all layers in one term
    #[arg(long)]
    no_fine: bool,
    /// Multiply ranges by this: values of other samples are larger than those of the few that are seen [default: 1.1 with
    /// minmax, 1 with observers that cut values off]
    #[arg(long, value_name = "FACTOR", value_parser = headroom)]
    headroom: Option<f32>,
    /// Leave the ranges of channels as they are
    #[arg(long)]
    no_equalize: bool,
    /// Leave biases as they are
    #[arg(long)]
    no_bias_correction: bool,
    /// The runtime to quantize for
    #[arg(long, value_enum, default_value_t)]
    target: TargetWord,
    /// Show range and step of every activation, and what rounding took from every weight (with --json it is always there)
    #[arg(long)]
    report: bool,
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

#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum ModeWord {
    #[default]
    Static,
    Dynamic,
    Weights,
}

#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum PackingWord {
    #[default]
    Matmulnbits,
    Blocks,
}

#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum TypeWord {
    #[default]
    U8,
    S8,
    U16,
    S16,
}

#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum TargetWord {
    #[default]
    Onnxruntime,
    Tensorrt,
}

/// What smallest and largest values are multiplied by.
const HEADROOM: f32 = 1.1;

/// Reads a factor for ranges.
fn headroom(text: &str) -> Result<f32, String> {
    let factor = text.parse::<f32>().ok().filter(|f| (0.1..=10.0).contains(f));
    factor.ok_or_else(|| format!("`{text}`: a factor from 0.1 to 10 is possible"))
}

impl Quantize {
    fn settings(&self) -> Result<Settings> {
        let mode = match self.mode {
            ModeWord::Static => Mode::Static,
            ModeWord::Dynamic => Mode::Dynamic,
            ModeWord::Weights => Mode::WeightOnly {
                bits: self.bits,
                group: self.group,
                form: match self.packing {
                    PackingWord::Matmulnbits => Packing::MatMulNBits,
                    PackingWord::Blocks => Packing::Blocks,
                },
            },
        };
        let target = match self.target {
            TargetWord::Onnxruntime => Target::OnnxRuntime,
            TargetWord::Tensorrt => Target::TensorRt,
        };
        let int = match self.activations {
            TypeWord::U8 => IntType::U8,
            TypeWord::S8 => IntType::S8,
            TypeWord::U16 => IntType::U16,
            TypeWord::S16 => IntType::S16,
        };
        // TensorRT has one grid only.
        let activation = match target {
            Target::TensorRt => IntGrid::symmetric(IntType::S8),
            Target::OnnxRuntime => IntGrid { int, symmetric: self.symmetric, unused: 0 },
        };
        Ok(Settings {
            mode,
            target,
            activation,
            weights: Rounding {
                per_channel: !self.per_tensor,
                bits: if self.reduce_range { 7 } else { 8 },
                algorithm: nibble_quant::algo::algorithm(&self.algorithm)?.name,
            },
            include: self.include.clone(),
            exclude: self.exclude.clone(),
            attention: self.attention,
            force_conv: self.force_conv,
            fine: match (self.no_fine, self.fine.as_slice()) {
                (false, []) => vec![Fine::Gelu],
                (_, named) => named.to_vec(),
            },
        })
    }

    /// Plans the folded model, and calibrates it where scales are static; how many samples that took.
    fn prepare(&self, session: &Session, model: &mut Model, folded: &Folded) -> Result<(Plan, Calibration, usize)> {
        let settings = self.settings()?;
        let uncalibrated = match settings.mode {
            Mode::Static => false,
            Mode::Dynamic => self.calib.is_none(),
            Mode::WeightOnly { .. } => true,
        };
        if uncalibrated || self.dry_run {
            return Ok((plan(model, &settings, folded)?, Calibration::default(), 0));
        }
        let observer = observer::choose(&self.observer)?;
        let Some(calib) = &self.calib else {
            return Err(Usage("--calib is needed: scales are found by running the model over samples".into()).into());
        };
        let data = self.preparation.open(session, calib, &inputs(model))?;
        let options = CalibrateOptions {
            observer,
            threads: self.threads.count(),
            correct_bias: !self.no_bias_correction,
            headroom: self.headroom.unwrap_or(if observer.observer.name == "minmax" { HEADROOM } else { 1.0 }),
            stop: session.stop(),
        };
        let make = |model: &Model| plan(model, &settings, folded);
        let plan = make(model)?;
        let once = !self.no_equalize && one_run_is_enough(&plan, &options);
        let meter = Meter::new(session, "calibrate", "samples");
        meter.begin((2 - u64::from(self.no_equalize || once)) * data.count()?, 0);
        let mut samples = 0;
        let mut count = || {
            samples += 1;
            meter.add_thing("ranges");
        };
        let (plan, calibration) = match (self.no_equalize, once) {
            (true, _) => {
                let calibration = calibrate(model, &plan, &data, &options, &mut count)?;
                (plan, calibration)
            }
            (_, true) => equalize_and_calibrate(model, &make, &data, &options, &mut count)?,
            (_, false) => {
                equalize_channels(model, &plan, &data, &options, &mut || meter.add_thing("channels"))?;
                let plan = make(model)?;
                let calibration = calibrate(model, &plan, &data, &options, &mut count)?;
                (plan, calibration)
            }
        };
        Ok((plan, calibration, samples))
    }
}

impl Run for Quantize {
    fn run(self, session: &Session) -> Result<()> {
        let started = Instant::now();
        if let Some(output) = self.output.as_ref().filter(|_| !self.dry_run) {
            may_write(output, self.force)?;
        }
        self.threads.set_for_conversion()?;
        let mut model = Model::open(&self.model)?;
        if !model.unknown.is_empty() {
            let fields: Vec<&str> = model.unknown.iter().map(String::as_str).collect();
            session.remark(format!("fields that this version doesn't know are dropped: {}", fields.join(", ")));
        }
        self.shapes.freeze(&mut model)?;
        opset::upgrade(&mut model)?;
        let folded = fold_model(&mut model, self.threads.count())?;
        let (plan, calibration, samples) = self.prepare(session, &mut model, &folded)?;
        if self.dry_run {
            return show(session, &plan, folded.into.len());
        }
        let quantized = qdq::quantize(&model, &plan, &calibration)?;
        let Some(output) = &self.output else { return Ok(()) };
        let tensors = match session.json || self.report {
            true => report(&model, &quantized)?,
            false => Report::default(),
        };
        quantized.save(output, External::Auto)?;
        let bytes = |path: &PathBuf| std::fs::metadata(path).map(|m| m.len()).unwrap_or_default();
        let seconds = started.elapsed().as_secs_f64();
        if session.json {
            return output::json(&json!({
                "path": output, "quantized_nodes": plan.quantized(), "nodes": plan.nodes.len(),
                "samples": samples, "bytes_in": bytes(&self.model), "bytes_out": bytes(output), "seconds": seconds,
                "peak_rss_bytes": output::peak_rss(), "activations": tensors.activations, "weights": tensors.weights,
            }));
        }
        if self.report {
            print_report(&tensors)?;
        }
        let peak = output::peak_rss().map_or(String::new(), |rss| format!(", peak {}", output::bytes(rss)));
        session.remark(format!("{}{peak}", crate::progress::duration(seconds)));
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
