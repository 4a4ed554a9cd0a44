//! What `--report` of `nibble vision quantize` shows: the whole, each layer, each tensor.

use super::page::{decibels, percent, tensors};
use crate::output;
use crate::report::{self, Bar, Page, Part, Worst};
use anyhow::Result;
use nibble_models::graph::Rten;
use nibble_models::vision::calibrate::CalibrateOptions;
use nibble_models::vision::data::Data;
use nibble_models::vision::diagnose::{ActivationFigures, WeightFigures, numbers};
use nibble_models::vision::evaluate::{OutputReport, evaluate};
use nibble_models::vision::mixed::{Attempt, Mixed};
use nibble_models::vision::prepare::Prepared;
use nibble_quant::onnx::plan::Decision;
use nibble_quant::onnx::{Graph, Model};
use std::path::Path;

/// What was made of what, and how.
pub(super) struct Made<'a> {
    /// The float model's file, and the one that was written.
    pub files: [&'a Path; 2],
    /// What it was made of.
    pub prepared: &'a Prepared,
    /// The model.
    pub quantized: &'a Model,
    /// Where a goal decided which layers are what.
    pub mixed: Option<&'a Mixed>,
    /// Samples that figures are of: those of `--judge`, or of calibration.
    pub data: &'a Data,
    /// Samples that ranges were found on.
    pub calib: &'a Data,
    /// How they were looked at.
    pub options: CalibrateOptions<'a>,
}

/// The page, and how often [`page`] calls `progress`.
pub(super) fn steps(made: &Made) -> Result<u64> {
    Ok(2 * made.data.count()? + made.calib.count()?)
}

/// Runs both models over the samples, and puts together what is found.
pub(super) fn page(made: &Made, progress: &mut dyn FnMut()) -> Result<Page> {
    let Made { files, prepared, quantized, mixed, data, calib, options } = made;
    let outputs: Vec<String> = prepared.model.graph().output.iter().map(|o| o.name().to_owned()).collect();
    let [float, other] = [&prepared.model, *quantized].map(|m| Rten::packed(m, &outputs, options.threads));
    let whole = evaluate(&float?, &other?, &outputs, data, None, options.stop, progress)?;
    let (activations, weights) = numbers(prepared, calib, data, options, progress)?;
    let bytes = |path: &Path| std::fs::metadata(path).map_or(String::new(), |m| output::bytes(m.len()));
    let mut rows: Vec<Vec<String>> = vec![
        vec!["size of the float model".into(), bytes(files[0])],
        vec!["size in integers".into(), bytes(files[1])],
        vec!["nodes in integers".into(), format!("{} of {}", prepared.plan.quantized(), prepared.plan.nodes.len())],
    ];
    for OutputReport { name, sqnr_db, cosine, top1, nearest, kl, .. } in &whole.outputs {
        rows.push(vec![format!("{name}: SQNR dB"), decibels(*sqnr_db)]);
        rows.push(vec![format!("{name}: cosine"), format!("{cosine:.5}")]);
        match kl {
            Some(kl) => {
                rows.push(vec![format!("{name}: same class %"), percent(Some(*top1))]);
                rows.push(vec![format!("{name}: KL"), format!("{kl:.5}")]);
            }
            None => rows.push(vec![format!("{name}: same nearest neighbour %"), percent(*nearest)]),
        }
    }
    let mut parts = vec![Part::Table {
        title: "The whole".into(),
        note: format!("On {} samples, against the float model.", whole.samples),
        head: ["what", "figure"].map(String::from).into(),
        rows,
    }];
    parts.extend(mixed.map(attempts));
    parts.push(Part::Map {
        title: "What became of each layer".into(),
        note: "In the graph's order.".into(),
        cells: precisions(prepared)?,
    });
    parts.push(Part::Bars {
        title: "What layers read".into(),
        note: "Each activation's rounding alone; the lower, the more is lost.".into(),
        unit: "dB",
        worst: Worst::Low,
        bars: activations.iter().map(activation).collect(),
    });
    parts.push(Part::Bars {
        title: "Weights of layers".into(),
        note: "Each weight's rounding alone.".into(),
        unit: "dB",
        worst: Worst::Low,
        bars: weights.iter().map(weight).collect(),
    });
    parts.extend(tensors(&activations, &weights));
    Ok(Page {
        title: format!("{} in integers", files[0].file_name().unwrap_or_default().to_string_lossy()),
        subtitle: format!("written to {}", files[1].display()),
        recipe: report::command_line(),
        parts,
    })
}

fn activation(a: &ActivationFigures) -> Bar {
    let [lo, hi] = a.figures.range;
    Bar { name: a.tensor.clone(), value: a.figures.sqnr_db, detail: format!("{lo:.3} to {hi:.3}") }
}

fn weight(w: &WeightFigures) -> Bar {
    Bar { name: w.node.clone(), value: w.figures.sqnr_db, detail: format!("{:?}", w.shape) }
}

/// Models that were measured on the way to a goal.
fn attempts(mixed: &Mixed) -> Part {
    let row = |a: &Attempt| {
        vec![
            a.upgrades.to_string(),
            a.sqnr_db.map_or(String::new(), |db| format!("{db:.2}")),
            percent(a.agreement),
            percent(a.accuracy),
            format!("{:.2}", a.bytes as f64 / 1e6),
            a.measured.map_or(String::new(), |share| format!("{share:.3}")),
            if a.good { "yes" } else { "no" }.into(),
        ]
    };
    let head = ["upgrades", "SQNR dB", "agreement %", "accuracy %", "MB", "time, of float", "reaches the goal"];
    Part::Table {
        title: "Models that were measured".into(),
        note: "An upgrade is a layer in two terms instead of one, or in float.".into(),
        head: head.map(String::from).into(),
        rows: mixed.attempts.iter().map(row).collect(),
    }
}

/// Every layer, and a word for how it computes.
fn precisions(prepared: &Prepared) -> Result<Vec<(String, String)>> {
    let graph = Graph::new(prepared.model.graph())?;
    let cell = |(id, node): (usize, &nibble_quant::onnx::plan::PlannedNode)| {
        let word = match &node.decision {
            Decision::Quantized(kind) if !kind.is_anchor() => return None,
            Decision::Quantized(_) if prepared.plan.fine.contains(&id) => "int8, two terms",
            Decision::Quantized(_) => "int8",
            // A product of two activations is no layer, unless it is in integers.
            Decision::Float(_) if graph.constant(graph.node(id).arg(1)).is_none() => return None,
            Decision::Float(_) if let Some((_, stored)) = prepared.plan.stored.get(&id) => stored.name(),
            Decision::Float(_) if ["Conv", "Gemm", "MatMul"].contains(&node.op.as_str()) => "float",
            _ => return None,
        };
        Some((node.name.clone(), word.to_owned()))
    };
    Ok(prepared.plan.nodes.iter().enumerate().filter_map(cell).collect())
}
