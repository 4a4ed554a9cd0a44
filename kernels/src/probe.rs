//! Whether kernels compute what they should on this machine: products small enough for a check at any time, of numbers
//! that every kernel represents exactly.

use crate::cuda::{Cuda, Gpu};
use crate::{
    Activations, BLOCK, DenseSource, GEMMS, GemmKernel, Isa, KernelError, Levels, PackedWeight, Pool, Product, Scales,
    WeightKind, WeightSource, Zeros,
};
use half::{bf16, f16};

/// Output features of the probe: two panels and a part of one.
const N: usize = 40;
/// Input features of the probe: some blocks, the last one short.
const K: usize = 5 * BLOCK + 16;
/// Rows of activations where a kernel takes many: two full tiles of the largest kernels, and a tail.
const ROWS: usize = 35;
/// How far a product may be from double precision, relative to the largest one: sums in single precision.
pub const TOLERANCE: f64 = 1e-4;

/// What a kernel got wrong.
#[derive(Debug, Clone, PartialEq)]
pub struct Wrong {
    /// Its name.
    pub kernel: String,
    /// Largest difference from double precision over the largest product; not a number if a product isn't one.
    pub error: f64,
}

/// Multiplies with every kernel that this process may use, and returns how many there are and those that are wrong by
/// more than [`TOLERANCE`].
///
/// # Errors
/// A kernel refuses the product.
pub fn cpu(pool: &Pool) -> Result<(usize, Vec<Wrong>), KernelError> {
    let usable: Vec<Isa> = Isa::usable().collect();
    let kernels = || GEMMS.iter().filter(|kernel| usable.contains(&kernel.isa));
    let mut wrong = Vec::new();
    for kernel in kernels() {
        let error = product(kernel, pool)?;
        if error.is_nan() || error > TOLERANCE {
            wrong.push(Wrong { kernel: kernel.name.to_string(), error });
        }
    }
    Ok((kernels().count(), wrong))
}

/// Multiplies 4- and 8-bit weights on a GPU, for one row and for several; as [`cpu`].
///
/// # Errors
/// The GPU fails.
pub fn gpu<G: Gpu>(cuda: &Cuda<G>) -> Result<(usize, Vec<Wrong>), KernelError> {
    let mut wrong = Vec::new();
    let mut count = 0;
    for kind in [WeightKind::W4Lin, WeightKind::W4Tab, WeightKind::W8] {
        let weight = cuda.weight(&weight(kind, N, K)?)?;
        for rows in [1, ROWS, 2 * ROWS] {
            let x = cuda.rows(rows, K)?;
            let mut out = cuda.rows(rows, N)?;
            cuda.write_rows(&x, &activations(rows))?;
            cuda.prepare(&x, rows)?;
            cuda.multiply(&x, rows, &weight, None, false, &mut out)?;
            let error = largest_error(kind, rows, &cuda.read_rows(&out, 0..rows)?);
            count += 1;
            if error.is_nan() || error > TOLERANCE {
                wrong.push(Wrong { kernel: format!("{} times {rows} rows", kind.name()), error });
            }
        }
    }
    Ok((count, wrong))
}

fn product(kernel: &'static GemmKernel, pool: &Pool) -> Result<f64, KernelError> {
    let rows = if kernel.rows == 1 { 1 } else { ROWS };
    let weight = weight(kernel.weight, N, K)?;
    let mut x = Activations::with_capacity(rows, K);
    x.fill(rows, K, &activations(rows))?;
    let mut out = vec![f32::NAN; rows * N];
    kernel.multiply(pool, &mut x, Product { weight: &weight, bias: None, accumulate: false, out: &mut out })?;
    Ok(largest_error(kernel.weight, rows, &out))
}

/// Integers, one of them 127 in every block: int8 codes of them have scale 1, bfloat16 and halves hold them exactly.
fn activations(rows: usize) -> Vec<f32> {
    let value = |i: usize| if i % K % BLOCK == 3 { 127.0 } else { (spread(i) as f32) - 128.0 };
    (0..rows * K).map(|i| f32::max(value(i), -127.0)).collect()
}

fn largest_error(kind: WeightKind, rows: usize, found: &[f32]) -> f64 {
    let x = activations(rows);
    let (mut error, mut largest) = (0f64, 0f64);
    for row in 0..rows {
        for n in 0..N {
            let wanted: f64 = (0..K).map(|k| f64::from(x[row * K + k]) * value(kind, n, k, K)).sum();
            let off = (f64::from(found[row * N + n]) - wanted).abs();
            if off.is_nan() {
                return f64::NAN;
            }
            (error, largest) = (error.max(off), largest.max(wanted.abs()));
        }
    }
    error / largest
}

/// A weight of this kind, (n, k), with numbers of no meaning in it; groups of 32 with scales that differ.
///
/// # Errors
/// It can't be packed.
pub fn weight(kind: WeightKind, n: usize, k: usize) -> Result<PackedWeight, KernelError> {
    let Some((levels, zero)) = levels(kind) else {
        let values: Vec<f32> = (0..n * k).map(dense).collect();
        return match kind {
            WeightKind::Bf16 => {
                let values: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
                PackedWeight::pack_dense(n, k, DenseSource::Bf16(&values))
            }
            WeightKind::F16 => {
                let values: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
                PackedWeight::pack_dense(n, k, DenseSource::F16(&values))
            }
            _ => PackedWeight::pack_dense(n, k, DenseSource::F32(&values)),
        };
    };
    let codes: Vec<u8> = (0..n * k).map(|i| code(&levels, i)).collect();
    let groups = k.div_ceil(BLOCK);
    let scales: Vec<f16> = (0..n * groups).map(scale).collect();
    let (scales, zeros) = (Scales::F16(&scales), Zeros::Const(zero));
    PackedWeight::pack(&WeightSource { n, k, group: BLOCK, levels, codes: &codes, scales, zeros, outliers: None })
}

/// What that weight has in row `n` and column `k` of `columns`.
fn value(kind: WeightKind, n: usize, k: usize, columns: usize) -> f64 {
    let i = n * columns + k;
    match levels(kind) {
        None => f64::from(dense(i)),
        Some((levels, zero)) => {
            let group = n * columns.div_ceil(BLOCK) + k / BLOCK;
            (f64::from(levels.value(code(&levels, i))) - f64::from(zero)) * f64::from(scale(group).to_f32())
        }
    }
}

/// What codes of this kind mean, and their zero point; none for floats.
fn levels(kind: WeightKind) -> Option<(Levels, i32)> {
    let ascending: [i8; 16] = std::array::from_fn(|i| (i as i16 * 16 - 120) as i8);
    match kind {
        WeightKind::W4Lin => Some((Levels::Linear4, 8)),
        WeightKind::W4Tab => Some((Levels::Table4(ascending), 0)),
        WeightKind::W4Flt => Some((Levels::FloatTable4(ascending.map(|level| f32::from(level) / 128.0)), 0)),
        WeightKind::W8 => Some((Levels::Linear8, 128)),
        WeightKind::F32 | WeightKind::Bf16 | WeightKind::F16 => None,
    }
}

fn code(levels: &Levels, i: usize) -> u8 {
    spread(i) as u8 & if levels.bits() == 4 { 15 } else { 255 }
}

/// Powers of two, so that a product of scale and level is exact everywhere.
fn scale(group: usize) -> f16 {
    f16::from_f32(2f32.powi(-4 - (group % 3) as i32))
}

/// A multiple of 1/128 between -1 and 1, which every float format holds.
fn dense(i: usize) -> f32 {
    spread(i) as f32 / 128.0 - 1.0
}

/// The number's bits, mixed to 0..=255.
fn spread(i: usize) -> u32 {
    (i as u32).wrapping_mul(2_654_435_761) >> 24
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_is_right_here() {
        let (count, wrong) = cpu(&Pool::new(2)).unwrap();
        assert!(count > 10 && wrong.is_empty(), "{count} kernels, wrong: {wrong:?}");
    }

    #[test]
    fn a_wrong_product_is_seen() {
        let weight = weight(WeightKind::W4Tab, N, K).unwrap();
        let mut x = Activations::with_capacity(1, K);
        x.fill(1, K, &activations(1)).unwrap();
        let mut out = vec![0f32; N];
        let products = &mut [Product { weight: &weight, bias: None, accumulate: false, out: &mut out }];
        crate::multiply(&Pool::new(1), &mut x, products, crate::ActKind::F32).unwrap();
        assert!(largest_error(WeightKind::W4Tab, 1, &out) < TOLERANCE);
        out[N - 1] *= 1.01;
        assert!(largest_error(WeightKind::W4Tab, 1, &out) > TOLERANCE);
        out[0] = f32::NAN;
        assert!(largest_error(WeightKind::W4Tab, 1, &out).is_nan());
    }
}
