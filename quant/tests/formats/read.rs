//! Reading: values are what the format's own tools say, contradictions are refused by name.

use crate::support::*;
use nibble_quant::format::gguf::{Array, BLOCKS, GgufSource, Value};
use nibble_quant::format::safetensors::SafetensorsSource;
use nibble_quant::format::{Dtype, TensorSource};
use std::path::{Path, PathBuf};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/blocks.gguf")
}

fn f32s(source: &dyn TensorSource, name: &str) -> Vec<f32> {
    let mut out = vec![f32::NAN; 7];
    source.read_f32(name, &mut out).unwrap();
    out
}

#[test]
fn every_block_type_decodes_to_the_bits_that_llama_cpp_s_python_package_gives() {
    let source = GgufSource::open(&golden()).unwrap();
    for block in BLOCKS {
        let found = f32s(&source, block.name);
        let wanted = f32s(&source, &format!("{}.f32", block.name));
        assert!(found.len() >= 15, "{}", block.name);
        let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&found), bits(&wanted), "{}", block.name);
    }
}

#[test]
fn a_block_writes_all_its_values_and_no_more() {
    for block in BLOCKS {
        let bytes: Vec<u8> = vec![0x11; 3 * block.bytes];
        let mut out = vec![f32::NAN; 3 * block.values + 1];
        block.decode(&bytes, &mut out[..3 * block.values]);
        assert!(out[..3 * block.values].iter().all(|v| v.is_finite()), "{}", block.name);
        assert!(out[3 * block.values].is_nan(), "{}", block.name);
    }
}

#[test]
fn row_ranges_are_slices_of_the_whole() {
    let gguf = GgufSource::open(&golden()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.safetensors");
    save(&file, &[f32_tensor("t", &[300, 5, 67], 1)]);
    let plain = SafetensorsSource::open(&file).unwrap();
    let mut names: Vec<(&dyn TensorSource, String)> =
        gguf.infos().iter().map(|i| (&gguf as &dyn TensorSource, i.name.clone())).collect();
    names.push((&plain, "t".into()));
    for (source, name) in names {
        let whole = f32s(source, &name);
        let (rows, cols) = source.info(&name).unwrap().rows_cols();
        assert_eq!(whole.len(), rows * cols);
        for range in [0..0, 0..1, 1..2, rows - 1..rows, rows..rows, 1..rows] {
            let mut part = vec![1.0; 9];
            source.read_rows_f32(&name, range.clone(), &mut part).unwrap();
            let wanted = &whole[range.start * cols..range.end * cols];
            assert!(part.iter().map(|v| v.to_bits()).eq(wanted.iter().map(|v| v.to_bits())), "{name} {range:?}");
        }
        let why = source.read_rows_f32(&name, 0..rows + 1, &mut Vec::new()).unwrap_err().to_string();
        assert!(why.contains(&name) && why.contains("rows"), "{why}");
    }
}

#[test]
fn metadata_of_every_type_reads_back() {
    let source = GgufSource::open(&golden()).unwrap();
    let meta = source.metadata();
    assert_eq!(meta.need_str("general.architecture").unwrap(), "golden");
    for (key, wanted) in [
        ("t.u8", 200i128),
        ("t.i8", -100),
        ("t.u16", 60000),
        ("t.i16", -30000),
        ("t.u32", 4_000_000_000),
        ("t.i32", -2_000_000_000),
        ("t.u64", 1 << 63),
        ("t.i64", -(1 << 62)),
    ] {
        assert_eq!(meta.get(key), Some(&Value::Int(wanted)), "{key}");
    }
    assert_eq!(meta.need_f64("t.f32").unwrap() as f32, 0.1);
    assert_eq!(meta.need_f64("t.f64").unwrap(), 0.1);
    assert_eq!(meta.bool("t.true").unwrap(), Some(true));
    assert_eq!(meta.bool("t.false").unwrap(), Some(false));
    assert_eq!(meta.need_str("t.string").unwrap(), "naïve ☃");
    assert_eq!(meta.need_strings("t.strings").unwrap(), ["a", "", "ü"]);
    assert_eq!(meta.i32s("t.i32s").unwrap().unwrap(), [1, -2, 3]);
    assert_eq!(meta.f32s("t.f32s").unwrap().unwrap(), [0.5, -1.5]);
    assert_eq!(meta.get("t.bools"), Some(&Value::Array(Array::Bool(vec![true, false]))));
    let nested = Array::Array(vec![Array::I32(vec![1, 2]), Array::I32(vec![3])]);
    assert_eq!(meta.get("t.nested"), Some(&Value::Array(nested)));
    assert_eq!(meta.str("absent").unwrap(), None);
    for why in [
        meta.need_u32("absent").unwrap_err(),
        meta.u32("t.string").unwrap_err(),
        meta.u32("t.i8").unwrap_err(),
        meta.u32s("t.i32s").unwrap_err(),
        meta.strings("t.f32s").unwrap_err(),
    ] {
        let why = why.to_string();
        assert!(why.contains("blocks.gguf") && (why.contains("t.") || why.contains("absent")), "{why}");
    }
}

#[test]
fn plain_types_become_f32() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.safetensors");
    let half = |v: f32| half::f16::from_f32(v).to_le_bytes().to_vec();
    let cases: Vec<(&str, Dtype, Vec<u8>, f32)> = vec![
        ("f32", Dtype::F32, (-1.5f32).to_le_bytes().to_vec(), -1.5),
        ("f16", Dtype::F16, half(-65504.0), -65504.0),
        ("f16 tiny", Dtype::F16, 1u16.to_le_bytes().to_vec(), 2f32.powi(-24)),
        ("bf16", Dtype::BF16, bf16_bytes(&[3.0e38]), half::bf16::from_f32(3.0e38).to_f32()),
        ("f64", Dtype::F64, 0.1f64.to_le_bytes().to_vec(), 0.1),
        ("i64", Dtype::I64, (-7i64).to_le_bytes().to_vec(), -7.0),
        ("u32", Dtype::U32, 4_000_000_000u32.to_le_bytes().to_vec(), 4e9),
        ("i16", Dtype::I16, (-300i16).to_le_bytes().to_vec(), -300.0),
        ("i8", Dtype::I8, vec![0x80], -128.0),
        ("u8", Dtype::U8, vec![255], 255.0),
        ("bool", Dtype::BOOL, vec![1], 1.0),
    ];
    let tensors: Vec<Tensor> = cases.iter().map(|(n, d, b, _)| ((*n).into(), *d, vec![], b.clone())).collect();
    save(&file, &tensors);
    let source = SafetensorsSource::open(&file).unwrap();
    for (name, _, bytes, wanted) in &cases {
        assert_eq!(f32s(&source, name), [*wanted], "{name}");
        assert_eq!(source.bytes(name).unwrap().as_ref(), bytes.as_slice(), "{name}");
    }
    save(&file.with_file_name("b.safetensors"), &[("q".into(), Dtype::F8_E4M3, vec![2], vec![1, 2])]);
    let fp8 = SafetensorsSource::open(&file.with_file_name("b.safetensors")).unwrap();
    let why = (&fp8 as &dyn TensorSource).read_f32("q", &mut Vec::new()).unwrap_err().to_string();
    assert!(why.contains("`q`") && why.contains("F8_E4M3"), "{why}");
}

#[test]
fn empty_and_unaligned_tensors_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("odd.safetensors");
    // The header is not padded and the data starts with one byte, so that no float is aligned.
    let header = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F16","shape":[3],"data_offsets":[1,7]},"c":{"dtype":"F32","shape":[0,5],"data_offsets":[7,7]},"d":{"dtype":"F32","shape":[],"data_offsets":[7,11]}}"#;
    let mut data = vec![9];
    data.extend([1.0, 2.0, -0.5].iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()));
    data.extend(6.25f32.to_le_bytes());
    std::fs::write(&file, raw_safetensors(header, &data)).unwrap();
    let source = SafetensorsSource::open(&file).unwrap();
    assert_eq!(f32s(&source, "b"), [1.0, 2.0, -0.5]);
    assert_eq!(f32s(&source, "c"), [0f32; 0]);
    assert_eq!(f32s(&source, "d"), [6.25]);
    let names: Vec<&str> = source.infos().iter().map(|i| i.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "c", "d"]);
    source.release("b");
    assert_eq!(f32s(&source, "b"), [1.0, 2.0, -0.5]);
    assert!(source.info("e").unwrap_err().to_string().contains("no tensor `e`"));
}

#[test]
fn contradictions_between_index_and_shards_are_refused_by_name() {
    let good = [("a", "1.safetensors"), ("b", "1.safetensors"), ("c", "2.safetensors")];
    let case = |index: String, edit: &dyn Fn(&Path), wanted: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        save(&dir.path().join("1.safetensors"), &[f32_tensor("a", &[2], 1), f32_tensor("b", &[2], 2)]);
        save(&dir.path().join("2.safetensors"), &[f32_tensor("c", &[2], 3)]);
        std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
        edit(dir.path());
        match (SafetensorsSource::open(dir.path()), wanted) {
            (Ok(source), []) => assert_eq!(source.infos().len(), 3),
            (Ok(_), _) => panic!("accepted, wanted {wanted:?}"),
            (Err(why), _) => {
                let why = why.to_string();
                assert!(!wanted.is_empty() && wanted.iter().all(|w| why.contains(w)), "{why}, wanted {wanted:?}");
            }
        }
    };
    let with = |last: (&'static str, &'static str)| index(&[good[0], good[1], last]);
    let none = |_: &Path| ();
    case(index(&good), &none, &[]);
    case(index(&good[..1]), &none, &["`b`", "not in the index"]);
    case(with(("c", "1.safetensors")), &none, &["`c`"]);
    case(index(&[good[0], good[1], good[2], ("d", "2.safetensors")]), &none, &["`d` isn't in `2.safetensors`"]);
    case(with(("c", "3.safetensors")), &none, &["1 of 2 shards are missing", "`3.safetensors`"]);
    for bad in ["../2.safetensors", "/etc/passwd", "x/2.safetensors", "..", ".", "", "a\\b"] {
        let text = index(&good).replace("2.safetensors", &bad.replace('\\', "\\\\"));
        case(text, &none, &["index.json", "`c`", "wanted a file name"]);
    }
    let twice = r#"{"weight_map":{"a":"1.safetensors","a":"1.safetensors"}}"#;
    case(twice.into(), &none, &["`a` is given twice"]);
    case("{}".into(), &none, &["weight_map"]);
    case(r#"{"weight_map":{"a":3}}"#.into(), &none, &["index.json"]);
    let duplicate = |dir: &Path| save(&dir.join("2.safetensors"), &[f32_tensor("a", &[2], 3)]);
    case(index(&good), &duplicate, &["`a` is also in", "1.safetensors"]);
    case(index(&good), &|dir| std::fs::write(dir.join("2.safetensors"), b"{}").unwrap(), &["2.safetensors"]);
    let extra = |dir: &Path| {
        std::fs::remove_file(dir.join("model.safetensors.index.json")).unwrap();
    };
    case(index(&good), &extra, &["2 .safetensors files", "index.json"]);
}

#[test]
fn damaged_safetensors_headers_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("bad.safetensors");
    let t = |name: &str, a: usize, b: usize| {
        format!(r#""{name}":{{"dtype":"U8","shape":[{}],"data_offsets":[{a},{b}]}}"#, b - a)
    };
    for (header, data, wanted) in [
        (format!("{{{},{}}}", t("a", 0, 2), t("a", 0, 2)), 2, "given twice"),
        (format!("{{{},{}}}", t("a", 0, 2), t("b", 3, 4)), 4, "`b`"),
        (format!("{{{}}}", t("a", 0, 2)), 3, "not fully covered"),
        (format!("{{{}}}", t("a", 0, 2)), 1, "not fully covered"),
        (r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,2]}}"#.into(), 2, "shape"),
        (
            r#"{"a":{"dtype":"F64","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,2]}}"#.into(),
            2,
            "overflow",
        ),
        (r#"{"a":{"dtype":"X9","shape":[2],"data_offsets":[0,2]}}"#.into(), 2, "JSON"),
        ("[".repeat(5000), 0, "JSON"),
    ] {
        std::fs::write(&file, raw_safetensors(&header, &vec![0; data])).unwrap();
        let why = SafetensorsSource::open(&file).unwrap_err().to_string();
        assert!(why.contains(wanted) && why.contains("bad.safetensors"), "{why}, wanted {wanted}");
    }
    std::fs::write(&file, u64::MAX.to_le_bytes()).unwrap();
    assert!(SafetensorsSource::open(&file).unwrap_err().to_string().contains("too large"));
    std::fs::write(&file, []).unwrap();
    assert!(SafetensorsSource::open(&file).unwrap_err().to_string().contains("too small"));
}

#[test]
fn a_file_that_shrinks_or_grows_while_open_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.safetensors");
    save(&file, &[f32_tensor("t", &[4096], 1)]);
    let source = SafetensorsSource::open(&file).unwrap();
    assert!(source.bytes("t").is_ok());
    std::fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(100).unwrap();
    let why = source.bytes("t").unwrap_err().to_string();
    assert!(why.contains("now has 100"), "{why}");
}

#[test]
fn gguf_contradictions_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("bad.gguf");
    let t = |g: Gguf| g.tensor("t", &[4], 0, vec![0; 16]);
    let set = |mut bytes: Vec<u8>, at: usize, with: &[u8]| {
        bytes[at..at + with.len()].copy_from_slice(with);
        bytes
    };
    let plain = t(Gguf::new()).bytes();
    let many = u64::MAX.to_le_bytes();
    let array = |kind: u32, len: u64| [&kind.to_le_bytes()[..], &len.to_le_bytes()[..]].concat();
    let nested = {
        let mut value = Vec::new();
        (0..70).for_each(|_| value.extend(array(9, 1)));
        value.extend(array(0, 0));
        value
    };
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("doesn't start", set(plain.clone(), 0, b"GGML")),
        ("version 1", set(plain.clone(), 4, &1u32.to_le_bytes())),
        ("version 4", set(plain.clone(), 4, &4u32.to_le_bytes())),
        ("big-endian", set(plain.clone(), 4, &3u32.to_be_bytes())),
        ("tensor count", set(plain.clone(), 8, &many)),
        ("pair count", set(plain.clone(), 16, &many)),
        ("`k`: 4611686018427387904 values", Gguf::new().raw("k", 9, &array(0, 1 << 62)).bytes()),
        ("wanted at most", Gguf::new().raw("k", 9, &array(8, 1 << 40)).bytes()),
        ("k: 1000000", Gguf::new().raw("k", 9, &array(8, 1_000_000)).bytes()),
        ("nested more than 64", Gguf::new().raw("k", 9, &nested).bytes()),
        ("a bool of 2", Gguf::new().raw("k", 7, &[2]).bytes()),
        ("value type 13", Gguf::new().raw("k", 13, &[0; 8]).bytes()),
        ("element type 99", Gguf::new().raw("k", 9, &array(99, 0)).bytes()),
        ("utf-8", Gguf::new().raw("k", 8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff]).bytes()),
        ("k: a string of", Gguf::new().raw("k", 8, &many).bytes()),
        ("k: 999", Gguf::new().raw("k", 8, &999u64.to_le_bytes()).bytes()),
        ("`k` is given twice", Gguf::new().u32("k", 1).u32("k", 1).bytes()),
        ("general.alignment", t(Gguf::new().u32("general.alignment", 48)).bytes()),
        ("general.alignment", t(Gguf::new().u32("general.alignment", 0)).bytes()),
        ("general.alignment", t(Gguf::new().u32("general.alignment", 1 << 21)).bytes()),
        ("`t` is given twice", t(t(Gguf::new())).bytes()),
        ("5 dimensions", Gguf::new().tensor("t", &[1, 1, 1, 1, 1], 0, vec![0; 4]).bytes()),
        ("name of 64 bytes", Gguf::new().tensor(&"n".repeat(64), &[1], 0, vec![0; 4]).bytes()),
        ("type Q2_K can't be read", Gguf::new().tensor("t", &[256], 10, vec![0; 84]).bytes()),
        ("type 77 is unknown", Gguf::new().tensor("t", &[256], 77, vec![0; 84]).bytes()),
        ("33 values don't divide", Gguf::new().tensor("t", &[33, 32], 2, vec![0; 594]).bytes()),
        ("can be counted", Gguf::new().tensor("t", &[1 << 40, 1 << 40], 0, vec![]).bytes()),
        ("can be counted", Gguf::new().tensor("t", &[1 << 62], 0, vec![]).bytes()),
        ("the file ends at", Gguf::new().tensor("t", &[1 << 50], 0, vec![]).bytes()),
        ("`u`: offset 0, wanted 32", {
            let mut bytes = t(Gguf::new()).tensor("u", &[4], 0, vec![0; 16]).bytes();
            let at = bytes.windows(8).rposition(|w| w == 32u64.to_le_bytes()).unwrap();
            bytes[at] = 0;
            bytes
        }),
    ];
    for (wanted, bytes) in cases {
        std::fs::write(&file, bytes).unwrap();
        let why = GgufSource::open(&file).unwrap_err().to_string();
        assert!(why.contains(wanted) && why.contains("bad.gguf"), "{why}, wanted {wanted}");
    }
    for version in [2, 3] {
        let good =
            t(Gguf { version, ..Gguf::new() }).tensor("zero", &[0, 3], 0, vec![]).tensor("scalar", &[], 0, vec![0; 4]);
        std::fs::write(&file, good.bytes()).unwrap();
        let source = GgufSource::open(&file).unwrap();
        assert_eq!(source.info("zero").unwrap().shape, [3, 0]);
        assert_eq!(f32s(&source, "scalar"), [0.0]);
    }
}
