//! A tile: the queries of a block that share a key head, against a range of keys, a block of scores at a time.
//!
//! ```text
//! scores (rows, keys of a block) = q x keys, capped, minus infinity where a query doesn't see the key
//! new = max(largest, scores); weights = e^(scores - new); what was summed so far shrinks by e^(largest - new)
//! weight += sum(weights); sums (rows, head_dim) += weights x values
//! ```

use super::product::{Strides, product};
use super::{AttentionSpec, BLOCK_KEYS, Element, seen};
use crate::ops::kv::{KvCache, Sides};
use crate::ops::math;
use crate::ops::softmax::largest;
use crate::simd::{LANES, Simd, SimdOp};
use std::ops::Range;

/// One head of a cache.
pub(super) struct Keys<'a, T> {
    keys: &'a [T],   // [position / 16][head_dim][16]
    values: &'a [T], // [head_dim / 16][room][16]
    /// (room) scales of keys and of values.
    scales: Option<[&'a [f32]; 2]>,
    room: usize,
}

impl<'a, T: Element> Keys<'a, T> {
    pub(super) fn new(
        cache: &KvCache,
        head: usize,
        keys: &'a [T],
        values: &'a [T],
        scales: Option<&'a Sides<f32>>,
    ) -> Keys<'a, T> {
        let (k, v) = cache.head_len();
        let room = cache.room();
        let scales = scales.map(|sides| [&sides.keys, &sides.values].map(|scales| &scales[head * room..][..room]));
        Keys { keys: &keys[head * k..][..k], values: &values[head * v..][..v], scales, room }
    }
}

/// Queries that share a key head: row r of a tile is query r / group, head r % group.
#[derive(Clone, Copy)]
pub(super) struct Queries<'a> {
    /// (queries, width); width = heads x head_dim
    pub(super) q: &'a [f32],
    pub(super) width: usize,
    /// Where the group's first head starts in a query.
    pub(super) offset: usize,
    pub(super) group: usize,
    pub(super) head_dim: usize,
    /// Position of the first query.
    pub(super) first: usize,
}

impl Queries<'_> {
    fn rows(&self) -> usize {
        self.q.len() / self.width * self.group
    }

    /// Where row r lies among the queries.
    fn at(&self, row: usize) -> Range<usize> {
        let start = row / self.group * self.width + self.offset + row % self.group * self.head_dim;
        start..start + self.head_dim
    }
}

/// What a tile is computed in, one for each worker.
#[derive(Debug)]
pub(super) struct TileScratch {
    q: Vec<f32>,       // (rows, head_dim), scaled
    scores: Vec<f32>,  // (rows, BLOCK_KEYS)
    sums: Vec<f32>,    // (rows, head_dim padded to 16)
    largest: Vec<f32>, // (rows)
    weight: Vec<f32>,  // (rows)
}

impl TileScratch {
    pub(super) fn new(rows: usize, head_dim: usize) -> TileScratch {
        TileScratch {
            q: vec![0.0; rows * head_dim],
            scores: vec![0.0; rows * BLOCK_KEYS],
            sums: vec![0.0; rows * head_dim.next_multiple_of(LANES)],
            largest: vec![0.0; rows],
            weight: vec![0.0; rows],
        }
    }

    /// Writes the rows' results where their queries lie.
    pub(super) fn finish(&self, queries: &Queries<'_>, out: &mut [f32]) {
        let padded = queries.head_dim.next_multiple_of(LANES);
        for row in 0..queries.rows() {
            let share = 1.0 / self.weight[row];
            for (out, sum) in out[queries.at(row)].iter_mut().zip(&self.sums[row * padded..]) {
                *out = sum * share;
            }
        }
    }

    /// Copies sums, largest scores and weights of so many rows, to be merged with other chunks'.
    pub(super) fn hand_over(&self, rows: usize, partial: &mut [f32]) {
        let (sums, stats) = partial.split_at_mut(partial.len() - 2 * rows);
        sums.copy_from_slice(&self.sums[..sums.len()]);
        stats[..rows].copy_from_slice(&self.largest[..rows]);
        stats[rows..].copy_from_slice(&self.weight[..rows]);
    }
}

/// Fills `scratch` with what the queries get from these keys.
pub(super) struct Tile<'a, 'c, T> {
    pub(super) spec: &'a AttentionSpec,
    pub(super) queries: Queries<'a>,
    pub(super) head: Keys<'c, T>,
    pub(super) keys: Range<usize>,
    pub(super) scratch: &'a mut TileScratch,
}

impl<T: Element> SimdOp for Tile<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let Tile { spec, queries, head, keys, scratch } = self;
        let (rows, head_dim) = (queries.rows(), queries.head_dim);
        let padded = head_dim.next_multiple_of(LANES);
        for row in 0..rows {
            let from = queries.q[queries.at(row)].chunks(LANES);
            for (q, to) in from.zip(scratch.q[row * head_dim..][..head_dim].chunks_mut(LANES)) {
                s.store_partial(s.mul(s.load_partial(q), s.splat(spec.scale)), to);
            }
        }
        scratch.sums[..rows * padded].fill(0.0);
        scratch.largest[..rows].fill(f32::NEG_INFINITY);
        scratch.weight[..rows].fill(0.0);

        let mut start = keys.start / LANES * LANES;
        while start < keys.end {
            let end = keys.end.min(start + BLOCK_KEYS);
            let panels = (end - start).div_ceil(LANES);
            let panel_len = head_dim * LANES;
            product::<S, T, false>(
                s,
                (&scratch.q, rows, head_dim),
                (&head.keys[start / LANES * panel_len..], panels, panel_len),
                &mut scratch.scores,
                Strides { a: head_dim, out: BLOCK_KEYS },
            );
            // The keys of this block that any query sees.
            let (mut any_from, mut any_to) = (end - start, 0);
            for row in 0..rows {
                let position = queries.first + row / queries.group;
                // Keys of this block that the query sees, counted from the block's first.
                let sees = seen(position, spec.window);
                let from = sees.start.max(keys.start).clamp(start, end) - start;
                let to = sees.end.clamp(start + from, end) - start;
                let scores = &mut scratch.scores[row * BLOCK_KEYS..][..panels * LANES];
                let scales = head.scales.map(|[k, v]| [&k[start..][..scores.len()], &v[start..][..scores.len()]]);
                if from >= to {
                    scores.fill(0.0);
                    continue;
                }
                (any_from, any_to) = (any_from.min(from), any_to.max(to));
                let stats = (&mut scratch.largest[row], &mut scratch.weight[row]);
                let shrink = weights(s, spec, scores, from..to, scales, stats);
                if shrink != 1.0 {
                    for sum in scratch.sums[row * padded..][..padded].as_chunks_mut::<LANES>().0 {
                        s.store(s.mul(s.load(sum), s.splat(shrink)), sum);
                    }
                }
            }
            product::<S, T, true>(
                s,
                (&scratch.scores[any_from..], rows, any_to.saturating_sub(any_from)),
                (&head.values[(start + any_from) * LANES..], padded / LANES, head.room * LANES),
                &mut scratch.sums,
                Strides { a: BLOCK_KEYS, out: padded },
            );
            start = end;
        }
    }
}

/// Scores of one query in a block -> weights; the factor by which what was summed before shrinks.
#[inline(always)]
fn weights<S: Simd>(
    s: S,
    spec: &AttentionSpec,
    scores: &mut [f32],
    sees: Range<usize>,
    scales: Option<[&[f32]; 2]>,
    (most, weight): (&mut f32, &mut f32),
) -> f32 {
    if let Some([keys, _]) = scales {
        for (scores, scale) in scores.as_chunks_mut::<LANES>().0.iter_mut().zip(keys.as_chunks::<LANES>().0) {
            s.store(s.mul(s.load(scores), s.load(scale)), scores);
        }
    }
    if let Some(cap) = spec.softcap {
        for scores in scores.as_chunks_mut::<LANES>().0 {
            s.store(math::softcap(s, s.load(scores), cap), scores);
        }
    }
    scores[..sees.start].fill(f32::NEG_INFINITY);
    scores[sees.end..].fill(f32::NEG_INFINITY);
    let block = largest(s, scores);
    let new = if block > *most { block } else { *most };
    let shrink = if new == *most { 1.0 } else { s.largest(math::exp(s, s.splat(*most - new))) };
    let mut total = s.splat(0.0);
    for scores in scores.as_chunks_mut::<LANES>().0 {
        let e = math::exp(s, s.sub(s.load(scores), s.splat(new)));
        total = s.add(total, e);
        s.store(e, scores);
    }
    if let Some([_, values]) = scales {
        for (scores, scale) in scores.as_chunks_mut::<LANES>().0.iter_mut().zip(values.as_chunks::<LANES>().0) {
            s.store(s.mul(s.load(scores), s.load(scale)), scores);
        }
    }
    *weight = *weight * shrink + s.sum(total);
    *most = new;
    shrink
}
