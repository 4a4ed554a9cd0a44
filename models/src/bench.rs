//! Throughput as llama-bench measures it: `pp512` runs a prompt of 512 tokens, `tg128` decodes 128 tokens one by one,
//! `@ d4096` starts from a context of 4096 tokens. Tokens are arbitrary, but the likeliest next one is looked up each time;
//! tokenization and other sampling don't count; one run before the counted ones warms up.

use crate::backend::{Backend, KvKind};
use crate::decoder::{ContextPlan, Decoder};
use crate::error::Result;
use serde::Serialize;
use std::time::Instant;

/// One thing to time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Test {
    /// Run a prompt of this many tokens.
    Prompt(usize),
    /// Decode this many tokens, each of `sequences` sequences.
    Generate {
        /// Tokens of each sequence.
        tokens: usize,
        /// Sequences decoded side by side.
        sequences: usize,
    },
}

impl Test {
    /// llama-bench's name for it.
    pub fn name(self, depth: usize) -> String {
        let mut name = match self {
            Test::Prompt(tokens) => format!("pp{tokens}"),
            Test::Generate { tokens, sequences: 1 } => format!("tg{tokens}"),
            Test::Generate { tokens, sequences } => format!("tg{tokens} x{sequences}"),
        };
        if depth > 0 {
            name.push_str(&format!(" @ d{depth}"));
        }
        name
    }

    /// Tokens that one run computes.
    pub fn tokens(self) -> usize {
        match self {
            Test::Prompt(tokens) => tokens,
            Test::Generate { tokens, sequences } => tokens * sequences,
        }
    }
}

/// Tokens a second of one test.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BenchRow {
    /// The test's name: pp512, tg128.
    pub test: String,
    /// Mean over the runs.
    pub tokens_per_second: f64,
    /// Standard deviation over the runs.
    pub sd: f64,
    /// Median over the runs.
    pub median: f64,
    /// Each run.
    pub samples: Vec<f64>,
}

/// Times a test `repetitions` times after a warm-up, starting from `depth` tokens of context. `go_on` is asked before
/// each run.
///
/// # Errors
/// The model can't be run at that size.
pub fn run<B: Backend>(
    decoder: &Decoder<B>,
    test: Test,
    depth: usize,
    repetitions: usize,
    kv: KvKind,
    mut go_on: impl FnMut() -> bool,
) -> Result<BenchRow> {
    let (length, sequences) = match test {
        Test::Prompt(tokens) => (tokens, 1),
        Test::Generate { tokens, sequences } => (tokens, sequences),
    };
    let plan = ContextPlan { sequences, capacity: depth + length.max(1), chunk: 512, logit_rows: sequences, kv };
    let mut cx = decoder.context(plan)?;
    let vocabulary = decoder.config().vocab_size as u64;
    let token = |i: usize| ((i as u64 * 2_654_435_761 + 12_345) % vocabulary) as u32;
    let prompt: Vec<u32> = (0..depth.max(length)).map(token).collect();
    for sequence in 0..sequences {
        decoder.prefill(&mut cx, sequence, &prompt[..depth])?;
    }
    let mut samples = Vec::with_capacity(repetitions);
    let rows: Vec<usize> = (0..sequences).collect();
    for repetition in 0..=repetitions {
        if !go_on() {
            break;
        }
        for sequence in 0..sequences {
            cx.truncate(decoder.backend(), sequence, depth)?;
        }
        let start = Instant::now();
        match test {
            Test::Prompt(tokens) => {
                decoder.prefill(&mut cx, 0, &prompt[..tokens])?;
                let last = cx.rows().end.saturating_sub(1);
                decoder.likeliest(&mut cx, &[last], usize::MAX)?;
            }
            Test::Generate { tokens, .. } => {
                let mut batch: Vec<(usize, &[u32])> = (0..sequences).map(|s| (s, &prompt[..0])).collect();
                for i in 0..tokens {
                    batch.iter_mut().for_each(|(_, step)| *step = &prompt[i..=i]);
                    decoder.forward(&mut cx, &batch, None)?;
                    decoder.likeliest(&mut cx, &rows, usize::MAX)?;
                }
            }
        }
        if repetition > 0 {
            samples.push(test.tokens() as f64 / start.elapsed().as_secs_f64());
        }
    }
    let n = samples.len().max(1) as f64;
    let mean = samples.iter().sum::<f64>() / n;
    let variance = samples.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    let mut sorted = samples.clone();
    sorted.sort_by(f64::total_cmp);
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or(0.0);
    Ok(BenchRow { test: test.name(depth), tokens_per_second: mean, sd: variance.sqrt(), median, samples })
}
