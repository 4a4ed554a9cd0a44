//! `nibble diagnose`: where the error of a quantized language model comes from.

mod page;

use super::Run;
use super::calibrate::open_text;
use super::vision::page::decibels;
use crate::arguments::Threads;
use crate::failure::Stopped;
use crate::findings::Findings;
use crate::gate::tokenizer;
use crate::output::{self, Table};
use crate::progress::{Meter, duration};
use crate::running::Activations;
use crate::session::Session;
use anyhow::{Context as _, Result};
use nibble_kernels::Pool;
use nibble_models::ModelError;
use nibble_models::diagnose::{Diagnosis, DiagnosisPlan, State, diagnose, steps};
use nibble_models::eval::{Effect, EvalPlan, beginning};
use nibble_models::trial::TEXT;
use nibble_quant::QuantError;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

/// Find out where the error of a quantized model comes from: weights or activations, which layers, which values
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example: nibble diagnose smol-int4 --reference SmolLM2-135M-Instruct --text news.txt --report diagnosis.html

`only` is the divergence with one linear layer quantized and the rest in floats, `without` that with one layer in floats and
the rest quantized. Each is found by running again what comes after the layer's block, with inputs that are kept.
--state FILE keeps what is done after every block; the same command goes on from there."
)]
pub struct Diagnose {
    /// The quantized checkpoint
    #[arg(value_name = "CHECKPOINT")]
    checkpoint: String,
    /// The checkpoint it was made from
    #[arg(long, value_name = "CHECKPOINT")]
    reference: String,
    /// A text to predict; a short one that is built in without it
    #[arg(long, short = 'f', value_name = "FILE")]
    text: Option<PathBuf>,
    /// Chunks of it
    #[arg(long, value_name = "N", default_value_t = 4)]
    chunks: usize,
    /// Tokens of a chunk
    #[arg(short, long, value_name = "N", default_value_t = 256)]
    ctx: usize,
    /// How activations meet weights while layers are tried; figures can't go below what this costs by itself
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = Activations::Auto)]
    activations: Activations,
    #[command(flatten)]
    findings: Findings,
    #[command(flatten)]
    threads: Threads,
}

impl Run for Diagnose {
    fn run(self, session: &Session) -> Result<()> {
        self.findings.check()?;
        self.threads.set_for_conversion()?;
        let quantized = crate::hub::checkpoint(session, &self.checkpoint)?;
        let float = crate::hub::checkpoint(session, &self.reference)?;
        let tokenizer = tokenizer(&float)?;
        let text = self.text.as_deref().map(open_text).transpose()?;
        let tokens = tokenizer.encode(text.as_deref().unwrap_or(TEXT), false)?;
        let eval = EvalPlan { n_ctx: self.ctx, chunks: Some(self.chunks), bos: beginning(&tokenizer)? };
        let pool = Arc::new(Pool::new(self.threads.count()));
        let plan = DiagnosisPlan { tokens: &tokens, eval, activations: self.activations.kind(), pool };
        let mut state = self.findings.state().map(State::open).transpose()?.unwrap_or_default();
        let json = crate::gate::sidecars(&float)?.json("config.json")?.context("there is no config.json")?;
        let layers = nibble_models::ModelConfig::from_json(&float.join("config.json"), &json)?.layers.len();
        let meter = Meter::new(session, "diagnose", "steps");
        meter.begin(steps(layers) as u64, 0);
        let start = Instant::now();
        let found = diagnose(&float, &quantized, &plan, &mut state, &mut |count| {
            (0..count).for_each(|_| meter.add_thing(""));
            !session.stopped()
        });
        drop(meter);
        let diagnosis = match found {
            Err(ModelError::Quant(QuantError::Stopped)) => return Err(Stopped.into()),
            found => found?,
        };
        self.findings.save(&diagnosis, || page::page(&quantized, &diagnosis))?;
        if session.json {
            return output::json(&serde_json::to_value(&diagnosis)?);
        }
        print(&diagnosis, self.findings.top)?;
        if session.talks() {
            let memory =
                output::peak_rss().map(|rss| format!(", peak memory {}", output::bytes(rss))).unwrap_or_default();
            output::remark(&format!("{}{memory}", duration(start.elapsed().as_secs_f64())));
        }
        Ok(())
    }
}

/// Divergence and agreement, as cells.
fn cells(effect: &Effect) -> [String; 2] {
    [format!("{:.5}", effect.kl), format!("{:.1}", 100.0 * effect.same_top1)]
}

fn print(diagnosis: &Diagnosis, top: usize) -> Result<()> {
    let sources = &diagnosis.sources;
    let mut table = Table::new(&["quantized", "KL", "same top token %"]);
    let rows = [
        ("weights", &sources.weights),
        ("activations (int8)", &sources.activations),
        ("both", &sources.both),
        ("nothing, run as layers are", &diagnosis.floor),
    ];
    for (name, effect) in rows {
        table.row([vec![name.to_owned()], cells(effect).into()].concat());
    }
    output::say(&table.render())?;
    let mut layers: Vec<_> = diagnosis.layers.iter().collect();
    layers.sort_by(|a, b| b.only.kl.total_cmp(&a.only.kl));
    let mut table = Table::new(&["layer", "KL, it alone", "KL, all but it", "gained by floats"]);
    for row in layers.iter().take(top) {
        let gained = sources.weights.kl - row.without.kl;
        table.row(vec![
            row.name.clone(),
            cells(&row.only)[0].clone(),
            cells(&row.without)[0].clone(),
            format!("{gained:.5}"),
        ]);
    }
    output::say(&table.render())?;
    for (what, tensors) in [("weight", &diagnosis.weights), ("activation", &diagnosis.activations)] {
        let mut tensors: Vec<_> = tensors.iter().collect();
        let key = |db: Option<f64>| db.unwrap_or(f64::INFINITY);
        tensors.sort_by(|a, b| key(a.figures.sqnr_db).total_cmp(&key(b.figures.sqnr_db)));
        let mut table =
            Table::new(&[what, "SQNR dB", "cosine", "max error", "range", "beyond the grid %", "outlier channels"]);
        for row in tensors.iter().take(top) {
            let [lo, hi] = row.figures.range;
            let named = row.outliers.iter().take(3).map(|o| format!("{} ({:.0}x)", o.channel, o.times));
            table.row(vec![
                row.name.clone(),
                decibels(row.figures.sqnr_db),
                format!("{:.5}", row.figures.cosine),
                format!("{:.2e}", row.figures.max_error),
                format!("{lo:.3}..{hi:.3}"),
                format!("{:.4}", 100.0 * row.figures.saturated),
                named.collect::<Vec<_>>().join(" "),
            ]);
        }
        output::say(&table.render())?;
    }
    Ok(())
}
