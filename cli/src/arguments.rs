//! Arguments that several commands share, and how their words become values.

use crate::failure::Usage;
use anyhow::Result;
use std::num::NonZeroUsize;

/// How many threads compute.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Threads {
    /// Threads to compute with [default: one a core]
    #[arg(long, short, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
}

impl Threads {
    /// The number given, or the cores of this machine that the process may use.
    pub fn count(self) -> usize {
        self.threads.or_else(|| std::thread::available_parallelism().ok()).map_or(1, NonZeroUsize::get)
    }
}

/// Reads a matrix shape, `ROWSxCOLUMNS` or `ROWS,COLUMNS`.
pub fn shape(text: &str) -> Result<[usize; 2], String> {
    let wanted = || format!("`{text}` is no shape; wanted ROWSxCOLUMNS such as 4096x14336");
    let (rows, columns) = text.split_once(['x', 'X', ',']).ok_or_else(wanted)?;
    let side = |word: &str| word.trim().parse::<usize>().ok().filter(|n| (1..=1 << 24).contains(n)).ok_or_else(wanted);
    Ok([side(rows)?, side(columns)?])
}

/// Reads text in which `\n`, `\t` and `\\` may stand for characters that are awkward to type.
pub fn unescape(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '\\' => match letters.next() {
                Some('n') => out.push('\n'),
                Some('t') => out.push('\t'),
                Some('r') => out.push('\r'),
                Some('\\') => out.push('\\'),
                Some(other) => return Err(format!("\\{other} is no escape; known: \\n, \\t, \\r, \\\\")),
                None => return Err("a backslash at the end; write \\\\ for one".to_string()),
            },
            other => out.push(other),
        }
    }
    Ok(out)
}

/// The word of a list that a mistyped word was probably meant to be.
pub fn nearest<'a>(typed: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let distance = |word: &str| edit_distance(typed, word);
    let (best, word) = known.into_iter().map(|word| (distance(word), word)).min()?;
    (best <= 2.max(typed.chars().count() / 3)).then_some(word)
}

/// A word that must be one of a list: refuses another one, says which are known and which was probably meant.
pub fn unknown<'a>(what: &str, typed: &str, known: impl IntoIterator<Item = &'a str> + Clone) -> Usage {
    let meant = nearest(typed, known.clone()).map(|word| format!(", did you mean `{word}`?")).unwrap_or_default();
    let known = known.into_iter().collect::<Vec<_>>().join(", ");
    Usage(format!("{what} `{typed}` is unknown{meant} (known: {known})"))
}

/// Letters to insert, remove or replace to turn one word into another (Levenshtein).
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_two_positive_numbers() {
        assert_eq!(shape("4096x14336"), Ok([4096, 14336]));
        assert_eq!(shape("576, 1536"), Ok([576, 1536]));
        for bad in ["", "4096", "0x5", "4096x", "x", "1x2x3", "-1x2", "99999999999x2"] {
            assert!(shape(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn escapes_become_characters() {
        assert_eq!(unescape(r"a\nb\\c\t").unwrap(), "a\nb\\c\t");
        assert!(unescape(r"\x").is_err());
        assert!(unescape("\\").is_err());
    }

    #[test]
    fn distances_count_edits() {
        for (a, b, wanted) in [("", "abc", 3), ("kitten", "sitting", 3), ("int4", "int4", 0), ("nf4", "nf", 1)] {
            assert_eq!(edit_distance(a, b), wanted, "{a} {b}");
            assert_eq!(edit_distance(b, a), wanted, "{b} {a}");
        }
    }

    #[test]
    fn only_near_words_are_suggested() {
        assert_eq!(nearest("int4-g23", ["int4-g32", "int8"]), Some("int4-g32"));
        assert_eq!(nearest("banana", ["int4-g32", "int8"]), None);
    }
}
