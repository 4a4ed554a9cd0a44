//! Conversions: the same bytes for any number of threads, after any kill, and nothing half-written.

use crate::support::*;
use nibble_quant::convert::*;
use nibble_quant::format::native::NativeSource;
use nibble_quant::format::safetensors::SafetensorsSource;
use nibble_quant::format::{self, Dtype, OutputOptions, TensorInfo, TensorSource};
use nibble_quant::manifest::{Manifest, TensorRecord};
use nibble_quant::stats::Stats;
use nibble_quant::{
    FloatFormat, Granularity, Grid, OutlierSpec, PRESETS, QTensor, QuantError, QuantSpec, Recipe, Result, ScaleData,
    ScaleFormat, Zero, ZeroData,
};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

const RESUME: OutputOptions = OutputOptions { force: false, resume: true };

fn spec() -> QuantSpec {
    QuantSpec {
        grid: Grid::Int { bits: 4 },
        granularity: Granularity::Group(32),
        zero: Zero::Symmetric,
        scale: ScaleFormat::Float(FloatFormat::F16),
        outliers: OutlierSpec::None,
    }
}

/// Round to nearest, written out here so that these tests stand on their own.
fn nearest(name: &str, [n, k]: [usize; 2], values: &[f32]) -> Result<QTensor> {
    let (spec, mut codes, mut scales) = (spec(), Vec::new(), Vec::new());
    for row in values.chunks(k) {
        for group in row.chunks(32) {
            let max = group.iter().fold(0f32, |m, v| m.max(v.abs()));
            let scale = half::f16::from_f32(max / 7.0).to_f32();
            let code = |v: &f32| if scale == 0.0 { 8 } else { ((v / scale).round().clamp(-7.0, 7.0) + 8.0) as u8 };
            codes.extend(group.iter().map(code));
            scales.push(scale);
        }
    }
    assert_eq!(codes.len(), n * k, "{name}");
    Ok(QTensor {
        spec,
        shape: [n, k],
        codes,
        scales: ScaleData::Float(scales),
        zeros: ZeroData::None,
        outliers: Default::default(),
        order: None,
    })
}

fn choose(info: &TensorInfo) -> Result<Choice> {
    Ok(match info.name.contains("proj") {
        false => Choice::Keep("no rule".into()),
        true => Choice::Quantize(Quantize {
            spec: spec(),
            quantizer: Arc::new(nearest),
            label: "int4-g32".into(),
            why: "rule 1".into(),
            wanted: None,
            rows: Rows::Apart,
        }),
    })
}

/// A sharded checkpoint with sidecars, odd types and shapes, and a matrix of several blocks of rows.
fn checkpoint(dir: &Path) -> PathBuf {
    let path = dir.join("source");
    fs::create_dir_all(path.join("extra/.hidden")).unwrap();
    let bf16 = |name: &str, shape: &[usize], seed| {
        (name.to_owned(), Dtype::BF16, shape.to_vec(), bf16_bytes(&weights(seed, shape.iter().product())))
    };
    let first = [
        bf16("model.embed.weight", &[64, 48], 1),
        bf16("model.0.q_proj.weight", &[40, 77], 2),
        bf16("model.0.norm.weight", &[48], 3),
        ("model.0.mask".to_owned(), Dtype::I64, vec![3], vec![1; 24]),
    ];
    let second = [
        bf16("model.big_proj.weight", &[4500, 2050], 4),
        f32_tensor("model.1.q_proj.weight", &[9, 64], 5),
        f32_tensor("model.3d_proj.weight", &[2, 3, 64], 6),
        ("model.scalar_proj".to_owned(), Dtype::F32, vec![], vec![0; 4]),
        ("model.empty_proj".to_owned(), Dtype::F32, vec![0, 64], vec![]),
    ];
    save(&path.join("model-1.safetensors"), &first);
    save(&path.join("model-2.safetensors"), &second);
    let map: BTreeMap<&str, &str> = first
        .iter()
        .map(|t| (t.0.as_str(), "model-1.safetensors"))
        .chain(second.iter().map(|t| (t.0.as_str(), "model-2.safetensors")))
        .collect();
    fs::write(path.join("model.safetensors.index.json"), serde_json::json!({ "weight_map": map }).to_string()).unwrap();
    fs::write(path.join("config.json"), b"{ \"model_type\":\"x\",\n\"odd   spacing\": 1 }").unwrap();
    fs::write(path.join("tokenizer.json"), [0xff, 0, 1]).unwrap();
    fs::write(path.join("extra/template.jinja"), b"{{x}}").unwrap();
    fs::write(path.join("extra/.hidden/x"), b"").unwrap();
    fs::write(path.join("pytorch_model.bin"), b"weights").unwrap();
    path
}

fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut rest = vec![dir.to_owned()];
    while let Some(next) = rest.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => rest.push(path),
                false => drop(found.insert(path.strip_prefix(dir).unwrap().to_owned(), fs::read(&path).unwrap())),
            }
        }
    }
    found
}

fn run(source: &Path, out: &Path, options: &Options, progress: &dyn Progress) -> Result<Report> {
    let source = SafetensorsSource::open(source)?;
    quantize(&plan_with(&source, &choose)?, &source, "# recipe", out, options, progress)
}

#[test]
fn the_plan_says_what_then_happens() {
    let dir = tempfile::tempdir().unwrap();
    let path = checkpoint(dir.path());
    let source = SafetensorsSource::open(&path).unwrap();
    let plan = plan_with(&source, &choose).unwrap();
    let quantized: Vec<&str> = plan.rows.iter().filter(|r| r.action != Action::Keep).map(|r| r.name.as_str()).collect();
    assert_eq!(quantized, ["model.0.q_proj.weight", "model.1.q_proj.weight", "model.big_proj.weight"]);
    for (name, why) in [
        ("model.embed.weight", "no rule"),
        ("model.0.mask", "not floats"),
        ("model.3d_proj.weight", "not a matrix"),
        ("model.scalar_proj", "not a matrix"),
        ("model.empty_proj", "empty"),
    ] {
        assert_eq!(plan.rows.iter().find(|r| r.name == name).unwrap().why, why);
    }
    let report = run(&path, &dir.path().join("out"), &Options::default(), &Silent).unwrap();
    for (row, record) in plan.rows.iter().zip(&report.tensors) {
        assert_eq!(
            (&row.name, row.bytes_after, row.bits_per_weight),
            (&record.name, record.bytes, record.bits_per_weight)
        );
        assert_eq!(record.sqnr_db.is_some(), row.action != Action::Keep, "{}", row.name);
    }
    let big = report.tensors.iter().find(|t| t.name == "model.big_proj.weight").unwrap();
    // 4 bits a value and an f16 a group of 32: 2050 leaves a short group, the 65th of its row.
    assert_eq!(big.bytes, 4500 * (2050 / 2 + 65 * 2));
    let total: u64 = report.tensors.iter().map(|t| t.bytes).sum();
    assert!(report.bytes_out >= total && report.bytes_out < total + 10_000);
}

#[test]
fn sidecars_and_kept_tensors_survive_byte_for_byte_and_the_rest_decodes() {
    let dir = tempfile::tempdir().unwrap();
    let path = checkpoint(dir.path());
    let out = run(&path, &dir.path().join("out"), &Options::default(), &Silent).unwrap().path;
    let names: Vec<String> = files(&out).keys().map(|p| p.to_string_lossy().into_owned()).collect();
    let wanted = ["config.json", "extra/template.jinja", "manifest.json", "model.safetensors", "tokenizer.json"];
    assert_eq!(names, wanted);
    for name in ["config.json", "extra/template.jinja", "tokenizer.json"] {
        assert_eq!(fs::read(out.join(name)).unwrap(), fs::read(path.join(name)).unwrap());
    }
    let (source, native) = (SafetensorsSource::open(&path).unwrap(), NativeSource::open(&out).unwrap());
    assert_eq!(native.infos().len(), source.infos().len());
    for info in source.infos() {
        if let Some(found) = native.quantized(&info.name).unwrap() {
            let mut values = Vec::new();
            (&source as &dyn TensorSource).read_f32(&info.name, &mut values).unwrap();
            assert_eq!(found, nearest(&info.name, found.shape, &values).unwrap(), "{}", info.name);
        } else {
            assert_eq!(native.bytes(&info.name).unwrap(), source.bytes(&info.name).unwrap(), "{}", info.name);
        }
    }
    let manifest = Manifest::read(&out).unwrap();
    assert_eq!(manifest.recipe, "# recipe");
    assert_eq!(manifest.files.len(), 4);
    let mut rows = 0;
    let differences = diff(&source, &native, &mut |_| rows += 1).unwrap();
    assert_eq!(rows, differences.len());
    for d in &differences {
        let record = manifest.tensors.iter().find(|t| t.name == d.name).unwrap();
        match record.sqnr_db {
            Some(db) => assert!((db - d.sqnr_db).abs() < 1e-6 && db > 15.0 && d.cosine > 0.98, "{d:?}"),
            None => assert!(d.sqnr_db.is_infinite() && d.max_error == 0.0, "{d:?}"),
        }
    }
}

#[test]
fn bytes_do_not_depend_on_the_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let path = checkpoint(dir.path());
    let mut outputs = [1, 2, 8].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let out = dir.path().join(format!("out{threads}"));
        files(&pool.install(|| run(&path, &out, &Options::default(), &Silent)).unwrap().path)
    });
    let first = std::mem::take(&mut outputs[0]);
    assert!(outputs[1..].iter().all(|o| *o == first));
}

/// Sets a flag after a number of finished tensors.
struct StopAfter<'a> {
    left: AtomicUsize,
    stop: &'a AtomicBool,
}

impl Progress for StopAfter<'_> {
    fn start(&self, _: Stage, _: usize, _: u64) {}
    fn advance(&self, _: u64) {}
    fn tensor_done(&self, _: &TensorRecord) {
        if self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.stop.store(true, Ordering::Relaxed);
        }
    }
    fn message(&self, _: &str) {}
}

#[test]
fn a_stopped_run_is_taken_up_and_ends_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = checkpoint(dir.path());
    let whole = files(&run(&path, &dir.path().join("whole"), &Options::default(), &Silent).unwrap().path);
    let mut resumed = Vec::new();
    for after in 1..=8 {
        let stop = AtomicBool::new(false);
        let out = dir.path().join(format!("out{after}"));
        let options = Options { stop: Some(&stop), ..Options::default() };
        let stopper = StopAfter { left: AtomicUsize::new(after), stop: &stop };
        match run(&path, &out, &options, &stopper) {
            Err(QuantError::Stopped) => assert!(!out.exists()),
            other => assert!(after > 4 && other.is_ok(), "{after}: {other:?}"),
        }
        if !out.exists() {
            let again = Options { output: RESUME, ..Options::default() };
            let report = run(&path, &out, &again, &Silent).unwrap();
            resumed.push(report.resumed);
        }
        assert_eq!(files(&out), whole, "{after}");
    }
    assert!(resumed.iter().any(|r| *r > 0) && resumed.is_sorted(), "{resumed:?}");
}

#[test]
fn what_the_journal_claims_is_checked_and_other_sources_or_recipes_start_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = checkpoint(dir.path());
    let whole = files(&run(&path, &dir.path().join("whole"), &Options::default(), &Silent).unwrap().path);
    let out = dir.path().join("out");
    let half_done = || {
        let stop = AtomicBool::new(false);
        let options = Options { stop: Some(&stop), ..Options::default() };
        let stopper = StopAfter { left: AtomicUsize::new(2), stop: &stop };
        assert!(matches!(run(&path, &out, &options, &stopper), Err(QuantError::Stopped)));
        let partial = |e: fs::DirEntry| e.file_name().to_string_lossy().contains(".partial-").then(|| e.path());
        fs::read_dir(dir.path()).unwrap().find_map(|e| partial(e.unwrap())).unwrap()
    };
    let again = Options { output: RESUME, ..Options::default() };
    // A finished tensor's bytes are damaged: it is made again.
    let partial = half_done();
    let weights = partial.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let head = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[head..].fill(0x5a);
    fs::write(&weights, bytes).unwrap();
    let report = run(&path, &out, &again, &Silent).unwrap();
    // The empty tensor has no bytes to damage.
    assert!(report.resumed <= 1, "{}", report.resumed);
    assert_eq!(files(&out), whole);
    fs::remove_dir_all(&out).unwrap();
    // Another seed is another conversion.
    half_done();
    let other = Options { output: RESUME, seed: 1, ..Options::default() };
    assert_eq!(run(&path, &out, &other, &Silent).unwrap().resumed, 0);
    fs::remove_dir_all(&out).unwrap();
    // A source that was touched is another source.
    half_done();
    let shard = fs::OpenOptions::new().append(true).open(path.join("model-1.safetensors")).unwrap();
    shard.set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(5)).unwrap();
    assert_eq!(run(&path, &out, &again, &Silent).unwrap().resumed, 0);
}

#[test]
fn a_value_that_is_not_finite_is_named_and_nothing_appears() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.safetensors");
    let mut values = weights(1, 128);
    values[70] = f32::INFINITY;
    save(&file, &[("x_proj".into(), Dtype::F32, vec![2, 64], f32_bytes(&values))]);
    let why = run(&file, &dir.path().join("out"), &Options::default(), &Silent).unwrap_err().to_string();
    assert_eq!(why, "tensor `x_proj`: value inf at row 1, column 6, wanted finite ones");
    assert!(!dir.path().join("out").exists());
}

#[test]
fn sources_that_are_quantized_already_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = checkpoint(dir.path());
    let out = run(&path, &dir.path().join("out"), &Options::default(), &Silent).unwrap().path;
    let native = NativeSource::open(&out).unwrap();
    let why = plan_with(&native, &choose).unwrap_err().to_string();
    assert!(why.contains("quantized already"), "{why}");
    fs::write(path.join("config.json"), r#"{"quantization_config":{"quant_method":"gptq"}}"#).unwrap();
    let source = SafetensorsSource::open(&path).unwrap();
    let why = plan_with(&source, &choose).unwrap_err().to_string();
    assert!(why.contains("(gptq)"), "{why}");
}

#[test]
fn verify_finds_every_changed_byte() {
    let dir = tempfile::tempdir().unwrap();
    let path = checkpoint(dir.path());
    let out = run(&path, &dir.path().join("out"), &Options::default(), &Silent).unwrap().path;
    let good = verify(&out, &Silent, None).unwrap();
    assert_eq!((good.format, good.tensors, good.opaque, good.files), ("native", 8, 1, 4));
    for name in ["config.json", "extra/template.jinja", "model.safetensors", "tokenizer.json"] {
        let file = out.join(name);
        let bytes = fs::read(&file).unwrap();
        let mut damaged = bytes.clone();
        *damaged.last_mut().unwrap() ^= 1;
        fs::write(&file, &damaged).unwrap();
        let why = verify(&out, &Silent, None).unwrap_err().to_string();
        assert!(why.contains(name) && why.contains("sha256"), "{why}");
        fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
        assert!(verify(&out, &Silent, None).unwrap_err().to_string().contains("the manifest says"));
        fs::remove_file(&file).unwrap();
        assert!(verify(&out, &Silent, None).unwrap_err().to_string().contains(name));
        fs::write(&file, &bytes).unwrap();
    }
    assert_eq!(verify(&out, &Silent, None).unwrap(), good);
    let manifest = fs::read_to_string(out.join("manifest.json")).unwrap();
    fs::write(out.join("manifest.json"), manifest.replace("\"config.json\"", "\"../config.json\"")).unwrap();
    assert!(verify(&out, &Silent, None).unwrap_err().to_string().contains("outside of the folder"));
    assert_eq!(format::detect(&out).unwrap().name, "native");
}

#[test]
fn diff_names_what_one_side_lacks() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b, c) =
        (dir.path().join("a.safetensors"), dir.path().join("b.safetensors"), dir.path().join("c.safetensors"));
    save(&a, &[f32_tensor("x", &[2, 3], 1)]);
    save(&b, &[f32_tensor("x", &[2, 3], 1), f32_tensor("y", &[2], 1)]);
    save(&c, &[f32_tensor("x", &[3, 2], 1)]);
    let open = |p: &Path| SafetensorsSource::open(p).unwrap();
    let why = |p: &Path, q: &Path| diff(&open(p), &open(q), &mut |_| ()).unwrap_err().to_string();
    assert!(why(&a, &b).contains("`y`"));
    assert!(why(&b, &a).contains("`y`"));
    assert!(why(&a, &c).contains("shapes"));
}

#[test]
fn every_preset_survives_a_conversion_in_blocks_and_is_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.safetensors");
    let tensors = [
        f32_tensor("model.embed_tokens.weight", &[33, 77], 1),
        f32_tensor("model.layers.0.mlp.up_proj.weight", &[40, 300], 2),
        f32_tensor("model.layers.0.input_layernorm.weight", &[77], 3),
    ];
    save(&file, &tensors);
    let source = SafetensorsSource::open(&file).unwrap();
    for preset in PRESETS {
        let recipe = Recipe::new(preset.name).unwrap();
        let plan = plan(&source, &recipe, &Stats::default(), 0).unwrap();
        let out = dir.path().join(preset.name);
        let report = quantize(&plan, &source, &recipe.to_toml().unwrap(), &out, &Options::default(), &Silent).unwrap();
        let native = NativeSource::open(&report.path).unwrap();
        for row in &plan.rows {
            let Action::Quantize(spec) = &row.action else {
                assert_eq!(native.bytes(&row.name).unwrap(), source.bytes(&row.name).unwrap());
                continue;
            };
            let tensor = native.quantized(&row.name).unwrap().unwrap();
            assert_eq!(&tensor.spec, spec, "{}", preset.name);
            assert_eq!(row.bytes_after, tensor.bytes(), "{}", preset.name);
            let record = report.tensors.iter().find(|t| t.name == row.name).unwrap();
            let values = tensor.dequantize();
            let mut wanted = Vec::new();
            (&source as &dyn TensorSource).read_f32(&row.name, &mut wanted).unwrap();
            let power = |v: &mut dyn Iterator<Item = f32>| v.map(|v| v as f64 * v as f64).sum::<f64>();
            let error = power(&mut wanted.iter().zip(&values).map(|(a, b)| a - b));
            let sqnr = 10.0 * (power(&mut wanted.iter().copied()) / error).log10();
            assert!((record.sqnr_db.unwrap() - sqnr).abs() < 1e-6, "{}: {:?} {sqnr}", preset.name, record.sqnr_db);
        }
        assert_eq!(plan.rows[plan.rows.iter().position(|r| r.shape.len() == 1).unwrap()].action, Action::Keep);
        let differences = diff(&source, &native, &mut |_| ()).unwrap();
        assert!(differences.iter().all(|d| d.sqnr_db > 3.0), "{}: {differences:?}", preset.name);
    }
}

#[test]
fn a_rule_may_keep_floats_of_another_type() {
    let dir = tempfile::tempdir().unwrap();
    let path = checkpoint(dir.path());
    let source = SafetensorsSource::open(&path).unwrap();
    let recipe = Recipe::from_flags(PRESETS[0].name, &["*.embed.weight=keep:f32".into()]).unwrap();
    let plan = plan(&source, &recipe, &Stats::default(), 0).unwrap();
    let out = quantize(&plan, &source, "", &dir.path().join("out"), &Options::default(), &Silent).unwrap().path;
    let native = NativeSource::open(&out).unwrap();
    let (mut a, mut b) = (Vec::new(), Vec::new());
    (&source as &dyn TensorSource).read_f32("model.embed.weight", &mut a).unwrap();
    (&native as &dyn TensorSource).read_f32("model.embed.weight", &mut b).unwrap();
    assert_eq!(native.info("model.embed.weight").unwrap().stored, format::Stored::Plain(Dtype::F32));
    assert_eq!(a, b);
}

#[test]
fn a_kept_value_that_is_not_finite_is_named_when_it_is_read() {
    let f32s = |v: f32| v.to_le_bytes().to_vec();
    let cases = [
        (Dtype::F32, f32s(f32::NAN), f32s(1.0), "NaN"),
        (Dtype::F32, f32s(f32::NEG_INFINITY), f32s(1.0), "-inf"),
        (Dtype::F16, 0x7c00u16.to_le_bytes().to_vec(), 0x3c00u16.to_le_bytes().to_vec(), "inf"),
        (Dtype::BF16, 0xffc1u16.to_le_bytes().to_vec(), 0x3f80u16.to_le_bytes().to_vec(), "NaN"),
        (Dtype::F64, f64::NEG_INFINITY.to_le_bytes().to_vec(), 1f64.to_le_bytes().to_vec(), "-inf"),
        (Dtype::F64, 1e300f64.to_le_bytes().to_vec(), f64::from(f32::MAX).to_le_bytes().to_vec(), "inf"),
    ];
    for (dtype, bad, good, word) in cases {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.safetensors");
        let fill = |last: &Vec<u8>| [good.repeat(13), last.clone(), good.repeat(6)].concat();
        save(&file, &[("norm".into(), dtype, vec![4, 5], fill(&good))]);
        run(&file, &dir.path().join("whole"), &Options::default(), &Silent).unwrap();
        save(&file, &[("norm".into(), dtype, vec![4, 5], fill(&bad))]);
        let why = run(&file, &dir.path().join("out"), &Options::default(), &Silent).unwrap_err().to_string();
        assert_eq!(why, format!("tensor `norm`: value {word} at row 2, column 3, wanted finite ones"), "{dtype}");
        let names = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(names, 2, "nothing is kept of what no second run can do");
    }
}

#[test]
fn what_is_rounded_as_it_is_read_is_what_a_conversion_to_the_nearest_codes_writes() {
    let dir = tempfile::tempdir().unwrap();
    let float = dir.path().join("float");
    fs::create_dir(&float).unwrap();
    let tensors = [
        f32_tensor("model.embed_tokens.weight", &[40, 70], 1),
        f32_tensor("model.layers.0.mlp.up_proj.weight", &[33, 70], 2),
        f32_tensor("model.layers.0.mlp.gate.weight", &[8, 70], 3),
        f32_tensor("model.norm.weight", &[70], 4),
    ];
    save(&float.join("model.safetensors"), &tensors);
    let source = format::open(&float).unwrap();
    let mut recipe = Recipe::new("int8-g32").unwrap();
    recipe.rules.iter_mut().filter(|rule| rule.scheme.is_some()).for_each(|rule| rule.algorithm = Some("rtn".into()));
    let plan = plan(source.as_ref(), &recipe, &Stats::default(), 0).unwrap();
    let out = dir.path().join("out");
    quantize(&plan, source.as_ref(), "int8-g32", &out, &Options::default(), &Silent).unwrap();
    let written = format::open(&out).unwrap();
    let rounded = Rounded::new(source.as_ref(), "int8-g32").unwrap();
    for info in source.infos() {
        let (found, wanted) = (rounded.quantized(&info.name).unwrap(), written.quantized(&info.name).unwrap());
        assert_eq!(found, wanted, "{}", info.name);
        assert_eq!(found.is_some(), info.name.contains("proj") || info.name.contains("embed"), "{}", info.name);
    }
    // What is quantized stays as it is.
    let again = Rounded::new(written.as_ref(), "int4-channel").unwrap();
    assert_eq!(
        again.quantized("model.embed_tokens.weight").unwrap(),
        written.quantized("model.embed_tokens.weight").unwrap()
    );
    assert!(Rounded::new(source.as_ref(), "int8-tensor").is_err(), "rows that share a scale");
    assert!(Rounded::new(source.as_ref(), "int9").is_err());
}
