//! What lies on a device: rows of activations, vectors, indices, places in caches.

use super::gpu::DeviceMemory;
use super::{check, check_room, size};
use crate::KernelError;
use bytemuck::{Pod, Zeroable};
use std::cell::Cell;
use std::ops::Range;

/// Up to `capacity` rows of `width` floats, with room for their copy in half precision that products read.
#[derive(Debug)]
pub struct DeviceRows<M> {
    pub(super) width: usize,
    pub(super) capacity: usize,
    pub(super) values: M,  // (capacity, width) f32
    pub(super) halves: M,  // (capacity, width padded to 64) f16
    pub(super) factors: M, // (capacity) f32
    /// How many of the first rows have their copy in half precision, and in which order.
    pub(super) packed: Cell<(usize, Order)>,
}

impl<M: DeviceMemory> DeviceRows<M> {
    /// Values of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows that there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    pub(super) fn check(&self, what: &'static str, rows: usize, width: usize) -> Result<(), KernelError> {
        check(what, self.width, width)?;
        check_room(what, self.capacity, rows)
    }

    /// Its rows are about to change.
    pub(super) fn changes(&self) {
        self.packed.set((0, Order::Lanes));
    }

    /// Whether so many rows have their copy in this order.
    pub(super) fn is_ready(&self, rows: usize, order: Order) -> bool {
        let (ready, found) = self.packed.get();
        ready >= rows && found == order
    }

    /// Whether the kernels take so wide a row as a whole.
    pub(super) fn is_whole(&self) -> bool {
        self.width.is_multiple_of(4) && self.width <= WIDEST_ROW
    }

    /// Threads for a row as a whole: four numbers each, as few times as may be.
    pub(super) fn whole_threads(&self) -> u32 {
        row_threads(self.width.next_multiple_of(64).div_ceil(4), 1024)
    }
}

/// The order of halves within 32 of a row, which products read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// As the row has them: 16 bytes are what a lane feeds to both steps of 16.
    Lanes,
    /// The 16 of each step side by side; `step_order` of rows.cu.
    Steps,
}

impl Order {
    pub(super) fn by_steps(self) -> u32 {
        (self == Order::Steps).into()
    }
}

/// Rows up to which it is looked at whether each is of its own sequence.
const ONE_EACH: usize = 64;

/// The widest row that a block holds in registers: 16 numbers each of 1024 threads.
const WIDEST_ROW: usize = 16384;

/// A vector of floats: a gain or a bias.
#[derive(Debug)]
pub struct DeviceVector<M> {
    pub(super) len: usize,
    pub(super) values: M,
}

/// Up to so many indices: tokens, rows, choices.
#[derive(Debug)]
pub struct DeviceIndices<M> {
    pub(super) capacity: usize,
    pub(super) indices: M,
    /// What was last put there; empty if nobody knows.
    pub(super) known: Vec<u32>,
}

/// Cosines and sines of every position.
#[derive(Debug)]
pub struct DeviceRope<M> {
    pub(super) half: usize,
    pub(super) positions: usize,
    pub(super) cos: M, // (positions, half)
    pub(super) sin: M,
}

impl<M> DeviceRope<M> {
    /// How many pairs of a head turn, if a head has so many and every place is in the table.
    pub(super) fn fits(&self, head_dim: usize, table: &DeviceTable<M>) -> Result<usize, KernelError> {
        check_room("a head's rotated values", head_dim, 2 * self.half)?;
        let positions = if table.places.is_empty() { 0 } else { table.last_position() + 1 };
        check_room("rope's positions", self.positions, positions)?;
        Ok(self.half)
    }
}

/// Where a row of a batch stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Place {
    /// Address of its sequence's cache; only attention asks for it.
    pub(super) cache: u64,
    /// Its position in the sequence.
    position: u32,
    unused: u32,
}

impl Place {
    /// A position without a cache.
    pub fn at(position: usize) -> Result<Place, KernelError> {
        Ok(Place { cache: 0, position: size(position)?, unused: 0 })
    }

    pub(super) fn in_cache(self, cache: u64) -> Place {
        Place { cache, ..self }
    }

    /// Its position.
    pub fn position(&self) -> usize {
        self.position as usize
    }
}

/// The places of a batch's rows, on the device and as they were put there.
#[derive(Debug)]
pub struct DeviceTable<M> {
    pub(super) places: Vec<Place>,
    pub(super) memory: M,
    pub(super) capacity: usize,
}

impl<M> DeviceTable<M> {
    /// What was last put there.
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// Whether no two rows are of one sequence.
    pub(super) fn is_one_row_each(&self) -> bool {
        let caches = |at: usize| self.places.iter().skip(at).map(|place| place.cache);
        self.places.len() <= ONE_EACH && caches(0).enumerate().all(|(at, cache)| caches(at + 1).all(|c| c != cache))
    }

    /// The rows in stretches, each one position after the other in one sequence.
    pub(super) fn runs(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let mut next = 0;
        let follows = |a: &Place, b: &Place| a.cache == b.cache && a.position.checked_add(1) == Some(b.position);
        self.places.chunk_by(follows).map(move |run| {
            next += run.len();
            next - run.len()..next
        })
    }

    pub(super) fn last_position(&self) -> usize {
        self.places.iter().map(Place::position).max().unwrap_or(0)
    }
}

/// Whole warps for a row of `width` values, at most `most` threads.
pub(super) fn row_threads(width: usize, most: u32) -> u32 {
    u32::try_from(width.next_multiple_of(32)).unwrap_or(most).clamp(32, most)
}
