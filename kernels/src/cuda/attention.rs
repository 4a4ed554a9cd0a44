//! Keys and values of sequences, and attention over them; `kernels/cuda/attention.cu` says how.

mod prompt;

use super::data::{DeviceRope, DeviceRows, DeviceTable, Place};
use super::gpu::{DeviceMemory, Gpu, Launch};
use super::{Cuda, SCRATCH, check_room, size};
use crate::KernelError;
use crate::ops::AttentionSpec;
use bytemuck::{Pod, Zeroable, bytes_of};
use prompt::PROMPT_ROWS;
use std::ops::Range;

/// Query heads of a block.
const MOST_HEADS: usize = 8;
/// Threads of a block.
const THREADS: usize = 128;
/// Keys whose scores a block holds at once.
const TILE: usize = 32;
/// Least keys of a chunk: fewer aren't worth merging.
const LEAST_CHUNK: usize = 64;
/// Keys are counted in steps of this many, so that the launches of many tokens are the same.
const SAME_FOR: usize = 256;
/// Widest head: a block's shared memory is at most 48 KiB.
const WIDEST: usize = 256;

/// How keys and values are kept, as [`crate::ops::KvKind`].
pub use crate::ops::KvKind as CacheKind;

/// The size of a sequence's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheShape {
    /// Layers.
    pub layers: usize,
    /// Key/value heads of a layer.
    pub kv_heads: usize,
    /// Values of a head, an even number of at most 256.
    pub head_dim: usize,
    /// Positions that fit.
    pub capacity: usize,
    /// How numbers are kept.
    pub kind: CacheKind,
}

/// `CacheLayer` of attention.cu.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct LayerArgument {
    keys: u64,
    values: u64,
    key_scales: u64,
    value_scales: u64,
    kv_heads: u32,
    head_dim: u32,
    capacity: u32,
    unused: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct AppendArgument {
    layer: LayerArgument,
    keys: u64,
    values: u64,
    rows: u64,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct RopeAppendArgument {
    append: AppendArgument,
    q: u64,
    k: u64,
    cos: u64,
    sin: u64,
    heads: u32,
    half: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct AttendArgument {
    layer: LayerArgument,
    q: u64,
    rows: u64,
    out: u64,
    partial: u64,
    heads: u32,
    block_heads: u32,
    passes: u32,
    chunk: u32,
    chunks: u32,
    window: u32,
    scale: f32,
    cap: f32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct StepArgument {
    attend: AttendArgument,
    k: u64,
    v: u64,
    cos: u64,
    sin: u64,
    half: u32,
    stride: u32,
}

/// Threads of a block that decodes a token, keys that it holds at once (twice), and the most bytes of each.
const STEP_THREADS: usize = 256;
const STEP_TILE: usize = 64;
const STEP_WIDEST: usize = 256;
/// Least keys of its chunk.
const STEP_LEAST_CHUNK: usize = 256;

/// What a decoded token brings along: queries, a key and a value, not yet turned.
pub struct DeviceToken<'a, M> {
    /// (rows, heads * head_dim).
    pub q: &'a mut DeviceRows<M>,
    /// (rows, kv_heads * head_dim).
    pub k: &'a mut DeviceRows<M>,
    /// The same.
    pub v: &'a DeviceRows<M>,
}

impl CacheShape {
    fn element(&self) -> usize {
        match self.kind {
            CacheKind::F32 => 4,
            CacheKind::F16 => 2,
            CacheKind::Int8 => 1,
        }
    }

    /// Bytes of one layer's keys; of its values as well.
    fn side(&self) -> usize {
        (self.kv_heads * self.capacity * self.head_dim * self.element()).next_multiple_of(256)
    }

    /// Bytes of the scales of one side.
    fn scales(&self) -> usize {
        if self.kind == CacheKind::Int8 { (self.kv_heads * self.capacity * 4).next_multiple_of(256) } else { 0 }
    }

    fn layer_bytes(&self) -> usize {
        2 * (self.side() + self.scales())
    }

    fn layer(&self, layer: usize) -> Result<LayerArgument, KernelError> {
        check_room("layers of a cache", self.layers, layer + 1)?;
        let start = layer * self.layer_bytes();
        let [values, key_scales, value_scales] =
            [self.side(), 2 * self.side(), 2 * self.side() + self.scales()].map(|at| (start + at) as u64);
        Ok(LayerArgument {
            keys: start as u64,
            values,
            key_scales,
            value_scales,
            kv_heads: size(self.kv_heads)?,
            head_dim: size(self.head_dim)?,
            capacity: size(self.capacity)?,
            unused: 0,
        })
    }
}

/// Keys and values of one sequence, all layers.
#[derive(Debug)]
pub struct DeviceCache<M> {
    shape: CacheShape,
    memory: M,
}

impl<M: DeviceMemory> DeviceCache<M> {
    /// Its size.
    pub fn shape(&self) -> &CacheShape {
        &self.shape
    }

    /// A position in this cache, for a batch's table.
    ///
    /// # Errors
    /// There is no room for it.
    pub fn place(&self, position: usize) -> Result<Place, KernelError> {
        check_room("kv cache", self.shape.capacity, position + 1)?;
        Ok(Place::at(position)?.in_cache(self.memory.address()))
    }
}

/// One layer of the caches that a batch's table points to: all have one shape.
#[derive(Debug, Clone, Copy)]
pub struct CudaAttention<'a, M> {
    /// The caches that the table's places were made by.
    pub caches: &'a [DeviceCache<M>],
    /// Which layer.
    pub layer: usize,
    /// Where the batch's rows stand.
    pub table: &'a DeviceTable<M>,
}

impl<'a, M: DeviceMemory> CudaAttention<'a, M> {
    /// The caches' shape; refuses a table with places of other caches.
    fn shape(&self) -> Result<&'a CacheShape, KernelError> {
        let refuse = |why: &str| KernelError::Cuda { why: why.to_string() };
        let Some(first) = self.caches.first() else { return Err(refuse("attention without a cache")) };
        if self.caches.iter().any(|cache| cache.shape != first.shape) {
            return Err(refuse("attention over caches of different shapes"));
        }
        let is_known = |place: &Place| self.caches.iter().any(|cache| cache.memory.address() == place.cache);
        if !self.table.places.iter().all(is_known) {
            return Err(refuse("attention over a cache that isn't there"));
        }
        check_room("kv cache", first.shape.capacity, self.table.last_position() + 1)?;
        Ok(&first.shape)
    }
}

impl<G: Gpu> Cuda<G> {
    /// An empty cache.
    ///
    /// # Errors
    /// Heads are odd or wider than 256, or the device has no memory for it.
    pub fn cache(&self, shape: CacheShape) -> Result<DeviceCache<G::Memory>, KernelError> {
        let CacheShape { head_dim, .. } = shape;
        if head_dim > WIDEST || !head_dim.is_multiple_of(2) || head_dim == 0 {
            let why = format!("heads of {head_dim} values; kernels take even numbers up to {WIDEST}");
            return Err(KernelError::Cuda { why });
        }
        Ok(DeviceCache { shape, memory: self.gpu.allocate(shape.layers * shape.layer_bytes())? })
    }

    /// [`Cuda::rope`] of queries and keys and [`Cuda::append`] in one launch.
    ///
    /// # Errors
    /// Shapes don't fit each other, or a position is outside of the rotation's table.
    pub fn rope_and_append(
        &self,
        at: CudaAttention<'_, G::Memory>,
        rope: &DeviceRope<G::Memory>,
        q: &mut DeviceRows<G::Memory>,
        k: &mut DeviceRows<G::Memory>,
        values: &DeviceRows<G::Memory>,
    ) -> Result<(), KernelError> {
        let (append, shape) = self.append_argument(&at, k, values)?;
        let rows = at.table.places.len();
        let heads = q.width.checked_div(shape.head_dim).unwrap_or(0);
        q.check("rope's input", rows, heads * shape.head_dim)?;
        let half = rope.fits(shape.head_dim, at.table)?;
        q.changes();
        k.changes();
        let argument = RopeAppendArgument {
            append,
            q: q.values.address(),
            k: k.values.address(),
            cos: rope.cos.address(),
            sin: rope.sin.address(),
            heads: size(heads)?,
            half: size(half)?,
        };
        let kernel = match shape.kind {
            CacheKind::F32 => "rope_append_f32",
            CacheKind::F16 => "rope_append_f16",
            CacheKind::Int8 => "rope_append_int8",
        };
        let grid = [size(rows)?, size(heads + 2 * shape.kv_heads)?, 1];
        self.gpu.launch(&Launch::new(kernel, grid, 32, bytes_of(&argument)))
    }

    /// What appending takes, and the caches' shape.
    fn append_argument<'a>(
        &self,
        at: &CudaAttention<'a, G::Memory>,
        keys: &DeviceRows<G::Memory>,
        values: &DeviceRows<G::Memory>,
    ) -> Result<(AppendArgument, &'a CacheShape), KernelError> {
        let (shape, rows) = (at.shape()?, at.table.places.len());
        keys.check("appended keys", rows, shape.kv_heads * shape.head_dim)?;
        values.check("appended values", rows, shape.kv_heads * shape.head_dim)?;
        let argument = AppendArgument {
            layer: shape.layer(at.layer)?,
            keys: keys.values.address(),
            values: values.values.address(),
            rows: at.table.memory.address(),
        };
        Ok((argument, shape))
    }

    /// Writes each row's keys and values, (rows, kv_heads * head_dim), at its place.
    ///
    /// # Errors
    /// Shapes don't fit each other.
    pub fn append(
        &self,
        at: CudaAttention<'_, G::Memory>,
        keys: &DeviceRows<G::Memory>,
        values: &DeviceRows<G::Memory>,
    ) -> Result<(), KernelError> {
        let (argument, shape) = self.append_argument(&at, keys, values)?;
        let kernel = match shape.kind {
            CacheKind::F32 => "append_f32",
            CacheKind::F16 => "append_f16",
            CacheKind::Int8 => "append_int8",
        };
        let grid = [size(at.table.places.len())?, size(shape.kv_heads)?, 2];
        self.gpu.launch(&Launch::new(kernel, grid, 32, bytes_of(&argument)))
    }

    /// [`Cuda::rope_and_append`] (or [`Cuda::append`] without a rotation) and [`Cuda::attend`]; in one launch where each row
    /// is the only one of its sequence. Then queries and keys are left as they were.
    ///
    /// # Errors
    /// As these.
    pub fn append_and_attend(
        &self,
        spec: &AttentionSpec,
        at: CudaAttention<'_, G::Memory>,
        rope: Option<&DeviceRope<G::Memory>>,
        token: DeviceToken<'_, G::Memory>,
        out: &mut DeviceRows<G::Memory>,
    ) -> Result<(), KernelError> {
        let DeviceToken { q, k, v } = token;
        let shape = at.shape()?;
        let group = spec.heads.checked_div(shape.kv_heads).unwrap_or(0);
        let row_bytes = shape.head_dim * shape.element();
        let is_step = (1..=MOST_HEADS).contains(&group)
            && row_bytes.is_multiple_of(16)
            && row_bytes <= STEP_WIDEST
            && at.table.is_one_row_each();
        if !is_step {
            let CudaAttention { caches, layer, table } = at;
            match rope {
                Some(rope) => self.rope_and_append(at, rope, q, k, v)?,
                None => self.append(at, k, v)?,
            }
            return self.attend(spec, CudaAttention { caches, layer, table }, q, out);
        }
        // Checks keys and values as well.
        self.append_argument(&at, k, v)?;
        let half = rope.map_or(Ok(0), |rope| rope.fits(shape.head_dim, at.table))?;
        let rows = 0..at.table.places.len();
        let Some(attend) = self.attend_argument(spec, &at, rows, q, out, (1, STEP_LEAST_CHUNK))? else { return Ok(()) };
        let stride = (row_bytes + 64).next_multiple_of(128) - 64;
        let argument = StepArgument {
            attend,
            k: k.values.address(),
            v: v.values.address(),
            cos: rope.map_or(0, |rope| rope.cos.address()),
            sin: rope.map_or(0, |rope| rope.sin.address()),
            half: size(half)?,
            stride: size(stride)?,
        };
        let kernel = match shape.kind {
            CacheKind::F32 => "attend_step_f32",
            CacheKind::F16 => "attend_step_f16",
            CacheKind::Int8 => "attend_step_int8",
        };
        let floats = group * (shape.head_dim + STEP_TILE) + 2 * MOST_HEADS + 2 * shape.head_dim;
        // The sums at the end, 8 bytes a thread and head, lie over the tiles.
        let shared = 4 * STEP_TILE * stride + floats * 4 + 2 * row_bytes;
        let grid = [attend.chunks, size(shape.kv_heads)?, size(at.table.places.len())?];
        let launch = Launch::new(kernel, grid, size(STEP_THREADS)?, bytes_of(&argument));
        self.gpu.launch(&launch.with_shared(size(shared)?))?;
        self.merge(&attend, at.table.places.len())
    }

    /// Causal attention of each row's query heads over its sequence, up to its own position: append first.
    ///
    /// # Errors
    /// Shapes don't fit each other, or heads don't share key heads evenly.
    pub fn attend(
        &self,
        spec: &AttentionSpec,
        at: CudaAttention<'_, G::Memory>,
        q: &DeviceRows<G::Memory>,
        out: &mut DeviceRows<G::Memory>,
    ) -> Result<(), KernelError> {
        let shape = at.shape()?;
        let fits = shape.kind == CacheKind::F16 && shape.head_dim.is_multiple_of(8) && shape.head_dim <= 128;
        // Rows that aren't a prompt's, up to here.
        let mut rest = 0..0;
        for run in at.table.runs() {
            if !fits || run.len() < PROMPT_ROWS {
                rest.end = run.end;
                continue;
            }
            self.attend_rows(spec, &at, rest, q, out)?;
            rest = run.end..run.end;
            self.attend_prompt(spec, &at, run, q, out)?;
        }
        self.attend_rows(spec, &at, rest, q, out)
    }

    /// [`Cuda::attend`] of any rows.
    fn attend_rows(
        &self,
        spec: &AttentionSpec,
        at: &CudaAttention<'_, G::Memory>,
        rows: Range<usize>,
        q: &DeviceRows<G::Memory>,
        out: &mut DeviceRows<G::Memory>,
    ) -> Result<(), KernelError> {
        let shape = at.shape()?;
        let passes = spec.heads.checked_div(shape.kv_heads).unwrap_or(0).div_ceil(MOST_HEADS);
        let count = rows.len();
        let Some(argument) = self.attend_argument(spec, at, rows, q, out, (passes, LEAST_CHUNK))? else {
            return Ok(());
        };
        let kernel = match shape.kind {
            CacheKind::F32 => "attend_f32",
            CacheKind::F16 => "attend_f16",
            CacheKind::Int8 => "attend_int8",
        };
        let block_heads = argument.block_heads as usize;
        let spread = (THREADS / (shape.head_dim / 2)).max(1);
        let area = (TILE * (shape.head_dim + 1)).max(spread * block_heads * shape.head_dim);
        let floats = block_heads * (shape.head_dim + TILE + 2) + area;
        let grid = [argument.chunks, size(shape.kv_heads * passes)?, size(count)?];
        let launch = Launch::new(kernel, grid, size(THREADS)?, bytes_of(&argument));
        self.gpu.launch(&launch.with_shared(size(floats * 4)?))?;
        self.merge(&argument, count)
    }

    /// What attention of some of the rows takes, with so many blocks for each key head and chunks of at least so many keys;
    /// nothing for no rows.
    fn attend_argument(
        &self,
        spec: &AttentionSpec,
        at: &CudaAttention<'_, G::Memory>,
        rows: Range<usize>,
        q: &DeviceRows<G::Memory>,
        out: &mut DeviceRows<G::Memory>,
        (passes, least_chunk): (usize, usize),
    ) -> Result<Option<AttendArgument>, KernelError> {
        let (shape, all) = (at.shape()?, at.table.places.len());
        let group = spec.heads.checked_div(shape.kv_heads).unwrap_or(0);
        if group == 0 || group * shape.kv_heads != spec.heads {
            let why = format!("{} heads don't share {} key heads evenly", spec.heads, shape.kv_heads);
            return Err(KernelError::Cuda { why });
        }
        q.check("queries", all, spec.heads * shape.head_dim)?;
        out.check("attention's output", all, spec.heads * shape.head_dim)?;
        out.changes();
        if rows.is_empty() {
            return Ok(None);
        }
        // So many keys at a time that launches stay the same for many tokens: chunks that no row reaches end at once.
        let keys = (at.table.last_position() + 1).next_multiple_of(SAME_FOR);
        let floats = rows.len() * spec.heads * (shape.head_dim + 2);
        let chunk = self.chunk(keys, least_chunk, rows.len() * shape.kv_heads * passes, floats);
        let before = (rows.start * spec.heads * shape.head_dim * 4) as u64;
        Ok(Some(AttendArgument {
            layer: shape.layer(at.layer)?,
            q: q.values.address() + before,
            rows: at.table.memory.address() + (rows.start * size_of::<Place>()) as u64,
            out: out.values.address() + before,
            partial: self.scratch.address(),
            heads: size(spec.heads)?,
            block_heads: size(group.div_ceil(passes))?,
            passes: size(passes)?,
            chunk: size(chunk)?,
            chunks: size(keys.div_ceil(chunk))?,
            window: spec.window.map_or(Ok(u32::MAX), |window| size(window.max(1)))?,
            scale: spec.scale,
            cap: spec.softcap.unwrap_or(0.0),
        }))
    }

    /// Chunks together, where there is more than one.
    fn merge(&self, argument: &AttendArgument, rows: usize) -> Result<(), KernelError> {
        if argument.chunks > 1 {
            let grid = [argument.heads, size(rows)?, 1];
            self.gpu.launch(&Launch::new("attend_merge", grid, size(THREADS)?, bytes_of(argument)))?;
        }
        Ok(())
    }

    /// Keys of a chunk, so that about four blocks a processor have something to do and the scratch holds their results.
    fn chunk(&self, keys: usize, least: usize, blocks: usize, partial_floats: usize) -> usize {
        let wanted = (4 * self.gpu.processors() as usize).div_ceil(blocks.max(1));
        let chunks = wanted.min(keys.div_ceil(least)).min(SCRATCH / (partial_floats * 4).max(1)).max(1);
        keys.div_ceil(chunks).next_multiple_of(TILE)
    }
}
