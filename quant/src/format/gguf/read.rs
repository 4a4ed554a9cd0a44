//! From bytes to pairs and tensor descriptions; nothing is trusted.

use super::metadata::{Array, Value};
use super::{blocks, stored};
use crate::format::source::TensorInfo;
use std::collections::HashSet;
use std::ops::Range;

// Limits that llama.cpp sets too.
const MAX_STRING: u64 = 1 << 30;
const MAX_ARRAY: u64 = 1 << 30;
const MAX_DIMS: u32 = 4;
const MAX_NAME: usize = 63;
const MAX_NESTING: usize = 64;
const MAX_ALIGNMENT: i128 = 1 << 20;
const DEFAULT_ALIGNMENT: usize = 32;

/// Why the bytes are refused; the caller names the file.
type Parsed<T> = Result<T, String>;

pub(super) struct Header {
    pub pairs: Vec<(String, Value)>,
    pub infos: Vec<TensorInfo>,
    pub ranges: Vec<Range<usize>>,
}

pub(super) fn header(bytes: &[u8]) -> Parsed<Header> {
    let mut cursor = Cursor { bytes, at: 0 };
    if cursor.take(4, "magic")? != b"GGUF" {
        return Err("doesn't start with `GGUF`".into());
    }
    match cursor.u32("version")? {
        2 | 3 => {}
        1 => return Err("version 1, wanted 2 or 3: convert it again with a current llama.cpp".into()),
        v if matches!(v.swap_bytes(), 1..=3) => return Err("big-endian file, wanted little-endian".into()),
        v => return Err(format!("version {v}, wanted 2 or 3")),
    }
    let (tensors, pairs) = (cursor.u64("tensor count")?, cursor.u64("pair count")?);
    let pairs = cursor.pairs(cursor.fits(pairs, 8 + 4 + 1, "pair count")?)?;
    let (infos, offsets) = cursor.infos(cursor.fits(tensors, 8 + 4 + 4 + 8, "tensor count")?)?;
    let alignment = alignment(&pairs)?;
    let start = cursor.at.checked_next_multiple_of(alignment).ok_or("header too long")?;
    let ranges = data_ranges(&infos, &offsets, start, alignment, bytes.len())?;
    Ok(Header { pairs, infos, ranges })
}

fn alignment(pairs: &[(String, Value)]) -> Parsed<usize> {
    match pairs.iter().find(|(key, _)| key == "general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT),
        Some((_, Value::Int(a))) if (1..=MAX_ALIGNMENT).contains(a) && a & (a - 1) == 0 => Ok(*a as usize),
        Some((_, found)) => Err(format!("general.alignment is {found:?}, wanted a power of two up to {MAX_ALIGNMENT}")),
    }
}

/// Where each tensor's bytes lie: the stated offsets must be the running sum of padded sizes, within the file.
fn data_ranges(
    infos: &[TensorInfo],
    offsets: &[u64],
    start: usize,
    alignment: usize,
    file: usize,
) -> Parsed<Vec<Range<usize>>> {
    let mut ranges = Vec::with_capacity(infos.len());
    let mut at = start;
    for (info, &offset) in infos.iter().zip(offsets) {
        let name = &info.name;
        if offset != (at - start) as u64 {
            return Err(format!("tensor `{name}`: offset {offset}, wanted {}", at - start));
        }
        let end = at
            .checked_add(info.bytes)
            .filter(|end| *end <= file)
            .ok_or_else(|| format!("tensor `{name}`: {} bytes from {at}, but the file ends at {file}", info.bytes))?;
        ranges.push(at..end);
        at = end.checked_next_multiple_of(alignment).ok_or("data too long")?;
    }
    Ok(ranges)
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, len: usize, what: &str) -> Parsed<&'a [u8]> {
        if len > self.left() {
            return Err(format!("{what}: ends at byte {}, {len} more were wanted", self.bytes.len()));
        }
        let bytes = &self.bytes[self.at..self.at + len];
        self.at += len;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Parsed<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Parsed<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Parsed<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count of things of at least `min` bytes each: no more than the rest of the file can hold.
    fn fits(&self, count: u64, min: usize, what: &str) -> Parsed<usize> {
        match usize::try_from(count) {
            Ok(count) if count <= self.left() / min => Ok(count),
            _ => Err(format!("{what}: {count}, but only {} bytes are left", self.left())),
        }
    }

    fn string(&mut self, what: &str) -> Parsed<String> {
        let len = self.u64(what)?;
        if len > MAX_STRING {
            return Err(format!("{what}: a string of {len} bytes, wanted at most {MAX_STRING}"));
        }
        let len = self.fits(len, 1, what)?;
        let text = std::str::from_utf8(self.take(len, what)?).map_err(|e| format!("{what}: {e}"))?;
        Ok(text.to_owned())
    }

    fn bool(&mut self, what: &str) -> Parsed<bool> {
        match self.array(what)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [b] => Err(format!("{what}: a bool of {b}, wanted 0 or 1")),
        }
    }

    fn pairs(&mut self, count: usize) -> Parsed<Vec<(String, Value)>> {
        let mut pairs = Vec::with_capacity(count);
        let mut seen = HashSet::with_capacity(count);
        for _ in 0..count {
            let key = self.string("key")?;
            let kind = self.u32(&key)?;
            let value = self.value(&key, kind)?;
            if !seen.insert(key.clone()) {
                return Err(format!("key `{key}` is given twice"));
            }
            pairs.push((key, value));
        }
        Ok(pairs)
    }

    fn value(&mut self, key: &str, kind: u32) -> Parsed<Value> {
        Ok(match kind {
            0 => Value::Int(u8::from_le_bytes(self.array(key)?).into()),
            1 => Value::Int(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::Int(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Int(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Int(u32::from_le_bytes(self.array(key)?).into()),
            5 => Value::Int(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array(key)?).into()),
            7 => Value::Bool(self.bool(key)?),
            8 => Value::String(self.string(key)?),
            9 => Value::Array(self.values(key, 0)?),
            10 => Value::Int(u64::from_le_bytes(self.array(key)?).into()),
            11 => Value::Int(i64::from_le_bytes(self.array(key)?).into()),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            _ => return Err(format!("key `{key}`: value type {kind}, wanted 0..=12")),
        })
    }

    fn values(&mut self, key: &str, depth: usize) -> Parsed<Array> {
        if depth >= MAX_NESTING {
            return Err(format!("key `{key}`: arrays nested more than {MAX_NESTING} deep"));
        }
        let kind = self.u32(key)?;
        let count = self.u64(key)?;
        if count > MAX_ARRAY {
            return Err(format!("key `{key}`: {count} values, wanted at most {MAX_ARRAY}"));
        }
        Ok(match kind {
            0 => Array::I32(self.numbers(key, count, |b| u8::from_le_bytes(b).into())?),
            1 => Array::I32(self.numbers(key, count, |b| i8::from_le_bytes(b).into())?),
            2 => Array::I32(self.numbers(key, count, |b| u16::from_le_bytes(b).into())?),
            3 => Array::I32(self.numbers(key, count, |b| i16::from_le_bytes(b).into())?),
            4 => Array::U32(self.numbers(key, count, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(key, count, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(key, count, f32::from_le_bytes)?),
            7 => Array::Bool(self.each(key, count, 1, |c| c.bool(key))?),
            8 => Array::String(self.each(key, count, 8, |c| c.string(key))?),
            9 => Array::Array(self.each(key, count, 4 + 8, |c| c.values(key, depth + 1))?),
            10 => Array::U64(self.numbers(key, count, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(key, count, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(key, count, f64::from_le_bytes)?),
            _ => return Err(format!("key `{key}`: element type {kind}, wanted 0..=12")),
        })
    }

    fn numbers<T, const N: usize>(&mut self, key: &str, count: u64, read: fn([u8; N]) -> T) -> Parsed<Vec<T>> {
        let count = self.fits(count, N, key)?;
        Ok(self.take(count * N, key)?.as_chunks().0.iter().map(|b| read(*b)).collect())
    }

    fn each<T>(
        &mut self,
        key: &str,
        count: u64,
        min: usize,
        mut read: impl FnMut(&mut Self) -> Parsed<T>,
    ) -> Parsed<Vec<T>> {
        let count = self.fits(count, min, key)?;
        (0..count).map(|_| read(self)).collect()
    }

    fn infos(&mut self, count: usize) -> Parsed<(Vec<TensorInfo>, Vec<u64>)> {
        let mut infos = Vec::with_capacity(count);
        let mut offsets = Vec::with_capacity(count);
        let mut seen = HashSet::with_capacity(count);
        for _ in 0..count {
            let name = self.string("tensor name")?;
            if name.len() > MAX_NAME {
                return Err(format!("tensor `{name}`: a name of {} bytes, wanted at most {MAX_NAME}", name.len()));
            }
            let info = self.info(&name).map_err(|why| format!("tensor `{name}`: {why}"))?;
            if !seen.insert(name.clone()) {
                return Err(format!("tensor `{name}` is given twice"));
            }
            infos.push(info);
            offsets.push(self.u64(&name)?);
        }
        Ok((infos, offsets))
    }

    fn info(&mut self, name: &str) -> Parsed<TensorInfo> {
        let dims = self.u32("dimensions")?;
        if dims > MAX_DIMS {
            return Err(format!("{dims} dimensions, wanted at most {MAX_DIMS}"));
        }
        let mut shape = Vec::with_capacity(dims as usize);
        let mut elements = 1usize;
        for _ in 0..dims {
            let dim = self.u64("dimension")?;
            let dim = usize::try_from(dim).map_err(|_| format!("dimension {dim} is too large"))?;
            elements = elements.checked_mul(dim).ok_or("more values than can be counted")?;
            shape.push(dim);
        }
        let kind = self.u32("type")?;
        let block = blocks::find(kind).ok_or_else(|| match blocks::UNREAD.iter().find(|(id, _)| *id == kind) {
            Some((_, known)) => format!("type {known} can't be read"),
            None => format!("type {kind} is unknown"),
        })?;
        let row = shape.first().copied().unwrap_or(1);
        if row % block.values != 0 {
            return Err(format!("rows of {row} values don't divide into {} blocks of {}", block.name, block.values));
        }
        shape.reverse();
        let bytes = (elements / block.values).checked_mul(block.bytes).ok_or("more bytes than can be counted")?;
        Ok(TensorInfo { name: name.to_owned(), stored: stored(block), shape, bytes })
    }
}
