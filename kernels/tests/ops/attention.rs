//! Attention against a softmax in f64 over what the cache holds.

use super::quick::thin;
use super::*;
use half::f16;
use nibble_kernels::ops::{AttentionScratch, AttentionSpec, KvCache, KvKind};

const KINDS: [KvKind; 3] = [KvKind::F32, KvKind::F16, KvKind::Int8];

/// A layer and a context.
#[derive(Debug, Clone, Copy)]
struct Case {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Positions before the queries, and queries.
    past: usize,
    rows: usize,
    window: Option<usize>,
    softcap: Option<f32>,
}

/// Numbers as the cache of this kind gives them back.
fn kept(kind: KvKind, head_dim: usize, x: &[f32]) -> Vec<f64> {
    match kind {
        KvKind::F32 => x.iter().map(|x| f64::from(*x)).collect(),
        KvKind::F16 => x.iter().map(|x| f16::from_f32(x.clamp(-65504.0, 65504.0)).to_f64()).collect(),
        KvKind::Int8 => (x.chunks(head_dim))
            .flat_map(|x| {
                let most = x.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
                let scale = f64::from(most / 127.0);
                x.iter().map(move |x| f64::from((x * (127.0 / most)).round_ties_even()) * scale)
            })
            .collect(),
    }
}

/// (wanted, bound) for every number of the output.
fn reference(case: &Case, scale: f32, q: &[f32], k: &[f64], v: &[f64]) -> Vec<(f64, f64)> {
    let Case { heads, kv_heads, head_dim, past, rows, window, softcap } = *case;
    let mut result = Vec::new();
    for (row, head) in (0..rows).flat_map(|row| (0..heads).map(move |head| (row, head))) {
        let q = &q[(row * heads + head) * head_dim..][..head_dim];
        let position = past + row;
        let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
        let at = |position: usize| (position * kv_heads + head / (heads / kv_heads)) * head_dim;
        let (mut scores, mut score_error) = (Vec::new(), 0.0_f64);
        for key in first..=position {
            let products = q.iter().zip(&k[at(key)..]).map(|(q, k)| f64::from(*q) * k * f64::from(scale));
            let size: f64 = products.clone().map(f64::abs).sum();
            let mut score: f64 = products.sum();
            // The query's scaling, a fused sum of head_dim products, the int8 scale.
            let mut error = (head_dim as f64 + 2.0) * U * size;
            if let Some(cap) = softcap.map(f64::from) {
                score = cap * (score / cap).tanh();
                error += 8.0 * U * score.abs();
            }
            // The difference to the largest score is rounded as well.
            score_error = score_error.max(error + 2.0 * U * score.abs());
            scores.push(score);
        }
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
        let total: f64 = weights.iter().sum();
        for i in 0..head_dim {
            let (mut sum, mut size) = (0.0, 0.0);
            for (key, weight) in (first..).zip(&weights) {
                let v = v[at(key) + i];
                sum += weight * v / total;
                size += weight * v.abs() / total;
            }
            // A weight is off by the errors of its score and of the largest, and by an exponential; each block of keys
            // shrinks what came before (an exponential and a product, again at the merge); sums have as many terms as
            // there are keys. The weights' total is off by as much.
            let keys = weights.len() as f64;
            let relative = 2.0 * score_error + (4.0 + 10.0 * (keys / 128.0 + 3.0) + keys + 4.0) * U;
            result.push((sum, 2.0 * relative * size + 1e-44));
        }
    }
    result
}

/// Runs a case everywhere and compares it with the reference.
fn check(case: Case, kind: KvKind, seed: u64) {
    let Case { heads, kv_heads, head_dim, past, rows, window, softcap } = case;
    let mut rng = rng(seed);
    let len = past + rows;
    let q = activations(&mut rng, rows * heads * head_dim);
    let mut k = activations(&mut rng, len * kv_heads * head_dim);
    let v = activations(&mut rng, len * kv_heads * head_dim);
    // A key that many queries find, late, so that what was summed shrinks.
    let late = (len * 3 / 4) * kv_heads * head_dim;
    k[late..late + head_dim].iter_mut().for_each(|k| *k *= 4.0);
    let scale = 1.0 / (head_dim as f32).sqrt();
    let spec = AttentionSpec { heads, scale, window, softcap };
    let found = same_everywhere(|ops| {
        let mut cache = KvCache::new(kind, kv_heads, head_dim, len + 3);
        let mut scratch = AttentionScratch::new(ops.pool(), heads, kv_heads, head_dim);
        // What earlier contexts left in the cache and in the buffers must not show.
        let (nan_rows, width) = (rows.min(9), kv_heads * head_dim);
        let nan = vec![f32::NAN; (len + 3).max(nan_rows) * width];
        ops.append(&mut cache, &nan[..(len + 3) * width], &nan[..(len + 3) * width]).unwrap();
        let nan_q = vec![f32::NAN; nan_rows * heads * head_dim];
        ops.attention(&spec, &nan_q, &cache, &mut scratch, &mut vec![0.0; nan_q.len()]);
        cache.truncate(0);
        // In two steps, the first of them not whole panels.
        let split = (len / 3) * width;
        ops.append(&mut cache, &k[..split], &v[..split]).unwrap();
        ops.append(&mut cache, &k[split..], &v[split..]).unwrap();
        let mut out = vec![f32::NAN; q.len()];
        ops.attention(&spec, &q, &cache, &mut scratch, &mut out);
        out
    });
    let (k, v) = (kept(kind, head_dim, &k), kept(kind, head_dim, &v));
    for (i, (found, (wanted, bound))) in found.iter().zip(reference(&case, scale, &q, &k, &v)).enumerate() {
        assert_close(*found, wanted, bound, format_args!("{case:?} {kind:?}, number {i}"));
    }
}

#[test]
fn every_head_size_and_group_equals_the_reference() {
    let layers = [
        (1, 1, 32),
        (9, 3, 64),
        (4, 4, 40),
        (8, 1, 72),
        (14, 2, 64),
        (2, 2, 80),
        (5, 1, 96),
        (8, 4, 128),
        (4, 1, 256),
        (3, 3, 7),
        (32, 1, 16),
        (6, 2, 1),
    ];
    let contexts = [(0, 1), (0, 5), (37, 1), (100, 13)];
    let cases = (layers.into_iter().enumerate())
        .flat_map(|layer| contexts.map(|context| (layer, context)))
        .flat_map(|case| KINDS.map(|kind| (case, kind)));
    for (((i, (heads, kv_heads, head_dim)), (past, rows)), kind) in thin(7, cases) {
        check(Case { heads, kv_heads, head_dim, past, rows, window: None, softcap: None }, kind, i as u64);
    }
}

#[test]
fn long_contexts_are_merged_from_chunks() {
    // Around one block, one chunk, several, and more than 16 chunks of the least size.
    let cases = ([127, 128, 129, 511, 512, 513, 1200, 9000].into_iter().enumerate())
        .flat_map(|past| KINDS.map(|kind| (past, kind)))
        .flat_map(|case| [None, Some(600)].map(|window| (case, window)));
    for (((i, past), kind), window) in thin(7, cases) {
        let case = Case { heads: 4, kv_heads: 2, head_dim: 32, past, rows: 1 + i % 3, window, softcap: None };
        check(case, kind, past as u64);
    }
}

#[test]
fn prompts_in_blocks_equal_the_reference() {
    let cases = [(3, 1, 0, 70), (2, 2, 0, 150), (4, 2, 300, 40), (3, 1, 5, 33), (8, 1, 0, 129)]
        .into_iter()
        .flat_map(|prompt| KINDS.map(|kind| (prompt, kind)))
        .flat_map(|case| [None, Some(1), Some(50)].map(|window| (case, window)));
    for (((heads, kv_heads, past, rows), kind), window) in thin(7, cases) {
        check(Case { heads, kv_heads, head_dim: 24, past, rows, window, softcap: None }, kind, rows as u64);
    }
}

#[test]
fn random_cases_equal_the_reference() {
    let mut rng = rng(77);
    for seed in thin(5, 0..30) {
        let (kv_heads, group) = (rng.random_range(1..4), rng.random_range(1..9));
        let case = Case {
            heads: kv_heads * group,
            kv_heads,
            head_dim: [8, 16, 20, 32, 48, 64][rng.random_range(0..6)],
            past: [0, rng.random_range(0..40), rng.random_range(0..700)][rng.random_range(0..3)],
            rows: [1, rng.random_range(1..12), rng.random_range(1..120)][rng.random_range(0..3)],
            window: [None, Some(rng.random_range(1..300))][rng.random_range(0..2)],
            softcap: [None, Some(rng.random_range(5.0..60.0))][rng.random_range(0..2)],
        };
        check(case, [KvKind::F16, KvKind::Int8][seed as usize % 2], seed);
    }
}

#[test]
fn no_queries_are_no_work() {
    let ops = Ops::new(&POOLS[1]);
    let mut cache = KvCache::new(KvKind::F16, 1, 8, 4);
    let mut scratch = AttentionScratch::new(ops.pool(), 2, 1, 8);
    let spec = AttentionSpec { heads: 2, scale: 1.0, window: None, softcap: None };
    ops.attention(&spec, &[], &cache, &mut scratch, &mut []);
    ops.append(&mut cache, &[1.0; 8], &[1.0; 8]).unwrap();
    ops.attention(&spec, &[], &cache, &mut scratch, &mut []);
}

#[test]
fn a_window_of_one_gives_the_query_its_own_value() {
    let v = activations(&mut rng(5), 40 * 16);
    for rows in [1, 40] {
        let out = same_everywhere(|ops| {
            let mut cache = KvCache::new(KvKind::F16, 1, 16, 40);
            ops.append(&mut cache, &v, &v).unwrap();
            let mut scratch = AttentionScratch::new(ops.pool(), 1, 1, 16);
            let spec = AttentionSpec { heads: 1, scale: 1.0, window: Some(1), softcap: None };
            let mut out = vec![f32::NAN; rows * 16];
            ops.attention(&spec, &v[(40 - rows) * 16..], &cache, &mut scratch, &mut out);
            out
        });
        let wanted: Vec<f32> = v[(40 - rows) * 16..].iter().map(|v| f16::from_f32(*v).to_f32()).collect();
        assert_eq!(out, wanted);
    }
}

#[test]
fn huge_values_saturate_and_scores_far_apart_stay_finite() {
    let mut k = vec![0.0; 20 * 8];
    k[3 * 8..4 * 8].fill(1e30);
    k[7 * 8..8 * 8].fill(-1e30);
    for kind in KINDS {
        let out = same_everywhere(|ops| {
            let mut cache = KvCache::new(kind, 1, 8, 20);
            ops.append(&mut cache, &k, &k).unwrap();
            let mut scratch = AttentionScratch::new(ops.pool(), 1, 1, 8);
            let spec = AttentionSpec { heads: 1, scale: 1.0, window: None, softcap: None };
            let mut out = vec![f32::NAN; 8];
            ops.attention(&spec, &[1.0; 8], &cache, &mut scratch, &mut out);
            out
        });
        // All weight on position 3.
        match kind {
            KvKind::F32 => assert_eq!(out, [1e30; 8]),
            KvKind::F16 => assert_eq!(out, [65504.0; 8]),
            KvKind::Int8 => assert!(out.iter().all(|x| (x / 1e30 - 1.0).abs() < 1e-6), "{out:?}"),
        }
    }
}

#[test]
fn nan_in_a_value_or_key_shows_in_the_queries_that_see_it() {
    for kind in KINDS {
        for in_keys in [true, false] {
            let clean = activations(&mut rng(6), 12 * 8);
            let mut spoilt = clean.clone();
            spoilt[5 * 8 + 2] = f32::NAN;
            let (k, v) = if in_keys { (&spoilt, &clean) } else { (&clean, &spoilt) };
            for (window, spoils) in [(None, true), (Some(4), false)] {
                let out = same_everywhere(|ops| {
                    let mut cache = KvCache::new(kind, 1, 8, 12);
                    ops.append(&mut cache, k, v).unwrap();
                    let mut scratch = AttentionScratch::new(ops.pool(), 1, 1, 8);
                    let spec = AttentionSpec { heads: 1, scale: 1.0, window, softcap: None };
                    let mut out = vec![0.0; 8];
                    ops.attention(&spec, &[0.1; 8], &cache, &mut scratch, &mut out);
                    out
                });
                assert_eq!(out[2].is_nan(), spoils, "{kind:?}, in keys: {in_keys}");
            }
        }
    }
}

#[test]
#[should_panic(expected = "2 queries, 1 positions")]
fn more_queries_than_positions_are_refused() {
    let ops = Ops::new(&POOLS[0]);
    let mut cache = KvCache::new(KvKind::F16, 1, 8, 4);
    ops.append(&mut cache, &[1.0; 8], &[1.0; 8]).unwrap();
    let mut scratch = AttentionScratch::new(ops.pool(), 1, 1, 8);
    let spec = AttentionSpec { heads: 1, scale: 1.0, window: None, softcap: None };
    ops.attention(&spec, &[1.0; 16], &cache, &mut scratch, &mut [0.0; 16]);
}
