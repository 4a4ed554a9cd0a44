//! What every command is given: the global flags and the user's wish to stop.

use anyhow::{Context, Result};
use std::sync::atomic::{AtomicBool, Ordering};

/// Exit code of a process that the user stopped, as shells count it: 128 + SIGINT.
pub const STOPPED: u8 = 130;

/// Flags that every command takes.
#[derive(Debug, clap::Args)]
pub struct Global {
    /// Print results as one JSON value (errors too: {"error": ..., "causes": [...]})
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,
    /// No progress and no timings on stderr
    #[arg(long, short, global = true, help_heading = "Global options")]
    pub quiet: bool,
}

/// Set by the first Ctrl-C (or SIGTERM); pipelines look at it between two steps.
static STOP: AtomicBool = AtomicBool::new(false);
/// Set while a command does what can be ended anywhere and may wait long, such as a transfer: Ctrl-C then ends the process.
static ENDS_AT_ONCE: AtomicBool = AtomicBool::new(false);

/// One run of the program.
pub struct Session {
    /// Results are printed as JSON.
    pub json: bool,
    /// Nothing but results and errors is printed.
    pub quiet: bool,
}

impl Session {
    /// Checks the environment and takes over Ctrl-C: the first one asks the command to stop, the second one ends the
    /// process at once.
    pub fn start(global: Global) -> Result<Session> {
        nibble_kernels::Isa::check_environment()?;
        ctrlc::set_handler(|| {
            if STOP.swap(true, Ordering::SeqCst) || ENDS_AT_ONCE.load(Ordering::SeqCst) {
                crate::output::restore_terminal();
                std::process::exit(STOPPED.into());
            }
        })
        .context("can't take over Ctrl-C")?;
        Ok(Session { json: global.json, quiet: global.quiet })
    }

    /// The flag that Ctrl-C sets.
    pub fn stop(&self) -> &'static AtomicBool {
        &STOP
    }

    /// Does work that may be ended anywhere: the first Ctrl-C ends the process.
    pub fn may_end<T>(&self, work: impl FnOnce() -> T) -> T {
        ENDS_AT_ONCE.store(true, Ordering::SeqCst);
        let done = work();
        ENDS_AT_ONCE.store(false, Ordering::SeqCst);
        done
    }

    /// Whether the user asked to stop.
    pub fn stopped(&self) -> bool {
        STOP.load(Ordering::Relaxed)
    }

    /// Forgets a Ctrl-C that has been answered: in a chat it ends the reply, not the program.
    pub fn resume(&self) {
        STOP.store(false, Ordering::SeqCst);
    }

    /// Whether remarks on stderr are wanted.
    pub fn talks(&self) -> bool {
        !self.quiet && !self.json
    }

    /// Prints a remark on stderr, unless they are unwanted.
    pub fn remark(&self, text: impl AsRef<str>) {
        if self.talks() {
            crate::output::remark(text.as_ref());
        }
    }
}
