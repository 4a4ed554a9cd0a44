//! `nibble chat`: a conversation.

use super::Run;
use crate::output;
use crate::running::{Running, Sampling, Speaker, Stream, WithSpeaker, answer_json, timings};
use crate::session::Session;
use anyhow::{Context as _, Result};
use nibble_models::backend::Backend;
use nibble_models::decoder::{Context, ContextPlan};
use nibble_models::generate::{GenerateOptions, Generation, generate};
use nibble_models::template::{ChatTemplate, Message, RenderOptions};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use std::io::IsTerminal;
use std::path::PathBuf;

/// Positions of a context that nobody asked to be longer.
const DEFAULT_CONTEXT: usize = 4096;

const HELP: &str = "\
/help           this list
/clear          forget the conversation
/system [TEXT]  set the system message and start again; without a text, show it
/retry          answer the last message again, with another seed
/exit           leave (Ctrl-D too)
Ctrl-C stops an answer. A line that ends in \\ goes on in the next one.";

/// Talk with a model; the conversation stays in its memory, so that a turn costs only its own tokens
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: nibble chat smol-int4 --system \"You answer in one sentence.\"
Example: echo \"Why is the sky blue?\" | nibble chat smol-int4 --quiet

/help lists what can be typed besides messages. With --json each answer is one line of JSON.")]
pub struct Chat {
    /// Checkpoint folder or GGUF file, or ORG/NAME on the hub
    #[arg(value_name = "CHECKPOINT")]
    checkpoint: String,
    /// The system message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Tokens of context; the oldest turns are forgotten when it is full [default: 4096, at most what the model can]
    #[arg(short, long, value_name = "N")]
    ctx: Option<usize>,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    running: Running,
}

impl Run for Chat {
    fn run(self, session: &Session) -> Result<()> {
        self.running.with(session, &self.checkpoint, Talking { words: &self, session })
    }
}

/// A conversation from its first message to its last.
struct Talking<'a> {
    words: &'a Chat,
    session: &'a Session,
}

impl WithSpeaker for Talking<'_> {
    fn run<B: Backend>(self, speaker: Speaker<B>) -> Result<()> {
        let Talking { words, session } = self;
        let template = speaker.model.chat_template()?;
        let options = words.sampling.options(&speaker.model)?;
        let decoder = speaker.model.decoder();
        let limit = decoder.config().max_positions;
        let capacity = words.ctx.unwrap_or(DEFAULT_CONTEXT.min(limit)).min(limit);
        let context =
            decoder.context(ContextPlan { capacity, kv: words.running.kv.kind(), ..ContextPlan::default() })?;
        let mut talk = Talk { speaker: &speaker, template, options, context, held: Vec::new(), messages: Vec::new() };
        talk.start(words.system.clone());
        let mut lines = Lines::open(session)?;
        if lines.interactive() {
            session.remark(format!("{}; /help for help, Ctrl-D to leave", speaker.model.path().display()));
        }
        while let Some(line) = lines.next()? {
            let line = line.trim();
            match line.strip_prefix('/') {
                _ if line.is_empty() => continue,
                Some("exit" | "quit" | "bye") => break,
                Some(command) => talk.command(command, session)?,
                None => {
                    talk.messages.push(Message::new("user", line));
                    talk.answer(session)?;
                }
            }
        }
        lines.close();
        Ok(())
    }
}

/// A conversation and what the model holds of it.
struct Talk<'a, B: Backend> {
    speaker: &'a Speaker<B>,
    template: ChatTemplate,
    options: GenerateOptions,
    context: Context<B>,
    /// Tokens whose keys and values are in the cache.
    held: Vec<u32>,
    messages: Vec<Message>,
}

impl<B: Backend> Talk<'_, B> {
    fn start(&mut self, system: Option<String>) {
        self.messages.clear();
        self.messages.extend(system.map(|text| Message::new("system", text)));
    }

    fn system(&self) -> Option<&str> {
        self.messages.first().filter(|m| m.role == "system").map(|m| m.content.as_str())
    }

    fn command(&mut self, command: &str, session: &Session) -> Result<()> {
        let (word, rest) = command.split_once(' ').unwrap_or((command, ""));
        match (word, rest.trim()) {
            ("help" | "?", _) => output::remark(HELP),
            ("clear" | "reset", _) => {
                let system = self.system().map(str::to_owned);
                self.start(system);
                session.remark("the conversation is forgotten");
            }
            ("system", "") => output::remark(self.system().unwrap_or("there is no system message")),
            ("system", text) => self.start(Some(text.to_owned())),
            ("retry", _) if self.messages.last().is_some_and(|m| m.role == "assistant") => {
                self.messages.pop();
                self.options.sample.seed = self.options.sample.seed.wrapping_add(1);
                self.answer(session)?;
            }
            ("retry", _) => output::remark("there is no answer yet"),
            (other, _) => output::remark(&format!("/{other} is unknown; /help lists what is known")),
        }
        Ok(())
    }

    /// Answers the last message. What the cache holds of the conversation already is not computed again.
    fn answer(&mut self, session: &Session) -> Result<()> {
        // A Ctrl-C from before the message was not meant for its answer; one from now on is.
        session.resume();
        let Some(prompt) = self.prompt(session)? else {
            self.messages.pop();
            output::remark("this message alone is longer than the context; --ctx makes it longer");
            return Ok(());
        };
        let decoder = self.speaker.model.decoder();
        // The last token is run again even if it is held: its logits are wanted.
        let common = self.held.iter().zip(&prompt).take_while(|(a, b)| a == b).count().min(prompt.len() - 1);
        self.context.truncate(decoder.backend(), 0, common)?;
        let mut stream = Stream::new(session);
        let tokenizer = &self.speaker.tokenizer;
        let fresh = &prompt[common..];
        let answer =
            generate(decoder, tokenizer, &mut self.context, 0, fresh, &self.options, |piece| stream.take(piece));
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                // Nothing is known about what the cache holds now.
                self.held.clear();
                return Err(error.into());
            }
        };
        stream.end()?;
        self.held = prompt;
        self.held.extend(&answer.tokens);
        self.held.truncate(self.context.length(0));
        self.messages.push(Message::new("assistant", answer.text.trim()));
        session.resume();
        self.report(&answer, session)
    }

    fn report(&self, answer: &Generation, session: &Session) -> Result<()> {
        if session.json {
            return output::say(&answer_json(answer).to_string());
        }
        session.remark(timings(answer, None));
        Ok(())
    }

    /// The conversation in tokens. Forgets the oldest turns until an answer fits; none if even the last message alone
    /// doesn't.
    fn prompt(&mut self, session: &Session) -> Result<Option<Vec<u32>>> {
        let capacity = self.context.plan().capacity;
        // Room for an answer: what was asked for, but not more than a quarter of the context.
        let room = self.options.max_tokens.min(capacity / 4).max(1);
        loop {
            let text = self.template.render(&self.messages, &RenderOptions::default())?;
            let tokens = self.speaker.tokenizer.encode(&text, false)?;
            if tokens.len() + room <= capacity && !tokens.is_empty() {
                return Ok(Some(tokens));
            }
            let first = usize::from(self.system().is_some());
            // A turn is a message and its answer.
            if self.messages.len() < first + 3 {
                return Ok(None);
            }
            self.messages.drain(first..first + 2);
            session.remark("the context is full: the oldest turn is forgotten");
        }
    }
}

/// Where messages come from: an editor with history on a terminal, else the lines of stdin.
enum Lines {
    Editor { editor: Box<DefaultEditor>, history: Option<PathBuf> },
    Piped(std::io::Lines<std::io::StdinLock<'static>>),
}

impl Lines {
    fn open(session: &Session) -> Result<Lines> {
        if session.json || !std::io::stdin().is_terminal() {
            return Ok(Lines::Piped(std::io::stdin().lines()));
        }
        let mut editor = Box::new(DefaultEditor::new().context("can't edit lines on this terminal")?);
        let history = history_file();
        if let Some(file) = &history {
            // The first conversation has no history yet.
            let _ = editor.load_history(file);
        }
        Ok(Lines::Editor { editor, history })
    }

    fn interactive(&self) -> bool {
        matches!(self, Lines::Editor { .. })
    }

    /// The next message: one line, or several joined by a backslash at their ends. None at the end of input.
    fn next(&mut self) -> Result<Option<String>> {
        let mut message = String::new();
        loop {
            let Some(line) = self.line(if message.is_empty() { "> " } else { ". " })? else {
                return Ok((!message.is_empty()).then_some(message));
            };
            match line.strip_suffix('\\') {
                Some(begun) => message.extend([begun, "\n"]),
                None => {
                    message.push_str(&line);
                    break;
                }
            }
        }
        if let Lines::Editor { editor, .. } = self
            && !message.trim().is_empty()
        {
            // A line that can't be remembered can still be answered.
            let _ = editor.add_history_entry(message.as_str());
        }
        Ok(Some(message))
    }

    fn line(&mut self, prompt: &str) -> Result<Option<String>> {
        match self {
            Lines::Piped(lines) => lines.next().transpose().context("can't read stdin"),
            Lines::Editor { editor, .. } => loop {
                match editor.readline(prompt) {
                    Ok(line) => return Ok(Some(line)),
                    Err(ReadlineError::Interrupted) => output::remark("(Ctrl-D or /exit to leave)"),
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(error) => return Err(error).context("can't read the terminal"),
                }
            },
        }
    }

    fn close(self) {
        let Lines::Editor { mut editor, history: Some(file) } = self else { return };
        let saved = match file.parent().map(std::fs::create_dir_all) {
            Some(Err(error)) => Err(error.into()),
            _ => editor.save_history(&file),
        };
        if let Err(error) = saved {
            output::remark(&format!("the history was not kept: {}: {error}", file.display()));
        }
    }
}

/// `nibble/chat_history` in the folder where the user's programs keep their state (XDG base directories).
fn history_file() -> Option<PathBuf> {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
    let state = state.or_else(|| std::env::home_dir().map(|home| home.join(".local/state")))?;
    Some(state.join("nibble").join("chat_history"))
}
