//! `nibble synth`: a checkpoint of random weights.

use super::Run;
use crate::arguments::Threads;
use crate::output;
use crate::session::Session;
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use nibble_models::synth::SynthPlan;
use nibble_quant::FloatFormat;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Write a checkpoint of random weights: a real model's shape for tests and benchmarks, without the model
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: nibble synth -o llama-1b-random --like llama-1b")]
pub struct Synth {
    /// Folder to write
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Shape to start from; the flags below change it
    #[arg(long, value_enum, default_value_t = Like::Tiny)]
    like: Like,
    /// Family: llama, mistral, qwen2 or qwen3
    #[arg(long, value_name = "NAME")]
    model_type: Option<String>,
    /// Width of the residual stream
    #[arg(long, value_name = "N")]
    hidden: Option<usize>,
    /// Width of the feed-forward layers
    #[arg(long, value_name = "N")]
    ffn: Option<usize>,
    /// Decoder layers
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Query heads
    #[arg(long, value_name = "N")]
    heads: Option<usize>,
    /// Key/value heads
    #[arg(long, value_name = "N")]
    kv_heads: Option<usize>,
    /// Width of a head
    #[arg(long, value_name = "N")]
    head_dim: Option<usize>,
    /// Tokens
    #[arg(long, value_name = "N")]
    vocab: Option<usize>,
    /// Give the output head weights of its own
    #[arg(long)]
    untied: bool,
    /// How weights are stored
    #[arg(long, value_enum)]
    dtype: Option<Dtype>,
    /// Where randomness starts
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Copy the tokenizer's files from this checkpoint
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    #[command(flatten)]
    threads: Threads,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Like {
    /// Two layers of width 64
    Tiny,
    /// 16 layers of width 2048: 2.1 GB in bf16
    #[value(name = "llama-1b")]
    Llama1b,
}

/// A float type as it is typed.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Dtype {
    /// IEEE single precision
    F32,
    /// IEEE half precision
    F16,
    /// bfloat16
    Bf16,
}

impl Dtype {
    fn format(self) -> FloatFormat {
        match self {
            Dtype::F32 => FloatFormat::F32,
            Dtype::F16 => FloatFormat::F16,
            Dtype::Bf16 => FloatFormat::Bf16,
        }
    }
}

impl Run for Synth {
    fn run(self, session: &Session) -> Result<()> {
        self.threads.set_for_conversion()?;
        if self.output.symlink_metadata().is_ok() {
            bail!("{}: already exists; remove it or choose another name", self.output.display());
        }
        if let Some(dir) = &self.tokenizer
            && !dir.join("tokenizer.json").is_file()
        {
            bail!("{}: no tokenizer.json to copy", dir.display());
        }
        let plan = self.plan();
        // Written beside its final name, so that a folder of that name is a whole one.
        let partial = beside(&self.output)?;
        let written = plan
            .write(&partial, self.tokenizer.as_deref())
            .map_err(anyhow::Error::from)
            .and_then(|()| Ok(std::fs::rename(&partial, &self.output)?));
        if let Err(error) = written {
            // What is left half done is of no use; that removing it fails too would only hide the first failure.
            let _ = std::fs::remove_dir_all(&partial);
            return Err(error).with_context(|| format!("can't write {}", self.output.display()));
        }
        let bytes = folder_bytes(&self.output)?;
        match session.json {
            true => output::json(&json!({"path": self.output, "bytes": bytes, "seed": self.seed})),
            false => output::say(&format!("{}: {}", self.output.display(), output::bytes(bytes))),
        }
    }
}

impl Synth {
    fn plan(&self) -> SynthPlan {
        let mut plan = match self.like {
            Like::Tiny => SynthPlan::tiny("llama"),
            Like::Llama1b => SynthPlan::llama_1b(),
        };
        let set = |field: &mut usize, given: Option<usize>| *field = given.unwrap_or(*field);
        set(&mut plan.hidden_size, self.hidden);
        set(&mut plan.intermediate_size, self.ffn);
        set(&mut plan.layers, self.layers);
        set(&mut plan.heads, self.heads);
        set(&mut plan.kv_heads, self.kv_heads);
        set(&mut plan.vocab_size, self.vocab);
        plan.head_dim = self.head_dim.or(plan.head_dim.filter(|_| self.hidden.is_none() && self.heads.is_none()));
        plan.model_type = self.model_type.clone().unwrap_or(plan.model_type);
        plan.tie_embeddings &= !self.untied;
        plan.dtype = self.dtype.map_or(plan.dtype, Dtype::format);
        plan.seed = self.seed;
        plan
    }
}

fn beside(target: &Path) -> Result<PathBuf> {
    let name = target.file_name().with_context(|| format!("{} names no folder", target.display()))?;
    let partial = format!(".{}.partial-{}", name.to_string_lossy(), std::process::id());
    Ok(target.with_file_name(partial))
}

fn folder_bytes(dir: &Path) -> Result<u64> {
    let mut total = 0;
    for entry in std::fs::read_dir(dir)? {
        total += entry?.metadata()?.len();
    }
    Ok(total)
}
