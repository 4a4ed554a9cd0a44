//! What commands print: aligned tables for people, JSON for programs.

use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::io::{ErrorKind, Write};
use std::path::Path;

/// Refuses to replace a file without being told to.
pub fn may_write(path: &Path, force: bool) -> Result<()> {
    if path.exists() && !force {
        bail!("{}: is there already; --force replaces it", path.display());
    }
    Ok(())
}

/// Writes a file whole or not at all.
///
/// # Errors
/// A file that can't be written; what was there stays.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut temp = path.as_os_str().to_owned();
    temp.push(".part");
    let attempt = std::fs::write(&temp, bytes).and_then(|()| std::fs::rename(&temp, path));
    if attempt.is_err() {
        let _ = std::fs::remove_file(&temp);
    }
    attempt.with_context(|| format!("can't write {}", path.display()))
}

/// Columns of text, aligned as a Markdown table; columns whose cells all look like numbers go to the right.
pub struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column names and no rows.
    pub fn new(head: &[&str]) -> Self {
        Table { head: head.iter().map(|h| h.to_string()).collect(), rows: Vec::new() }
    }

    /// Adds a row; missing cells are empty.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The table as text.
    pub fn render(&self) -> String {
        let columns = self.head.len();
        let cell = |row: &Vec<String>, c: usize| row.get(c).cloned().unwrap_or_default();
        let width = |c: usize| {
            let cells = self.rows.iter().map(|r| cell(r, c).chars().count());
            cells.chain([self.head[c].chars().count(), 3]).max().unwrap_or(3)
        };
        let numeric = |c: usize| {
            !self.rows.is_empty()
                && self.rows.iter().map(|r| cell(r, c)).all(|cell| {
                    // What lost nothing stands among figures of what was lost.
                    cell == "exact" || cell.chars().next().is_none_or(|f| f.is_ascii_digit() || f == '-')
                })
        };
        let shape: Vec<(usize, bool)> = (0..columns).map(|c| (width(c), numeric(c))).collect();
        let line = |cells: &Vec<String>| {
            let mut text = String::from("|");
            for (c, (width, right)) in shape.iter().enumerate() {
                let value = cell(cells, c);
                if *right {
                    text.push_str(&format!(" {value:>width$} |"));
                } else {
                    text.push_str(&format!(" {value:<width$} |"));
                }
            }
            text
        };
        let mut text = line(&self.head);
        text.push_str("\n|");
        for (width, right) in &shape {
            let dashes = "-".repeat(*width);
            text.push_str(&if *right { format!(" {dashes}:|") } else { format!(" {dashes} |") });
        }
        for row in &self.rows {
            text.push('\n');
            text.push_str(&line(row));
        }
        text
    }

    /// The table as comma-separated values.
    pub fn csv(&self) -> String {
        let quote = |cell: &String| match cell.contains([',', '"', '\n']) {
            true => format!("\"{}\"", cell.replace('"', "\"\"")),
            false => cell.clone(),
        };
        let line = |cells: &Vec<String>| cells.iter().map(quote).collect::<Vec<_>>().join(",");
        std::iter::once(&self.head).chain(&self.rows).map(line).collect::<Vec<_>>().join("\n")
    }
}

/// Whoever read stdout went away; what is left need not be printed, and that is no failure.
#[derive(Debug)]
pub struct ReaderGone;

impl std::fmt::Display for ReaderGone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the reader of stdout is gone")
    }
}

impl std::error::Error for ReaderGone {}

/// Prints a value as indented JSON.
pub fn json<T: Serialize>(value: &T) -> Result<()> {
    say(&serde_json::to_string_pretty(value)?)
}

/// Prints a line.
pub fn say(text: &str) -> Result<()> {
    write(&format!("{text}\n"))
}

/// Prints text as it is and at once: a piece of a stream.
pub fn write(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Err(ReaderGone.into()),
        other => other.context("can't write to stdout"),
    }
}

/// Prints a line on stderr. Nobody being there to read it changes nothing.
pub fn remark(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Bytes as people read them.
pub fn bytes(count: u64) -> String {
    match count {
        0..1_000 => format!("{count} B"),
        1_000..1_000_000 => format!("{:.1} kB", count as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", count as f64 / 1e6),
        _ => format!("{:.2} GB", count as f64 / 1e9),
    }
}

/// The most memory this process has had resident, in bytes; none where the system doesn't tell.
pub fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// A shape as people read it: `4096 x 14336`.
pub fn shape(dimensions: &[usize]) -> String {
    dimensions.iter().map(usize::to_string).collect::<Vec<_>>().join(" x ")
}

/// Parameters as people read them.
pub fn count(n: u64) -> String {
    match n {
        0..1_000_000 => format!("{:.1} k", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} M", n as f64 / 1e6),
        _ => format!("{:.2} B", n as f64 / 1e9),
    }
}

/// Leaves the terminal as it should be when the process ends without unwinding: cursor shown, on a line of its own.
pub fn restore_terminal() {
    if std::io::IsTerminal::is_terminal(&std::io::stderr()) {
        remark("\x1b[?25h");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_to_the_right_and_words_to_the_left() {
        let mut table = Table::new(&["name", "value"]);
        table.row(vec!["a".into(), "1.5".into()]);
        table.row(vec!["bcdef".into(), "12.25".into()]);
        let want = "| name  | value |\n| ----- | -----:|\n| a     |   1.5 |\n| bcdef | 12.25 |";
        assert_eq!(table.render(), want);
    }

    #[test]
    fn csv_quotes_what_needs_it() {
        let mut table = Table::new(&["a", "b"]);
        table.row(vec!["x,y".into(), "say \"z\"".into()]);
        assert_eq!(table.csv(), "a,b\n\"x,y\",\"say \"\"z\"\"\"");
    }
}
