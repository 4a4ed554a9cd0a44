//! Attention of a prompt's rows on the tensor cores; `kernels/cuda/attention_prompt.cu` says how.

use super::{CudaAttention, LEAST_CHUNK, LayerArgument, THREADS};
use crate::KernelError;
use crate::cuda::data::DeviceRows;
use crate::cuda::gpu::{Gpu, Launch};
use crate::cuda::{Cuda, size};
use crate::ops::AttentionSpec;
use bytemuck::{Pod, Zeroable, bytes_of};
use std::ops::Range;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct PromptArgument {
    layer: LayerArgument,
    q: u64,
    rows: u64,
    out: u64,
    heads: u32,
    group: u32,
    first: u32,
    count: u32,
    window: u32,
    scale: f32,
    cap: f32,
    unused: u32,
}

/// Queries of a block of a prompt's attention, keys of its tiles, and the least rows one after the other that it is for:
/// fewer have their keys shared out among blocks instead.
const PROMPT_QUERIES: usize = 64;
const PROMPT_KEYS: usize = 64;
pub(super) const PROMPT_ROWS: usize = 32;

impl<G: Gpu> Cuda<G> {
    /// [`Cuda::attend`] of rows that follow each other in one sequence, on the tensor cores; for caches of halves.
    pub(super) fn attend_prompt(
        &self,
        spec: &AttentionSpec,
        at: &CudaAttention<'_, G::Memory>,
        rows: Range<usize>,
        q: &DeviceRows<G::Memory>,
        out: &mut DeviceRows<G::Memory>,
    ) -> Result<(), KernelError> {
        // Checks queries and room for what comes out.
        let Some(whole) = self.attend_argument(spec, at, 0..rows.end, q, out, (1, LEAST_CHUNK))? else { return Ok(()) };
        let shape = at.shape()?;
        let group = spec.heads / shape.kv_heads;
        let argument = PromptArgument {
            layer: whole.layer,
            q: whole.q,
            rows: whole.rows,
            out: whole.out,
            heads: whole.heads,
            group: size(group)?,
            first: size(rows.start)?,
            count: size(rows.len())?,
            window: whole.window,
            scale: whole.scale,
            cap: whole.cap,
            unused: 0,
        };
        let (kernel, dim) = if shape.head_dim <= 64 { ("attend_prompt64", 64) } else { ("attend_prompt128", 128) };
        let grid = [size((rows.len() * group).div_ceil(PROMPT_QUERIES))?, size(shape.kv_heads)?, 1];
        // Two tiles of keys and values; their rows are 32 and 16 bytes longer than a head.
        let shared = 2 * PROMPT_KEYS * 2 * (2 * dim + 24);
        let launch = Launch::new(kernel, grid, size(THREADS)?, bytes_of(&argument));
        self.gpu.launch(&launch.with_shared(size(shared)?))
    }
}
