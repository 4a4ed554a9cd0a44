//! `nibble bench`: tokens a second, and how much of this machine they use.

use super::Run;
use crate::failure::Stopped;
use crate::limits::Limits;
use crate::output::{self, Table};
use crate::progress::Meter;
use crate::running::{Activations, Kv};
use crate::session::Session;
use anyhow::Result;
use clap::ValueEnum;
use nibble_kernels::Pool;
use nibble_models::bench::{self, BenchRow, Test};
use nibble_models::decoder::ContextPlan;
use nibble_models::{Model, ModelOptions};
use serde::Serialize;
use std::num::NonZeroUsize;
use std::path::Path;

/// Measure throughput as llama-bench does, and the share of this machine's read bandwidth and int8 peak that it takes
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: nibble bench smol-int4 -p 512 -n 128 -t 1,2 -r 5

pp512 runs a prompt of 512 tokens, tg128 decodes 128 tokens one by one, @ d1024 starts with 1024 tokens of context.
Neither tokenization nor sampling counts; a run before the counted ones warms up. bandwidth: bytes of weights read,
relative to what this machine's memory delivers. int8: multiply-adds, relative to its integer peak.")]
pub struct Bench {
    /// Checkpoint folders or GGUF files, or ORG/NAME on the hub
    #[arg(value_name = "CHECKPOINT", required = true)]
    checkpoints: Vec<String>,
    /// Prompt lengths, 0 for none
    #[arg(short = 'p', long, value_name = "N,...", value_delimiter = ',', default_value = "512")]
    prompt: Vec<usize>,
    /// Tokens to decode, 0 for none
    #[arg(short = 'n', long, value_name = "N,...", value_delimiter = ',', default_value = "128")]
    generate: Vec<usize>,
    /// Numbers of threads [default: one a physical core]
    #[arg(short, long, value_name = "N,...", value_delimiter = ',')]
    threads: Vec<NonZeroUsize>,
    /// Runs that are counted
    #[arg(short, long, value_name = "N", default_value = "5")]
    repetitions: NonZeroUsize,
    /// Tokens of context to start from
    #[arg(short, long, value_name = "N,...", value_delimiter = ',', default_value = "0")]
    depth: Vec<usize>,
    /// Sequences to decode side by side
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1")]
    parallel: Vec<NonZeroUsize>,
    /// How the table is printed
    #[arg(short, long, value_enum, default_value_t = Format::Md)]
    output: Format,
    /// Numbers that activations are in
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = Activations::Auto)]
    activations: Activations,
    /// How keys and values are kept
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = Kv::F16)]
    kv: Kv,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A Markdown table
    Md,
    /// A list of rows
    Json,
    /// Comma-separated values
    Csv,
}

/// One row of the result.
#[derive(Debug, Serialize)]
struct Row {
    model: String,
    size_bytes: u64,
    parameters: u64,
    bits_per_weight: f64,
    threads: usize,
    isa: &'static str,
    activations: &'static str,
    #[serde(flatten)]
    speed: BenchRow,
    /// Bytes of weights read a second, over the read bandwidth measured with as many threads.
    bandwidth_share: f64,
    /// int8 multiply-adds a second, over the peak measured with as many threads.
    int8_share: f64,
}

impl Run for Bench {
    fn run(self, session: &Session) -> Result<()> {
        let threads: Vec<usize> = match self.threads.as_slice() {
            [] => vec![Pool::default_threads()],
            given => given.iter().map(|n| n.get()).collect(),
        };
        let tests = self.tests();
        let limits: Vec<Limits> = threads.iter().map(|threads| Limits::of(&Pool::new(*threads))).collect();
        limits.iter().for_each(|limits| session.remark(limits.line()));
        let meter = Meter::new(session, "bench", "tests");
        meter.begin((tests.len() * threads.len() * self.checkpoints.len()) as u64, 0);
        let mut rows = Vec::new();
        'all: for checkpoint in &self.checkpoints {
            let path = crate::hub::checkpoint(session, checkpoint)?;
            for &limits in &limits {
                let threads = limits.threads;
                let options = ModelOptions { threads: Some(threads), activations: self.activations.kind() };
                let model = Model::load(&path, &options)?;
                for &(test, depth) in &tests {
                    let go_on = || !session.stopped();
                    let runs = self.repetitions.get();
                    let speed = bench::run(model.decoder(), test, depth, runs, self.kv.kind(), go_on)?;
                    if session.stopped() {
                        break 'all;
                    }
                    meter.add_thing(&format!("{} {:.1} t/s", speed.test, speed.tokens_per_second));
                    rows.push(self.row(&path, &model, limits, test, speed));
                }
            }
        }
        drop(meter);
        match self.output {
            _ if session.json => output::json(&rows)?,
            Format::Json => output::json(&rows)?,
            Format::Md => output::say(&table(&rows).render())?,
            Format::Csv => output::say(&csv(&rows).csv())?,
        }
        if session.stopped() { Err(Stopped.into()) } else { Ok(()) }
    }
}

impl Bench {
    /// Every prompt length, then every number of tokens, each at every depth.
    fn tests(&self) -> Vec<(Test, usize)> {
        let prompts = self.prompt.iter().filter(|n| **n > 0).map(|n| Test::Prompt(*n));
        let generations = self.generate.iter().filter(|n| **n > 0).flat_map(|tokens| {
            self.parallel.iter().map(|sequences| Test::Generate { tokens: *tokens, sequences: sequences.get() })
        });
        let all: Vec<Test> = prompts.chain(generations).collect();
        self.depth.iter().flat_map(|depth| all.iter().map(|test| (*test, *depth))).collect()
    }

    fn row(&self, path: &Path, model: &Model, limits: Limits, test: Test, speed: BenchRow) -> Row {
        let decoder = model.decoder();
        let name =
            path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned());
        // A forward pass reads the weights once, however many tokens it serves.
        let tokens_per_pass = match test {
            Test::Prompt(tokens) => tokens.min(ContextPlan::default().chunk),
            Test::Generate { sequences, .. } => sequences,
        };
        let passes_per_second = speed.tokens_per_second / tokens_per_pass as f64;
        let bytes_per_second = passes_per_second * decoder.bytes_per_token() as f64;
        let multiply_adds_per_second = speed.tokens_per_second * decoder.multiply_adds_per_token() as f64;
        Row {
            model: name,
            size_bytes: model.file_bytes(),
            parameters: model.parameters(),
            bits_per_weight: crate::classes::bits_per_weight(model.file_bytes(), model.parameters()),
            threads: limits.threads,
            isa: nibble_kernels::Isa::best().name(),
            activations: self.activations.name(),
            bandwidth_share: bytes_per_second / limits.read_bytes_per_second,
            int8_share: multiply_adds_per_second / limits.int8_multiply_adds_per_second,
            speed,
        }
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table =
        Table::new(&["model", "size", "params", "bpw", "threads", "test", "t/s", "+-", "bandwidth", "int8"]);
    for row in rows {
        table.row(vec![
            row.model.clone(),
            output::bytes(row.size_bytes),
            output::count(row.parameters),
            format!("{:.2}", row.bits_per_weight),
            row.threads.to_string(),
            row.speed.test.clone(),
            format!("{:.2}", row.speed.tokens_per_second),
            format!("{:.2}", row.speed.sd),
            format!("{:.1} %", row.bandwidth_share * 100.0),
            format!("{:.1} %", row.int8_share * 100.0),
        ]);
    }
    table
}

fn csv(rows: &[Row]) -> Table {
    let mut table = Table::new(&[
        "model",
        "size_bytes",
        "parameters",
        "bits_per_weight",
        "threads",
        "isa",
        "activations",
        "test",
        "tokens_per_second",
        "sd",
        "bandwidth_share",
        "int8_share",
    ]);
    for row in rows {
        table.row(vec![
            row.model.clone(),
            row.size_bytes.to_string(),
            row.parameters.to_string(),
            format!("{:.4}", row.bits_per_weight),
            row.threads.to_string(),
            row.isa.to_string(),
            row.activations.to_string(),
            row.speed.test.clone(),
            format!("{:.4}", row.speed.tokens_per_second),
            format!("{:.4}", row.speed.sd),
            format!("{:.5}", row.bandwidth_share),
            format!("{:.5}", row.int8_share),
        ]);
    }
    table
}
