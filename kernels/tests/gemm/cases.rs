//! Weights and activations to try, and what a product of them should be.

use half::{bf16, f16};
use nibble_kernels::{
    ActKind, Activations, BLOCK, DenseSource, KernelError, Levels, Outliers, PackedWeight, Scales, WeightKind,
    WeightSource, Zeros,
};
use rand::{Rng, rngs::StdRng};
use std::ops::Range;

pub const KINDS: [WeightKind; 7] = [
    WeightKind::W4Lin,
    WeightKind::W4Tab,
    WeightKind::W4Flt,
    WeightKind::W8,
    WeightKind::F32,
    WeightKind::Bf16,
    WeightKind::F16,
];

/// One number a group, owned.
#[derive(Debug, Clone)]
pub enum Numbers {
    F16(Vec<f16>),
    F32(Vec<f32>),
    Coded { codes: Vec<i16>, second: Vec<f32>, span: usize },
}

impl Numbers {
    fn random(rng: &mut StdRng, n: usize, groups: usize) -> Numbers {
        let count = n * groups;
        let float = |rng: &mut StdRng| rng.random_range(-0.1f32..0.1);
        let coded = |rng: &mut StdRng, low: i16, high: i16, span: usize| Numbers::Coded {
            codes: (0..count).map(|_| rng.random_range(low..=high)).collect(),
            second: (0..n * groups.div_ceil(span)).map(|_| float(rng) / 64.0).collect(),
            span,
        };
        match rng.random_range(0..7) {
            0 => Numbers::F16((0..count).map(|_| f16::from_f32(float(rng))).collect()),
            1 => Numbers::F32((0..count).map(|_| float(rng)).collect()),
            2 => coded(rng, 0, 255, 1),
            3 => coded(rng, -128, 127, 2),
            // A tail shorter than the span for most group counts.
            4 => coded(rng, 0, 63, 4),
            5 => coded(rng, -31, 31, groups.max(1)),
            _ => coded(rng, 0, 255, groups.max(1) + 3),
        }
    }

    pub fn source(&self) -> Scales<'_> {
        match self {
            Numbers::F16(v) => Scales::F16(v),
            Numbers::F32(v) => Scales::F32(v),
            Numbers::Coded { codes, second, span } => Scales::Coded { codes, second, span: *span },
        }
    }

    /// As kernels see it: one rounding for the product of the two levels.
    fn at(&self, row: usize, group: usize, groups: usize) -> f32 {
        let at = row * groups + group;
        match self {
            Numbers::F16(v) => v[at].to_f32(),
            Numbers::F32(v) => v[at],
            Numbers::Coded { codes, second, span } => {
                f32::from(codes[at]) * second[row * groups.div_ceil(*span) + group / span]
            }
        }
    }
}

#[derive(Debug, Clone)]
pub enum Offset {
    Const(i32),
    Int(Vec<u8>),
    Min(Numbers),
}

#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "one exists at a time")]
pub enum Numeric {
    Grid { group: usize, levels: Levels, codes: Vec<u8>, scales: Numbers, zeros: Offset, outliers: Option<Outliers> },
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

/// A weight before packing.
#[derive(Debug, Clone)]
pub struct Weight {
    pub n: usize,
    pub k: usize,
    pub numeric: Numeric,
}

impl Weight {
    /// Everything else at random; extremes are as likely as anything.
    pub fn random(rng: &mut StdRng, kind: WeightKind, n: usize, k: usize) -> Weight {
        let dense = |rng: &mut StdRng| -> Vec<f32> { (0..n * k).map(|_| rng.random_range(-1.0..1.0)).collect() };
        let levels = match kind {
            WeightKind::F32 => return Weight { n, k, numeric: Numeric::F32(dense(rng)) },
            WeightKind::F16 => {
                let numeric = Numeric::F16(dense(rng).into_iter().map(f16::from_f32).collect());
                return Weight { n, k, numeric };
            }
            WeightKind::Bf16 => {
                let numeric = Numeric::Bf16(dense(rng).into_iter().map(bf16::from_f32).collect());
                return Weight { n, k, numeric };
            }
            WeightKind::W4Lin => Levels::Linear4,
            WeightKind::W4Tab => {
                let mut table = std::array::from_fn(|_| rng.random_range(-127..=127));
                (table[0], table[15]) = (-127, 127);
                // Some kernels have a way of their own for levels of 6 bits.
                if rng.random() {
                    table = table.map(|level| level >> 2);
                }
                Levels::Table4(table)
            }
            WeightKind::W4Flt => Levels::FloatTable4(std::array::from_fn(|_| rng.random_range(-1.0..1.0))),
            WeightKind::W8 => Levels::Linear8,
        };
        let most = if levels.bits() == 8 { 255 } else { 15 };
        let group = [32, 64, 96, 128, 256, k.max(1), 10_000][rng.random_range(0..7)];
        let groups = k.div_ceil(group);
        let codes = match rng.random_range(0..5) {
            0 => vec![most; n * k],
            1 => vec![0; n * k],
            2 => (0..n * k).map(|_| if rng.random() { most } else { 0 }).collect(),
            _ => (0..n * k).map(|_| rng.random_range(0..=most)).collect(),
        };
        let zeros = match rng.random_range(0..5) {
            0 => Offset::Const(0),
            1 => Offset::Const(i32::from(most / 2 + 1)),
            2 => Offset::Const(if kind == WeightKind::W4Lin { 16 } else { [-255, 255][rng.random_range(0..2)] }),
            3 => Offset::Int((0..n * groups).map(|_| rng.random_range(0..=most)).collect()),
            _ => Offset::Min(Numbers::random(rng, n, groups)),
        };
        let outliers = (k > 0 && rng.random_range(0..3) == 0).then(|| {
            let mut outliers = Outliers { row_start: vec![0], ..Outliers::default() };
            for _ in 0..n {
                for col in 0..k {
                    if rng.random_range(0..50) == 0 {
                        outliers.cols.push(col as u32);
                        outliers.values.push(f16::from_f32(rng.random_range(-4.0..4.0)));
                    }
                }
                outliers.row_start.push(outliers.cols.len() as u32);
            }
            outliers
        });
        let scales = Numbers::random(rng, n, groups);
        Weight { n, k, numeric: Numeric::Grid { group, levels, codes, scales, zeros, outliers } }
    }

    /// Some of its rows.
    pub fn rows(&self, rows: Range<usize>) -> Weight {
        fn part<T: Copy>(values: &[T], width: usize, rows: &Range<usize>) -> Vec<T> {
            values[rows.start * width..rows.end * width].to_vec()
        }
        let k = self.k;
        let numeric = match &self.numeric {
            Numeric::F32(values) => Numeric::F32(part(values, k, &rows)),
            Numeric::F16(values) => Numeric::F16(part(values, k, &rows)),
            Numeric::Bf16(values) => Numeric::Bf16(part(values, k, &rows)),
            Numeric::Grid { group, levels, codes, scales, zeros, outliers } => {
                let groups = k.div_ceil(*group);
                let numbers = |numbers: &Numbers| match numbers {
                    Numbers::F16(v) => Numbers::F16(part(v, groups, &rows)),
                    Numbers::F32(v) => Numbers::F32(part(v, groups, &rows)),
                    Numbers::Coded { codes, second, span } => Numbers::Coded {
                        codes: part(codes, groups, &rows),
                        second: part(second, groups.div_ceil(*span), &rows),
                        span: *span,
                    },
                };
                let outliers = outliers.as_ref().map(|whole| {
                    let (start, end) = (whole.row_start[rows.start], whole.row_start[rows.end]);
                    Outliers {
                        row_start: whole.row_start[rows.start..=rows.end].iter().map(|at| at - start).collect(),
                        cols: whole.cols[start as usize..end as usize].to_vec(),
                        values: whole.values[start as usize..end as usize].to_vec(),
                    }
                });
                Numeric::Grid {
                    group: *group,
                    levels: *levels,
                    codes: part(codes, k, &rows),
                    scales: numbers(scales),
                    zeros: match zeros {
                        Offset::Const(zero) => Offset::Const(*zero),
                        Offset::Int(zeros) => Offset::Int(part(zeros, groups, &rows)),
                        Offset::Min(mins) => Offset::Min(numbers(mins)),
                    },
                    outliers,
                }
            }
        };
        Weight { n: rows.len(), k, numeric }
    }

    pub fn pack(&self) -> Result<PackedWeight, KernelError> {
        let (n, k) = (self.n, self.k);
        match &self.numeric {
            Numeric::F32(rows) => PackedWeight::pack_dense(n, k, DenseSource::F32(rows)),
            Numeric::F16(rows) => PackedWeight::pack_dense(n, k, DenseSource::F16(rows)),
            Numeric::Bf16(rows) => PackedWeight::pack_dense(n, k, DenseSource::Bf16(rows)),
            Numeric::Grid { group, levels, codes, scales, zeros, outliers } => {
                let zeros = match zeros {
                    Offset::Const(zero) => Zeros::Const(*zero),
                    Offset::Int(zeros) => Zeros::Int(zeros),
                    Offset::Min(mins) => Zeros::Min(mins.source()),
                };
                PackedWeight::pack(&WeightSource {
                    n,
                    k,
                    group: *group,
                    levels: *levels,
                    codes,
                    scales: scales.source(),
                    zeros,
                    outliers: outliers.as_ref(),
                })
            }
        }
    }

    /// (scale, level - zero, min) of one value; dense numbers are levels of scale 1.
    pub fn parts(&self, row: usize, col: usize) -> (f32, f32, f32) {
        let at = row * self.k + col;
        match &self.numeric {
            Numeric::F32(rows) => (1.0, rows[at], 0.0),
            Numeric::F16(rows) => (1.0, rows[at].to_f32(), 0.0),
            Numeric::Bf16(rows) => (1.0, rows[at].to_f32(), 0.0),
            Numeric::Grid { group, levels, codes, scales, zeros, .. } => {
                let (groups, group) = (self.k.div_ceil(*group), col / group);
                let (zero, min) = match zeros {
                    Offset::Const(zero) => (*zero as f32, 0.0),
                    Offset::Int(zeros) => (f32::from(zeros[row * groups + group]), 0.0),
                    Offset::Min(mins) => (0.0, mins.at(row, group, groups)),
                };
                (scales.at(row, group, groups), levels.value(codes[at]) - zero, min)
            }
        }
    }

    /// A group's number and the factor that makes it a scale: a code and its second level if all groups of a row share
    /// that, else the scale and 1.
    fn levels_of_scale(&self, row: usize, group: usize) -> (f32, f32) {
        let Numeric::Grid { group: width, scales, .. } = &self.numeric else { return (1.0, 1.0) };
        let groups = self.k.div_ceil(*width);
        match scales {
            Numbers::Coded { codes, second, span } if *span >= groups => {
                (f32::from(codes[row * groups + group]), second[row])
            }
            _ => (scales.at(row, group, groups), 1.0),
        }
    }

    pub fn group(&self) -> usize {
        match &self.numeric {
            Numeric::Grid { group, .. } => *group,
            _ => self.k.max(1),
        }
    }

    pub fn outliers(&self, row: usize) -> Vec<(usize, f32)> {
        match &self.numeric {
            Numeric::Grid { outliers: Some(Outliers { row_start, cols, values }), .. } => {
                let range = row_start[row] as usize..row_start[row + 1] as usize;
                range.map(|at| (cols[at] as usize, values[at].to_f32())).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// (m, k) activations: plain, extreme, tiny, huge, or all of that.
pub fn activations(rng: &mut StdRng, m: usize, k: usize) -> Vec<f32> {
    let style = rng.random_range(0..6);
    let value = |rng: &mut StdRng, style: i32| match style {
        0 => rng.random_range(-1.0..1.0),
        1 => [-3.0, 3.0][rng.random_range(0..2)],
        2 => 0.0,
        3 => rng.random_range(-1e-38..1e-38),
        4 => rng.random_range(-1e30f32..1e30),
        _ => rng.random_range(-1.0f32..1.0).powi(9) * 50.0,
    };
    (0..m * k)
        .map(|at| {
            let style = if style == 5 { (at / 40 % 6) as i32 } else { style };
            value(rng, style)
        })
        .collect()
}

/// A product's expected output, and how far a correctly rounded sum in any sensible order may be from it.
pub struct Expected {
    pub value: f64,
    pub bound: f64,
}

/// Half the distance from 1 to the next float: the largest relative error of one rounding.
const ROUNDING: f64 = 1.0 / (1 << 24) as f64;
/// The same for bfloat16.
const BF16_ROUNDING: f64 = 1.0 / (1 << 8) as f64;
/// The largest absolute error of one rounding among denormals.
const UNDERFLOW: f64 = f32::from_bits(1) as f64 / 2.0;

/// The product in f64 with the activations that the kernel multiplies: values, or codes times scales.
///
/// Every term passes through at most one rounding an addition (k, two a block and two a group, a few at the end),
/// so the error is at most that many roundings of the sum of magnitudes.
pub fn expected(weight: &Weight, x: &Activations, act: ActKind, row: usize, out: usize, extra: [f32; 2]) -> Expected {
    let coded = (act == ActKind::I8).then(|| codes(x, row));
    let (mut value, mut size, mut least_scale) = (0.0, 0.0, 1.0f64);
    let (mut flushed, smallest) = (0.0, f64::from(f32::MIN_POSITIVE));
    for col in 0..weight.k {
        let x = match &coded {
            Some((codes, scales)) => f64::from(codes[col]) * f64::from(scales[col / BLOCK]),
            None => f64::from(x.row(row)[col]),
        };
        let (scale, level, min) = weight.parts(out, col);
        let (scale, level, min) = (f64::from(scale), f64::from(level), f64::from(min));
        value += (scale * level + min) * x;
        size += (scale * level * x).abs() + (min * x).abs();
        if x.abs() < smallest || (scale * level + min).abs() < smallest {
            flushed += ((scale * level + min) * x).abs();
        }
        least_scale = least_scale.max(scale.abs()).max(min.abs());
    }
    for (col, outlier) in weight.outliers(out) {
        value += f64::from(outlier) * f64::from(x.row(row)[col]);
        size += (f64::from(outlier) * f64::from(x.row(row)[col])).abs();
    }
    for extra in extra {
        value += f64::from(extra);
        size += f64::from(extra).abs();
    }
    let roundings = (weight.k + 4 * weight.k.div_ceil(BLOCK) + weight.outliers(out).len() * 2 + 8) as f64;
    let exact = roundings * (ROUNDING * size + UNDERFLOW * least_scale) * (1.0 + roundings * ROUNDING);
    let bound = match act {
        // Both factors are rounded to 8 bits, and sums that are not normal numbers count as zero.
        ActKind::Bf16 => exact + BF16_ROUNDING * (2.0 + BF16_ROUNDING) * size + flushed + roundings * smallest,
        _ => exact,
    };
    Expected { value, bound }
}

/// A row's codes, and the scale of each block.
pub fn codes(x: &Activations, row: usize) -> (Vec<i8>, Vec<f32>) {
    let blocks = || x.codes(row).unwrap();
    let codes = blocks().flat_map(|block| block.quads.iter().flatten().copied()).collect();
    (codes, blocks().map(|block| block.scale).collect())
}

/// What a kernel with byte activations gives, bit for bit: exact integers in a block, zero points included, then f32:
/// all blocks with their groups' numbers, the factor of a row, then all groups with their minimums.
pub fn exact_i8(weight: &Weight, x: &Activations, row: usize, out: usize, extra: [Option<f32>; 2]) -> f32 {
    let (codes, scales) = codes(x, row);
    let group = weight.group();
    let (mut sum, mut factor, mut mins) = (0.0f32, 1.0, Vec::new());
    for first in (0..weight.k).step_by(group) {
        let end = weight.k.min(first.saturating_add(group));
        let (_, _, min) = weight.parts(out, first);
        let (number, second) = weight.levels_of_scale(out, first / group);
        factor = second;
        let mut x_part = 0.0f32;
        for block in (first..end).step_by(BLOCK) {
            let (mut dot, mut x_sum) = (0i64, 0i64);
            for col in block..end.min(block + BLOCK) {
                let (_, level, _) = weight.parts(out, col);
                dot += level as i64 * i64::from(codes[col]);
                x_sum += i64::from(codes[col]);
            }
            let x_scale = scales[block / BLOCK];
            sum = (dot as f32 * number).mul_add(x_scale, sum);
            x_part += x_scale * x_sum as f32;
        }
        mins.push((min, x_part));
    }
    sum *= factor;
    if matches!(&weight.numeric, Numeric::Grid { zeros: Offset::Min(_), .. }) {
        sum = mins.into_iter().fold(sum, |sum, (min, x_part)| min.mul_add(x_part, sum));
    }
    for (col, outlier) in weight.outliers(out) {
        sum += outlier * x.row(row)[col];
    }
    extra.into_iter().flatten().fold(sum, |sum, extra| sum + extra)
}
