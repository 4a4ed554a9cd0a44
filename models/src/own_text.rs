//! Text that a model writes itself, to be calibrated on where there is no other: it is of every kind that the model knows
//! (LLM-QAT, arXiv 2305.17888), which a single work never is.

use crate::backend::Backend;
use crate::decoder::{ContextPlan, Decoder};
use crate::error::{ModelError, Result};
use crate::sample::{Rng, SampleSettings, Sampler};
use crate::tokenizer::Tokenizer;
use nibble_quant::QuantError;

/// Sequences that are written side by side: what is read of the weights serves them all.
const SIDE_BY_SIDE: usize = 16;

/// How much is to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnTextPlan {
    /// Most tokens of all sequences together.
    pub tokens: usize,
    /// Tokens of a sequence.
    pub length: usize,
    /// The token that every sequence begins with, as at the beginning of a text.
    pub bos: Option<u32>,
    /// Where randomness starts.
    pub seed: u64,
}

/// Whole sequences, one after the other. Each begins with a word that is drawn from the vocabulary; what follows is drawn
/// as the model would have it, at temperature 1. `progress` is told the steps done and of how many, one token of all
/// sequences side by side each; it answers whether to go on.
///
/// The same plan gives the same text on any number of threads.
///
/// # Errors
/// The plan has not even one sequence, the vocabulary has no words, or the model can't run.
pub fn own_text<B: Backend>(
    model: &Decoder<B>,
    tokenizer: &Tokenizer,
    plan: &OwnTextPlan,
    mut progress: impl FnMut(usize, usize) -> bool,
) -> Result<Vec<u32>> {
    let words = words(tokenizer);
    let count = plan.tokens.checked_div(plan.length).unwrap_or(0);
    if count == 0 || words.is_empty() {
        let why = format!("{} words to begin {count} sequences of {} tokens with", words.len(), plan.length);
        return Err(ModelError::Eval { why });
    }
    let vocabulary = tokenizer.vocab_size().min(model.config().vocab_size);
    let side_by_side = SIDE_BY_SIDE.min(count);
    let context = ContextPlan {
        sequences: side_by_side,
        capacity: plan.length,
        chunk: 2 * side_by_side,
        logit_rows: side_by_side,
        ..ContextPlan::default()
    };
    let mut cx = model.context(context)?;
    let mut rng = Rng::new(plan.seed);
    let settings = SampleSettings { temperature: 1.0, top_k: 0, top_p: 1.0, ..SampleSettings::default() };
    let given = plan.bos.iter().count() + 1;
    let (mut done, steps) = (0, count.div_ceil(side_by_side) * plan.length.saturating_sub(given));
    let mut text = Vec::with_capacity(count * plan.length);
    for first in (0..count).step_by(side_by_side) {
        let numbers = first..(first + side_by_side).min(count);
        let mut writers = Vec::with_capacity(side_by_side);
        for (at, number) in numbers.enumerate() {
            cx.truncate(model.backend(), at, 0)?;
            let word = words[(rng.unit() * words.len() as f64) as usize % words.len()];
            let sequence: Vec<u32> = plan.bos.into_iter().chain([word]).take(plan.length).collect();
            let seed = plan.seed.wrapping_add(number as u64);
            writers.push((sequence, Sampler::new(SampleSettings { seed, ..settings.clone() }, vocabulary)?));
        }
        let mut known = 0;
        while let Some(length) = writers.first().map(|(sequence, _)| sequence.len()).filter(|len| *len < plan.length) {
            let batch: Vec<(usize, &[u32])> =
                writers.iter().enumerate().map(|(at, (sequence, _))| (at, &sequence[known..])).collect();
            model.forward(&mut cx, &batch, None)?;
            let last: Vec<usize> = (1..=writers.len()).map(|at| at * (length - known) - 1).collect();
            let logits = model.logits(&mut cx, &last)?;
            for ((sequence, sampler), logits) in writers.iter_mut().zip(logits.chunks(model.config().vocab_size)) {
                sequence.push(sampler.sample(&logits[..vocabulary])?);
            }
            known = length;
            done += 1;
            if !progress(done, steps) {
                return Err(QuantError::Stopped.into());
            }
        }
        text.extend(writers.into_iter().flat_map(|(sequence, _)| sequence));
    }
    Ok(text)
}

/// Tokens of letters alone, after a space or none.
fn words(tokenizer: &Tokenizer) -> Vec<u32> {
    let is_word = |id: &u32| {
        let bytes = tokenizer.bytes(*id).filter(|_| !tokenizer.is_special(*id));
        let text = bytes.and_then(|bytes| std::str::from_utf8(bytes).ok()).unwrap_or_default();
        let letters = text.strip_prefix(' ').unwrap_or(text);
        !letters.is_empty() && letters.chars().all(char::is_alphabetic)
    };
    (0..tokenizer.vocab_size() as u32).filter(is_word).collect()
}
