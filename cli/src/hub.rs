//! A checkpoint by the word that names it: a path, or `ORG/NAME` on the hub.

use crate::progress::Meter;
use crate::session::Session;
use anyhow::{Context as _, Result, bail};
use nibble_models::hub::{self, HubEvent, HubOptions};
use std::path::{Path, PathBuf};

/// The folder or file that `name` means. What exists as a path is that path; else `ORG/NAME` or `ORG/NAME@REVISION` is
/// fetched into the hub's cache, unless it is there.
pub fn checkpoint(session: &Session, name: &str) -> Result<PathBuf> {
    let path = Path::new(name);
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    let Some((repo, revision)) = repository(name) else {
        bail!("{name}: no such file or folder, and no ORG/NAME on the hub either");
    };
    let meter = Meter::new(session, "download", "files");
    let mut progress = |event: HubEvent| match event {
        HubEvent::Start { bytes, done, .. } => {
            meter.begin(1, bytes);
            meter.add_bytes(done);
        }
        HubEvent::Bytes(bytes) => meter.add_bytes(bytes),
        HubEvent::Verified { file } => meter.remark(&format!("{repo}: {file} is whole")),
        HubEvent::Retry { file } => meter.remark(&format!("{repo}: the connection broke; {file} goes on soon")),
    };
    let options = HubOptions::from_env()?;
    // A transfer can be ended anywhere, also while it waits: the next one goes on from the bytes that are there.
    session
        .may_end(|| hub::fetch(&options, repo, revision, &mut progress))
        .with_context(|| format!("{name}: no such file or folder, and it can't be had from the hub"))
}

/// Repository and revision, if the word can be one: two plain parts, with `@` before a revision.
fn repository(name: &str) -> Option<(&str, &str)> {
    let (repo, revision) = name.split_once('@').unwrap_or((name, "main"));
    let plain = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    let (org, model) = repo.split_once('/')?;
    (plain(org) && plain(model) && !revision.is_empty()).then_some((repo, revision))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_are_two_plain_words() {
        assert_eq!(repository("org/name-1.5"), Some(("org/name-1.5", "main")));
        assert_eq!(repository("org/name@v2"), Some(("org/name", "v2")));
        for path in
            ["name", "./org/name", "/org/name", "../x", "a/b/c", "a/", "/", "", "org/name@", "~/models", "a b/c"]
        {
            assert_eq!(repository(path), None, "{path}");
        }
    }
}
