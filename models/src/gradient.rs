//! Which errors of a linear layer's outputs a model minds: statistics of its inputs and of gradients by its outputs.
//!
//! What a small change D of one layer's weights does to the model's predictions is, in nats of KL divergence a token,
//! `1/2 vec(D)^T F vec(D)` with F = E[g g^T (x) x x^T], the Fisher information: x the layer's input, g the gradient of the log
//! likelihood of a token drawn from the model's own predictions by the layer's output. F is kept as the product of a matrix
//! over inputs and one over outputs ([`Input::observe_gradients`]).
//!
//! The model is built once more here, from candle's tensors, since gradients need its operators' ways back. It has to
//! give the logits of [`crate::decoder`]; a test holds them together.

use crate::block::{Block, PARTS, Positions, part_shape, read, rms_norm, weight_name};
use crate::calibrate::{Calibration, CalibrationPlan};
use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::sample::Rng;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor, Var};
use nibble_quant::QuantError;
use nibble_quant::format::source::TensorSource;
use nibble_quant::stats::{Input, Stats, gram_bytes};
use std::sync::{Arc, Mutex, PoisonError};

/// Rows whose logits are held at once.
const LOGIT_ROWS: usize = 64;
/// Of the tokens that are drawn.
const SEED: u64 = 0;

type Candle<T> = candle_core::Result<T>;

/// Runs a model over a text and keeps, for every linear layer, what its inputs and the gradients by its outputs say.
/// `progress` is told the chunks done and of how many; it answers whether to go on.
///
/// # Errors
/// The text is shorter than a chunk, the model can't be read or run, or a number isn't finite.
pub fn calibrate_gradients(
    source: &dyn TensorSource,
    config: &ModelConfig,
    tokens: &[u32],
    plan: &CalibrationPlan,
    mut progress: impl FnMut(usize, usize) -> bool,
) -> Result<Calibration> {
    let (chunks, tokens) = plan.chunks(tokens)?;
    let model = Differentiable::load(source, config, plan.gram_bytes)?;
    let mut rng = Rng::new(SEED);
    for (i, chunk) in tokens.chunks_exact(plan.n_ctx).take(chunks).enumerate() {
        let mut chunk = chunk.to_vec();
        if let (Some(first), Some(bos)) = (chunk.first_mut(), plan.bos) {
            *first = bos;
        }
        model.observe(&chunk, &mut rng)?;
        if !progress(i + 1, chunks) {
            return Err(QuantError::Stopped.into());
        }
    }
    model.finish(chunks * plan.n_ctx, plan)
}

/// A linear layer that looks at what passes through it on the way back.
struct Linear {
    name: String,
    /// (n, k)
    weight: Tensor,
    seen: Arc<Mutex<Input>>,
}

struct Layer {
    block: Block,
    /// In the order of [`PARTS`].
    linears: Vec<Linear>,
}

/// A decoder that gradients flow through.
struct Differentiable<'a> {
    config: &'a ModelConfig,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Tensor,
}

impl<'a> Differentiable<'a> {
    fn load(source: &dyn TensorSource, config: &'a ModelConfig, memory: u64) -> Result<Self> {
        let d = config.hidden;
        let mut left = memory;
        let mut layers = Vec::with_capacity(config.layers.len());
        for i in 0..config.layers.len() {
            let mut linear = |part: usize| -> Result<Linear> {
                let ([n, k], name) = (part_shape(config, part), weight_name(i, part));
                let bytes = gram_bytes(n) + gram_bytes(k);
                let granted = bytes <= left;
                left -= if granted { bytes } else { 0 };
                let seen = if granted { Input::both(k, n) } else { Input::new(k, false) };
                Ok(Linear { weight: read(source, config, &name, &[n, k])?, seen: Arc::new(Mutex::new(seen)), name })
            };
            let linears = (0..PARTS.len()).map(&mut linear).collect::<Result<_>>()?;
            layers.push(Layer { block: Block::load(source, config, i)?, linears });
        }
        let embedding = read(source, config, "model.embed_tokens.weight", &[config.vocab_size, d])?;
        let head = match config.tie_embeddings {
            true => embedding.clone(),
            false => read(source, config, "lm_head.weight", &[config.vocab_size, d])?,
        };
        Ok(Differentiable { config, embedding, layers, norm: read(source, config, "model.norm.weight", &[d])?, head })
    }

    /// One chunk forward and back.
    fn observe(&self, chunk: &[u32], rng: &mut Rng) -> Result<()> {
        if let Some(token) = chunk.iter().find(|t| **t as usize >= self.config.vocab_size) {
            let why = format!("token {token} of a model with {} tokens", self.config.vocab_size);
            return Err(ModelError::Context { why });
        }
        let ids = Tensor::new(chunk, &Device::Cpu)?;
        let embedded = self.embedding.index_select(&ids, 0)?;
        let embedded = Var::from_tensor(&(embedded * self.config.embedding_scale.unwrap_or(1.0) as f64)?)?;
        let hidden = self.hidden(embedded.as_tensor())?;
        let gradient = self.by_hidden(&hidden.detach(), rng)?;
        // Its gradient by `hidden` is `gradient`.
        (hidden * gradient)?.sum_all()?.backward()?;
        Ok(())
    }

    /// (tokens, hidden) before the output head.
    fn hidden(&self, embedded: &Tensor) -> Candle<Tensor> {
        let positions = Positions::new(self.config, embedded.dim(0)?)?;
        let mut x = embedded.clone();
        for layer in &self.layers {
            x = layer.block.forward(self.config, &positions, &x, &mut |part, h| layer.linears[part].forward(h))?;
        }
        rms_norm(&x, &self.norm, self.config.rms_eps)
    }

    /// Gradient of the negative log likelihood of tokens drawn from the predictions, by what the head reads.
    fn by_hidden(&self, hidden: &Tensor, rng: &mut Rng) -> Result<Tensor> {
        let c = self.config;
        let (count, scale) = (hidden.dim(0)?, c.logit_scale.unwrap_or(1.0));
        let mut parts = Vec::new();
        for start in (0..count).step_by(LOGIT_ROWS) {
            let rows = hidden.narrow(0, start, LOGIT_ROWS.min(count - start))?;
            let logits = (rows.matmul(&self.head.t()?)? * scale as f64)?;
            let shape = logits.shape().clone();
            let mut values = logits.flatten_all()?.to_vec1::<f32>()?;
            for row in values.chunks_mut(c.vocab_size) {
                by_logits(row, c.logit_softcap, scale, rng);
            }
            parts.push(Tensor::from_vec(values, shape, &Device::Cpu)?.matmul(&self.head)?);
        }
        Ok(Tensor::cat(&parts, 0)?)
    }

    fn finish(self, tokens: usize, plan: &CalibrationPlan) -> Result<Calibration> {
        let made_from = format!("{} ({tokens} tokens in chunks of {}, with gradients)", plan.text, plan.n_ctx);
        let mut stats = Stats { made_from, ..Stats::default() };
        let mut grams = (0, 0);
        for layer in self.layers {
            for linear in layer.linears {
                let seen =
                    Arc::into_inner(linear.seen).map(|seen| seen.into_inner().unwrap_or_else(PoisonError::into_inner));
                let Some(input) = seen else { continue };
                match input.gram() {
                    Some(_) => grams.0 += 1,
                    None => grams.1 += 1,
                }
                stats.inputs.insert(linear.name, Arc::new(input));
            }
        }
        Ok(Calibration { stats, tokens, grams })
    }
}

/// Logits of one row become the gradient by them (before the factor `scale`).
fn by_logits(row: &mut [f32], softcap: Option<f32>, scale: f32, rng: &mut Rng) {
    if let Some(cap) = softcap {
        row.iter_mut().for_each(|z| *z = cap * (*z / cap).tanh());
    }
    let normalizer = crate::eval::log_sum_exp(row);
    let (mut left, mut drawn) = (rng.unit(), row.len().saturating_sub(1));
    let mut found = false;
    for (i, z) in row.iter_mut().enumerate() {
        let p = (*z as f64 - normalizer).exp();
        let slope = softcap.map_or(1.0, |cap| 1.0 - (*z / cap).powi(2));
        *z = p as f32 * slope * scale;
        left -= p;
        if !found && left < 0.0 {
            (drawn, found) = (i, true);
            *z -= slope * scale;
        }
    }
    // All shares together may round to less than 1.
    if !found && let Some(z) = row.get_mut(drawn) {
        *z -= scale;
    }
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Candle<Tensor> {
        x.apply_op1(Product { name: self.name.clone(), weight: self.weight.clone(), seen: Arc::clone(&self.seen) })
    }
}

/// x W^T with W a constant, which shows input and gradient to the statistics.
struct Product {
    name: String,
    weight: Tensor,
    seen: Arc<Mutex<Input>>,
}

impl CustomOp1 for Product {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        let refuse = || candle_core::Error::Msg(format!("`{}` takes contiguous f32", self.name));
        let (CpuStorage::F32(values), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
            return Err(refuse());
        };
        let x = Tensor::from_slice(&values[start..end], layout.shape(), &Device::Cpu)?;
        let y = x.matmul(&self.weight.t()?)?;
        let shape = y.shape().clone();
        Ok((CpuStorage::F32(y.flatten_all()?.to_vec1()?), shape))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        debug_assert_eq!(x.dtype(), DType::F32);
        let (x, g) = (x.flatten_all()?.to_vec1::<f32>()?, gradient.flatten_all()?.to_vec1::<f32>()?);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.observe_gradients(&self.name, &x, &g).map_err(candle_core::Error::wrap)?;
        Ok(Some(gradient.matmul(&self.weight)?))
    }
}

#[cfg(test)]
mod tests;
