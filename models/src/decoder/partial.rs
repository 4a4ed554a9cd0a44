//! A forward pass in parts, from the residual stream before any layer, and layers of one model tried in another.

use super::{Context, Decoder, Tap};
use crate::backend::Backend;
use crate::cpu::CpuBackend;
use crate::error::{ModelError, Result};
use std::ops::Range;

/// The linear layers of a layer, in the order of the forward pass.
pub const PARTS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

impl Decoder<CpuBackend> {
    /// The residual stream before the first layer, (tokens, hidden), of a sequence that begins with `tokens`.
    ///
    /// # Errors
    /// The tokens don't fit the context.
    pub fn embedded(&self, cx: &mut Context<CpuBackend>, tokens: &[u32]) -> Result<Vec<f32>> {
        self.begin(cx, tokens)?;
        let scale = self.config.embedding_scale.unwrap_or(1.0);
        self.backend.embed(&self.embedding, &cx.tokens, scale, &mut cx.x)?;
        Ok(self.backend.read(&cx.x, 0..cx.rows)?.into_owned())
    }

    /// The residual stream after some layers of what it was before the first of them.
    ///
    /// # Errors
    /// `stream` isn't that of whole tokens, they don't fit the context, or there are no such layers.
    pub fn through(
        &self,
        cx: &mut Context<CpuBackend>,
        stream: &[f32],
        layers: Range<usize>,
        mut tap: Option<&mut dyn Tap>,
    ) -> Result<Vec<f32>> {
        let rows = stream.len() / self.config.hidden.max(1);
        if layers.end > self.layers.len() || rows * self.config.hidden != stream.len() {
            let why = format!("layers {layers:?} of {}, {} values", self.layers.len(), stream.len());
            return Err(ModelError::Context { why });
        }
        // Positions are all that matters of tokens from here on.
        self.begin(cx, &vec![0; rows])?;
        cx.x.write(rows).copy_from_slice(stream);
        for i in layers {
            self.layer(cx, i, &mut tap)?;
        }
        Ok(self.backend.read(&cx.x, 0..rows)?.into_owned())
    }

    /// Logits, (rows, vocabulary), of some rows of the residual stream after the last layer.
    ///
    /// # Errors
    /// As [`Decoder::logits`].
    pub fn logits_after(&self, cx: &mut Context<CpuBackend>, stream: &[f32], rows: &[usize]) -> Result<Vec<f32>> {
        let count = stream.len() / self.config.hidden.max(1);
        self.begin(cx, &vec![0; count])?;
        cx.x.write(count).copy_from_slice(stream);
        let mut all = Vec::with_capacity(rows.len() * self.config.vocab_size);
        for rows in rows.chunks(cx.plan.logit_rows) {
            all.extend_from_slice(&self.logits(cx, rows)?);
        }
        Ok(all)
    }

    /// Swaps the weight of one of [`PARTS`] of a layer with another model's of the same shape.
    ///
    /// # Errors
    /// There is no such layer in one of them, or the shapes differ.
    pub fn exchange(&mut self, other: &mut Self, layer: usize, part: usize) -> Result<()> {
        let refuse = || ModelError::Context { why: format!("models that differ in part {part} of layer {layer}") };
        let own = self.part(layer, part).ok_or_else(refuse)?;
        let others = other.part(layer, part).ok_or_else(refuse)?;
        if (own.n(), own.k()) != (others.n(), others.k()) {
            return Err(refuse());
        }
        std::mem::swap(own, others);
        Ok(())
    }

    fn part(&mut self, layer: usize, part: usize) -> Option<&mut <CpuBackend as Backend>::Weight> {
        let layer = self.layers.get_mut(layer)?;
        let parts =
            [&mut layer.q, &mut layer.k, &mut layer.v, &mut layer.o, &mut layer.gate, &mut layer.up, &mut layer.down];
        parts.into_iter().nth(part)
    }

    /// Places a sequence of these tokens from its beginning on.
    fn begin(&self, cx: &mut Context<CpuBackend>, tokens: &[u32]) -> Result<()> {
        cx.lengths[0] = 0;
        self.backend.truncate(&mut cx.caches[0], 0)?;
        self.place(cx, &[(0, tokens)])
    }
}
