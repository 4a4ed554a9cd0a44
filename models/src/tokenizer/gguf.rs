//! A tokenizer rebuilt from GGUF metadata, as the files that Hugging Face tokenizers and transformers read.
//!
//! ```text
//! tokenizer.ggml.model = gpt2    byte-level BPE: tokens + merges, words cut as `tokenizer.ggml.pre` names
//! tokenizer.ggml.model = llama   sentencepiece BPE: tokens + scores, from which the merges follow
//! ```

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use nibble_quant::format::gguf::Metadata;
use serde_json::{Map, Value, json};

use super::{merges, pre};
use crate::error::{ModelError, Result};

/// Longest token accepted, in bytes; splitting a piece in every way takes time quadratic in it.
const MAX_TOKEN_BYTES: usize = 4096;

/// What a token is for, by GGUF's numbers.
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

/// The tokenizer that a GGUF file carries under `tokenizer.`, key by key.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GgufVocab {
    /// The file that it comes from, for errors.
    pub path: PathBuf,
    /// `tokenizer.ggml.model`: `gpt2` or `llama`.
    pub model: String,
    /// `tokenizer.ggml.pre`: how text is cut into words.
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`, by id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.scores`, one a token; sentencepiece only.
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.token_type`, one a token; empty where all are normal.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.merges`, as `left right`; byte-level only.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`, `eot_token_id` and `eom_token_id`, as far as they are there.
    pub eos: Vec<u32>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unknown: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`.
    pub padding: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`.
    pub add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`: sentencepiece writes a space before the text.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
    /// `ARCH.context_length`.
    pub context_length: Option<u64>,
}

/// The tokenizer's files of a Hugging Face checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenizerFiles {
    /// `tokenizer.json`
    pub tokenizer: Value,
    /// `tokenizer_config.json`, chat template included.
    pub tokenizer_config: Value,
    /// `generation_config.json`: the tokens that begin, end and pad a sequence.
    pub generation_config: Value,
}

impl TokenizerFiles {
    /// Writes the three files into a folder.
    ///
    /// # Errors
    /// A file can't be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let files = [
            ("tokenizer.json", &self.tokenizer),
            ("tokenizer_config.json", &self.tokenizer_config),
            ("generation_config.json", &self.generation_config),
        ];
        for (name, value) in files {
            let path = folder.join(name);
            std::fs::write(&path, format!("{value:#}\n")).map_err(ModelError::io(&path))?;
        }
        Ok(())
    }
}

impl GgufVocab {
    /// Reads the vocabulary of a GGUF file; `path` is what errors call it.
    ///
    /// # Errors
    /// The file has no vocabulary, or a key holds another type than its name promises.
    pub fn from_metadata(path: &Path, metadata: &Metadata) -> Result<Self> {
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        let id = |name: &str| metadata.u32(&key(name));
        let text = |name: &str| metadata.str(name).map(|text| text.map(str::to_owned));
        let architecture = metadata.str("general.architecture")?.unwrap_or_default();
        let ends = [id("eos_token_id")?, id("eot_token_id")?, id("eom_token_id")?];
        let mut eos: Vec<u32> = Vec::new();
        for end in ends.into_iter().flatten() {
            if !eos.contains(&end) {
                eos.push(end);
            }
        }
        Ok(Self {
            path: path.to_path_buf(),
            model: metadata.need_str("tokenizer.ggml.model")?.to_owned(),
            pre: text("tokenizer.ggml.pre")?,
            tokens: metadata.need_strings("tokenizer.ggml.tokens")?.to_vec(),
            scores: metadata.f32s("tokenizer.ggml.scores")?.unwrap_or_default().to_vec(),
            token_types: metadata.i32s("tokenizer.ggml.token_type")?.unwrap_or_default(),
            merges: metadata.strings("tokenizer.ggml.merges")?.unwrap_or_default().to_vec(),
            bos: id("bos_token_id")?,
            eos,
            unknown: id("unknown_token_id")?,
            padding: id("padding_token_id")?,
            add_bos: metadata.bool("tokenizer.ggml.add_bos_token")?,
            add_eos: metadata.bool("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: metadata.bool("tokenizer.ggml.add_space_prefix")?,
            chat_template: text("tokenizer.chat_template")?,
            context_length: metadata.u32(&format!("{architecture}.context_length"))?.map(u64::from),
        })
    }

    /// Translates the vocabulary.
    ///
    /// # Errors
    /// The model or the cut is unknown, lists differ in length, a token repeats, an id is beyond the vocabulary, or a
    /// merge isn't made of tokens.
    pub fn to_files(&self) -> Result<TokenizerFiles> {
        self.check()?;
        let (tokenizer, add_bos) = match self.model.as_str() {
            "gpt2" => self.byte_level()?,
            "llama" => self.sentencepiece()?,
            other => return Err(self.refuse("tokenizer.ggml.model", format!("`{other}`; known: gpt2, llama"))),
        };
        Ok(TokenizerFiles {
            tokenizer,
            tokenizer_config: self.tokenizer_config(add_bos),
            generation_config: self.generation_config(),
        })
    }

    fn refuse(&self, key: &str, why: impl Into<String>) -> ModelError {
        ModelError::Field { path: self.path.clone(), field: key.to_owned(), why: why.into() }
    }

    fn check(&self) -> Result<()> {
        let len = self.tokens.len();
        if len == 0 {
            return Err(self.refuse("tokenizer.ggml.tokens", "missing or empty"));
        }
        let lists = [("token_type", self.token_types.len()), ("scores", self.scores.len())];
        for (key, found) in lists {
            if found != 0 && found != len {
                return Err(self.refuse(&format!("tokenizer.ggml.{key}"), format!("{found} entries for {len} tokens")));
            }
        }
        let mut seen = HashSet::with_capacity(len);
        for (id, token) in self.tokens.iter().enumerate() {
            if token.len() > MAX_TOKEN_BYTES {
                let why = format!("token {id} has {} bytes, at most {MAX_TOKEN_BYTES}", token.len());
                return Err(self.refuse("tokenizer.ggml.tokens", why));
            }
            if !seen.insert(token.as_str()) {
                return Err(self.refuse("tokenizer.ggml.tokens", format!("token {id}, {token:?}, appears twice")));
            }
        }
        let ids = [("bos", self.bos), ("unknown", self.unknown), ("padding", self.padding)];
        let eos = self.eos.iter().map(|id| ("eos", Some(*id)));
        for (key, id) in ids.into_iter().chain(eos) {
            if let Some(id) = id.filter(|id| *id as usize >= len) {
                let why = format!("{id}, wanted an id below {len}");
                return Err(self.refuse(&format!("tokenizer.ggml.{key}_token_id"), why));
            }
        }
        Ok(())
    }

    fn kind(&self, id: usize) -> i32 {
        self.token_types.get(id).copied().unwrap_or(1)
    }

    /// `tokenizer.json` of a byte-level BPE vocabulary, and whether a text begins with `bos`.
    fn byte_level(&self) -> Result<(Value, bool)> {
        let name = self.pre.as_deref().unwrap_or("default");
        let Some(pre) = pre::find(name) else {
            let why = format!("`{name}`; known: {}", pre::known_names());
            return Err(self.refuse("tokenizer.ggml.pre", why));
        };
        let known: HashSet<&str> = self.tokens.iter().map(String::as_str).collect();
        let mut merges = Vec::with_capacity(self.merges.len());
        for (rank, merge) in self.merges.iter().enumerate() {
            let pair = merge.split_once(' ').filter(|(left, right)| {
                known.contains(left) && known.contains(right) && known.contains(format!("{left}{right}").as_str())
            });
            match pair {
                Some((left, right)) => merges.push(json!([left, right])),
                None => {
                    let why = format!("merge {rank}, {merge:?}, isn't two tokens that make a third");
                    return Err(self.refuse("tokenizer.ggml.merges", why));
                }
            }
        }
        let add_bos = self.add_bos.unwrap_or(pre.add_bos);
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true});
        let post = match self.template(add_bos) {
            Some(template) => json!({"type": "Sequence", "processors": [bytes, template]}),
            None => bytes,
        };
        let json = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added_tokens(),
            "normalizer": if pre.nfc { json!({"type": "NFC"}) } else { Value::Null },
            "pre_tokenizer": pre.to_json(),
            "post_processor": post,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": pre.ignore_merges,
                "vocab": self.vocab(),
                "merges": merges,
            },
        });
        Ok((json, add_bos))
    }

    /// `tokenizer.json` of a sentencepiece BPE vocabulary, and whether a text begins with `bos`.
    fn sentencepiece(&self) -> Result<(Value, bool)> {
        if self.scores.len() != self.tokens.len() {
            return Err(self.refuse("tokenizer.ggml.scores", format!("missing, wanted {} scores", self.tokens.len())));
        }
        // Only normal pieces are made by merging; the others stand for themselves.
        let pieces: Vec<(&str, f32)> = (0..self.tokens.len())
            .filter(|&id| !matches!(self.kind(id), UNKNOWN | CONTROL | USER_DEFINED | BYTE))
            .map(|id| (self.tokens[id].as_str(), self.scores[id]))
            .collect();
        let unknown = self.unknown.map(|id| self.tokens[id as usize].as_str());
        let add_bos = self.add_bos.unwrap_or(true);
        let prefix = self.add_space_prefix.unwrap_or(true);
        let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if prefix {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let json = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added_tokens(),
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": null,
            "post_processor": self.template(add_bos),
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": unknown,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": true,
                "byte_fallback": true,
                "ignore_merges": false,
                "vocab": self.vocab(),
                "merges": merges::from_scores(&pieces),
            },
        });
        Ok((json, add_bos))
    }

    fn vocab(&self) -> Map<String, Value> {
        self.tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect()
    }

    /// Tokens that are found in text before it is cut into words.
    fn added_tokens(&self) -> Vec<Value> {
        let mut added = Vec::new();
        for (id, token) in self.tokens.iter().enumerate() {
            let special = match self.kind(id) {
                CONTROL | UNKNOWN => true,
                USER_DEFINED => false,
                _ => continue,
            };
            added.push(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": special
            }));
        }
        added
    }

    /// What stands around a text: `bos` before it and `eos` after it, as far as the file asks for them.
    fn template(&self, add_bos: bool) -> Option<Value> {
        let bos = self.bos.filter(|_| add_bos);
        let eos = self.eos.first().copied().filter(|_| self.add_eos.unwrap_or(false));
        if bos.is_none() && eos.is_none() {
            return None;
        }
        let name = |id: u32| self.tokens[id as usize].as_str();
        let around = |text: &str, kind: u32| {
            let mut items = Vec::new();
            items.extend(bos.map(|id| json!({"SpecialToken": {"id": name(id), "type_id": kind}})));
            items.push(json!({"Sequence": {"id": text, "type_id": kind}}));
            items.extend(eos.map(|id| json!({"SpecialToken": {"id": name(id), "type_id": kind}})));
            items
        };
        let (single, second) = (around("A", 0), around("B", 1));
        let pair: Vec<Value> = single.iter().chain(&second).cloned().collect();
        let mut special = Map::new();
        for id in bos.into_iter().chain(eos) {
            special.insert(name(id).to_owned(), json!({"id": name(id), "ids": [id], "tokens": [name(id)]}));
        }
        Some(json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}))
    }

    fn tokenizer_config(&self, add_bos: bool) -> Value {
        let mut config = Map::new();
        config.insert("add_bos_token".into(), json!(add_bos));
        config.insert("add_eos_token".into(), json!(self.add_eos.unwrap_or(false)));
        let mut decoder = Map::new();
        for mut token in self.added_tokens() {
            if let Some(id) = token.as_object_mut().and_then(|t| t.shift_remove("id")) {
                decoder.insert(id.to_string(), token);
            }
        }
        config.insert("added_tokens_decoder".into(), Value::Object(decoder));
        let named = [
            ("bos_token", self.bos),
            ("eos_token", self.eos.first().copied()),
            ("unk_token", self.unknown),
            ("pad_token", self.padding),
        ];
        for (name, id) in named {
            config.insert(name.into(), json!(id.map(|id| &self.tokens[id as usize])));
        }
        config.insert("clean_up_tokenization_spaces".into(), json!(false));
        if let Some(length) = self.context_length {
            config.insert("model_max_length".into(), json!(length));
        }
        config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        if let Some(template) = &self.chat_template {
            config.insert("chat_template".into(), json!(template));
        }
        Value::Object(config)
    }

    fn generation_config(&self) -> Value {
        let mut config = Map::new();
        config.extend(self.bos.map(|id| ("bos_token_id".to_owned(), json!(id))));
        match self.eos.as_slice() {
            [] => {}
            [one] => config.extend([("eos_token_id".to_owned(), json!(one))]),
            many => config.extend([("eos_token_id".to_owned(), json!(many))]),
        }
        config.extend(self.padding.map(|id| ("pad_token_id".to_owned(), json!(id))));
        Value::Object(config)
    }
}
