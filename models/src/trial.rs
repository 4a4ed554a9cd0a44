//! A converted model tried out against the one it was made from: how far their predictions of a text lie apart, and what
//! both go on to say.

use crate::backend::{Backend, KvKind};
use crate::decoder::{ContextPlan, Decoder};
use crate::error::{ModelError, Result};
use crate::eval::{EvalPlan, EvalReport, beginning, evaluate};
use crate::generate::{GenerateOptions, generate};
use crate::model::Model;
use crate::tokenizer::Tokenizer;
use serde::Serialize;

/// A short text to try models on, of nobody's training or calibration.
pub const TEXT: &str = include_str!("trial/text.txt");

/// Tokens of a chunk; texts of one chunk at least are asked for.
const CHUNK: usize = 256;
/// Tokens of the text that both models go on from, and tokens that they add.
const PROMPT: usize = 24;
const ANSWER: usize = 24;

/// A text as a model reads it.
#[derive(Debug, Clone)]
pub struct Trial {
    tokens: Vec<u32>,
    plan: EvalPlan,
}

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub struct TrialReport {
    /// The figures.
    pub eval: EvalReport,
    /// Where both models went on from.
    pub prompt: String,
    /// What the source says next, the likeliest token each time.
    pub before: String,
    /// What the result says next.
    pub after: String,
}

impl Trial {
    /// Over at most `chunks` chunks of a text.
    ///
    /// # Errors
    /// The text is shorter than a chunk; `what` is what errors call it.
    pub fn new(tokenizer: &Tokenizer, what: &str, text: &str, chunks: Option<usize>) -> Result<Trial> {
        let tokens = tokenizer.encode(text, false)?;
        if tokens.len() < CHUNK {
            let why = format!("{what} has {} tokens; to try a model on it, {CHUNK} are needed", tokens.len());
            return Err(ModelError::Eval { why });
        }
        Ok(Trial { tokens, plan: EvalPlan { n_ctx: CHUNK, chunks, bos: beginning(tokenizer)? } })
    }

    /// Chunks that will be scored.
    pub fn chunks(&self) -> usize {
        (self.tokens.len() / self.plan.n_ctx).min(self.plan.chunks.unwrap_or(usize::MAX))
    }

    /// Tries `model` against `reference`. `progress` is told the chunks done; it answers whether to go on.
    ///
    /// # Errors
    /// A model can't be run, or predicts what is no number.
    pub fn run<B: Backend, R: Backend>(
        &self,
        model: &Model<B>,
        reference: &Model<R>,
        mut progress: impl FnMut(usize) -> bool,
    ) -> Result<TrialReport> {
        let tokenizer = reference.tokenizer()?;
        let (a, b) = (model.decoder(), reference.decoder());
        let eval = evaluate(a, Some(b), &self.tokens, self.plan, |done, _, _| progress(done))?;
        let prompt = &self.tokens[..PROMPT.min(self.tokens.len())];
        Ok(TrialReport {
            eval,
            prompt: tokenizer.decode(prompt, false)?,
            before: go_on(b, &tokenizer, prompt)?,
            after: go_on(a, &tokenizer, prompt)?,
        })
    }
}

/// The text that a model finds likeliest after a prompt.
fn go_on<B: Backend>(decoder: &Decoder<B>, tokenizer: &Tokenizer, prompt: &[u32]) -> Result<String> {
    let capacity = PROMPT + ANSWER;
    let mut cx =
        decoder.context(ContextPlan { capacity, chunk: capacity, kv: KvKind::F16, ..ContextPlan::default() })?;
    let options = GenerateOptions { max_tokens: ANSWER, ..GenerateOptions::default() };
    Ok(generate(decoder, tokenizer, &mut cx, 0, prompt, &options, |_| true)?.text)
}
