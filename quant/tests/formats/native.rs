//! nibble's own format: what goes in comes out, and what can't be right is refused.

use crate::support::*;
use nibble_kernels::Outliers;
use nibble_quant::format::native::{Entry, NativeSource, common_metadata, encode, part_slots};
use nibble_quant::format::shards::{Bundle, Layout, SHARD_BYTES, ShardFiles, Slot};
use nibble_quant::format::{self, Dtype, OutputDir, OutputOptions, Stored, TensorSource};
use nibble_quant::*;
use rand::Rng;
use std::path::{Path, PathBuf};

const FINGERPRINT: &str = "0123456789abcdef";

/// Specs that between them use every part a tensor can have.
pub fn specs() -> Vec<QuantSpec> {
    let base = QuantSpec {
        grid: Grid::Int { bits: 4 },
        granularity: Granularity::Group(32),
        zero: Zero::Symmetric,
        scale: ScaleFormat::Float(FloatFormat::F16),
        outliers: OutlierSpec::None,
    };
    let coded = |bits, span| ScaleFormat::Coded { bits, span, second: FloatFormat::F16 };
    let mut specs: Vec<QuantSpec> =
        (2..=8).map(|bits| QuantSpec { grid: Grid::Int { bits }, ..base.clone() }).collect();
    specs.extend([
        QuantSpec { granularity: Granularity::Tensor, scale: ScaleFormat::Float(FloatFormat::F32), ..base.clone() },
        QuantSpec { granularity: Granularity::Channel, scale: ScaleFormat::Float(FloatFormat::Bf16), ..base.clone() },
        QuantSpec { zero: Zero::Int, granularity: Granularity::Group(64), ..base.clone() },
        QuantSpec { zero: Zero::Min, ..base.clone() },
        QuantSpec { zero: Zero::Min, scale: coded(6, Span::Values(64)), ..base.clone() },
        QuantSpec { zero: Zero::FullRange, scale: coded(6, Span::Row), ..base.clone() },
        QuantSpec { grid: Grid::Table(Table::Iq4Nl), scale: coded(8, Span::Row), ..base.clone() },
        QuantSpec { grid: Grid::Table(Table::Nf4), scale: ScaleFormat::Dynamic { blocks: 5 }, ..base.clone() },
        QuantSpec { outliers: OutlierSpec::PerGroup(2), ..base.clone() },
        QuantSpec { outliers: OutlierSpec::PerGroup(3), granularity: Granularity::Channel, ..base.clone() },
        QuantSpec { outliers: OutlierSpec::Columns { permille: 30 }, ..base },
    ]);
    specs
}

fn numbers(spec: &QuantSpec, [n, k]: [usize; 2], signed: bool, rng: &mut impl Rng) -> ScaleData {
    let (rows, groups) = (spec.scale_rows(n), spec.groups(k));
    match spec.scale {
        ScaleFormat::Float(float) => {
            ScaleData::Float((0..rows * groups).map(|_| float.round(rng.random_range(0.001..1.0))).collect())
        }
        ScaleFormat::Coded { bits, second, .. } => {
            let (low, high) = if signed { (-(1 << (bits - 1)), 1 << (bits - 1)) } else { (0, 1 << bits) };
            ScaleData::Coded {
                codes: (0..rows * groups).map(|_| rng.random_range(low..high)).collect(),
                second: (0..rows * spec.spans(k)).map(|_| second.round(rng.random_range(-1.0..1.0))).collect(),
            }
        }
        ScaleFormat::Dynamic { blocks } => ScaleData::Dynamic {
            codes: (0..rows * groups).map(|_| rng.random()).collect(),
            absmax: (0..(rows * groups).div_ceil(blocks)).map(|_| rng.random()).collect(),
            offset: if rows * groups == 0 { 0.0 } else { 0.25 },
        },
    }
}

/// A tensor of random parts that fits its spec.
pub fn random(spec: &QuantSpec, shape: [usize; 2], seed: u64) -> QTensor {
    let mut rng = rng(seed);
    let [n, k] = shape;
    let cells = spec.scale_rows(n) * spec.groups(k);
    let row = spec.row_outliers(k);
    let columns: Vec<u32> = match spec.outliers {
        OutlierSpec::None => vec![],
        OutlierSpec::PerGroup(count) => (0..k as u32)
            .filter(|c| {
                (*c as usize % spec.group_size(k)) < count.min(spec.group_len(k, *c as usize / spec.group_size(k)))
            })
            .collect(),
        OutlierSpec::Columns { .. } => (0..row as u32).map(|c| c * 3).collect(),
    };
    let outliers = match spec.outliers {
        OutlierSpec::None => Outliers::default(),
        _ => Outliers {
            row_start: (0..=n).map(|r| (r * row) as u32).collect(),
            cols: (0..n).flat_map(|_| columns.clone()).collect(),
            values: (0..n * row).map(|_| half::f16::from_f32(rng.random_range(-9.0..9.0))).collect(),
        },
    };
    QTensor {
        spec: spec.clone(),
        shape,
        codes: (0..n * k).map(|_| rng.random_range(0..1u32 << spec.bits()) as u8).collect(),
        scales: numbers(spec, shape, spec.signed_scales(), &mut rng),
        zeros: match spec.zero {
            Zero::Symmetric | Zero::FullRange => ZeroData::None,
            Zero::Int => ZeroData::Int((0..cells).map(|_| rng.random_range(0..16)).collect()),
            Zero::Min => ZeroData::Min(numbers(spec, shape, false, &mut rng)),
        },
        outliers,
        order: None,
    }
}

/// Writes a native checkpoint of these tensors and one that is kept.
pub fn write(dir: &Path, tensors: &[(String, QTensor)]) -> PathBuf {
    let mut bundles: Vec<Bundle> = tensors.iter().map(|(name, t)| entry(t).bundle(name).unwrap()).collect();
    let kept = Slot { name: "norm.weight".into(), dtype: Dtype::F32, shape: vec![3] };
    bundles.push(Bundle { slots: vec![kept], ..Bundle::default() });
    let layout = Layout::new(&bundles, &common_metadata(), SHARD_BYTES).unwrap();
    let out = OutputDir::create(&dir.join("m"), &[], FINGERPRINT, OutputOptions::default()).unwrap();
    let shards = ShardFiles::create(&layout, &out).unwrap();
    for (name, tensor) in tensors {
        for part in encode(name, tensor).unwrap() {
            shards.write(&format!("{name}.{}", part.suffix), 0, &part.bytes).unwrap();
        }
    }
    shards.write("norm.weight", 0, &f32_bytes(&[1.0, 2.0, 3.0])).unwrap();
    out.commit(|_| Ok(())).unwrap()
}

fn entry(tensor: &QTensor) -> Entry {
    Entry { spec: tensor.spec.clone(), shape: tensor.shape.to_vec(), reordered: tensor.order.is_some() }
}

#[test]
fn tensors_come_back_equal_for_every_spec_and_short_groups() {
    // 77 leaves a short last group, a short span and codes that end inside of a byte.
    for (at, spec) in specs().iter().enumerate() {
        spec.validate().unwrap();
        for shape in [[3, 77], [1, 1], [4, 128], [0, 64], [5, 0]] {
            let dir = tempfile::tempdir().unwrap();
            let mut tensor = random(spec, shape, at as u64);
            if at % 2 == 0 {
                tensor.order = Some((0..shape[1] as u32).rev().collect());
            }
            tensor.validate("t").unwrap_or_else(|e| panic!("{spec} {shape:?}: {e}"));
            let source = NativeSource::open(&write(dir.path(), &[("t".into(), tensor.clone())])).unwrap();
            let back = source.quantized("t").unwrap().unwrap();
            assert_eq!(back, tensor, "{spec} {shape:?}");
            assert_eq!(source.info("t").unwrap().bytes as u64, tensor.bytes(), "{spec} {shape:?}");
            assert_eq!(source.info("t").unwrap().stored, Stored::Quantized(Box::new(spec.clone())));
            let whole = tensor.dequantize();
            for rows in [0..shape[0], 0..shape[0].min(1), shape[0] / 2..shape[0]] {
                let mut values = vec![f32::NAN; 5];
                source.read_rows_f32("t", rows.clone(), &mut values).unwrap();
                assert_eq!(values, whole[rows.start * shape[1]..rows.end * shape[1]], "{spec} {shape:?} {rows:?}");
            }
        }
    }
}

#[test]
fn what_is_packed_from_its_file_in_blocks_is_what_is_packed_whole() {
    let (n, k) = (2500, 64);
    let mut packed = 0;
    for (at, spec) in specs().iter().enumerate() {
        let tensor = random(spec, [n, k], at as u64);
        // Groups that are no multiple of 32 are for no kernel.
        let Ok(whole) = tensor.pack() else { continue };
        let dir = tempfile::tempdir().unwrap();
        let source = NativeSource::open(&write(dir.path(), &[("t".into(), tensor)])).unwrap();
        let rows = source.quantized_rows("t").unwrap().unwrap();
        let apart = NativeSource::rows_stand_alone(spec);
        assert_eq!(rows.blocks(1 << 16).len(), if apart { 3 } else { 1 }, "{spec}");
        let blocks = rows.pack().unwrap();
        assert_eq!((blocks.n(), blocks.k(), blocks.bytes()), (n, k, whole.bytes()), "{spec}");
        let (mut found, mut wanted) = ([0.0; 64], [0.0; 64]);
        for row in 0..n {
            blocks.dequantize_row(row, &mut found).unwrap();
            whole.dequantize_row(row, &mut wanted).unwrap();
            assert_eq!(found.map(f32::to_bits), wanted.map(f32::to_bits), "{spec}, row {row}");
        }
        packed += 1;
    }
    assert!(packed > 3, "only {packed} specs");
}

#[test]
fn what_is_kept_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let tensor = random(&specs()[2], [4, 64], 1);
    let path = write(dir.path(), &[("a.weight".into(), tensor)]);
    assert_eq!(format::detect(&path).unwrap().name, "native");
    let source = format::open(&path).unwrap();
    let mut values = Vec::new();
    source.read_f32("norm.weight", &mut values).unwrap();
    assert_eq!(values, [1.0, 2.0, 3.0]);
    assert_eq!(source.quantized("norm.weight").unwrap(), None);
    assert!(source.bytes("a.weight").unwrap_err().to_string().contains("in parts"));
    assert!(source.info("a.weight.codes").is_err());
}

#[test]
fn parts_take_the_bytes_the_spec_says() {
    for spec in specs() {
        for shape in [[3, 77], [8, 576], [1, 1], [0, 5]] {
            let slots = part_slots(&spec, shape, false);
            let bytes: usize = slots.iter().map(|s| s.shape.iter().product::<usize>() * s.dtype.bitsize() / 8).sum();
            assert_eq!(bytes as u64, spec.bytes(shape), "{spec} {shape:?}");
        }
    }
}

#[test]
fn parts_that_contradict_the_spec_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let spec = &specs()[2];
    let tensor = random(spec, [4, 64], 1);
    let parts = encode("t", &tensor).unwrap();
    let slots = part_slots(spec, [4, 64], false);
    let file = dir.path().join("model.safetensors");
    let case = |entry: Option<&str>, version: &str, edit: &dyn Fn(&mut Vec<Tensor>), wanted: &str| {
        let mut tensors: Vec<Tensor> = (parts.iter().zip(&slots))
            .map(|(p, s)| (format!("t.{}", s.suffix), s.dtype, s.shape.clone(), p.bytes.clone()))
            .collect();
        edit(&mut tensors);
        let views = tensors
            .iter()
            .map(|(n, d, s, b)| (n.as_str(), safetensors::tensor::TensorView::new(*d, s.clone(), b).unwrap()));
        let mut meta = std::collections::HashMap::from([("nibble.version".to_owned(), version.to_owned())]);
        if let Some(entry) = entry {
            meta.insert("nibble:t".into(), entry.into());
        }
        std::fs::write(&file, safetensors::serialize(views, Some(meta)).unwrap()).unwrap();
        match NativeSource::open(&file) {
            Ok(source) => match source.quantized("t") {
                Ok(found) => assert!(wanted.is_empty() && found.as_ref() == Some(&tensor), "wanted {wanted}"),
                Err(why) => assert!(!wanted.is_empty() && why.to_string().contains(wanted), "{why}, wanted {wanted}"),
            },
            Err(why) => assert!(!wanted.is_empty() && why.to_string().contains(wanted), "{why}, wanted {wanted}"),
        }
    };
    let text = serde_json::to_string(&entry(&tensor)).unwrap();
    let none = |_: &mut Vec<Tensor>| ();
    case(Some(&text), "1", &none, "");
    case(Some(&text), "2", &none, "nibble format 2, wanted 1");
    case(None, "1", &none, "no tensor `t`");
    case(Some("{}"), "1", &none, "`t`");
    case(Some(&text.replace("\"bits\":4", "\"bits\":9")), "1", &none, "9 bits");
    case(Some(&text.replace("[4,64]", "[4,65]")), "1", &none, "the spec asks for");
    case(Some(&text.replace("[4,64]", "[4]")), "1", &none, "can't be quantized");
    case(Some(&text.replace("[4,64]", "[4294967296,4294967296]")), "1", &none, "can't be quantized");
    case(Some(&text), "1", &|t| drop(t.remove(1)), "`t.scales` is missing");
    case(Some(&text), "1", &|t| t[0].2 = vec![32, 4], "`t.codes` is U8 [32, 4]");
    case(Some(&text), "1", &|t| t.push(("t".into(), Dtype::U8, vec![0], vec![])), "both quantized and as it was");
    let infinite = |t: &mut Vec<Tensor>| t[1].3[..2].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
    case(Some(&text), "1", &infinite, "not a finite f16");
}
