//! Laws of specs and tensors: what is refused, what things cost, what packs and unpacks.

use nibble_quant::bits::{pack_row, pack_row_i16, packed_len, unpack_row, unpack_row_i16};
use nibble_quant::nf4::{NF4, dynamic_code, dynamic_map};
use nibble_quant::{
    FloatFormat, Granularity, Grid, OutlierSpec, QTensor, QuantSpec, ScaleData, ScaleFormat, Span, Table, Zero,
    ZeroData,
};

const F16: ScaleFormat = ScaleFormat::Float(FloatFormat::F16);

fn int4(granularity: Granularity, zero: Zero, scale: ScaleFormat) -> QuantSpec {
    QuantSpec { grid: Grid::Int { bits: 4 }, granularity, zero, scale, outliers: OutlierSpec::None }
}

fn coded(bits: u8, span: Span) -> ScaleFormat {
    ScaleFormat::Coded { bits, span, second: FloatFormat::F16 }
}

#[test]
fn every_width_packs_and_unpacks_to_the_same_codes() {
    for bits in 1..=8usize {
        for count in [0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 100] {
            let codes: Vec<u8> = (0..count).map(|i| ((i * 37 + 11) & ((1 << bits) - 1)) as u8).collect();
            let mut bytes = vec![0xaa];
            pack_row(&codes, bits, &mut bytes);
            assert_eq!(bytes.len() - 1, packed_len(count, bits), "{bits} bits, {count} codes");
            let mut back = vec![0xff; count];
            assert!(unpack_row(&bytes[1..], bits, &mut back));
            assert_eq!(codes, back, "{bits} bits");
            if count > 0 {
                assert!(!unpack_row(&bytes[2..], bits, &mut back), "a short stream is refused");
            }
        }
    }
}

#[test]
fn packed_bits_lie_where_the_layout_says() {
    for bits in 2..=8usize {
        let codes: Vec<u8> = (0..19u32).map(|i| (i * 29 + 5) as u8 & ((1u32 << bits) - 1) as u8).collect();
        let mut bytes = Vec::new();
        pack_row(&codes, bits, &mut bytes);
        for (i, code) in codes.iter().enumerate() {
            for b in 0..bits {
                let at = i * bits + b;
                assert_eq!(bytes[at / 8] >> (at % 8) & 1, code >> b & 1, "{bits} bits, code {i}");
            }
        }
    }
}

#[test]
fn signed_and_unsigned_scale_codes_come_back() {
    for bits in 4..=8usize {
        for signed in [false, true] {
            let low = if signed { -(1i16 << (bits - 1)) } else { 0 };
            let codes: Vec<i16> = (low..low + (1 << bits)).collect();
            let mut bytes = Vec::new();
            pack_row_i16(&codes, bits, &mut bytes);
            let mut back = vec![0; codes.len()];
            assert!(unpack_row_i16(&bytes, bits, signed, &mut back));
            assert_eq!(codes, back);
        }
    }
}

#[test]
fn bits_per_weight_are_the_published_ones() {
    let shape = [4096, 4096];
    let g = Granularity::Group;
    let cases = [
        (int4(g(128), Zero::Symmetric, F16), 4.125),
        (int4(g(128), Zero::Int, F16), 4.15625),
        (int4(g(64), Zero::FullRange, F16), 4.25),
        (int4(g(64), Zero::Int, F16), 4.3125),
        (int4(g(32), Zero::Int, F16), 4.625),
        (int4(g(32), Zero::Min, F16), 5.0),
        // Q4_K and IQ4_XS; the latter's 6-bit scales by 256 values.
        (int4(g(32), Zero::Min, coded(6, Span::Values(256))), 4.5),
        (int4(g(32), Zero::FullRange, coded(6, Span::Values(256))), 4.25),
        (int4(g(32), Zero::FullRange, coded(6, Span::Row)), 4.0 + 6.0 / 32.0 + 16.0 / 4096.0),
        (int4(g(64), Zero::Min, coded(6, Span::Row)), 4.0 + 12.0 / 64.0 + 32.0 / 4096.0),
    ];
    for (spec, bits) in cases {
        spec.validate().unwrap();
        assert_eq!(spec.bits_per_weight(shape), bits, "{spec}");
    }
    let mut nf4 = int4(g(64), Zero::Symmetric, ScaleFormat::Dynamic { blocks: 256 });
    nf4.grid = Grid::Table(Table::Nf4);
    assert_eq!(nf4.bits_per_weight(shape), 4.0 + 8.0 / 64.0 + 32.0 / (64.0 * 256.0) + 32.0 / (4096.0 * 4096.0));
    let mut outliers = int4(g(64), Zero::FullRange, F16);
    outliers.outliers = OutlierSpec::PerGroup(1);
    assert_eq!(outliers.bits_per_weight(shape), 4.25 + 24.0 / 64.0);
    assert_eq!(outliers.bits_per_weight([0, 64]), 0.0);
}

#[test]
fn a_row_that_groups_do_not_divide_has_a_short_last_group_and_span() {
    let spec = int4(Granularity::Group(32), Zero::FullRange, coded(6, Span::Values(256)));
    for (k, groups, last, spans) in [(1, 1, 1, 1), (31, 1, 31, 1), (33, 2, 1, 1), (576, 18, 32, 3), (896, 28, 32, 4)] {
        assert_eq!((spec.groups(k), spec.group_len(k, groups - 1), spec.spans(k)), (groups, last, spans), "k = {k}");
        let total: usize = (0..groups).map(|g| spec.group_len(k, g)).sum();
        assert_eq!((total, spec.group_len(k, groups)), (k, 0));
    }
    assert_eq!((spec.groups(0), spec.spans(0), spec.bytes([3, 0])), (0, 0, 0));
}

#[test]
fn contradictions_are_refused_by_name() {
    let g = Granularity::Group(32);
    let with = |f: &dyn Fn(&mut QuantSpec)| {
        let mut spec = int4(g, Zero::Symmetric, F16);
        f(&mut spec);
        spec
    };
    let mut ascending = [0i8; 16];
    ascending.iter_mut().enumerate().for_each(|(i, l)| *l = i as i8);
    let cases: [(QuantSpec, &str); 17] = [
        (with(&|s| s.grid = Grid::Int { bits: 1 }), "integer codes of 1 bits"),
        (with(&|s| s.grid = Grid::Int { bits: 9 }), "integer codes of 9 bits"),
        (with(&|s| s.grid = Grid::Table(Table::Int8([0; 16]))), "do not ascend"),
        (with(&|s| s.grid = Grid::Table(Table::Int8(ascending))), "one side of zero"),
        (
            with(&|s| {
                s.grid = Grid::Table(Table::Nf4);
                s.zero = Zero::Int;
            }),
            "a table has its own zero",
        ),
        (with(&|s| s.granularity = Granularity::Group(0)), "groups of 0"),
        (with(&|s| s.scale = coded(3, Span::Row)), "scale codes of 3 bits"),
        (with(&|s| s.scale = coded(9, Span::Row)), "scale codes of 9 bits"),
        (with(&|s| s.scale = coded(6, Span::Values(0))), "span of 0 values"),
        (with(&|s| s.scale = coded(6, Span::Values(48))), "span of 48 values over groups of 32"),
        (
            with(&|s| {
                s.scale = coded(6, Span::Row);
                s.granularity = Granularity::Channel;
            }),
            "second scale level needs groups",
        ),
        (with(&|s| s.scale = ScaleFormat::Dynamic { blocks: 0 }), "every 0 scales"),
        (
            with(&|s| {
                s.scale = ScaleFormat::Dynamic { blocks: 256 };
                s.granularity = Granularity::Tensor;
            }),
            "second scale level needs groups",
        ),
        (
            with(&|s| {
                s.scale = ScaleFormat::Dynamic { blocks: 256 };
                s.zero = Zero::FullRange;
            }),
            "dynamic scales are positive",
        ),
        (with(&|s| s.outliers = OutlierSpec::PerGroup(0)), "0 outliers a group"),
        (with(&|s| s.outliers = OutlierSpec::PerGroup(32)), "32 outliers in groups of 32"),
        (with(&|s| s.outliers = OutlierSpec::Columns { permille: 1000 }), "1000 outlier columns"),
    ];
    for (spec, why) in cases {
        let error = spec.validate().expect_err(why).to_string();
        assert!(error.contains(why), "{error} should say: {why}");
    }
}

#[test]
fn specs_survive_toml_and_json() {
    for scale in [F16, coded(6, Span::Row), coded(8, Span::Values(256)), ScaleFormat::Dynamic { blocks: 256 }] {
        let mut spec = int4(Granularity::Group(64), Zero::Symmetric, scale);
        spec.outliers = OutlierSpec::Columns { permille: 5 };
        assert_eq!(toml::from_str::<QuantSpec>(&toml::to_string(&spec).unwrap()).unwrap(), spec);
        assert_eq!(serde_json::from_str::<QuantSpec>(&serde_json::to_string(&spec).unwrap()).unwrap(), spec);
    }
}

#[test]
fn the_dynamic_map_ascends_and_codes_are_nearest() {
    let map = dynamic_map();
    assert!(map.is_sorted_by(|a, b| a < b) && map[255] == 1.0 && map.contains(&0.0));
    for i in -1100..=1100 {
        let value = i as f32 / 1000.0;
        let nearest = map.iter().map(|m| (m - value).abs()).fold(f32::MAX, f32::min);
        // Middles are rounded to f32: two values may be equally near up to that.
        let off = (map[dynamic_code(value) as usize] - value).abs();
        assert!(off <= nearest + 2.0 * f32::EPSILON * value.abs(), "{value}: {off} where {nearest} is possible");
    }
    assert!(NF4.is_sorted_by(|a, b| a < b));
}

/// A tensor of (2, 5) codes with every part present.
fn small() -> QTensor {
    let mut spec = int4(Granularity::Group(3), Zero::Min, coded(6, Span::Row));
    spec.outliers = OutlierSpec::PerGroup(1);
    QTensor {
        spec,
        shape: [2, 5],
        codes: vec![0, 1, 2, 3, 15, 4, 5, 6, 7, 8],
        scales: ScaleData::Coded { codes: vec![1, 63, 2, 3], second: vec![0.5, 0.25] },
        zeros: ZeroData::Min(ScaleData::Coded { codes: vec![1, 2, 3, 4], second: vec![-1.0, -0.5] }),
        outliers: nibble_kernels::Outliers {
            row_start: vec![0, 2, 4],
            cols: vec![0, 4, 2, 3],
            values: [1.0, 0.0, -2.0, 0.5].map(half::f16::from_f32).to_vec(),
        },
        order: Some(vec![4, 3, 2, 1, 0]),
    }
}

#[test]
fn a_tensor_decodes_by_the_formula() {
    let t = small();
    t.validate("t").unwrap();
    let row0 = [0.5 * 0.0 - 1.0 + 1.0, 0.5 - 1.0, 1.0 - 1.0, 31.5 * 3.0 - 2.0, 31.5 * 15.0 - 2.0];
    let row1 = [0.5 * 4.0 - 1.5, 0.5 * 5.0 - 1.5, 0.5 * 6.0 - 1.5 - 2.0, 0.75 * 7.0 - 2.0 + 0.5, 0.75 * 8.0 - 2.0];
    let wanted: Vec<f32> = row0.iter().rev().chain(row1.iter().rev()).copied().collect();
    assert_eq!(t.dequantize(), wanted);
    assert_eq!((t.scale(0, 1), t.min(1, 1), t.zero(0, 0)), (31.5, -2.0, 0));
}

#[test]
fn damaged_tensors_are_refused_not_indexed() {
    type Damage = (&'static str, fn(&mut QTensor));
    let damages: [Damage; 19] = [
        ("codes, expected", |t| t.codes.truncate(9)),
        ("code 16 at row 0, column 1", |t| t.codes[1] = 16),
        ("a shape of", |t| t.shape = [usize::MAX, 2]),
        ("codes, expected", |t| t.shape = [2, 6]),
        ("scale codes", |t| t.scales = ScaleData::Coded { codes: vec![1], second: vec![1.0, 1.0] }),
        ("second-level scales", |t| t.scales = ScaleData::Coded { codes: vec![1; 4], second: vec![1.0] }),
        ("scale code 64", |t| t.scales = ScaleData::Coded { codes: vec![64; 4], second: vec![1.0; 2] }),
        ("scale code -1", |t| t.scales = ScaleData::Coded { codes: vec![-1; 4], second: vec![1.0; 2] }),
        ("not a finite f16", |t| t.scales = ScaleData::Coded { codes: vec![1; 4], second: vec![f32::NAN; 2] }),
        ("not a finite f16", |t| t.scales = ScaleData::Coded { codes: vec![1; 4], second: vec![1.0001; 2] }),
        ("scales are floats", |t| t.scales = ScaleData::Float(vec![1.0; 4])),
        ("no zeros are stored", |t| t.zeros = ZeroData::None),
        ("integer zero points are stored", |t| t.zeros = ZeroData::Int(vec![0; 4])),
        ("outlier row offsets", |t| t.outliers.row_start.truncate(1)),
        ("not 2 everywhere", |t| t.outliers.row_start = vec![0, u32::MAX, 4]),
        ("do not ascend below 5", |t| t.outliers.cols[1] = 5),
        ("not where the spec has them", |t| t.outliers.cols[1] = 2),
        ("column order", |t| t.order = Some(vec![0; 4])),
        ("twice or out of place", |t| t.order = Some(vec![0, 1, 2, 3, 3])),
    ];
    for (why, damage) in damages {
        let mut t = small();
        damage(&mut t);
        let error = t.validate("blk.0").expect_err(why).to_string();
        assert!(error.contains(why) && error.contains("`blk.0`"), "{error} should say: {why}");
    }
}
