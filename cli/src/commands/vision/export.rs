//! `nibble vision export`: an ONNX model of a checkpoint that has no graph.

use super::data::Output;
use crate::commands::Run;
use crate::output;
use crate::session::Session;
use anyhow::Result;
use nibble_models::vision::export::export;
use nibble_quant::onnx::External;
use serde_json::json;
use std::path::PathBuf;

/// Write a float ONNX model of a checkpoint: EfficientNet-Lite from a .pth file
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: nibble vision export efficientnet-lite0.pth -o lite0.onnx --size 224")]
pub struct Export {
    /// The checkpoint
    #[arg(value_name = "CHECKPOINT")]
    checkpoint: PathBuf,
    #[command(flatten)]
    output: Output,
    /// Pixels a side of the pictures
    #[arg(long, value_name = "PIXELS", default_value_t = 224, value_parser = clap::value_parser!(u16).range(32..=2048))]
    size: u16,
}

impl Run for Export {
    fn run(self, session: &Session) -> Result<()> {
        self.output.check()?;
        let path = &self.output.output;
        let model = export(&self.checkpoint, usize::from(self.size))?;
        model.save(path, External::Auto)?;
        let nodes = model.graph().node.len();
        if session.json {
            return output::json(&json!({"path": path, "nodes": nodes}));
        }
        output::say(&format!("{}: {nodes} nodes", path.display()))
    }
}
