//! `nibble verify`: is a checkpoint whole and sound.

use super::Run;
use crate::arguments::Threads;
use crate::output;
use crate::progress::Meter;
use crate::session::Session;
use anyhow::Result;
use nibble_quant::convert;
use serde_json::json;

/// Check a checkpoint: files against the manifest's sha256 sums, every tensor decoded and finite
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: nibble verify smol-int4")]
pub struct Verify {
    /// Checkpoint folder or file of any format, or ORG/NAME on the hub
    #[arg(value_name = "CHECKPOINT")]
    checkpoint: String,
    #[command(flatten)]
    threads: Threads,
}

impl Run for Verify {
    fn run(self, session: &Session) -> Result<()> {
        self.threads.set_for_conversion()?;
        let path = crate::hub::checkpoint(session, &self.checkpoint)?;
        let meter = Meter::new(session, "verify", "tensors");
        let found = convert::verify(&path, &meter, Some(session.stop()))?;
        drop(meter);
        if session.json {
            return output::json(&json!({
                "ok": true, "path": path, "format": found.format, "tensors": found.tensors,
                "opaque_tensors": found.opaque, "hashed_files": found.files,
            }));
        }
        let hashed = match found.files {
            0 => "no manifest, so nothing to compare files with".to_string(),
            files => format!("{files} files agree with the manifest"),
        };
        let opaque = match found.opaque {
            0 => String::new(),
            opaque => format!(", {opaque} not numbers and left alone"),
        };
        output::say(&format!(
            "{}: ok ({}; {} tensors decoded and finite{opaque}; {hashed})",
            path.display(),
            found.format,
            found.tensors
        ))
    }
}
