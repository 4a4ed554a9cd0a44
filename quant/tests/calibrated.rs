//! Laws of what calibration keeps, its files, and the algorithms that use it.

use nibble_quant::algo::{AlgoInput, algorithm, learn_levels, weighted_error};
use nibble_quant::stats::{Factored, Input, Stats, Symmetric, Turn, gram_bytes};
use nibble_quant::{ALGORITHMS, Grid, OutlierSpec, PRESETS, QTensor, QuantSpec};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::path::Path;
use std::sync::Arc;

const K: usize = 160;
const ROWS: usize = 6;

/// Inputs whose columns go together, as activations do: few causes, and a column in 40 that is large.
fn activations(rows: usize, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    let causes = 24;
    let mixing: Vec<f32> = {
        let mut rng = StdRng::seed_from_u64(0);
        (0..causes * K).map(|_| rng.random::<f32>() - 0.5).collect()
    };
    let mut x = vec![0.0; rows * K];
    for row in x.chunks_mut(K) {
        let cause: Vec<f32> = (0..causes).map(|_| rng.random::<f32>() - 0.5).collect();
        for (col, value) in row.iter_mut().enumerate() {
            let shared: f32 = (0..causes).map(|c| cause[c] * mixing[c * K + col]).sum();
            let own = 0.3 * (rng.random::<f32>() - 0.5);
            *value = (shared + own) * if col % 40 == 7 { 12.0 } else { 1.0 };
        }
    }
    x
}

fn observed(rows: usize) -> Input {
    let mut input = Input::new(K, true);
    input.observe("x", &activations(rows, 1)).unwrap();
    input
}

fn weights() -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(2);
    (0..ROWS * K).map(|_| 0.05 * ((0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0)).collect()
}

fn run(name: &str, weight: &[f32], spec: &QuantSpec, calibrated: Option<&Input>) -> QTensor {
    let importance = calibrated.map(Input::mean_squares);
    let shape = [weight.len() / K, K];
    let input = AlgoInput { name: "w", weight, shape, spec, importance: importance.as_deref(), calibrated, seed: 0 };
    let tensor = (algorithm(name).unwrap().run)(&input).unwrap();
    tensor.validate("w").unwrap();
    tensor
}

/// Mean squared error of each output over the calibration inputs, in f64.
fn output_errors(weight: &[f32], tensor: &QTensor, gram: &Input) -> Vec<f64> {
    let back = tensor.dequantize();
    let h = gram.gram().unwrap();
    let row = |(w, q): (&[f32], &[f32])| {
        let d: Vec<f64> = w.iter().zip(q).map(|(w, q)| *w as f64 - *q as f64).collect();
        let pairs = (0..K).flat_map(|a| (0..K).map(move |b| (a, b)));
        pairs.map(|(a, b)| d[a] * h.get(a, b) as f64 * d[b]).sum::<f64>() / gram.rows() as f64
    };
    weight.chunks(K).zip(back.chunks(K)).map(row).collect()
}

#[test]
fn gptq_is_never_worse_than_the_search_that_it_starts_from() {
    let (weight, input) = (weights(), observed(2000));
    for preset in PRESETS {
        let spec = &preset.scheme.weight;
        let search = output_errors(&weight, &run("search", &weight, spec, Some(&input)), &input);
        let gptq = output_errors(&weight, &run("gptq", &weight, spec, Some(&input)), &input);
        // The choice is made in f32: sums of 160 terms, factors of the same.
        for (row, (gptq, search)) in gptq.iter().zip(&search).enumerate() {
            assert!(*gptq <= search * 1.001 + 1e-12, "{}, row {row}: {gptq} > {search}", preset.name);
        }
        let (gptq, search) = (gptq.iter().sum::<f64>(), search.iter().sum::<f64>());
        if spec.bits() <= 4 && spec.outliers == OutlierSpec::None {
            assert!(gptq < 0.8 * search, "{}: {gptq} of {search}", preset.name);
        }
    }
}

/// The error that GPTQ and descent lower, damped as they damp it, for each row in f64.
fn damped_errors(weight: &[f32], tensor: &QTensor, input: &Input) -> Vec<f64> {
    let moments = input.mean_squares();
    let damping = 0.2 * moments.iter().map(|m| *m as f64).sum::<f64>() / K as f64;
    let back = tensor.dequantize();
    let squares = weight.chunks(K).zip(back.chunks(K));
    let squares = squares.map(|(w, q)| w.iter().zip(q).map(|(w, q)| (*w as f64 - *q as f64).powi(2)).sum::<f64>());
    output_errors(weight, tensor, input)
        .into_iter()
        .zip(squares)
        .map(|(error, square)| error + damping * square)
        .collect()
}

#[test]
fn descent_is_never_worse_than_the_gptq_that_it_starts_from() {
    let (weight, input) = (weights(), observed(2000));
    for preset in PRESETS {
        let spec = &preset.scheme.weight;
        let gptq = damped_errors(&weight, &run("gptq", &weight, spec, Some(&input)), &input);
        let descent = damped_errors(&weight, &run("descent", &weight, spec, Some(&input)), &input);
        for (row, (descent, gptq)) in descent.iter().zip(&gptq).enumerate() {
            assert!(*descent <= gptq * 1.001 + 1e-12, "{}, row {row}: {descent} > {gptq}", preset.name);
        }
        let (descent, gptq) = (descent.iter().sum::<f64>(), gptq.iter().sum::<f64>());
        if spec.bits() <= 4 && spec.outliers == OutlierSpec::None {
            assert!(descent < 0.98 * gptq, "{}: {descent} of {gptq}", preset.name);
        }
    }
}

#[test]
fn an_input_says_how_its_matrix_was_factored() {
    let (weight, input) = (weights(), observed(300));
    let spec = &nibble_quant::presets::by_name("default").unwrap().scheme.weight;
    assert_eq!(input.factored(), None);
    run("gptq", &weight, spec, Some(&input));
    assert_eq!(input.factored(), Some(Factored::Damped(0.2)));
    let mut silent = Input::new(K, true);
    silent.observe("x", &vec![0.0; 10 * K]).unwrap();
    run("gptq", &weight, spec, Some(&silent));
    assert_eq!(silent.factored(), Some(Factored::Refused));
}

#[test]
fn gptq_pays_on_inputs_that_it_has_not_seen() {
    let (weight, input) = (weights(), observed(4000));
    let mut unseen = Input::new(K, true);
    unseen.observe("x", &activations(1000, 99)).unwrap();
    for name in ["int4-nl-g32-dq", "int4-g32", "int3-g32-dq", "int4-g64-asym-dq", "nf4-dq"] {
        let spec = &nibble_quant::presets::by_name(name).unwrap().scheme.weight;
        let error = |algorithm| -> f64 {
            output_errors(&weight, &run(algorithm, &weight, spec, Some(&input)), &unseen).iter().sum()
        };
        assert!(error("gptq") < error("search"), "{name}: {} of {}", error("gptq"), error("search"));
    }
}

#[test]
fn gptq_changes_codes_and_nothing_that_they_are_read_by() {
    let (weight, input) = (weights(), observed(500));
    for preset in PRESETS {
        let spec = &preset.scheme.weight;
        let (search, gptq) = (run("search", &weight, spec, Some(&input)), run("gptq", &weight, spec, Some(&input)));
        assert!(search.scales == gptq.scales && search.zeros == gptq.zeros, "{}", preset.name);
        assert!(search.outliers.cols == gptq.outliers.cols, "{}", preset.name);
        assert!(spec.bits() > 4 || search.codes != gptq.codes, "{}", preset.name);
    }
}

#[test]
fn without_a_gram_matrix_algorithms_that_need_one_are_the_search() {
    let weight = weights();
    let spec = &nibble_quant::presets::by_name("default").unwrap().scheme.weight;
    let mut moments = Input::new(K, false);
    moments.observe("x", &activations(50, 1)).unwrap();
    // An input that was always zero has no factor; any codes are right.
    let mut silent = Input::new(K, true);
    silent.observe("x", &vec![0.0; 10 * K]).unwrap();
    let needing: Vec<&str> = ALGORITHMS.iter().filter(|a| a.gram).map(|a| a.name).collect();
    assert_eq!(needing, ["gptq", "descent", "yaqa", "autoround"]);
    for name in needing {
        for input in [None, Some(&moments), Some(&silent)] {
            assert!(run(name, &weight, spec, input) == run("search", &weight, spec, input), "{name}");
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    let weight: Vec<f32> = (0..9).flat_map(|_| weights()).collect();
    let spec = &nibble_quant::presets::by_name("default").unwrap().scheme.weight;
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let input = observed(700);
            let made = ["gptq", "descent", "yaqa"].map(|name| run(name, &weight, spec, Some(&input)));
            (made, input.gram().unwrap().values().collect::<Vec<f32>>())
        })
    };
    let one = with(1);
    for threads in [2, 7] {
        assert!(one == with(threads), "{threads} threads");
    }
}

#[test]
fn what_is_centred_is_what_deviations_give() {
    let x = activations(400, 6);
    // Rows of zeros count, and have no part in the mean.
    let (rows, zeros) = (400.0, vec![0f32; 100 * K]);
    let mean: Vec<f64> =
        (0..K).map(|j| x.iter().skip(j).step_by(K).map(|&v| f64::from(v)).sum::<f64>() / rows).collect();
    let deviations: Vec<f32> = x.iter().enumerate().map(|(i, v)| (f64::from(*v) - mean[i % K]) as f32).collect();
    let of = |x: &[f32]| {
        let mut input = Input::new(K, true);
        input.observe("x", x).unwrap();
        input.observe("x", &zeros).unwrap();
        input
    };
    let (mut centred, wanted, raw) = (of(&x), of(&deviations), of(&x));
    centred.centre(&mean, rows);
    assert_eq!(centred.rows(), 500);
    for a in 0..K {
        let (one, two) = (centred.mean_squares()[a], wanted.mean_squares()[a]);
        assert!((one - two).abs() <= 1e-5 * raw.mean_squares()[a], "{a}: {one}, {two}");
        for b in 0..K {
            let (one, two) = (centred.gram().unwrap().get(a, b), wanted.gram().unwrap().get(a, b));
            let size = (raw.mean_squares()[a] * raw.mean_squares()[b]).sqrt() * 500.0;
            assert!((one - two).abs() <= 1e-5 * size, "{a}, {b}: {one}, {two}");
        }
    }
}

#[test]
fn merged_halves_are_the_whole() {
    let x = activations(600, 5);
    let of = |x: &[f32]| {
        let mut input = Input::new(K, true);
        input.observe("x", x).unwrap();
        input
    };
    let (whole, mut halves) = (of(&x), of(&x[..200 * K]));
    halves.merge("x", &of(&x[200 * K..])).unwrap();
    assert_eq!((whole.rows(), whole.absmax()), (halves.rows(), halves.absmax()));
    for (a, b) in whole.mean_squares().iter().zip(halves.mean_squares()) {
        assert!((a - b).abs() <= 2.0 * f32::EPSILON * a);
    }
    for a in 0..K {
        for b in 0..K {
            let (one, two) = (whole.gram().unwrap().get(a, b), halves.gram().unwrap().get(a, b));
            let size = (whole.mean_squares()[a] * whole.mean_squares()[b]).sqrt() * 600.0;
            assert!((one - two).abs() <= 600.0 * f32::EPSILON * size, "{a}, {b}: {one}, {two}");
        }
    }
    let error = halves.merge("layer", &Input::new(K + 1, true)).unwrap_err().to_string();
    assert!(error.contains("`layer`") && error.contains("161"), "{error}");
}

#[test]
fn activations_that_are_not_finite_are_refused_by_name() {
    let mut input = Input::new(4, false);
    for bad in [f32::NAN, f32::INFINITY] {
        let error = input.observe("blocks.3", &[1.0, 2.0, bad, 4.0]).unwrap_err().to_string();
        assert!(error.contains("`blocks.3`") && error.contains("column 2"), "{error}");
    }
    assert!(input.observe("x", &[1.0; 6]).is_err());
    assert_eq!(input.rows(), 0);
}

fn stats() -> Stats {
    let shared = Arc::new(observed(300));
    let mut moments = Input::new(48, false);
    moments.observe("x", &activations(30, 3)[..48 * 30]).unwrap();
    let mut stats = Stats { made_from: "a text".into(), ..Stats::default() };
    for name in ["q", "k", "v"] {
        stats.inputs.insert(format!("model.layers.0.self_attn.{name}_proj.weight"), Arc::clone(&shared));
    }
    stats.inputs.insert("model.layers.0.mlp.down_proj.weight".into(), Arc::new(moments));
    stats
}

#[test]
fn a_file_gives_back_what_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.stats");
    let written = stats();
    written.write(&path).unwrap();
    let read = Stats::read(&path).unwrap();
    assert_eq!(read.made_from, "a text");
    assert_eq!(read.sites().len(), 2, "q, k and v share an input again");
    for (name, input) in &written.inputs {
        let back = &read.inputs[name];
        assert_eq!((back.rows(), back.mean_squares()), (input.rows(), input.mean_squares()), "{name}");
        assert_eq!((back.absmax(), back.gram()), (input.absmax(), input.gram()), "{name}");
    }
    let smallest = std::fs::metadata(&path).unwrap().len();
    assert!(smallest > gram_bytes(K) && smallest < 2 * gram_bytes(K), "one Gram matrix for three tensors");
}

#[test]
fn statistics_of_a_turned_model_say_so_and_serve_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let turn = |rotation: &str, seed: u64| Turn { rotation: rotation.into(), seed };
    let written = Stats { turned: Some(turn("hadamard", 7)), ..stats() };
    let path = folder.path().join("model.stats");
    written.write(&path).unwrap();
    let read = Stats::read(&path).unwrap();
    assert_eq!(read.turned, written.turned);
    read.check_turn(Some(&turn("hadamard", 7))).unwrap();
    for other in [None, Some(&turn("hadamard", 8)), Some(&turn("cayley", 7))] {
        let why = read.check_turn(other).unwrap_err().to_string();
        assert!(why.contains("turned by `hadamard` with seed 7"), "{why}");
    }
    stats().check_turn(None).unwrap();
    stats().check_turn(Some(&turn("none", 0))).unwrap_err();
    let imatrix = folder.path().join("imatrix.gguf");
    let why = written.write(&imatrix).unwrap_err().to_string();
    assert!(why.contains("imatrix.gguf") && why.contains("can't say how its model was turned"), "{why}");
    assert!(!imatrix.exists());
}

#[test]
fn an_imatrix_gives_back_second_moments_under_the_same_names() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("imatrix.gguf");
    let written = stats();
    written.write(&path).unwrap();
    let read = Stats::read(&path).unwrap();
    assert_eq!(read.inputs.keys().collect::<Vec<_>>(), written.inputs.keys().collect::<Vec<_>>());
    for (name, input) in &written.inputs {
        let back = &read.inputs[name];
        assert_eq!((back.rows(), back.gram()), (input.rows(), None), "{name}");
        for (a, b) in input.mean_squares().iter().zip(back.mean_squares()) {
            assert!((a - b).abs() <= 2.0 * f32::EPSILON * a, "{name}: {a}, {b}");
        }
    }
}

#[test]
fn damaged_files_are_errors_that_name_them() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["model.stats", "imatrix.gguf"] {
        let path = folder.path().join(name);
        stats().write(&path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let read = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            Stats::read(&path)
        };
        // The last bytes of an imatrix are padding, which nobody misses.
        for cut in [0, 1, 7, 8, 100, bytes.len() / 2, bytes.len() - 33] {
            let error = read(&bytes[..cut]).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
        for at in (0..bytes.len().min(2000)).step_by(29) {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x41;
            // Any answer is fine but a panic.
            let _ = read(&flipped);
        }
    }
    // Widths that the file's bytes can't hold.
    let path = folder.path().join("both.stats");
    let mut both = Stats::default();
    both.inputs.insert("w".into(), Arc::new(observed_on_both_sides(20, ROWS)));
    both.write(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&bytes[8..8 + length]).unwrap().trim_end();
    let from = format!("outputs\\\":{ROWS}");
    assert!(header.contains(&from), "{header}");
    for outputs in ["18446744073709551615", "4294967296", "99999"] {
        let header = header.replace(&from, &format!("outputs\\\":{outputs}"));
        let damaged = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes[8 + length..]].concat();
        std::fs::write(&path, damaged).unwrap();
        let error = Stats::read(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("a width of {outputs} takes more")), "{error}");
    }
    assert!(Stats::read(Path::new("/nowhere/at.all")).unwrap_err().to_string().contains("/nowhere/at.all"));
    let plain = folder.path().join("model.safetensors");
    std::fs::write(&plain, b"\x02\0\0\0\0\0\0\0{}").unwrap();
    assert!(Stats::read(&plain).unwrap_err().to_string().contains("no `nibble.stats`"));
}

/// The error that `yaqa` lowers, tr(G D H D^T), damped as it is damped there.
fn error_on_both_sides(weight: &[f32], tensor: &QTensor, input: &Input) -> f64 {
    let (h, g) = (input.gram().unwrap(), input.outputs().unwrap());
    let damped = |m: &Symmetric| {
        let width = m.width();
        let mean = (0..width).map(|i| m.get(i, i) as f64).sum::<f64>() / width as f64;
        let value = |a: usize, b: usize| m.get(a, b) as f64 + if a == b { 0.2 * mean } else { 0.0 };
        (0..width * width).map(|i| value(i / width, i % width) / mean).collect::<Vec<f64>>()
    };
    let (h, g) = (damped(h), damped(g));
    let back = tensor.dequantize();
    let d: Vec<f64> = weight.iter().zip(&back).map(|(w, q)| *w as f64 - *q as f64).collect();
    let n = weight.len() / K;
    let mut total = 0.0;
    for i in 0..n {
        let tied: Vec<f64> = (0..K).map(|j| (0..n).map(|r| g[i * n + r] * d[r * K + j]).sum()).collect();
        for a in 0..K {
            total += d[i * K + a] * (0..K).map(|b| h[a * K + b] * tied[b]).sum::<f64>();
        }
    }
    total
}

/// Inputs, and gradients by outputs that go together in twos.
fn observed_on_both_sides(rows: usize, outputs: usize) -> Input {
    let mut rng = StdRng::seed_from_u64(8);
    let mut g = vec![0.0; rows * outputs];
    for row in g.chunks_mut(outputs) {
        for pair in row.chunks_mut(2) {
            let shared = rng.random::<f32>() - 0.5;
            pair.iter_mut().for_each(|g| *g = shared + 0.4 * (rng.random::<f32>() - 0.5));
        }
    }
    let mut input = Input::both(K, outputs);
    input.observe_gradients("w", &activations(rows, 1), &g).unwrap();
    input
}

#[test]
fn gradients_by_outputs_let_rows_make_up_for_each_other() {
    let (weight, input) = (weights(), observed_on_both_sides(2000, ROWS));
    for preset in PRESETS {
        let spec = &preset.scheme.weight;
        let error = |name: &str| error_on_both_sides(&weight, &run(name, &weight, spec, Some(&input)), &input);
        let (descent, both) = (error("descent"), error("yaqa"));
        assert!(both <= descent * 1.05 + 1e-12, "{}: {both} > {descent}", preset.name);
        if spec.bits() <= 4 && spec.outliers == OutlierSpec::None {
            assert!(both < 0.9 * descent, "{}: {both} of {descent}", preset.name);
        }
    }
}

#[test]
fn gradients_survive_a_file_and_wrong_ones_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.stats");
    let input = Arc::new(observed_on_both_sides(50, ROWS));
    let written = Stats { inputs: [("w".to_owned(), Arc::clone(&input))].into(), ..Stats::default() };
    written.write(&path).unwrap();
    let read = Stats::read(&path).unwrap();
    assert_eq!((read.inputs["w"].gram(), read.inputs["w"].outputs()), (input.gram(), input.outputs()));
    let mut input = Input::both(K, ROWS);
    let (x, g) = (activations(3, 1), vec![1.0; 3 * ROWS]);
    let nan = vec![f32::NAN; 3 * ROWS];
    let cases: [(&[f32], &[f32]); 5] = [(&x[1..], &g), (&x, &g[1..]), (&x[..K], &g), (&[], &[]), (&x, &nan)];
    for (x, g) in cases {
        assert!(input.observe_gradients("w", x, g).unwrap_err().to_string().contains("`w`"));
    }
    assert_eq!(input.rows(), 0);
}

#[test]
fn learned_levels_err_less_than_those_they_start_from() {
    // Values whose groups are mostly small ones: what a table for normal values has too few levels for.
    let mut rng = StdRng::seed_from_u64(11);
    let weight: Vec<f32> = (0..64 * K).map(|_| (rng.random::<f32>() - 0.5).powi(5)).collect();
    let importance = observed(500).mean_squares();
    for name in ["int3-nl-g32-dq", "int4-nl-g32-dq", "int4-iq4nl-g32-dq", "int4-iq4nl-g32", "int4-nl-g64-dq"] {
        let spec = &nibble_quant::presets::by_name(name).unwrap().scheme.weight;
        let shape = [weight.len() / K, K];
        let input = AlgoInput {
            name: "w",
            weight: &weight,
            shape,
            spec,
            importance: Some(&importance),
            calibrated: None,
            seed: 0,
        };
        let table = learn_levels(&input).unwrap();
        let learned = QuantSpec { grid: Grid::Table(table), ..spec.clone() };
        assert_eq!(learned.bits(), spec.bits(), "{name}");
        learned.validate().unwrap();
        let error = |spec: &QuantSpec| {
            let input = AlgoInput { spec, ..input };
            weighted_error(&input, &(algorithm("search").unwrap().run)(&input).unwrap().dequantize())
        };
        assert!(error(&learned) < 0.95 * error(spec), "{name}: {} of {}", error(&learned), error(spec));
    }
    let linear = &nibble_quant::presets::by_name("int4-g32").unwrap().scheme.weight;
    let refused = AlgoInput {
        name: "w",
        weight: &weight,
        shape: [64, K],
        spec: linear,
        importance: None,
        calibrated: None,
        seed: 0,
    };
    assert!(learn_levels(&refused).unwrap_err().to_string().contains("wanted a table of integers"));
}
