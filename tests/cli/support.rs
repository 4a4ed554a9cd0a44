//! Running the program, and the models that it is run on.

use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// What a process left behind.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    /// stdout, if the process succeeded.
    pub fn ok(&self) -> &str {
        assert_eq!(self.code, 0, "failed:\n{}\n{}", self.stderr, self.stdout);
        &self.stdout
    }

    /// stdout as JSON, if the process succeeded.
    pub fn json(&self) -> Value {
        let text = self.ok();
        serde_json::from_str(text).unwrap_or_else(|e| panic!("not JSON: {e}\n{text}"))
    }

    /// The error line, if the process failed with this code.
    pub fn error(&self, code: i32) -> &str {
        assert_eq!(self.code, code, "wanted exit code {code}:\n{}\n{}", self.stderr, self.stdout);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        let line = self.stderr.lines().find(|line| line.starts_with("error: "));
        line.map(|_| self.stderr.as_str()).unwrap_or_else(|| panic!("no error line:\n{}", self.stderr))
    }
}

/// A folder that goes away, and processes that run in it.
pub struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Place {
        Place { dir: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The command, in this folder, with nothing of the user's environment that could change what it does.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nibble"));
        command.args(words).current_dir(self.dir.path()).stdin(Stdio::null());
        command.env_remove("HF_TOKEN").env_remove("HF_HUB_OFFLINE").env("HF_HOME", self.path("hub"));
        command.env("HF_ENDPOINT", "http://127.0.0.1:9").env("XDG_STATE_HOME", self.path("state"));
        command
    }

    pub fn run(&self, words: &[&str]) -> Ended {
        finish(self.command(words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    /// The same with something to read on stdin.
    pub fn run_with(&self, words: &[&str], input: &str) -> Ended {
        use std::io::Write;
        let mut command = self.command(words);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // A process that refuses its words closes stdin unread.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        finish(child)
    }

    /// A random model with a tokenizer of exactly its tokens, in the folder `name`.
    pub fn model(&self, name: &str, words: &[&str]) {
        self.run(&[&["synth", "-o", name, "--vocab", "259"], words].concat()).ok();
        write_tokenizer(&self.path(name));
    }

    /// Every file of a folder with its bytes, by relative name.
    pub fn files(&self, name: &str) -> Vec<(String, Vec<u8>)> {
        let mut files: Vec<(String, Vec<u8>)> = std::fs::read_dir(self.path(name))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap()))
            .collect();
        files.sort();
        files
    }

    /// Names of everything in the folder, sorted.
    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

pub fn finish(child: Child) -> Ended {
    let output = child.wait_with_output().unwrap();
    Ended {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Tokens of the tokenizer besides single bytes.
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// A byte-level tokenizer without merges: one token a byte, then the special ones. Its chat template is ChatML.
pub fn write_tokenizer(dir: &Path) {
    let mut vocabulary = serde_json::Map::new();
    for byte in 0..=255u8 {
        vocabulary.insert(letter(byte).to_string(), json!(byte));
    }
    let special = |i: usize| {
        json!({"id": 256 + i, "content": SPECIAL[i], "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true})
    };
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0), special(1), special(2)],
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": []},
    });
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let config = json!({"eos_token": "<|im_end|>", "chat_template": template});
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
}

/// The character by which byte-level vocabularies write a byte: printable ones are themselves, the others follow from
/// U+0100 on.
fn letter(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !printable(*b)).count() as u32;
    char::from_u32(256 + before).unwrap()
}

/// Some English to predict: repeated words, so that chunks are full.
pub fn text(bytes: usize) -> String {
    let words = "the quick brown fox jumps over the lazy dog and then it rains again on the old town ";
    words.chars().cycle().take(bytes).collect()
}
