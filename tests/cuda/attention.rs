//! Attention over cached keys and values: kinds of caches, groups of heads, windows, caps, chunks, several sequences.

use super::{Device, numbers, random, rows_of};
use half::f16;
use nibble_kernels::cuda::{CacheKind, CacheShape, Cuda, CudaAttention, DeviceToken, Gpu};
use nibble_kernels::ops::{AttentionSpec, RopeTable};

/// What a cache makes of one head's numbers at one position.
fn kept(kind: CacheKind, x: &[f32]) -> Vec<f64> {
    match kind {
        CacheKind::F32 => x.iter().map(|x| f64::from(*x)).collect(),
        CacheKind::F16 => x.iter().map(|x| f16::from_f32(*x).to_f64()).collect(),
        CacheKind::Int8 => {
            let most = x.iter().fold(0f32, |most, x| most.max(x.abs()));
            let (scale, reciprocal) = (most / 127.0, 127.0 / most);
            x.iter().map(|x| f64::from((x * reciprocal).round_ties_even() * scale)).collect()
        }
    }
}

struct Case {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    kind: CacheKind,
    window: Option<usize>,
    softcap: Option<f32>,
    /// Positions that each sequence has before its last batch, and rows of that batch.
    sequences: &'static [(usize, usize)],
    processors: u32,
}

/// Gives the device that it ran on.
fn check<G: Gpu>(device: Device<G>, case: &Case) -> Cuda<G> {
    let &Case { heads, kv_heads, head_dim, kind, window, softcap, sequences, processors } = case;
    let cuda = device(processors);
    let mut random = random((heads * head_dim + processors as usize) as u64);
    let shape = CacheShape { layers: 2, kv_heads, head_dim, capacity: 300, kind };
    let caches: Vec<_> = sequences.iter().map(|_| cuda.cache(shape).unwrap()).collect();
    let (width, kv_width) = (heads * head_dim, kv_heads * head_dim);
    let mut table = cuda.table(400).unwrap();
    let all: Vec<[Vec<f32>; 2]> = sequences
        .iter()
        .map(|(before, rows)| [0, 1].map(|_| numbers(&mut random, (before + rows) * kv_width)))
        .collect();
    // What came before, then the last batch of all sequences together.
    for last in [false, true] {
        let range = |s: usize| {
            let (before, rows) = sequences[s];
            if last { before..before + rows } else { 0..before }
        };
        let places = (0..sequences.len()).flat_map(|s| range(s).map(move |at| (s, at)));
        let count = places.clone().count();
        if count == 0 {
            continue;
        }
        cuda.set_table(&mut table, places.map(|(s, at)| caches[s].place(at).unwrap())).unwrap();
        let side = |side: usize| {
            let rows =
                (0..sequences.len()).flat_map(|s| &all[s][side][range(s).start * kv_width..range(s).end * kv_width]);
            rows_of(&cuda, &rows.copied().collect::<Vec<_>>(), kv_width)
        };
        for layer in [1, 0] {
            // Layer 0 comes last, so that layer 1 shows if the layers lie over each other.
            let at = CudaAttention { caches: &caches, layer, table: &table };
            cuda.append(at, &side(layer ^ 1), &side(layer)).unwrap();
        }
    }
    let rows: usize = sequences.iter().map(|(_, rows)| rows).sum();
    // Queries of all magnitudes, or the power of two that they are multiplied by would not be seen.
    let spread = |at: usize| if rows < 32 { 1.0 } else { [1.0, 1e-6, 1.0, 4.0][at / head_dim % 4] };
    let q: Vec<f32> = numbers(&mut random, rows * width).iter().enumerate().map(|(at, q)| q * spread(at)).collect();
    let mut out = cuda.rows(rows, width).unwrap();
    let spec = AttentionSpec { heads, scale: 1.0 / (head_dim as f32).sqrt(), window, softcap };
    // Layer 1 holds keys in `all[..][0]` and values in `all[..][1]`.
    let at = CudaAttention { caches: &caches, layer: 1, table: &table };
    cuda.attend(&spec, at, &rows_of(&cuda, &q, width), &mut out).unwrap();
    let found = cuda.read_rows(&out, 0..rows).unwrap();

    let mut row = 0;
    for (s, (before, count)) in sequences.iter().enumerate() {
        for position in *before..before + count {
            for head in 0..heads {
                let kv = head / (heads / kv_heads) * head_dim;
                let first = (position + 1).saturating_sub(window.unwrap_or(usize::MAX));
                let number = |side: usize, at: usize| kept(kind, &all[s][side][at * kv_width + kv..][..head_dim]);
                let query = &q[row * width + head * head_dim..][..head_dim];
                let scores: Vec<f64> = (first..=position)
                    .map(|at| {
                        let dot: f64 = number(0, at).iter().zip(query).map(|(k, q)| k * f64::from(*q)).sum();
                        let score = dot * f64::from(spec.scale);
                        softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                    })
                    .collect();
                let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
                let total: f64 = weights.iter().sum();
                let mut wanted = vec![0.0; head_dim];
                for (at, weight) in (first..=position).zip(&weights) {
                    wanted.iter_mut().zip(number(1, at)).for_each(|(w, v)| *w += weight / total * v);
                }
                for (d, wanted) in wanted.iter().enumerate() {
                    let got = f64::from(found[row * width + head * head_dim + d]);
                    // Scores of magnitude up to 16 with head_dim roundings, sums over up to 300 positions of values up
                    // to 1: some hundreds of roundings.
                    let exact = 1000.0 / f64::from(1 << 24);
                    // Of a prompt's rows, queries and weights are rounded to halves: 2^-11 of scores up to 4 times 3, and of
                    // values up to 1.
                    let is_prompt = kind == CacheKind::F16 && *count >= 32 && head_dim % 8 == 0 && head_dim <= 128;
                    let bound = if is_prompt { (most.abs().max(1.0) + 1.0) / 1024.0 } else { exact };
                    assert!(
                        (got - wanted).abs() <= bound,
                        "{kind:?} {heads}/{kv_heads} x {head_dim}: {row} {head} {d}: {got}, wanted {wanted}"
                    );
                }
            }
            row += 1;
        }
    }
    cuda
}

pub fn attention_is_softmax_of_scores_times_values<G: Gpu>(device: Device<G>) {
    let plain = Case {
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        kind: CacheKind::F16,
        window: None,
        softcap: None,
        sequences: &[(0, 1)],
        processors: 2,
    };
    check(device, &plain);
    check(device, &Case { sequences: &[(40, 1)], kind: CacheKind::F32, ..plain });
    check(device, &Case { sequences: &[(100, 1), (3, 1), (64, 1)], kind: CacheKind::Int8, ..plain });
    check(device, &Case { sequences: &[(0, 37)], heads: 9, kv_heads: 3, head_dim: 64, ..plain });
    check(device, &Case { sequences: &[(290, 1)], processors: 132, head_dim: 128, ..plain });
    check(device, &Case { sequences: &[(250, 2), (10, 3)], processors: 132, heads: 22, kv_heads: 2, ..plain });
    check(device, &Case { sequences: &[(150, 5)], window: Some(20), head_dim: 80, ..plain });
    // Prompts: rows before, windows that begin within tiles, caps, widths that tiles aren't full of, groups that blocks
    // cut through, several of them in a batch with rows that aren't.
    check(device, &Case { sequences: &[(0, 200)], heads: 2, kv_heads: 2, head_dim: 64, ..plain });
    check(device, &Case { sequences: &[(70, 80)], window: Some(45), head_dim: 128, ..plain });
    check(device, &Case { sequences: &[(130, 33)], softcap: Some(2.0), head_dim: 80, heads: 14, ..plain });
    let mixed: &[(usize, usize)] = &[(9, 1), (5, 40), (3, 7), (60, 1), (64, 64)];
    check(device, &Case { sequences: mixed, head_dim: 8, heads: 10, ..plain });
    check(device, &Case { sequences: &[(150, 2)], window: Some(50), processors: 132, softcap: Some(2.0), ..plain });
    check(
        device,
        &Case { sequences: &[(33, 2)], head_dim: 256, heads: 2, kv_heads: 1, kind: CacheKind::Int8, ..plain },
    );
    check(device, &Case { sequences: &[(33, 2)], head_dim: 6, heads: 8, kv_heads: 1, kind: CacheKind::F32, ..plain });
}

/// Against the same operations one after another; those are held to double precision above.
pub fn a_decoded_token_is_turned_appended_and_attended_at_once<G: Gpu>(device: Device<G>) {
    // Processors, heads, key heads, width of a head, pairs that turn, window, cap, and what sequences have before.
    type Turn = (u32, usize, usize, usize, usize, Option<usize>, Option<f32>, &'static [usize]);
    let cases: [(CacheKind, Turn); 8] = [
        (CacheKind::F16, (2, 4, 2, 16, 8, None, None, &[0])),
        (CacheKind::F16, (2, 9, 3, 64, 32, None, None, &[130, 63, 0])),
        (CacheKind::F16, (132, 8, 1, 128, 64, None, None, &[600])),
        (CacheKind::F16, (132, 6, 2, 80, 20, Some(70), Some(2.0), &[290, 40])),
        (CacheKind::F32, (2, 2, 1, 64, 32, None, None, &[64])),
        (CacheKind::Int8, (2, 4, 1, 64, 32, None, None, &[127, 5])),
        (CacheKind::Int8, (132, 3, 1, 256, 0, Some(300), None, &[530])),
        // Widths and groups that have no launch of their own.
        (CacheKind::F16, (2, 18, 2, 20, 10, None, None, &[30, 3])),
    ];
    for (kind, (processors, heads, kv_heads, head_dim, half, window, softcap, before)) in cases {
        let cuda = device(processors);
        let shape = CacheShape { layers: 2, kv_heads, head_dim, capacity: 640, kind };
        let frequencies: Vec<f32> = (0..half).map(|i| 100f32.powf(-(i as f32) / half as f32)).collect();
        let rope = (half > 0).then(|| cuda.rope_table(&RopeTable::new(&frequencies, 640, 1.0)).unwrap());
        let (rows, width, kv_width) = (before.len(), heads * head_dim, kv_heads * head_dim);
        let spec = AttentionSpec { heads, scale: 1.0 / (head_dim as f32).sqrt(), window, softcap };
        let run = |at_once: bool| {
            let caches: Vec<_> = before.iter().map(|_| cuda.cache(shape).unwrap()).collect();
            let mut table = cuda.table(640).unwrap();
            for (s, before) in before.iter().enumerate().filter(|(_, before)| **before > 0) {
                let places = (0..*before).map(|at| caches[s].place(at).unwrap());
                cuda.set_table(&mut table, places).unwrap();
                let [k, v] =
                    [1, 2].map(|seed| rows_of(&cuda, &numbers(&mut random(seed), before * kv_width), kv_width));
                cuda.append(CudaAttention { caches: &caches, layer: 1, table: &table }, &k, &v).unwrap();
            }
            let places = before.iter().zip(&caches).map(|(before, cache)| cache.place(*before).unwrap());
            cuda.set_table(&mut table, places).unwrap();
            let at = || CudaAttention { caches: &caches, layer: 1, table: &table };
            let [mut q, mut k, v] = [(3, width), (4, kv_width), (5, kv_width)]
                .map(|(seed, width)| rows_of(&cuda, &numbers(&mut random(seed), rows * width), width));
            let (mut out, mut again) = (cuda.rows(rows, width).unwrap(), cuda.rows(rows, width).unwrap());
            if at_once {
                let token = DeviceToken { q: &mut q, k: &mut k, v: &v };
                cuda.append_and_attend(&spec, at(), rope.as_ref(), token, &mut out).unwrap();
            } else {
                match &rope {
                    Some(rope) => cuda.rope_and_append(at(), rope, &mut q, &mut k, &v).unwrap(),
                    None => cuda.append(at(), &k, &v).unwrap(),
                }
                cuda.attend(&spec, at(), &q, &mut out).unwrap();
            }
            // What lies in the caches now, seen by the same queries.
            let same = rows_of(&cuda, &numbers(&mut random(6), rows * width), width);
            cuda.attend(&spec, at(), &same, &mut again).unwrap();
            [&out, &again].map(|rows_| cuda.read_rows(rows_, 0..rows).unwrap())
        };
        let ([found, cached], [wanted, wanted_cached]) = (run(true), run(false));
        let what = format!("{kind:?} {heads}/{kv_heads} x {head_dim}, {half} pairs, {before:?}");
        assert_eq!(cached, wanted_cached, "{what}: the caches");
        for (i, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
            // Both are within some hundreds of roundings of sums of values up to 1.
            assert!((found - wanted).abs() <= 1000.0 / (1 << 24) as f32, "{what}: {i}: {found}, wanted {wanted}");
        }
    }
}

pub fn unfit_caches_are_refused<G: Gpu>(device: Device<G>) {
    let cuda = device(2);
    let shape = CacheShape { layers: 1, kv_heads: 2, head_dim: 16, capacity: 8, kind: CacheKind::F16 };
    for head_dim in [0, 15, 258] {
        assert!(cuda.cache(CacheShape { head_dim, ..shape }).is_err(), "heads of {head_dim}");
    }
    let caches = [cuda.cache(shape).unwrap()];
    assert!(caches[0].place(8).is_err(), "a position past the cache");
    let other = cuda.cache(shape).unwrap();
    let mut table = cuda.table(1).unwrap();
    let kv = cuda.rows(1, 32).unwrap();
    cuda.set_table(&mut table, [other.place(0).unwrap()].into_iter()).unwrap();
    let foreign = cuda.append(CudaAttention { caches: &caches, layer: 0, table: &table }, &kv, &kv);
    assert!(foreign.is_err(), "a place in another cache");
    cuda.set_table(&mut table, [caches[0].place(0).unwrap()].into_iter()).unwrap();
    let at = CudaAttention { caches: &caches, layer: 1, table: &table };
    assert!(cuda.append(at, &kv, &kv).is_err(), "a layer past the last");
    let two = [caches[0].place(0).unwrap(), caches[0].place(1).unwrap()];
    assert!(cuda.set_table(&mut table, two.into_iter()).is_err(), "more rows than the table has room for");
}

/// A prompt's attention reads its tiles without waiting for a bank twice, and keys, values and queries in whole sectors;
/// what comes out is written in halves of them, two one after the other.
#[test]
fn a_prompt_keeps_within_its_budget_of_conflicts_and_sectors() {
    for (head_dim, kernel) in [(64, "attend_prompt64"), (128, "attend_prompt128")] {
        let case = Case {
            heads: 4,
            kv_heads: 2,
            head_dim,
            kind: CacheKind::F16,
            window: None,
            softcap: None,
            sequences: &[(20, 64)],
            processors: 2,
        };
        let cuda = check(&super::interpreted, &case);
        let counters = &cuda.gpu().counters()[kernel];
        let conflicts = counters.wavefronts as f64 / counters.least_wavefronts as f64;
        let sectors = counters.sectors as f64 / counters.least_sectors as f64;
        println!("{kernel}: {conflicts:.3} x the least wavefronts, {sectors:.3} x the least sectors, {counters:?}");
        assert!(conflicts <= 1.0 && sectors <= 1.35, "{kernel}: {conflicts} {sectors}");
    }
}
