//! Laws of observers: every row of the table, over values that break naive counting.

use nibble_quant::Range;
use nibble_quant::observer::{Histogram, IntGrid, IntType, OBSERVERS, Observed, QParams, Statistics, choose};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const TYPES: [IntType; 4] = [IntType::U8, IntType::S8, IntType::U16, IntType::S16];

fn grids() -> impl Iterator<Item = IntGrid> {
    TYPES.into_iter().flat_map(|int| [IntGrid::symmetric(int), IntGrid::asymmetric(int)])
}

fn bell(rng: &mut StdRng) -> f32 {
    (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0
}

/// Batches of values: bell-shaped, one-sided, adversarial.
fn samples() -> Vec<(&'static str, Vec<Vec<f32>>)> {
    let mut rng = StdRng::seed_from_u64(7);
    let mut batches = |f: &mut dyn FnMut(usize, &mut StdRng) -> f32| -> Vec<Vec<f32>> {
        (0..6).map(|b| (0..300 + 17 * b).map(|i| f(1000 * b + i, &mut rng)).collect()).collect()
    };
    vec![
        ("normal", batches(&mut |_, r| bell(r))),
        ("rectified", batches(&mut |_, r| bell(r).max(0.0))),
        ("below zero", batches(&mut |_, r| -3.0 - bell(r).abs())),
        ("far from zero", batches(&mut |_, r| 100.0 + bell(r))),
        ("heavy tails", batches(&mut |_, r| bell(r).powi(5))),
        ("a lone spike", batches(&mut |i, r| if i == 2041 { 1e6 } else { bell(r) })),
        ("growing", batches(&mut |i, r| bell(r) * 4f32.powi((i / 1000) as i32))),
        ("zeros", batches(&mut |_, _| 0.0)),
        ("tiny", batches(&mut |i, _| f32::from_bits(i as u32 % 5))),
        ("all of f32", batches(&mut |i, r| bell(r).signum() * f32::MAX * 2f32.powi(-((i % 250) as i32)))),
        ("powers of two", batches(&mut |i, _| 2f32.powi((i % 13) as i32 - 6) * if i % 2 == 0 { 1.0 } else { -1.0 })),
    ]
}

fn seen<'a>(batches: impl IntoIterator<Item = &'a Vec<f32>>) -> Statistics {
    let mut statistics = Statistics::new(true);
    batches.into_iter().for_each(|batch| statistics.observe(batch));
    statistics
}

/// What the law allows sums to differ by.
fn close(a: f64, b: f64, n: u64) -> bool {
    (a - b).abs() <= n as f64 * 2f64.powi(-52) * a.abs().max(b.abs())
}

fn assert_same(a: &Statistics, b: &Statistics, what: &str) {
    assert_eq!(a.histogram(), b.histogram(), "{what}");
    assert_eq!((a.count(), a.nans(), a.infinities()), (b.count(), b.nans(), b.infinities()), "{what}");
    assert_eq!(a.extremes(), b.extremes(), "{what}");
    assert!(close(a.mean_square(), b.mean_square(), a.count()), "{what}");
    // No mean of magnitudes is above the root of the mean square.
    let magnitude = a.mean_square().sqrt();
    assert!((a.mean() - b.mean()).abs() <= a.count() as f64 * 2f64.powi(-52) * magnitude, "{what}");
    let (x, y) = (a.average_range(), b.average_range());
    // Rounded to f32 at the end.
    let near = |x: f32, y: f32| (x - y).abs() <= 2.0 * f32::EPSILON * x.abs();
    assert!(near(x.lo, y.lo) && near(x.hi, y.hi), "{what}: {x:?}, {y:?}");
}

#[test]
fn merged_halves_are_the_whole_in_any_order() {
    for (what, batches) in samples() {
        let whole = seen(&batches);
        for split in 0..=batches.len() {
            let (a, b) = (seen(&batches[..split]), seen(&batches[split..]));
            let (mut ab, mut ba) = (a.clone(), b.clone());
            ab.merge(&b);
            ba.merge(&a);
            assert_same(&ab, &whole, what);
            assert_same(&ba, &whole, what);
        }
        assert_same(&seen(batches.iter().rev()), &whole, what);
        let mut tree = batches.iter().map(|b| seen([b])).collect::<Vec<_>>();
        while tree.len() > 1 {
            let last = tree.pop().unwrap();
            tree[0].merge(&last);
        }
        assert_same(&tree[0], &whole, what);
        let joined = batches.concat();
        assert_eq!(seen([&joined]).histogram(), whole.histogram(), "{what}");
    }
}

#[test]
fn every_observer_gives_the_same_range_however_samples_were_split() {
    for (what, batches) in samples() {
        let (whole, mut halves) = (seen(&batches), seen(&batches[3..]));
        halves.merge(&seen(&batches[..3]));
        for observer in OBSERVERS {
            for grid in grids() {
                let range = |s: &Statistics| choose(observer.name).unwrap().range("x", s, grid).unwrap();
                let (a, b) = (range(&whole), range(&halves));
                let near = |x: f32, y: f32| (x - y).abs() <= 4.0 * f32::EPSILON * x.abs().max(y.abs());
                assert!(near(a.lo, b.lo) && near(a.hi, b.hi), "{}, {what}: {a:?}, {b:?}", observer.name);
            }
        }
    }
}

#[test]
fn every_range_holds_zero_and_stays_within_what_was_seen() {
    for (what, batches) in samples() {
        let statistics = seen(&batches);
        let all = statistics.range();
        for observer in OBSERVERS {
            for grid in grids() {
                let range = choose(observer.name).unwrap().range("x", &statistics, grid).unwrap();
                let mirrored = if observer.name == "absmax" { all.absmax() } else { 0.0 };
                let name = observer.name;
                assert!(range.lo <= 0.0 && range.hi >= 0.0, "{name}, {what}: {range:?}");
                assert!(range.lo >= all.lo.min(-mirrored), "{name}, {what}: {range:?} of {all:?}");
                assert!(range.hi <= all.hi.max(mirrored), "{name}, {what}: {range:?} of {all:?}");
            }
        }
    }
}

#[test]
fn a_histogram_counts_everything_in_bounded_memory() {
    let mut histogram = Statistics::new(true);
    let mut count = 0;
    for round in 0..200 {
        let batch: Vec<f32> = (0..500).map(|i| (i as f32 - 250.0) * 1.3f32.powi(round)).collect();
        count += batch.len() as u64;
        histogram.observe(&batch);
        let bins = histogram.histogram().unwrap();
        assert!(bins.positive().len() <= Histogram::BINS && bins.negative().len() <= Histogram::BINS);
        assert!(bins.negative().len() >= Histogram::BINS / 2, "half of the bins reach to the largest magnitude");
        assert_eq!(bins.total(), count);
        assert_eq!(bins.zeros(), round as u64 + 1);
    }
}

#[test]
fn every_value_is_in_the_bin_that_bounds_it() {
    for (what, batches) in samples() {
        let statistics = seen(&batches);
        let bins = statistics.histogram().unwrap();
        let w = bins.width();
        let values = batches.concat();
        for (i, &count) in bins.positive().iter().enumerate() {
            let inside = |v: &&f32| **v > 0.0 && (**v as f64) >= i as f64 * w && (**v as f64) < (i + 1) as f64 * w;
            if count > 0 || i < 3 {
                assert_eq!(values.iter().filter(inside).count() as u64, count, "{what}, bin {i}");
            }
        }
        assert_eq!(bins.occupied().map(|(_, count)| count).sum::<u64>(), values.len() as u64, "{what}");
        assert!(bins.occupied().is_sorted_by(|a, b| a.0 < b.0), "{what}");
    }
}

#[test]
fn values_that_are_not_finite_are_counted_and_refused() {
    let mut clean = Statistics::new(true);
    clean.observe(&[1.0, -2.0]);
    let mut dirty = clean.clone();
    dirty.observe(&[f32::NAN, 3.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 0.5]);
    assert_eq!((dirty.nans(), dirty.infinities(), dirty.count()), (2, 2, 4));
    assert_eq!(dirty.extremes(), Some((-2.0, 3.0)));
    assert_eq!(dirty.histogram().unwrap().total(), 4);
    clean.merge(&dirty);
    assert_eq!(clean.not_finite(), 4);
    for observer in OBSERVERS {
        let choice = choose(observer.name).unwrap();
        let error = choice.params("layer.7", &dirty, IntGrid::symmetric(IntType::S8)).unwrap_err().to_string();
        assert!(error.contains("`layer.7`") && error.contains("2 NaN and 2 infinite among 8"), "{error}");
        let nothing = choice.range("layer.7", &Statistics::new(true), IntGrid::asymmetric(IntType::U8));
        assert!(nothing.unwrap_err().to_string().contains("no value was observed"), "{}", observer.name);
        let mut bare = Statistics::new(false);
        bare.observe(&[1.0]);
        let range = choice.range("layer.7", &bare, IntGrid::asymmetric(IntType::U8));
        assert_eq!(range.is_err(), observer.histogram, "{}", observer.name);
    }
}

#[test]
fn names_and_numbers_are_checked() {
    assert_eq!(choose("percentile:99.9").unwrap().parameter, 99.9);
    assert_eq!(choose("percentile").unwrap().parameter, 99.999);
    for wrong in ["percentil", "percentile:", "percentile:0", "percentile:101", "percentile:nan", "minmax:3", "rms:-1"]
    {
        let error = choose(wrong).unwrap_err().to_string();
        assert!(error.contains(&format!("`{wrong}`")), "{error}");
    }
}

#[test]
fn channels_are_observed_as_if_alone() {
    let (outer, channels, inner) = (3, 5, 7);
    let mut rng = StdRng::seed_from_u64(3);
    let values: Vec<f32> = (0..outer * channels * inner).map(|_| bell(&mut rng)).collect();
    for (shape, axis) in [(vec![outer, channels, inner], 1), (vec![outer, channels, inner, 1], 1)] {
        let mut observed = Observed::channels(&shape, axis, true).unwrap();
        observed.observe("x", &values).unwrap();
        for (c, statistics) in observed.each().iter().enumerate() {
            let own = (0..outer).flat_map(|o| (0..inner).map(move |i| (o, i)));
            let own: Vec<f32> = own.map(|(o, i)| values[(o * channels + c) * inner + i]).collect();
            assert_eq!(*statistics, seen([&own]), "channel {c}");
        }
        let mut all = Observed::tensor(true);
        all.observe("x", &values).unwrap();
        assert_eq!(observed.whole().histogram(), all.each()[0].histogram());
        assert_eq!(observed.whole().extremes(), all.each()[0].extremes());
        let mut twice = observed.clone();
        twice.merge("x", &observed).unwrap();
        assert_eq!((twice.means(), twice.mean_squares()), (observed.means(), observed.mean_squares()));
        assert_eq!(twice.ranges(), observed.ranges());
        assert!(observed.merge("x", &all).unwrap_err().to_string().contains("5"));
    }
    // Along the last axis, without histograms, and with a value that isn't finite in the second batch.
    let mut observed = Observed::channels(&[21, 5], 1, false).unwrap();
    let mut alone = vec![Statistics::new(false); 5];
    let mut batch = values.clone();
    for bad in [None, Some(f32::NAN), Some(f32::INFINITY), None] {
        batch[12] = bad.unwrap_or(0.5);
        observed.observe("x", &batch).unwrap();
        for (c, own) in alone.iter_mut().enumerate() {
            own.observe(&batch.iter().skip(c).step_by(5).copied().collect::<Vec<f32>>());
        }
    }
    assert_eq!((alone[2].nans(), alone[2].infinities(), alone[2].count()), (1, 1, 4 * 21 - 2));
    for (found, alone) in observed.each().iter().zip(&alone) {
        assert_same(found, alone, "columns");
    }
    assert!(Observed::channels(&[2, 3], 2, false).is_err());
    let mut observed = Observed::channels(&[2, 3], 1, false).unwrap();
    assert!(observed.observe("x", &[1.0; 4]).unwrap_err().to_string().contains("4 values"));
    observed.observe("x", &[]).unwrap();
}

#[test]
fn percentiles_are_within_a_bin_of_the_sorted_values() {
    for (what, batches) in samples() {
        let statistics = seen(&batches);
        let width = statistics.histogram().unwrap().width() as f32;
        let mut sorted = batches.concat();
        sorted.sort_by(f32::total_cmp);
        for percent in [50.0, 90.0, 99.0, 99.9, 100.0] {
            let choice = choose(&format!("percentile:{percent}")).unwrap();
            let range = choice.range("x", &statistics, IntGrid::asymmetric(IntType::U8)).unwrap();
            let cut = (0.5 * (1.0 - percent / 100.0) * sorted.len() as f64) as usize;
            // The share may end between two values, which may lie anywhere in neighbouring places of the order.
            let hi = [sorted[sorted.len() - 1 - cut].max(0.0), sorted[sorted.len().saturating_sub(cut + 2)].max(0.0)];
            let lo = [sorted[cut].min(0.0), sorted[(cut + 1).min(sorted.len() - 1)].min(0.0)];
            let between = |x: f32, [a, b]: [f32; 2]| x >= a.min(b) - width && x <= a.max(b) + width;
            assert!(between(range.hi, hi) && between(range.lo, lo), "{what}, {percent}: {range:?}, {lo:?} {hi:?}");
        }
    }
}

#[test]
fn entropy_clips_a_spike_but_not_the_body() {
    let mut rng = StdRng::seed_from_u64(11);
    let mut values: Vec<f32> = (0..100_000).map(|_| bell(&mut rng)).collect();
    let grid = IntGrid::symmetric(IntType::S8);
    let threshold = |values: &Vec<f32>| choose("entropy").unwrap().range("x", &seen([values]), grid).unwrap().absmax();
    let body = threshold(&values);
    values.push(20.0);
    let clipped = threshold(&values);
    assert!((2.5..=6.0).contains(&body) && (2.5..8.0).contains(&clipped), "{body}, {clipped}");
}

/// The same search, written down plainly over magnitudes in even bins, without smoothing.
#[test]
fn entropy_finds_what_a_plain_search_finds() {
    // Every bin is occupied, so that smoothing changes nothing.
    let mut values = Vec::new();
    for bin in 0..1024usize {
        let count = 1 + (2000.0 * (-(bin as f64) / 90.0).exp()) as usize;
        values.extend(std::iter::repeat_n((bin as f32 + 0.5) / 1024.0, count));
    }
    let counts = |bin: usize| (1 + (2000.0 * (-(bin as f64) / 90.0).exp()) as u64) as f64;
    let all: f64 = (0..1024).map(counts).sum();
    let mut best = (f64::INFINITY, 0);
    for kept in 128..=1024 {
        let level = |bin: usize| (0..128).find(|l| (l + 1) * kept / 128 > bin).unwrap();
        let inside: f64 = (0..kept).map(counts).sum();
        let mut sums = [(0.0, 0.0); 128];
        for bin in 0..kept {
            let (sum, n) = &mut sums[level(bin)];
            (*sum, *n) = (*sum + counts(bin), *n + 1.0);
        }
        let divergence: f64 = (0..kept)
            .map(|bin| {
                let p = (counts(bin) + if bin + 1 == kept { all - inside } else { 0.0 }) / all;
                let (sum, n) = sums[level(bin)];
                p * (p / (sum / n / inside)).ln()
            })
            .sum();
        if divergence <= best.0 {
            best = (divergence, kept);
        }
    }
    let range = choose("entropy").unwrap().range("x", &seen([&values]), IntGrid::symmetric(IntType::S8)).unwrap();
    // Bins of the observer are half or a quarter as wide as these before it joins them.
    assert!((range.hi * 1024.0 - best.1 as f32).abs() <= 8.0, "{} against {}", range.hi * 1024.0, best.1);
}

fn squared_error(values: &[f32], grid: IntGrid, params: QParams) -> f64 {
    values.iter().map(|&x| (x as f64 - params.dequantize(grid.quantize(params, x)) as f64).powi(2)).sum()
}

#[test]
fn mse_is_never_worse_than_the_whole_range() {
    for (what, batches) in samples().into_iter().filter(|(what, _)| !["tiny", "all of f32"].contains(what)) {
        let (statistics, values) = (seen(&batches), batches.concat());
        let width = statistics.histogram().unwrap().width();
        for grid in grids() {
            let error = |name: &str| {
                squared_error(&values, grid, choose(name).unwrap().params("x", &statistics, grid).unwrap())
            };
            let (best, plain) = (error("mse"), error("minmax"));
            // Judged by the middles of bins: each value may be half a bin off, both times.
            let slack = values.len() as f64 * width * width + 2.0 * width * (plain * values.len() as f64).sqrt();
            assert!(best <= plain + slack, "{what}, {grid:?}: {best} after {plain}, slack {slack}");
        }
    }
    let mut rng = StdRng::seed_from_u64(5);
    let mut spiked: Vec<f32> = (0..50_000).map(|_| bell(&mut rng)).collect();
    spiked.push(16.0);
    let grid = IntGrid::symmetric(IntType::S8);
    let error =
        |name: &str| squared_error(&spiked, grid, choose(name).unwrap().params("x", &seen([&spiked]), grid).unwrap());
    assert!(error("mse") < 0.8 * error("minmax"), "{} of {}", error("mse"), error("minmax"));
}

#[test]
fn zero_is_exact_and_the_range_is_held() {
    let ranges = [
        (0.0, 0.0),
        (-1.0, 1.0),
        (0.0, 6.0),
        (-0.1, 6.0),
        (-6.0, 0.0),
        (2.0, 3.0),
        (-3.0, -2.0),
        (-1e-3, 1e3),
        (0.0, 1e-37),
        (0.0, 1e-44),
        (0.5 * f32::MIN, 0.5 * f32::MAX),
        (0.0, 0.5 * f32::MAX),
        (-17.3, 0.4),
    ];
    for grid in grids() {
        let (low, high) = grid.limits();
        for (lo, hi) in ranges {
            let params = grid.params(Range { lo, hi });
            assert!(params.scale.is_normal() && params.scale > 0.0, "{grid:?} {lo} {hi}: {params:?}");
            assert!((low..=high).contains(&params.zero_point), "{grid:?} {lo} {hi}: {params:?}");
            assert_eq!(params.dequantize(grid.quantize(params, 0.0)), 0.0, "{grid:?} {lo} {hi}");
            for x in [lo, hi, 0.5 * lo, 0.3 * hi] {
                let back = params.dequantize(grid.quantize(params, x)) as f64;
                // Half a step, half a step more where the rounded zero point shifts an end, and f32's rounding.
                let bound = params.scale as f64 * (1.0 + 1e-6) + 1e-6 * x.abs() as f64;
                assert!((back - x as f64).abs() <= bound, "{grid:?} {lo}..{hi}: {x} -> {back}, {params:?}");
            }
        }
    }
}

/// What ONNX Runtime's quantizer gives: see scripts/goldens/onnx_params.py.
#[test]
fn params_are_those_of_onnx_runtime() {
    let cases: Vec<(IntType, bool, f32, f32, f32, i32)> =
        serde_json::from_str(include_str!("data/onnx_params.json")).unwrap();
    for (int, symmetric, lo, hi, scale, zero_point) in cases {
        let params = IntGrid { int, symmetric, unused: 0 }.params(Range { lo, hi });
        assert_eq!(params, QParams { scale, zero_point }, "{int:?}, symmetric {symmetric}, {lo}..{hi}");
    }
}
