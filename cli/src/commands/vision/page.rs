//! What `--report` of `nibble vision diagnose` and `nibble vision quantize` shows.

use super::diagnose::name;
use crate::report::{self, Bar, Distribution, Histogram, Page, Part, Worst};
use nibble_models::vision::diagnose::{
    ActivationFigures, ChannelRange, Diagnosis, Figures, LayerSensitivity, Outlier, Score, WeightFigures,
};
use std::path::Path;

pub(in crate::commands) fn decibels(value: Option<f64>) -> String {
    value.map_or("nothing lost".into(), |db| format!("{db:.2}"))
}

pub(super) fn percent(share: Option<f64>) -> String {
    share.map_or(String::new(), |share| format!("{:.1}", 100.0 * share))
}

/// A score in words, for tips.
fn in_words(score: &Score) -> String {
    let mut words = vec![format!("SQNR {} dB", decibels(score.sqnr_db))];
    words.extend(score.kl.map(|kl| format!("KL {kl:.5}")));
    words.extend(score.agreement.map(|share| format!("same class {:.1} %", 100.0 * share)));
    words.extend(score.accuracy.map(|share| format!("accuracy {:.1} %", 100.0 * share)));
    words.join(", ")
}

pub(in crate::commands) fn facts(figures: &Figures, outliers: &[Outlier]) -> Vec<(String, String)> {
    let ends = |[lo, hi]: [f32; 2]| format!("{lo:.4} to {hi:.4}");
    let mut facts = vec![
        ("SQNR dB".to_owned(), decibels(figures.sqnr_db)),
        ("cosine".to_owned(), format!("{:.6}", figures.cosine)),
        ("mean squared error".to_owned(), format!("{:.3e}", figures.mse)),
        ("largest error".to_owned(), format!("{:.3e}", figures.max_error)),
        ("range".to_owned(), ends(figures.range)),
        ("integers reach".to_owned(), ends(figures.reach)),
        ("beyond that".to_owned(), format!("{:.4} %", 100.0 * figures.saturated)),
    ];
    if !outliers.is_empty() {
        let named = outliers.iter().take(4).map(|o| format!("{} ({:.1}x the median)", o.channel, o.times));
        facts.push(("outlier channels".into(), named.collect::<Vec<_>>().join(", ")));
    }
    facts
}

pub(in crate::commands) fn distribution(
    name: &str,
    figures: &Figures,
    channels: &[ChannelRange],
    facts: Vec<(String, String)>,
) -> Distribution {
    let bins = &figures.histogram;
    Distribution {
        name: name.to_owned(),
        facts,
        histogram: Some(Histogram {
            ends: [bins.lo, bins.hi],
            float: bins.float.clone(),
            rounded: bins.rounded.clone(),
            reach: figures.reach,
        }),
        channels: channels.iter().map(|c| [c.lo, c.hi]).collect(),
    }
}

/// Distributions of activations and weights.
pub(super) fn tensors(activations: &[ActivationFigures], weights: &[WeightFigures]) -> [Part; 2] {
    let activation = |a: &ActivationFigures| {
        let mut facts = facts(&a.figures, &a.outliers);
        facts.push(("scale".into(), format!("{:.4e}", a.scale)));
        facts.push(("zero point".into(), a.zero_point.to_string()));
        facts.extend(a.observers.iter().map(|o| {
            let [lo, hi] = o.range;
            (format!("range by {}", o.observer), format!("{lo:.3} to {hi:.3}, {} dB", decibels(o.sqnr_db)))
        }));
        distribution(&a.tensor, &a.figures, &a.channels, facts)
    };
    let weight = |w: &WeightFigures| {
        let mut facts = facts(&w.figures, &w.outliers);
        facts.push(("of".into(), w.node.clone()));
        facts.push(("shape".into(), format!("{:?}", w.shape)));
        distribution(&w.tensor, &w.figures, &w.channels, facts)
    };
    [
        Part::Tensors {
            title: "Activations".into(),
            note: "Float values as areas, rounded ones as a line, the range of the integers dashed; then each channel's range.".into(),
            tensors: activations.iter().map(activation).collect(),
        },
        Part::Tensors {
            title: "Weights".into(),
            note: "As above.".into(),
            tensors: weights.iter().map(weight).collect(),
        },
    ]
}

/// The page of a diagnosis.
pub(super) fn page(model: &Path, diagnosis: &Diagnosis) -> Page {
    let sources = &diagnosis.sources;
    let row = |name: &str, score: &Score| {
        let kl = score.kl.map_or(String::new(), |kl| format!("{kl:.5}"));
        vec![name.to_owned(), decibels(score.sqnr_db), kl, percent(score.agreement), percent(score.accuracy)]
    };
    let mut rows =
        vec![row("weights", &sources.weights), row("activations", &sources.activations), row("both", &sources.both)];
    if let Some(accuracy) = sources.float_accuracy {
        rows.push(vec!["nothing (float)".into(), String::new(), String::new(), String::new(), percent(Some(accuracy))]);
    }
    let bars = |which: fn(&LayerSensitivity) -> &Score| {
        let bar = |layer: &LayerSensitivity| Bar {
            name: name(layer),
            value: which(layer).sqnr_db,
            detail: format!("{} {:?}, {}", layer.layer.op, layer.layer.shape, in_words(which(layer))),
        };
        diagnosis.layers.iter().map(bar).collect()
    };
    let mut parts = vec![
        Part::Table {
            title: "Where the error comes from".into(),
            note: "The model with only this in integers, against the float model.".into(),
            head: ["in integers", "SQNR dB", "KL", "same class %", "accuracy %"].map(String::from).into(),
            rows,
        },
        Part::Bars {
            title: "One layer in integers".into(),
            note: "All other layers in float; the lower, the more this layer costs.".into(),
            unit: "dB",
            worst: Worst::Low,
            bars: bars(|layer| &layer.only),
        },
        Part::Bars {
            title: "All layers but one in integers".into(),
            note: "This layer in float; the higher, the more that gains.".into(),
            unit: "dB",
            worst: Worst::High,
            bars: bars(|layer| &layer.without),
        },
    ];
    parts.extend(tensors(&diagnosis.activations, &diagnosis.weights));
    Page {
        title: format!("{} in integers", model.file_name().unwrap_or_default().to_string_lossy()),
        subtitle: format!("{} samples", diagnosis.samples),
        recipe: report::command_line(),
        parts,
    }
}
