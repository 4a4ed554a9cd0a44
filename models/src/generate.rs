//! Text from a prompt, token by token.

use crate::backend::Backend;
use crate::decoder::{Context, Decoder};
use crate::error::{ModelError, Result};
use crate::sample::{SampleSettings, Sampler};
use crate::stop::StopStrings;
use crate::tokenizer::Tokenizer;
use serde::Serialize;
use std::time::{Duration, Instant};

/// What to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// At most this many tokens.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sample: SampleSettings,
    /// Text that ends the answer; it is not part of it.
    pub stop: Vec<String>,
    /// Whether to go on past end-of-sequence tokens.
    pub ignore_eos: bool,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        GenerateOptions { max_tokens: 256, sample: SampleSettings::default(), stop: Vec::new(), ignore_eos: false }
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model ended it, or a stop string did.
    Stop,
    /// The wanted number of tokens was reached.
    Length,
    /// The context is full.
    Context,
    /// The listener wanted no more.
    Cancelled,
}

/// An answer and what it took.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Generation {
    /// The answer's text.
    pub text: String,
    /// Its tokens, an end-of-sequence token included.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the prompt that had to be computed.
    pub prompt_tokens: usize,
    /// Seconds for the prompt.
    pub prompt_seconds: f64,
    /// Seconds for the tokens after the first.
    pub decode_seconds: f64,
}

impl Generation {
    /// Tokens a second while decoding.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens.len().saturating_sub(1) as f64 / self.decode_seconds.max(1e-9)
    }

    /// Tokens a second over the prompt.
    pub fn prompt_tokens_per_second(&self) -> f64 {
        self.prompt_tokens as f64 / self.prompt_seconds.max(1e-9)
    }
}

/// Continues `sequence` with `prompt` (the tokens that its cache doesn't hold yet) and generates. `on_text` is given
/// whole characters as they are certain, and answers whether to go on.
///
/// The last token's keys and values may not be in the cache afterwards: it was chosen but not run.
///
/// # Errors
/// The prompt is empty or doesn't fit, a setting is out of range, or the model's predictions are not numbers.
pub fn generate<B: Backend>(
    decoder: &Decoder<B>,
    tokenizer: &Tokenizer,
    cx: &mut Context<B>,
    sequence: usize,
    prompt: &[u32],
    options: &GenerateOptions,
    mut on_text: impl FnMut(&str) -> bool,
) -> Result<Generation> {
    if prompt.is_empty() {
        return Err(ModelError::Context { why: "the prompt has no tokens".to_string() });
    }
    // Embeddings are often padded past the tokenizer's ids: those rows mean nothing and are never chosen.
    let vocabulary = tokenizer.vocab_size().min(decoder.config().vocab_size);
    let mut sampler = Sampler::new(options.sample.clone(), vocabulary)?;
    let mut stops = StopStrings::new(options.stop.iter().cloned())?;
    let mut stream = tokenizer.stream(true, false);
    prompt.iter().for_each(|token| sampler.accept(*token));

    let start = Instant::now();
    decoder.prefill(cx, sequence, prompt)?;
    let mut answer = Generation {
        text: String::new(),
        tokens: Vec::with_capacity(options.max_tokens.min(cx.plan().capacity)),
        finish: Finish::Length,
        prompt_tokens: prompt.len(),
        prompt_seconds: 0.0,
        decode_seconds: 0.0,
    };
    let mut first = None;
    while answer.tokens.len() < options.max_tokens {
        let last = cx.rows().end.saturating_sub(1);
        let token = decoder.choose(cx, last, &mut sampler)?;
        let now = *first.get_or_insert_with(Instant::now);
        if answer.tokens.is_empty() {
            answer.prompt_seconds = (now - start).as_secs_f64();
        }
        answer.tokens.push(token);
        if tokenizer.is_eos(token) && !options.ignore_eos {
            answer.finish = Finish::Stop;
            break;
        }
        sampler.accept(token);
        let text = stops.push(stream.push(token)?);
        answer.text.push_str(text);
        if !text.is_empty() && !on_text(text) {
            answer.finish = Finish::Cancelled;
            break;
        }
        if stops.found().is_some() {
            answer.finish = Finish::Stop;
            break;
        }
        if answer.tokens.len() == options.max_tokens {
            break;
        }
        if cx.length(sequence) == cx.plan().capacity {
            answer.finish = Finish::Context;
            break;
        }
        decoder.forward(cx, &[(sequence, &[token])], None)?;
    }
    answer.decode_seconds = first.map_or(Duration::ZERO, |first| first.elapsed()).as_secs_f64();
    let mut rest = String::new();
    if stops.found().is_none() {
        rest.push_str(stops.push(stream.finish()));
        rest.push_str(stops.finish());
    }
    if !rest.is_empty() {
        answer.text.push_str(&rest);
        on_text(&rest);
    }
    Ok(answer)
}
