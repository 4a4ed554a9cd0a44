//! What comes after rows of a batch: their logits, the likeliest tokens, or one that is drawn.

use super::{Context, Decoder};
use crate::backend::{Backend, Linear, Norm};
use crate::error::{ModelError, Result};
use crate::sample::{Look, Sampler};
use std::borrow::Cow;

impl<B: Backend> Decoder<B> {
    /// Logits of some rows of the last batch, (rows, vocabulary) row-major; at most the plan's `logit_rows`.
    pub fn logits<'a>(&self, cx: &'a mut Context<B>, rows: &[usize]) -> Result<Cow<'a, [f32]>> {
        self.predict(cx, rows)?;
        self.backend.read(&cx.logits, 0..rows.len())
    }

    /// The likeliest of the first `vocabulary` tokens after some rows of the last batch: what [`Decoder::logits`] would
    /// show, but only the tokens leave the device.
    ///
    /// # Errors
    /// As [`Decoder::logits`], or a row's logits are no numbers.
    pub fn likeliest<'a>(&self, cx: &'a mut Context<B>, rows: &[usize], vocabulary: usize) -> Result<&'a [u32]> {
        self.predict(cx, rows)?;
        let vocabulary = vocabulary.min(self.config.vocab_size);
        self.backend.argmax(&cx.logits, rows.len(), vocabulary, &mut cx.choices)?;
        Ok(&cx.choices)
    }

    /// The next token after a row of the last batch, chosen among the first tokens: as many as the sampler's vocabulary
    /// has. The logits stay on the device, but for as many as the choice needs.
    ///
    /// # Errors
    /// As [`Decoder::logits`]; the row's logits are no numbers, or the sampler chooses among more.
    pub fn choose(&self, cx: &mut Context<B>, row: usize, sampler: &mut Sampler) -> Result<u32> {
        let (vocabulary, logits) = (sampler.vocab_size(), self.config.vocab_size);
        if vocabulary > logits {
            let why = format!("{logits} values for a vocabulary of {vocabulary}");
            return Err(ModelError::Logits { why });
        }
        self.predict(cx, &[row])?;
        let b = &self.backend;
        if let Some((penalty, tokens)) = sampler.penalties() {
            b.penalize(&mut cx.logits, 0, penalty, tokens)?;
        }
        match sampler.look() {
            Look::Likeliest => {
                b.argmax(&cx.logits, 1, vocabulary, &mut cx.choices)?;
                let none = || ModelError::Logits { why: "there are none".to_owned() };
                return cx.choices.first().copied().ok_or_else(none);
            }
            Look::Top { k, temperature } => {
                b.top(&cx.logits, 0, vocabulary, k, temperature, &mut cx.top)?;
                if let Some(token) = sampler.choose_among(&cx.top)? {
                    return Ok(token);
                }
            }
            Look::All => (),
        }
        sampler.choose_among_all(&b.read(&cx.logits, 0..1)?[..vocabulary])
    }

    /// Logits of the last batch's last row.
    pub fn last_logits<'a>(&self, cx: &'a mut Context<B>) -> Result<Cow<'a, [f32]>> {
        let last = cx.rows.saturating_sub(1);
        self.logits(cx, &[last])
    }

    /// Leaves the logits of some rows of the last batch on the device.
    fn predict(&self, cx: &mut Context<B>, rows: &[usize]) -> Result<()> {
        if rows.len() > cx.plan.logit_rows {
            let why = format!("logits of {} rows at once, planned for {}", rows.len(), cx.plan.logit_rows);
            return Err(ModelError::Context { why });
        }
        if let Some(row) = rows.iter().find(|row| **row >= cx.rows) {
            let why = format!("logits of row {row}; the last batch had {} rows", cx.rows);
            return Err(ModelError::Context { why });
        }
        let b = &self.backend;
        let is_all = rows.iter().copied().eq(0..cx.rows);
        if !is_all {
            b.select_rows(&cx.x, rows, &mut cx.selected)?;
        }
        let x = if is_all { &cx.x } else { &cx.selected };
        let norm = Norm { x, gain: &self.norm, eps: self.config.rms_eps, out: &mut cx.h };
        let head = Linear { weight: self.head(), bias: None, out: &mut cx.logits };
        b.norm_linear(norm, rows.len(), &mut [head])?;
        if let Some(factor) = self.config.logit_scale {
            b.scale(&mut cx.logits, factor, rows.len())?;
        }
        if let Some(cap) = self.config.logit_softcap {
            b.softcap(&mut cx.logits, cap, rows.len())?;
        }
        Ok(())
    }
}
