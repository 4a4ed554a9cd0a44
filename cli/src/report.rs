//! A page that shows what a conversion or a diagnosis found: one HTML file that needs nothing beside it.
//!
//! Commands say what is to be seen ([`Page`]); how it looks is here alone. Every figure is in the file's text, so that it can be
//! read, searched and printed without scripts; the script only filters, sorts and shows tips.

mod plot;

use crate::output;
use anyhow::Result;
use std::fmt::Write as _;
use std::path::Path;

/// What a page shows.
#[derive(Default)]
pub struct Page {
    /// Its heading.
    pub title: String,
    /// A sentence under it.
    pub subtitle: String,
    /// The command that makes it again.
    pub recipe: String,
    /// In order.
    pub parts: Vec<Part>,
}

/// One section of a page.
pub enum Part {
    /// Rows of text.
    Table { title: String, note: String, head: Vec<String>, rows: Vec<Vec<String>> },
    /// A bar for each of many things.
    Bars { title: String, note: String, unit: &'static str, worst: Worst, bars: Vec<Bar> },
    /// A coloured cell for each of many things, in their order.
    Map { title: String, note: String, cells: Vec<(String, String)> },
    /// Distributions of tensors.
    Tensors { title: String, note: String, tensors: Vec<Distribution> },
}

/// Which numbers are bad ones.
#[derive(Clone, Copy, PartialEq)]
pub enum Worst {
    /// Small ones.
    Low,
    /// Large ones.
    High,
}

/// One thing with one number.
pub struct Bar {
    /// Its name.
    pub name: String,
    /// The number; `None` where nothing was lost.
    pub value: Option<f64>,
    /// What else is known of it.
    pub detail: String,
}

/// How values of a tensor are distributed.
pub struct Distribution {
    /// The tensor.
    pub name: String,
    /// What is known of it, by name.
    pub facts: Vec<(String, String)>,
    /// Counts of float and of rounded values.
    pub histogram: Option<Histogram>,
    /// Smallest and largest value of each channel.
    pub channels: Vec<[f32; 2]>,
}

/// Counts of values in bins of equal width.
pub struct Histogram {
    /// Where the first bin begins and the last one ends.
    pub ends: [f32; 2],
    /// Float values.
    pub float: Vec<u64>,
    /// Rounded values.
    pub rounded: Vec<u64>,
    /// Smallest and largest value that integers reach.
    pub reach: [f32; 2],
}

/// Text as HTML shows it.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// The command line that runs now.
pub fn command_line() -> String {
    let plain = |word: &str| !word.is_empty() && word.chars().all(|c| c.is_alphanumeric() || "-_=+:,./@%".contains(c));
    let word = |word: std::ffi::OsString| {
        let word = word.to_string_lossy().into_owned();
        if plain(&word) { word } else { format!("'{}'", word.replace('\'', "'\\''")) }
    };
    let words: Vec<String> = std::env::args_os().skip(1).map(word).collect();
    format!("nibble {}", words.join(" "))
}

/// A number as a person reads it.
fn short(value: f64) -> String {
    match value.abs() {
        a if a != 0.0 && !(1e-3..1e5).contains(&a) => format!("{value:.2e}"),
        a if a >= 100.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

impl Page {
    /// Writes the page, whole or not at all.
    ///
    /// # Errors
    /// A file that can't be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        output::write_whole(path, self.html().as_bytes())?;
        output::remark(&format!("report: {}", path.display()));
        Ok(())
    }

    /// The page as a file's text.
    pub fn html(&self) -> String {
        let mut out = String::new();
        let title = escape(&self.title);
        let _ = write!(
            out,
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <link rel=\"icon\" href=\"data:,\">\n<title>{title}</title>\n<style>\n{}</style>\n</head>\n<body>\n\
             <header><h1>{title}</h1><p>{}</p></header>\n<nav aria-label=\"Sections\">",
            include_str!("report/page.css"),
            escape(&self.subtitle)
        );
        for (i, part) in self.parts.iter().enumerate() {
            let _ = write!(out, "<a href=\"#part{i}\">{}</a> ", escape(part.title()));
        }
        out.push_str("</nav>\n<main>\n");
        for (i, part) in self.parts.iter().enumerate() {
            let _ = writeln!(out, "<section id=\"part{i}\"><h2>{}</h2>", escape(part.title()));
            part.body(&mut out);
            out.push_str("</section>\n");
        }
        if !self.recipe.is_empty() {
            let _ = writeln!(out, "<section><h2>To make it again</h2><pre>{}</pre></section>", escape(&self.recipe));
        }
        let _ = write!(
            out,
            "</main>\n<footer>nibble {}</footer>\n<div id=\"tip\" role=\"status\" hidden></div>\n<script>\n{}</script>\n</body>\n</html>\n",
            env!("CARGO_PKG_VERSION"),
            include_str!("report/page.js")
        );
        out
    }
}

/// The field that hides what doesn't fit.
fn filter(out: &mut String, sorts: bool) {
    out.push_str(
        "<p class=\"tools\"><label>Filter <input type=\"search\" class=\"filter\" placeholder=\"part of a name\"></label> \
         <span class=\"count\" role=\"status\"></span>",
    );
    if sorts {
        out.push_str(" <button type=\"button\" class=\"sort\" aria-pressed=\"false\">Worst first</button>");
    }
    out.push_str("</p>\n");
}

impl Part {
    fn title(&self) -> &str {
        match self {
            Part::Table { title, .. }
            | Part::Bars { title, .. }
            | Part::Map { title, .. }
            | Part::Tensors { title, .. } => title,
        }
    }

    fn body(&self, out: &mut String) {
        let (Part::Table { note, .. } | Part::Bars { note, .. } | Part::Map { note, .. } | Part::Tensors { note, .. }) =
            self;
        if !note.is_empty() {
            let _ = writeln!(out, "<p>{}</p>", escape(note));
        }
        match self {
            Part::Table { head, rows, .. } => table(out, head, rows),
            Part::Bars { unit, worst, bars, .. } => bar_list(out, unit, *worst, bars),
            Part::Map { cells, .. } => map(out, cells),
            Part::Tensors { tensors, .. } => distributions(out, tensors),
        }
    }
}

fn table(out: &mut String, head: &[String], rows: &[Vec<String>]) {
    out.push_str("<div class=\"wide\" tabindex=\"0\"><table><thead><tr>");
    let number = |cell: &str| cell.chars().next().is_none_or(|c| c.is_ascii_digit() || c == '-');
    let class = |column: usize| {
        let mut cells = rows.iter().filter_map(|row| row.get(column));
        if column > 0 && cells.all(|cell| number(cell)) { " class=\"number\"" } else { "" }
    };
    for (i, name) in head.iter().enumerate() {
        let _ = write!(out, "<th scope=\"col\"{}>{}</th>", class(i), escape(name));
    }
    out.push_str("</tr></thead><tbody>\n");
    for row in rows {
        out.push_str("<tr>");
        for (i, cell) in row.iter().enumerate() {
            let _ = write!(out, "<td{}>{}</td>", class(i), escape(cell));
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody></table></div>\n");
}

fn bar_list(out: &mut String, unit: &str, worst: Worst, bars: &[Bar]) {
    filter(out, true);
    let values = || bars.iter().filter_map(|b| b.value).filter(|v| v.is_finite());
    let (lo, hi) = (values().fold(0.0, f64::min), values().fold(0.0, f64::max));
    let span = if hi > lo { hi - lo } else { 1.0 };
    out.push_str("<ul class=\"bars\">\n");
    for Bar { name, value, detail } in bars {
        let (width, text) = match value {
            Some(v) => (100.0 * (v - lo) / span, format!("{} {unit}", short(*v))),
            None => (100.0, "nothing lost".to_owned()),
        };
        let tip = escape(&format!("{name}: {text}{}{detail}", if detail.is_empty() { "" } else { "; " }));
        let sign = if worst == Worst::Low { 1.0 } else { -1.0 };
        let key = value.map_or(String::new(), |v| (sign * v).to_string());
        let _ = writeln!(
            out,
            "<li data-name=\"{}\" data-value=\"{key}\" data-tip=\"{tip}\" tabindex=\"0\"><span class=\"name\">{}</span>\
             <span class=\"track\"><span class=\"bar\" style=\"width:{width:.1}%\"></span></span><span class=\"value\">{}</span></li>",
            escape(name),
            escape(name),
            escape(&text)
        );
    }
    out.push_str("</ul>\n");
}

fn map(out: &mut String, cells: &[(String, String)]) {
    let mut kinds: Vec<&str> = cells.iter().map(|(_, kind)| kind.as_str()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let colour = |kind: &str| kinds.iter().position(|k| *k == kind).unwrap_or(0) % 8;
    out.push_str("<p class=\"legend\">");
    for kind in &kinds {
        let count = cells.iter().filter(|(_, k)| k == kind).count();
        let _ = write!(out, "<span><i class=\"c{}\"></i>{} ({count})</span> ", colour(kind), escape(kind));
    }
    out.push_str("</p>\n<div class=\"map\">");
    for (name, kind) in cells {
        let tip = escape(&format!("{name}: {kind}"));
        let _ = write!(
            out,
            "<i class=\"c{}\" tabindex=\"0\" role=\"img\" aria-label=\"{tip}\" data-tip=\"{tip}\"></i>",
            colour(kind)
        );
    }
    out.push_str("</div>\n");
}

fn distributions(out: &mut String, tensors: &[Distribution]) {
    filter(out, false);
    for Distribution { name, facts, histogram, channels } in tensors {
        let first =
            facts.first().map(|(k, v)| format!(" <small>{} {}</small>", escape(k), escape(v))).unwrap_or_default();
        let _ = writeln!(out, "<details data-name=\"{0}\"><summary>{0}{first}</summary><dl>", escape(name));
        for (fact, value) in facts {
            let _ = write!(out, "<div><dt>{}</dt><dd>{}</dd></div>", escape(fact), escape(value));
        }
        out.push_str("</dl>\n");
        if let Some(histogram) = histogram {
            plot::histogram(out, histogram);
        }
        if channels.len() > 1 {
            plot::channels(out, channels);
        }
        out.push_str("</details>\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_text_and_nothing_is_loaded() {
        let evil = "<script>alert('x')</script>&\"";
        let page = Page {
            title: evil.into(),
            subtitle: evil.into(),
            recipe: evil.into(),
            parts: vec![
                Part::Table {
                    title: evil.into(),
                    note: evil.into(),
                    head: vec![evil.into()],
                    rows: vec![vec![evil.into()]],
                },
                Part::Bars {
                    title: evil.into(),
                    note: evil.into(),
                    unit: "dB",
                    worst: Worst::High,
                    bars: [Some(f64::NAN), Some(-3.0), None, Some(f64::INFINITY)]
                        .map(|value| Bar { name: evil.into(), value, detail: evil.into() })
                        .into(),
                },
                Part::Map { title: evil.into(), note: evil.into(), cells: vec![(evil.into(), evil.into())] },
                Part::Tensors {
                    title: evil.into(),
                    note: evil.into(),
                    tensors: vec![Distribution {
                        name: evil.into(),
                        facts: vec![(evil.into(), evil.into())],
                        histogram: Some(Histogram {
                            ends: [f32::NAN, 1.0],
                            float: vec![0, u64::MAX],
                            rounded: Vec::new(),
                            reach: [0.0, 0.0],
                        }),
                        channels: vec![[f32::NEG_INFINITY, f32::NAN], [0.0, 0.0]],
                    }],
                },
            ],
        };
        let html = page.html();
        assert_eq!(html.matches("<script>").count(), 1, "that of the page alone");
        assert!(
            !html.contains("alert('x')") && html.contains("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;&quot;")
        );
        // No address: nothing is fetched.
        assert!(!html.contains("://") && !html.contains("src="));
        for tag in ["section", "table", "ul", "details", "svg", "div", "p", "span"] {
            let opened = html.matches(&format!("<{tag}>")).count() + html.matches(&format!("<{tag} ")).count();
            assert_eq!(opened, html.matches(&format!("</{tag}>")).count(), "{tag}");
        }
    }
}
