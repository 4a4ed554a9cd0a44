//! `nibble chat` on a real terminal, which Python's pty module makes.

use crate::support::{Place, finish};
use std::process::{Command, Stdio};

/// Types into a chat: a turn, /help, a turn that Ctrl-C ends, Ctrl-D. Checks the terminal's modes before and after.
const SCRIPT: &str = r#"
import fcntl, os, pty, select, subprocess, sys, termios, time

master, slave = pty.openpty()
before = termios.tcgetattr(slave)

def own_terminal():
    os.setsid()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

child = subprocess.Popen(sys.argv[1:], stdin=slave, stdout=slave, stderr=slave, preexec_fn=own_terminal)
seen, mark = b"", 0

def wait(words, seconds=120):
    """Waits for the words after what was waited for last."""
    global seen, mark
    end = time.monotonic() + seconds
    while words not in seen[mark:]:
        left = end - time.monotonic()
        if left <= 0 or not select.select([master], [], [], left)[0]:
            sys.exit(f"never said {words!r} after {seen[mark:]!r}")
        try:
            seen += os.read(master, 4096)
        except OSError:
            sys.exit(f"ended before {words!r}: {seen[mark:]!r}")
    mark = seen.index(words, mark) + len(words)

def type(text):
    os.write(master, text)

wait(b"Ctrl-D to leave")
wait(b"> ")
type(b"hello\r")
wait(b"ended by --max-tokens")
wait(b"> ")
type(b"/help\r")
wait(b"Ctrl-C stops an answer")
wait(b"> ")
type(b"again\r")
wait(b"again")
# The editor gives the terminal back, and the answer begins.
wait(b"?2004l\r\n")
while len(seen) < mark + 8:
    seen += os.read(master, 4096)
type(b"\x03")
wait(b"ended by the user")
wait(b"> ")
type(b"\x04")
assert child.wait(60) == 0, child.returncode
after = termios.tcgetattr(slave)
assert after == before, (before, after)
print("fine")
"#;

#[test]
fn a_chat_on_a_terminal_is_edited_interrupted_and_left_as_it_was() {
    let place = Place::new();
    // Slow enough that an answer is still going when it is interrupted.
    let shape = ["--hidden", "256", "--ffn", "512", "--heads", "4", "--layers", "4"];
    place.model("float", &shape);
    let chat = place.command(&["chat", "float", "-n", "300", "--ignore-eos"]);
    let mut command = Command::new("python3");
    command.args(["-c", SCRIPT]).arg(chat.get_program()).args(chat.get_args()).current_dir(place.path(""));
    command.envs(chat.get_envs().filter_map(|(name, value)| Some((name, value?)))).env("TERM", "xterm");
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    assert_eq!(finish(child).ok().trim(), "fine");
}
