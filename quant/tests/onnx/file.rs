//! Reading and writing: the whole schema survives, damage is named, external data is guarded.

use bytes::Bytes;
use nibble_quant::onnx::proto::*;
use nibble_quant::onnx::{External, Model, tensor, wire};
use prost::Message;
use std::path::Path;

/// Made by scripts/oracles/onnx_schema.py from the `onnx` package's own message descriptors.
const EVERY_FIELD: &[u8] = include_bytes!("../data/onnx_every_field.onnx");

fn decode(bytes: &[u8]) -> Result<Model, String> {
    Model::decode(Bytes::copy_from_slice(bytes), Path::new("m.onnx")).map_err(|e| e.to_string())
}

#[test]
fn every_field_of_the_schema_is_written_back_byte_for_byte() {
    let model = decode(EVERY_FIELD).unwrap();
    assert!(model.unknown.is_empty(), "{:?}", model.unknown);
    assert!(model.proto.encode_to_vec() == EVERY_FIELD);
}

#[test]
fn weights_stay_ranges_of_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.onnx");
    std::fs::write(&path, model_with_weights(5000).encode_to_vec()).unwrap();
    let model = Model::open(&path).unwrap();
    let raws: Vec<_> =
        model.graph().initializer.iter().map(|t| t.raw_data.as_ref().unwrap().as_ptr() as usize).collect();
    // Slices of one mapping keep the distance that they have in the file.
    let file = std::fs::read(&path).unwrap();
    let find = |i: usize| {
        let wanted = model.graph().initializer[i].raw_data.as_ref().unwrap();
        file.windows(wanted.len()).position(|w| w == wanted).unwrap()
    };
    assert_eq!(raws[1] - raws[0], find(1) - find(0));
}

#[test]
fn truncated_files_are_refused_by_name_and_place() {
    for len in 0..EVERY_FIELD.len() {
        match decode(&EVERY_FIELD[..len]) {
            // A cut between two fields of the model leaves a shorter model.
            Ok(model) => assert!(model.proto.encode_to_vec() == EVERY_FIELD[..len], "{len}"),
            Err(e) => assert!(e.starts_with("m.onnx: "), "{e}"),
        }
    }
    let e = decode(&EVERY_FIELD[..3000]).unwrap_err();
    assert!(e.contains("model.graph: ") || e.contains("`graph` should have"), "{e}");
}

#[test]
fn flipped_bits_give_a_model_or_a_named_error() {
    let mut refused = 0;
    for bit in (0..EVERY_FIELD.len() * 8).step_by(7) {
        let mut bytes = EVERY_FIELD.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        if let Err(e) = decode(&bytes) {
            refused += 1;
            assert!(e.starts_with("m.onnx: "), "{e}");
            assert!(!e.contains("failed to decode"), "the walk let through what prost refuses: {e}");
        }
    }
    assert!(refused > 1000, "{refused}");
}

#[test]
fn garbage_nesting_and_bombs_are_refused() {
    // Graphs (field 7 of the model) of nodes (1) of attributes (5) of graphs (6) of nodes ...
    let tags = |depth: usize| if depth == 0 { 0x3a } else { [0x32, 0x0a, 0x2a][depth % 3] };
    let mut nested = Vec::new();
    for depth in (0..400).rev() {
        let mut outer = vec![tags(depth)];
        prost::encoding::encode_varint(nested.len() as u64, &mut outer);
        outer.extend(&nested);
        nested = outer;
    }
    // Two bytes a node: 4 million nodes would take more than 1 GiB.
    let nodes = [0x0a, 0x00].repeat(4 << 20);
    let mut bomb = vec![0x3a];
    prost::encoding::encode_varint(nodes.len() as u64, &mut bomb);
    bomb.extend(nodes);
    let cases: [(&str, Vec<u8>, &str); 8] = [
        ("empty", vec![], "holds no graph"),
        ("text", b"hello, this is no model".to_vec(), "m.onnx: model"),
        ("nested", nested, "nested deeper"),
        ("bomb", bomb, "MiB of graph structure"),
        ("field zero", vec![0x02, 0x00], "field number 0"),
        ("group", vec![0x0b], "wire type 3"),
        ("long number", [vec![0x08], vec![0xff; 11]].concat(), "more than 64 bits"),
        ("huge length", vec![0x3a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f], "0 are left"),
    ];
    for (name, bytes, wanted) in cases {
        let e = decode(&bytes).err().unwrap_or_default();
        assert!(e.contains(wanted), "{name}: {e}");
    }
}

#[test]
fn errors_name_the_place_in_the_model() {
    let mut model = model_with_weights(8);
    model.graph.as_mut().unwrap().node[0]
        .attribute
        .push(AttributeProto { name: Some("axis".into()), ..Default::default() });
    let mut bytes = model.encode_to_vec();
    let at = bytes.windows(4).position(|w| w == b"axis").unwrap();
    bytes[at] = 0xff;
    assert_eq!(decode(&bytes).unwrap_err(), "m.onnx: model.graph.node[0].attribute[0]: `name` isn't UTF-8");
}

#[test]
fn fields_outside_of_the_schema_are_reported() {
    let mut bytes = model_with_weights(8).encode_to_vec();
    bytes.extend([0xf8, 0x01, 0x05]); // field 31, varint 5
    let survey = wire::survey(&bytes).unwrap();
    assert_eq!(survey.unknown.into_iter().collect::<Vec<_>>(), ["ModelProto field 31"]);
}

/// Two initializers of `n` floats and a node.
fn model_with_weights(n: usize) -> ModelProto {
    let values: Vec<f32> = (0..n).map(|i| i as f32).collect();
    let graph = GraphProto {
        name: Some("g".into()),
        node: vec![NodeProto {
            op_type: Some("Add".into()),
            input: vec!["a".into(), "b".into()],
            output: vec!["c".into()],
            ..Default::default()
        }],
        initializer: vec![
            tensor::from_f32("a", &[n], &values),
            tensor::from_f32("b", &[n], &values.iter().map(|v| v * 2.0).collect::<Vec<_>>()),
        ],
        ..Default::default()
    };
    ModelProto { ir_version: Some(10), graph: Some(graph), ..Default::default() }
}

#[test]
fn external_data_makes_the_round_trip_and_the_source_is_never_written_over() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a.onnx"), dir.path().join("b.onnx"));
    let proto = model_with_weights(5000);
    let model = Model { proto: proto.clone(), ..Default::default() };
    model.save(&a, External::Always).unwrap();
    let slim = ModelProto::decode(std::fs::read(&a).unwrap().as_slice()).unwrap();
    let entries = &slim.graph.as_ref().unwrap().initializer[1].external_data;
    let entries: Vec<_> = entries.iter().map(|e| (e.key(), e.value())).collect();
    assert_eq!(entries, [("location", "a.onnx.data"), ("offset", "20480"), ("length", "20000")]);
    assert_eq!(std::fs::metadata(dir.path().join("a.onnx.data")).unwrap().len(), 40480);

    let back = Model::open(&a).unwrap();
    assert_eq!(back.proto, proto);
    assert_eq!(back.files.len(), 2);
    back.save(&b, External::Auto).unwrap();
    assert_eq!(Model::open(&b).unwrap().proto, proto);
    assert!(!dir.path().join("b.onnx.data").exists());
    let e = back.save(&a, External::Auto).unwrap_err().to_string();
    assert!(e.contains("a.onnx: is what the model was read from"), "{e}");
    // A target whose data file would replace the source's.
    std::fs::rename(&a, dir.path().join("other.onnx")).unwrap();
    let moved = Model::open(&dir.path().join("other.onnx")).unwrap();
    let e = moved.save(&a, External::Always).unwrap_err().to_string();
    assert!(e.contains("a.onnx.data: is what the model was read from"), "{e}");
    let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!names.iter().any(|n| n.to_string_lossy().starts_with(".nibble")), "{names:?}");
}

#[test]
fn external_data_outside_of_the_folder_or_the_file_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(root.path().join("secret"), [0u8; 64]).unwrap();
    std::fs::write(dir.join("w.bin"), [0u8; 64]).unwrap();
    std::os::unix::fs::symlink(root.path().join("secret"), dir.join("link.bin")).unwrap();
    let absolute = root.path().join("secret");
    let cases = [
        ("../secret", "0", "32", "leads outside"),
        ("w/../../secret", "0", "32", "leads outside"),
        (absolute.to_str().unwrap(), "0", "32", "leads outside"),
        ("link.bin", "0", "32", "leads outside"),
        ("", "0", "32", "no location"),
        ("missing.bin", "0", "32", "missing.bin"),
        ("w.bin", "0", "31", "asks for 32"),
        ("w.bin", "40", "32", "has 64"),
        ("w.bin", "18446744073709551600", "32", "has 64"),
        ("w.bin", "-1", "32", "isn't a number"),
        ("w.bin", "0", "many", "isn't a number"),
    ];
    for (location, offset, length, wanted) in cases {
        let entry = |k: &str, v: &str| StringStringEntryProto { key: Some(k.into()), value: Some(v.into()) };
        let tensor = TensorProto {
            name: Some("w".into()),
            dims: vec![2, 4],
            data_type: Some(DataType::Float as i32),
            data_location: Some(DataLocation::External as i32),
            external_data: vec![entry("location", location), entry("offset", offset), entry("length", length)],
            ..Default::default()
        };
        let graph = GraphProto { initializer: vec![tensor], ..Default::default() };
        let path = dir.join("m.onnx");
        std::fs::write(&path, ModelProto { graph: Some(graph), ..Default::default() }.encode_to_vec()).unwrap();
        let e = Model::open(&path).unwrap_err().to_string();
        assert!(e.contains(wanted), "{location} {offset} {length}: {e}");
    }
}

#[test]
fn typed_and_raw_tensors_hold_the_same_values() {
    let dims = vec![3];
    let typed = |ty: DataType| TensorProto {
        name: Some("t".into()),
        dims: dims.clone(),
        data_type: Some(ty as i32),
        ..Default::default()
    };
    let raw = |ty, bytes: &[u8]| TensorProto { raw_data: Some(Bytes::copy_from_slice(bytes)), ..typed(ty) };
    let ints = |v: [i32; 3], ty| TensorProto { int32_data: v.to_vec(), ..typed(ty) };
    let cases: Vec<(TensorProto, [i64; 3])> = vec![
        (ints([-1, 0, 127], DataType::Int8), [-1, 0, 127]),
        (raw(DataType::Int8, &[255, 0, 127]), [-1, 0, 127]),
        (raw(DataType::Uint8, &[255, 0, 127]), [255, 0, 127]),
        (raw(DataType::Int16, &[0xff, 0xff, 1, 0, 0, 0x80]), [-1, 1, -32768]),
        (raw(DataType::Uint16, &[0xff, 0xff, 1, 0, 0, 0x80]), [65535, 1, 32768]),
        (raw(DataType::Int4, &[0x8f, 0x07]), [-1, -8, 7]),
        (raw(DataType::Uint4, &[0x8f, 0x07]), [15, 8, 7]),
        (raw(DataType::Int2, &[0b00_01_10_11]), [-1, -2, 1]),
        (TensorProto { int32_data: vec![0x8f, 7], ..typed(DataType::Int4) }, [-1, -8, 7]),
        (TensorProto { int64_data: vec![i64::MIN, 0, 5], ..typed(DataType::Int64) }, [i64::MIN, 0, 5]),
        (TensorProto { uint64_data: vec![7, 0, 5], ..typed(DataType::Uint32) }, [7, 0, 5]),
        (tensor::from_i32("t", &[3], &[i32::MIN, 0, 9]), [i64::from(i32::MIN), 0, 9]),
        (tensor::from_i64("t", &[3], &[i64::MAX, 0, 9]), [i64::MAX, 0, 9]),
        (tensor::from_4bit("t", &[3], &[-8, 7, -1], true), [-8, 7, -1]),
        (tensor::from_16("t", &[3], &[65535, 0, 1], false), [65535, 0, 1]),
    ];
    for (tensor, wanted) in cases {
        assert_eq!(tensor::ints(&tensor).unwrap(), wanted, "{tensor:?}");
        assert!(tensor::floats(&tensor).is_err());
    }
    let floats: Vec<TensorProto> = vec![
        tensor::from_f32("t", &[3], &[1.0, -0.5, 2.0]),
        TensorProto { float_data: vec![1.0, -0.5, 2.0], ..typed(DataType::Float) },
        TensorProto { double_data: vec![1.0, -0.5, 2.0], ..typed(DataType::Double) },
        TensorProto { int32_data: vec![0x3c00, 0xb800, 0x4000], ..typed(DataType::Float16) },
        TensorProto { int32_data: vec![0x3f80, 0xbf00, 0x4000], ..typed(DataType::Bfloat16) },
        raw(DataType::Float16, &[0, 0x3c, 0, 0xb8, 0, 0x40]),
        raw(DataType::Bfloat16, &[0x80, 0x3f, 0, 0xbf, 0, 0x40]),
    ];
    for tensor in floats {
        assert_eq!(tensor::floats(&tensor).unwrap(), [1.0, -0.5, 2.0], "{tensor:?}");
    }
}

#[test]
fn tensors_whose_data_does_not_fit_their_shape_are_refused_by_name() {
    let float = |dims: &[i64], bytes: usize| TensorProto {
        name: Some("w".into()),
        dims: dims.to_vec(),
        data_type: Some(DataType::Float as i32),
        raw_data: Some(vec![0; bytes].into()),
        ..Default::default()
    };
    let cases = [
        (float(&[2, 2], 15), "15 bytes of data, shape [2, 2] asks for 16"),
        (float(&[-1], 4), "dimension -1"),
        (float(&[i64::MAX, i64::MAX], 4), "too many elements"),
        (float(&[1 << 40, 1 << 20], 4), "too many elements"),
        (TensorProto { float_data: vec![1.0], raw_data: None, ..float(&[2], 0) }, "1 values, shape [2] asks for 2"),
        (TensorProto { data_type: Some(77), ..float(&[1], 4) }, "Undefined"),
        (TensorProto { data_type: Some(DataType::String as i32), ..float(&[1], 4) }, "String"),
    ];
    for (tensor, wanted) in cases {
        let e = tensor::floats(&tensor).unwrap_err().to_string();
        assert!(e.starts_with("tensor `w`: ") && e.contains(wanted), "{e}");
    }
}
