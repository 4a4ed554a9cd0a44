//! Arguments that several commands share, and how their words become values.

use anyhow::{Context, Result};
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

    /// Lets conversion and other coarse work, which rayon spreads, use this many threads.
    pub fn set_for_conversion(self) -> Result<()> {
        let builder = rayon::ThreadPoolBuilder::new().num_threads(self.count());
        builder.build_global().context("can't start the worker threads")
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
}
