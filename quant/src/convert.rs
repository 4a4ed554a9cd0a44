//! From one checkpoint to another, a block of rows at a time.
//!
//! [`plan()`] decides everything and touches no value: which tensors become what, at what size, in how much memory.
//! [`quantize`], [`import_gguf`] and [`transform`] then read, convert and write in parallel; where each byte goes was settled by the
//! plan, so the output is the same for any number of threads, and a run that was killed can be taken up again.

mod blocks;
mod diff;
mod engine;
mod import;
mod levels;
mod plan;
mod progress;
mod recipe;
mod rounded;
mod sidecars;
mod sums;
mod verify;

pub use blocks::Blocks;
pub use diff::{Difference, diff};
pub use engine::{Judge, Options, Report};
pub use import::{import_gguf, transform};
pub use levels::{OWN, levels_of, with_learned_levels};
pub use plan::{Action, Choice, Plan, PlanRow, Quantize, Quantizer, Rows, plan_with};
pub use progress::{Progress, Silent, Stage};
pub use recipe::{fallbacks, plan, plan_after};
pub use rounded::Rounded;
pub use sidecars::sidecars;
pub use verify::{Verified, verify};

use crate::error::Result;
use crate::format::TensorSource;
use engine::{Engine, Made};
use std::path::{Path, PathBuf};

/// Carries a plan out: writes a native checkpoint folder with all sidecars, a manifest and the tensors as planned.
/// `recipe` is the text that goes into the manifest.
///
/// # Errors
/// If input and output overlap, the disk is too small, a value isn't finite, the work was stopped, or a file can't be
/// read or written. The output folder then doesn't exist (or is as it was before); a partial folder is left beside it
/// where resuming makes sense, and the progress is told so.
pub fn quantize(
    plan: &Plan,
    source: &dyn TensorSource,
    recipe: &str,
    out: &Path,
    options: &Options,
    progress: &dyn Progress,
) -> Result<Report> {
    let made = Made { by: "quantize", recipe: recipe.to_owned(), seed: options.seed };
    Engine { source, items: &plan.items, made, options, progress }.run(out)
}

/// A sidecar: where it is, and its path in the folder.
pub type Sidecar = (PathBuf, PathBuf);
