//! `nibble diff`: how far apart two checkpoints' weights are.

use super::Run;
use crate::arguments::Threads;
use crate::output::{self, Table};
use crate::progress::Meter;
use crate::session::Session;
use anyhow::Result;
use nibble_quant::convert::{self, Difference};
use nibble_quant::format::gguf::GgufCheckpoint;
use nibble_quant::format::{self, TensorSource};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Compare two checkpoints of any formats tensor by tensor: signal-to-noise ratio, largest error, cosine
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: nibble diff SmolLM2-135M-Instruct smol-int4 --below 20

SQNR is 10 log10 of the reference's power over the difference's; 4-bit weights lie around 20 dB, 8-bit ones around 40.
The first tensor, in file order, that lies below --below is marked `<--`.")]
pub struct Diff {
    /// The reference: a checkpoint folder or file, or ORG/NAME on the hub
    #[arg(value_name = "REFERENCE")]
    reference: String,
    /// The checkpoint to judge
    #[arg(value_name = "OTHER")]
    other: String,
    /// Mark the first tensor below this many dB
    #[arg(long, value_name = "DB", default_value_t = 15.0)]
    below: f64,
    /// Fail if a tensor lies below --below
    #[arg(long)]
    strict: bool,
    #[command(flatten)]
    threads: Threads,
}

impl Run for Diff {
    fn run(self, session: &Session) -> Result<()> {
        self.threads.set_for_conversion()?;
        let paths = [crate::hub::checkpoint(session, &self.reference)?, crate::hub::checkpoint(session, &self.other)?];
        let [reference, other] = open(&paths)?;
        let meter = Meter::new(session, "diff", "tensors");
        let tensors = reference.infos().iter().filter(|info| info.stored.is_float()).count();
        meter.begin(tensors as u64, 0);
        let differences = convert::diff(&*reference, &*other, &mut |d| meter.add_thing(&d.name))?;
        drop(meter);
        let bad = differences.iter().find(|d| d.sqnr_db < self.below);
        let worst = differences.iter().min_by(|a, b| a.sqnr_db.total_cmp(&b.sqnr_db));
        if session.json {
            output::json(&json!({
                "reference": reference.path(), "other": other.path(),
                "identical": differences.iter().all(|d| d.max_error == 0.0),
                "worst": worst.map(|d| &d.name), "first_below": bad.map(|d| &d.name), "below_db": self.below,
                "tensors": differences.iter().map(row_json).collect::<Vec<_>>(),
            }))?;
        } else {
            output::say(&table(&differences, bad).render())?;
        }
        match bad {
            Some(bad) if self.strict => {
                anyhow::bail!("tensor `{}`: {:.2} dB, below {} dB", bad.name, bad.sqnr_db, self.below)
            }
            _ => Ok(()),
        }
    }
}

/// Both checkpoints; of a GGUF file beside something else, the names and the order of rows that the other has.
fn open([first, second]: &[PathBuf; 2]) -> Result<[Box<dyn TensorSource>; 2]> {
    let is_gguf = |path: &Path| anyhow::Ok(format::detect(path)?.name == "gguf");
    let translate = is_gguf(first)? != is_gguf(second)?;
    let open = |path: &Path| -> Result<Box<dyn TensorSource>> {
        if translate && is_gguf(path)? {
            return Ok(Box::new(GgufCheckpoint::open(path)?));
        }
        Ok(format::open(path)?)
    };
    Ok([open(first)?, open(second)?])
}

fn table(differences: &[Difference], bad: Option<&Difference>) -> Table {
    let mut table = Table::new(&["tensor", "shape", "reference", "other", "SQNR dB", "max error", "cosine", ""]);
    for d in differences {
        let mark = if bad.is_some_and(|bad| bad.name == d.name) { "<--" } else { "" };
        table.row(vec![
            d.name.clone(),
            output::shape(&d.shape),
            d.stored[0].clone(),
            d.stored[1].clone(),
            if d.sqnr_db.is_finite() { format!("{:.2}", d.sqnr_db) } else { "-".to_string() },
            format!("{:.3e}", d.max_error),
            format!("{:.6}", d.cosine),
            mark.to_string(),
        ]);
    }
    table
}

/// Equal tensors have no noise: their ratio is null, since JSON has no infinity.
fn row_json(d: &Difference) -> Value {
    json!({
        "name": d.name, "shape": d.shape, "stored": d.stored, "sqnr_db": d.sqnr_db.is_finite().then_some(d.sqnr_db),
        "max_error": d.max_error, "cosine": d.cosine,
    })
}
