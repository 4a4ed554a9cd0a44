//! The operations that a transformer needs, over buffers that the backend owns.
//!
//! A family is written once over [`Backend`] and runs on every device that implements it. Buffers are planned when a
//! context is made ([`crate::decoder::Decoder::context`]): no operation allocates. Rows of a buffer are tokens; which
//! sequence and position a row belongs to is said by [`Segment`]s, so that one forward pass serves a prompt chunk, one
//! decoded token, or one token each of many sequences.

use crate::config::Activation;
use crate::error::Result;
use crate::sample::{Penalized, Penalty, Top};
use nibble_quant::format::source::QuantizedRows;
use std::ops::Range;

/// Rows of a batch that continue one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Which sequence of the context they belong to.
    pub sequence: usize,
    /// Their rows in the batch.
    pub rows: Range<usize>,
    /// Position of the first of them within its sequence: how many tokens the cache holds before.
    pub position: usize,
}

/// A matrix on its way to a device: (n, k), row n is an output feature.
#[derive(Debug)]
pub enum Matrix<'a> {
    /// Codes and scales, still in their file.
    Quantized(QuantizedRows<'a>),
    /// Floats as a checkpoint stores them.
    Dense(DenseMatrix<'a>),
}

/// Floats in little-endian bytes, (n, k) row-major.
#[derive(Debug, Clone)]
pub struct DenseMatrix<'a> {
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// What the bytes are.
    pub dtype: nibble_quant::FloatFormat,
    /// The bytes, of any alignment.
    pub bytes: std::borrow::Cow<'a, [u8]>,
}

/// What an attention layer does with queries, keys and values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; `heads` is a multiple.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor on the dot products, usually 1/sqrt(head_dim).
    pub scale: f32,
    /// Only this many most recent positions are seen, counting the query's own.
    pub window: Option<usize>,
    /// Dot products become cap * tanh(dot / cap).
    pub softcap: Option<f32>,
}

/// How keys and values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvKind {
    /// Single precision, for comparisons.
    F32,
    /// Half precision.
    #[default]
    F16,
    /// int8 codes with a scale a head and position.
    Int8,
}

/// The size of one sequence's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvPlan {
    /// Decoder layers.
    pub layers: usize,
    /// Key/value heads of a layer.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Positions that fit.
    pub capacity: usize,
    /// How keys and values are kept.
    pub kind: KvKind,
}

/// One fused product of [`Backend::linear`]: `out = x * weight^T + bias`.
pub struct Linear<'a, B: Backend + ?Sized> {
    /// (n, k).
    pub weight: &'a B::Weight,
    /// (n), added to each row.
    pub bias: Option<&'a B::Vector>,
    /// (rows, n).
    pub out: &'a mut B::Buffer,
}

/// A norm before products: [`Backend::rms_norm`] of `x`.
pub struct Norm<'a, B: Backend + ?Sized> {
    /// (rows, k).
    pub x: &'a B::Buffer,
    /// (k).
    pub gain: &'a B::Vector,
    /// Added to the mean of squares.
    pub eps: f32,
    /// (rows, k): afterwards the normed rows, or nothing in particular.
    pub out: &'a mut B::Buffer,
}

/// A device: how it stores weights, activations and caches, and what it can do with them.
///
/// Every `rows` argument counts the rows in use, at most what the buffer was made for.
pub trait Backend: Send + Sync {
    /// A matrix in the device's layout.
    type Weight: Send + Sync;
    /// A vector of f32: a norm's gain or a bias.
    type Vector: Send + Sync;
    /// Activations, (rows, width) f32.
    type Buffer: Send;
    /// Keys and values of one sequence, all layers.
    type Cache: Send;
    /// Cosines and sines of every position.
    type Rope: Send + Sync;

    /// Moves a matrix to the device.
    fn weight(&self, matrix: Matrix<'_>) -> Result<Self::Weight>;
    /// Moves a vector to the device.
    fn vector(&self, values: &[f32]) -> Result<Self::Vector>;
    /// A buffer for up to `rows` rows of `width` values.
    fn buffer(&self, rows: usize, width: usize) -> Result<Self::Buffer>;
    /// An empty cache.
    fn cache(&self, plan: &KvPlan) -> Result<Self::Cache>;
    /// Rotation tables for positions `0..positions`; `inverse_frequencies` has one entry a rotated pair, and `factor`
    /// multiplies cosines and sines (YaRN's attention factor, else 1).
    fn rope_table(&self, inverse_frequencies: &[f32], factor: f32, positions: usize) -> Result<Self::Rope>;
    /// Bytes that a weight occupies on the device.
    fn weight_bytes(&self, weight: &Self::Weight) -> usize;

    /// Row i of `out` = scale * row `tokens[i]` of the table.
    fn embed(&self, table: &Self::Weight, tokens: &[u32], scale: f32, out: &mut Self::Buffer) -> Result<()>;
    /// out = x / rms(x) * gain, row by row.
    fn rms_norm(
        &self,
        x: &Self::Buffer,
        gain: &Self::Vector,
        eps: f32,
        rows: usize,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// The same over each head of `x`, in place (QK-norm).
    fn head_norm(&self, x: &mut Self::Buffer, gain: &Self::Vector, eps: f32, rows: usize) -> Result<()>;
    /// Several products of the same activations; the activations are quantized once.
    fn linear(&self, x: &mut Self::Buffer, rows: usize, products: &mut [Linear<'_, Self>]) -> Result<()>;
    /// out += x * weight^T + bias: a product that lands on the residual stream.
    fn linear_add(
        &self,
        x: &mut Self::Buffer,
        rows: usize,
        weight: &Self::Weight,
        bias: Option<&Self::Vector>,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// A norm and products of what it gives, which a device may do at once.
    fn norm_linear(&self, norm: Norm<'_, Self>, rows: usize, products: &mut [Linear<'_, Self>]) -> Result<()> {
        self.rms_norm(norm.x, norm.gain, norm.eps, rows, norm.out)?;
        self.linear(norm.out, rows, products)
    }
    /// gate.out = activation(gate) * up of a norm's products, which a device may do at once; what is left in `up.out` is
    /// nobody's business.
    fn norm_gated(
        &self,
        norm: Norm<'_, Self>,
        rows: usize,
        activation: Activation,
        gate: Linear<'_, Self>,
        up: Linear<'_, Self>,
    ) -> Result<()> {
        let mut products = [gate, up];
        self.norm_linear(norm, rows, &mut products)?;
        let [gate, up] = products;
        self.gated(activation, gate.out, up.out, rows)
    }
    /// Rotates each head of `x` by its row's position, NeoX halves, in place.
    fn rope(&self, x: &mut Self::Buffer, table: &Self::Rope, head_dim: usize, segments: &[Segment]) -> Result<()>;
    /// Appends each segment's keys and values (rows, kv_heads * head_dim) to its sequence's cache.
    fn append(
        &self,
        caches: &mut [Self::Cache],
        layer: usize,
        k: &Self::Buffer,
        v: &Self::Buffer,
        segments: &[Segment],
    ) -> Result<()>;
    /// [`Backend::rope`] of queries and keys and [`Backend::append`], which a device may do at once.
    fn rope_and_append(
        &self,
        caches: &mut [Self::Cache],
        layer: usize,
        table: &Self::Rope,
        head_dim: usize,
        (q, k, v): (&mut Self::Buffer, &mut Self::Buffer, &Self::Buffer),
        segments: &[Segment],
    ) -> Result<()> {
        self.rope(q, table, head_dim, segments)?;
        self.rope(k, table, head_dim, segments)?;
        self.append(caches, layer, k, v, segments)
    }
    /// Causal attention of each row's query heads over its sequence's cache; out is (rows, heads * head_dim).
    fn attention(
        &self,
        caches: &[Self::Cache],
        layer: usize,
        q: &Self::Buffer,
        spec: &AttentionSpec,
        segments: &[Segment],
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// [`Backend::rope_and_append`], or [`Backend::append`] without a table, and [`Backend::attention`], which a device may
    /// do at once; what is left in `q` and `k` is nobody's business.
    #[allow(clippy::too_many_arguments)] // what three operations take
    fn append_and_attend(
        &self,
        caches: &mut [Self::Cache],
        layer: usize,
        table: Option<&Self::Rope>,
        (q, k, v): (&mut Self::Buffer, &mut Self::Buffer, &Self::Buffer),
        spec: &AttentionSpec,
        segments: &[Segment],
        out: &mut Self::Buffer,
    ) -> Result<()> {
        match table {
            Some(table) => self.rope_and_append(caches, layer, table, spec.head_dim, (q, k, v), segments)?,
            None => self.append(caches, layer, k, v, segments)?,
        }
        self.attention(caches, layer, q, spec, segments, out)
    }
    /// gate = activation(gate) * up.
    fn gated(&self, activation: Activation, gate: &mut Self::Buffer, up: &Self::Buffer, rows: usize) -> Result<()>;
    /// x += y.
    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer, rows: usize) -> Result<()>;
    /// x = cap * tanh(x / cap).
    fn softcap(&self, x: &mut Self::Buffer, cap: f32, rows: usize) -> Result<()>;
    /// x *= factor.
    fn scale(&self, x: &mut Self::Buffer, factor: f32, rows: usize) -> Result<()>;
    /// `out[i] = x[rows[i]]`.
    fn select_rows(&self, x: &Self::Buffer, rows: &[usize], out: &mut Self::Buffer) -> Result<()>;
    /// Puts into `found` where each row's largest of its first `width` values is, the first of equals; only that comes back
    /// from a device.
    ///
    /// # Errors
    /// A row has no number among them.
    fn argmax(&self, x: &Self::Buffer, rows: usize, width: usize, found: &mut Vec<u32>) -> Result<()>;
    /// Takes a penalty off the values of some tokens of a row.
    ///
    /// # Errors
    /// There is no such row or token.
    fn penalize(&self, x: &mut Self::Buffer, row: usize, penalty: Penalty, tokens: &[Penalized]) -> Result<()>;
    /// Puts into `found` the `k` largest of a row's first `width` values, and what these weigh at a temperature; only that
    /// comes back from a device.
    ///
    /// # Errors
    /// `k` is more than `width` or [`Look::MOST`](crate::sample::Look::MOST); a value is NaN or positive infinity, or none is
    /// finite, where the device says so at once.
    fn top(
        &self,
        x: &Self::Buffer,
        row: usize,
        width: usize,
        k: usize,
        temperature: Option<f32>,
        found: &mut Top,
    ) -> Result<()>;
    /// The rows' values as the host sees them, row-major; a copy where the device's memory is not the host's.
    fn read<'a>(&self, x: &'a Self::Buffer, rows: Range<usize>) -> Result<std::borrow::Cow<'a, [f32]>>;
    /// Forgets all positions from `length` on.
    fn truncate(&self, cache: &mut Self::Cache, length: usize) -> Result<()>;
}
