//! Memory that starts at a cache line, so that a 64-byte load never straddles two.

use bytemuck::Pod;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};

/// What memory is asked for in: as aligned as an allocator gives zeros without touching them. For cache lines it would have to
/// write the zeros itself, and buffers that are never filled would take memory.
type Part = u128;

/// Parts of a cache line.
const LINE: usize = 64 / size_of::<Part>();

/// A slice of `T` that starts at a cache line. Grows, never shrinks its memory.
#[derive(Debug)]
pub(crate) struct Buffer<T> {
    parts: Vec<Part>,
    /// Parts before the first whole line.
    start: usize,
    len: usize,
    holds: PhantomData<T>,
}

impl<T: Pod> Buffer<T> {
    /// `len` zeros.
    pub(crate) fn zeroed(len: usize) -> Self {
        let mut buffer = Self::with_room(len);
        buffer.len = len;
        buffer
    }

    /// As [`Buffer::zeroed`] in large pages where there are any, for what is read from end to end: of those that are touched
    /// at all, whole ones are taken.
    pub(crate) fn zeroed_in_large_pages(len: usize) -> Self {
        let mut buffer = Self::zeroed(len);
        ask_for_huge_pages(&mut buffer.parts);
        buffer
    }

    /// No values, with room for `len`.
    fn with_room(len: usize) -> Self {
        let lines = (len * size_of::<T>()).div_ceil(64);
        let parts: Vec<Part> = match lines {
            0 => Vec::new(),
            // Pages that nobody has touched yet.
            lines => bytemuck::zeroed_vec((lines + 1) * LINE - 1),
        };
        let at = parts.as_ptr().addr();
        let start = if lines == 0 { 0 } else { (at.next_multiple_of(64) - at) / size_of::<Part>() };
        Buffer { parts, start, len: 0, holds: PhantomData }
    }

    /// Values that there is room for.
    fn room(&self) -> usize {
        self.bytes() / size_of::<T>()
    }

    /// Parts that hold `len` values.
    fn used(&self, len: usize) -> Range<usize> {
        self.start..self.start + (len * size_of::<T>()).div_ceil(size_of::<Part>())
    }

    /// Makes it `len` values long; values beyond the old length are zeros or left over from a longer past.
    pub(crate) fn resize(&mut self, len: usize) {
        if len > self.room() {
            self.move_to(Self::with_room(len));
        }
        self.len = len;
    }

    /// Makes room for `len` values in all, in large pages, so that growing up to there moves nothing.
    pub(crate) fn reserve(&mut self, len: usize) {
        if len > self.room() {
            let mut larger = Self::with_room(len);
            ask_for_huge_pages(&mut larger.parts);
            self.move_to(larger);
        }
    }

    /// Takes the memory of `larger`.
    fn move_to(&mut self, mut larger: Self) {
        larger.len = self.len;
        larger.copy_from_slice(self);
        *self = larger;
    }

    /// Adds `values` at the end.
    pub(crate) fn extend(&mut self, values: &[T]) {
        let at = self.len;
        self.resize(at + values.len());
        self[at..].copy_from_slice(values);
    }

    /// Bytes of memory behind it, in whole lines.
    pub(crate) fn bytes(&self) -> usize {
        (self.parts.len() - self.start) / LINE * 64
    }
}

impl<T: Pod> Clone for Buffer<T> {
    fn clone(&self) -> Self {
        let mut copy = Self::zeroed(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

/// Least bytes that are worth huge pages.
const HUGE: usize = 2 << 20;

/// Asks for pages of 2 MiB, of which memory that is read from end to end needs 512 times fewer translations. Only a
/// hint: without it everything works the same.
fn ask_for_huge_pages(parts: &mut [Part]) {
    #[cfg(target_os = "linux")]
    if size_of_val(parts) >= HUGE {
        let page = 4096;
        let start = parts.as_mut_ptr().addr().next_multiple_of(page);
        let end = parts.as_mut_ptr_range().end.addr() / page * page;
        if start < end {
            let at = parts.as_mut_ptr().with_addr(start);
            // SAFETY: whole pages inside of a slice that is borrowed exclusively; the advice changes no contents.
            unsafe { libc::madvise(at.cast(), end - start, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = parts;
}

/// Gives freed memory that the allocator has kept back to the system, after something that took much for a short time. Only
/// glibc's allocator is asked; elsewhere nothing happens.
pub fn give_back_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: takes the allocator's own locks and touches free memory only.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Lets the allocator keep what is freed, for work that frees and wants the same pieces all the time: pages that come from
/// the system are cleared first, every time. Only glibc's allocator is told; elsewhere nothing happens.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: sets numbers that the allocator goes by from now on, under its own lock.
    unsafe {
        // The largest that glibc takes: larger pieces are mapped and unmapped each by itself.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}

impl<T: Pod> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self.len {
            // No memory at all isn't aligned for anything.
            0 => &[],
            len => &bytemuck::cast_slice(&self.parts[self.used(len)])[..len],
        }
    }
}

impl<T: Pod> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let used = self.used(self.len);
        match self.len {
            0 => &mut [],
            len => &mut bytemuck::cast_slice_mut(&mut self.parts[used])[..len],
        }
    }
}
