//! [`Backend`] on the CPU: nibble-kernels' panels, row operations and attention over one thread pool.

use crate::backend::{AttentionSpec, Backend, DenseMatrix, KvKind, KvPlan, Linear, Matrix, Segment};
use crate::config::Activation;
use crate::error::Result;
use crate::sample::{Penalized, Penalty, Top};
use half::{bf16, f16};
use nibble_kernels::gemm::{Product, multiply};
use nibble_kernels::ops::math::Function;
use nibble_kernels::ops::{self, AttentionScratch, KvCache, Ops, RmsNorm, RopeTable};
use nibble_kernels::{ActKind, Activations, BLOCK, DenseSource, PackedWeight, Pool};
use nibble_quant::FloatFormat;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// The CPU, with some threads.
pub struct CpuBackend {
    pool: Arc<Pool>,
    act: ActKind,
    /// Whether activations are rounded to int8, as integer kernels round them, before they are multiplied in floats.
    rounds: bool,
    scratch: Mutex<Vec<(ScratchShape, AttentionScratch)>>,
}

/// (query heads, key heads, head width)
type ScratchShape = (usize, usize, usize);

impl CpuBackend {
    /// Computes on this pool's threads; `act` says in which numbers activations meet quantized weights.
    pub fn new(pool: Arc<Pool>, act: ActKind) -> CpuBackend {
        CpuBackend { pool, act, rounds: false, scratch: Mutex::new(Vec::new()) }
    }

    /// Computes in floats on activations that are rounded to int8 as integer kernels round them: what int8 activations
    /// alone cost.
    pub fn with_rounded_activations(pool: Arc<Pool>) -> CpuBackend {
        CpuBackend { rounds: true, ..CpuBackend::new(pool, ActKind::F32) }
    }

    /// The threads it computes on.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// The first `rows` rows as kernels read them.
    fn activations<'a>(&self, x: &'a mut CpuBuffer, rows: usize) -> Result<&'a mut Activations> {
        let x = x.packed(rows)?;
        if self.rounds {
            round_to_int8(&self.pool, x);
        }
        Ok(x)
    }

    fn ops(&self) -> Ops<'_> {
        Ops::new(&self.pool)
    }
}

/// Activations (rows, width).
pub struct CpuBuffer {
    width: usize,
    /// The rows as kernels read them. Where `width` is a multiple of 32 its rows lie without gaps and every operation
    /// works on them in place.
    packed: Activations,
    /// The rows without gaps, where `packed` has gaps.
    plain: Vec<f32>,
}

impl CpuBuffer {
    fn is_flat(&self) -> bool {
        self.width.is_multiple_of(BLOCK)
    }

    /// `rows` rows to be overwritten.
    pub(crate) fn write(&mut self, rows: usize) -> &mut [f32] {
        if self.is_flat() {
            if self.packed.m() != rows {
                self.packed.reshape(rows, self.width);
            }
            return &mut self.packed.values_mut()[..rows * self.width];
        }
        &mut self.plain[..rows * self.width]
    }

    /// The first `rows` rows to be changed.
    fn edit(&mut self, rows: usize) -> &mut [f32] {
        match self.is_flat() {
            true => &mut self.packed.values_mut()[..rows * self.width],
            false => &mut self.plain[..rows * self.width],
        }
    }

    fn rows(&self, rows: Range<usize>) -> &[f32] {
        let at = rows.start * self.width..rows.end * self.width;
        if self.is_flat() { &self.packed.values()[at] } else { &self.plain[at] }
    }

    /// The first `rows` rows as kernels read them.
    fn packed(&mut self, rows: usize) -> Result<&mut Activations> {
        if !self.is_flat() {
            self.packed.fill(rows, self.width, &self.plain[..rows * self.width])?;
        } else if self.packed.m() != rows {
            self.packed.truncate(rows);
        }
        Ok(&mut self.packed)
    }
}

impl Backend for CpuBackend {
    type Weight = PackedWeight;
    type Vector = Vec<f32>;
    type Buffer = CpuBuffer;
    type Cache = Vec<KvCache>; // one a layer
    type Rope = RopeTable;

    fn weight(&self, matrix: Matrix<'_>) -> Result<PackedWeight> {
        match matrix {
            Matrix::Quantized(rows) => Ok(rows.pack()?),
            Matrix::Dense(dense) => pack_dense(&dense),
        }
    }

    fn vector(&self, values: &[f32]) -> Result<Vec<f32>> {
        Ok(values.to_vec())
    }

    fn buffer(&self, rows: usize, width: usize) -> Result<CpuBuffer> {
        let plain = if width.is_multiple_of(BLOCK) { Vec::new() } else { vec![0.0; rows * width] };
        Ok(CpuBuffer { width, packed: Activations::with_capacity(rows, width), plain })
    }

    fn cache(&self, plan: &KvPlan) -> Result<Vec<KvCache>> {
        let kind = match plan.kind {
            KvKind::F32 => ops::KvKind::F32,
            KvKind::F16 => ops::KvKind::F16,
            KvKind::Int8 => ops::KvKind::Int8,
        };
        Ok((0..plan.layers).map(|_| KvCache::new(kind, plan.kv_heads, plan.head_dim, plan.capacity)).collect())
    }

    fn rope_table(&self, inverse_frequencies: &[f32], factor: f32, positions: usize) -> Result<RopeTable> {
        Ok(RopeTable::new(inverse_frequencies, positions, factor))
    }

    fn weight_bytes(&self, weight: &PackedWeight) -> usize {
        weight.bytes()
    }

    fn embed(&self, table: &PackedWeight, tokens: &[u32], scale: f32, out: &mut CpuBuffer) -> Result<()> {
        let width = out.width;
        for (row, token) in out.write(tokens.len()).chunks_exact_mut(width).zip(tokens) {
            table.dequantize_row(*token as usize, row)?;
        }
        if scale != 1.0 {
            self.ops().scale(out.edit(tokens.len()), scale);
        }
        Ok(())
    }

    fn rms_norm(&self, x: &CpuBuffer, gain: &Vec<f32>, eps: f32, rows: usize, out: &mut CpuBuffer) -> Result<()> {
        let norm = RmsNorm { weight: gain, eps, add_one: false };
        self.ops().rms_norm(norm, x.rows(0..rows), out.write(rows));
        Ok(())
    }

    fn head_norm(&self, x: &mut CpuBuffer, gain: &Vec<f32>, eps: f32, rows: usize) -> Result<()> {
        let norm = RmsNorm { weight: gain, eps, add_one: false };
        self.ops().rms_norm_in_place(norm, x.edit(rows));
        Ok(())
    }

    fn linear(&self, x: &mut CpuBuffer, rows: usize, products: &mut [Linear<'_, Self>]) -> Result<()> {
        let x = self.activations(x, rows)?;
        // Products that share activations share a parallel region; three are enough for q, k and v.
        for products in products.chunks_mut(3) {
            match products {
                [a] => multiply(&self.pool, x, &mut [product(a, rows)], self.act)?,
                [a, b] => multiply(&self.pool, x, &mut [product(a, rows), product(b, rows)], self.act)?,
                [a, b, c] => {
                    multiply(&self.pool, x, &mut [product(a, rows), product(b, rows), product(c, rows)], self.act)?
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn linear_add(
        &self,
        x: &mut CpuBuffer,
        rows: usize,
        weight: &PackedWeight,
        bias: Option<&Vec<f32>>,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        let product = Product { weight, bias: bias.map(Vec::as_slice), accumulate: true, out: out.edit(rows) };
        Ok(multiply(&self.pool, self.activations(x, rows)?, &mut [product], self.act)?)
    }

    fn rope(&self, x: &mut CpuBuffer, table: &RopeTable, head_dim: usize, segments: &[Segment]) -> Result<()> {
        let width = x.width;
        let rows = segments.last().map_or(0, |s| s.rows.end);
        let values = x.edit(rows);
        for segment in segments {
            let part = &mut values[segment.rows.start * width..segment.rows.end * width];
            self.ops().rope(table, part, width / head_dim, head_dim, segment.position);
        }
        Ok(())
    }

    fn append(
        &self,
        caches: &mut [Vec<KvCache>],
        layer: usize,
        k: &CpuBuffer,
        v: &CpuBuffer,
        segments: &[Segment],
    ) -> Result<()> {
        for segment in segments {
            let cache = &mut caches[segment.sequence][layer];
            self.ops().append(cache, k.rows(segment.rows.clone()), v.rows(segment.rows.clone()))?;
        }
        Ok(())
    }

    fn attention(
        &self,
        caches: &[Vec<KvCache>],
        layer: usize,
        q: &CpuBuffer,
        spec: &AttentionSpec,
        segments: &[Segment],
        out: &mut CpuBuffer,
    ) -> Result<()> {
        let shape = (spec.heads, spec.kv_heads, spec.head_dim);
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        if !scratch.iter().any(|(s, _)| *s == shape) {
            scratch.push((shape, AttentionScratch::new(&self.pool, spec.heads, spec.kv_heads, spec.head_dim)));
        }
        let Some((_, scratch)) = scratch.iter_mut().find(|(s, _)| *s == shape) else { return Ok(()) };
        let width = out.width;
        let rows = segments.last().map_or(0, |s| s.rows.end);
        let spec =
            ops::AttentionSpec { heads: spec.heads, scale: spec.scale, window: spec.window, softcap: spec.softcap };
        let out = out.write(rows);
        for segment in segments {
            let part = &mut out[segment.rows.start * width..segment.rows.end * width];
            let cache = &caches[segment.sequence][layer];
            self.ops().attention(&spec, q.rows(segment.rows.clone()), cache, scratch, part);
        }
        Ok(())
    }

    fn gated(&self, activation: Activation, gate: &mut CpuBuffer, up: &CpuBuffer, rows: usize) -> Result<()> {
        let function = match activation {
            Activation::Silu => Function::Silu,
            Activation::GeluTanh => Function::GeluTanh,
        };
        self.ops().gate(function, gate.edit(rows), up.rows(0..rows));
        Ok(())
    }

    fn add(&self, x: &mut CpuBuffer, y: &CpuBuffer, rows: usize) -> Result<()> {
        self.ops().add(x.edit(rows), y.rows(0..rows));
        Ok(())
    }

    fn softcap(&self, x: &mut CpuBuffer, cap: f32, rows: usize) -> Result<()> {
        self.ops().softcap(x.edit(rows), cap);
        Ok(())
    }

    fn scale(&self, x: &mut CpuBuffer, factor: f32, rows: usize) -> Result<()> {
        self.ops().scale(x.edit(rows), factor);
        Ok(())
    }

    fn select_rows(&self, x: &CpuBuffer, rows: &[usize], out: &mut CpuBuffer) -> Result<()> {
        let width = out.width;
        for (to, row) in out.write(rows.len()).chunks_exact_mut(width).zip(rows) {
            to.copy_from_slice(x.rows(*row..row + 1));
        }
        Ok(())
    }

    fn argmax(&self, x: &CpuBuffer, rows: usize, width: usize, found: &mut Vec<u32>) -> Result<()> {
        found.clear();
        for row in 0..rows {
            found.push(crate::sample::argmax(&x.rows(row..row + 1)[..width])?);
        }
        Ok(())
    }

    fn penalize(&self, x: &mut CpuBuffer, row: usize, penalty: Penalty, tokens: &[Penalized]) -> Result<()> {
        let width = x.width;
        penalty.apply(tokens, &mut x.edit(row + 1)[row * width..]);
        Ok(())
    }

    fn top(
        &self,
        x: &CpuBuffer,
        row: usize,
        width: usize,
        k: usize,
        temperature: Option<f32>,
        found: &mut Top,
    ) -> Result<()> {
        crate::sample::top(&x.rows(row..row + 1)[..width], k, temperature, found)
    }

    fn read<'a>(&self, x: &'a CpuBuffer, rows: Range<usize>) -> Result<Cow<'a, [f32]>> {
        Ok(Cow::Borrowed(x.rows(rows)))
    }

    fn truncate(&self, cache: &mut Vec<KvCache>, length: usize) -> Result<()> {
        cache.iter_mut().for_each(|layer| layer.truncate(length));
        Ok(())
    }
}

/// Activations become what integer kernels make of them: int8 with a scale every 32 values of a row.
pub(crate) fn round_to_int8(pool: &Pool, x: &mut Activations) {
    x.prepare(pool, ActKind::I8, 1);
    let blocks = (0..x.m()).flat_map(|row| x.codes(row).into_iter().flatten());
    let rounded = blocks.flat_map(|block| block.quads.as_flattened().iter().map(|c| block.scale * f32::from(*c)));
    let rounded: Vec<f32> = rounded.collect();
    x.values_mut().copy_from_slice(&rounded);
}

/// A product that overwrites its output.
fn product<'a>(linear: &'a mut Linear<'_, CpuBackend>, rows: usize) -> Product<'a> {
    let bias = linear.bias.map(Vec::as_slice);
    Product { weight: linear.weight, bias, accumulate: false, out: linear.out.write(rows) }
}

/// Packs floats as a checkpoint stores them.
pub(crate) fn pack_dense(dense: &DenseMatrix<'_>) -> Result<PackedWeight> {
    let bytes = dense.bytes.as_ref();
    let source = |source: DenseSource<'_>| Ok(PackedWeight::pack_dense(dense.n, dense.k, source)?);
    match dense.dtype {
        FloatFormat::F32 => source(DenseSource::F32(&numbers(bytes, f32::from_le_bytes))),
        FloatFormat::F16 => source(DenseSource::F16(&numbers(bytes, f16::from_le_bytes))),
        FloatFormat::Bf16 => source(DenseSource::Bf16(&numbers(bytes, bf16::from_le_bytes))),
    }
}

/// Little-endian numbers, borrowed where this machine stores them the same way and they happen to be aligned.
fn numbers<T: bytemuck::Pod, const N: usize>(bytes: &[u8], of: fn([u8; N]) -> T) -> Cow<'_, [T]> {
    if cfg!(target_endian = "little")
        && let Ok(values) = bytemuck::try_cast_slice(bytes)
    {
        return Cow::Borrowed(values);
    }
    Cow::Owned(bytes.as_chunks().0.iter().map(|chunk| of(*chunk)).collect())
}
