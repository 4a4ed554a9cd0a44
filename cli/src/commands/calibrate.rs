//! `nibble calibrate`: what a model's linear layers read, kept for conversions.

use super::Run;
use crate::arguments::Threads;
use crate::origin::{Origin, open, rotations, turn};
use crate::output;
use crate::progress::{Meter, duration};
use crate::session::Session;
use anyhow::{Context as _, Result, bail};
use nibble_kernels::{ActKind, Pool};
use nibble_models::Tokenizer;
use nibble_models::calibrate::{Calibration, CalibrationPlan, calibrate};
use nibble_models::cpu::CpuBackend;
use nibble_models::decoder::Decoder;
use nibble_models::eval::beginning;
use nibble_models::gradient::calibrate_gradients;
use nibble_models::own_text::{OwnTextPlan, own_text};
use nibble_models::weights::Weights;
use nibble_quant::QuantError;
use nibble_quant::convert::Rounded;
use nibble_quant::stats::Turn;
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// Run a model over a text and keep statistics of what its linear layers read, for `quantize --stats`
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: nibble calibrate SmolLM2-135M-Instruct --calib book.txt -o smol.stats
Example: nibble calibrate SmolLM2-135M-Instruct --calib book.txt -o smol.imatrix.gguf
Example: nibble calibrate SmolLM2-135M-Instruct -o smol.stats

Without --calib the model writes the text itself. Choose a text that is none of those that the model is judged by. A name
that ends in .gguf gives llama.cpp's imatrix, which holds second moments only; GPTQ needs the Gram matrices that are kept otherwise.")]
pub struct Calibrate {
    /// Checkpoint folder in floats, or ORG/NAME on the hub
    #[arg(value_name = "SRC")]
    source: String,
    /// File to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    words: CalibrationWords,
    /// Observe the model as `quantize --rotate` turns it, for that
    #[arg(long, value_name = "HOW", value_parser = rotations())]
    rotate: Option<String>,
    /// Seed of --rotate
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    threads: Threads,
}

/// The word for text that the model writes itself.
const OWN_TEXT: &str = "self";
/// The scheme of its weights while it does.
const WRITING: &str = "int8-g32";

/// How calibration goes.
#[derive(Debug, Clone, clap::Args)]
pub struct CalibrationWords {
    /// Text to run the model over: what its layers read there says which errors matter. Of a .jsonl file the `text` of every
    /// line, or its `messages`; without FILE, or with the word `self`, the model writes a text itself
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = OWN_TEXT)]
    pub calib: Option<PathBuf>,
    /// Most tokens of that text to run
    #[arg(long, value_name = "N", default_value_t = 32768)]
    pub calib_tokens: usize,
    /// Memory for Gram matrices in MiB; layers beyond it are weighted by second moments alone
    #[arg(long, value_name = "MIB", default_value_t = 4096)]
    pub gram_memory: u64,
    /// Weigh errors by what they do to the model's predictions: gradients by what layers give, for --effort max; takes
    /// about four times as long, and all of the model in single precision in memory
    #[arg(long)]
    pub gradients: bool,
}

impl Run for Calibrate {
    fn run(self, session: &Session) -> Result<()> {
        self.threads.set_for_conversion()?;
        let text = self.words.calib.as_deref().unwrap_or(Path::new(OWN_TEXT));
        let path = crate::hub::checkpoint(session, &self.source)?;
        let start = Instant::now();
        let mut words = self.words.clone();
        if self.output.extension().is_some_and(|e| e == "gguf") {
            if self.rotate.is_some() {
                let why = "an imatrix can't say how its model was turned; name a file of nibble's own".into();
                return Err(QuantError::Spec { what: "--rotate".into(), why }.into());
            }
            words.gram_memory = 0;
        }
        let rotation = self.rotate.map(|rotation| Turn { rotation, seed: self.seed });
        let (source, _) = open(&path)?;
        let turned = turn(&*source, rotation.as_ref())?;
        let origin = Origin::new(&path, &*source, turned.as_deref())?;
        let mut calibration = words.run(session, &origin, text, self.threads)?;
        calibration.stats.turned = rotation;
        calibration.stats.write(&self.output)?;
        let seconds = start.elapsed().as_secs_f64();
        if session.json {
            let mut value = figures(&calibration);
            value["path"] = json!(self.output);
            value["seconds"] = json!(seconds);
            value["peak_rss_bytes"] = json!(output::peak_rss());
            return output::json(&value);
        }
        let memory = output::peak_rss().map(|rss| format!(", peak memory {}", output::bytes(rss))).unwrap_or_default();
        output::say(&format!("{}: {} in {}{memory}", self.output.display(), in_words(&calibration), duration(seconds)))
    }
}

impl CalibrationWords {
    /// How a text is run.
    pub fn plan(&self, text: &Path, tokenizer: &Tokenizer, max_positions: usize) -> Result<CalibrationPlan> {
        Ok(CalibrationPlan {
            n_ctx: 512.min(max_positions),
            tokens: Some(self.calib_tokens),
            gram_bytes: self.gram_memory << 20,
            bos: beginning(tokenizer)?,
            text: match text == Path::new(OWN_TEXT) {
                true => "text of its own".into(),
                false => text.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
            },
        })
    }

    /// The tokens of a text, or those that the model writes itself.
    pub fn tokens(
        &self,
        session: &Session,
        origin: &Origin<'_>,
        text: &Path,
        plan: &CalibrationPlan,
        threads: Threads,
    ) -> Result<Vec<u32>> {
        let tokenizer = origin.tokenizer()?;
        if text != Path::new(OWN_TEXT) {
            return Ok(tokenizer.encode(&open_text(text)?, false)?);
        }
        // Writing takes longer than observing, and 8 bits are enough for it.
        let backend = CpuBackend::new(Arc::new(Pool::new(threads.count())), ActKind::I8);
        let rounded = Rounded::new(origin.source(), WRITING)?;
        let decoder = Decoder::load(&origin.config()?, Weights::new(&rounded), backend)?;
        let own = OwnTextPlan { tokens: self.calib_tokens, length: plan.n_ctx, bos: plan.bos, seed: 0 };
        let meter = Meter::new(session, "write", "steps");
        let written = own_text(&decoder, &tokenizer, &own, |done, of| {
            if done == 1 {
                meter.begin(of as u64, 0);
            }
            meter.add_thing("");
            !session.stopped()
        });
        drop(meter);
        Ok(written?)
    }

    /// Runs a model over a text.
    pub fn run(&self, session: &Session, origin: &Origin<'_>, text: &Path, threads: Threads) -> Result<Calibration> {
        let (config, tokenizer) = (origin.config()?, origin.tokenizer()?);
        let plan = self.plan(text, &tokenizer, config.max_positions)?;
        let tokens = self.tokens(session, origin, text, &plan, threads)?;
        let meter = Meter::new(session, "calibrate", "chunks");
        let progress = |done: usize, of: usize| {
            if done == 1 {
                meter.begin(of as u64, 0);
            }
            meter.add_thing("");
            !session.stopped()
        };
        let calibration = match self.gradients {
            false => {
                let backend = CpuBackend::new(Arc::new(Pool::new(threads.count())), ActKind::F32);
                let decoder = Decoder::load(&config, Weights::new(origin.source()), backend)?;
                calibrate(&decoder, &tokens, &plan, progress)
            }
            true => calibrate_gradients(origin.source(), &config, &tokens, &plan, progress),
        };
        drop(meter);
        Ok(calibration?)
    }
}

/// A text of UTF-8; of a .jsonl file the texts of its lines, one after the other.
pub fn open_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("can't read {}", path.display()))?;
    let text = String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8", path.display()))?;
    if path.extension().is_none_or(|extension| extension != "jsonl") {
        return Ok(text);
    }
    let mut texts = Vec::new();
    for (line, number) in text.lines().zip(1..).filter(|(line, _)| !line.trim().is_empty()) {
        let place = || format!("{}, line {number}", path.display());
        let sample: Sample = serde_json::from_str(line).with_context(place)?;
        texts.push(match (sample.text, sample.messages) {
            (Some(text), _) => text,
            (None, Some(messages)) => messages.into_iter().map(|m| m.content).collect::<Vec<_>>().join("\n\n"),
            (None, None) => bail!("{}: an object without `text` and without `messages`", place()),
        });
    }
    Ok(texts.join("\n\n"))
}

/// A line of a .jsonl file.
#[derive(Deserialize)]
struct Sample {
    text: Option<String>,
    messages: Option<Vec<Message>>,
}

#[derive(Deserialize)]
struct Message {
    content: String,
}

/// What was kept, in words.
pub fn in_words(calibration: &Calibration) -> String {
    let (with, without) = calibration.grams;
    let less = match without {
        0 => String::new(),
        _ => format!(", {without} with second moments only"),
    };
    format!("{} tokens, {with} inputs with Gram matrices{less}", calibration.tokens)
}

fn figures(calibration: &Calibration) -> Value {
    let (with, without) = calibration.grams;
    json!({"tokens": calibration.tokens, "inputs_with_gram": with, "inputs_without_gram": without})
}
