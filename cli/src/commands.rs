//! The commands, one row each: a name, the words it takes, and what it does.

mod bench;
mod calibrate;
mod chat;
mod diagnose;
mod diff;
mod doctor;
mod eval;
mod generate;
mod import;
mod inspect;
mod kernels;
mod quantize;
mod schemes;
mod synth;
mod transform;
mod verify;
mod vision;

use crate::session::{Global, Session};
use anyhow::{Context, Result};
use clap::{ArgMatches, Args};

/// A command's words, parsed, and what to do with them. The doc comment of the type is its help.
pub trait Run: Args {
    /// Does it.
    ///
    /// # Errors
    /// Whatever the command can't do.
    fn run(self, session: &Session) -> Result<()>;
}

/// One row of [`COMMANDS`].
pub struct Command {
    /// The word that is typed.
    pub name: &'static str,
    /// Adds the command's words and help to an empty clap command.
    pub words: fn(clap::Command) -> clap::Command,
    /// Runs it on words that were parsed.
    pub run: fn(&ArgMatches, &Session) -> Result<()>,
}

const fn command<C: Run>(name: &'static str) -> Command {
    Command { name, words: C::augment_args, run: |matches, session| C::from_arg_matches(matches)?.run(session) }
}

/// Every command, in the order of the help.
pub static COMMANDS: &[Command] = &[
    command::<import::Import>("import"),
    command::<transform::Transform>("transform"),
    command::<quantize::Quantize>("quantize"),
    command::<calibrate::Calibrate>("calibrate"),
    command::<generate::Generate>("generate"),
    command::<chat::Chat>("chat"),
    command::<bench::Bench>("bench"),
    command::<eval::Eval>("eval"),
    command::<diagnose::Diagnose>("diagnose"),
    command::<inspect::Inspect>("inspect"),
    command::<verify::Verify>("verify"),
    command::<diff::Diff>("diff"),
    command::<vision::Vision>("vision"),
    command::<schemes::Schemes>("schemes"),
    command::<kernels::Kernels>("kernels"),
    command::<doctor::Doctor>("doctor"),
    command::<synth::Synth>("synth"),
];

/// The whole command line.
pub fn command_line() -> clap::Command {
    let line = clap::Command::new("nibble")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Makes language models small and runs them on the CPU")
        .after_help("Example: nibble quantize SmolLM2-135M-Instruct -o smol-int4 && nibble chat smol-int4")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .max_term_width(110);
    let line = Global::augment_args(line);
    COMMANDS.iter().fold(line, |line, row| line.subcommand((row.words)(clap::Command::new(row.name))))
}

/// Runs the command that was typed.
pub fn run(matches: &ArgMatches, session: &Session) -> Result<()> {
    // clap lets no command through that isn't in the table; should it ever, that is an error like any other.
    let (name, matches) = matches.subcommand().context("no command was given")?;
    let row = COMMANDS.iter().find(|row| row.name == name).with_context(|| format!("`{name}` is no command"))?;
    (row.run)(matches, session)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_contradicts_itself_nowhere() {
        command_line().debug_assert();
    }

    #[test]
    fn every_command_says_what_it_does_and_shows_an_example() {
        for command in command_line().get_subcommands() {
            assert!(command.get_about().is_some(), "{} has no summary", command.get_name());
            let help = command.clone().render_long_help().to_string();
            let example = format!("nibble {}", command.get_name());
            assert!(help.contains("Example") && help.contains(&example), "{} has no example", command.get_name());
        }
    }
}
