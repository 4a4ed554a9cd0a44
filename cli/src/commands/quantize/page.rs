//! What `--report` of `nibble quantize` shows.

use super::{Class, Sums, classes};
use crate::classes::is_linear;
use crate::gate;
use crate::output;
use crate::progress::duration;
use crate::report::{self, Bar, Page, Part, Worst};
use nibble_models::trial::TrialReport;
use nibble_quant::convert::Report;
use std::path::Path;

/// The page of a conversion.
pub(super) fn page(source: &str, destination: &Path, report: &Report, trial: Option<&TrialReport>) -> Page {
    let sized = || report.tensors.iter().map(|t| (t.name.as_str(), t.shape.as_slice(), t.bytes));
    let linears = Sums::of(sized().filter(|(name, shape, _)| is_linear(name, shape)).map(|(_, s, bytes)| (s, bytes)));
    let text = |words: &[&str]| words.iter().map(|w| w.to_string()).collect::<Vec<String>>();
    let mut parts = vec![Part::Table {
        title: "Sizes".into(),
        note: String::new(),
        head: text(&["", "before", "after"]),
        rows: vec![
            vec!["file".into(), output::bytes(report.bytes_in), output::bytes(report.bytes_out)],
            vec!["bits per linear weight".into(), String::new(), format!("{:.3}", linears.bits())],
            vec!["time".into(), String::new(), duration(report.seconds)],
        ],
    }];
    if let Some(trial) = trial {
        let said = gate::in_words(trial);
        let rows = said.lines().map(|line| match line.trim().split_once("  ") {
            Some((name, what)) => vec![name.to_owned(), what.trim().to_owned()],
            None => vec![line.trim().to_owned(), String::new()],
        });
        parts.push(Part::Table {
            title: "Against the source".into(),
            note: "The same text through both models, and what both say next.".into(),
            head: text(&["", ""]),
            rows: rows.collect(),
        });
    }
    let row = |class: Class| {
        let noise =
            |value: fn(&super::Sqnr) -> f64| class.sqnr_db.as_ref().map_or("-".into(), |s| format!("{:.2}", value(s)));
        let (mean, worst) = (noise(|s| s.mean), noise(|s| s.min));
        let bits = format!("{:.3}", class.bits_per_weight);
        vec![class.class, class.tensors.to_string(), class.stored, output::bytes(class.bytes), bits, mean, worst]
    };
    parts.push(Part::Table {
        title: "Classes of tensors".into(),
        note: String::new(),
        head: text(&["class", "tensors", "stored", "size", "bits/weight", "SQNR dB", "worst"]),
        rows: classes(&report.tensors).into_iter().map(row).collect(),
    });
    parts.push(Part::Map {
        title: "How each tensor is stored".into(),
        note: "In the order of the files.".into(),
        cells: report.tensors.iter().map(|t| (t.name.clone(), t.stored.clone())).collect(),
    });
    let quantized = report.tensors.iter().filter(|t| t.quantized);
    let bar = |t: &nibble_quant::manifest::TensorRecord| Bar {
        name: t.name.clone(),
        value: t.sqnr_db,
        detail: format!("{} {}, {:.3} bits a weight", output::shape(&t.shape), t.stored, t.bits_per_weight),
    };
    parts.push(Part::Bars {
        title: "What rounding left of each weight".into(),
        note: "Power of the weights over that of their errors; more is better.".into(),
        unit: "dB",
        worst: Worst::Low,
        bars: quantized.map(bar).collect(),
    });
    Page {
        title: format!("{} quantized", destination.display()),
        subtitle: format!("from {source}"),
        recipe: report::command_line(),
        parts,
    }
}
