//! `nibble import`: a GGUF file becomes a Hugging Face checkpoint.

use super::Run;
use crate::arguments::Threads;
use crate::output;
use crate::progress::{Meter, duration};
use crate::session::Session;
use anyhow::Result;
use clap::ValueEnum;
use nibble_models::gguf_sidecars;
use nibble_quant::convert::{self, Options};
use nibble_quant::format::gguf::GgufCheckpoint;
use nibble_quant::format::{Dtype, OutputOptions};
use serde_json::json;
use std::path::PathBuf;

/// Turn a GGUF file into a Hugging Face checkpoint: weights, configuration, tokenizer and chat template
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: nibble import SmolLM2-135M-Instruct.Q4_1.gguf -o SmolLM2-135M-Instruct

F32 holds every GGUF type's values exactly; BF16 halves the size and rounds.")]
pub struct Import {
    /// The GGUF file
    #[arg(value_name = "MODEL.gguf")]
    file: PathBuf,
    /// Folder to write
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// How weights are stored
    #[arg(long, value_enum, default_value_t = Float::F32)]
    dtype: Float,
    /// Replace the folder if it is a checkpoint
    #[arg(long)]
    force: bool,
    /// Go on where an earlier run was stopped
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    threads: Threads,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Float {
    F32,
    F16,
    Bf16,
}

impl Run for Import {
    fn run(self, session: &Session) -> Result<()> {
        self.threads.set_for_conversion()?;
        let source = GgufCheckpoint::open(&self.file)?;
        let (dtype, name) = match self.dtype {
            Float::F32 => (Dtype::F32, "float32"),
            Float::F16 => (Dtype::F16, "float16"),
            Float::Bf16 => (Dtype::BF16, "bfloat16"),
        };
        let options = Options {
            output: OutputOptions { force: self.force, resume: self.resume },
            stop: Some(session.stop()),
            extra: gguf_sidecars(&source, name)?.into_files(),
            ..Options::default()
        };
        let meter = Meter::new(session, "import", "tensors");
        let report = convert::import_gguf(&source, dtype, &self.output, &options, &meter)?;
        drop(meter);
        if session.json {
            return output::json(&json!({
                "path": report.path, "tensors": report.tensors.len(), "bytes_in": report.bytes_in,
                "bytes_out": report.bytes_out, "resumed": report.resumed, "seconds": report.seconds,
                "megabytes_per_second": report.megabytes_per_second(), "peak_rss_bytes": output::peak_rss(),
            }));
        }
        output::say(&format!(
            "{}: {} tensors, {} from {} in {} ({:.0} MB/s)",
            report.path.display(),
            report.tensors.len(),
            output::bytes(report.bytes_out),
            output::bytes(report.bytes_in),
            duration(report.seconds),
            report.megabytes_per_second()
        ))
    }
}
