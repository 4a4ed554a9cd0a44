//! A decoder-only transformer, written once over [`Backend`] and configured by [`ModelConfig`].
//!
//! ```text
//! x = embed(tokens)
//! each layer:  h = norm(x);  q, k, v = h * Wqkv;  rope(q, k);  cache += k, v;  x += attention(q) * Wo
//!              h = norm(x);  g, u = h * Wgu;  x += (act(g) * u) * Wdown
//! logits = norm(x) * Whead
//! ```

mod partial;
mod predict;

pub use partial::PARTS;

use crate::backend::{AttentionSpec, Backend, KvKind, KvPlan, Linear, Norm, Segment};
use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::sample::Top;
use crate::weights::Weights;
use std::ops::Range;

/// One decoder layer's parameters on the device.
struct Layer<B: Backend> {
    attention_norm: B::Vector,
    q: B::Weight,
    k: B::Weight,
    v: B::Weight,
    o: B::Weight,
    q_bias: Option<B::Vector>,
    k_bias: Option<B::Vector>,
    v_bias: Option<B::Vector>,
    o_bias: Option<B::Vector>,
    q_norm: Option<B::Vector>,
    k_norm: Option<B::Vector>,
    ffn_norm: B::Vector,
    gate: B::Weight,
    up: B::Weight,
    down: B::Weight,
    gate_bias: Option<B::Vector>,
    up_bias: Option<B::Vector>,
    down_bias: Option<B::Vector>,
}

/// A model on a device, ready to run.
pub struct Decoder<B: Backend> {
    config: ModelConfig,
    backend: B,
    embedding: B::Weight,
    layers: Vec<Layer<B>>,
    norm: B::Vector,
    head: Option<B::Weight>,
    linear_parameters: u64,
    linear_bytes: u64,
}

/// How large a context is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContextPlan {
    /// Sequences that are kept side by side.
    pub sequences: usize,
    /// Positions of one sequence.
    pub capacity: usize,
    /// Most rows of one forward pass: a prompt is taken in chunks of this many tokens.
    pub chunk: usize,
    /// Most rows that logits are asked for at once.
    pub logit_rows: usize,
    /// How keys and values are kept.
    pub kv: KvKind,
}

impl Default for ContextPlan {
    fn default() -> Self {
        ContextPlan { sequences: 1, capacity: 2048, chunk: 512, logit_rows: 1, kv: KvKind::F16 }
    }
}

/// The running state of one or more sequences, and every buffer that a forward pass needs.
pub struct Context<B: Backend> {
    plan: ContextPlan,
    rope: B::Rope,
    caches: Vec<B::Cache>,
    lengths: Vec<usize>,
    x: B::Buffer,
    h: B::Buffer,
    q: B::Buffer,
    k: B::Buffer,
    v: B::Buffer,
    attended: B::Buffer,
    gate: B::Buffer,
    up: B::Buffer,
    selected: B::Buffer,
    logits: B::Buffer,
    tokens: Vec<u32>,
    choices: Vec<u32>,
    top: Top,
    segments: Vec<Segment>,
    rows: usize,
}

/// Where in a layer a linear's input is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Site {
    /// The input of q, k and v.
    Qkv,
    /// The input of o.
    Output,
    /// The input of gate and up.
    GateUp,
    /// The input of down.
    Down,
}

/// Somebody who looks at a forward pass's activations.
pub trait Tap {
    /// The input of a layer's linears: (rows, width) row-major.
    fn linear_input(&mut self, layer: usize, site: Site, values: &[f32], width: usize);
}

impl<B: Backend> Decoder<B> {
    /// Moves a checkpoint's parameters to the device, one matrix at a time.
    pub fn load(config: &ModelConfig, weights: Weights<'_>, backend: B) -> Result<Self> {
        let mut linear_parameters = 0u64;
        let mut linear_bytes = 0u64;
        let matrix = |name: &str, n: usize, k: usize| -> Result<B::Weight> {
            let weight = backend.weight(weights.matrix(name, n, k)?)?;
            weights.release(name);
            Ok(weight)
        };
        let vector = |name: &str, n: usize| -> Result<B::Vector> {
            let mut values = weights.vector(name, n)?;
            if name.ends_with("norm.weight") && config.norm_add_one {
                values.iter_mut().for_each(|g| *g += 1.0);
            }
            backend.vector(&values)
        };
        let optional = |present: bool, name: &str, n: usize| -> Result<Option<B::Vector>> {
            if present { vector(name, n).map(Some) } else { Ok(None) }
        };
        let (d, f) = (config.hidden, config.ffn);
        let (qd, kd) = (config.q_width(), config.kv_width());
        // The largest matrices first: while one is packed, its bytes in the file are in memory too.
        let embedding = matrix("model.embed_tokens.weight", config.vocab_size, d)?;
        let head = if config.tie_embeddings { None } else { Some(matrix("lm_head.weight", config.vocab_size, d)?) };
        let mut layers = Vec::with_capacity(config.layers.len());
        for i in 0..config.layers.len() {
            let at = |rest: &str| format!("model.layers.{i}.{rest}");
            let mut linear = |name: &str, n: usize, k: usize| -> Result<B::Weight> {
                let weight = matrix(&at(name), n, k)?;
                linear_parameters += (n * k) as u64;
                linear_bytes += backend.weight_bytes(&weight) as u64;
                Ok(weight)
            };
            layers.push(Layer {
                q: linear("self_attn.q_proj.weight", qd, d)?,
                k: linear("self_attn.k_proj.weight", kd, d)?,
                v: linear("self_attn.v_proj.weight", kd, d)?,
                o: linear("self_attn.o_proj.weight", d, qd)?,
                gate: linear("mlp.gate_proj.weight", f, d)?,
                up: linear("mlp.up_proj.weight", f, d)?,
                down: linear("mlp.down_proj.weight", d, f)?,
                attention_norm: vector(&at("input_layernorm.weight"), d)?,
                ffn_norm: vector(&at("post_attention_layernorm.weight"), d)?,
                q_bias: optional(config.qkv_bias, &at("self_attn.q_proj.bias"), qd)?,
                k_bias: optional(config.qkv_bias, &at("self_attn.k_proj.bias"), kd)?,
                v_bias: optional(config.qkv_bias, &at("self_attn.v_proj.bias"), kd)?,
                o_bias: optional(config.o_bias, &at("self_attn.o_proj.bias"), d)?,
                gate_bias: optional(config.mlp_bias, &at("mlp.gate_proj.bias"), f)?,
                up_bias: optional(config.mlp_bias, &at("mlp.up_proj.bias"), f)?,
                down_bias: optional(config.mlp_bias, &at("mlp.down_proj.bias"), d)?,
                q_norm: optional(config.qk_norm, &at("self_attn.q_norm.weight"), config.head_dim)?,
                k_norm: optional(config.qk_norm, &at("self_attn.k_norm.weight"), config.head_dim)?,
            });
        }
        let norm = vector("model.norm.weight", d)?;
        Ok(Decoder { config: config.clone(), embedding, layers, norm, head, linear_parameters, linear_bytes, backend })
    }

    /// What the model is configured by.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Parameters in the layers' linears.
    pub fn linear_parameters(&self) -> u64 {
        self.linear_parameters
    }

    /// Bytes that one decoded token reads: the layers' linears and the output head.
    pub fn bytes_per_token(&self) -> u64 {
        self.linear_bytes + self.backend.weight_bytes(self.head()) as u64
    }

    /// Multiply-adds that one token costs in linears, the output head included.
    pub fn multiply_adds_per_token(&self) -> u64 {
        self.linear_parameters + (self.config.vocab_size * self.config.hidden) as u64
    }

    /// Bytes of all weights on the device.
    pub fn weight_bytes(&self) -> u64 {
        let head = self.head.as_ref().map_or(0, |w| self.backend.weight_bytes(w));
        self.linear_bytes + (head + self.backend.weight_bytes(&self.embedding)) as u64
    }

    fn head(&self) -> &B::Weight {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Plans caches and buffers; nothing is allocated after this.
    pub fn context(&self, plan: ContextPlan) -> Result<Context<B>> {
        let c = &self.config;
        if plan.capacity == 0 || plan.chunk == 0 || plan.sequences == 0 || plan.logit_rows == 0 {
            return Err(ModelError::Context { why: format!("{plan:?} has a zero; every size must be at least 1") });
        }
        let rotation = c.rope.frequencies();
        let chunk = plan.chunk.min(plan.capacity).max(plan.sequences);
        let plan = ContextPlan { chunk, logit_rows: plan.logit_rows.min(chunk), ..plan };
        let kv = KvPlan {
            layers: c.layers.len(),
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            capacity: plan.capacity,
            kind: plan.kv,
        };
        let b = &self.backend;
        let (qd, kd) = (c.q_width(), c.kv_width());
        Ok(Context {
            rope: b.rope_table(&rotation.inv_freq, rotation.attention_factor, plan.capacity)?,
            caches: (0..plan.sequences).map(|_| b.cache(&kv)).collect::<Result<_>>()?,
            lengths: vec![0; plan.sequences],
            x: b.buffer(chunk, c.hidden)?,
            h: b.buffer(chunk, c.hidden)?,
            q: b.buffer(chunk, qd)?,
            k: b.buffer(chunk, kd)?,
            v: b.buffer(chunk, kd)?,
            attended: b.buffer(chunk, qd)?,
            gate: b.buffer(chunk, c.ffn)?,
            up: b.buffer(chunk, c.ffn)?,
            selected: b.buffer(plan.logit_rows, c.hidden)?,
            logits: b.buffer(plan.logit_rows, c.vocab_size)?,
            choices: Vec::with_capacity(plan.logit_rows),
            top: Top::default(),
            tokens: Vec::with_capacity(chunk),
            segments: Vec::with_capacity(plan.sequences),
            rows: 0,
            plan,
        })
    }

    /// Runs a batch: for each `(sequence, tokens)` the tokens continue that sequence. Afterwards [`Decoder::logits`]
    /// gives the predictions of any row; rows are numbered in the batch's order.
    ///
    /// The batch holds at most the plan's `chunk` rows; a sequence appears at most once.
    pub fn forward(&self, cx: &mut Context<B>, batch: &[(usize, &[u32])], mut tap: Option<&mut dyn Tap>) -> Result<()> {
        self.place(cx, batch)?;
        let c = &self.config;
        let b = &self.backend;
        b.embed(&self.embedding, &cx.tokens, c.embedding_scale.unwrap_or(1.0), &mut cx.x)?;
        for i in 0..self.layers.len() {
            self.layer(cx, i, &mut tap)?;
        }
        for segment in &cx.segments {
            cx.lengths[segment.sequence] += segment.rows.len();
        }
        Ok(())
    }

    /// Sends the batch's residual stream through one layer.
    fn layer(&self, cx: &mut Context<B>, i: usize, tap: &mut Option<&mut dyn Tap>) -> Result<()> {
        let (c, b, rows, layer) = (&self.config, &self.backend, cx.rows, &self.layers[i]);
        let norm = Norm { x: &cx.x, gain: &layer.attention_norm, eps: c.rms_eps, out: &mut cx.h };
        let products = &mut [
            Linear { weight: &layer.q, bias: layer.q_bias.as_ref(), out: &mut cx.q },
            Linear { weight: &layer.k, bias: layer.k_bias.as_ref(), out: &mut cx.k },
            Linear { weight: &layer.v, bias: layer.v_bias.as_ref(), out: &mut cx.v },
        ];
        match &mut *tap {
            None => b.norm_linear(norm, rows, products)?,
            tap => {
                b.rms_norm(norm.x, norm.gain, norm.eps, rows, norm.out)?;
                self.show(tap, i, Site::Qkv, norm.out, rows, c.hidden)?;
                b.linear(norm.out, rows, products)?;
            }
        }
        if let (Some(q_norm), Some(k_norm)) = (&layer.q_norm, &layer.k_norm) {
            b.head_norm(&mut cx.q, q_norm, c.rms_eps, rows)?;
            b.head_norm(&mut cx.k, k_norm, c.rms_eps, rows)?;
        }
        let spec = self.attention_spec(i);
        let rope = c.layers[i].rope.then_some(&cx.rope);
        let qkv = (&mut cx.q, &mut cx.k, &cx.v);
        b.append_and_attend(&mut cx.caches, i, rope, qkv, &spec, &cx.segments, &mut cx.attended)?;
        self.show(tap, i, Site::Output, &cx.attended, rows, c.q_width())?;
        self.residual(&mut cx.attended, rows, (&layer.o, layer.o_bias.as_ref()), &mut cx.h, &mut cx.x)?;

        let norm = Norm { x: &cx.x, gain: &layer.ffn_norm, eps: c.rms_eps, out: &mut cx.h };
        let gate = Linear { weight: &layer.gate, bias: layer.gate_bias.as_ref(), out: &mut cx.gate };
        let up = Linear { weight: &layer.up, bias: layer.up_bias.as_ref(), out: &mut cx.up };
        match &mut *tap {
            None => b.norm_gated(norm, rows, c.activation, gate, up)?,
            tap => {
                b.rms_norm(norm.x, norm.gain, norm.eps, rows, norm.out)?;
                self.show(tap, i, Site::GateUp, norm.out, rows, c.hidden)?;
                b.linear(norm.out, rows, &mut [gate, up])?;
                b.gated(c.activation, &mut cx.gate, &cx.up, rows)?;
            }
        }
        self.show(tap, i, Site::Down, &cx.gate, rows, c.ffn)?;
        self.residual(&mut cx.gate, rows, (&layer.down, layer.down_bias.as_ref()), &mut cx.h, &mut cx.x)
    }

    /// The whole of a prompt, in chunks; the last row's logits can be asked for afterwards with
    /// [`Decoder::last_logits`].
    pub fn prefill(&self, cx: &mut Context<B>, sequence: usize, tokens: &[u32]) -> Result<()> {
        for chunk in tokens.chunks(cx.plan.chunk) {
            self.forward(cx, &[(sequence, chunk)], None)?;
        }
        Ok(())
    }

    /// x += scale * (input * weight^T + bias); `spare` is overwritten where the family scales.
    fn residual(
        &self,
        input: &mut B::Buffer,
        rows: usize,
        (weight, bias): (&B::Weight, Option<&B::Vector>),
        spare: &mut B::Buffer,
        x: &mut B::Buffer,
    ) -> Result<()> {
        let b = &self.backend;
        match self.config.residual_scale {
            None => b.linear_add(input, rows, weight, bias, x),
            Some(factor) => {
                b.linear(input, rows, &mut [Linear { weight, bias, out: spare }])?;
                b.scale(spare, factor, rows)?;
                b.add(x, spare, rows)
            }
        }
    }

    fn attention_spec(&self, layer: usize) -> AttentionSpec {
        let c = &self.config;
        AttentionSpec {
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            scale: c.query_scale,
            window: c.layers[layer].window,
            softcap: c.attention_softcap,
        }
    }

    /// Writes the batch into the context's token and segment lists, or says why it doesn't fit.
    fn place(&self, cx: &mut Context<B>, batch: &[(usize, &[u32])]) -> Result<()> {
        cx.tokens.clear();
        cx.segments.clear();
        let vocabulary = self.config.vocab_size;
        for (sequence, tokens) in batch.iter().copied() {
            let Some(&position) = cx.lengths.get(sequence) else {
                let why = format!("sequence {sequence} of a context with {}", cx.plan.sequences);
                return Err(ModelError::Context { why });
            };
            if cx.segments.iter().any(|s| s.sequence == sequence) {
                return Err(ModelError::Context { why: format!("sequence {sequence} appears twice in a batch") });
            }
            if position + tokens.len() > cx.plan.capacity {
                return Err(ModelError::ContextFull { wanted: position + tokens.len(), capacity: cx.plan.capacity });
            }
            if let Some(token) = tokens.iter().find(|t| **t as usize >= vocabulary) {
                let why = format!("token {token} of a model with {vocabulary} tokens");
                return Err(ModelError::Context { why });
            }
            let start = cx.tokens.len();
            if start + tokens.len() > cx.plan.chunk {
                let why = format!("a batch of over {} rows; the context was planned for that many", cx.plan.chunk);
                return Err(ModelError::Context { why });
            }
            cx.tokens.extend_from_slice(tokens);
            cx.segments.push(Segment { sequence, rows: start..start + tokens.len(), position });
        }
        cx.rows = cx.tokens.len();
        Ok(())
    }

    fn show(
        &self,
        tap: &mut Option<&mut dyn Tap>,
        layer: usize,
        site: Site,
        buffer: &B::Buffer,
        rows: usize,
        width: usize,
    ) -> Result<()> {
        if let Some(tap) = tap {
            tap.linear_input(layer, site, &self.backend.read(buffer, 0..rows)?, width);
        }
        Ok(())
    }
}

impl<B: Backend> Context<B> {
    /// Tokens that a sequence holds.
    pub fn length(&self, sequence: usize) -> usize {
        self.lengths.get(sequence).copied().unwrap_or(0)
    }

    /// What the context was planned for.
    pub fn plan(&self) -> &ContextPlan {
        &self.plan
    }

    /// Keeps a sequence's first `length` tokens and forgets the rest.
    pub fn truncate(&mut self, backend: &B, sequence: usize, length: usize) -> Result<()> {
        if let (Some(cache), Some(held)) = (self.caches.get_mut(sequence), self.lengths.get_mut(sequence))
            && length < *held
        {
            backend.truncate(cache, length)?;
            *held = length;
        }
        Ok(())
    }

    /// Rows of the last batch.
    pub fn rows(&self) -> Range<usize> {
        0..self.rows
    }
}
