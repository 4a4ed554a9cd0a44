//! The files of the repository as plain text, and Rust source with its comments and literals blanked.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

/// Paths from the repository's root with `/`, each with its text; what is not UTF-8 is only measured.
#[derive(Default)]
pub struct Tree {
    /// Text files.
    pub texts: BTreeMap<String, String>,
    /// Bytes of every file.
    pub sizes: BTreeMap<String, u64>,
}

impl Tree {
    /// What git tracks or would track.
    pub fn of_repository(root: &Path) -> Tree {
        let list = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"];
        let listed = Command::new("git").arg("-C").arg(root).args(list).output().expect("git is installed");
        assert!(listed.status.success(), "git ls-files: {}", String::from_utf8_lossy(&listed.stderr));
        let mut tree = Tree::default();
        for path in String::from_utf8(listed.stdout).expect("paths are UTF-8").split_terminator('\0') {
            let Ok(bytes) = std::fs::read(root.join(path)) else { continue }; // deleted, not yet committed
            tree.sizes.insert(path.to_owned(), bytes.len() as u64);
            if let Ok(text) = String::from_utf8(bytes) {
                tree.texts.insert(path.to_owned(), text);
            }
        }
        tree
    }

    /// A small tree written down in a test.
    pub fn of(files: &[(&str, &str)]) -> Tree {
        let mut tree = Tree::default();
        for (path, text) in files {
            tree.sizes.insert((*path).to_owned(), text.len() as u64);
            tree.texts.insert((*path).to_owned(), (*text).to_owned());
        }
        tree
    }

    /// Every Rust file below `folder` ("" for all): path and text.
    pub fn rust(&self, folder: &str) -> impl Iterator<Item = (&str, &str)> {
        let below = move |path: &str| path.ends_with(".rs") && path.starts_with(folder);
        self.texts.iter().filter(move |(path, _)| below(path)).map(|(path, text)| (path.as_str(), text.as_str()))
    }
}

/// Rust source with comments, strings and character literals replaced by spaces; line breaks stay.
pub fn code_only(source: &str) -> String {
    let s: Vec<char> = source.chars().collect();
    let mut out = String::with_capacity(source.len());
    let mut i = 0;
    while i < s.len() {
        let end = match s[i] {
            '/' if s.get(i + 1) == Some(&'/') => line_end(&s, i),
            '/' if s.get(i + 1) == Some(&'*') => comment_end(&s, i),
            'r' if !follows_word(&s, i) && raw_hashes(&s, i).is_some() => raw_end(&s, i),
            '"' => string_end(&s, i),
            '\'' => char_end(&s, i),
            _ => i,
        };
        if end == i {
            out.push(s[i]);
            i += 1;
        } else {
            out.extend(s[i..end].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
            i = end;
        }
    }
    out
}

/// The words (identifiers and keywords) of one line of code.
pub fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|w| !w.is_empty())
}

fn follows_word(s: &[char], i: usize) -> bool {
    // `br"..."` is a raw string too.
    let before = |n: usize| i.checked_sub(n).map(|at| s[at]);
    let word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    word(before(1)) && (before(1) != Some('b') || word(before(2)))
}

fn raw_hashes(s: &[char], i: usize) -> Option<usize> {
    let hashes = s[i + 1..].iter().take_while(|c| **c == '#').count();
    (s.get(i + 1 + hashes) == Some(&'"')).then_some(hashes)
}

fn raw_end(s: &[char], i: usize) -> usize {
    let hashes = raw_hashes(s, i).unwrap_or(0);
    let closes = |at: usize| s[at] == '"' && s[at + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes;
    (i + hashes + 2..s.len()).find(|at| closes(*at)).map_or(s.len(), |at| at + 1 + hashes)
}

fn line_end(s: &[char], i: usize) -> usize {
    (i..s.len()).find(|at| s[*at] == '\n').unwrap_or(s.len())
}

fn comment_end(s: &[char], mut i: usize) -> usize {
    let mut depth = 0;
    while i + 1 < s.len() {
        match (s[i], s[i + 1]) {
            ('/', '*') => (depth, i) = (depth + 1, i + 2),
            ('*', '/') => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
        if depth == 0 {
            return i;
        }
    }
    s.len()
}

fn string_end(s: &[char], i: usize) -> usize {
    let mut at = i + 1;
    while at < s.len() && s[at] != '"' {
        at += if s[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(s.len())
}

/// A character literal ends at its quote; a lifetime is no literal.
fn char_end(s: &[char], i: usize) -> usize {
    match (s.get(i + 1), s.get(i + 2)) {
        (Some('\\'), _) => (i + 3..s.len()).find(|at| s[*at] == '\'').map_or(s.len(), |at| at + 1),
        (Some(_), Some('\'')) => i + 3,
        _ => i,
    }
}

#[test]
fn comments_and_literals_are_blanked_and_code_stays() {
    for (source, kept) in [
        ("a // unsafe\nb", "a\nb"),
        ("a /* un /* saf */ e */ b", "a b"),
        ("let s = \"unsafe \\\" unsafe\"; b", "let s = ; b"),
        ("let s = r#\"unsafe \" unsafe\"#; b", "let s = ; b"),
        ("let s = br\"\\\"; b", "let s = b ; b"),
        ("let c = '\"'; unsafe", "let c = ; unsafe"),
        ("let c = '\\''; unsafe", "let c = ; unsafe"),
        ("fn f<'a>(x: &'a str) { unsafe }", "fn f<'a>(x: &'a str) { unsafe }"),
        ("for r in \"x\".chars() {}", "for r in .chars() {}"),
        ("/* never closed unsafe", ""),
    ] {
        let squeezed = |t: &str| t.split_whitespace().collect::<String>();
        assert_eq!(squeezed(&code_only(source)), squeezed(kept), "{source}");
        assert_eq!(code_only(source).lines().count(), source.lines().count(), "{source}: line numbers stay");
    }
}
