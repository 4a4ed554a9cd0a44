//! How far a long command is: a bar on a terminal, a line now and then elsewhere, nothing when nobody asked.
//!
//! All of it goes to stderr; stdout is for results.

use crate::output;
use crate::session::Session;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nibble_quant::convert::{Progress, Stage};
use nibble_quant::manifest::TensorRecord;
use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Time between two lines where there is no terminal to draw on.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Progress in two measures: things (tensors, chunks) and bytes.
pub struct Meter {
    what: &'static str,
    things: &'static str,
    kind: Kind,
    state: Mutex<State>,
}

enum Kind {
    Silent,
    Lines,
    Bar(ProgressBar),
}

struct State {
    /// What is done to the bytes, where no things are counted.
    doing: &'static str,
    started: Instant,
    things: u64,
    of_things: u64,
    bytes: u64,
    of_bytes: u64,
    said: Option<Instant>,
}

impl State {
    fn new(doing: &'static str, of_things: u64, of_bytes: u64) -> State {
        State { doing, started: Instant::now(), things: 0, of_things, bytes: 0, of_bytes, said: None }
    }
}

impl Meter {
    /// A meter of a command `what` that works through `things`, drawn as the session wants it.
    pub fn new(session: &Session, what: &'static str, things: &'static str) -> Meter {
        let kind = match () {
            () if !session.talks() => Kind::Silent,
            () if std::io::stderr().is_terminal() => {
                let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
                bar.set_style(style());
                Kind::Bar(bar)
            }
            () => Kind::Lines,
        };
        Meter { what, things, kind, state: Mutex::new(State::new("", 0, 0)) }
    }

    /// Says how much there is to do; 0 bytes if bytes say nothing about the work.
    pub fn begin(&self, things: u64, bytes: u64) {
        self.restart(State::new("", things, bytes));
    }

    /// Says that a stretch of work begins in which only bytes count, such as `hashing`.
    pub fn begin_bytes(&self, doing: &'static str, bytes: u64) {
        self.restart(State::new(doing, 0, bytes));
    }

    fn restart(&self, state: State) {
        if let Kind::Bar(bar) = &self.kind {
            bar.set_position(0);
            bar.set_length(if state.of_bytes > 0 { state.of_bytes } else { state.of_things });
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        self.change(|old| *old = state);
    }

    /// Says that more bytes are done.
    pub fn add_bytes(&self, bytes: u64) {
        self.change(|state| state.bytes += bytes);
        self.draw("");
    }

    /// Says that one more thing is done, and what there is to say about it.
    pub fn add_thing(&self, note: &str) {
        self.change(|state| state.things += 1);
        self.draw(note);
    }

    fn draw(&self, note: &str) {
        match &self.kind {
            Kind::Silent => (),
            Kind::Bar(bar) => {
                let (position, line) = self.change(|state| {
                    let position = if state.of_bytes > 0 { state.bytes } else { state.things };
                    (position, self.line(state))
                });
                bar.set_position(position);
                bar.set_message(format!("{line}  {note}"));
            }
            Kind::Lines => {
                let line = self.change(|state| {
                    let due = state.said.unwrap_or(state.started).elapsed() >= LINE_EVERY;
                    due.then(|| {
                        state.said = Some(Instant::now());
                        self.line(state)
                    })
                });
                if let Some(line) = line {
                    output::remark(format!("{}: {line}  {note}", self.what).trim_end());
                }
            }
        }
    }

    /// Prints a line without tearing the bar.
    pub fn remark(&self, text: &str) {
        match &self.kind {
            Kind::Silent => (),
            Kind::Lines => output::remark(text),
            Kind::Bar(bar) => bar.suspend(|| output::remark(text)),
        }
    }

    fn change<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        // A thread that panicked while it counted leaves counts that are good enough to print.
        act(&mut self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }

    /// `12/272 tensors  410 MB/s  eta 3 s`, or `hashing 1.20 GB of 3.40 GB  410 MB/s  eta 5 s`
    fn line(&self, state: &State) -> String {
        let seconds = state.started.elapsed().as_secs_f64().max(1e-3);
        let mut text = match state.doing {
            "" => format!("{}/{} {}", state.things, state.of_things, self.things),
            doing => format!("{doing} {} of {}", output::bytes(state.bytes), output::bytes(state.of_bytes)),
        };
        let (done, of) = match state.of_bytes {
            0 => (state.things, state.of_things),
            of => {
                text.push_str(&format!("  {}/s", output::bytes((state.bytes as f64 / seconds) as u64)));
                (state.bytes, of)
            }
        };
        if done > 0 && done < of {
            let left = seconds * (of - done) as f64 / done as f64;
            text.push_str(&format!("  eta {}", duration(left)));
        }
        text
    }
}

/// A conversion's course.
impl Progress for Meter {
    fn start(&self, stage: Stage, tensors: usize, bytes: u64) {
        match stage {
            Stage::Convert => self.begin(tensors as u64, bytes),
            Stage::Verify => self.begin_bytes("verifying", bytes),
        }
    }

    fn advance(&self, bytes: u64) {
        self.add_bytes(bytes);
    }

    fn tensor_done(&self, tensor: &TensorRecord) {
        self.add_thing(&tensor.name);
    }

    fn message(&self, text: &str) {
        self.remark(text);
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if let Kind::Bar(bar) = &self.kind {
            bar.finish_and_clear();
        }
    }
}

/// The template is a constant; should indicatif refuse it, its own default serves.
fn style() -> ProgressStyle {
    ProgressStyle::with_template("[{bar:24}] {wide_msg}")
        .map(|style| style.progress_chars("=> "))
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Seconds as people read them.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 10.0 => format!("{s:.1} s"),
        s if s < 90.0 => format!("{s:.0} s"),
        s if s < 5400.0 => format!("{:.0} min {:02.0} s", (s / 60.0).floor(), s % 60.0),
        s => format!("{:.0} h {:02.0} min", (s / 3600.0).floor(), (s % 3600.0) / 60.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meter() -> Meter {
        Meter::new(&Session { json: true, quiet: false }, "quantize", "tensors")
    }

    #[test]
    fn a_line_counts_things_and_bytes() {
        let meter = meter();
        meter.begin(4, 4_000_000);
        meter.add_bytes(1_000_000);
        meter.add_thing("a");
        let line = meter.change(|state| meter.line(state));
        assert!(line.starts_with("1/4 tensors  "), "{line}");
        assert!(line.contains("/s  eta "), "{line}");
        meter.add_bytes(3_000_000);
        (0..3).for_each(|_| meter.add_thing("b"));
        let line = meter.change(|state| meter.line(state));
        assert!(line.starts_with("4/4 tensors") && !line.contains("eta"), "{line}");
        meter.start(Stage::Verify, 4, 2_000);
        meter.advance(500);
        let line = meter.change(|state| meter.line(state));
        assert!(line.starts_with("verifying 500 B of 2.0 kB  ") && line.contains("eta"), "{line}");
    }

    #[test]
    fn durations_are_short() {
        for (seconds, text) in [(0.25, "0.2 s"), (61.0, "61 s"), (125.0, "2 min 05 s"), (7300.0, "2 h 02 min")] {
            assert_eq!(duration(seconds), text);
        }
    }
}
