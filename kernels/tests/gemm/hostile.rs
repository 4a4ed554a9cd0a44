//! Sources that lie about themselves are refused by name.

use half::f16;
use nibble_kernels::{
    ActKind, Activations, DenseSource, KernelError, Levels, Outliers, PackedWeight, Pool, Product, Scales,
    WeightSource, Zeros, multiply,
};

const CODES: [u8; 3 * 40] = [7; 120];
const SCALES: [f32; 6] = [0.5; 6];

/// A sound (3, 40) weight in groups of 32, to be spoiled.
fn sound() -> WeightSource<'static> {
    WeightSource {
        n: 3,
        k: 40,
        group: 32,
        levels: Levels::Linear4,
        codes: &CODES,
        scales: Scales::F32(&SCALES),
        zeros: Zeros::Const(8),
        outliers: None,
    }
}

fn refusal(source: WeightSource) -> KernelError {
    PackedWeight::pack(&source).expect_err("a damaged source was packed")
}

#[test]
fn lengths() {
    assert!(PackedWeight::pack(&sound()).is_ok());
    let length = |what, found, wanted| KernelError::Length { what, found, wanted };
    assert_eq!(refusal(WeightSource { codes: &CODES[1..], ..sound() }), length("codes", 119, 120));
    assert_eq!(refusal(WeightSource { n: 4, ..sound() }), length("codes", 120, 160));
    assert_eq!(refusal(WeightSource { n: usize::MAX, ..sound() }), length("codes", 120, usize::MAX));
    assert_eq!(refusal(WeightSource { scales: Scales::F32(&SCALES[..5]), ..sound() }), length("scales", 5, 6));
    assert_eq!(refusal(WeightSource { scales: Scales::F16(&[f16::ONE; 7]), ..sound() }), length("scales", 7, 6));
    assert_eq!(refusal(WeightSource { zeros: Zeros::Int(&[1; 5]), ..sound() }), length("zero points", 5, 6));
    let mins = Zeros::Min(Scales::F32(&SCALES[..1]));
    assert_eq!(refusal(WeightSource { zeros: mins, ..sound() }), length("minimums", 1, 6));
    let zeros = Zeros::Int(&[1, 2, 3, 16, 17, 4]);
    assert_eq!(refusal(WeightSource { zeros, ..sound() }), KernelError::Zero { found: 17 });
    let coded = Scales::Coded { codes: &[1; 5], second: &[1.0; 3], span: 2 };
    assert_eq!(refusal(WeightSource { scales: coded, ..sound() }), length("scales", 5, 6));
    let coded = Scales::Coded { codes: &[1; 6], second: &[1.0; 4], span: 2 };
    assert_eq!(refusal(WeightSource { scales: coded, ..sound() }), length("second-level scales", 4, 3));
    let dense = PackedWeight::pack_dense(3, 40, DenseSource::F32(&[0.0; 121])).err();
    assert_eq!(dense, Some(length("dense rows", 121, 120)));
}

#[test]
fn groups_and_codes() {
    assert_eq!(refusal(WeightSource { group: 0, ..sound() }), KernelError::Group { found: 0 });
    assert_eq!(refusal(WeightSource { group: 33, ..sound() }), KernelError::Group { found: 33 });
    let whole = WeightSource { group: usize::MAX, scales: Scales::F32(&SCALES[..3]), ..sound() };
    assert!(PackedWeight::pack(&whole).is_ok());
    let mut codes = CODES;
    codes[2 * 40 + 39] = 16;
    codes[2 * 40 + 38] = 15;
    let fault = KernelError::Code { row: 2, col: 39, found: 16, levels: 16 };
    for levels in [Levels::Linear4, Levels::Table4([1; 16]), Levels::FloatTable4([1.0; 16])] {
        assert_eq!(refusal(WeightSource { codes: &codes, levels, ..sound() }), fault);
    }
    assert!(PackedWeight::pack(&WeightSource { codes: &codes, levels: Levels::Linear8, ..sound() }).is_ok());
    // The first fault is named whatever the threads do.
    let many = vec![99; 64 * 40];
    let source = WeightSource { n: 64, codes: &many, scales: Scales::F32(&[1.0; 128]), ..sound() };
    assert_eq!(refusal(source), KernelError::Code { row: 0, col: 0, found: 99, levels: 16 });
}

#[test]
fn zeros_and_scale_codes() {
    for (levels, zero) in
        [(Levels::Linear4, -1), (Levels::Linear4, 17), (Levels::Linear8, -256), (Levels::Linear8, 256)]
    {
        let refused = refusal(WeightSource { levels, zeros: Zeros::Const(zero), ..sound() });
        assert_eq!(refused, KernelError::Zero { found: zero });
    }
    let coded = |codes, span| WeightSource { scales: Scales::Coded { codes, second: &[1.0; 6], span }, ..sound() };
    assert_eq!(refusal(coded(&[1; 6], 0)), KernelError::Span { what: "scales" });
    let fault = |found| KernelError::ScaleCode { what: "scales", row: 1, group: 1, found };
    assert_eq!(refusal(coded(&[0, 255, 0, 256, 0, 0], 1)), fault(256));
    assert_eq!(refusal(coded(&[-128, 127, 0, 128, 0, 0], 1)), fault(128));
    assert_eq!(refusal(coded(&[0, 0, 0, -129, 0, 0], 1)), fault(-129));
    assert!(PackedWeight::pack(&coded(&[-128, 127, 0, 1, 2, 3], 1)).is_ok());
}

#[test]
fn outliers() {
    let refused = |row_start: &[u32], cols: &[u32], values: usize| {
        let outliers = Outliers { row_start: row_start.to_vec(), cols: cols.to_vec(), values: vec![f16::ONE; values] };
        PackedWeight::pack(&WeightSource { outliers: Some(&outliers), ..sound() }).err()
    };
    let length = |what, found, wanted| Some(KernelError::Length { what, found, wanted });
    assert_eq!(refused(&[], &[], 0), None);
    assert_eq!(refused(&[0, 1, 1, 2], &[39, 0], 2), None);
    assert_eq!(refused(&[0, 1, 1, 2], &[39, 0], 1), length("outlier values", 1, 2));
    assert_eq!(refused(&[], &[1], 1), length("outlier columns without row offsets", 1, 0));
    assert_eq!(refused(&[0, 1], &[39], 1), length("outlier row offsets", 2, 4));
    assert_eq!(refused(&[0, 1, 1, 1], &[39, 0], 2), length("outlier columns", 2, 1));
    assert_eq!(refused(&[0, 1, 1, 2], &[39, 40], 2), Some(KernelError::Outlier { row: 2, col: 40, n: 3, k: 40 }));
    assert_eq!(refused(&[0, 1, 0, 1], &[3], 1), Some(KernelError::OutlierRow { row: 1, start: 1, end: 0 }));
    assert_eq!(refused(&[1, 1, 1, 1], &[3], 1), Some(KernelError::OutlierRow { row: 0, start: 1, end: 1 }));
    assert_eq!(refused(&[0, 0, 0, 9], &[3], 1), Some(KernelError::OutlierRow { row: 2, start: 0, end: 9 }));
}

#[test]
fn products_and_rows() {
    let packed = PackedWeight::pack(&sound()).unwrap();
    let pool = Pool::new(1);
    let length = |what, found, wanted| Err(KernelError::Length { what, found, wanted });
    let mut x = Activations::with_capacity(2, 40);
    x.fill(2, 40, &[1.0; 80]).unwrap();
    let mut out = [f32::NAN; 7];
    let product = Product { weight: &packed, bias: None, accumulate: false, out: &mut out };
    assert_eq!(multiply(&pool, &mut x, &mut [product], ActKind::I8), length("a product's output", 7, 6));
    let product = Product { weight: &packed, bias: Some(&[0.0; 2]), accumulate: false, out: &mut out[..6] };
    assert_eq!(multiply(&pool, &mut x, &mut [product], ActKind::I8), length("a bias", 2, 3));
    x.fill(2, 41, &[1.0; 82]).unwrap();
    let product = Product { weight: &packed, bias: None, accumulate: false, out: &mut out[..6] };
    assert_eq!(multiply(&pool, &mut x, &mut [product], ActKind::I8), length("a row of activations", 41, 40));
    assert!(out.iter().all(|v| v.is_nan()), "a refused product was written");
    assert_eq!(packed.dequantize_row(3, &mut [0.0; 40]), Err(KernelError::Row { found: 3, n: 3 }));
    assert_eq!(packed.dequantize_row(2, &mut [0.0; 39]), length("a dequantized row", 39, 40));
}
