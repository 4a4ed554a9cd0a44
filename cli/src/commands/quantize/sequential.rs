//! The part of a conversion that goes through the model block by block.

use super::Quantize;
use crate::origin::Origin;
use crate::output;
use crate::progress::Meter;
use crate::session::Session;
use anyhow::{Context as _, Result, bail};
use nibble_models::ModelError;
use nibble_models::sequential::{BlockReport, Learning, SequentialPlan, quantize_blocks};
use nibble_quant::convert::Blocks;
use nibble_quant::format::TensorSource;
use nibble_quant::recipe::Action;
use nibble_quant::{QuantError, Recipe, algo};
use std::path::PathBuf;

/// How a conversion goes through the model.
#[derive(Debug, Clone, clap::Args)]
pub struct SequentialWords {
    /// Quantize block by block, each on what the quantized blocks before it give for --calib: one block's weights and Gram
    /// matrices in memory at a time. Learned rounding (`--algorithm autoround`) does so anyway
    #[arg(long, requires = "calib")]
    pub sequential: bool,
    /// Steps a block that rounding is learned for
    #[arg(long, value_name = "N", default_value_t = Learning::default().steps)]
    pub learn_steps: usize,
    /// Sequences of 512 tokens that a step of learning takes
    #[arg(long, value_name = "N", default_value_t = Learning::default().sequences)]
    pub learn_batch: usize,
    /// How far a group's scale may be moved by learning, as a share of it
    #[arg(long, value_name = "SHARE", default_value_t = Learning::default().clip)]
    pub learn_clip: f32,
}

impl Quantize {
    /// Whether the recipe has to go through the model block by block.
    pub(super) fn by_blocks(&self, source: &dyn TensorSource, recipe: &Recipe) -> Result<bool> {
        if self.sequential.sequential {
            return Ok(true);
        }
        for info in source.infos().iter().filter(|info| info.shape.len() == 2) {
            if let Action::Quantize { algorithm, .. } = recipe.decide(&info.name, &info.shape)?.action
                && algo::algorithm(algorithm)?.learns
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Where finished blocks are until the conversion is done.
    fn blocks_folder(&self) -> PathBuf {
        let mut name = self.output.file_name().unwrap_or_default().to_owned();
        name.push(".blocks");
        self.output.with_file_name(name)
    }

    pub(super) fn quantize_blocks(&self, session: &Session, origin: &Origin<'_>, recipe: &Recipe) -> Result<Blocks> {
        let source = origin.source();
        let Some(text) = &self.calibration.calib else {
            bail!("block by block on which text? --calib FILE, or --calib alone for one that the model writes")
        };
        let (config, tokenizer) = (origin.config()?, origin.tokenizer()?);
        let calibration = self.calibration.plan(text, &tokenizer, config.max_positions)?;
        let tokens = self.calibration.tokens(session, origin, text, &calibration, self.threads)?;
        let plan = SequentialPlan {
            calibration: &calibration,
            learning: Learning {
                steps: self.sequential.learn_steps,
                sequences: self.sequential.learn_batch,
                clip: self.sequential.learn_clip,
                ..Learning::default()
            },
            levels: self.learns_levels(),
            seed: self.seed,
        };
        let folder = self.blocks_folder();
        if !self.resume && folder.exists() {
            std::fs::remove_dir_all(&folder).with_context(|| format!("can't remove {}", folder.display()))?;
        }
        let words =
            format!("{}\n{tokens:?}\n{:?} {} {plan:?}", recipe.to_toml()?, calibration.tokens, calibration.n_ctx);
        let mut blocks = Blocks::open(&folder, &Blocks::fingerprint_of(source, &words)?)?;
        let meter = Meter::new(session, "quantize", "blocks");
        let (mut began, mut gained, mut learned) = (false, 0.0, 0);
        let made = quantize_blocks(source, &config, recipe, &tokens, &plan, &mut blocks, |done: &BlockReport| {
            if !began {
                meter.begin(done.of as u64, 0);
                began = true;
            }
            if let Some(what) = done.learned {
                gained += what.after.min(what.before) / what.before.max(f64::MIN_POSITIVE);
                learned += 1;
                if !session.quiet {
                    let (before, after) = (what.before, what.after);
                    session.remark(format!("layer {}: error {before:.5} -> {after:.5} by learning", done.layer));
                }
            }
            meter.add_thing("");
            !session.stopped()
        });
        drop(meter);
        if let Err(ModelError::Quant(QuantError::Stopped)) = &made {
            output::remark(&format!("{} keeps the blocks that are done: --resume goes on", folder.display()));
        }
        made?;
        if learned > 0 {
            let left = 100.0 * gained / f64::from(learned);
            output::remark(&format!("learning leaves {left:.1} % of the blocks' errors, on text it hasn't seen"));
        }
        Ok(blocks)
    }
}
