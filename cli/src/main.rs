//! The `nibble` command: words typed become calls into the libraries below.
//!
//! Each command is a row of [`commands::COMMANDS`] and a file of its own. Results go to stdout, as text or with `--json`
//! as one JSON value; progress and timings go to stderr. Exit codes: 0 done, 1 failed, 2 used wrongly, 130 stopped by
//! the user. A reader of stdout that goes away (`| head`) is no failure.

#![forbid(unsafe_code)]

mod arguments;
mod classes;
mod commands;
mod failure;
mod findings;
mod gate;
mod hub;
mod limits;
mod origin;
mod output;
mod planning;
mod progress;
mod report;
mod running;
mod session;

use clap::FromArgMatches;
use session::{Global, Session};
use std::process::ExitCode;

fn main() -> ExitCode {
    let matches = match commands::command_line().try_get_matches() {
        Ok(matches) => matches,
        Err(refusal) => return failure::refuse_usage(&refusal),
    };
    let global = match Global::from_arg_matches(&matches) {
        Ok(global) => global,
        Err(refusal) => return failure::refuse_usage(&refusal),
    };
    let json = global.json;
    match Session::start(global).and_then(|session| commands::run(&matches, &session)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error, json),
    }
}
