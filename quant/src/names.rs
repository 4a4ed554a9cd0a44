//! Names that people type: what to say when one is unknown.

/// "unknown; did you mean `x`?" for the nearest of `known`, or the whole list if nothing is near.
pub(crate) fn unknown<'a>(name: &str, known: impl Iterator<Item = &'a str> + Clone) -> String {
    let near = known.clone().map(|k| (distance(name, k), k)).min();
    match near {
        Some((d, k)) if d <= 2.max(name.len() / 3) => format!("unknown; did you mean `{k}`?"),
        _ => format!("unknown; known: {}", known.collect::<Vec<_>>().join(", ")),
    }
}

/// Edits (insert, delete, replace a byte) from one name to another.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let replace = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
