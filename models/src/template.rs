//! Chat templates: a conversation to the prompt that a model was trained on, as transformers' `apply_chat_template`.
//!
//! The template is the model's own, in Jinja. It sees what transformers shows it: the messages as they are, tools,
//! `add_generation_prompt`, the special tokens, `raise_exception`, `strftime_now`, and `tojson` as Python writes JSON.
//! A template is a stranger's program: its steps, memory, depth and time are bounded. The engine counts steps and bytes;
//! what it doesn't count, such as asking for the length of lists that were added up lazily, ends by the clock.

mod json;
mod time;

use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, SystemTime};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};
use serde::{Deserialize, Serialize};
use serde_json::Map;

use crate::error::{ModelError, Result};
use crate::sidecars::Sidecars;
use crate::tokenizer::token_text;

/// Steps that a template may take; 64 bytes that it makes count as one, which bounds its memory. A conversation of a
/// thousand messages takes about a hundred thousand.
const FUEL: u64 = 2_000_000;
/// Time that a template may take. A conversation of a thousand messages takes about a tenth of a second.
const TIME: Duration = Duration::from_secs(10);
/// Stack of the thread that renders, of which only what is used takes memory: a list nested in itself as often as the
/// steps allow is dropped level by level.
const STACK: usize = 256 << 20;
/// Nesting of blocks and macros.
const DEPTH: usize = 200;
/// Largest template accepted, in bytes; the largest real ones have about 20,000.
const MAX_TEMPLATE_BYTES: usize = 1 << 20;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// What is said.
    pub content: String,
    /// Whatever else the template reads, such as `tool_calls` or `reasoning_content`.
    #[serde(flatten)]
    pub extra: Map<String, serde_json::Value>,
}

impl Message {
    /// A message with nothing but a role and content.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), extra: Map::new() }
    }
}

/// What a template is rendered with, besides the messages.
#[derive(Debug, Clone, PartialEq)]
pub struct RenderOptions {
    /// End with the beginning of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Tools that the model may call, as JSON schemas.
    pub tools: Option<serde_json::Value>,
    /// Further variables, such as `enable_thinking`.
    pub variables: Map<String, serde_json::Value>,
    /// What `strftime_now` tells.
    pub now: SystemTime,
    /// Seconds by which its clock is ahead of UTC.
    pub utc_offset: i32,
}

impl Default for RenderOptions {
    fn default() -> Self {
        let now = SystemTime::now();
        let utc_offset = time::local_offset(now);
        Self { add_generation_prompt: true, tools: None, variables: Map::new(), now, utc_offset }
    }
}

/// A model's chat template, compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    path: PathBuf,
    environment: Arc<Environment<'static>>,
    default: String,
    special_tokens: Map<String, serde_json::Value>,
}

impl ChatTemplate {
    /// Reads the template of a model folder: `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`, one
    /// text or a list of named ones. `None` where the model has none: it isn't made for conversations.
    ///
    /// # Errors
    /// A file can't be read or is damaged, or a template isn't valid.
    pub fn load(folder: impl AsRef<Path>) -> Result<Option<Self>> {
        Self::from_sidecars(&Sidecars::folder(folder))
    }

    /// The same from a checkpoint's sidecars.
    ///
    /// # Errors
    /// As [`ChatTemplate::load`].
    pub fn from_sidecars(sidecars: &Sidecars) -> Result<Option<Self>> {
        let config = sidecars.json("tokenizer_config.json")?;
        let tokens = config.as_ref().map(special_tokens).unwrap_or_default();
        if let Some(source) = sidecars.read("chat_template.jinja")? {
            let path = sidecars.file("chat_template.jinja");
            let source = String::from_utf8(source).map_err(|e| template_error(&path, format!("not UTF-8: {e}")))?;
            return Self::new(&path, &source, tokens).map(Some);
        }
        let path = sidecars.file("tokenizer_config.json");
        match config.as_ref().and_then(|c| c.get("chat_template")) {
            None | Some(serde_json::Value::Null) => Ok(None),
            Some(serde_json::Value::String(source)) => Self::new(&path, source, tokens).map(Some),
            Some(list) => {
                let named = Vec::<Named>::deserialize(list).map_err(|e| ModelError::Field {
                    path: path.clone(),
                    field: "chat_template".to_owned(),
                    why: format!("{e}, wanted a text or a list of named texts"),
                })?;
                Self::with_named(&path, named, tokens).map(Some)
            }
        }
    }

    /// Compiles one template; `path` is what errors call it. `special_tokens` become variables, such as `bos_token`.
    ///
    /// # Errors
    /// The template isn't valid.
    pub fn new(path: &Path, source: &str, special_tokens: Map<String, serde_json::Value>) -> Result<Self> {
        let named = Named { name: "default".to_owned(), template: source.to_owned() };
        Self::with_named(path, vec![named], special_tokens)
    }

    fn with_named(path: &Path, named: Vec<Named>, tokens: Map<String, serde_json::Value>) -> Result<Self> {
        let Some(first) = named.iter().find(|t| t.name == "default").or(named.first()) else {
            return Err(template_error(path, "an empty list of templates".to_owned()));
        };
        let default = first.name.clone();
        let mut environment = environment().map_err(|e| template_error(path, describe(&e)))?;
        for Named { name, template: source } in named {
            if source.len() > MAX_TEMPLATE_BYTES {
                let why = format!("`{name}` has {} bytes, at most {MAX_TEMPLATE_BYTES}", source.len());
                return Err(template_error(path, why));
            }
            environment
                .add_template_owned(name, without_generation_marks(&source))
                .map_err(|e| template_error(path, describe(&e)))?;
        }
        Ok(Self { path: path.to_path_buf(), environment: Arc::new(environment), default, special_tokens: tokens })
    }

    /// The prompt for a conversation; `messages` are [`Message`]s or anything that serializes alike. Among named
    /// templates, `tool_use` serves conversations with tools, and `default` the others.
    ///
    /// # Errors
    /// The template refuses the conversation, asks for something unknown, or takes too long.
    pub fn render<M: Serialize>(&self, messages: &[M], options: &RenderOptions) -> Result<String> {
        let name = match &options.tools {
            Some(_) if self.environment.get_template("tool_use").is_ok() => "tool_use",
            _ => &self.default,
        };
        let (now, offset) = (options.now, options.utc_offset);
        let strftime = Value::from_function(move |format: &str| {
            time::strftime(now, offset, format).map_err(|why| Error::new(ErrorKind::InvalidOperation, why))
        });
        let mut context: Vec<(String, Value)> = vec![
            ("messages".to_owned(), Value::from(Serde(messages))),
            ("tools".to_owned(), Value::from(Serde(&options.tools))),
            ("documents".to_owned(), Value::from(())),
            ("add_generation_prompt".to_owned(), Value::from(options.add_generation_prompt)),
            ("strftime_now".to_owned(), strftime),
        ];
        for (name, value) in self.special_tokens.iter().chain(&options.variables) {
            context.push((name.clone(), Value::from(Serde(value))));
        }
        let context = Value::from_pairs(context);
        self.render_in_time(name.to_owned(), context)
    }

    /// Renders on a thread of its own. One that is still busy when the time is over is left to itself: it holds nothing
    /// that anybody waits for, and ends with the process.
    fn render_in_time(&self, name: String, context: Value) -> Result<String> {
        let environment = Arc::clone(&self.environment);
        let (sender, receiver) = mpsc::sync_channel(1);
        let work = move || {
            let text = environment.get_template(&name).and_then(|t| t.render(context)).map_err(|e| describe(&e));
            // Nobody listens any more after the time is over.
            let _ = sender.send(text);
        };
        let thread = std::thread::Builder::new().name("chat template".to_owned()).stack_size(STACK);
        thread.spawn(work).map_err(|e| template_error(&self.path, format!("can't be rendered: {e}")))?;
        let why = match receiver.recv_timeout(TIME) {
            Ok(Ok(text)) => return Ok(text),
            Ok(Err(why)) => why,
            Err(mpsc::RecvTimeoutError::Timeout) => format!("takes more than {} s", TIME.as_secs()),
            Err(mpsc::RecvTimeoutError::Disconnected) => "the template engine failed".to_owned(),
        };
        Err(template_error(&self.path, why))
    }
}

/// A template of a list, by name.
#[derive(Debug, Deserialize)]
struct Named {
    name: String,
    template: String,
}

/// Every `*_token` that `tokenizer_config.json` names.
fn special_tokens(config: &serde_json::Value) -> Map<String, serde_json::Value> {
    let fields = config.as_object().into_iter().flatten();
    fields
        .filter(|(name, _)| name.ends_with("_token"))
        .filter_map(|(name, value)| Some((name.clone(), token_text(value)?.into())))
        .collect()
}

/// Jinja as transformers sets it up.
fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_formatter(|out, state, value| match value.kind() {
        ValueKind::None => out.write_str("None").map_err(Error::from),
        ValueKind::Bool => out.write_str(if value.is_true() { "True" } else { "False" }).map_err(Error::from),
        _ => minijinja::escape_formatter(out, state, value),
    });
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(DEPTH);
    environment.add_filter("tojson", json::tojson);
    environment.add_function("raise_exception", |message: &str| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message.to_owned()))
    });
    Ok(environment)
}

/// Replaces the marks that transformers puts around what an assistant says, for training masks, by blocks that change
/// nothing: Jinja alone doesn't know them.
fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let (before, tag) = (&rest[..start], &rest[start + 2..start + length]);
        out.push_str(before);
        let word = tag.trim_matches(['-', '+', ' ', '\t', '\n', '\r']);
        match word {
            "generation" => out.push_str(&format!("{{%{}%}}", tag.replacen(word, "if true", 1))),
            "endgeneration" => out.push_str(&format!("{{%{}%}}", tag.replacen(word, "endif", 1))),
            _ => {
                out.push_str("{%");
                // The rest may hold another opening inside of what only looks like a tag, as in a string.
                rest = &rest[start + 2..];
                continue;
            }
        }
        rest = &rest[start + length + 2..];
    }
    out.push_str(rest);
    out
}

fn template_error(path: &Path, why: String) -> ModelError {
    ModelError::Template { path: path.to_path_buf(), why }
}

/// What went wrong, in which line.
fn describe(error: &Error) -> String {
    let what = match error.kind() {
        ErrorKind::OutOfFuel => format!("takes more than {FUEL} steps"),
        kind => match error.detail() {
            Some(detail) if kind == ErrorKind::InvalidOperation => detail.to_owned(),
            Some(detail) => format!("{kind}: {detail}"),
            None => kind.to_string(),
        },
    };
    match error.line() {
        Some(line) => format!("line {line}: {what}"),
        None => what,
    }
}

#[cfg(test)]
mod tests {
    use super::without_generation_marks;

    #[test]
    fn generation_marks_become_blocks_that_change_nothing() {
        let source = "{%- generation -%}a{{ '{% generation %}' }}{%endgeneration%}{% if generation %}b{% endif %}{% x";
        let wanted = "{%- if true -%}a{{ '{% if true %}' }}{%endif%}{% if generation %}b{% endif %}{% x";
        assert_eq!(without_generation_marks(source), wanted);
        for plain in ["", "{%", "%}{%", "a {{ b }}"] {
            assert_eq!(without_generation_marks(plain), plain);
        }
    }
}
