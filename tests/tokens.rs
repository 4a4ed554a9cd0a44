//! The real SmolLM2's tokenizer and chat template, rebuilt from its GGUF file, against ids worked out in Python.

use nibble_models::{ChatTemplate, GgufVocab, Message, RenderOptions, Tokenizer};
use nibble_quant::format::gguf::GgufSource;

use crate::assets::asset;
use crate::fetched::oracle;

const GOLDEN: &str = include_str!("goldens/smollm2_tokens.json");

/// The tokenizer's files in a folder, written by the import.
fn rebuilt() -> Option<tempfile::TempDir> {
    let path = asset("smollm2", "assets/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")?;
    let source = GgufSource::open(&path).unwrap();
    let folder = tempfile::tempdir().unwrap();
    GgufVocab::from_metadata(&path, source.metadata()).unwrap().to_files().unwrap().write(folder.path()).unwrap();
    Some(folder)
}

/// The golden texts with their ids.
fn cases() -> Vec<(String, Vec<u32>)> {
    let golden: serde_json::Value = serde_json::from_str(GOLDEN).unwrap();
    let cases = golden["cases"].as_array().unwrap().iter();
    cases.map(|c| (c["text"].as_str().unwrap().to_owned(), serde_json::from_value(c["ids"].clone()).unwrap())).collect()
}

#[test]
fn smollm2_texts_have_the_ids_of_its_own_merges() {
    let Some(folder) = rebuilt() else { return };
    let tokenizer = Tokenizer::load(folder.path()).unwrap();
    assert_eq!((tokenizer.vocab_size(), tokenizer.bos(), tokenizer.eos()), (49152, Some(1), &[2][..]));
    let cases = cases();
    assert!(cases.len() >= 30);
    for (text, ids) in cases {
        assert_eq!(tokenizer.encode(&text, false).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.encode(&text, true).unwrap(), ids, "nothing is added to {text:?}");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    }
}

#[test]
fn smollm2_speaks_by_its_own_template() {
    let Some(folder) = rebuilt() else { return };
    let template = ChatTemplate::load(folder.path()).unwrap().expect("SmolLM2 has a chat template");
    let prompt = template.render(&[Message::new("user", "Hi")], &RenderOptions::default()).unwrap();
    let system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";
    let wanted =
        format!("<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(prompt, wanted);
}

#[test]
fn the_rebuilt_tokenizer_is_one_for_hugging_face() {
    let (Some(folder), Some(mut python)) = (rebuilt(), oracle()) else { return };
    let golden = folder.path().join("golden.json");
    std::fs::write(&golden, GOLDEN).unwrap();
    let script = "import json, sys, tokenizers
t = tokenizers.Tokenizer.from_file(sys.argv[1])
for case in json.load(open(sys.argv[2]))['cases']:
    ids = t.encode(case['text'], add_special_tokens=False).ids
    assert ids == case['ids'], (case['text'], ids, case['ids'])
    assert t.decode(ids, skip_special_tokens=False) == case['text'], case['text']";
    let status = python.args(["-c", script]).arg(folder.path().join("tokenizer.json")).arg(&golden).status();
    assert!(status.expect("python3 starts").success());
}
