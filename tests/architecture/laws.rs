//! The laws themselves, one row each in [`LAWS`].

use super::tree::{Tree, code_only, words};
use std::collections::{BTreeMap, BTreeSet};

/// A rule of the house.
pub struct Law {
    /// Its short name.
    pub name: &'static str,
    /// Everything in a tree that breaks it, each with the file it is in.
    pub breaches: fn(&Tree) -> Vec<String>,
}

/// Every law.
pub const LAWS: &[Law] = &[
    Law { name: "floors", breaches: floors },
    Law { name: "unsafe", breaches: unsafe_code },
    Law { name: "candle", breaches: candle },
    Law { name: "hosts", breaches: hosts },
    Law { name: "links", breaches: links },
    Law { name: "direction", breaches: direction },
    Law { name: "cycles", breaches: cycles },
    Law { name: "unfinished", breaches: unfinished },
    Law { name: "sizes", breaches: sizes },
];

/// Bytes of the largest file that git may carry.
pub const LARGEST_FILE: u64 = 1 << 20;

/// Crates from the ground up: a crate imports only crates of the floors below it.
const FLOORS: &[(&str, &str, usize)] = &[
    ("kernels", "nibble-kernels", 0),
    ("quant", "nibble-quant", 1),
    ("models", "nibble-models", 2),
    ("cli", "nibble", 3),
    ("tests", "nibble-tests", 4),
    ("benches", "nibble-benches", 4),
];

/// Crates of others that only some folders may import.
const ONLY_IN: &[(&str, &[&str])] = &[
    ("anyhow", &["cli"]),
    ("clap", &["cli"]),
    ("indicatif", &["cli"]),
    ("rustyline", &["cli"]),
    ("candle-core", &["models", "tests"]),
    ("candle-nn", &["models", "tests"]),
    ("candle-transformers", &["models", "tests"]),
];

/// Inside a crate: the first module never imports the second.
const DIRECTIONS: &[(&str, &str, &str)] = &[
    ("kernels", "error", "gemm"),
    ("kernels", "isa", "gemm"),
    ("kernels", "isa", "simd"),
    ("kernels", "weight", "gemm"),
    ("kernels", "weight", "ops"),
    ("kernels", "pool", "gemm"),
    ("kernels", "pool", "ops"),
    ("kernels", "simd", "gemm"),
    ("kernels", "simd", "ops"),
    ("kernels", "simd", "pool"),
    ("quant", "spec", "algo"),
    ("quant", "spec", "format"),
    ("quant", "qtensor", "algo"),
    ("quant", "qtensor", "format"),
    ("quant", "observe", "algo"),
    ("quant", "format", "algo"),
];

/// Steps that close a cycle on purpose: reading dispatches through a table whose rows fill what is read.
const DISPATCHES: &[(&str, &str, &str)] = &[("models", "config", "family")];

fn floors(tree: &Tree) -> Vec<String> {
    let mut breaches = Vec::new();
    for (folder, _, floor) in FLOORS {
        let path = format!("{folder}/Cargo.toml");
        let Some(manifest) = tree.texts.get(&path) else { continue };
        for dependency in dependencies(manifest) {
            let own = FLOORS.iter().find(|(_, package, _)| *package == dependency);
            if own.is_some_and(|(_, _, below)| below >= floor) {
                breaches.push(format!("{path} imports {dependency}, which is not below it"));
            }
            let only = ONLY_IN.iter().find(|(name, _)| *name == dependency);
            if only.is_some_and(|(_, folders)| !folders.contains(folder)) {
                breaches.push(format!("{path} imports {dependency}, which has no place there"));
            }
        }
    }
    breaches
}

/// The names in every dependency table of a manifest: normal, dev, build, of a target, and `[dependencies.name]`.
fn dependencies(manifest: &str) -> Vec<&str> {
    let mut names = Vec::new();
    let mut inside = false;
    for line in manifest.lines().map(str::trim) {
        if let Some(header) = line.strip_prefix('[') {
            let header = header.trim_end_matches(']');
            inside = header.ends_with("dependencies");
            if let Some((table, name)) = header.rsplit_once('.')
                && table.ends_with("dependencies")
            {
                names.push(name.trim_matches('"'));
            }
        } else if inside
            && !line.starts_with('#')
            && let Some(name) = line.split(['.', '=', ' ']).next()
            && !name.is_empty()
        {
            names.push(name.trim_matches('"'));
        }
    }
    names
}

/// Lines of code (comments and literals blanked) of every Rust file: path, line number, line.
fn lines_of_code(tree: &Tree, mut each: impl FnMut(&str, usize, &str)) {
    for (path, text) in tree.rust("") {
        for (n, line) in code_only(text).lines().enumerate() {
            each(path, n + 1, line);
        }
    }
}

fn unsafe_code(tree: &Tree) -> Vec<String> {
    let mut breaches = Vec::new();
    lines_of_code(tree, |path, n, line| {
        let allowed = path.starts_with("kernels/") || path == "quant/src/format/mmap.rs";
        if !allowed && words(line).any(|w| w == "unsafe") {
            breaches.push(format!("{path}:{n} has unsafe code"));
        }
    });
    breaches
}

fn candle(tree: &Tree) -> Vec<String> {
    let mut breaches = Vec::new();
    lines_of_code(tree, |path, n, line| {
        let allowed = path.starts_with("models/") || path.starts_with("tests/");
        if !allowed && words(line).any(|w| w.starts_with("candle")) {
            breaches.push(format!("{path}:{n} names candle"));
        }
    });
    breaches
}

fn hosts(tree: &Tree) -> Vec<String> {
    // In two parts, or this file would break its own law.
    let hosts = [
        ["pypi", ".org"],
        ["pythonhosted", ".org"],
        ["static.crates", ".io"],
        ["index.crates", ".io"],
        ["npmjs", ".org"],
        ["deb.debian", ".org"],
    ];
    let places = [["/ho", "me/"], ["/ro", "ot/"], ["/wo", "rk/"], ["/Us", "ers/"]];
    let mut breaches = Vec::new();
    for (path, text) in tree.texts.iter().filter(|(path, _)| *path != "Cargo.lock") {
        for (n, line) in text.lines().enumerate() {
            for host in hosts.iter().map(|parts| parts.concat()) {
                if line.contains(&host) {
                    breaches.push(format!("{path}:{} names the host {host}", n + 1));
                }
            }
            for place in places.iter().map(|parts| parts.concat()) {
                let absolute = |at: usize| !line[..at].ends_with(|c: char| c.is_alphanumeric() || "._-}$".contains(c));
                if line.match_indices(&place).any(|(at, _)| absolute(at)) {
                    breaches.push(format!("{path}:{} names a folder of one machine: {place}", n + 1));
                }
            }
        }
    }
    breaches
}

/// The files that a page links to, from the repository's root; links to elsewhere and to parts of the page left out.
fn linked(page: &str, text: &str) -> Vec<String> {
    let folder = page.rsplit_once('/').map_or("", |(folder, _)| folder);
    let targets = text.match_indices("](").filter_map(|(at, _)| text[at + 2..].split([')', '#', ' ', '\n']).next());
    let local = targets.filter(|t| !t.is_empty() && !t.contains("://") && !t.starts_with("mailto:"));
    local
        .map(|target| {
            let mut parts: Vec<&str> = folder.split('/').filter(|p| !p.is_empty()).collect();
            for part in target.split('/') {
                match part {
                    "" | "." => {}
                    ".." => drop(parts.pop()),
                    _ => parts.push(part),
                }
            }
            parts.join("/")
        })
        .collect()
}

/// Where a reader begins.
const ENTRANCES: [&str; 2] = ["README.md", "docs/index.md"];

fn links(tree: &Tree) -> Vec<String> {
    let mut breaches = Vec::new();
    for (page, text) in tree.texts.iter().filter(|(path, _)| path.ends_with(".md")) {
        for target in linked(page, text) {
            let folder = format!("{target}/");
            if !tree.sizes.keys().any(|path| *path == target || path.starts_with(&folder)) {
                breaches.push(format!("{page} links to {target}, which is not there"));
            }
        }
    }
    // A page nobody can reach is a page nobody keeps true.
    let mut reached = BTreeSet::from(ENTRANCES.map(str::to_owned));
    let mut open = ENTRANCES.map(str::to_owned).to_vec();
    while let Some(page) = open.pop() {
        let text = tree.texts.get(&page).map_or("", String::as_str);
        open.extend(linked(&page, text).into_iter().filter(|target| reached.insert(target.clone())));
    }
    let docs = tree.texts.keys().filter(|path| path.starts_with("docs/") && path.ends_with(".md"));
    breaches.extend(
        docs.filter(|p| !reached.contains(*p)).map(|p| format!("{p} is not reached from {}", ENTRANCES.join(" or "))),
    );
    breaches
}

/// The modules of the same crate that a file's code names: the first word of each `crate::` path, braces opened, and
/// names that lib.rs re-exports followed to their module. Unit tests (from the first `cfg(test)` on) may name any.
fn imports(text: &str, exports: &BTreeMap<String, String>) -> BTreeSet<String> {
    let code = code_only(text);
    let code = code.split("#[cfg(test)]").next().unwrap_or("");
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        // `$crate::` and `nibble_crate::` are other things.
        if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let rest = code[at + "crate::".len()..].trim_start();
        let firsts = match rest.strip_prefix('{') {
            Some(list) => first_words_of_list(list),
            None => words(rest).next().into_iter().collect(),
        };
        found.extend(firsts.into_iter().map(|w| exports.get(w).cloned().unwrap_or_else(|| w.to_owned())));
    }
    found
}

/// `a::{b, c}, d, e::f}` -> a, d, e.
fn first_words_of_list(list: &str) -> Vec<&str> {
    let mut firsts = Vec::new();
    let (mut depth, mut start) = (0, 0);
    for (at, sign) in list.char_indices() {
        match sign {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                firsts.extend(words(&list[start..at]).next());
                start = at + 1;
                if sign == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    firsts
}

/// `pub use module::{A, B};` of a lib.rs: A and B, each with its module.
fn exports(lib: &str) -> BTreeMap<String, String> {
    let mut names = BTreeMap::new();
    for statement in code_only(lib).split(';') {
        let Some((_, path)) = statement.split_once("pub use ") else { continue };
        let mut path = words(path);
        let Some(module) = path.next() else { continue };
        names.extend(path.map(|name| (name.to_owned(), module.to_owned())));
    }
    names
}

/// For each top-level module of a crate, the other ones it imports, and one file that does.
fn module_graph(tree: &Tree, krate: &str) -> BTreeMap<String, BTreeMap<String, String>> {
    let root = format!("{krate}/src/");
    let exports = exports(tree.texts.get(&format!("{root}lib.rs")).map_or("", String::as_str));
    let module = |path: &str| path[root.len()..].trim_end_matches(".rs").split('/').next().unwrap_or("").to_owned();
    let modules: BTreeSet<String> = tree.rust(&root).map(|(path, _)| module(path)).collect();
    let mut graph: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    for (path, text) in tree.rust(&root).filter(|(path, _)| !path.ends_with("src/lib.rs")) {
        let from = module(path);
        for to in imports(text, &exports).into_iter().filter(|to| modules.contains(to) && *to != from) {
            graph.entry(from.clone()).or_default().insert(to, path.to_owned());
        }
    }
    graph
}

fn direction(tree: &Tree) -> Vec<String> {
    let mut breaches = Vec::new();
    for (krate, lower, upper) in DIRECTIONS {
        if let Some(path) = module_graph(tree, krate).get(*lower).and_then(|to| to.get(*upper)) {
            breaches.push(format!("{path}: {lower} imports {upper}, which stands above it"));
        }
    }
    breaches
}

fn cycles(tree: &Tree) -> Vec<String> {
    let mut breaches = Vec::new();
    for (krate, ..) in FLOORS {
        let mut graph = module_graph(tree, krate);
        for (_, from, table) in DISPATCHES.iter().filter(|(of, ..)| of == krate) {
            graph.get_mut(*from).and_then(|imports| imports.remove(*table));
        }
        for start in graph.keys() {
            // Report a cycle once, from its first module by name.
            if let Some(mut way) = way_back(&graph, start, start, &mut BTreeSet::new())
                && way.iter().all(|module| module >= start)
            {
                way.push(start.clone());
                way.reverse();
                breaches.push(format!("{krate}: {}", way.join(" -> ")));
            }
        }
    }
    breaches
}

/// The modules of a way from `from` to `goal`, the last first.
fn way_back(
    graph: &BTreeMap<String, BTreeMap<String, String>>,
    from: &str,
    goal: &str,
    seen: &mut BTreeSet<String>,
) -> Option<Vec<String>> {
    for to in graph.get(from)?.keys() {
        if to == goal {
            return Some(vec![to.clone()]);
        }
        if seen.insert(to.clone())
            && let Some(mut way) = way_back(graph, to, goal, seen)
        {
            way.push(to.clone());
            return Some(way);
        }
    }
    None
}

fn unfinished(tree: &Tree) -> Vec<String> {
    let mut breaches = Vec::new();
    lines_of_code(tree, |path, n, line| {
        for macro_name in ["todo!", "unimplemented!", "dbg!"] {
            if line.contains(macro_name) {
                breaches.push(format!("{path}:{n} has {macro_name}"));
            }
        }
    });
    breaches
}

fn sizes(tree: &Tree) -> Vec<String> {
    let large = tree.sizes.iter().filter(|(_, bytes)| **bytes > LARGEST_FILE);
    large.map(|(path, bytes)| format!("{path} has {bytes} bytes, at most {LARGEST_FILE} are carried")).collect()
}
