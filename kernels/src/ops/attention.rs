//! Attention of new queries over a cache, in one streaming pass (FlashAttention, arXiv 2205.14135): scores exist only
//! for a tile of queries and a block of keys, and the softmax is corrected as larger scores turn up.
//!
//! Queries of heads that share a key head stand in one tile, so that keys and values are read and widened once for all
//! of them. Who computes what:
//!
//! ```text
//! many queries   one item = a block of queries, all heads, all keys they see        -> its rows of `out`
//! few queries    one item = a key head, a chunk of keys, all the queries            -> (sums, largest, weight)
//!                then every query's chunks are merged, first to last                -> its row of `out`
//! ```
//! Blocks and chunks depend on shapes alone, so that results don't depend on the number of threads.

mod product;
mod tile;

use super::kv::{Element, KvCache, KvData};
use super::{Ops, math};
use crate::Pool;
use crate::simd::{LANES, Simd, SimdOp, dispatch};
use std::ops::Range;
use tile::{Keys, Queries, Tile, TileScratch};

/// Keys whose scores are held at once.
const BLOCK_KEYS: usize = 128;
/// Least keys of a chunk: fewer aren't worth merging.
const CHUNK_KEYS: usize = 512;
/// Most chunks of a context.
const CHUNKS: usize = 16;
/// Queries of a block times heads that share a key head: about what fills the first-level cache.
const TILE_ROWS: usize = 24;
/// Least queries of a block.
const BLOCK_QUERIES: usize = 8;

/// What kind of attention a layer has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionSpec {
    /// Query heads, a multiple of the cache's key heads; consecutive ones share a key head.
    pub heads: usize,
    /// Factor of every score, usually 1 / sqrt(head_dim).
    pub scale: f32,
    /// How many positions a query sees, its own included (always at least that one); all before it if none.
    pub window: Option<usize>,
    /// Bound on scores: cap * tanh(score / cap).
    pub softcap: Option<f32>,
}

/// Buffers that attention works in, made once for a context.
#[derive(Debug)]
pub struct AttentionScratch {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    tiles: Vec<TileScratch>, // one a worker
    /// (key head, chunk): sums (rows, head_dim padded to 16), then largest (rows), then weight (rows).
    partial: Vec<f32>,
}

impl AttentionScratch {
    /// Buffers for layers of this shape on this pool, for any number of queries and keys.
    ///
    /// # Panics
    /// If `heads` isn't a multiple of `kv_heads`.
    pub fn new(pool: &Pool, heads: usize, kv_heads: usize, head_dim: usize) -> AttentionScratch {
        let group = group_of(heads, kv_heads);
        let rows = block_queries(group) * group;
        let tiles = (0..pool.threads()).map(|_| TileScratch::new(rows, head_dim)).collect();
        let partial = vec![0.0; kv_heads * CHUNKS * partial_len(rows, head_dim)];
        AttentionScratch { heads, kv_heads, head_dim, tiles, partial }
    }
}

/// Query heads for each key head.
fn group_of(heads: usize, kv_heads: usize) -> usize {
    let group = heads.checked_div(kv_heads).unwrap_or(0);
    assert_eq!(group * kv_heads, heads, "{heads} heads don't share {kv_heads} key heads evenly");
    group
}

/// Queries of a block, for so many heads that share a key head.
fn block_queries(group: usize) -> usize {
    (TILE_ROWS / group.max(1)).max(BLOCK_QUERIES)
}

/// Floats of one chunk's result.
fn partial_len(rows: usize, head_dim: usize) -> usize {
    rows * (head_dim.next_multiple_of(LANES) + 2)
}

/// The positions that a query sees.
fn seen(position: usize, window: Option<usize>) -> Range<usize> {
    (position + 1).saturating_sub(window.unwrap_or(usize::MAX).max(1))..position + 1
}

impl Ops<'_> {
    /// `out` (rows, heads, head_dim) = attention of `q` (rows, heads, head_dim) over the cache, whose last `rows`
    /// positions are the queries' own: append their keys and values first.
    ///
    /// # Panics
    /// If lengths don't fit the shape, if the cache holds fewer positions than there are rows, or if the scratch was
    /// made for another shape or pool.
    pub fn attention(
        &self,
        spec: &AttentionSpec,
        q: &[f32],
        cache: &KvCache,
        scratch: &mut AttentionScratch,
        out: &mut [f32],
    ) {
        let (kv_heads, head_dim) = (cache.kv_heads(), cache.head_dim());
        let shape = (scratch.heads, scratch.kv_heads, scratch.head_dim);
        assert_eq!(shape, (spec.heads, kv_heads, head_dim), "scratch for (heads, kv_heads, head_dim)");
        let rows = super::rows_of("queries", q.len(), spec.heads * head_dim);
        assert_eq!(out.len(), q.len(), "attention's output");
        assert!(rows <= cache.len(), "{rows} queries, {} positions", cache.len());
        match &cache.data {
            KvData::F32(floats) => {
                let heads = |head| Keys::new(cache, head, &floats.keys, &floats.values, None);
                self.attend(spec, q, cache, scratch, out, heads);
            }
            KvData::F16(bits) => {
                let heads = |head| Keys::new(cache, head, &bits.keys, &bits.values, None);
                self.attend(spec, q, cache, scratch, out, heads);
            }
            KvData::Int8 { codes, scales } => {
                let heads = |head| Keys::new(cache, head, &codes.keys, &codes.values, Some(scales));
                self.attend(spec, q, cache, scratch, out, heads);
            }
        }
    }

    fn attend<'c, T: Element + 'c>(
        &self,
        spec: &AttentionSpec,
        q: &[f32],
        cache: &KvCache,
        scratch: &mut AttentionScratch,
        out: &mut [f32],
        head: impl Fn(usize) -> Keys<'c, T> + Sync,
    ) {
        let width = spec.heads * cache.head_dim();
        if out.is_empty() {
            return;
        }
        let (rows, block) = (q.len() / width, block_queries(group_of(spec.heads, cache.kv_heads())));
        let first = cache.len() - rows;
        let job = Job { ops: *self, spec, width, head_dim: cache.head_dim(), kv_heads: cache.kv_heads(), head: &head };
        if rows > 4 * block {
            self.pool.for_each_part_with(out, block * width, &mut scratch.tiles, |index, out, tile| {
                let start = index * block;
                job.block(&q[start * width..][..out.len()], first + start, tile, out);
            });
        } else {
            for (index, (q, out)) in q.chunks(block * width).zip(out.chunks_mut(block * width)).enumerate() {
                job.chunks(q, first + index * block, scratch, out);
            }
        }
    }
}

/// One call of attention.
struct Job<'a, H> {
    ops: Ops<'a>,
    spec: &'a AttentionSpec,
    /// heads x head_dim
    width: usize,
    head_dim: usize,
    kv_heads: usize,
    head: &'a H,
}

impl<'c, T: Element + 'c, H: Fn(usize) -> Keys<'c, T> + Sync> Job<'_, H> {
    /// The queries that share a key head.
    fn queries<'q>(&self, q: &'q [f32], first: usize, kv_head: usize) -> Queries<'q> {
        let group = self.spec.heads / self.kv_heads;
        let offset = kv_head * group * self.head_dim;
        Queries { q, width: self.width, offset, group, head_dim: self.head_dim, first }
    }

    /// A block of queries over all keys that they see.
    fn block(&self, q: &[f32], first: usize, tile: &mut TileScratch, out: &mut [f32]) {
        let rows = q.len() / self.width;
        let keys = seen(first, self.spec.window).start..first + rows;
        for kv_head in 0..self.kv_heads {
            let queries = self.queries(q, first, kv_head);
            let head = (self.head)(kv_head);
            dispatch(self.ops.isa, Tile { spec: self.spec, queries, head, keys: keys.clone(), scratch: &mut *tile });
            tile.finish(&queries, out);
        }
    }

    /// A few queries over chunks of keys, then the chunks together.
    fn chunks(&self, q: &[f32], first: usize, scratch: &mut AttentionScratch, out: &mut [f32]) {
        let rows = q.len() / self.width;
        let start = seen(first, self.spec.window).start / LANES * LANES;
        let end = first + rows;
        let len = (end - start).div_ceil(CHUNKS).max(CHUNK_KEYS).next_multiple_of(LANES);
        let chunks = (end - start).div_ceil(len);
        let group = self.spec.heads / self.kv_heads;
        let tile_rows = rows * group;
        let part = partial_len(tile_rows, self.head_dim);
        let partial = &mut scratch.partial[..self.kv_heads * chunks * part];
        self.ops.pool.for_each_part_with(partial, part, &mut scratch.tiles, |item, partial, tile| {
            let (kv_head, from) = (item / chunks, start + item % chunks * len);
            let queries = self.queries(q, first, kv_head);
            let keys = from..end.min(from + len);
            let head = (self.head)(kv_head);
            dispatch(self.ops.isa, Tile { spec: self.spec, queries, head, keys, scratch: &mut *tile });
            tile.hand_over(tile_rows, partial);
        });
        for (row, out) in out.chunks_mut(self.head_dim).enumerate() {
            let (query, head) = (row / self.spec.heads, row % self.spec.heads);
            let parts = &partial[head / group * chunks * part..][..chunks * part];
            let merge = Merge { parts, part, rows: tile_rows, row: query * group + head % group, out };
            dispatch(self.ops.isa, merge);
        }
    }
}

/// One row of all chunks of a key head -> its output, chunks first to last.
struct Merge<'a> {
    parts: &'a [f32], // (chunks, part)
    part: usize,
    rows: usize,
    row: usize,
    out: &'a mut [f32], // (head_dim)
}

impl SimdOp for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let Merge { parts, part, rows, row, out } = self;
        let padded = out.len().next_multiple_of(LANES);
        let stats = rows * padded;
        let mut largest = f32::NEG_INFINITY;
        for part in parts.chunks(part) {
            largest = if part[stats + row] > largest { part[stats + row] } else { largest };
        }
        let mut weight = s.splat(0.0);
        out.fill(0.0);
        for part in parts.chunks(part) {
            if part[stats + rows + row] == 0.0 {
                // The query sees no key of this chunk.
                continue;
            }
            let share = math::exp(s, s.splat(part[stats + row] - largest));
            weight = s.fma(share, s.splat(part[stats + rows + row]), weight);
            let sums = &part[row * padded..][..padded];
            for (out, sums) in out.chunks_mut(LANES).zip(sums.chunks(LANES)) {
                s.store_partial(s.fma(share, s.load_partial(sums), s.load_partial(out)), out);
            }
        }
        for out in out.chunks_mut(LANES) {
            s.store_partial(s.div(s.load_partial(out), weight), out);
        }
    }
}
