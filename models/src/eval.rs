//! Perplexity and KL divergence on a text, as llama.cpp's perplexity tool defines them: the text is cut into chunks of
//! `n_ctx` tokens, each chunk starts afresh (its first token replaced by BOS where the model has one), and the
//! predictions in its second half are scored.
//!
//! `KL = sum p_ref * ln(p_ref / p)` a position; the same positions give perplexity, so the ratio of two models'
//! perplexities and their divergence speak of the same predictions.

use crate::backend::Backend;
use crate::decoder::{Context, ContextPlan, Decoder};
use crate::error::{ModelError, Result};
use crate::tokenizer::Tokenizer;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Rows of logits that are held at once.
pub(crate) const LOGIT_ROWS: usize = 64;

/// What to score.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EvalPlan {
    /// Tokens of a chunk.
    pub n_ctx: usize,
    /// At most this many chunks.
    pub chunks: Option<usize>,
    /// The token each chunk starts with, if the model wants one.
    pub bos: Option<u32>,
}

/// The figures of one model on one text, and against a reference if there was one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EvalReport {
    /// exp of the mean negative log-likelihood.
    pub ppl: f64,
    /// Standard error of `ppl`.
    pub ppl_error: f64,
    /// The reference's perplexity on the same predictions.
    pub reference_ppl: Option<f64>,
    /// ppl / reference_ppl.
    pub ppl_ratio: Option<f64>,
    /// Divergence from the reference's distribution, in nats.
    pub kl: Option<KlReport>,
    /// Share of predictions whose likeliest token is the reference's, 0..=1.
    pub same_top1: Option<f64>,
    /// Predictions scored.
    pub scored: usize,
    /// Chunks run.
    pub chunks: usize,
    /// Tokens of a chunk.
    pub n_ctx: usize,
}

/// How KL divergence is spread over the predictions, in nats.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct KlReport {
    /// Mean.
    pub mean: f64,
    /// Standard error of the mean.
    pub error: f64,
    /// Median.
    pub median: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

/// The scores so far.
#[derive(Debug, Default)]
struct Scores {
    nll: Vec<f64>,
    reference_nll: Vec<f64>,
    kl: Vec<f64>,
    same: usize,
}

/// The token that a chunk begins with: that which the tokenizer puts before a text, if it does.
///
/// # Errors
/// The tokenizer can't read a letter.
pub fn beginning(tokenizer: &Tokenizer) -> Result<Option<u32>> {
    let first = tokenizer.encode("a", true)?.first().copied();
    Ok(tokenizer.bos().filter(|bos| first == Some(*bos)))
}

/// Scores `model` on `tokens`, against `reference` if there is one. `progress` is told the chunks done, of how many,
/// and the figures so far; it answers whether to go on.
pub fn evaluate<B: Backend, R: Backend>(
    model: &Decoder<B>,
    reference: Option<&Decoder<R>>,
    tokens: &[u32],
    plan: EvalPlan,
    mut progress: impl FnMut(usize, usize, &EvalReport) -> bool,
) -> Result<EvalReport> {
    if plan.n_ctx < 4 {
        return Err(ModelError::Eval { why: format!("chunks of {} tokens; at least 4 are needed", plan.n_ctx) });
    }
    let chunks = (tokens.len() / plan.n_ctx).min(plan.chunks.unwrap_or(usize::MAX));
    if chunks == 0 {
        let why = format!("the text has {} tokens; one chunk takes {}", tokens.len(), plan.n_ctx);
        return Err(ModelError::Eval { why });
    }
    if let Some(reference) = reference {
        let (a, b) = (model.config().vocab_size, reference.config().vocab_size);
        if a != b {
            let why = format!("the model has {a} tokens and the reference {b}: their predictions can't be compared");
            return Err(ModelError::Eval { why });
        }
    }
    let context = ContextPlan {
        capacity: plan.n_ctx,
        chunk: plan.n_ctx.min(512),
        logit_rows: LOGIT_ROWS,
        ..ContextPlan::default()
    };
    let mut cx = model.context(context)?;
    let mut reference = match reference {
        Some(decoder) => Some((decoder, decoder.context(context)?)),
        None => None,
    };
    let mut scores = Scores::default();
    let mut chunk = Vec::with_capacity(plan.n_ctx);
    for i in 0..chunks {
        chunk.clear();
        chunk.extend_from_slice(&tokens[i * plan.n_ctx..(i + 1) * plan.n_ctx]);
        if let Some(bos) = plan.bos {
            chunk[0] = bos;
        }
        score_chunk(model, &mut cx, reference.as_mut(), &chunk, &mut scores)?;
        let report = scores.report(plan.n_ctx, i + 1, reference.is_some());
        if !progress(i + 1, chunks, &report) {
            return Ok(report);
        }
    }
    Ok(scores.report(plan.n_ctx, chunks, reference.is_some()))
}

fn score_chunk<B: Backend, R: Backend>(
    model: &Decoder<B>,
    cx: &mut Context<B>,
    mut reference: Option<&mut (&Decoder<R>, Context<R>)>,
    chunk: &[u32],
    scores: &mut Scores,
) -> Result<()> {
    cx.truncate(model.backend(), 0, 0)?;
    if let Some((decoder, cx)) = reference.as_deref_mut() {
        cx.truncate(decoder.backend(), 0, 0)?;
    }
    let first = chunk.len() / 2;
    let mut start = 0;
    for piece in chunk.chunks(cx.plan().chunk) {
        model.forward(cx, &[(0, piece)], None)?;
        if let Some((decoder, cx)) = reference.as_deref_mut() {
            decoder.forward(cx, &[(0, piece)], None)?;
        }
        let rows: Vec<usize> = (0..piece.len()).filter(|r| (first..chunk.len() - 1).contains(&(start + r))).collect();
        for rows in rows.chunks(LOGIT_ROWS) {
            let logits = model.logits(cx, rows)?;
            let vocabulary = logits.len() / rows.len();
            let reference_logits = match reference.as_deref_mut() {
                Some((decoder, cx)) => Some(decoder.logits(cx, rows)?),
                None => None,
            };
            let one = |(j, row): (usize, &usize)| {
                let at = j * vocabulary..(j + 1) * vocabulary;
                let target = chunk[start + row + 1] as usize;
                score(&logits[at.clone()], reference_logits.as_ref().map(|l| &l[at]), target)
            };
            let scored: Vec<Score> = rows.par_iter().enumerate().map(one).collect();
            scored.into_iter().try_for_each(|score| scores.add(score))?;
        }
        start += piece.len();
    }
    Ok(())
}

/// One prediction: negative log-likelihoods in nats, divergence, and whether the likeliest tokens agree.
#[derive(Debug, Clone, Copy)]
struct Score {
    nll: f64,
    against: Option<(f64, f64, bool)>,
}

fn score(logits: &[f32], reference: Option<&[f32]>, target: usize) -> Score {
    let normalizer = log_sum_exp(logits);
    let against = reference.map(|reference| {
        let reference_normalizer = log_sum_exp(reference);
        let mut kl = 0.0;
        for (p, q) in reference.iter().zip(logits) {
            let log_p = *p as f64 - reference_normalizer;
            if log_p > -40.0 {
                kl += log_p.exp() * (log_p - (*q as f64 - normalizer));
            }
        }
        (reference_normalizer - reference[target] as f64, kl, argmax(logits) == argmax(reference))
    });
    Score { nll: normalizer - logits[target] as f64, against }
}

impl Scores {
    fn add(&mut self, score: Score) -> Result<()> {
        let refuse = |whose: &str| {
            Err(ModelError::Eval { why: format!("the {whose}'s prediction {} is not finite", self.nll.len()) })
        };
        if !score.nll.is_finite() {
            return refuse("model");
        }
        if let Some((nll, kl, same)) = score.against {
            if !kl.is_finite() {
                return refuse("reference");
            }
            self.kl.push(kl.max(0.0));
            self.reference_nll.push(nll);
            self.same += usize::from(same);
        }
        self.nll.push(score.nll);
        Ok(())
    }

    fn report(&self, n_ctx: usize, chunks: usize, with_reference: bool) -> EvalReport {
        let (mean, error) = mean_and_error(&self.nll);
        let reference_ppl = with_reference.then(|| mean_and_error(&self.reference_nll).0.exp());
        let kl = with_reference.then(|| {
            let (mean, error) = mean_and_error(&self.kl);
            let mut sorted = self.kl.clone();
            sorted.sort_by(f64::total_cmp);
            let at = |share: f64| percentile(&sorted, share);
            KlReport { mean, error, median: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1.0) }
        });
        EvalReport {
            ppl: mean.exp(),
            ppl_error: mean.exp() * error,
            reference_ppl,
            ppl_ratio: reference_ppl.map(|r| mean.exp() / r),
            kl,
            same_top1: with_reference.then(|| self.same as f64 / self.nll.len().max(1) as f64),
            scored: self.nll.len(),
            chunks,
            n_ctx,
        }
    }
}

/// A model's predictions of a text, kept to hold others against.
pub struct Predictions {
    chunks: Vec<(Vec<u32>, Vec<f32>)>,
}

impl Predictions {
    /// Of the second half of every chunk that the plan scores.
    ///
    /// # Errors
    /// The text is shorter than a chunk, or the model can't be run.
    pub fn of<B: Backend>(model: &Decoder<B>, tokens: &[u32], plan: EvalPlan) -> Result<Predictions> {
        let count = (tokens.len() / plan.n_ctx.max(1)).min(plan.chunks.unwrap_or(usize::MAX));
        if plan.n_ctx < 4 || count == 0 {
            let why = format!("{} tokens in chunks of {}", tokens.len(), plan.n_ctx);
            return Err(ModelError::Eval { why });
        }
        let mut chunks = Vec::with_capacity(count);
        for chunk in tokens.chunks_exact(plan.n_ctx).take(count) {
            let mut chunk = chunk.to_vec();
            if let Some(bos) = plan.bos {
                chunk[0] = bos;
            }
            let logits = second_half(model, &chunk)?;
            chunks.push((chunk, logits));
        }
        Ok(Predictions { chunks })
    }

    /// The mean divergence of another model of the same vocabulary from these, in nats; NaN where one of its
    /// predictions is no number.
    ///
    /// # Errors
    /// The model can't be run.
    pub fn divergence_of<B: Backend>(&self, model: &Decoder<B>) -> Result<f64> {
        Ok(self.effect_of(model)?.kl)
    }

    /// How another model of the same vocabulary predicts.
    ///
    /// # Errors
    /// The model can't be run.
    pub fn effect_of<B: Backend>(&self, model: &Decoder<B>) -> Result<Effect> {
        let each = self.chunks.iter().enumerate();
        let each = each.map(|(at, (chunk, _))| Ok(self.effect_of_chunk(at, &second_half(model, chunk)?)));
        Ok(Effect::mean(&each.collect::<Result<Vec<_>>>()?))
    }

    /// The chunks, as models read them.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = &[u32]> {
        self.chunks.iter().map(|(chunk, _)| chunk.as_slice())
    }

    /// The rows of a chunk that are predictions.
    pub(crate) fn rows(&self, chunk: usize) -> Vec<usize> {
        self.chunks.get(chunk).map_or(Vec::new(), |(chunk, _)| (chunk.len() / 2..chunk.len() - 1).collect())
    }

    /// Predictions that are kept.
    pub(crate) fn count(&self) -> usize {
        (0..self.chunks.len()).map(|chunk| self.rows(chunk).len()).sum()
    }

    /// Logits of a chunk's predictions, (rows, vocabulary), against those kept.
    pub(crate) fn effect_of_chunk(&self, chunk: usize, logits: &[f32]) -> Effect {
        let Some((tokens, reference)) = self.chunks.get(chunk) else { return Effect::mean(&[]) };
        let rows = tokens.len() - 1 - tokens.len() / 2;
        let vocabulary = (reference.len() / rows.max(1)).max(1);
        let pairs = logits.par_chunks(vocabulary).zip(reference.par_chunks(vocabulary));
        let each = pairs.map(|(a, b)| match score(a, Some(b), 0).against {
            Some((_, kl, same)) => Effect { kl, same_top1: f64::from(u8::from(same)) },
            None => Effect { kl: f64::NAN, same_top1: 0.0 },
        });
        Effect::mean(&each.collect::<Vec<_>>())
    }
}

/// How predictions differ from a reference's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Effect {
    /// Mean divergence, in nats.
    pub kl: f64,
    /// Share of predictions with the same likeliest token.
    pub same_top1: f64,
}

impl Effect {
    /// Of as many predictions each; NaN of none.
    pub(crate) fn mean(all: &[Effect]) -> Effect {
        let count = all.len() as f64;
        let mean = |of: fn(&Effect) -> f64| all.iter().map(of).sum::<f64>() / count;
        Effect { kl: mean(|e| e.kl), same_top1: mean(|e| e.same_top1) }
    }
}

/// Logits of a chunk's second half but for the last token, from an empty cache.
fn second_half<B: Backend>(model: &Decoder<B>, chunk: &[u32]) -> Result<Vec<f32>> {
    let context =
        ContextPlan { capacity: chunk.len(), chunk: chunk.len(), logit_rows: LOGIT_ROWS, ..ContextPlan::default() };
    let mut cx = model.context(context)?;
    model.forward(&mut cx, &[(0, chunk)], None)?;
    let mut logits = Vec::new();
    let rows: Vec<usize> = (chunk.len() / 2..chunk.len() - 1).collect();
    for rows in rows.chunks(LOGIT_ROWS) {
        logits.extend_from_slice(&model.logits(&mut cx, rows)?);
    }
    Ok(logits)
}

/// ln(sum exp(x)), in f64 about the maximum.
pub fn log_sum_exp(x: &[f32]) -> f64 {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    max + x.iter().map(|v| (*v as f64 - max).exp()).sum::<f64>().ln()
}

fn argmax(x: &[f32]) -> usize {
    let mut best = 0;
    for (i, v) in x.iter().enumerate() {
        if *v > x[best] {
            best = i;
        }
    }
    best
}

fn mean_and_error(values: &[f64]) -> (f64, f64) {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, (variance / n).sqrt())
}

/// The value below which `share` of an ascending list lies, interpolated linearly.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    if sorted.is_empty() {
        return 0.0;
    }
    let place = share * (sorted.len() - 1) as f64;
    let (low, high) = (place.floor() as usize, place.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * (place - low as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_diverges_from_itself_by_nothing() {
        let mut scores = Scores::default();
        let logits: Vec<f32> = (0..100).map(|i| ((i * 37) % 11) as f32).collect();
        scores.add(score(&logits, Some(&logits), 3)).unwrap();
        let report = scores.report(512, 1, true);
        assert!(report.kl.unwrap().mean.abs() < 1e-12);
        assert_eq!(report.ppl_ratio, Some(1.0));
        assert_eq!(report.same_top1, Some(1.0));
    }

    #[test]
    fn uniform_predictions_have_the_vocabulary_as_perplexity() {
        let mut scores = Scores::default();
        scores.add(score(&[0.5; 128], None, 77)).unwrap();
        assert!((scores.report(512, 1, false).ppl - 128.0).abs() < 1e-9);
    }

    #[test]
    fn kl_of_two_coins() {
        let mut scores = Scores::default();
        let p = [0.75f32.ln(), 0.25f32.ln()];
        let q = [0.5f32.ln(), 0.5f32.ln()];
        scores.add(score(&q, Some(&p), 0)).unwrap();
        let want = 0.75 * (0.75f64 / 0.5).ln() + 0.25 * (0.25f64 / 0.5).ln();
        assert!((scores.kl[0] - want).abs() < 1e-6);
    }

    #[test]
    fn a_prediction_that_is_not_finite_is_an_error() {
        assert!(Scores::default().add(score(&[f32::NAN, 1.0], None, 1)).is_err());
    }

    #[test]
    fn percentiles_interpolate() {
        assert_eq!(percentile(&[0.0, 1.0, 2.0, 3.0], 0.5), 1.5);
        assert_eq!(percentile(&[4.0], 0.99), 4.0);
    }
}
