//! What a choice of the next token takes of a row of logits on a device.

use super::data::{DeviceIndices, DeviceRows, row_threads};
use super::gpu::{DeviceMemory, Gpu, Launch};
use super::{Cuda, SCRATCH, check_room, size};
use crate::KernelError;
use bytemuck::{Pod, Zeroable, bytes_of, cast_slice, cast_slice_mut};

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Argmax {
    x: u64,
    places: u64,
    values: u64,
    out: u64,
    stride: u32,
    width: u32,
    part: u32,
    parts: u32,
}

/// Numbers that a block looks at for the largest.
const PART: usize = 1024;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct TopK {
    x: u64,
    keys: u64,
    out: u64,
    width: u32,
    k: u32,
}

/// Keys that a block sorts; half of it is the largest `k`.
const SORTED: usize = 2048;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Weigh {
    x: u64,
    largest: u64,
    sums: u64,
    width: u32,
    part: u32,
    reciprocal: f32,
    unused: u32,
}

/// Numbers that a block weighs at least, and blocks at most.
const WEIGHED: usize = 2048;
const WEIGHING: usize = 256;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Penalize {
    x: u64,
    tokens: u64,
    count: u32,
    repetition: f32,
    frequency: f32,
    presence: f32,
}

/// The largest few of a row.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Largest {
    /// Where they are and what they are: largest first, equal ones by place, NaN before all numbers.
    pub found: Vec<(u32, f32)>,
    /// Sum of e^((x - largest) / temperature) over the row; only where it was asked for.
    pub total: f64,
}

impl<G: Gpu> Cuda<G> {
    /// Where each row's largest of its first `width` numbers is, the first of equals; none if all are NaN. Only the
    /// choices come back from the device.
    ///
    /// # Errors
    /// There are not so many rows or numbers, or no room for the choices.
    pub fn argmax(
        &self,
        x: &DeviceRows<G::Memory>,
        rows: usize,
        width: usize,
        choices: &mut DeviceIndices<G::Memory>,
    ) -> Result<Vec<Option<u32>>, KernelError> {
        check_room("rows", x.capacity, rows)?;
        check_room("a row's numbers", x.width, width)?;
        check_room("choices", choices.capacity, rows)?;
        choices.known.clear();
        // A part's largest number and its place first, then the largest of these, in the order of the parts.
        let room = (SCRATCH / 8).checked_div(rows).unwrap_or(0);
        let parts = width.div_ceil(PART).min(room).max(1);
        let part = width.div_ceil(parts);
        let parts = width.div_ceil(part.max(1)).max(1);
        let (values, places) = (self.scratch.address(), self.scratch.address() + (SCRATCH / 2) as u64);
        let mut argument = Argmax {
            x: x.values.address(),
            places: 0,
            values: if parts > 1 { values } else { 0 },
            out: if parts > 1 { places } else { choices.indices.address() },
            stride: size(x.width)?,
            width: size(width)?,
            part: size(part)?,
            parts: size(parts)?,
        };
        let launch = |argument: &Argmax| {
            let grid = [argument.parts, size(rows)?, 1];
            let threads = row_threads(argument.part as usize, 1024);
            self.gpu.launch(&Launch::new("argmax", grid, threads, bytes_of(argument)))
        };
        launch(&argument)?;
        if parts > 1 {
            let count = argument.parts;
            (argument.x, argument.places, argument.values) = (values, places, 0);
            (argument.stride, argument.width, argument.part, argument.parts) = (count, count, count, 1);
            argument.out = choices.indices.address();
            launch(&argument)?;
        }
        let mut found = vec![0u32; rows];
        self.gpu.read(&choices.indices, 0, cast_slice_mut(&mut found))?;
        Ok(found.into_iter().map(|at| (at != u32::MAX).then_some(at)).collect())
    }

    /// The `k` largest of the first `width` numbers of a row, and what these weigh at a temperature. Only that comes back.
    ///
    /// # Errors
    /// There are not so many rows or numbers, or `k` is more than 1024 or `width`, or not the width that the kernels count to.
    pub fn largest(
        &self,
        x: &DeviceRows<G::Memory>,
        (row, width): (usize, usize),
        k: usize,
        temperature: Option<f32>,
    ) -> Result<Largest, KernelError> {
        check_room("rows", x.capacity, row + 1)?;
        check_room("a row's numbers", x.width, width)?;
        check_room("the largest numbers that are looked for", width.min(SORTED / 2), k)?;
        if k == 0 {
            return Ok(Largest::default());
        }
        let numbers = x.values.address() + (row * x.width * 4) as u64;
        // The passes' keys are in either half of the scratch by turns.
        let halves = [self.scratch.address(), self.scratch.address() + (SCRATCH / 2) as u64];
        let mut top = TopK { x: numbers, keys: 0, out: halves[0], width: size(width)?, k: size(k)? };
        let mut pass = 0;
        loop {
            let parts = (top.width as usize).div_ceil(SORTED);
            check_room("keys of parts", SCRATCH / 2, (parts * k + WEIGHING) * 8)?;
            self.gpu.launch(&Launch::new("top_k", [size(parts)?, 1, 1], 512, bytes_of(&top)))?;
            if parts == 1 {
                break;
            }
            pass += 1;
            top = TopK { x: 0, keys: top.out, out: halves[pass % 2], width: size(parts * k)?, k: top.k };
        }
        // Sums lie behind the keys, so that all is read at once.
        let part = width.div_ceil(WEIGHING).max(WEIGHED);
        let sums = if temperature.is_some() { width.div_ceil(part) } else { 0 };
        if let Some(temperature) = temperature {
            let weigh = Weigh {
                x: numbers,
                largest: top.out,
                sums: top.out + 8 * k as u64,
                width: size(width)?,
                part: size(part)?,
                reciprocal: 1.0 / temperature,
                unused: 0,
            };
            self.gpu.launch(&Launch::new("weigh", [size(sums)?, 1, 1], 256, bytes_of(&weigh)))?;
        }
        let mut bytes = vec![0u32; 2 * k + sums];
        self.gpu.read(&self.scratch, (top.out - halves[0]) as usize, cast_slice_mut(&mut bytes))?;
        let (keys, sums) = bytes.split_at(2 * k);
        let number = |order: u32| f32::from_bits(if order >> 31 == 1 { order ^ (1 << 31) } else { !order });
        Ok(Largest {
            found: keys.chunks_exact(2).map(|key| (!key[0], number(key[1]))).collect(),
            total: sums.iter().map(|sum| f64::from(f32::from_bits(*sum))).sum(),
        })
    }

    /// Takes penalties off a row's numbers: `tokens` are places and how often each was there; a number above zero is divided by
    /// `repetition`, another multiplied, then `frequency` times the count and `presence` are taken off, rounded at each step.
    ///
    /// # Errors
    /// There is no such row or place.
    pub fn penalize(
        &self,
        x: &mut DeviceRows<G::Memory>,
        row: usize,
        [repetition, frequency, presence]: [f32; 3],
        tokens: &[[u32; 2]],
        staged: &mut DeviceIndices<G::Memory>,
    ) -> Result<(), KernelError> {
        check_room("rows", x.capacity, row + 1)?;
        if let Some(found) = tokens.iter().map(|t| t[0] as usize).find(|t| *t >= x.width) {
            return Err(KernelError::Row { found, n: x.width });
        }
        x.changes();
        staged.known.clear();
        for tokens in tokens.chunks((staged.capacity / 2).max(1)) {
            check_room("indices", staged.capacity, 2 * tokens.len())?;
            self.gpu.write(&staged.indices, 0, cast_slice(tokens))?;
            let penalize = Penalize {
                x: x.values.address() + (row * x.width * 4) as u64,
                tokens: staged.indices.address(),
                count: size(tokens.len())?,
                repetition,
                frequency,
                presence,
            };
            let blocks = size(tokens.len().div_ceil(256))?;
            self.gpu.launch(&Launch::new("penalize", [blocks, 1, 1], 256, bytes_of(&penalize)))?;
        }
        Ok(())
    }
}
