//! Algorithms and schemes on real weights: all-MiniLM-L6-v2's, which nobody has put on a grid.

use crate::assets::asset;
use nibble_quant::algo::{AlgoInput, algorithm, weighted_error};
use nibble_quant::format;
use nibble_quant::presets::{self, PRESETS};
use nibble_quant::{ALGORITHMS, QuantSpec};

/// A few matrices of every kind, cut to their first rows.
const TENSORS: &[&str] = &[
    "encoder.layer.0.attention.self.query.weight",
    "encoder.layer.2.attention.output.dense.weight",
    "encoder.layer.3.intermediate.dense.weight",
    "encoder.layer.5.output.dense.weight",
];
const ROWS: usize = 48;

struct Matrix {
    name: &'static str,
    values: Vec<f32>,
    k: usize,
}

fn matrices() -> Option<Vec<Matrix>> {
    let folder = asset("minilm", "assets/minilm/model.safetensors")?;
    let source = format::open(&folder).unwrap();
    let one = |name: &&'static str| {
        let full = source.infos().iter().find(|info| info.name.ends_with(name)).unwrap().name.clone();
        let k = source.info(&full).unwrap().rows_cols().1;
        let mut values = Vec::new();
        source.read_rows_f32(&full, 0..ROWS, &mut values).unwrap();
        Matrix { name, values, k }
    };
    Some(TENSORS.iter().map(one).collect())
}

/// The weighted error of an algorithm, and with the square of every value itself for comparison.
fn error(matrix: &Matrix, spec: &QuantSpec, name: &str, importance: Option<&[f32]>) -> f64 {
    let shape = [ROWS, matrix.k];
    let input =
        AlgoInput { name: matrix.name, weight: &matrix.values, shape, spec, importance, calibrated: None, seed: 0 };
    let tensor = (algorithm(name).unwrap().run)(&input).unwrap();
    weighted_error(&input, &tensor.dequantize())
}

#[test]
fn no_algorithm_is_worse_than_rounding_at_the_same_bits() {
    let Some(matrices) = matrices() else { return };
    for matrix in &matrices {
        let moments: Vec<f32> =
            (0..matrix.k).map(|j| if j % 37 == 5 { 40.0 } else { 1.0 / (1 + j % 5) as f32 }).collect();
        for importance in [None, Some(moments.as_slice())] {
            for preset in PRESETS {
                let spec = &preset.scheme.weight;
                let rtn = error(matrix, spec, "rtn", importance);
                for algorithm in ALGORITHMS {
                    let error = error(matrix, spec, algorithm.name, importance);
                    assert!(
                        error <= rtn * (1.0 + 1e-6),
                        "{}, {}, {}: {error} > {rtn}",
                        matrix.name,
                        preset.name,
                        algorithm.name
                    );
                }
            }
        }
    }
}

#[test]
fn more_bits_are_never_worse() {
    let ladders: [&[&str]; 4] = [
        &["int2-g32-dq", "int3-g32-dq", "int4-g32-dq", "int5-g32-dq", "int6-g32-dq", "int8-g32-dq"],
        &["int2-g32-dq", "int3-nl-g32-dq", "int4-nl-g32-dq", "int5-g32-dq"],
        &["int4-channel", "int4-g128", "int4-g64", "int4-g32", "int8-channel", "int8-g32"],
        &["int4-tensor", "int4-channel", "int8-tensor", "int8-channel", "int8-g128", "int8-g32"],
    ];
    let Some(matrices) = matrices() else { return };
    for matrix in &matrices {
        for ladder in ladders {
            let schemes = ladder.iter().map(|name| (*name, &presets::by_name(name).unwrap().scheme.weight));
            let steps: Vec<_> = schemes
                .map(|(name, spec)| (name, spec.bytes([ROWS, matrix.k]), error(matrix, spec, "search", None)))
                .collect();
            for pair in steps.windows(2) {
                let ((a, small, more), (b, large, less)) = (pair[0], pair[1]);
                assert!(small < large, "{a} takes {small} bytes, {b} {large}");
                assert!(less < more, "{}: {b} errs by {less}, {a} by {more}", matrix.name);
            }
        }
    }
}
