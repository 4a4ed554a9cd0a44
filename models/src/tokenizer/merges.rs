//! Merges of a sentencepiece BPE vocabulary, which stores scores instead.
//!
//! Sentencepiece always joins the two neighbours whose union has the highest score; a list of merges always joins the
//! pair that comes first. So every way to split a piece into two pieces is a merge, ordered by the piece's score. Splits
//! of one piece go by the length of their left part, longest first, as in transformers' conversion.

use std::collections::HashSet;

/// The merges of the pieces that text can become; `pieces` are texts with their scores.
pub(super) fn from_scores(pieces: &[(&str, f32)]) -> Vec<[String; 2]> {
    let known: HashSet<&str> = pieces.iter().map(|&(text, _)| text).collect();
    let mut merges: Vec<Merge> = Vec::new();
    for &(text, score) in pieces {
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if known.contains(left) && known.contains(right) {
                merges.push(Merge { score, left, right });
            }
        }
    }
    // Stable, so that pieces of equal score and shape keep the order of the vocabulary.
    merges.sort_by(|a, b| b.score.total_cmp(&a.score).then_with(|| b.lengths().cmp(&a.lengths())));
    merges.into_iter().map(|m| [m.left.to_owned(), m.right.to_owned()]).collect()
}

struct Merge<'a> {
    score: f32,
    left: &'a str,
    right: &'a str,
}

impl Merge<'_> {
    /// Characters on the left and on the right.
    fn lengths(&self) -> (usize, usize) {
        (self.left.chars().count(), self.right.chars().count())
    }
}
