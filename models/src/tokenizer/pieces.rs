//! The bytes of every token, in one buffer: what a `tokenizer.json` calls its decoder, applied once at loading.
//!
//! ```text
//! byte level      "ĠtheĊ"  -> " the\n"    each character stands for one byte (GPT-2's alphabet)
//! sentencepiece   "▁the"   -> " the"      "<0xE2>" -> E2
//! ```

use serde_json::Value;

/// Token id -> bytes.
#[derive(Debug)]
pub(super) struct Pieces {
    bytes: Vec<u8>,
    /// Piece `i` is `bytes[ends[i - 1]..ends[i]]`.
    ends: Vec<usize>,
    special: Vec<bool>,
    /// The text's first space is the tokenizer's own.
    pub(super) strip_leading_space: bool,
}

impl Pieces {
    /// Reads the vocabulary of a tokenizer; the error says what about it can't be decoded.
    pub(super) fn new(tokenizer: &tokenizers::Tokenizer) -> Result<Self, String> {
        let decoder = serde_json::to_value(tokenizer.get_decoder()).map_err(|e| e.to_string())?;
        let rules = Rules::from_decoder(&decoder)?;
        let mut vocabulary: Vec<(u32, String)> = tokenizer.get_vocab(true).into_iter().map(|(t, id)| (id, t)).collect();
        vocabulary.sort_unstable();
        let len = vocabulary.last().map_or(0, |(id, _)| *id as usize + 1);
        if len > crate::config::MAX_VOCAB {
            return Err(format!("has token id {}, beyond {}", len - 1, crate::config::MAX_VOCAB));
        }
        let mut pieces = Self {
            bytes: Vec::new(),
            ends: Vec::with_capacity(len),
            special: vec![false; len],
            strip_leading_space: rules.strip_leading_space,
        };
        for (id, token) in &vocabulary {
            pieces.ends.resize(*id as usize, pieces.bytes.len());
            rules.decode(token, &mut pieces.bytes);
            pieces.ends.push(pieces.bytes.len());
        }
        for (id, token) in tokenizer.get_added_tokens_decoder() {
            if let Some(special) = pieces.special.get_mut(id as usize) {
                *special = token.special;
            }
        }
        Ok(pieces)
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn get(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        let end = *self.ends.get(id)?;
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        Some(&self.bytes[start..end])
    }

    pub(super) fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }
}

/// What a decoder does to one token's text.
#[derive(Debug, Default)]
struct Rules {
    byte_level: bool,
    byte_fallback: bool,
    space: Option<String>,
    strip_leading_space: bool,
}

impl Rules {
    fn from_decoder(decoder: &Value) -> Result<Self, String> {
        let mut rules = Self::default();
        rules.read(decoder)?;
        Ok(rules)
    }

    fn read(&mut self, decoder: &Value) -> Result<(), String> {
        let kind = decoder["type"].as_str().unwrap_or("none");
        match kind {
            "Sequence" => {
                for part in decoder["decoders"].as_array().map_or(&[][..], Vec::as_slice) {
                    self.read(part)?;
                }
            }
            "ByteLevel" => self.byte_level = true,
            "ByteFallback" => self.byte_fallback = true,
            "Fuse" => {}
            "Replace" => match (decoder["pattern"]["String"].as_str(), decoder["content"].as_str()) {
                (Some(pattern), Some(" ")) if !pattern.is_empty() => self.space = Some(pattern.to_owned()),
                _ => return Err(format!("decoder `Replace` of {}, wanted a character for spaces", decoder["pattern"])),
            },
            "Strip" => match (decoder["content"].as_str(), decoder["start"].as_u64(), decoder["stop"].as_u64()) {
                (Some(" "), Some(start @ (0 | 1)), Some(0)) => self.strip_leading_space = start == 1,
                _ => return Err("decoder `Strip` takes more than one leading space".to_owned()),
            },
            "Metaspace" => {
                self.space = decoder["replacement"].as_str().map(str::to_owned);
                self.strip_leading_space = decoder["prepend_scheme"].as_str() != Some("never");
            }
            other => {
                return Err(format!(
                    "decoder `{other}`; known: ByteLevel, ByteFallback, Fuse, Replace, Strip, Metaspace"
                ));
            }
        }
        Ok(())
    }

    fn decode(&self, token: &str, out: &mut Vec<u8>) {
        if self.byte_level {
            let start = out.len();
            for c in token.chars() {
                match byte_of(c) {
                    Some(byte) => out.push(byte),
                    None => {
                        // An added token written as plain text.
                        out.truncate(start);
                        out.extend_from_slice(token.as_bytes());
                        return;
                    }
                }
            }
            return;
        }
        if self.byte_fallback
            && let Some(byte) = fallback_byte(token)
        {
            out.push(byte);
            return;
        }
        match &self.space {
            Some(space) => out.extend_from_slice(token.replace(space.as_str(), " ").as_bytes()),
            None => out.extend_from_slice(token.as_bytes()),
        }
    }
}

/// The byte that sentencepiece writes as `<0xAB>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    // `from_str_radix` would take a sign.
    let plain = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    if plain { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// The byte that a character of GPT-2's alphabet stands for: printable Latin-1 stands for itself, and the 68 other bytes,
/// in order, are written from U+0100 on.
fn byte_of(c: char) -> Option<u8> {
    let code = c as u32;
    let printable = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    match code {
        0..=0xff if printable(code) => Some(code as u8),
        0x100..=0x143 => (0..=0xffu32).filter(|&b| !printable(b)).nth((code - 0x100) as usize).map(|b| b as u8),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_covers_every_byte_once() {
        let mut seen = [false; 256];
        for c in (0..=0x143).filter_map(char::from_u32) {
            if let Some(b) = byte_of(c) {
                assert!(!std::mem::replace(&mut seen[b as usize], true), "byte {b} twice");
            }
        }
        assert!(seen.iter().all(|s| *s));
        assert_eq!(
            [byte_of('Ġ'), byte_of('Ċ'), byte_of('Ń'), byte_of('ń')],
            [Some(b' '), Some(b'\n'), Some(0xad), None]
        );
    }

    #[test]
    fn only_two_hexadecimal_digits_are_a_byte() {
        assert_eq!(fallback_byte("<0xE2>"), Some(0xe2));
        for not in ["<0xE>", "<0xE2F>", "<0xEG>", "<0x+1>", "0xE2", "<0xE2"] {
            assert_eq!(fallback_byte(not), None, "{not}");
        }
    }
}
