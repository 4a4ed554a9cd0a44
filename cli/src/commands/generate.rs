//! `nibble generate`: text from a prompt.

use super::Run;
use crate::failure::{Stopped, Usage};
use crate::output;
use crate::running::{Running, Sampling, Speaker, Stream, WithSpeaker, answer_json, timings};
use crate::session::Session;
use anyhow::{Context as _, Result};
use nibble_models::backend::Backend;
use nibble_models::decoder::ContextPlan;
use nibble_models::generate::{Finish, generate};
use nibble_models::template::{Message, RenderOptions};
use serde_json::json;
use std::io::Read;
use std::path::PathBuf;

/// Generate text from a prompt; it goes to stdout as it comes, timings to stderr
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: nibble generate smol-int4 --chat -p \"Why is the sky blue?\" -n 96
Example: nibble generate smol-int4 -p \"Once upon a time\" --temperature 0.8 --top-p 0.95 --seed 7")]
pub struct Generate {
    /// Checkpoint folder or GGUF file, or ORG/NAME on the hub
    #[arg(value_name = "CHECKPOINT")]
    checkpoint: String,
    /// The prompt
    #[arg(short, long, value_name = "TEXT", conflicts_with = "file")]
    prompt: Option<String>,
    /// Read the prompt from a file, - for stdin
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Put the prompt into the model's chat template, as a user's message
    #[arg(long)]
    chat: bool,
    /// The system message of the chat template
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// Tokens of context [default: what prompt and answer need, at most what the model was made for]
    #[arg(short, long, value_name = "N")]
    ctx: Option<usize>,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    running: Running,
}

impl Run for Generate {
    fn run(self, session: &Session) -> Result<()> {
        let prompt = self.prompt()?;
        self.running.with(session, &self.checkpoint, Speaking { words: &self, session, prompt: &prompt })
    }
}

/// Text from a prompt.
struct Speaking<'a> {
    words: &'a Generate,
    session: &'a Session,
    prompt: &'a str,
}

impl WithSpeaker for Speaking<'_> {
    fn run<B: Backend>(self, speaker: Speaker<B>) -> Result<()> {
        self.words.speak(self.session, &speaker, self.prompt)
    }
}

impl Generate {
    fn speak<B: Backend>(&self, session: &Session, speaker: &Speaker<B>, prompt: &str) -> Result<()> {
        let tokens = self.tokens(speaker, prompt)?;
        let options = self.sampling.options(&speaker.model)?;
        let decoder = speaker.model.decoder();
        let limit = self.ctx.unwrap_or(decoder.config().max_positions);
        let wanted = tokens.len().saturating_add(options.max_tokens);
        let plan = ContextPlan { capacity: wanted.min(limit), kv: self.running.kv.kind(), ..ContextPlan::default() };
        let mut context = decoder.context(plan)?;
        let mut stream = Stream::new(session);
        let answer =
            generate(decoder, &speaker.tokenizer, &mut context, 0, &tokens, &options, |piece| stream.take(piece))?;
        stream.end()?;
        if session.json {
            let mut value = answer_json(&answer);
            value["model"] = json!(speaker.model.path());
            value["load_seconds"] = json!(speaker.load_seconds);
            value["seed"] = json!(options.sample.seed);
            value["temperature"] = json!(options.sample.temperature);
            output::json(&value)?;
        }
        session.remark(timings(&answer, Some(speaker.load_seconds)));
        match answer.finish {
            Finish::Cancelled => Err(Stopped.into()),
            _ => Ok(()),
        }
    }

    fn prompt(&self) -> Result<String> {
        match (&self.prompt, &self.file) {
            (Some(prompt), _) => Ok(prompt.clone()),
            (None, Some(file)) if file.as_os_str() == "-" => {
                let mut text = String::new();
                std::io::stdin().read_to_string(&mut text).context("can't read the prompt from stdin")?;
                Ok(text)
            }
            (None, Some(file)) => {
                std::fs::read_to_string(file).with_context(|| format!("can't read the prompt from {}", file.display()))
            }
            (None, None) => Err(Usage("no prompt; give one with -p TEXT or -f FILE".to_string()).into()),
        }
    }

    fn tokens<B: Backend>(&self, speaker: &Speaker<B>, prompt: &str) -> Result<Vec<u32>> {
        if !self.chat {
            return Ok(speaker.tokenizer.encode(prompt, true)?);
        }
        let mut messages = Vec::new();
        messages.extend(self.system.as_ref().map(|text| Message::new("system", text)));
        messages.push(Message::new("user", prompt));
        let text = speaker.model.chat_template()?.render(&messages, &RenderOptions::default())?;
        Ok(speaker.tokenizer.encode(&text, false)?)
    }
}
