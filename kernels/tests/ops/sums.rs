//! Products with several rows against the same with one at a time.

use super::*;
use nibble_kernels::simd::{self, Simd, SimdOp};

/// Products of a row with others, and their sum by those.
struct Both<'a> {
    a: &'a [f32],
    rows: &'a [f32],
    out: &'a mut [f32],
    sum: &'a mut [f32],
}

impl SimdOp for Both<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        simd::dots(s, self.a, self.rows, self.out);
        simd::add_rows(s, self.sum, self.rows, self.out);
    }
}

#[test]
fn products_with_several_rows_are_those_with_each() {
    for width in [1, 7, 16, 17, 64, 100] {
        for count in [0, 1, 3, 4, 5, 8, 11] {
            let mut rng = rng(width as u64 * 31 + count as u64);
            let (a, rows) = (activations(&mut rng, width), activations(&mut rng, width * count));
            let begun = activations(&mut rng, width);
            let mut first: Option<(Vec<f32>, Vec<f32>)> = None;
            for isa in Isa::usable() {
                let (mut out, mut sum) = (vec![f32::NAN; count], begun.clone());
                simd::dispatch(isa, Both { a: &a, rows: &rows, out: &mut out, sum: &mut sum });
                let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                let (wanted, of_sum) = first.get_or_insert_with(|| (out.clone(), sum.clone()));
                assert!(bits(wanted) == bits(&out) && bits(of_sum) == bits(&sum), "{isa}: {width}, {count}");
                let mut exact: Vec<f64> = begun.iter().map(|x| f64::from(*x)).collect();
                let mut size: Vec<f64> = exact.iter().map(|x| x.abs()).collect();
                for (i, row) in rows.chunks_exact(width).enumerate() {
                    let products: Vec<f64> = a.iter().zip(row).map(|(a, b)| f64::from(*a) * f64::from(*b)).collect();
                    let bound = U * (width + 4) as f64 * products.iter().map(|p| p.abs()).sum::<f64>();
                    assert_close(out[i], products.iter().sum(), bound, format_args!("{isa}: {width}, row {i}"));
                    for (j, x) in row.iter().enumerate() {
                        exact[j] += f64::from(out[i]) * f64::from(*x);
                        size[j] += f64::from(out[i] * x).abs();
                    }
                }
                for j in 0..width {
                    let bound = U * (count + 2) as f64 * size[j];
                    assert_close(sum[j], exact[j], bound, format_args!("{isa}: {width}, {count} rows, sum {j}"));
                }
            }
        }
    }
}
