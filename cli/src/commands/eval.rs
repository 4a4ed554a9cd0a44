//! `nibble eval`: how much worse a quantized model predicts a text than its reference.

use super::Run;
use crate::failure::Stopped;
use crate::output;
use crate::progress::Meter;
use crate::running::{Running, Speaker, WithSpeaker};
use crate::session::Session;
use anyhow::{Context as _, Result, bail};
use nibble_models::Model;
use nibble_models::backend::Backend;
use nibble_models::eval::{EvalPlan, EvalReport, beginning, evaluate};
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;

/// Perplexity on a text, and KL divergence and agreement with a reference checkpoint, as llama-perplexity defines them
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: nibble eval smol-int4 --reference SmolLM2-135M-Instruct --text news.txt --chunks 40

The text is cut into chunks of --ctx tokens; the predictions in each chunk's second half are scored. The reference runs
with activations in single precision. Figures compare only with figures of the same text, --ctx and --chunks.")]
pub struct Eval {
    /// Checkpoint folder or GGUF file, or ORG/NAME on the hub
    #[arg(value_name = "CHECKPOINT")]
    checkpoint: String,
    /// The checkpoint it was made from
    #[arg(long, value_name = "CHECKPOINT")]
    reference: Option<String>,
    /// The text to predict
    #[arg(long, short = 'f', value_name = "FILE")]
    text: PathBuf,
    /// Score at most this many chunks
    #[arg(long, value_name = "N")]
    chunks: Option<usize>,
    /// Tokens of a chunk
    #[arg(short, long, value_name = "N", default_value_t = 512)]
    ctx: usize,
    /// Fail if perplexity is above this multiple of the reference's
    #[arg(long, value_name = "RATIO", requires = "reference")]
    max_ppl_ratio: Option<f64>,
    /// Fail if the mean KL divergence is above this
    #[arg(long, value_name = "NATS", requires = "reference")]
    max_kl: Option<f64>,
    #[command(flatten)]
    running: Running,
}

impl Run for Eval {
    fn run(self, session: &Session) -> Result<()> {
        let bytes = std::fs::read(&self.text).with_context(|| format!("can't read {}", self.text.display()))?;
        let text = String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8", self.text.display()))?;
        self.running.with(session, &self.checkpoint, Scoring { words: &self, session, text: &text })
    }
}

/// The text is predicted, by the reference too if there is one.
struct Scoring<'a> {
    words: &'a Eval,
    session: &'a Session,
    text: &'a str,
}

impl WithSpeaker for Scoring<'_> {
    fn run<B: Backend>(self, speaker: Speaker<B>) -> Result<()> {
        let Scoring { words, session, text } = self;
        let tokens = speaker.tokenizer.encode(text, false)?;
        let reference = match &words.reference {
            Some(reference) => {
                let path = crate::hub::checkpoint(session, reference)?;
                // On the CPU wherever the model runs: what it is compared with doesn't change with the device.
                let model = Model::load_on(&path, speaker.pool, nibble_kernels::ActKind::F32)?;
                same_tokens(&model, text, &tokens)?;
                Some(model)
            }
            None => None,
        };
        let plan = EvalPlan { n_ctx: words.ctx, chunks: words.chunks, bos: beginning(&speaker.tokenizer)? };
        let meter = Meter::new(session, "eval", "chunks");
        let start = Instant::now();
        let mut stopped = false;
        let report = evaluate(
            speaker.model.decoder(),
            reference.as_ref().map(Model::decoder),
            &tokens,
            plan,
            |done, of, so_far| {
                if done == 1 {
                    meter.begin(of as u64, 0);
                }
                meter.add_thing(&in_short(so_far));
                stopped = session.stopped() && done < of;
                !stopped
            },
        )?;
        drop(meter);
        let seconds = start.elapsed().as_secs_f64();
        if session.json {
            let mut value = serde_json::to_value(&report)?;
            value["model"] = json!(speaker.model.path());
            value["reference"] = json!(reference.as_ref().map(Model::path));
            value["text"] = json!(words.text);
            value["text_tokens"] = json!(tokens.len());
            value["activations"] = json!(words.running.activations.name());
            value["device"] = json!(words.running.device.name());
            value["seconds"] = json!(seconds);
            output::json(&value)?;
        } else {
            output::say(&figures(&report))?;
        }
        if stopped {
            return Err(Stopped.into());
        }
        words.judge(&report)
    }
}

impl Eval {
    fn judge(&self, report: &EvalReport) -> Result<()> {
        // A figure that is not a number is over any limit.
        let over = |figure: Option<f64>, limit: Option<f64>| match (figure, limit) {
            (Some(figure), Some(limit)) if figure > limit || figure.is_nan() => Some((figure, limit)),
            _ => None,
        };
        if let Some((ratio, limit)) = over(report.ppl_ratio, self.max_ppl_ratio) {
            bail!("perplexity is {ratio:.4} times the reference's, wanted at most {limit}");
        }
        if let Some((kl, limit)) = over(report.kl.map(|kl| kl.mean), self.max_kl) {
            bail!("mean KL divergence {kl:.5}, wanted at most {limit}");
        }
        Ok(())
    }
}

/// Refuses a reference that reads the text as other tokens: its predictions would be about something else.
fn same_tokens(reference: &Model, text: &str, tokens: &[u32]) -> Result<()> {
    let path = reference.path();
    if reference.sidecars().read("tokenizer.json")?.is_some() && reference.tokenizer()?.encode(text, false)? != tokens {
        bail!("{}: its tokenizer reads the text as other tokens than the model's", path.display());
    }
    Ok(())
}

fn in_short(report: &EvalReport) -> String {
    match report.kl {
        Some(kl) => format!("ppl {:.3}, kl {:.5}", report.ppl, kl.mean),
        None => format!("ppl {:.3}", report.ppl),
    }
}

fn figures(report: &EvalReport) -> String {
    let mut lines = vec![format!("perplexity       {:.4} +- {:.4}", report.ppl, report.ppl_error)];
    if let (Some(reference), Some(ratio)) = (report.reference_ppl, report.ppl_ratio) {
        lines.push(format!("reference        {reference:.4}, ratio {ratio:.5}"));
    }
    if let Some(kl) = report.kl {
        lines.push(format!("KL divergence    {:.6} +- {:.6} (mean, nats)", kl.mean, kl.error));
        lines.push(format!(
            "                 median {:.6}, 90 % {:.6}, 99 % {:.6}, largest {:.6}",
            kl.median, kl.p90, kl.p99, kl.max
        ));
    }
    if let Some(same) = report.same_top1 {
        lines.push(format!("same top token   {:.2} %", same * 100.0));
    }
    lines.push(format!("scored           {} tokens in {} chunks of {}", report.scored, report.chunks, report.n_ctx));
    lines.join("\n")
}
