//! Checkpoints become graphs that compute what others compute of them: candle's models, and an ONNX file that PyTorch
//! wrote of the same weights.

use super::{onnxruntime, samples};
use crate::assets::asset;
use crate::small::{numbers, value};
use candle_core::{DType, Device, IndexOp, Tensor as Candle};
use candle_nn::VarBuilder;
use candle_transformers::models::{bert, vit};
use nibble_models::graph::{GraphRunner, Rten, Tensor, Values};
use nibble_models::vision::export::export;
use nibble_quant::onnx::tensor::floats;
use nibble_quant::onnx::{External, Graph, Model};
use std::collections::HashMap;
use std::path::Path;

const DEVICE: Device = Device::Cpu;

pub(super) fn write(tensors: &HashMap<String, Candle>, config: &str, folder: &Path) {
    candle_core::safetensors::save(tensors, folder.join("model.safetensors")).unwrap();
    std::fs::write(folder.join("config.json"), config).unwrap();
}

pub(super) fn tensor(dims: &[usize], values: &[f32]) -> Candle {
    Candle::from_slice(values, dims, &DEVICE).unwrap()
}

/// The largest difference, over the largest value.
pub(super) fn difference(found: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    let largest = wanted.iter().fold(0f32, |m, v| m.max(v.abs()));
    found.iter().zip(wanted).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / largest
}

/// What PyTorch wrote as ONNX, taken apart again and built here, with the table of 37 x 37 positions resized.
#[test]
fn dinov2_is_built_as_pytorch_wrote_it() {
    let Some(path) = asset("vit", "assets/vit/vit_s_focus.onnx") else { return };
    let place = tempfile::tempdir().unwrap();
    let mut written = Model::open(&path).unwrap();
    let states = "/backbone/layernorm/Add_1_output_0";
    written.graph_mut().output = vec![value(states, &[1, 257, 384])];
    let mut tensors: HashMap<String, Candle> = HashMap::new();
    {
        let graph = Graph::new(written.graph()).unwrap();
        let get = |name: &str| {
            let t = graph.constant(name).unwrap_or_else(|| panic!("{name}"));
            let dims: Vec<usize> = t.dims.iter().map(|&d| d as usize).collect();
            tensor(&dims, &floats(t).unwrap())
        };
        for t in &written.graph().initializer {
            if let Some(name) = t.name().strip_prefix("backbone.") {
                tensors.insert(name.to_owned(), get(t.name()));
            }
        }
        // Matrices have lost their names, nodes haven't.
        for (_, node) in graph.nodes().filter(|(_, n)| n.is("MatMul")) {
            let Some(name) = node.name().strip_prefix("/backbone/").and_then(|n| n.strip_suffix("/MatMul")) else {
                continue;
            };
            if graph.constant(node.arg(1)).is_some() {
                let weight = get(node.arg(1)).t().unwrap().contiguous().unwrap();
                tensors.insert(format!("{}.weight", name.replace('/', ".")), weight);
            }
        }
        let table = [get("onnx::Concat_1957"), get("onnx::Reshape_1962")];
        tensors.insert("embeddings.position_embeddings".into(), Candle::cat(&table, 1).unwrap());
    }
    let config = r#"{"model_type": "dinov2", "num_attention_heads": 6, "layer_norm_eps": 1e-6, "hidden_act": "gelu"}"#;
    write(&tensors, config, place.path());
    let own = export(place.path(), Some(224)).unwrap();
    let (a, b) = (place.path().join("a.onnx"), place.path().join("b.onnx"));
    own.save(&b, External::Auto).unwrap();
    written.save(&a, External::Auto).unwrap();
    let data = samples(&own, 2, place.path());
    let words = ["compare", a.to_str().unwrap(), b.to_str().unwrap(), data.to_str().unwrap()];
    let Some(compared) = onnxruntime(&words) else { return };
    let (signal, noise) = (compared["signal"].as_f64().unwrap(), compared["noise"].as_f64().unwrap());
    assert!(signal > 0.0 && noise < 1e-9 * signal, "{compared}");
    let wrong = export(place.path(), Some(225)).unwrap_err().to_string();
    assert!(wrong.contains("225 pixels") && wrong.contains("patches of 14"), "{wrong}");
}

#[test]
fn bert_computes_what_candle_computes() {
    let Some(weights) = asset("minilm", "assets/minilm/model.safetensors") else { return };
    let folder = weights.parent().unwrap();
    let text = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
    value["hidden_act"] = "gelu".into();
    let config: bert::Config = serde_json::from_value(value).unwrap();
    let tensors = candle_core::safetensors::load(&weights, &DEVICE).unwrap();
    let oracle = bert::BertModel::load(VarBuilder::from_tensors(tensors, DType::F32, &DEVICE), &config).unwrap();
    let own = export(folder, None).unwrap();
    let wanted = ["last_hidden_state".to_owned()];
    let runner = Rten::new(&own, &wanted, 2).unwrap();
    let place = tempfile::tempdir().unwrap();
    own.save(&place.path().join("bert.onnx"), External::Auto).unwrap();
    // Two lengths; in the second the last tokens are masked, and what they are doesn't matter.
    for (ids, seen) in [(vec![101, 7592, 2088, 102], 4), ((0..40).map(|i| 1000 + 37 * i).collect(), 29)] {
        let n = ids.len();
        let mask: Vec<i64> = (0..n).map(|i| i64::from(i < seen)).collect();
        let of = |values: &[i64]| Candle::from_slice(values, (1, n), &DEVICE).unwrap();
        let feeds: HashMap<String, Candle> = HashMap::from([
            ("input_ids".to_owned(), of(&ids)),
            ("attention_mask".to_owned(), of(&mask)),
            ("token_type_ids".to_owned(), of(&vec![0; n])),
        ]);
        let exact = oracle.forward(&feeds["input_ids"], &feeds["token_type_ids"], Some(&feeds["attention_mask"]));
        let exact = exact.unwrap().i((0, ..seen)).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let fed: Vec<(String, Tensor)> = feeds
            .iter()
            .map(|(name, t)| {
                let values = t.flatten_all().unwrap().to_vec1::<i64>().unwrap();
                let values = Values::Int(values.iter().map(|&v| v as i32).collect());
                (name.clone(), Tensor { dims: vec![1, n], values })
            })
            .collect();
        let states = runner.run(&fed, &wanted).unwrap().remove(0);
        assert_eq!(states.dims, [1, n, 384]);
        let found = &states.as_floats("states").unwrap()[..seen * 384];
        assert!(difference(found, &exact) < 1e-4, "{}", difference(found, &exact));
        let path = |name: &str| place.path().join(name);
        candle_core::safetensors::save(&feeds, path("feeds.safetensors")).unwrap();
        let words = ["bert.onnx", "feeds.safetensors", "out.npy"].map(|name| path(name).to_str().unwrap().to_owned());
        if onnxruntime(&["run", &words[0], &words[1], &words[2]]).is_some() {
            let out = Candle::read_npy(path("out.npy")).unwrap().i((0, ..seen)).unwrap();
            let out = out.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(difference(&out, &exact) < 1e-4, "onnxruntime: {}", difference(&out, &exact));
        }
    }
}

/// A small ViT of random weights under Hugging Face's names.
pub(super) fn small_vit() -> HashMap<String, Candle> {
    let (d, wide) = (128, 96);
    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        ("vit.embeddings.cls_token".into(), vec![1, 1, d]),
        ("vit.embeddings.position_embeddings".into(), vec![1, 17, d]),
        ("vit.embeddings.patch_embeddings.projection.weight".into(), vec![d, 3, 4, 4]),
        ("vit.embeddings.patch_embeddings.projection.bias".into(), vec![d]),
        ("vit.layernorm.weight".into(), vec![d]),
        ("vit.layernorm.bias".into(), vec![d]),
        ("classifier.weight".into(), vec![7, d]),
        ("classifier.bias".into(), vec![7]),
    ];
    for layer in 0..2 {
        let linear = [
            ("attention.attention.query", d, d),
            ("attention.attention.key", d, d),
            ("attention.attention.value", d, d),
            ("attention.output.dense", d, d),
            ("intermediate.dense", wide, d),
            ("output.dense", d, wide),
        ];
        for (name, n, k) in linear {
            shapes.push((format!("vit.encoder.layer.{layer}.{name}.weight"), vec![n, k]));
            shapes.push((format!("vit.encoder.layer.{layer}.{name}.bias"), vec![n]));
        }
        for name in ["layernorm_before", "layernorm_after"] {
            shapes.push((format!("vit.encoder.layer.{layer}.{name}.weight"), vec![d]));
            shapes.push((format!("vit.encoder.layer.{layer}.{name}.bias"), vec![d]));
        }
    }
    let random = |(seed, (name, dims)): (usize, (String, Vec<usize>))| {
        let values: Vec<f32> = numbers(seed as u32 + 1, dims.iter().product()).iter().map(|v| v * 0.2).collect();
        (name, tensor(&dims, &values))
    };
    shapes.into_iter().enumerate().map(random).collect()
}

#[test]
fn a_vision_transformer_computes_what_candle_computes_under_either_set_of_names() {
    let tensors = small_vit();
    let config = vit::Config {
        hidden_size: 128,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        intermediate_size: 96,
        hidden_act: candle_nn::Activation::Gelu,
        layer_norm_eps: 1e-6,
        image_size: 16,
        patch_size: 4,
        num_channels: 3,
        qkv_bias: true,
    };
    let builder = VarBuilder::from_tensors(tensors.clone(), DType::F32, &DEVICE);
    let oracle = vit::Model::new(&config, 7, builder).unwrap();
    let pixels = numbers(99, 3 * 16 * 16);
    let exact = oracle.forward(&tensor(&[1, 3, 16, 16], &pixels)).unwrap();
    let exact = exact.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let run = |model: &Model| {
        let wanted = ["logits".to_owned()];
        let runner = Rten::new(model, &wanted, 1).unwrap();
        let image = Tensor::floats("image", &[1, 3, 16, 16], pixels.clone()).unwrap();
        runner.run(&[("image".into(), image)], &wanted).unwrap().remove(0).as_floats("logits").unwrap().to_vec()
    };
    let place = tempfile::tempdir().unwrap();
    let text = r#"{"num_attention_heads": 2, "layer_norm_eps": 1e-6, "hidden_act": "gelu"}"#;
    write(&tensors, text, place.path());
    let own = run(&export(place.path(), None).unwrap());
    assert!(difference(&own, &exact) < 1e-4, "{own:?} and {exact:?}");

    // timm's names: one matrix for query, key and value; heads of 64 channels without being told.
    let mut timm: HashMap<String, Candle> = HashMap::new();
    let renamed = [
        ("vit.embeddings.cls_token", "cls_token"),
        ("vit.embeddings.position_embeddings", "pos_embed"),
        ("vit.embeddings.patch_embeddings.projection.", "patch_embed.proj."),
        ("vit.layernorm.", "norm."),
        ("classifier.", "head."),
        ("vit.encoder.layer.", "blocks."),
        (".attention.output.dense.", ".attn.proj."),
        (".intermediate.dense.", ".mlp.fc1."),
        (".output.dense.", ".mlp.fc2."),
        (".layernorm_before.", ".norm1."),
        (".layernorm_after.", ".norm2."),
    ];
    for (name, tensor) in &tensors {
        if !name.contains(".attention.attention.") {
            let name = renamed.iter().fold(name.clone(), |name, (from, to)| name.replace(from, to));
            timm.insert(name, tensor.clone());
        }
    }
    for layer in 0..2 {
        for part in ["weight", "bias"] {
            let of = |name: &str| &tensors[&format!("vit.encoder.layer.{layer}.attention.attention.{name}.{part}")];
            let all = Candle::cat(&[of("query"), of("key"), of("value")], 0).unwrap();
            timm.insert(format!("blocks.{layer}.attn.qkv.{part}"), all);
        }
    }
    let other = tempfile::tempdir().unwrap();
    candle_core::safetensors::save(&timm, other.path().join("model.safetensors")).unwrap();
    assert_eq!(run(&export(other.path(), None).unwrap()), own);

    // What isn't as it should be is named.
    let error = |change: &dyn Fn(&mut HashMap<String, Candle>), config: &str| {
        let place = tempfile::tempdir().unwrap();
        let mut tensors = tensors.clone();
        change(&mut tensors);
        write(&tensors, config, place.path());
        export(place.path(), None).unwrap_err().to_string()
    };
    let short = |name: &'static str, dims: &'static [usize]| {
        move |tensors: &mut HashMap<String, Candle>| {
            tensors.insert(name.into(), tensor(dims, &vec![0.5; dims.iter().product()]));
        }
    };
    let gone = |tensors: &mut HashMap<String, Candle>| {
        tensors.remove("vit.encoder.layer.1.output.dense.weight");
    };
    let query = "vit.encoder.layer.1.attention.attention.query.weight";
    for (said, wanted) in [
        (error(&gone, text), "vit.encoder.layer.1.output.dense.weight"),
        (error(&short(query, &[128, 64]), text), "query.weight` has shape [128, 64], [128, 128] was wanted"),
        (error(&short("vit.embeddings.position_embeddings", &[1, 16, 128]), text), "16 positions"),
        (error(&short("classifier.weight", &[7, 64]), text), "classifier over 64 channels"),
        (error(&|_| (), r#"{"num_attention_heads": 3}"#), "3 attention heads don't divide 128"),
        (error(&|_| (), r#"{"num_attention_heads": 2, "hidden_act": "mish"}"#), "`hidden_act`: `mish`"),
    ] {
        assert!(said.contains(wanted), "{said}");
    }
}

#[test]
fn a_checkpoint_of_another_architecture_is_refused_and_told_what_there_is() {
    let place = tempfile::tempdir().unwrap();
    write(&HashMap::from([("model.layers.0.w".to_owned(), tensor(&[1], &[1.0]))]), "{}", place.path());
    let error = export(place.path(), None).unwrap_err().to_string();
    assert!(error.contains("no architecture") && error.contains("DINOv2") && error.contains("BERT"), "{error}");
}
