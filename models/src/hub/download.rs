//! One file into the cache: resumed where it stopped, hashed as it comes, renamed only when the hash is right.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::HubEvent;
use super::digest::Hasher;
use super::http::{Client, Failure, Linked, header};
use crate::error::{ModelError, Result};

/// Broken connections in a row, without a byte between them, after which a transfer gives up.
const MAX_FAILURES: u32 = 5;
const CHUNK: usize = 256 << 10;

/// A file to fetch.
pub(super) struct Transfer<'a> {
    pub(super) client: &'a Client<'a>,
    /// What errors call it.
    pub(super) what: String,
    pub(super) name: &'a str,
    pub(super) url: String,
}

/// What a file must be, by its server's word.
struct Expected {
    etag: String,
    bytes: u64,
}

impl Transfer<'_> {
    /// Fetches the file to where `blob` puts its ETag.
    pub(super) fn run(
        &self,
        blob: impl Fn(&str) -> PathBuf,
        locks: &Path,
        pause: Duration,
        progress: &mut dyn FnMut(HubEvent),
    ) -> Result<PathBuf> {
        let (first, expected) = self.retry(pause, || self.open())?;
        let blob = blob(&expected.etag);
        // A blob is complete: it got its name from its hash.
        if blob.metadata().is_ok_and(|m| m.len() == expected.bytes) {
            return Ok(blob);
        }
        let folder = blob.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(ModelError::io(folder))?;
        std::fs::create_dir_all(locks).map_err(ModelError::io(locks))?;
        let lock_path = locks.join(format!("{}.lock", expected.etag));
        let lock = File::create(&lock_path).map_err(ModelError::io(&lock_path))?;
        // Whoever else fetches it finishes first; then it is there.
        lock.lock().map_err(ModelError::io(&lock_path))?;
        if !blob.metadata().is_ok_and(|m| m.len() == expected.bytes) {
            self.fill(&blob, &expected, first, pause, progress)?;
        }
        Ok(blob)
    }

    /// Asks for the file, and what it is.
    fn open(&self) -> Result<(Box<dyn Read>, Expected), Failure> {
        let (response, linked) = self.client.get(&self.url, 0)?;
        let length = header(response.headers(), "content-length").and_then(|n| n.parse().ok());
        let Linked { etag: Some(etag), bytes } = linked else {
            return Err(Failure::Final("the server sends no ETag, so the file can't be verified".to_owned()));
        };
        let Some(bytes) = bytes.or(length) else {
            return Err(Failure::Final("the server doesn't say how large the file is".to_owned()));
        };
        if Hasher::for_etag(&etag, bytes).is_none() {
            let why = format!("its ETag `{etag}` is neither a sha256 nor a git hash, so it can't be verified");
            return Err(Failure::Final(why));
        }
        Ok((Box::new(response.into_body().into_reader()), Expected { etag, bytes }))
    }

    fn fill(
        &self,
        blob: &Path,
        expected: &Expected,
        first: Box<dyn Read>,
        pause: Duration,
        progress: &mut dyn FnMut(HubEvent),
    ) -> Result<()> {
        let part = blob.with_file_name(format!("{}.incomplete", expected.etag));
        let mut file =
            OpenOptions::new().read(true).append(true).create(true).open(&part).map_err(ModelError::io(&part))?;
        let mut state = self.hash_part(&mut file, &part, expected)?;
        progress(HubEvent::Start { file: self.name, bytes: expected.bytes, done: state.done });
        let mut first = Some(first).filter(|_| state.done == 0);
        // A server that makes the transfer begin anew again and again makes no headway.
        let (mut failures, mut furthest) = (0, state.done);
        while state.done < expected.bytes {
            let step = match first.take() {
                Some(body) => Ok(body),
                None => self.continue_from(&mut state, &mut file, &part, expected)?,
            };
            let step = match step {
                Ok(body) => self.copy(body, &mut state, &mut file, &part, expected, progress)?,
                Err(why) => Err(why),
            };
            if let Err(why) = step {
                failures = if state.done > furthest { 1 } else { failures + 1 };
                furthest = furthest.max(state.done);
                if failures > MAX_FAILURES {
                    let why = format!("{why}; {} of {} bytes are kept, run again to go on", state.done, expected.bytes);
                    return Err(self.refuse(why));
                }
                progress(HubEvent::Retry { file: self.name });
                std::thread::sleep(pause * 2u32.pow(failures - 1));
            }
        }
        file.sync_all().map_err(ModelError::io(&part))?;
        let found = state.hasher.finish();
        if found != expected.etag {
            std::fs::remove_file(&part).map_err(ModelError::io(&part))?;
            let why = format!("corrupt: its hash is {found}, wanted {}; it was deleted, run again", expected.etag);
            return Err(self.refuse(why));
        }
        std::fs::rename(&part, blob).map_err(ModelError::io(blob))?;
        progress(HubEvent::Verified { file: self.name });
        Ok(())
    }

    /// What an earlier transfer left, hashed; nothing if it is longer than the file.
    fn hash_part(&self, file: &mut File, part: &Path, expected: &Expected) -> Result<State> {
        let mut state = State::new(expected).ok_or_else(|| self.refuse("its ETag isn't a hash"))?;
        if file.metadata().map_err(ModelError::io(part))?.len() > expected.bytes {
            file.set_len(0).map_err(ModelError::io(part))?;
            return Ok(state);
        }
        let mut chunk = vec![0; CHUNK];
        loop {
            let n = file.read(&mut chunk).map_err(ModelError::io(part))?;
            if n == 0 {
                return Ok(state);
            }
            state.add(&chunk[..n]);
        }
    }

    /// The rest of the file. A server that sends another part than asked for, or all of it, makes the transfer begin anew.
    /// The inner error is one that trying again may mend.
    fn continue_from(
        &self,
        state: &mut State,
        file: &mut File,
        part: &Path,
        expected: &Expected,
    ) -> Result<Result<Box<dyn Read>, String>> {
        let (response, linked) = match self.client.get(&self.url, state.done) {
            Ok(answer) => answer,
            Err(Failure::Transient(why)) => return Ok(Err(why)),
            Err(Failure::Final(why)) => return Err(self.refuse(why)),
        };
        if linked.etag.as_deref() != Some(expected.etag.as_str()) {
            return Err(self.refuse("it changed on the server during the transfer; run again"));
        }
        let wanted = format!("bytes {}-{}/{}", state.done, expected.bytes - 1, expected.bytes);
        let range = header(response.headers(), "content-range");
        if response.status().as_u16() != 206 || range != Some(wanted.as_str()) {
            file.set_len(0).map_err(ModelError::io(part))?;
            *state = State::new(expected).ok_or_else(|| self.refuse("its ETag isn't a hash"))?;
            if response.status().as_u16() != 200 {
                let found = range.unwrap_or("no range");
                return Ok(Err(format!(
                    "the server answers {} with {found}, wanted {wanted}",
                    response.status().as_u16()
                )));
            }
        }
        Ok(Ok(Box::new(response.into_body().into_reader())))
    }

    /// Bytes from the connection to the file; the inner error is a broken connection.
    fn copy(
        &self,
        mut body: Box<dyn Read>,
        state: &mut State,
        file: &mut File,
        part: &Path,
        expected: &Expected,
        progress: &mut dyn FnMut(HubEvent),
    ) -> Result<Result<(), String>> {
        let mut chunk = vec![0; CHUNK];
        while state.done < expected.bytes {
            let n = match body.read(&mut chunk) {
                Ok(0) => {
                    return Ok(Err(format!("the connection ended after {} of {} bytes", state.done, expected.bytes)));
                }
                Ok(n) => n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Ok(Err(format!("the connection broke after {} bytes: {e}", state.done))),
            };
            if state.done + n as u64 > expected.bytes {
                std::fs::remove_file(part).map_err(ModelError::io(part))?;
                return Err(
                    self.refuse(format!("the server sends more than the {} bytes it announced", expected.bytes))
                );
            }
            file.write_all(&chunk[..n]).map_err(ModelError::io(part))?;
            state.add(&chunk[..n]);
            progress(HubEvent::Bytes(n as u64));
        }
        Ok(Ok(()))
    }

    fn retry<T>(&self, pause: Duration, mut call: impl FnMut() -> Result<T, Failure>) -> Result<T> {
        let mut failures = 0;
        loop {
            match call() {
                Ok(done) => return Ok(done),
                Err(Failure::Transient(_)) if failures + 1 < MAX_FAILURES => {
                    std::thread::sleep(pause * 2u32.pow(failures));
                    failures += 1;
                }
                Err(failure) => return Err(self.refuse(failure.into_words())),
            }
        }
    }

    fn refuse(&self, why: impl Into<String>) -> ModelError {
        ModelError::Hub { what: self.what.clone(), why: why.into() }
    }
}

/// How far a transfer has come.
struct State {
    done: u64,
    hasher: Hasher,
}

impl State {
    fn new(expected: &Expected) -> Option<Self> {
        Some(Self { done: 0, hasher: Hasher::for_etag(&expected.etag, expected.bytes)? })
    }

    fn add(&mut self, bytes: &[u8]) {
        self.done += bytes.len() as u64;
        self.hasher.update(bytes);
    }
}

/// Makes `pointer`, in a snapshot, stand for `blob`: by a relative link, so that the cache can be moved, or by a copy where
/// the system has no links.
pub(super) fn link(blob: &Path, pointer: &Path) -> Result<()> {
    let folder = pointer.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(ModelError::io(folder))?;
    // A link to a blob that is gone.
    if pointer.symlink_metadata().is_ok() {
        std::fs::remove_file(pointer).map_err(ModelError::io(pointer))?;
    }
    #[cfg(unix)]
    {
        let root = blob.ancestors().nth(2).unwrap_or(Path::new("/"));
        let depth = folder.strip_prefix(root).map_or(0, |below| below.components().count());
        let target: PathBuf = std::iter::repeat_n("..", depth).collect();
        let target = match blob.strip_prefix(root) {
            Ok(below) => target.join(below),
            Err(_) => blob.to_path_buf(),
        };
        std::os::unix::fs::symlink(target, pointer).map_err(ModelError::io(pointer))
    }
    #[cfg(not(unix))]
    {
        std::fs::copy(blob, pointer).map(|_| ()).map_err(ModelError::io(pointer))
    }
}
