//! `nibble schemes`: what `--scheme` takes.

use super::Run;
use crate::arguments::shape;
use crate::output::{self, Table};
use crate::session::Session;
use anyhow::Result;
use nibble_quant::{PRESETS, presets};
use serde_json::json;

/// List the schemes that weights can be quantized to, with their exact bits per weight
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: nibble schemes --shape 576x576

Bits per weight count everything that is stored for a tensor: codes, scales, zeros, second levels, outliers. They depend
on the shape where scales are shared by a row or a group is short.")]
pub struct Schemes {
    /// Shape to count bits for
    #[arg(long, value_name = "ROWSxCOLUMNS", value_parser = shape, default_value = "4096x4096")]
    shape: [usize; 2],
}

impl Run for Schemes {
    fn run(self, session: &Session) -> Result<()> {
        let bits = |preset: &nibble_quant::Preset| preset.scheme.weight.bits_per_weight(self.shape);
        if session.json {
            let row = |preset: &nibble_quant::Preset| {
                json!({
                    "name": preset.name, "bits_per_weight": bits(preset), "summary": preset.summary,
                    "algorithm": preset.algorithm, "default": preset.name == presets::DEFAULT,
                    "spec": preset.scheme.weight,
                })
            };
            return output::json(&PRESETS.iter().map(row).collect::<Vec<_>>());
        }
        let mut table = Table::new(&["scheme", "bits/weight", "algorithm", "what it is"]);
        for preset in PRESETS {
            let name = preset.name.to_string();
            table.row(vec![name, format!("{:.4}", bits(preset)), preset.algorithm.into(), preset.summary.into()]);
        }
        output::say(&table.render())?;
        output::say(&format!(
            "\nbits of a {} weight; default for linear layers {}, for embeddings and output heads {}",
            output::shape(&self.shape),
            presets::DEFAULT,
            presets::DEFAULT_EMBEDDING
        ))
    }
}
