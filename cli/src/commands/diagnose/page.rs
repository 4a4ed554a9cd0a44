//! What `--report` of `nibble diagnose` shows.

use super::cells;
use crate::commands::vision::page::{distribution, facts};
use crate::report::{self, Bar, Distribution, Page, Part, Worst};
use nibble_models::diagnose::{Diagnosis, LayerEffect, TensorFigures};
use nibble_models::eval::Effect;
use std::path::Path;

/// The page of a diagnosis.
pub(super) fn page(checkpoint: &Path, diagnosis: &Diagnosis) -> Page {
    let sources = &diagnosis.sources;
    let row = |name: &str, effect: &Effect| [vec![name.to_owned()], cells(effect).into()].concat();
    let bars = |value: &dyn Fn(&LayerEffect) -> f64| -> Vec<Bar> {
        let bar = |layer: &LayerEffect| Bar {
            name: layer.name.clone(),
            value: Some(value(layer)),
            detail: format!(
                "same top token {:.1} % with it alone, {:.1} % with all but it",
                100.0 * layer.only.same_top1,
                100.0 * layer.without.same_top1
            ),
        };
        diagnosis.layers.iter().map(bar).collect()
    };
    let tensors = |all: &[TensorFigures]| -> Vec<Distribution> {
        let one = |tensor: &TensorFigures| {
            let mut facts = facts(&tensor.figures, &tensor.outliers);
            facts.push(("shape".into(), format!("{:?}", tensor.shape)));
            distribution(&tensor.name, &tensor.figures, &tensor.channels, facts)
        };
        all.iter().map(one).collect()
    };
    let parts = vec![
        Part::Table {
            title: "Where the error comes from".into(),
            note: "Divergence of predictions from the source's, in nats. The last row is the source run as layers are tried: \
                   figures of layers can't go below it."
                .into(),
            head: ["quantized", "KL", "same top token %"].map(String::from).into(),
            rows: vec![
                row("weights", &sources.weights),
                row("activations, int8", &sources.activations),
                row("both", &sources.both),
                row("nothing", &diagnosis.floor),
            ],
        },
        Part::Bars {
            title: "One layer quantized".into(),
            note: "All others in floats; the higher, the more this layer costs.".into(),
            unit: "nats",
            worst: Worst::High,
            bars: bars(&|layer| layer.only.kl),
        },
        Part::Bars {
            title: "One layer in floats".into(),
            note: "All others quantized; what that gains over the quantized model.".into(),
            unit: "nats",
            worst: Worst::High,
            bars: bars(&|layer| sources.weights.kl - layer.without.kl),
        },
        Part::Tensors {
            title: "Inputs of linear layers".into(),
            note: "Float values as areas, rounded to int8 as a line; then the range of each column.".into(),
            tensors: tensors(&diagnosis.activations),
        },
        Part::Tensors {
            title: "Weights".into(),
            note: "Float values as areas, quantized ones as a line; then the range of each row.".into(),
            tensors: tensors(&diagnosis.weights),
        },
    ];
    Page {
        title: format!("{} against its source", checkpoint.file_name().unwrap_or_default().to_string_lossy()),
        subtitle: format!("{} predictions", diagnosis.predictions),
        recipe: report::command_line(),
        parts,
    }
}
