//! What both diagnoses do with what they find: print it, keep it, show it.

use crate::output;
use crate::report::Page;
use anyhow::Result;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Where findings go.
#[derive(Debug, clap::Args)]
pub struct Findings {
    /// Write all that is found, as JSON
    #[arg(long, short, value_name = "FILE.json")]
    output: Option<PathBuf>,
    /// Also write a page (HTML, one file) that shows all of it, with histograms and ranges of channels
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// Replace files that are there
    #[arg(long)]
    force: bool,
    /// Keep what is done in this file, and go on from it
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// Layers and tensors that are listed
    #[arg(long, value_name = "N", default_value_t = 12)]
    pub top: usize,
}

impl Findings {
    /// Refuses to replace files without being told to; before anything is computed.
    pub fn check(&self) -> Result<()> {
        self.output.iter().chain(&self.report).try_for_each(|path| output::may_write(path, self.force))
    }

    /// Where what is done is kept.
    pub fn state(&self) -> Option<&Path> {
        self.state.as_deref()
    }

    /// Writes the files that were asked for.
    pub fn save<T: Serialize>(&self, found: &T, page: impl FnOnce() -> Page) -> Result<()> {
        if let Some(path) = &self.output {
            output::write_whole(path, &serde_json::to_vec_pretty(found)?)?;
        }
        match &self.report {
            Some(path) => page().save(path),
            None => Ok(()),
        }
    }
}
