//! Packing: from one code a byte to panels, checked once, then trusted.

use super::numbers::PackedNumbers;
use super::{DenseSource, Levels, Outliers, WeightSource, Zeros};
use crate::buffer::Buffer;
use crate::{BLOCK, KernelError, PANEL};
use bytemuck::Pod;
use half::{bf16, f16};
use rayon::prelude::*;
use std::ops::RangeInclusive;

/// Which family of kernels multiplies a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightKind {
    /// 4-bit codes, level = code.
    W4Lin,
    /// 4-bit codes through a table of signed bytes.
    W4Tab,
    /// 4-bit codes through a table of floats.
    W4Flt,
    /// 8-bit codes, level = code.
    W8,
    /// Dense single precision.
    F32,
    /// Dense bfloat16.
    Bf16,
    /// Dense half precision.
    F16,
}

impl WeightKind {
    /// Whether there are codes and scales.
    pub const fn is_quantized(self) -> bool {
        matches!(self, WeightKind::W4Lin | WeightKind::W4Tab | WeightKind::W4Flt | WeightKind::W8)
    }

    /// Whether levels are bytes, for products in integers.
    pub const fn has_byte_levels(self) -> bool {
        matches!(self, WeightKind::W4Lin | WeightKind::W4Tab | WeightKind::W8)
    }

    /// The word for it in kernel names.
    pub const fn name(self) -> &'static str {
        match self {
            WeightKind::W4Lin => "w4lin",
            WeightKind::W4Tab => "w4tab",
            WeightKind::W4Flt => "w4flt",
            WeightKind::W8 => "w8",
            WeightKind::F32 => "f32",
            WeightKind::Bf16 => "bf16",
            WeightKind::F16 => "f16",
        }
    }
}

/// An (n, k) weight in panels, ready to be multiplied: `y = x W^T`.
#[derive(Debug, Clone)]
pub struct PackedWeight {
    n: usize,
    k: usize,
    pub(crate) body: Body,
    /// Empty if there are none.
    pub(crate) outliers: Outliers,
}

/// The numbers of a weight.
#[derive(Debug, Clone)]
pub(crate) enum Body {
    Grid(Box<Grid>),
    /// (panels, k, 16)
    F32(Buffer<f32>),
    /// (panels, k, 16)
    F16(Buffer<f16>),
    /// (panels, k, 16)
    Bf16(Buffer<bf16>),
}

/// Codes and what turns them into values.
#[derive(Debug, Clone)]
pub(crate) struct Grid {
    pub(crate) levels: Levels,
    /// (panels, blocks, 4 or 8 chunks, 64)
    pub(crate) codes: Buffer<u8>,
    /// Blocks of a group; the last group of a row may have fewer.
    pub(crate) group_blocks: usize,
    pub(crate) groups: usize,
    pub(crate) scales: PackedNumbers,
    pub(crate) zeros: PackedZeros,
    /// Whether table levels, and levels less zero points, are in `-NARROW..NARROW`.
    pub(crate) narrow: bool,
}

/// Bound of levels whose products with bytes, summed over half a block, fit in 16 bits.
pub(crate) const NARROW: i32 = 32;

/// Zero points or minimums in panels.
#[derive(Debug, Clone)]
pub(crate) enum PackedZeros {
    Const(i32),
    /// (panels, groups, 16)
    Int(Buffer<u8>),
    Min(PackedNumbers),
}

impl PackedWeight {
    /// Packs quantized rows. Refuses lengths that don't fit the shape, groups that aren't multiples of 32 (or whole
    /// rows), codes, zero points and scale codes out of range, and outliers out of place; panels in parallel.
    pub fn pack(source: &WeightSource) -> Result<Self, KernelError> {
        let &WeightSource { n, k, group, levels, codes, .. } = source;
        if group == 0 || (group < k && !group.is_multiple_of(BLOCK)) {
            return Err(KernelError::Group { found: group });
        }
        let groups = k.div_ceil(group);
        check_len("codes", codes.len(), n.saturating_mul(k))?;
        let per_group = n.saturating_mul(groups);
        let zeros = match source.zeros {
            Zeros::Const(zero) if !zero_points(&levels).contains(&zero) => {
                return Err(KernelError::Zero { found: zero });
            }
            Zeros::Const(zero) => PackedZeros::Const(zero),
            Zeros::Int(zeros) => {
                check_len("zero points", zeros.len(), per_group)?;
                let range = zero_points(&levels);
                if let Some(zero) = zeros.iter().find(|zero| !range.contains(&i32::from(**zero))) {
                    return Err(KernelError::Zero { found: i32::from(*zero) });
                }
                PackedZeros::Int(pack_rows(n, groups, zeros))
            }
            Zeros::Min(mins) => PackedZeros::Min(PackedNumbers::pack(n, groups, &mins, "minimums")?),
        };
        let outliers = match source.outliers {
            Some(outliers) => check_outliers(outliers, n, k)?,
            None => Outliers::default(),
        };
        let grid = Grid {
            narrow: is_narrow(&levels, &zeros),
            levels,
            codes: pack_codes(n, k, &levels, codes)?,
            group_blocks: group.min(k.next_multiple_of(BLOCK)).div_ceil(BLOCK).max(1),
            groups,
            scales: PackedNumbers::pack(n, groups, &source.scales, "scales")?,
            zeros,
        };
        Ok(PackedWeight { n, k, body: Body::Grid(Box::new(grid)), outliers })
    }

    /// Packs (n, k) dense rows; refuses a wrong length.
    pub fn pack_dense(n: usize, k: usize, source: DenseSource) -> Result<Self, KernelError> {
        let wanted = n.saturating_mul(k);
        let body = match source {
            DenseSource::F32(rows) => {
                check_len("dense rows", rows.len(), wanted)?;
                Body::F32(pack_rows(n, k, rows))
            }
            DenseSource::F16(rows) => {
                check_len("dense rows", rows.len(), wanted)?;
                Body::F16(pack_rows(n, k, rows))
            }
            DenseSource::Bf16(rows) => {
                check_len("dense rows", rows.len(), wanted)?;
                Body::Bf16(pack_rows(n, k, rows))
            }
        };
        Ok(PackedWeight { n, k, body, outliers: Outliers::default() })
    }

    /// Makes room for `n` rows in all, so that [`PackedWeight::append`] moves nothing.
    pub fn reserve(&mut self, n: usize) {
        let (have, panels) = (self.n.div_ceil(PANEL), n.div_ceil(PANEL));
        let all = |len: usize| len / have.max(1) * panels;
        match &mut self.body {
            Body::F32(rows) => rows.reserve(all(rows.len())),
            Body::F16(rows) => rows.reserve(all(rows.len())),
            Body::Bf16(rows) => rows.reserve(all(rows.len())),
            Body::Grid(grid) => {
                grid.codes.reserve(all(grid.codes.len()));
                grid.scales.reserve(have, panels);
                match &mut grid.zeros {
                    PackedZeros::Const(_) => {}
                    PackedZeros::Int(zeros) => zeros.reserve(all(zeros.len())),
                    PackedZeros::Min(mins) => mins.reserve(have, panels),
                }
            }
        }
    }

    /// Adds the rows of `below` under its own, as if both had been packed together.
    ///
    /// Refuses rows of another length or in another arithmetic, and rows under a panel that isn't full; nothing has changed
    /// then.
    pub fn append(&mut self, below: &PackedWeight) -> Result<(), KernelError> {
        check_len("a row to be added", below.k, self.k)?;
        let last = (self.n + PANEL - 1) % PANEL + 1;
        check_len("the last panel of rows that others are added to", last, PANEL)?;
        let unlike = KernelError::Unlike { found: below.kind().name(), wanted: self.kind().name() };
        match (&mut self.body, &below.body) {
            (Body::F32(rows), Body::F32(more)) => rows.extend(more),
            (Body::F16(rows), Body::F16(more)) => rows.extend(more),
            (Body::Bf16(rows), Body::Bf16(more)) => rows.extend(more),
            (Body::Grid(grid), Body::Grid(more)) if grid.is_alike(more) => grid.append(more),
            _ => return Err(unlike),
        }
        self.outliers.append(&below.outliers, self.n, below.n);
        self.n += below.n;
        Ok(())
    }

    /// Output features (rows).
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features (columns).
    pub fn k(&self) -> usize {
        self.k
    }

    /// Which kernels multiply it.
    pub fn kind(&self) -> WeightKind {
        match &self.body {
            Body::Grid(grid) => match grid.levels {
                Levels::Linear4 => WeightKind::W4Lin,
                Levels::Table4(_) => WeightKind::W4Tab,
                Levels::FloatTable4(_) => WeightKind::W4Flt,
                Levels::Linear8 => WeightKind::W8,
            },
            Body::F32(_) => WeightKind::F32,
            Body::F16(_) => WeightKind::F16,
            Body::Bf16(_) => WeightKind::Bf16,
        }
    }

    /// What codes mean; none for dense weights.
    pub fn levels(&self) -> Option<Levels> {
        match &self.body {
            Body::Grid(grid) => Some(grid.levels),
            _ => None,
        }
    }

    /// Bytes of memory, padding included.
    pub fn bytes(&self) -> usize {
        let outliers = &self.outliers;
        let body = match &self.body {
            Body::Grid(grid) => {
                let zeros = match &grid.zeros {
                    PackedZeros::Const(_) => 0,
                    PackedZeros::Int(zeros) => zeros.bytes(),
                    PackedZeros::Min(mins) => mins.bytes(),
                };
                grid.codes.bytes() + grid.scales.bytes() + zeros
            }
            Body::F32(rows) => rows.bytes(),
            Body::F16(rows) => rows.bytes(),
            Body::Bf16(rows) => rows.bytes(),
        };
        body + 4 * (outliers.row_start.len() + outliers.cols.len()) + 2 * outliers.values.len()
    }

    /// Writes the values of row `row` to `out` (k values): an embedding lookup from the bytes that products read.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) -> Result<(), KernelError> {
        if row >= self.n {
            return Err(KernelError::Row { found: row, n: self.n });
        }
        check_len("a dequantized row", out.len(), self.k)?;
        let (panel, lane) = (row / PANEL, row % PANEL);
        let first = panel * self.k * PANEL + lane;
        match &self.body {
            Body::F32(rows) => out.iter_mut().enumerate().for_each(|(c, v)| *v = rows[first + c * PANEL]),
            Body::F16(rows) => out.iter_mut().enumerate().for_each(|(c, v)| *v = rows[first + c * PANEL].to_f32()),
            Body::Bf16(rows) => out.iter_mut().enumerate().for_each(|(c, v)| *v = rows[first + c * PANEL].to_f32()),
            Body::Grid(grid) => {
                for (g, part) in out.chunks_mut(grid.group_blocks * BLOCK).enumerate() {
                    let scale = grid.scales.at(panel, g, grid.groups, lane);
                    let (zero, min) = match &grid.zeros {
                        PackedZeros::Const(zero) => (*zero as f32, 0.0),
                        PackedZeros::Int(zeros) => (f32::from(zeros[(panel * grid.groups + g) * PANEL + lane]), 0.0),
                        PackedZeros::Min(mins) => (0.0, mins.at(panel, g, grid.groups, lane)),
                    };
                    for (i, v) in part.iter_mut().enumerate() {
                        let code = grid.code(self.k, panel, lane, g * grid.group_blocks * BLOCK + i);
                        *v = scale * (grid.levels.value(code) - zero) + min;
                    }
                }
            }
        }
        for (col, value) in self.outliers_of(row) {
            out[col] += value;
        }
        Ok(())
    }

    /// (column, value) of each outlier of a row.
    #[inline(always)]
    pub(crate) fn outliers_of(&self, row: usize) -> impl Iterator<Item = (usize, f32)> + '_ {
        let Outliers { row_start, cols, values } = &self.outliers;
        let range = match row_start.get(row..row + 2) {
            Some(ends) => ends[0] as usize..ends[1] as usize,
            None => 0..0,
        };
        cols[range.clone()].iter().zip(&values[range]).map(|(col, value)| (*col as usize, value.to_f32()))
    }
}

impl Grid {
    fn is_alike(&self, other: &Grid) -> bool {
        let zeros = match (&self.zeros, &other.zeros) {
            (PackedZeros::Const(a), PackedZeros::Const(b)) => a == b,
            (PackedZeros::Int(_), PackedZeros::Int(_)) => true,
            (PackedZeros::Min(a), PackedZeros::Min(b)) => a.is_alike(b),
            _ => false,
        };
        let groups = (self.group_blocks, self.groups) == (other.group_blocks, other.groups);
        zeros && groups && self.levels == other.levels && self.scales.is_alike(&other.scales)
    }

    fn append(&mut self, below: &Grid) {
        self.codes.extend(&below.codes);
        self.scales.append(&below.scales);
        match (&mut self.zeros, &below.zeros) {
            (PackedZeros::Int(zeros), PackedZeros::Int(more)) => zeros.extend(more),
            (PackedZeros::Min(mins), PackedZeros::Min(more)) => mins.append(more),
            _ => {}
        }
    }

    /// Bytes of one block of a panel.
    pub(crate) fn block_bytes(&self) -> usize {
        PANEL * BLOCK * self.levels.bits() / 8
    }

    pub(crate) fn code(&self, k: usize, panel: usize, lane: usize, col: usize) -> u8 {
        let panel = &self.codes[panel * k.div_ceil(BLOCK) * self.block_bytes()..];
        match self.levels.bits() {
            8 => panel[col / 4 * 64 + 4 * lane + col % 4],
            _ => panel[col / 8 * 64 + 4 * lane + col % 4] >> (col % 8 / 4 * 4) & 15,
        }
    }
}

fn is_narrow(levels: &Levels, zeros: &PackedZeros) -> bool {
    let zero = match zeros {
        PackedZeros::Const(zero) => *zero,
        PackedZeros::Min(_) => 0,
        PackedZeros::Int(_) => return false,
    };
    let range = -NARROW..NARROW;
    matches!(levels, Levels::Table4(table) if table.iter().all(|level| {
        let level = i32::from(*level);
        range.contains(&level) && range.contains(&(level - zero))
    }))
}

/// The zero points that kernels sum exactly.
fn zero_points(levels: &Levels) -> RangeInclusive<i32> {
    match levels {
        // Products of 16 codes less their zero points stay within 16 bits.
        Levels::Linear4 => 0..=16,
        _ => -255..=255,
    }
}

pub(super) fn check_len(what: &'static str, found: usize, wanted: usize) -> Result<(), KernelError> {
    if found == wanted { Ok(()) } else { Err(KernelError::Length { what, found, wanted }) }
}

/// (n, width) rows as (panels, width, 16): column by column, one row a lane, zeros past row n.
pub(super) fn pack_rows<T: Pod + Send + Sync>(n: usize, width: usize, rows: &[T]) -> Buffer<T> {
    // Without columns there may be any number of rows.
    if width == 0 {
        return Buffer::zeroed(0);
    }
    let mut packed = Buffer::<T>::zeroed_in_large_pages(n.div_ceil(PANEL) * width * PANEL);
    packed.par_chunks_mut(width * PANEL).zip(rows.par_chunks(width * PANEL)).for_each(|(panel, rows)| {
        for (lane, row) in rows.chunks(width).enumerate() {
            for (column, value) in panel.chunks_mut(PANEL).zip(row) {
                column[lane] = *value;
            }
        }
    });
    packed
}

fn pack_codes(n: usize, k: usize, levels: &Levels, codes: &[u8]) -> Result<Buffer<u8>, KernelError> {
    if k == 0 {
        return Ok(Buffer::zeroed(0));
    }
    let panel_bytes = k.div_ceil(BLOCK) * BLOCK * PANEL * levels.bits() / 8;
    let mut packed = Buffer::<u8>::zeroed_in_large_pages(n.div_ceil(PANEL) * panel_bytes);
    let nibbles = levels.bits() == 4;
    let fault = packed.par_chunks_mut(panel_bytes).zip(codes.par_chunks(k * PANEL)).enumerate().find_map_first(
        |(p, (panel, rows))| {
            let lines = panel.as_chunks_mut().0;
            for (lane, row) in rows.chunks(k).enumerate() {
                if !nibbles {
                    pack_row(lines, lane, row, u32::from_le_bytes);
                    continue;
                }
                if row.iter().fold(0, |most, code| most.max(*code)) > 15 {
                    let col = row.iter().position(|code| *code > 15).unwrap_or_default();
                    return Some(KernelError::Code { row: p * PANEL + lane, col, found: row[col], levels: 16 });
                }
                pack_row(lines, lane, row, |eight| {
                    let codes = u64::from_le_bytes(eight);
                    codes as u32 | (codes >> 28) as u32
                });
            }
            None
        },
    );
    fault.map_or(Ok(packed), Err)
}

/// Writes a row's codes to lane `lane` of a panel: those of `N` columns make the lane's word of a line.
fn pack_row<const N: usize>(lines: &mut [[u8; 64]], lane: usize, row: &[u8], word: impl Fn([u8; N]) -> u32) {
    let (whole, rest) = row.as_chunks();
    let mut padded = [0; N];
    padded[..rest.len()].copy_from_slice(rest);
    let words = whole.iter().chain(std::iter::once(&padded).filter(|_| !rest.is_empty()));
    for (line, codes) in lines.iter_mut().zip(words) {
        if let Some(lane) = line.as_chunks_mut().0.get_mut(lane) {
            *lane = word(*codes).to_le_bytes();
        }
    }
}

fn check_outliers(outliers: &Outliers, n: usize, k: usize) -> Result<Outliers, KernelError> {
    let Outliers { row_start, cols, values } = outliers;
    check_len("outlier values", values.len(), cols.len())?;
    if row_start.is_empty() {
        check_len("outlier columns without row offsets", cols.len(), 0)?;
        return Ok(Outliers::default());
    }
    check_len("outlier row offsets", row_start.len(), n.saturating_add(1))?;
    let mut start = 0;
    for (row, end) in row_start[1..].iter().enumerate() {
        let cols = (row_start[0] == 0).then(|| cols.get(start..*end as usize)).flatten();
        let Some(cols) = cols else {
            return Err(KernelError::OutlierRow { row, start: row_start[row], end: *end });
        };
        if let Some(col) = cols.iter().find(|col| **col as usize >= k) {
            return Err(KernelError::Outlier { row, col: *col as usize, n, k });
        }
        start = *end as usize;
    }
    check_len("outlier columns", cols.len(), start)?;
    Ok(outliers.clone())
}
