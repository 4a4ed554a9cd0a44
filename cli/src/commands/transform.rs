//! `nibble transform`: a checkpoint rewritten without changing what it computes.

use super::Run;
use crate::arguments::Threads;
use crate::origin::rewritten;
use crate::output;
use crate::progress::{Meter, duration};
use crate::session::Session;
use anyhow::Result;
use clap::builder::PossibleValuesParser;
use nibble_models::{Sidecars, gguf_sidecars};
use nibble_quant::convert::{self, Options};
use nibble_quant::format::gguf::GgufCheckpoint;
use nibble_quant::format::{self, Dtype, OutputOptions, TensorSource};
use nibble_quant::stats::Stats;
use nibble_quant::transform::{Arguments, Kind, TRANSFORMS, transform};
use serde_json::json;
use std::path::PathBuf;

/// Rewrite a checkpoint without changing what it computes: fold norm gains into linears, rotate the residual stream, scale
/// columns
#[derive(Debug, clap::Args)]
#[command(after_help = format!("Example: nibble transform SmolLM2-135M-Instruct -o rotated --rotate hadamard --seed 1

{}

Weights are written in 32-bit floats; where the stream is turned the output head gets weights of its own. What was observed of a
model is not of the rewritten one: calibrate that anew.", rotations()))]
pub struct Transform {
    /// Checkpoint folder or GGUF file, or ORG/NAME on the hub
    #[arg(value_name = "SRC")]
    source: String,
    /// Folder to write
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// How the residual stream is turned, or columns are scaled
    #[arg(long, value_name = "HOW", default_value = "hadamard", value_parser = PossibleValuesParser::new(TRANSFORMS.iter().map(|t| t.name)))]
    rotate: String,
    /// Statistics that `nibble calibrate` has written, for `smooth` and `awq`
    #[arg(long, value_name = "FILE")]
    stats: Option<PathBuf>,
    /// Where randomness starts
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Replace the folder if it is a checkpoint
    #[arg(long)]
    force: bool,
    /// Go on where an earlier run was stopped
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    threads: Threads,
}

fn rotations() -> String {
    TRANSFORMS.iter().map(|t| format!("  {:10}{}", t.name, t.summary)).collect::<Vec<_>>().join("\n")
}

impl Run for Transform {
    fn run(self, session: &Session) -> Result<()> {
        self.threads.set_for_conversion()?;
        let path = crate::hub::checkpoint(session, &self.source)?;
        let (source, mut extra): (Box<dyn TensorSource>, _) = match format::detect(&path)?.name {
            "gguf" => {
                let source = GgufCheckpoint::open(&path)?;
                let extra = gguf_sidecars(&source, "float32")?.into_files();
                (Box::new(source), extra)
            }
            _ => {
                let config = Sidecars::folder(&path).need("config.json")?;
                (format::open(&path)?, vec![(PathBuf::from("config.json"), config)])
            }
        };
        let row = transform(&self.rotate)?;
        for (name, bytes) in extra.iter_mut().filter(|(name, _)| name.as_os_str() == "config.json") {
            *bytes = rewritten(name, bytes, matches!(row.kind, Kind::Rotation(_)), Some("float32"))?;
        }
        let stats = self.stats.as_deref().map(Stats::read).transpose()?;
        if let Some(stats) = &stats {
            stats.check_turn(None)?;
        }
        let arguments = Arguments { seed: self.seed, stats: stats.as_ref() };
        let transformed = row.apply(&*source, &arguments)?;
        let options = Options {
            output: OutputOptions { force: self.force, resume: self.resume },
            stop: Some(session.stop()),
            seed: self.seed,
            extra,
            ..Options::default()
        };
        let meter = Meter::new(session, "transform", "tensors");
        let report = convert::transform(&*transformed, &self.rotate, Dtype::F32, &self.output, &options, &meter)?;
        drop(meter);
        if session.json {
            return output::json(&json!({
                "path": report.path, "rotation": self.rotate, "seed": self.seed, "tensors": report.tensors.len(),
                "bytes_out": report.bytes_out, "resumed": report.resumed, "seconds": report.seconds,
                "peak_rss_bytes": output::peak_rss(),
            }));
        }
        output::say(&format!(
            "{}: {} tensors, {} in {}",
            report.path.display(),
            report.tensors.len(),
            output::bytes(report.bytes_out),
            duration(report.seconds)
        ))
    }
}
