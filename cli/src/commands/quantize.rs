//! `nibble quantize`: a checkpoint becomes small.

mod page;
mod sequential;

use super::Run;
use super::calibrate::{CalibrationWords, in_words};
use crate::arguments::Threads;
use crate::classes::{bits_per_weight, class, group, is_linear};
use crate::gate::{self, Gate, GateWords};
use crate::origin::{Origin, open, rotations, turn};
use crate::output::{self, Table};
use crate::planning::Wishes;
use crate::progress::{Meter, duration};
use crate::session::Session;
use anyhow::{Context as _, Result};
use clap::ValueEnum;
use clap::builder::{PossibleValue, PossibleValuesParser};
use nibble_models::eval::{EvalPlan, beginning};
use nibble_models::sensitivity::{AllocationPlan, Target, allocate_bits};
use nibble_models::trial::{TEXT, TrialReport};
use nibble_quant::convert::{self, Judge, Options, Plan, Report};
use nibble_quant::format::{OutputOptions, Stored, TensorInfo};
use nibble_quant::manifest::TensorRecord;
use nibble_quant::stats::{Stats, Turn};
use nibble_quant::{ALGORITHMS, QuantError, Recipe, Role, presets};
use sequential::SequentialWords;
use serde::Serialize;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Quantize a checkpoint: linear layers to --scheme, embedding and output head to 8 bits, the rest as it is
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: nibble quantize SmolLM2-135M-Instruct -o smol-int4
Example: nibble quantize MODEL.gguf -o smol-int4
Example: nibble quantize ORG/NAME -o small --scheme int4-g64 --keep '*.layers.0.*' --dry-run

The output appears under its name only when it is whole and verified. A run that was stopped goes on with --resume.")]
pub struct Quantize {
    /// Checkpoint folder or file in floats, GGUF file, or ORG/NAME on the hub
    #[arg(value_name = "SRC")]
    source: String,
    /// Folder to write
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    #[command(flatten)]
    wishes: Wishes,
    #[command(flatten)]
    calibration: CalibrationWords,
    /// Statistics that `nibble calibrate` has written, or an imatrix of llama.cpp
    #[arg(long, value_name = "FILE")]
    stats: Option<PathBuf>,
    #[command(flatten)]
    sequential: SequentialWords,
    /// How much work to put into codes where a scheme leaves it open
    #[arg(long, value_enum, value_name = "HOW", default_value_t = Effort::Balanced)]
    effort: Effort,
    /// The algorithm of linear layers where neither a scheme nor a rule insists on another, whatever the effort
    #[arg(long, value_name = "NAME", value_parser = algorithms())]
    algorithm: Option<String>,
    /// Give each linear layer 3 to 8 bits such that all take this many a weight on average, by what they are measured to
    /// cost the model
    #[arg(long, value_name = "BITS", conflicts_with = "recipe")]
    target_bpw: Option<f64>,
    /// The same such that they take this many MB (10^6 bytes) together
    #[arg(long, value_name = "MB", conflicts_with_all = ["recipe", "target_bpw"])]
    target_size: Option<f64>,
    /// The same with as few bytes as are predicted to cost the model at most this many nats of KL divergence
    #[arg(long, value_name = "NATS", conflicts_with_all = ["recipe", "target_bpw", "target_size"])]
    target_kl: Option<f64>,
    /// Keep a scheme's own levels; otherwise calibration and --effort balanced or max learn 16 levels for each layer whose
    /// scheme has a table of them
    #[arg(long)]
    fixed_levels: bool,
    /// Turn the residual stream before anything is quantized, so that large values are spread over all columns; the output
    /// head gets weights of its own
    #[arg(long, value_name = "HOW", conflicts_with = "recipe", value_parser = rotations())]
    rotate: Option<String>,
    /// Write the rules that were carried out to a TOML file, for --recipe
    #[arg(long, value_name = "FILE")]
    save_recipe: Option<PathBuf>,
    /// Also write a page (HTML, one file) that shows sizes, errors of each tensor, and the trial
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// Print what would be done and the memory it would take, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Go on where an earlier run was stopped
    #[arg(long)]
    resume: bool,
    /// Replace the output if it is a checkpoint
    #[arg(long)]
    force: bool,
    /// Seed of algorithms that draw random numbers
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    gate: GateWords,
    #[command(flatten)]
    threads: Threads,
}

/// The table of algorithms as words to type.
fn algorithms() -> PossibleValuesParser {
    PossibleValuesParser::new(ALGORITHMS.iter().map(|a| PossibleValue::new(a.name).help(a.summary)))
}

/// How much work to put into codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Effort {
    /// Plain rounding
    Fast,
    /// Searched scales; with --calib or --stats weighted by them, and GPTQ where there are Gram matrices
    Balanced,
    /// The same, and codes and scales that GPTQ has left are changed as long as that helps
    Max,
}

impl Effort {
    /// Names the algorithm in rules for linear layers that leave it open, where the scheme doesn't insist on plain
    /// rounding.
    fn apply(self, recipe: &mut Recipe, calibrated: bool, named: Option<&str>) {
        let algorithm = match (named, self) {
            (Some(named), _) => named,
            (None, Effort::Fast) => "rtn",
            (None, Effort::Balanced) if calibrated => "gptq",
            (None, Effort::Max) if calibrated => "yaqa",
            (None, Effort::Balanced | Effort::Max) => return,
        };
        for rule in recipe.rules.iter_mut().filter(|rule| rule.algorithm.is_none()) {
            let linear = rule.role.is_none_or(|role| role == Role::Linear);
            let open = |name: &String| presets::by_name(name).map_or(true, |preset| preset.algorithm == "search");
            if linear && rule.scheme.as_ref().is_some_and(open) {
                rule.algorithm = Some(algorithm.to_string());
            }
        }
    }
}

impl Run for Quantize {
    fn run(self, session: &Session) -> Result<()> {
        self.threads.set_for_conversion()?;
        self.report.iter().try_for_each(|file| output::may_write(file, self.force))?;
        let mut recipe = self.wishes.recipe()?;
        let path = crate::hub::checkpoint(session, &self.source)?;
        if self.rotate.is_some() {
            recipe.rotate.clone_from(&self.rotate);
        }
        let rotation = recipe.rotate.clone().map(|rotation| Turn { rotation, seed: self.seed });
        let observed = self.stats.as_deref().map(Stats::read).transpose()?;
        if let Some(stats) = &observed {
            stats.check_turn(rotation.as_ref())?;
        }
        let (opened, mut extra) = open(&path)?;
        let coded = |info: &&TensorInfo| matches!(info.stored, Stored::Blocks(block) if block.plain.is_none());
        if let Some(TensorInfo { name, stored, .. }) = opened.infos().iter().find(coded) {
            let (path, stored) = (path.display(), stored.name());
            session.remark(format!("{path}: `{name}` is {stored} already; quantizing again adds to its error"));
        }
        let turned = turn(&*opened, rotation.as_ref())?;
        let origin = Origin::new(&path, &*opened, turned.as_deref())?;
        let source = origin.source();
        origin.add_config(&mut extra);
        let calibrated = self.calibration.calib.is_some() || self.stats.is_some();
        self.effort.apply(&mut recipe, calibrated, self.algorithm.as_deref());
        let gate = match self.dry_run {
            true => None,
            false => self.gate.gate(session, &path, calibrated, self.force, self.threads.count())?,
        };
        let by_blocks = self.by_blocks(source, &recipe)?;
        let stats = match (&self.calibration.calib, observed) {
            (_, Some(stats)) => stats,
            // Each block is observed when its turn comes; only an allocation has to know all of them before.
            (Some(_), None) if by_blocks && self.target().is_none() => Stats::default(),
            (Some(text), None) => {
                let calibration = self.calibration.run(session, &origin, text, self.threads)?;
                output::remark(&format!("calibrated: {}", in_words(&calibration)));
                calibration.stats
            }
            (None, None) => Stats::default(),
        };
        if let Some(target) = self.target() {
            recipe = self.allocate(session, &origin, &recipe, &stats, target)?;
        }
        let mut blocks = None;
        if by_blocks && !self.dry_run {
            let made = self.quantize_blocks(session, &origin, &recipe)?;
            recipe = made.recipe(source, &recipe)?;
            blocks = Some(Arc::new(made));
        } else if calibrated && self.learns_levels() {
            recipe = convert::with_learned_levels(source, &recipe, &stats, session.stop())?;
        }
        if let Some(file) = &self.save_recipe {
            std::fs::write(file, recipe.to_toml()?).with_context(|| format!("can't write {}", file.display()))?;
        }
        let plan = convert::plan_after(source, &recipe, &stats, blocks.as_ref(), self.seed)?;
        if self.dry_run {
            say_fallbacks(&convert::fallbacks(&plan, &stats));
            return print_plan(session, &plan);
        }
        let judge = |dir: &Path| gate.as_ref().map_or(Ok(()), |gate| gate.judge(dir));
        let options = Options {
            output: OutputOptions { force: self.force, resume: self.resume },
            seed: self.seed,
            stop: Some(session.stop()),
            extra,
            judge: Some(Judge(&judge)),
            ..Options::default()
        };
        let meter = Meter::new(session, "quantize", "tensors");
        let report = convert::quantize(&plan, source, &recipe.to_toml()?, &self.output, &options, &meter);
        drop(meter);
        // After anything else another run may go on from the blocks.
        if matches!(report, Ok(_) | Err(QuantError::Rejected { .. })) {
            blocks.iter().try_for_each(|blocks| blocks.remove())?;
        }
        let mut report = report?;
        // What was read, not the floats that it was turned into.
        report.bytes_in = opened.infos().iter().map(|info| info.bytes as u64).sum();
        let fallbacks = convert::fallbacks(&plan, &stats);
        say_fallbacks(&fallbacks);
        let trial = gate.as_ref().and_then(Gate::report);
        if let Some(file) = &self.report {
            page::page(&self.source, &self.output, &report, trial).save(file)?;
        }
        print_report(session, &self.wishes, &report, &fallbacks, trial)
    }
}

impl Quantize {
    /// Whether tables of levels are fitted to each layer.
    fn learns_levels(&self) -> bool {
        self.effort != Effort::Fast && !self.fixed_levels && self.wishes.recipe.is_none()
    }

    fn target(&self) -> Option<Target> {
        let bits = self.target_bpw.map(Target::Bits);
        let bytes = self.target_size.map(|megabytes| Target::Bytes((megabytes * 1e6) as u64));
        bits.or(bytes).or(self.target_kl.map(Target::Divergence))
    }

    /// The recipe with bits allocated to layers, measured on the text that is built in.
    fn allocate(
        &self,
        session: &Session,
        origin: &Origin<'_>,
        recipe: &Recipe,
        stats: &Stats,
        target: Target,
    ) -> Result<Recipe> {
        let tokenizer = origin.tokenizer()?;
        let tokens = tokenizer.encode(TEXT, false)?;
        let eval = EvalPlan { n_ctx: 256, chunks: Some(4), bos: beginning(&tokenizer)? };
        let plan = AllocationPlan { target, tokens: &tokens, eval, threads: self.threads.count() };
        let config = origin.config()?;
        let meter = Meter::new(session, "measure", "classes of layers");
        let allocation = allocate_bits(origin.source(), &config, recipe, stats, &plan, |done, of| {
            if done == 1 {
                meter.begin(of as u64, 0);
            }
            meter.add_thing("");
            !session.stopped()
        });
        drop(meter);
        let allocation = allocation?;
        if session.talks() {
            let mut counts = String::new();
            for (scheme, members) in group(&allocation.layers, |layer| layer.scheme.as_str()) {
                counts.push_str(&format!(", {} {scheme}", members.len()));
            }
            let (bits, nats) = (allocation.bits, allocation.predicted);
            session.remark(format!("{bits:.3} bits a linear weight, predicted to cost {nats:.4} nats{counts}"));
        }
        Ok(allocation.recipe)
    }
}

/// Tensors that GPTQ could do nothing for, counted and named by reason: on stderr, whatever else is silent.
fn say_fallbacks(fallbacks: &[(String, &'static str)]) {
    const NAMED: usize = 3;
    for (why, members) in group(fallbacks, |(_, why)| *why) {
        let names: Vec<&str> = members.iter().take(NAMED).map(|(name, _)| name.as_str()).collect();
        let more = members.len().saturating_sub(NAMED);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let count = members.len();
        output::remark(&format!("no GPTQ for {count} tensors, searched instead: {why}: {}{more}", names.join(", ")));
    }
}

/// Sums of bytes and weights.
#[derive(Default, Clone, Copy)]
struct Sums {
    bytes: u64,
    weights: u64,
}

impl Sums {
    fn of<'a>(tensors: impl Iterator<Item = (&'a [usize], u64)>) -> Sums {
        tensors.fold(Sums::default(), |sums, (shape, bytes)| Sums {
            bytes: sums.bytes + bytes,
            weights: sums.weights + shape.iter().product::<usize>() as u64,
        })
    }

    fn bits(self) -> f64 {
        bits_per_weight(self.bytes, self.weights)
    }
}

fn print_plan(session: &Session, plan: &Plan) -> Result<()> {
    let (before, after) = plan.bytes();
    let sized = || plan.rows.iter().map(|row| (row.name.as_str(), row.shape.as_slice(), row.bytes_after));
    let all = Sums::of(sized().map(|(_, shape, bytes)| (shape, bytes)));
    let linears = Sums::of(sized().filter(|(name, shape, _)| is_linear(name, shape)).map(|(_, s, bytes)| (s, bytes)));
    if session.json {
        let row = |row: &convert::PlanRow| {
            json!({
                "name": row.name, "shape": row.shape, "stored": row.stored, "scheme": row.label,
                "bytes_before": row.bytes_before, "bytes": row.bytes_after, "bits_per_weight": row.bits_per_weight,
                "why": row.why,
            })
        };
        return output::json(&json!({
            "peak_memory_bytes": plan.peak_memory, "bytes_in": before, "bytes_out": after,
            "bits_per_linear_weight": linears.bits(), "bits_per_weight_file": all.bits(),
            "tensors": plan.rows.iter().map(row).collect::<Vec<_>>(),
        }));
    }
    let mut table = Table::new(&["tensor", "shape", "from", "to", "bytes", "bits/weight", "why"]);
    for row in &plan.rows {
        table.row(vec![
            row.name.clone(),
            output::shape(&row.shape),
            row.stored.clone(),
            row.label.clone(),
            output::bytes(row.bytes_after),
            format!("{:.3}", row.bits_per_weight),
            row.why.clone(),
        ]);
    }
    output::say(&table.render())?;
    output::say(&format!(
        "\n{} -> {}; {:.3} bits per linear weight, {:.3} over the whole file",
        output::bytes(before),
        output::bytes(after),
        linears.bits(),
        all.bits()
    ))?;
    output::say(&format!("peak memory below {}: {}", output::bytes(plan.peak_memory), Plan::memory_rule()))
}

/// All tensors that are for the same and stored alike.
#[derive(Debug, Serialize)]
struct Class {
    class: String,
    stored: String,
    tensors: usize,
    bytes: u64,
    bits_per_weight: f64,
    quantized: bool,
    /// Null where nothing was lost.
    sqnr_db: Option<Sqnr>,
}

/// Signal over quantization noise, in dB, over the tensors of a class.
#[derive(Debug, Clone, Copy, Serialize)]
struct Sqnr {
    mean: f64,
    min: f64,
}

fn classes(tensors: &[TensorRecord]) -> Vec<Class> {
    let row = |((class, stored), members): ((String, &str), Vec<&TensorRecord>)| {
        let sums = Sums::of(members.iter().map(|t| (t.shape.as_slice(), t.bytes)));
        let noise: Vec<f64> = members.iter().filter_map(|t| t.sqnr_db).collect();
        let sqnr = (!noise.is_empty()).then(|| Sqnr {
            mean: noise.iter().sum::<f64>() / noise.len() as f64,
            min: noise.iter().copied().fold(f64::INFINITY, f64::min),
        });
        let (tensors, stored) = (members.len(), stored.to_string());
        let quantized = members.iter().any(|t| t.quantized);
        Class { class, stored, tensors, bytes: sums.bytes, bits_per_weight: sums.bits(), quantized, sqnr_db: sqnr }
    };
    group(tensors, |t| (class(&t.name), t.stored.as_str())).into_iter().map(row).collect()
}

fn print_report(
    session: &Session,
    wishes: &Wishes,
    report: &Report,
    fallbacks: &[(String, &'static str)],
    trial: Option<&TrialReport>,
) -> Result<()> {
    let sized = || report.tensors.iter().map(|t| (t.name.as_str(), t.shape.as_slice(), t.bytes));
    let all = Sums::of(sized().map(|(_, shape, bytes)| (shape, bytes)));
    let linears = Sums::of(sized().filter(|(name, shape, _)| is_linear(name, shape)).map(|(_, s, bytes)| (s, bytes)));
    let classes = classes(&report.tensors);
    if session.json {
        return output::json(&json!({
            "path": report.path, "scheme": wishes.recipe.is_none().then_some(&wishes.scheme),
            "recipe": wishes.recipe, "tensors": report.tensors.len(), "bytes_in": report.bytes_in,
            "bytes_out": report.bytes_out, "bits_per_linear_weight": linears.bits(),
            "bits_per_weight_file": all.bits(), "resumed": report.resumed, "seconds": report.seconds,
            "megabytes_per_second": report.megabytes_per_second(), "peak_rss_bytes": output::peak_rss(),
            "classes": classes, "trial": trial,
            "without_gptq": fallbacks.iter().map(|(name, why)| json!({"name": name, "why": why})).collect::<Vec<_>>(),
        }));
    }
    let mut table = Table::new(&["class", "tensors", "stored", "size", "bits/weight", "SQNR dB", "worst"]);
    for class in classes {
        let (mean, min) = match class.sqnr_db {
            Some(sqnr) => (format!("{:.2}", sqnr.mean), format!("{:.2}", sqnr.min)),
            None if class.quantized => ("exact".to_string(), "exact".to_string()),
            None => ("-".to_string(), "-".to_string()),
        };
        let (tensors, bits) = (class.tensors.to_string(), format!("{:.3}", class.bits_per_weight));
        table.row(vec![class.class, tensors, class.stored, output::bytes(class.bytes), bits, mean, min]);
    }
    output::say(&table.render())?;
    let resumed = match report.resumed {
        0 => String::new(),
        tensors => format!("; {tensors} tensors from an earlier run"),
    };
    let memory = output::peak_rss().map(|rss| format!(", peak memory {}", output::bytes(rss))).unwrap_or_default();
    output::say(&format!(
        "\n{}: {} -> {}; {:.3} bits per linear weight, {:.3} over the whole file\n{} in {} ({:.0} MB/s){memory}{resumed}",
        report.path.display(),
        output::bytes(report.bytes_in),
        output::bytes(report.bytes_out),
        linears.bits(),
        all.bits(),
        output::bytes(report.bytes_in),
        duration(report.seconds),
        report.megabytes_per_second()
    ))?;
    trial.map_or(Ok(()), |trial| output::say(&gate::in_words(trial)))
}
