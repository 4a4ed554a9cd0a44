//! `nibble vision export`: an ONNX model of a checkpoint that has no graph.

use super::data::Output;
use crate::commands::Run;
use crate::output;
use crate::session::Session;
use anyhow::Result;
use nibble_models::vision::export::{ARCHITECTURES, export};
use nibble_quant::onnx::External;
use serde_json::json;
use std::path::PathBuf;

/// Write a float ONNX model of a checkpoint that has no graph: EfficientNet-Lite, ViT, DINOv2, BERT
#[derive(Debug, clap::Args)]
#[command(after_help = after_help())]
pub struct Export {
    /// The checkpoint: a .pth or .safetensors file, or a folder with weights and config.json
    #[arg(value_name = "CHECKPOINT")]
    checkpoint: PathBuf,
    #[command(flatten)]
    output: Output,
    /// Pixels a side of the pictures [default: what the checkpoint was made for]
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u16).range(14..=2048))]
    size: Option<u16>,
}

fn after_help() -> String {
    let rows = ARCHITECTURES.iter().map(|a| format!("  {:<18} {}", a.name, a.summary)).collect::<Vec<_>>().join("\n");
    format!("Example: nibble vision export efficientnet-lite0.pth -o lite0.onnx\n\nArchitectures:\n{rows}")
}

impl Run for Export {
    fn run(self, session: &Session) -> Result<()> {
        self.output.check()?;
        let path = &self.output.output;
        let model = export(&self.checkpoint, self.size.map(usize::from))?;
        model.save(path, External::Auto)?;
        let nodes = model.graph().node.len();
        if session.json {
            return output::json(&json!({"path": path, "nodes": nodes}));
        }
        output::say(&format!("{}: {nodes} nodes", path.display()))
    }
}
