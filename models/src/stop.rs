//! Stop strings over a stream of text: output ends before the first one, wherever token borders fall.

use crate::error::{ModelError, Result};

/// Watches a text for stop strings. Text that may turn out to be the beginning of one is held back.
///
/// The stop string that is complete first counts, and of those complete at once the longest: so the result depends on
/// the text alone, not on the parts it came in.
#[derive(Debug, Clone)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
    out: String,
    found: Option<usize>,
}

impl StopStrings {
    /// Watches for these strings; with none, all text passes through.
    ///
    /// # Errors
    /// A stop string is empty.
    pub fn new(stops: impl IntoIterator<Item = impl Into<String>>) -> Result<Self> {
        let stops: Vec<String> = stops.into_iter().map(Into::into).collect();
        if stops.iter().any(String::is_empty) {
            return Err(ModelError::Setting { what: "stop".to_owned(), why: "empty, wanted a text".to_owned() });
        }
        Ok(Self { stops, held: String::new(), out: String::new(), found: None })
    }

    /// Adds text and returns what can be shown now. Once a stop string is [found](Self::found), nothing more is.
    pub fn push(&mut self, text: &str) -> &str {
        self.out.clear();
        if self.found.is_some() {
            return "";
        }
        self.held.push_str(text);
        let ends =
            |(index, stop): (usize, &String)| self.held.find(stop.as_str()).map(|at| (at + stop.len(), at, index));
        if let Some((_, at, index)) = self.stops.iter().enumerate().filter_map(ends).min() {
            self.found = Some(index);
            self.held.truncate(at);
            std::mem::swap(&mut self.out, &mut self.held);
            return &self.out;
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        self.out.push_str(&self.held[..self.held.len() - keep]);
        self.held.drain(..self.held.len() - keep);
        &self.out
    }

    /// Ends the text and returns what was held back.
    pub fn finish(&mut self) -> &str {
        self.out.clear();
        if self.found.is_none() {
            std::mem::swap(&mut self.out, &mut self.held);
        }
        &self.out
    }

    /// The stop string that ended the text.
    pub fn found(&self) -> Option<&str> {
        self.found.map(|index| self.stops[index].as_str())
    }
}

/// Bytes at the end of `text` that are the beginning of `stop`, as many as possible.
fn overlap(text: &str, stop: &str) -> usize {
    let most = stop.len().saturating_sub(1).min(text.len());
    (1..=most).rev().find(|&n| stop.is_char_boundary(n) && text.ends_with(&stop[..n])).unwrap_or(0)
}
