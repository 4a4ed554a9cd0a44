//! A weight in the order that tensor cores take it; `kernels/cuda/linear.cuh` draws it.

use super::gpu::{DeviceMemory, Gpu};
use super::{Cuda, magic, size};
use crate::weight::{Body, Grid, PackedNumbers, PackedZeros};
use crate::{BLOCK, KernelError, Levels, PANEL, PackedWeight, WeightKind};
use bytemuck::{Pod, Zeroable, cast_slice};
use half::f16;
use rayon::prelude::*;

/// Values of K that a lane has 16 bytes of (4-bit codes).
const UNIT: usize = 64;

/// `Numbers` of linear.cuh.
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct NumbersArgument {
    first: u64,
    second: u64,
    kind: u32,
    bias: f32,
    spans: u32,
    span_magic: u32,
}

/// Kinds of numbers, as linear.cuh counts them.
const NUMBERS_F16: u32 = 0;
const NUMBERS_CODED: u32 = 2;

impl NumbersArgument {
    fn is_alike(&self, other: &NumbersArgument) -> bool {
        let rest = |n: &NumbersArgument| (n.kind, n.bias.to_bits(), n.spans, n.span_magic);
        rest(self) == rest(other)
    }
}

/// `Weight` of linear.cuh.
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct WeightArgument {
    pub(super) codes: u64,
    pub(super) zeros: u64,
    pub(super) scales: NumbersArgument,
    pub(super) mins: NumbersArgument,
    table_lo: [u32; 4],
    table_hi: [u32; 4],
    pub(super) n: u32,
    pub(super) units: u32,
    groups: u32,
    group_magic: u32,
    /// 0: a constant; else a number a group has to be taken into account.
    pub(super) zero_kind: u32,
    zero: f32,
}

/// What kernels know of a weight's scales when they are compiled: halves; codes with one number at the second level for
/// each row; or anything, zero points and minimums too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ScaleKind {
    F16,
    Coded,
    Any,
}

impl WeightArgument {
    pub(super) fn scale_kind(&self) -> ScaleKind {
        match self.scales.kind {
            _ if self.zero_kind != 0 => ScaleKind::Any,
            NUMBERS_F16 => ScaleKind::F16,
            NUMBERS_CODED if self.scales.spans == 1 => ScaleKind::Coded,
            _ => ScaleKind::Any,
        }
    }

    /// Whether one launch can multiply with both: nothing differs but codes, numbers of one kind and how many rows there
    /// are.
    pub(super) fn is_alike(&self, other: &WeightArgument) -> bool {
        let rest = |w: &WeightArgument| {
            (w.table_lo, w.table_hi, w.units, w.groups, w.group_magic, w.zero_kind, w.zero.to_bits())
        };
        rest(self) == rest(other) && self.scales.is_alike(&other.scales) && self.mins.is_alike(&other.mins)
    }
}

/// `Outliers` of embed.cu.
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct OutliersArgument {
    row_start: u64,
    cols: u64,
    values: u64,
}

/// What codes are; kernels' names end with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Codes {
    /// 4 bits, level = code.
    W4,
    /// 4 bits through a table.
    W4Table,
    /// 8 bits.
    W8,
}

/// How a weight is stored, and by which kernels it is read.
#[derive(Debug, Clone, Copy)]
pub(super) enum Stored {
    /// Codes and scales.
    Codes(Codes, WeightArgument),
    /// Row-major numbers.
    F32(u64),
    /// Row-major numbers.
    F16(u64),
    /// Row-major numbers.
    Bf16(u64),
}

/// An (n, k) weight on a device.
#[derive(Debug)]
pub struct DeviceWeight<M> {
    pub(super) n: usize,
    pub(super) k: usize,
    kind: WeightKind,
    pub(super) stored: Stored,
    pub(super) outliers: Option<OutliersArgument>,
    /// Everything that the arguments point to.
    pieces: Vec<M>,
}

impl<M: DeviceMemory> DeviceWeight<M> {
    /// Output features (rows).
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features (columns).
    pub fn k(&self) -> usize {
        self.k
    }

    /// What its codes are.
    pub fn kind(&self) -> WeightKind {
        self.kind
    }

    /// Its codes, if it has some and nothing lies outside of their grid.
    pub(super) fn pure_codes(&self) -> Option<(Codes, &WeightArgument)> {
        match &self.stored {
            Stored::Codes(codes, argument) if self.outliers.is_none() => Some((*codes, argument)),
            _ => None,
        }
    }

    /// Bytes on the device, padding included.
    pub fn bytes(&self) -> usize {
        self.pieces.iter().map(DeviceMemory::bytes).sum()
    }
}

/// Pieces on their way to a device.
struct Upload<'g, G: Gpu> {
    gpu: &'g G,
    pieces: Vec<G::Memory>,
}

impl<G: Gpu> Upload<'_, G> {
    /// Puts bytes on the device and says where.
    fn put(&mut self, bytes: &[u8]) -> Result<u64, KernelError> {
        let memory = self.gpu.upload(bytes)?;
        let address = memory.address();
        self.pieces.push(memory);
        Ok(address)
    }
}

impl<G: Gpu> Cuda<G> {
    /// Moves a packed weight to the device, in the device's order.
    ///
    /// # Errors
    /// K is more than the kernels count to, or the device has no memory for it.
    pub fn weight(&self, packed: &PackedWeight) -> Result<DeviceWeight<G::Memory>, KernelError> {
        let (n, k) = (packed.n(), packed.k());
        let mut upload = Upload { gpu: &self.gpu, pieces: Vec::new() };
        let stored = match &packed.body {
            Body::F32(rows) => Stored::F32(upload.put(cast_slice(&row_major(n, k, rows)))?),
            Body::F16(rows) => Stored::F16(upload.put(cast_slice(&row_major(n, k, rows)))?),
            Body::Bf16(rows) => Stored::Bf16(upload.put(cast_slice(&row_major(n, k, rows)))?),
            Body::Grid(grid) => {
                let argument = grid_argument(&mut upload, n, k, grid)?;
                match grid.levels {
                    Levels::Linear4 => Stored::Codes(Codes::W4, argument),
                    Levels::Linear8 => Stored::Codes(Codes::W8, argument),
                    Levels::Table4(_) | Levels::FloatTable4(_) => Stored::Codes(Codes::W4Table, argument),
                }
            }
        };
        let outliers = match packed.outliers.cols.is_empty() {
            true => None,
            false => Some(OutliersArgument {
                row_start: upload.put(cast_slice(&packed.outliers.row_start))?,
                cols: upload.put(cast_slice(&packed.outliers.cols))?,
                values: upload.put(cast_slice(&packed.outliers.values))?,
            }),
        };
        Ok(DeviceWeight { n, k, kind: packed.kind(), stored, outliers, pieces: upload.pieces })
    }
}

/// (panels, k, 16) -> (n, k)
fn row_major<T: Pod + Send + Sync>(n: usize, k: usize, panels: &[T]) -> Vec<T> {
    let mut rows = vec![T::zeroed(); n * k];
    if k > 0 {
        rows.par_chunks_mut(k).enumerate().for_each(|(row, out)| {
            let panel = &panels[row / PANEL * k * PANEL..][..k * PANEL];
            for (value, column) in out.iter_mut().zip(panel.chunks(PANEL)) {
                *value = column[row % PANEL];
            }
        });
    }
    rows
}

fn grid_argument<G: Gpu>(
    upload: &mut Upload<'_, G>,
    n: usize,
    k: usize,
    grid: &Grid,
) -> Result<WeightArgument, KernelError> {
    // Kernels divide indices of 32 values by groups of them: exact while their product is below 2^32.
    if k > 1 << 20 {
        return Err(KernelError::Cuda { why: format!("rows of {k} values; at most {} are taken", 1 << 20) });
    }
    let tiles = n.div_ceil(PANEL);
    let units = k.div_ceil(UNIT);
    let groups = (2 * units).div_ceil(grid.group_blocks);
    let shape = GroupShape { n, tiles, groups, stored: grid.groups };
    let (table_lo, table_hi) = match grid.levels {
        Levels::Table4(levels) => table(&levels.map(f32::from)),
        Levels::FloatTable4(levels) => table(&levels),
        Levels::Linear4 | Levels::Linear8 => Default::default(),
    };
    let is_table = matches!(grid.levels, Levels::Table4(_) | Levels::FloatTable4(_));
    let mut argument = WeightArgument {
        codes: upload.put(&codes(tiles, units, k, grid))?,
        table_lo,
        table_hi,
        n: size(n)?,
        units: size(units)?,
        groups: size(groups)?,
        group_magic: magic(grid.group_blocks)?,
        ..WeightArgument::default()
    };
    match &grid.zeros {
        // A level of a table is taken as it is: its zero point becomes a minimum.
        PackedZeros::Const(zero) if is_table && *zero != 0 => {
            let min = |panel, group, lane| -(*zero as f32) * grid.scales.at(panel, group, grid.groups, lane);
            argument.mins = floats(upload, shape, min)?;
            argument.zero_kind = 2;
        }
        PackedZeros::Int(zeros) if is_table => {
            let min = |panel: usize, group, lane| {
                let zero = zeros[(panel * grid.groups + group) * PANEL + lane];
                -f32::from(zero) * grid.scales.at(panel, group, grid.groups, lane)
            };
            argument.mins = floats(upload, shape, min)?;
            argument.zero_kind = 2;
        }
        PackedZeros::Const(zero) => argument.zero = *zero as f32,
        PackedZeros::Int(zeros) => {
            let pairs = shape.pairs(0u8, |panel, group, lane| zeros[(panel * grid.groups + group) * PANEL + lane]);
            argument.zeros = upload.put(&pairs)?;
            argument.zero_kind = 1;
        }
        PackedZeros::Min(mins) => {
            argument.mins = numbers(upload, shape, mins)?;
            argument.zero_kind = 2;
        }
    }
    argument.scales = numbers(upload, shape, &grid.scales)?;
    Ok(argument)
}

/// The low and the high bytes of 16 halves.
fn table(levels: &[f32; 16]) -> ([u32; 4], [u32; 4]) {
    let halves = levels.map(|level| f16::from_f32(level).to_bits());
    let plane = |shift: u32| {
        std::array::from_fn(|word| {
            (0..4).fold(0, |bytes, i| bytes | u32::from(halves[4 * word + i] >> shift & 255) << (8 * i))
        })
    };
    (plane(0), plane(8))
}

/// Codes lane by lane; columns past `k` are code 0, which meets activations of zero.
fn codes(tiles: usize, units: usize, k: usize, grid: &Grid) -> Vec<u8> {
    let bits = grid.levels.bits();
    let is_table = matches!(grid.levels, Levels::Table4(_) | Levels::FloatTable4(_));
    let tile_bytes = units * UNIT * PANEL * bits / 8;
    let mut bytes = vec![0; tiles * tile_bytes];
    if tile_bytes == 0 {
        return bytes;
    }
    bytes.par_chunks_mut(tile_bytes).enumerate().for_each(|(tile, bytes)| {
        for col in 0..k {
            let (unit, half, j) = (col / UNIT, col / 32 % 2, col / 8 % 4);
            let (step, e) = (col / 4 % 2, col % 4);
            for row in 0..PANEL {
                let code = grid.code(k, tile, row, col);
                let (lane, above) = (row % 8 * 4 + j, row / 8);
                if bits == 4 {
                    let word = (unit * 32 + lane) * 16 + (half * 2 + step) * 4;
                    let pair = above + e / 2 * 2;
                    let nibble = if is_table { pair * 2 + e % 2 } else { pair + e % 2 * 4 };
                    bytes[word + nibble / 2] |= code << (nibble % 2 * 4);
                } else {
                    let word = ((unit * 2 + half) * 32 + lane) * 16 + (step * 2 + e / 2) * 4;
                    bytes[word + above * 2 + e % 2] = code;
                }
            }
        }
    });
    bytes
}

/// How many numbers a weight has, stored and with padding.
#[derive(Clone, Copy)]
struct GroupShape {
    n: usize,
    tiles: usize,
    groups: usize,
    stored: usize,
}

impl GroupShape {
    /// (tiles, groups, 8) pairs of rows i and i + 8; `nothing` in places of padding.
    fn pairs<T: Copy>(self, nothing: T, number: impl Fn(usize, usize, usize) -> T) -> Vec<T> {
        let mut pairs = Vec::with_capacity(self.tiles * self.groups * PANEL);
        for tile in 0..self.tiles {
            for group in 0..self.groups {
                for at in 0..PANEL {
                    let lane = at / 2 + at % 2 * 8;
                    let is_there = group < self.stored && tile * PANEL + lane < self.n;
                    pairs.push(if is_there { number(tile, group, lane) } else { nothing });
                }
            }
        }
        pairs
    }
}

fn floats<G: Gpu>(
    upload: &mut Upload<'_, G>,
    shape: GroupShape,
    number: impl Fn(usize, usize, usize) -> f32,
) -> Result<NumbersArgument, KernelError> {
    let first = upload.put(cast_slice(&shape.pairs(0f32, number)))?;
    Ok(NumbersArgument { first, kind: 1, ..NumbersArgument::default() })
}

fn numbers<G: Gpu>(
    upload: &mut Upload<'_, G>,
    shape: GroupShape,
    numbers: &PackedNumbers,
) -> Result<NumbersArgument, KernelError> {
    let at = |panel: usize, group: usize, lane: usize| (panel * shape.stored + group) * PANEL + lane;
    match numbers {
        PackedNumbers::F16(rows) => {
            let pairs = shape.pairs(f16::ZERO, |panel, group, lane| rows[at(panel, group, lane)]);
            Ok(NumbersArgument { first: upload.put(cast_slice(&pairs))?, kind: 0, ..NumbersArgument::default() })
        }
        PackedNumbers::F32(rows) => floats(upload, shape, |panel, group, lane| rows[at(panel, group, lane)]),
        PackedNumbers::Coded { codes, bias, second, span } => {
            let pairs = shape.pairs(0u8, |panel, group, lane| codes[at(panel, group, lane)]);
            let (stored, spans) = (shape.stored.div_ceil(*span), shape.groups.div_ceil(*span));
            let span_shape = GroupShape { groups: spans, stored, ..shape };
            let second = span_shape.pairs(0f32, |panel, span, lane| second[(panel * stored + span) * PANEL + lane]);
            Ok(NumbersArgument {
                first: upload.put(&pairs)?,
                second: upload.put(cast_slice(&second))?,
                kind: 2,
                bias: *bias,
                spans: size(spans)?,
                span_magic: magic(*span)?,
            })
        }
    }
}

const _: () = assert!(UNIT.is_multiple_of(BLOCK));
