//! What the benches share: weights of every kind, and activations.
//!
//! ```sh
//! cargo bench -p nibble-benches                      # every kernel this CPU has
//! cargo bench -p nibble-benches -- 'rows.*w4lin_i8'  # some of them
//! ```
//! Figures of whole models are `nibble bench`'s; this machine's limits are printed by `nibble kernels --time`.

use half::{bf16, f16};
use nibble_kernels::weight::WeightKind;
use nibble_kernels::{DenseSource, KernelError, Levels, PackedWeight, Scales, WeightSource, Zeros};

/// Columns that share a scale.
pub const GROUP: usize = 32;

/// An (n, k) weight of this kind whose values look random, with double-quantized scales where it has any: every group
/// has a byte, every row a float.
pub fn weight(kind: WeightKind, n: usize, k: usize) -> Result<PackedWeight, KernelError> {
    let spread = |i: usize| (i as u32).wrapping_mul(2_654_435_761) >> 24;
    let dense = |i: usize| spread(i) as f32 / 128.0 - 1.0;
    let groups = k.div_ceil(GROUP);
    let scales: Vec<i16> = (0..n * groups).map(|i| 1 + (spread(i) & 31) as i16).collect();
    let second = vec![0.001; n];
    let coded = |levels: Levels, zero: i32| {
        let mask = if levels.bits() == 4 { 15 } else { 255 };
        let codes: Vec<u8> = (0..n * k).map(|i| spread(i) as u8 & mask).collect();
        let scales = Scales::Coded { codes: &scales, second: &second, span: groups };
        let zeros = Zeros::Const(zero);
        PackedWeight::pack(&WeightSource { n, k, group: GROUP, levels, codes: &codes, scales, zeros, outliers: None })
    };
    let table: [i8; 16] = [-32, -26, -21, -16, -12, -9, -6, -3, 0, 3, 6, 9, 13, 17, 22, 28];
    match kind {
        WeightKind::W4Lin => coded(Levels::Linear4, 8),
        WeightKind::W4Tab => coded(Levels::Table4(table), 0),
        WeightKind::W4Flt => coded(Levels::FloatTable4(table.map(|level| f32::from(level) / 127.0)), 0),
        WeightKind::W8 => coded(Levels::Linear8, 128),
        WeightKind::F32 => PackedWeight::pack_dense(n, k, DenseSource::F32(&(0..n * k).map(dense).collect::<Vec<_>>())),
        WeightKind::Bf16 => {
            let values: Vec<_> = (0..n * k).map(|i| bf16::from_f32(dense(i))).collect();
            PackedWeight::pack_dense(n, k, DenseSource::Bf16(&values))
        }
        WeightKind::F16 => {
            let values: Vec<_> = (0..n * k).map(|i| f16::from_f32(dense(i))).collect();
            PackedWeight::pack_dense(n, k, DenseSource::F16(&values))
        }
    }
}

/// (m, k) activations between -1 and 1.
pub fn activations(m: usize, k: usize) -> Vec<f32> {
    (0..m * k).map(|i| (i % 17) as f32 / 8.0 - 1.0).collect()
}
