//! Ids to text, one by one: whole characters only, the bytes of an unfinished one held back.

use super::Tokenizer;
use crate::error::Result;

/// A text in the making. Its buffers are reused, so that a token costs no allocation once they have grown.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    strip_space: bool,
    /// The beginning of a character whose end hasn't come; then, while a token is added, its bytes too.
    pending: Vec<u8>,
    text: String,
}

impl<'a> TextStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool, begins_text: bool) -> Self {
        let strip_space = begins_text && tokenizer.pieces.strip_leading_space;
        Self { tokenizer, skip_special, strip_space, pending: Vec::new(), text: String::new() }
    }

    /// Adds a token and returns the text that it completes, which may be empty.
    ///
    /// # Errors
    /// The id is beyond the vocabulary.
    pub fn push(&mut self, id: u32) -> Result<&str> {
        let piece = self.tokenizer.pieces.get(id).ok_or_else(|| self.tokenizer.no_token(id))?;
        self.text.clear();
        if piece.is_empty() || (self.skip_special && self.tokenizer.is_special(id)) {
            return Ok("");
        }
        let strip = std::mem::take(&mut self.strip_space);
        self.pending.extend_from_slice(if strip { piece.strip_prefix(b" ").unwrap_or(piece) } else { piece });
        self.take_whole_characters();
        Ok(&self.text)
    }

    /// Ends the text: an unfinished character becomes U+FFFD.
    pub fn finish(&mut self) -> &str {
        self.text.clear();
        if !self.pending.is_empty() {
            self.text.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
        &self.text
    }

    /// Moves all but an unfinished last character from `pending` to `text`; what can't become one turns into U+FFFD, one
    /// for each maximal part, as in [`String::from_utf8_lossy`].
    fn take_whole_characters(&mut self) {
        let mut taken = 0;
        loop {
            let rest = &self.pending[taken..];
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    self.text.push_str(text);
                    taken += rest.len();
                    break;
                }
                Err(e) => {
                    let (valid, _) = rest.split_at(e.valid_up_to());
                    self.text.push_str(&String::from_utf8_lossy(valid));
                    taken += valid.len();
                    let Some(bad) = e.error_len() else { break };
                    self.text.push(char::REPLACEMENT_CHARACTER);
                    taken += bad;
                }
            }
        }
        self.pending.drain(..taken);
    }
}
