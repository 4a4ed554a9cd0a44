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
        if lines > self.lines.len() {
            self.lines.resize(lines, Line([0; 64]));
        }
        self.len = len;
    }

    /// Bytes of memory behind it.
    pub(crate) fn bytes(&self) -> usize {
        self.lines.len() * 64
    }
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
