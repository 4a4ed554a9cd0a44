//! Products on a GPU, beside what its memory copies: microseconds a product, and the share of the copy's bandwidth that
//! reading the weight takes.
//!
//! ```sh
//! cargo bench -p nibble-benches --features cuda --bench cuda [-- FILE.json]
//! ```
//! Every figure is the median of 15 replays of a graph of products, one after another, over different weights of more than
//! 150 MB together: neither a cache nor the host's pace is what is measured. Activations are ready in half precision.

use half::f16;
use nibble_kernels::cuda::Cuda;
use nibble_kernels::cuda::driver::Driver;
use nibble_kernels::{KernelError, Levels, PackedWeight, Scales, WeightSource, Zeros};
use std::fmt::Write as _;

const SHAPES: [(usize, usize); 6] =
    [(4096, 4096), (14336, 4096), (4096, 14336), (2048, 2048), (8192, 2048), (2048, 8192)];
const ROWS: [usize; 7] = [1, 8, 16, 32, 64, 128, 512];
/// The default's levels, and NF4's as halves hold them.
const NL: [i8; 16] = [-32, -25, -20, -16, -12, -9, -6, -3, 0, 3, 6, 9, 13, 17, 21, 27];
const NF4: [f32; 16] = [
    -1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
    0.723, 1.0,
];

/// How a weight is stored.
struct Kind {
    name: &'static str,
    levels: Levels,
    group: usize,
    zero: i32,
    /// Groups that share a second-level scale; 0: scales are halves.
    span: fn(usize) -> usize,
}

fn kinds() -> [Kind; 4] {
    let nf4 = Levels::FloatTable4(NF4.map(|level| f16::from_f32(level).to_f32()));
    [
        Kind { name: "int4", levels: Levels::Table4(NL), group: 32, zero: 0, span: |groups| groups },
        Kind { name: "int4-g128", levels: Levels::Linear4, group: 128, zero: 8, span: |_| 0 },
        Kind { name: "nf4", levels: nf4, group: 64, zero: 0, span: |_| 4 },
        Kind { name: "int8", levels: Levels::Linear8, group: 32, zero: 128, span: |_| 0 },
    ]
}

/// Bits that look random: a hash of the place (Knuth, and a round of mixing).
fn bits(at: usize) -> u32 {
    let x = (at as u32).wrapping_mul(2_654_435_761);
    (x ^ x >> 15).wrapping_mul(2_246_822_519) >> 9
}

fn weight(kind: &Kind, n: usize, k: usize) -> Result<PackedWeight, KernelError> {
    let groups = k / kind.group;
    let span = (kind.span)(groups);
    let mask = if kind.levels.bits() == 4 { 15 } else { 255 };
    let codes: Vec<u8> = (0..n * k).map(|at| (bits(at) & mask) as u8).collect();
    let halves: Vec<f16> = (0..n * groups).map(|at| f16::from_f32((bits(at) & 255) as f32 / 25600.0)).collect();
    let coded: Vec<i16> = (0..n * groups).map(|at| 1 + (bits(at) & 31) as i16).collect();
    let second = vec![1e-3; n * groups.div_ceil(span.max(1))];
    let scales = if span == 0 { Scales::F16(&halves) } else { Scales::Coded { codes: &coded, second: &second, span } };
    let (group, levels, zeros) = (kind.group, kind.levels, Zeros::Const(kind.zero));
    PackedWeight::pack(&WeightSource { n, k, group, levels, codes: &codes, scales, zeros, outliers: None })
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = std::env::args().skip(1).find(|word| !word.starts_with("--"));
    let cuda = Cuda::new(Driver::open(0)?)?;
    let copied = cuda.gpu().copy_bytes_per_second()?;
    println!("{}: {:.3} TB/s by copies, bytes read and bytes written", cuda.gpu().name()?, copied / 1e12);
    println!("{:10} {:>12} {:>5} {:>10} {:>8} {:>7}", "weight", "outputs x K", "rows", "us", "TB/s", "copy");
    let mut rows = String::new();
    for kind in kinds() {
        for (n, k) in SHAPES {
            let packed = weight(&kind, n, k)?;
            let first = cuda.weight(&packed)?;
            let bytes = first.bytes();
            let mut weights = vec![first];
            while weights.len() * bytes < 150_000_000 {
                weights.push(cuda.weight(&packed)?);
            }
            for m in ROWS {
                let values: Vec<f32> = (0..m * k).map(|at| bits(at) as f32 / (1 << 22) as f32 - 1.0).collect();
                let x = cuda.rows(m, k)?;
                cuda.write_rows(&x, &values)?;
                cuda.prepare(&x, m)?;
                let mut out = cuda.rows(m, n)?;
                let mut seconds = cuda.gpu().time(15, || {
                    weights.iter().try_for_each(|weight| cuda.multiply(&x, m, weight, None, false, &mut out))
                })?;
                seconds.sort_by(f64::total_cmp);
                let each = seconds[seconds.len() / 2] / weights.len() as f64;
                let rate = bytes as f64 / each;
                println!(
                    "{:10} {:>12} {m:>5} {:>10.2} {:>8.3} {:>6.1}%",
                    kind.name,
                    format!("{n}x{k}"),
                    each * 1e6,
                    rate / 1e12,
                    rate / copied * 100.0
                );
                let comma = if rows.is_empty() { "" } else { ",\n" };
                write!(
                    rows,
                    "{comma}{{\"weight\": \"{}\", \"n\": {n}, \"k\": {k}, \"rows\": {m}, \"microseconds\": {:.3}, \"bytes\": {bytes}}}",
                    kind.name,
                    each * 1e6
                )?;
            }
        }
    }
    if let Some(file) = file {
        std::fs::write(file, format!("{{\"copy\": {copied:.0}, \"products\": [\n{rows}]}}\n"))?;
    }
    Ok(())
}
