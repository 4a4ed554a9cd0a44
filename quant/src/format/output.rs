//! A folder that appears complete or not at all.
//!
//! ```text
//! OUT.partial-<fingerprint>/   everything is written here, beside the target, with a journal of what is done
//! OUT/                         the same folder, renamed after it was synced, reopened and verified
//! ```
//! A run that was stopped or killed leaves its partial folder; a later run with the same fingerprint (source, recipe,
//! version, seed) may take it up again and keeps whatever the journal and the bytes agree on.

use super::mmap::{exchange, free_space};
use super::{damaged, io_error};
use crate::QuantError;
use crate::error::Result;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

const JOURNAL: &str = ".journal";
/// Room left on the disk beside what is written: file system overhead and other programs.
const SPARE_BYTES: u64 = 16 << 20;

/// What to do with what is already there.
#[derive(Debug, Clone, Copy, Default)]
pub struct OutputOptions {
    /// Replace an existing checkpoint folder, in one step at the end.
    pub force: bool,
    /// Take up a partial folder of the same fingerprint instead of starting again.
    pub resume: bool,
}

/// A folder being written.
#[derive(Debug)]
pub struct OutputDir {
    target: PathBuf,
    partial: PathBuf,
    options: OutputOptions,
    done: HashMap<String, Done>,
    /// Pieces that are finished, earlier runs' included.
    finished: AtomicUsize,
    /// Whether the folder is whole and verified, so that only its name is wanting.
    whole: AtomicBool,
    journal: Mutex<File>,
}

/// A finished piece of output, as the journal keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Done {
    /// What is finished, in the writer's own words (a tensor's name).
    pub name: String,
    /// sha256 of its bytes, in hex.
    pub sha256: String,
    /// What the writer wants to know about it again (statistics), as JSON.
    pub note: serde_json::Value,
}

#[derive(Serialize, Deserialize)]
struct JournalHead {
    fingerprint: String,
}

impl OutputDir {
    /// Makes or takes up the partial folder of `target`. `inputs` are all files and folders that are read; `fingerprint`
    /// is at least 12 hex digits that stand for everything that decides the output's bytes.
    ///
    /// # Errors
    /// If the target is an input, holds one or lies inside of one; if it exists and may not be replaced; if another
    /// process is writing it.
    pub fn create(target: &Path, inputs: &[&Path], fingerprint: &str, options: OutputOptions) -> Result<Self> {
        let target = absolute(target)?;
        for input in inputs {
            refuse_overlap(&target, input)?;
        }
        if target.symlink_metadata().is_ok() {
            check_replaceable(&target, options.force)?;
        }
        let partial = beside(&target, "partial", fingerprint)?;
        let journal_path = partial.join(JOURNAL);
        // The lock of a run that is still going protects its folder from being taken up or removed under it.
        let held = lock(&partial, &journal_path)?;
        let kept = if options.resume { read_journal(&journal_path, fingerprint) } else { None };
        let (journal, done) = match (held, kept) {
            (Some(journal), Some((entries, len))) => {
                journal.set_len(len).map_err(io_error(&journal_path))?;
                (journal, entries.into_iter().map(|d| (d.name.clone(), d)).collect())
            }
            (held, _) => {
                if held.is_some() {
                    fs::remove_dir_all(&partial).map_err(io_error(&partial))?;
                }
                fs::create_dir_all(&partial).map_err(io_error(&partial))?;
                let created = lock(&partial, &journal_path)?;
                let mut journal = created.ok_or_else(|| damaged(&journal_path, "can't be created"))?;
                let head = JournalHead { fingerprint: fingerprint.to_owned() };
                write_line(&mut journal, &head).map_err(io_error(&journal_path))?;
                (journal, HashMap::new())
            }
        };
        let (finished, whole) = (AtomicUsize::new(done.len()), AtomicBool::new(false));
        Ok(Self { target, partial, options, done, finished, whole, journal: Mutex::new(journal) })
    }

    /// The folder to write into.
    pub fn partial(&self) -> &Path {
        &self.partial
    }

    /// The folder's final path.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// A piece that an earlier run finished, according to the journal. Its bytes are still to be checked.
    pub fn done(&self, name: &str) -> Option<&Done> {
        self.done.get(name)
    }

    /// Whether an earlier run was taken up.
    pub fn resumed(&self) -> bool {
        !self.done.is_empty()
    }

    /// Notes that a piece is finished.
    ///
    /// # Errors
    /// If the journal can't be written.
    pub fn note(&self, done: &Done) -> Result<()> {
        let mut journal = self.journal.lock().unwrap_or_else(|e| e.into_inner());
        write_line(&mut journal, done).map_err(io_error(&self.partial.join(JOURNAL)))?;
        self.finished.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// After a failure: removes the partial folder unless a later run can do better with what it holds, and says whether
    /// it is kept. Stopping, a full disk and an unreadable file pass; what is wrong with a tensor doesn't.
    pub fn abandon(&self, why: &QuantError) -> bool {
        let passes = matches!(why, QuantError::Stopped | QuantError::Io { .. });
        let keep = passes && self.finished.load(Ordering::Relaxed) > 0 || self.whole.load(Ordering::Relaxed);
        // Removing is a courtesy: what stays is named by its folder and replaced by the next run.
        keep || fs::remove_dir_all(&self.partial).is_err() && self.partial.exists()
    }

    /// Refuses if the disk can't hold `bytes` more than what the partial folder already takes.
    ///
    /// # Errors
    /// If it can't, naming both numbers.
    pub fn check_space(&self, bytes: u64) -> Result<()> {
        let free = free_space(&self.partial).map_err(io_error(&self.partial))?;
        let taken = folder_blocks(&self.partial);
        let wanted = bytes.saturating_sub(taken).saturating_add(SPARE_BYTES);
        match free < wanted {
            true => {
                let why = format!("{wanted} bytes are needed, the disk has {free} free");
                let source = std::io::Error::new(ErrorKind::StorageFull, why);
                Err(QuantError::Io { path: self.target.clone(), source })
            }
            false => Ok(()),
        }
    }

    /// Writes a whole small file, creating folders of its relative path.
    ///
    /// # Errors
    /// If the path leaves the folder or the file can't be written.
    pub fn write(&self, relative: &Path, bytes: &[u8]) -> Result<()> {
        let path = self.place(relative)?;
        fs::write(&path, bytes).map_err(io_error(&path))
    }

    /// Copies a file into the folder, byte for byte.
    ///
    /// # Errors
    /// If the path leaves the folder or a file can't be read or written.
    pub fn copy(&self, from: &Path, relative: &Path) -> Result<()> {
        let path = self.place(relative)?;
        let mut source = File::open(from).map_err(io_error(from))?;
        let mut copy = File::create(&path).map_err(io_error(&path))?;
        // Contents only: a read-only source must not make a folder that can't be replaced.
        std::io::copy(&mut source, &mut copy).map_err(io_error(&path))?;
        Ok(())
    }

    fn place(&self, relative: &Path) -> Result<PathBuf> {
        let path = self.partial.join(relative);
        if !relative.components().all(|c| matches!(c, Component::Normal(_))) {
            return Err(damaged(relative, "leaves the output folder"));
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(io_error(parent))?;
        }
        Ok(path)
    }

    /// Syncs everything, lets `verify` look at the finished folder, and gives it its final name.
    ///
    /// # Errors
    /// If syncing, verifying or renaming fails; the target is then as it was before.
    pub fn commit(&self, verify: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        sync_tree(&self.partial)?;
        verify(&self.partial)?;
        self.whole.store(true, Ordering::Relaxed);
        if self.target.symlink_metadata().is_ok() {
            check_replaceable(&self.target, self.options.force)?;
        }
        let journal = self.partial.join(JOURNAL);
        fs::remove_file(&journal).map_err(io_error(&journal))?;
        sync(&self.partial)?;
        if self.target.symlink_metadata().is_ok() {
            if exchange(&self.partial, &self.target).is_ok() {
                fs::remove_dir_all(&self.partial).map_err(io_error(&self.partial))?;
            } else {
                self.swap_in_two_steps()?;
            }
        } else {
            fs::rename(&self.partial, &self.target).map_err(io_error(&self.target))?;
        }
        if let Some(parent) = self.target.parent() {
            sync(parent)?;
        }
        Ok(self.target.clone())
    }

    /// Where the file system can't exchange two names: the old folder is set aside and put back if the new one can't
    /// take its place.
    fn swap_in_two_steps(&self) -> Result<()> {
        let old = beside(&self.target, "old", &std::process::id().to_string())?;
        fs::rename(&self.target, &old).map_err(io_error(&self.target))?;
        if let Err(e) = fs::rename(&self.partial, &self.target) {
            fs::rename(&old, &self.target).map_err(io_error(&old))?;
            return Err(QuantError::Io { path: self.target.clone(), source: e });
        }
        fs::remove_dir_all(&old).map_err(io_error(&old))
    }
}

/// `DIR/NAME.WORD-TAG`, for a folder `DIR/NAME`.
fn beside(target: &Path, word: &str, tag: &str) -> Result<PathBuf> {
    let Some(name) = target.file_name() else {
        return Err(damaged(target, "has no name, wanted a folder that can be created"));
    };
    let mut name = name.to_owned();
    name.push(format!(".{word}-{}", tag.get(..12).unwrap_or(tag)));
    Ok(target.with_file_name(name))
}

/// The path with its folder resolved: the last part need not exist.
fn absolute(path: &Path) -> Result<PathBuf> {
    if let Ok(whole) = path.canonicalize() {
        return Ok(whole);
    }
    let Some(name) = path.file_name() else {
        return Err(damaged(path, "has no name, wanted a folder that can be created"));
    };
    let parent = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent).map_err(io_error(parent))?;
    Ok(parent.canonicalize().map_err(io_error(parent))?.join(name))
}

fn refuse_overlap(target: &Path, input: &Path) -> Result<()> {
    let input = input.canonicalize().map_err(io_error(input))?;
    let same = |a: &Path| match (a.metadata(), target.metadata()) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => a == target,
    };
    if same(&input) {
        return Err(damaged(target, "input and output are the same"));
    }
    if input.ancestors().any(same) {
        return Err(damaged(target, format!("the output holds the input {}", input.display())));
    }
    if input.is_dir() && target.starts_with(&input) {
        return Err(damaged(target, format!("the output lies inside of the input {}", input.display())));
    }
    Ok(())
}

/// Whether an existing target may make way: only with `force`, and only a folder that looks like a checkpoint or is
/// empty, so that a mistyped path doesn't cost a home folder.
fn check_replaceable(target: &Path, force: bool) -> Result<()> {
    let empty = || fs::read_dir(target).is_ok_and(|mut d| d.next().is_none());
    if !target.is_dir() {
        return Err(damaged(target, "exists and isn't a folder"));
    }
    if !force {
        return Err(damaged(target, "exists already; --force replaces it"));
    }
    if !target.join("config.json").is_file() && !target.join("manifest.json").is_file() && !empty() {
        return Err(damaged(target, "exists and doesn't look like a checkpoint (no config.json): not replaced"));
    }
    Ok(())
}

/// The journal's entries and the bytes they take, if it belongs to this fingerprint. A torn line ends it: what follows
/// was never finished.
fn read_journal(path: &Path, fingerprint: &str) -> Option<(Vec<Done>, u64)> {
    let text = fs::read(path).ok()?;
    let mut lines = text.split_inclusive(|b| *b == b'\n').filter(|line| line.ends_with(b"\n"));
    let first = lines.next()?;
    let head: JournalHead = serde_json::from_slice(first).ok()?;
    if head.fingerprint != fingerprint {
        return None;
    }
    let mut len = first.len();
    let mut entries = Vec::new();
    for line in lines {
        let Ok(entry) = serde_json::from_slice(line) else { break };
        entries.push(entry);
        len += line.len();
    }
    Some((entries, len as u64))
}

/// Opens the journal and locks it against other processes; `None` if the partial folder isn't there.
fn lock(partial: &Path, journal: &Path) -> Result<Option<File>> {
    if !partial.is_dir() {
        return Ok(None);
    }
    let file = OpenOptions::new().create(true).append(true).open(journal).map_err(io_error(journal))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Err(damaged(partial, "another process is writing it")),
        Err(TryLockError::Error(e)) => Err(QuantError::Io { path: journal.to_owned(), source: e }),
    }
}

fn write_line(file: &mut File, value: &impl Serialize) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    file.write_all(&line)
}

/// Bytes that a folder's files take on disk (holes don't count).
fn folder_blocks(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    entries.flatten().filter_map(|e| e.metadata().ok()).filter(|m| m.is_file()).map(|m| m.blocks() * 512).sum()
}

fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|f| f.sync_all()).map_err(io_error(path))
}

fn sync_tree(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(io_error(dir))? {
        let path = entry.map_err(io_error(dir))?.path();
        match path.is_dir() {
            true => sync_tree(&path)?,
            false => sync(&path)?,
        }
    }
    sync(dir)
}
