//! Memory that starts at a cache line, so that a 64-byte load never straddles two.

use bytemuck::{Pod, Zeroable};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// One cache line.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A slice of `T` that starts at a cache line. Grows, never shrinks its memory.
#[derive(Debug, Clone)]
pub(crate) struct Buffer<T> {
    lines: Vec<Line>,
    len: usize,
    holds: PhantomData<T>,
}

impl<T: Pod> Buffer<T> {
    /// `len` zeros.
    pub(crate) fn zeroed(len: usize) -> Self {
        let mut buffer = Buffer { lines: Vec::new(), len: 0, holds: PhantomData };
        buffer.resize(len);
        buffer
    }

    /// Makes it `len` values long; values beyond the old length are zeros or left over from a longer past.
    pub(crate) fn resize(&mut self, len: usize) {
        let lines = (len * size_of::<T>()).div_ceil(64);
        if self.lines.is_empty() && lines > 0 {
            // Pages that nobody has touched yet.
            self.lines = bytemuck::zeroed_vec(lines);
            ask_for_huge_pages(&mut self.lines);
        } else if lines > self.lines.len() {
            self.lines.resize(lines, Line([0; 64]));
        }
        self.len = len;
    }

    /// Bytes of memory behind it.
    pub(crate) fn bytes(&self) -> usize {
        self.lines.len() * 64
    }
}

/// Least bytes that are worth huge pages.
const HUGE: usize = 2 << 20;

/// Asks for pages of 2 MiB, of which memory that is read from end to end needs 512 times fewer translations. Only a
/// hint: without it everything works the same.
fn ask_for_huge_pages(lines: &mut [Line]) {
    #[cfg(target_os = "linux")]
    if size_of_val(lines) >= HUGE {
        let page = 4096;
        let start = lines.as_mut_ptr().addr().next_multiple_of(page);
        let end = lines.as_mut_ptr_range().end.addr() / page * page;
        if start < end {
            let at = lines.as_mut_ptr().with_addr(start);
            // SAFETY: whole pages inside of a slice that is borrowed exclusively; the advice changes no contents.
            unsafe { libc::madvise(at.cast(), end - start, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = lines;
}

impl<T: Pod> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl<T: Pod> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}
