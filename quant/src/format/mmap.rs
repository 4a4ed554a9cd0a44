//! A file's bytes, mapped read-only, and two questions to the file system: the only unsafe code of this crate.
//!
//! A mapping stays valid while its file is replaced (rename keeps the old bytes alive) or removed, but not while it is
//! truncated in place: touching a page past the new end raises SIGBUS, which no library can turn into an error. nibble
//! never truncates a file in place, and [`MappedFile::bytes`] compares the file's length with the mapping each time it
//! is asked, so that a file cut short by another program is refused by name before its bytes are touched.

use super::{damaged, io_error};
use crate::error::Result;
use memmap2::{Mmap, UncheckedAdvice};
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A file mapped read-only.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    file: File,
    map: Option<Mmap>,
}

impl MappedFile {
    /// Maps a regular file.
    ///
    /// # Errors
    /// If it can't be opened or isn't a regular file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(io_error(path))?;
        let meta = file.metadata().map_err(io_error(path))?;
        if !meta.is_file() {
            return Err(damaged(path, "not a regular file"));
        }
        let map = match meta.len() {
            0 => None,
            // SAFETY: the mapping is private and read-only and `file` stays open with it. Rust's aliasing rules also ask
            // that nobody changes the file: nibble writes only to files it has just created under other names, and
            // `bytes` refuses a file whose length no longer covers the mapping.
            _ => Some(unsafe { Mmap::map(&file) }.map_err(io_error(path))?),
        };
        Ok(Self { path: path.to_owned(), file, map })
    }

    /// The file's path, as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes in the file when it was mapped.
    pub fn len(&self) -> usize {
        self.map.as_ref().map_or(0, |m| m.len())
    }

    /// Whether the file was empty when it was mapped.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All bytes of the file.
    ///
    /// # Errors
    /// If the file has become shorter or longer since it was mapped.
    pub fn bytes(&self) -> Result<&[u8]> {
        let now = self.file.metadata().map_err(io_error(&self.path))?.len();
        if now != self.len() as u64 {
            return Err(damaged(&self.path, format!("had {} bytes when opened, now has {now}", self.len())));
        }
        Ok(self.map.as_deref().unwrap_or(&[]))
    }

    /// Tells the system that these bytes won't be needed soon, so that they stop counting as this process's memory.
    /// Reading them again fetches them from the file.
    pub fn release(&self, range: Range<usize>) {
        let Some(map) = &self.map else { return };
        if range.start < range.end && range.end <= map.len() {
            // SAFETY: on a read-only file mapping DONTNEED only drops clean pages; the next access reads the same bytes
            // from the file, so borrowed slices keep their contents. The range was checked to lie inside of the mapping.
            let dropped =
                unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.end - range.start) };
            // A refusal only means that the pages stay cached.
            drop(dropped);
        }
    }
}

/// Bytes that this user may still write to the file system of `path`.
///
/// # Errors
/// What the system says, naming nothing: the caller knows the path.
pub fn free_space(path: &Path) -> io::Result<u64> {
    let path = c_path(path)?;
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `path` ends with a zero byte and `stat` has room for what the call writes.
    if unsafe { libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so it has filled `stat`.
    let stat = unsafe { stat.assume_init() };
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Lets two paths trade places in one step.
///
/// # Errors
/// What the system says; some file systems can't do it.
#[cfg(target_os = "linux")]
pub(super) fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    let (a, b) = (c_path(a)?, c_path(b)?);
    // SAFETY: both paths end with a zero byte and live until the call returns.
    match unsafe { libc::renameat2(libc::AT_FDCWD, a.as_ptr(), libc::AT_FDCWD, b.as_ptr(), libc::RENAME_EXCHANGE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Lets two paths trade places in one step, which this system can't do.
///
/// # Errors
/// Always.
#[cfg(not(target_os = "linux"))]
pub(super) fn exchange(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}
