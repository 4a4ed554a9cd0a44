//! [`Backend`] on a GPU: the kernels of [`nibble_kernels::cuda`] over whatever [`Gpu`] there is.
//!
//! Nothing waits for the device but [`Backend::read`], [`Backend::argmax`] and [`Backend::top`]: a forward pass is a sequence of
//! launches. Where a batch's rows stand is put on the device once a pass, when it is first asked for.

use crate::backend::{AttentionSpec, Backend, KvKind, KvPlan, Linear, Matrix, Norm, Segment};
use crate::config::Activation;
use crate::cpu::pack_dense;
use crate::error::{ModelError, Result};
use crate::sample::{Penalized, Penalty, Top};
use nibble_kernels::KernelError;
use nibble_kernels::cuda::{
    CacheKind, CacheShape, Cuda, CudaAttention, DeviceCache, DeviceIndices, DeviceMemory, DeviceNorm, DeviceProduct,
    DeviceRope, DeviceRows, DeviceTable, DeviceToken, DeviceVector, DeviceWeight, Gpu, Place,
};
use nibble_kernels::ops::math::Function;
use nibble_kernels::ops::{self, RopeTable};
use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Rows of a batch at most: what tables and indices have room for.
const MOST_ROWS: usize = 4096;

/// A GPU.
pub struct CudaBackend<G: Gpu> {
    cuda: Cuda<G>,
    staged: Mutex<Staged<G>>,
    /// Where choices are left.
    choices: Mutex<DeviceIndices<G::Memory>>,
}

/// What is put on the device for the operations of one pass.
struct Staged<G: Gpu> {
    /// Tokens.
    indices: DeviceIndices<G::Memory>,
    /// Rows that are selected: mostly the same ones, so they stay there.
    selected: DeviceIndices<G::Memory>,
    table: DeviceTable<G::Memory>,
}

impl<G: Gpu> CudaBackend<G> {
    /// Computes on this device.
    ///
    /// # Errors
    /// It has no memory for what every model needs.
    pub fn new(cuda: Cuda<G>) -> Result<CudaBackend<G>> {
        let selected = cuda.indices(MOST_ROWS)?;
        let staged = Staged { indices: cuda.indices(MOST_ROWS)?, selected, table: cuda.table(MOST_ROWS)? };
        let choices = Mutex::new(cuda.indices(MOST_ROWS)?);
        Ok(CudaBackend { cuda, staged: Mutex::new(staged), choices })
    }

    /// The device's operations.
    pub fn cuda(&self) -> &Cuda<G> {
        &self.cuda
    }

    fn choices(&self) -> MutexGuard<'_, DeviceIndices<G::Memory>> {
        self.choices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn staged(&self) -> MutexGuard<'_, Staged<G>> {
        self.staged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts the places of a batch's rows into their caches on the device.
    fn stage(&self, staged: &mut Staged<G>, caches: &[DeviceCache<G::Memory>], segments: &[Segment]) -> Result<()> {
        for segment in segments {
            // The last one is the furthest: if it has a place, all have.
            caches[segment.sequence].place((segment.position + segment.rows.len()).saturating_sub(1))?;
        }
        let places = segments.iter().flat_map(|segment| {
            let cache = &caches[segment.sequence];
            (segment.position..segment.position + segment.rows.len()).filter_map(|at| cache.place(at).ok())
        });
        Ok(self.cuda.set_table(&mut staged.table, places)?)
    }
}

/// Whether heads are as wide as the caches', which say how wide heads are.
fn check_head<M: DeviceMemory>(caches: &[DeviceCache<M>], head_dim: usize) -> Result<()> {
    match caches.first().map(|cache| cache.shape().head_dim) {
        Some(found) if found != head_dim => {
            Err(KernelError::Length { what: "a head of a cache", found, wanted: head_dim }.into())
        }
        _ => Ok(()),
    }
}

fn device_spec(spec: &AttentionSpec) -> ops::AttentionSpec {
    ops::AttentionSpec { heads: spec.heads, scale: spec.scale, window: spec.window, softcap: spec.softcap }
}

fn function(activation: Activation) -> Function {
    match activation {
        Activation::Silu => Function::Silu,
        Activation::GeluTanh => Function::GeluTanh,
    }
}

fn product<'p, G: Gpu>(linear: &'p mut Linear<'_, CudaBackend<G>>) -> DeviceProduct<'p, G::Memory> {
    DeviceProduct { weight: linear.weight, bias: linear.bias, out: &mut *linear.out }
}

fn device_norm<G: Gpu>(norm: Norm<'_, CudaBackend<G>>) -> DeviceNorm<'_, G::Memory> {
    DeviceNorm { x: norm.x, gain: norm.gain, eps: norm.eps, out: norm.out }
}

impl<G: Gpu> Backend for CudaBackend<G> {
    type Weight = DeviceWeight<G::Memory>;
    type Vector = DeviceVector<G::Memory>;
    type Buffer = DeviceRows<G::Memory>;
    type Cache = DeviceCache<G::Memory>;
    type Rope = DeviceRope<G::Memory>;

    fn weight(&self, matrix: Matrix<'_>) -> Result<Self::Weight> {
        let packed = match matrix {
            Matrix::Quantized(rows) => rows.pack()?,
            Matrix::Dense(dense) => pack_dense(&dense)?,
        };
        Ok(self.cuda.weight(&packed)?)
    }

    fn vector(&self, values: &[f32]) -> Result<Self::Vector> {
        Ok(self.cuda.vector(values)?)
    }

    fn buffer(&self, rows: usize, width: usize) -> Result<Self::Buffer> {
        Ok(self.cuda.rows(rows, width)?)
    }

    fn cache(&self, plan: &KvPlan) -> Result<Self::Cache> {
        let kind = match plan.kind {
            KvKind::F32 => CacheKind::F32,
            KvKind::F16 => CacheKind::F16,
            KvKind::Int8 => CacheKind::Int8,
        };
        let KvPlan { layers, kv_heads, head_dim, capacity, .. } = *plan;
        Ok(self.cuda.cache(CacheShape { layers, kv_heads, head_dim, capacity, kind })?)
    }

    fn rope_table(&self, inverse_frequencies: &[f32], factor: f32, positions: usize) -> Result<Self::Rope> {
        Ok(self.cuda.rope_table(&RopeTable::new(inverse_frequencies, positions, factor))?)
    }

    fn weight_bytes(&self, weight: &Self::Weight) -> usize {
        weight.bytes()
    }

    fn embed(&self, table: &Self::Weight, tokens: &[u32], scale: f32, out: &mut Self::Buffer) -> Result<()> {
        Ok(self.cuda.embed(table, tokens, &mut self.staged().indices, scale, out)?)
    }

    fn rms_norm(
        &self,
        x: &Self::Buffer,
        gain: &Self::Vector,
        eps: f32,
        rows: usize,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        Ok(self.cuda.rms_norm(x, gain, eps, rows, out)?)
    }

    fn head_norm(&self, x: &mut Self::Buffer, gain: &Self::Vector, eps: f32, rows: usize) -> Result<()> {
        Ok(self.cuda.head_norm(x, gain, eps, rows)?)
    }

    fn linear(&self, x: &mut Self::Buffer, rows: usize, products: &mut [Linear<'_, Self>]) -> Result<()> {
        let mut products: Vec<_> = products.iter_mut().map(product).collect();
        Ok(self.cuda.multiply_all(x, rows, &mut products)?)
    }

    fn norm_linear(&self, norm: Norm<'_, Self>, rows: usize, products: &mut [Linear<'_, Self>]) -> Result<()> {
        let mut products: Vec<_> = products.iter_mut().map(product).collect();
        Ok(self.cuda.norm_and_multiply(device_norm(norm), rows, &mut products)?)
    }

    fn norm_gated(
        &self,
        norm: Norm<'_, Self>,
        rows: usize,
        activation: Activation,
        mut gate: Linear<'_, Self>,
        mut up: Linear<'_, Self>,
    ) -> Result<()> {
        let (gate, up) = (product(&mut gate), product(&mut up));
        Ok(self.cuda.norm_and_gate(device_norm(norm), rows, function(activation), gate, up)?)
    }

    fn linear_add(
        &self,
        x: &mut Self::Buffer,
        rows: usize,
        weight: &Self::Weight,
        bias: Option<&Self::Vector>,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        Ok(self.cuda.multiply(x, rows, weight, bias, true, out)?)
    }

    fn rope(&self, x: &mut Self::Buffer, table: &Self::Rope, head_dim: usize, segments: &[Segment]) -> Result<()> {
        let staged = &mut *self.staged();
        let positions = segments.iter().flat_map(|s| s.position..s.position + s.rows.len());
        // After the first layer the table has these positions, in their caches.
        if !staged.table.places().iter().map(Place::position).eq(positions.clone()) {
            self.cuda.set_table(&mut staged.table, positions.filter_map(|at| Place::at(at).ok()))?;
        }
        Ok(self.cuda.rope(x, table, head_dim, &staged.table)?)
    }

    fn append(
        &self,
        caches: &mut [Self::Cache],
        layer: usize,
        k: &Self::Buffer,
        v: &Self::Buffer,
        segments: &[Segment],
    ) -> Result<()> {
        let staged = &mut *self.staged();
        self.stage(staged, caches, segments)?;
        Ok(self.cuda.append(CudaAttention { caches, layer, table: &staged.table }, k, v)?)
    }

    fn rope_and_append(
        &self,
        caches: &mut [Self::Cache],
        layer: usize,
        table: &Self::Rope,
        head_dim: usize,
        (q, k, v): (&mut Self::Buffer, &mut Self::Buffer, &Self::Buffer),
        segments: &[Segment],
    ) -> Result<()> {
        let staged = &mut *self.staged();
        self.stage(staged, caches, segments)?;
        check_head(caches, head_dim)?;
        let at = CudaAttention { caches, layer, table: &staged.table };
        Ok(self.cuda.rope_and_append(at, table, q, k, v)?)
    }

    fn attention(
        &self,
        caches: &[Self::Cache],
        layer: usize,
        q: &Self::Buffer,
        spec: &AttentionSpec,
        segments: &[Segment],
        out: &mut Self::Buffer,
    ) -> Result<()> {
        let staged = &mut *self.staged();
        self.stage(staged, caches, segments)?;
        Ok(self.cuda.attend(&device_spec(spec), CudaAttention { caches, layer, table: &staged.table }, q, out)?)
    }

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
        let staged = &mut *self.staged();
        self.stage(staged, caches, segments)?;
        check_head(caches, spec.head_dim)?;
        let at = CudaAttention { caches, layer, table: &staged.table };
        Ok(self.cuda.append_and_attend(&device_spec(spec), at, table, DeviceToken { q, k, v }, out)?)
    }

    fn gated(&self, activation: Activation, gate: &mut Self::Buffer, up: &Self::Buffer, rows: usize) -> Result<()> {
        Ok(self.cuda.gate(function(activation), gate, up, rows)?)
    }

    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer, rows: usize) -> Result<()> {
        Ok(self.cuda.add(x, y, rows)?)
    }

    fn softcap(&self, x: &mut Self::Buffer, cap: f32, rows: usize) -> Result<()> {
        Ok(self.cuda.softcap(x, cap, rows)?)
    }

    fn scale(&self, x: &mut Self::Buffer, factor: f32, rows: usize) -> Result<()> {
        Ok(self.cuda.scale(x, factor, rows)?)
    }

    fn select_rows(&self, x: &Self::Buffer, rows: &[usize], out: &mut Self::Buffer) -> Result<()> {
        let wanted: Vec<u32> = rows.iter().map(|row| u32::try_from(*row).unwrap_or(u32::MAX)).collect();
        Ok(self.cuda.select_rows(x, &wanted, &mut self.staged().selected, out)?)
    }

    fn argmax(&self, x: &Self::Buffer, rows: usize, width: usize, found: &mut Vec<u32>) -> Result<()> {
        found.clear();
        for token in self.cuda.argmax(x, rows, width, &mut self.choices())? {
            let none = || ModelError::Logits { why: "a row of them holds no number".to_string() };
            found.push(token.ok_or_else(none)?);
        }
        Ok(())
    }

    fn penalize(&self, x: &mut Self::Buffer, row: usize, penalty: Penalty, tokens: &[Penalized]) -> Result<()> {
        let penalty = [penalty.repetition, penalty.frequency, penalty.presence];
        Ok(self.cuda.penalize(x, row, penalty, bytemuck::cast_slice(tokens), &mut self.staged().indices)?)
    }

    fn top(
        &self,
        x: &Self::Buffer,
        row: usize,
        width: usize,
        k: usize,
        temperature: Option<f32>,
        found: &mut Top,
    ) -> Result<()> {
        let largest = self.cuda.largest(x, (row, width), k, temperature)?;
        *found = Top { tokens: largest.found, total: largest.total };
        Ok(())
    }

    fn read<'a>(&self, x: &'a Self::Buffer, rows: Range<usize>) -> Result<Cow<'a, [f32]>> {
        Ok(Cow::Owned(self.cuda.read_rows(x, rows)?))
    }

    fn truncate(&self, _: &mut Self::Cache, _: usize) -> Result<()> {
        // What lies past a sequence's length is never read, and is overwritten when the sequence grows again.
        Ok(())
    }
}
