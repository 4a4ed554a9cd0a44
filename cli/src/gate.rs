//! What a conversion has to prove before its output gets its name.

use crate::output;
use crate::progress::Meter;
use crate::running::Activations;
use crate::session::Session;
use anyhow::{Context as _, Result};
use nibble_kernels::Pool;
use nibble_models::trial::{TEXT, Trial, TrialReport};
use nibble_models::{Model, Sidecars, Tokenizer, gguf_sidecars};
use nibble_quant::QuantError;
use nibble_quant::format::{self, gguf::GgufCheckpoint};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// How the output is tried out.
#[derive(Debug, Clone, clap::Args)]
pub struct GateWords {
    /// Try the output on this text against its source [default: a short text of its own after calibration, else none]
    #[arg(long, value_name = "FILE", help_heading = "Trying the output out")]
    eval: Option<PathBuf>,
    /// Score at most this many chunks of 256 tokens
    #[arg(long, value_name = "N", default_value_t = 16, help_heading = "Trying the output out")]
    eval_chunks: usize,
    /// Don't try the output out
    #[arg(long, conflicts_with = "eval", help_heading = "Trying the output out")]
    no_eval: bool,
    /// Refuse an output whose mean KL divergence from its source is above this: none is left, unless by --force
    #[arg(long, value_name = "NATS", default_value_t = 0.5, help_heading = "Trying the output out")]
    max_kl: f64,
}

/// A trial that is ready to be run on the output.
pub struct Gate<'a> {
    session: &'a Session,
    source: PathBuf,
    trial: Trial,
    threads: usize,
    max_kl: f64,
    keep: bool,
    report: OnceLock<TrialReport>,
}

impl GateWords {
    /// The gate, if one is wanted: asked for, or by default where the conversion was `calibrated`. Everything that can
    /// be refused about the text is refused here, before any work.
    ///
    /// # Errors
    /// The text can't be read, or is too short, or there is no tokenizer for it.
    pub fn gate<'a>(
        &self,
        session: &'a Session,
        source: &Path,
        calibrated: bool,
        keep: bool,
        threads: usize,
    ) -> Result<Option<Gate<'a>>> {
        if self.no_eval || self.eval.is_none() && !calibrated {
            return Ok(None);
        }
        let trial = || -> Result<Trial> {
            let tokenizer = tokenizer(source)?;
            let Some(file) = &self.eval else {
                return Ok(Trial::new(&tokenizer, "the text that is built in", TEXT, Some(self.eval_chunks))?);
            };
            let bytes = std::fs::read(file).with_context(|| format!("can't read {}", file.display()))?;
            let text = String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8", file.display()))?;
            Ok(Trial::new(&tokenizer, &file.display().to_string(), &text, Some(self.eval_chunks))?)
        };
        let trial = match trial() {
            Ok(trial) => trial,
            // Nobody asked for it; the conversion is none the worse.
            Err(why) if self.eval.is_none() => {
                output::remark(&format!("the output won't be tried out: {why:#}"));
                return Ok(None);
            }
            Err(why) => return Err(why),
        };
        let (source, report) = (source.to_path_buf(), OnceLock::new());
        Ok(Some(Gate { session, source, trial, threads, max_kl: self.max_kl, keep, report }))
    }
}

/// The tokenizer of a checkpoint of any format.
///
/// # Errors
/// There is none, or it can't be read.
pub fn tokenizer(source: &Path) -> Result<Tokenizer> {
    Ok(Tokenizer::from_sidecars(&sidecars(source)?)?)
}

/// Configuration and tokenizer of a checkpoint of any format.
///
/// # Errors
/// A GGUF file's metadata lacks what they need.
pub fn sidecars(source: &Path) -> Result<Sidecars> {
    match format::detect(source)?.name {
        "gguf" => Ok(gguf_sidecars(&GgufCheckpoint::open(source)?, "float32")?),
        _ => Ok(Sidecars::folder(source)),
    }
}

impl Gate<'_> {
    /// Tries the finished folder, and refuses it where it is worse than it may be.
    pub fn judge(&self, dir: &Path) -> nibble_quant::Result<()> {
        let rejected = |why: String| QuantError::Rejected { path: dir.to_path_buf(), why };
        let refused = match self.run(dir) {
            _ if self.session.stopped() => return Err(QuantError::Stopped),
            Ok(report) => {
                let kl = report.eval.kl.map_or(f64::NAN, |kl| kl.mean);
                self.report.get_or_init(|| report);
                let over = kl.is_nan() || kl > self.max_kl;
                over.then(|| format!("mean KL divergence from its source is {kl:.4}, wanted at most {}", self.max_kl))
            }
            Err(why) => Some(format!("it can't be tried out: {why:#}")),
        };
        match refused {
            None => Ok(()),
            Some(why) if self.keep => {
                output::remark(&format!("kept because of --force: {why}"));
                Ok(())
            }
            Some(why) => Err(rejected(format!("{why}; --force keeps it all the same"))),
        }
    }

    /// What was found, if the trial was run to its end.
    pub fn report(&self) -> Option<&TrialReport> {
        self.report.get()
    }

    fn run(&self, dir: &Path) -> Result<TrialReport> {
        let pool = Arc::new(Pool::new(self.threads));
        let reference = Model::load_on(&self.source, Arc::clone(&pool), Activations::F32.kind())?;
        let model = Model::load_on(dir, pool, Activations::Auto.kind())?;
        let meter = Meter::new(self.session, "try", "chunks");
        meter.begin(self.trial.chunks() as u64, 0);
        Ok(self.trial.run(&model, &reference, |_| {
            meter.add_thing("");
            !self.session.stopped()
        })?)
    }
}

/// The figures and both continuations, in words.
pub fn in_words(report: &TrialReport) -> String {
    let eval = &report.eval;
    let kl = eval.kl.map_or_else(String::new, |kl| format!(", KL divergence {:.4} (99 %: {:.3})", kl.mean, kl.p99));
    let ratio = eval.ppl_ratio.map_or_else(String::new, |ratio| format!("perplexity x {ratio:.3}"));
    let same = eval.same_top1.map_or_else(String::new, |same| format!(", same top token {:.1} %", same * 100.0));
    let line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    format!(
        "against its source, on {} predictions: {ratio}{kl}{same}\n  text    ...{}\n  source  {}\n  result  {}",
        eval.scored,
        line(&report.prompt),
        line(&report.before),
        line(&report.after)
    )
}
