//! Text to token ids and back.
//!
//! Encoding is the `tokenizers` crate's, from the model's own `tokenizer.json`. Decoding is done here, from a table that
//! gives each id its bytes: a stream of ids becomes text in constant time a token, and never emits half a character.

mod gguf;
mod merges;
mod pieces;
mod pre;
mod stream;

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::config::Fields;
use crate::error::{ModelError, Result};
use crate::sidecars::Sidecars;

pub use gguf::{GgufVocab, TokenizerFiles};
pub use stream::TextStream;

use pieces::Pieces;

/// A model's vocabulary, with the tokens that begin and end its sequences.
#[derive(Debug)]
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    pieces: Pieces,
    bos: Option<u32>,
    eos: Vec<u32>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` from a model folder, and the tokens that end a sequence from `config.json`,
    /// `generation_config.json` and `tokenizer_config.json`, as far as they are there.
    ///
    /// # Errors
    /// A file can't be read or is damaged; the decoder of the tokenizer is of a kind that language models don't use; a
    /// sequence ends in a token that the vocabulary lacks.
    pub fn load(folder: impl AsRef<Path>) -> Result<Self> {
        Self::from_sidecars(&Sidecars::folder(folder))
    }

    /// The bytes of a checkpoint's `tokenizer.json`.
    ///
    /// # Errors
    /// There is none, or it can't be read.
    pub(crate) fn json(sidecars: &Sidecars) -> Result<Vec<u8>> {
        match sidecars.read("tokenizer.json")? {
            None if sidecars.read("tokenizer.model")?.is_some() => {
                let why =
                    "missing; the folder holds only a sentencepiece `tokenizer.model`, convert it with transformers";
                Err(ModelError::Damaged { path: sidecars.file("tokenizer.json"), why: why.to_owned() })
            }
            None => sidecars.need("tokenizer.json"),
            Some(bytes) => Ok(bytes),
        }
    }

    /// The same from a checkpoint's sidecars.
    ///
    /// # Errors
    /// As [`Tokenizer::load`].
    pub fn from_sidecars(sidecars: &Sidecars) -> Result<Self> {
        let path = sidecars.file("tokenizer.json");
        let bytes = Self::json(sidecars)?;
        let mut tokenizer = Self::from_json(&path, &bytes)?;
        for name in ["generation_config.json", "config.json"] {
            if let Some(value) = sidecars.json(name)? {
                tokenizer.add_ids(&Fields::new(&sidecars.file(name), &value)?)?;
            }
        }
        let name = "tokenizer_config.json";
        if let Some(value) = sidecars.json(name)? {
            tokenizer.add_names(&Fields::new(&sidecars.file(name), &value)?)?;
        }
        Ok(tokenizer)
    }

    /// Takes the bytes of a `tokenizer.json`; `path` is what errors call it. No token ends a sequence yet.
    ///
    /// # Errors
    /// The bytes are damaged, or the decoder is of a kind that language models don't use.
    pub fn from_json(path: &Path, bytes: &[u8]) -> Result<Self> {
        let inner = plain(path, bytes)?;
        let damaged = |why: String| ModelError::Damaged { path: path.to_path_buf(), why };
        let pieces = Pieces::new(&inner).map_err(damaged)?;
        Ok(Self { path: path.to_path_buf(), inner, pieces, bos: None, eos: Vec::new() })
    }

    /// `bos_token_id` and `eos_token_id` of a configuration file.
    fn add_ids(&mut self, fields: &Fields) -> Result<()> {
        // A model's vocabulary may be wider than its tokenizer's, but a sequence that ends in such an id never ends.
        let limit = self.vocab_size();
        let bos = fields.token_ids("bos_token_id", limit)?;
        self.bos = self.bos.or(bos.first().copied());
        for id in fields.token_ids("eos_token_id", limit)? {
            self.add_eos(id);
        }
        Ok(())
    }

    /// `bos_token` and `eos_token` of `tokenizer_config.json`.
    fn add_names(&mut self, fields: &Fields) -> Result<()> {
        let id = |field: &str| -> Result<Option<u32>> {
            let Some(text) = fields.get(field).and_then(token_text) else { return Ok(None) };
            match self.inner.token_to_id(text) {
                Some(id) => Ok(Some(id)),
                None => Err(fields.refuse(field, format!("`{text}` is not in the vocabulary"))),
            }
        };
        let (bos, eos) = (id("bos_token")?, id("eos_token")?);
        self.bos = self.bos.or(bos);
        eos.into_iter().for_each(|id| self.add_eos(id));
        Ok(())
    }

    fn add_eos(&mut self, id: u32) {
        if !self.eos.contains(&id) {
            self.eos.push(id);
        }
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// Checks that a model with `rows` rows in its embedding can take every id of this tokenizer.
    ///
    /// # Errors
    /// The tokenizer has more ids than the model has rows.
    pub fn check_vocab(&self, rows: usize) -> Result<()> {
        if self.vocab_size() <= rows {
            return Ok(());
        }
        let why = format!("has ids up to {}, but the model's embedding has {rows} rows", self.vocab_size() - 1);
        Err(ModelError::Damaged { path: self.path.clone(), why })
    }

    /// The token that begins a sequence, where the model has one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The tokens that end a sequence.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// Whether generation stops at this token.
    pub fn is_eos(&self, id: u32) -> bool {
        self.eos.contains(&id)
    }

    /// The id of a token by its exact text.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether the token is a control token, which text output leaves out.
    pub fn is_special(&self, id: u32) -> bool {
        self.pieces.is_special(id)
    }

    /// The bytes that a token stands for, possibly only a part of a character; `None` beyond the vocabulary.
    pub fn bytes(&self, id: u32) -> Option<&[u8]> {
        self.pieces.get(id)
    }

    /// The ids of a text. The names of special tokens in it become those tokens; `add_special` adds what the tokenizer
    /// puts around a text of its own, such as the beginning of a sequence. Prompts from a chat template bring theirs.
    ///
    /// # Errors
    /// The text holds something that the vocabulary can't express.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, add_special)
            .map_err(|e| ModelError::Damaged { path: self.path.clone(), why: format!("can't encode: {e}") })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of ids that begin a text; bytes that aren't UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// An id is beyond the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let mut stream = self.stream(skip_special, true);
        let mut text = String::new();
        for &id in ids {
            text.push_str(stream.push(id)?);
        }
        text.push_str(stream.finish());
        Ok(text)
    }

    /// Starts turning ids into text one by one. `begins_text` says that no text comes before: sentencepiece vocabularies
    /// write a space at the beginning of a text that isn't part of it.
    pub fn stream(&self, skip_special: bool, begins_text: bool) -> TextStream<'_> {
        TextStream::new(self, skip_special, begins_text)
    }

    fn no_token(&self, id: u32) -> ModelError {
        let why = format!("token {id} is beyond the vocabulary of {}", self.vocab_size());
        ModelError::Damaged { path: self.path.clone(), why }
    }
}

/// A `tokenizer.json` of any kind, encoders' too, that neither cuts nor pads.
///
/// # Errors
/// The bytes are damaged.
pub(crate) fn plain(path: &Path, bytes: &[u8]) -> Result<tokenizers::Tokenizer> {
    let damaged = |why: String| ModelError::Damaged { path: path.to_path_buf(), why };
    check_json(bytes).map_err(damaged)?;
    let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| damaged(format!("not a tokenizer: {e}")))?;
    inner.with_truncation(None).map_err(|e| damaged(e.to_string()))?;
    inner.with_padding(None);
    Ok(inner)
}

/// Refuses what the `tokenizers` crate would panic on: text that isn't JSON, the one normalizer that it unwraps, and
/// templates that name special tokens they don't define.
fn check_json(bytes: &[u8]) -> Result<(), String> {
    let value: Value = serde_json::from_slice(bytes).map_err(|e| format!("not JSON: {e}"))?;
    let steps = |whole: &'static str, steps: &'static str| {
        let step = &value[whole];
        step[steps].as_array().map_or(std::slice::from_ref(step), Vec::as_slice)
    };
    if steps("normalizer", "normalizers").iter().any(|step| step["type"] == "Precompiled") {
        let why = "normalizer `Precompiled`, which language models with byte-level or BPE vocabularies don't use";
        return Err(why.to_owned());
    }
    for step in steps("post_processor", "processors") {
        for template in [&step["single"], &step["pair"]] {
            for piece in template.as_array().into_iter().flatten() {
                if let Some(id) = piece["SpecialToken"]["id"].as_str()
                    && step["special_tokens"].get(id).is_none()
                {
                    return Err(format!("post-processor: template names `{id}`, which its special_tokens lack"));
                }
            }
        }
    }
    Ok(())
}

/// The text of a special token, which is written as a string or as an object with `content`.
pub(crate) fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}
