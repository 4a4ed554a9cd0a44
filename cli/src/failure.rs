//! How a run ends badly: what is printed, and the exit code.

use crate::output::{self, ReaderGone};
use crate::session::STOPPED;
use anyhow::Error;
use nibble_models::ModelError;
use nibble_quant::QuantError;
use serde_json::json;
use std::process::ExitCode;

/// The command was used wrongly in a way that only shows after its words were parsed: exit code 2.
#[derive(Debug)]
pub struct Usage(pub String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// The user stopped the command: exit code 130.
#[derive(Debug)]
pub struct Stopped;

impl std::fmt::Display for Stopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("stopped")
    }
}

impl std::error::Error for Stopped {}

/// Prints an error and its causes, a line each, and says the exit code.
pub fn report(error: &Error, json: bool) -> ExitCode {
    if error.chain().any(|cause| cause.is::<ReaderGone>()) {
        return ExitCode::SUCCESS;
    }
    // A refusal that wraps another often repeats it; a cause that its parent already spells out is not said twice.
    let mut lines: Vec<String> = Vec::new();
    for cause in error.chain().map(one_line) {
        if !lines.iter().any(|said| said.contains(&cause)) {
            lines.push(cause);
        }
    }
    let mut text = format!("error: {}", lines[0]);
    for cause in &lines[1..] {
        text.push_str("\n  caused by: ");
        text.push_str(cause);
    }
    output::remark(&text);
    if json {
        let value = json!({"error": lines[0], "causes": lines[1..]});
        // The error is on stderr already; a closed stdout can't add to it.
        let _ = output::json(&value);
    }
    ExitCode::from(code(error))
}

/// Prints clap's refusal, or the help that was asked for.
pub fn refuse_usage(refusal: &clap::Error) -> ExitCode {
    let code = refusal.exit_code();
    if code != 0 && std::env::args_os().any(|arg| arg == "--json") {
        let text = refusal.render().to_string();
        let text = text.split("\n\n").next().unwrap_or_default();
        let _ = output::json(&json!({"error": one_line(text.trim_start_matches("error: ")), "causes": []}));
    }
    // A reader that closed the pipe has read enough of the help.
    let _ = refusal.print();
    ExitCode::from(code as u8)
}

fn code(error: &Error) -> u8 {
    let stopped = |cause: &(dyn std::error::Error + 'static)| {
        cause.is::<Stopped>() || matches!(quant_error(cause), Some(QuantError::Stopped))
    };
    // A scheme, rule or flag that can't be met, and a word in the environment that means nothing, were typed by the user.
    let usage = |cause: &(dyn std::error::Error + 'static)| {
        cause.is::<Usage>()
            || matches!(cause.downcast_ref(), Some(nibble_kernels::KernelError::IsaName { .. }))
            || matches!(quant_error(cause), Some(QuantError::Spec { .. }))
    };
    match () {
        () if error.chain().any(stopped) => STOPPED,
        () if error.chain().any(usage) => 2,
        () => 1,
    }
}

/// What quantizing refused, also where a model's error stands for it: that one is transparent, and hides it from the chain.
fn quant_error<'a>(cause: &'a (dyn std::error::Error + 'static)) -> Option<&'a QuantError> {
    match cause.downcast_ref() {
        Some(ModelError::Quant(why)) => Some(why),
        _ => cause.downcast_ref(),
    }
}

fn one_line(text: impl ToString) -> String {
    text.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_follow_the_cause_at_any_depth() {
        assert_eq!(code(&Error::new(Usage("x".into())).context("deeper")), 2);
        assert_eq!(code(&Error::new(QuantError::Stopped).context("deeper")), STOPPED);
        assert_eq!(code(&Error::new(ModelError::Quant(QuantError::Stopped)).context("deeper")), STOPPED);
        let spec = QuantError::Spec { what: "x".into(), why: "y".into() };
        assert_eq!(code(&Error::new(ModelError::Quant(spec))), 2);
        assert_eq!(code(&Error::new(Stopped)), STOPPED);
        assert_eq!(code(&anyhow::anyhow!("anything else")), 1);
    }

    #[test]
    fn an_error_is_one_line() {
        assert_eq!(one_line("a\n  b\tc"), "a b c");
    }
}
