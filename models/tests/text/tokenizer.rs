use std::path::{Path, PathBuf};

use nibble_models::{GgufVocab, ModelError, Tokenizer};
use proptest::prelude::*;
use serde_json::json;

/// The character by which byte-level vocabularies write each byte.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return byte as char;
    }
    let rank = (0..byte).filter(|b| !printable(*b)).count() as u32;
    char::from_u32(0x100 + rank).unwrap()
}

/// A byte-level vocabulary: every byte, a few merges, three control tokens and one user-defined one.
fn byte_level(pre: &str) -> GgufVocab {
    let mut tokens: Vec<String> = (0..=255).map(|b| byte_char(b).to_string()).collect();
    let merges = ["t h", "th e", "Ġ the", "1 2", "12 3", "Ã ©"];
    tokens.extend(merges.iter().map(|m| m.replace(' ', "")));
    let plain = tokens.len();
    tokens.extend(["<s>", "</s>", "<|end|>", "<tool>"].map(String::from));
    let mut token_types = vec![1; plain];
    token_types.extend([3, 3, 3, 4]);
    GgufVocab {
        path: PathBuf::from("m.gguf"),
        model: "gpt2".into(),
        pre: Some(pre.into()),
        token_types,
        merges: merges.map(String::from).to_vec(),
        bos: Some(plain as u32),
        eos: vec![plain as u32 + 1, plain as u32 + 2],
        padding: Some(plain as u32 + 1),
        chat_template: Some("{{ bos_token }}".into()),
        context_length: Some(2048),
        tokens,
        ..GgufVocab::default()
    }
}

/// A sentencepiece vocabulary: unknown, control and byte tokens, then pieces with falling scores.
fn sentencepiece() -> GgufVocab {
    let pieces = ["▁t", "he", "▁the", "▁a", "in", "▁h", "▁he", "ll", "ell", "▁hell", "o", "hello", "lo", "▁▁", "é"];
    let letters = ["▁", "t", "h", "e", "a", "i", "n", "l", "o"].into_iter().filter(|l| !pieces.contains(l));
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..=255).map(|b| format!("<0x{b:02X}>")));
    let mut token_types = vec![2, 3, 3];
    token_types.extend([6; 256]);
    tokens.extend(pieces.into_iter().chain(letters).map(String::from));
    token_types.resize(tokens.len(), 1);
    let scores = (0..tokens.len()).map(|i| if i < 259 { 0.0 } else { 259.0 - i as f32 }).collect();
    GgufVocab {
        path: PathBuf::from("m.gguf"),
        model: "llama".into(),
        tokens,
        scores,
        token_types,
        bos: Some(1),
        eos: vec![2],
        unknown: Some(0),
        ..GgufVocab::default()
    }
}

fn load(vocab: &GgufVocab) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    vocab.to_files().unwrap().write(folder.path()).unwrap();
    Tokenizer::load(folder.path()).unwrap()
}

/// The tokens' own texts.
fn names(vocab: &GgufVocab, ids: &[u32]) -> Vec<String> {
    ids.iter().map(|id| vocab.tokens[*id as usize].clone()).collect()
}

const CUTS: [&str; 6] = ["smollm", "llama-bpe", "qwen2", "tekken", "gpt-2", "default"];

#[test]
fn words_are_cut_as_the_pre_tokenizer_says() {
    for (pre, digits) in CUTS.iter().zip([
        &["1", "2", "3", "4"][..],
        &["123", "4"],
        &["1", "2", "3", "4"],
        &["1", "2", "3", "4"],
        &["123", "4"],
        &["123", "4"],
    ]) {
        let vocab = byte_level(pre);
        let tokenizer = load(&vocab);
        assert_eq!(names(&vocab, &tokenizer.encode("1234", false).unwrap()), digits, "{pre}");
        assert_eq!(names(&vocab, &tokenizer.encode("the the", false).unwrap()), ["the", "Ġthe"], "{pre}");
    }
}

#[test]
fn control_tokens_are_found_in_text_and_left_out_of_it() {
    let vocab = byte_level("smollm");
    let tokenizer = load(&vocab);
    let ids = tokenizer.encode("<s>the<tool><|end|>", false).unwrap();
    assert_eq!(names(&vocab, &ids), ["<s>", "the", "<tool>", "<|end|>"]);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "the<tool>");
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "<s>the<tool><|end|>");
    assert_eq!(ids.iter().map(|id| tokenizer.is_special(*id)).collect::<Vec<_>>(), [true, false, false, true]);
}

#[test]
fn texts_begin_with_bos_where_the_vocabulary_asks_for_it() {
    let bos = |vocab: &GgufVocab| {
        let ids = load(vocab).encode("the", true).unwrap();
        (ids.first() == vocab.bos.as_ref(), ids.last() == vocab.eos.first())
    };
    for (pre, default) in CUTS.iter().zip([false, true, false, true, false, false]) {
        let vocab = byte_level(pre);
        assert_eq!(bos(&vocab), (default, false), "{pre}");
        assert_eq!(
            bos(&GgufVocab { add_bos: Some(true), add_eos: Some(true), ..vocab.clone() }),
            (true, true),
            "{pre}"
        );
        assert_eq!(bos(&GgufVocab { add_bos: Some(false), ..vocab }), (false, false), "{pre}");
    }
    assert_eq!(bos(&sentencepiece()), (true, false));
}

#[test]
fn ends_come_from_all_three_files() {
    let vocab = byte_level("smollm");
    let folder = tempfile::tempdir().unwrap();
    let write =
        |name: &str, value: serde_json::Value| std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    vocab.to_files().unwrap().write(folder.path()).unwrap();
    let tokenizer = Tokenizer::load(folder.path()).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (vocab.bos, vocab.eos.as_slice()));

    write("generation_config.json", json!({"eos_token_id": [5, 6]}));
    write("config.json", json!({"eos_token_id": 6, "bos_token_id": 9}));
    write("tokenizer_config.json", json!({"eos_token": {"content": "</s>"}, "bos_token": "<s>"}));
    let tokenizer = Tokenizer::load(folder.path()).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(9), &[5, 6, vocab.eos[0]][..]));
    assert!(tokenizer.is_eos(6) && !tokenizer.is_eos(7));

    write("tokenizer_config.json", json!({"eos_token": "<nonesuch>"}));
    assert!(Tokenizer::load(folder.path()).unwrap_err().to_string().contains("<nonesuch>"));
    write("tokenizer_config.json", json!({}));
    write("config.json", json!({"eos_token_id": 100_000}));
    let error = Tokenizer::load(folder.path()).unwrap_err().to_string();
    assert!(error.contains("config.json") && error.contains("100000"), "{error}");
}

#[test]
fn a_model_with_too_few_rows_is_refused() {
    let tokenizer = load(&byte_level("smollm"));
    assert_eq!(tokenizer.vocab_size(), 266);
    assert!(tokenizer.check_vocab(266).is_ok() && tokenizer.check_vocab(300).is_ok());
    assert!(tokenizer.check_vocab(265).unwrap_err().to_string().contains("265"));
    assert!(tokenizer.decode(&[266], true).unwrap_err().to_string().contains("266"));
}

#[test]
fn a_stream_holds_back_unfinished_characters() {
    let tokenizer = load(&byte_level("gpt-2"));
    let mut stream = tokenizer.stream(true, true);
    let bytes = "é😀".as_bytes();
    let shown: Vec<String> = bytes.iter().map(|b| stream.push(u32::from(*b)).unwrap().to_owned()).collect();
    assert_eq!(shown, ["", "é", "", "", "", "😀"]);
    assert_eq!(stream.push(0xf0).unwrap(), "");
    assert_eq!(stream.push(u32::from(b'a')).unwrap(), "\u{fffd}a");
    assert_eq!(stream.push(0xe2).unwrap(), "");
    assert_eq!(stream.finish(), "\u{fffd}");
    assert_eq!(stream.finish(), "");
    assert!(stream.push(9999).is_err());
}

#[test]
fn the_space_of_sentencepiece_is_taken_once_and_only_at_the_beginning() {
    let vocab = sentencepiece();
    let tokenizer = load(&vocab);
    let ids = tokenizer.encode("the a", false).unwrap();
    assert_eq!(names(&vocab, &ids), ["▁the", "▁a"]);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "the a");
    let mut inside = tokenizer.stream(true, false);
    assert_eq!(inside.push(ids[0]).unwrap(), " the");
    let mut after_bos = tokenizer.stream(true, true);
    assert_eq!(after_bos.push(1).unwrap(), "");
    assert_eq!(after_bos.push(ids[0]).unwrap(), "the");
    assert_eq!(tokenizer.decode(&tokenizer.encode("ü\n", false).unwrap(), true).unwrap(), "ü\n");
    let bare = load(&GgufVocab { add_space_prefix: Some(false), ..vocab });
    assert_eq!(bare.decode(&bare.encode(" the", false).unwrap(), true).unwrap(), " the");
}

/// Sentencepiece's own rule: join the neighbours whose union has the highest score, the first of equals, until none has.
fn by_scores(vocab: &GgufVocab, text: &str) -> Vec<String> {
    let text = format!("▁{}", text.replace(' ', "▁"));
    let score = |piece: &str| (259..vocab.tokens.len()).find(|&i| vocab.tokens[i] == piece).map(|i| vocab.scores[i]);
    let mut parts: Vec<String> = text.chars().map(String::from).collect();
    loop {
        let mut best: Option<(f32, usize)> = None;
        for at in 1..parts.len() {
            if let Some(s) = score(&format!("{}{}", parts[at - 1], parts[at]))
                && best.is_none_or(|(b, _)| s > b)
            {
                best = Some((s, at));
            }
        }
        let Some((_, at)) = best else { break };
        let right = parts.remove(at);
        parts[at - 1].push_str(&right);
    }
    let bytes = |part: String| match score(&part) {
        Some(_) => vec![part],
        None => part.bytes().map(|b| format!("<0x{b:02X}>")).collect(),
    };
    parts.into_iter().flat_map(bytes).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn merges_from_scores_join_what_sentencepiece_joins(text in "[theainlo zé]{1,24}") {
        thread_local!(static MODEL: (GgufVocab, Tokenizer) = (sentencepiece(), load(&sentencepiece())));
        MODEL.with(|(vocab, tokenizer)| {
            let found = names(vocab, &tokenizer.encode(&text, false).unwrap());
            prop_assert_eq!(found, by_scores(vocab, &text));
            Ok(())
        })?;
    }

    #[test]
    fn every_text_comes_back_and_streams_as_it_is(text in "\\PC{0,40}|[a-z0-9 \n\t\r]{0,40}", cut in 0usize..6) {
        thread_local!(static MODELS: Vec<Tokenizer> = CUTS.iter().map(|pre| load(&byte_level(pre))).collect());
        MODELS.with(|models| {
            let tokenizer = &models[cut];
            let ids = tokenizer.encode(&text, false).unwrap();
            // Qwen's vocabulary brings text to NFC, so that only what it says is compared.
            let decoded = tokenizer.decode(&ids, false).unwrap();
            if CUTS[cut] != "qwen2" {
                prop_assert_eq!(&decoded, &text);
            }
            let mut stream = tokenizer.stream(false, true);
            let mut streamed = String::new();
            for id in ids {
                streamed.push_str(stream.push(id).unwrap());
                prop_assert!(decoded.starts_with(&streamed));
            }
            streamed.push_str(stream.finish());
            prop_assert_eq!(streamed, decoded);
            Ok(())
        })?;
    }

    #[test]
    fn flipped_bits_are_an_error_or_a_tokenizer_but_never_a_panic(flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..4)) {
        for vocab in [byte_level("llama-bpe"), sentencepiece()] {
            let mut bytes = vocab.to_files().unwrap().tokenizer.to_string().into_bytes();
            for (at, bit) in &flips {
                let at = at.index(bytes.len());
                bytes[at] ^= 1 << bit;
            }
            if let Ok(tokenizer) = Tokenizer::from_json(Path::new("t.json"), &bytes)
                && let Ok(ids) = tokenizer.encode("the <s> é 123", true)
            {
                prop_assert!(tokenizer.decode(&ids, true).is_ok());
            }
        }
    }

    #[test]
    fn any_ids_decode_as_the_tokenizers_crate_does(ids in prop::collection::vec(0u32..266, 0..30), skip: bool) {
        thread_local!(static MODEL: (Tokenizer, tokenizers::Tokenizer) = {
            let files = byte_level("smollm").to_files().unwrap();
            let bytes = files.tokenizer.to_string();
            let ours = Tokenizer::from_json(Path::new("t.json"), bytes.as_bytes()).unwrap();
            (ours, tokenizers::Tokenizer::from_bytes(bytes).unwrap())
        });
        MODEL.with(|(ours, theirs)| {
            prop_assert_eq!(ours.decode(&ids, skip).unwrap(), theirs.decode(&ids, skip).unwrap());
            Ok(())
        })?;
    }
}

#[test]
fn a_damaged_tokenizer_is_refused_and_named() {
    let text = byte_level("smollm").to_files().unwrap().tokenizer.to_string();
    for cut in (0..text.len()).step_by(97) {
        let bytes = &text.as_bytes()[..cut];
        let error = Tokenizer::from_json(Path::new("m/tokenizer.json"), bytes).unwrap_err().to_string();
        assert!(error.contains("m/tokenizer.json"), "{error}");
    }
    let decoder = |decoder: serde_json::Value| {
        let mut value = byte_level("smollm").to_files().unwrap().tokenizer;
        value["decoder"] = decoder;
        Tokenizer::from_json(Path::new("t"), value.to_string().as_bytes()).map(|_| ()).unwrap_err().to_string()
    };
    assert!(decoder(json!(null)).contains("none"));
    let mut value = byte_level("smollm").to_files().unwrap().tokenizer;
    value["normalizer"] =
        json!({"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": 5}]});
    let error = Tokenizer::from_json(Path::new("t"), value.to_string().as_bytes()).unwrap_err().to_string();
    assert!(error.contains("Precompiled"), "{error}");
    let mut value = byte_level("smollm").to_files().unwrap().tokenizer;
    let template = json!({"type": "TemplateProcessing", "pair": [], "special_tokens": {},
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]});
    for processor in [template.clone(), json!({"type": "Sequence", "processors": [template]})] {
        value["post_processor"] = processor;
        let error = Tokenizer::from_json(Path::new("t"), value.to_string().as_bytes()).unwrap_err().to_string();
        assert!(error.contains("`<bos>`"), "{error}");
    }
    assert!(decoder(json!({"type": "WordPiece", "prefix": "##", "cleanup": true})).contains("WordPiece"));

    let folder = tempfile::tempdir().unwrap();
    assert!(matches!(Tokenizer::load(folder.path()), Err(ModelError::Io { .. })));
    std::fs::write(folder.path().join("tokenizer.model"), "x").unwrap();
    assert!(Tokenizer::load(folder.path()).unwrap_err().to_string().contains("tokenizer.model"));
}

#[test]
fn a_vocabulary_that_contradicts_itself_is_refused_by_key() {
    let good = byte_level("smollm");
    let change = |f: &dyn Fn(&mut GgufVocab)| {
        let mut vocab = good.clone();
        f(&mut vocab);
        vocab.to_files()
    };
    /// The field, what the error says of it, the damage.
    type Case<'a> = (&'a str, &'a str, &'a dyn Fn(&mut GgufVocab));
    let cases: [Case; 13] = [
        ("model", "wpm", &|v| v.model = "wpm".into()),
        ("pre", "nonesuch", &|v| v.pre = Some("nonesuch".into())),
        ("tokens", "missing", &|v| v.tokens.clear()),
        ("tokens", "twice", &|v| v.tokens[3] = v.tokens[4].clone()),
        ("tokens", "bytes", &|v| v.tokens[3] = "x".repeat(5000)),
        ("token_type", "1 entries", &|v| v.token_types = vec![1]),
        ("scores", "2 entries", &|v| v.scores = vec![0.0; 2]),
        ("merges", "merge 6", &|v| v.merges.push("q q".into())),
        ("merges", "merge 6", &|v| v.merges.push("th".into())),
        ("bos_token_id", "266", &|v| v.bos = Some(266)),
        ("eos_token_id", "266", &|v| v.eos.push(266)),
        ("unknown_token_id", "4294967295", &|v| v.unknown = Some(u32::MAX)),
        ("scores", "missing", &|v| v.model = "llama".into()),
    ];
    for (key, part, f) in cases {
        match change(f) {
            Err(ModelError::Field { path, field, why }) => {
                assert_eq!((path.as_path(), field), (Path::new("m.gguf"), format!("tokenizer.ggml.{key}")));
                assert!(why.contains(part), "{why}");
            }
            other => panic!("{key}: {other:?}"),
        }
    }
}
