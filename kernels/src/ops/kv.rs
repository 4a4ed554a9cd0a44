//! Keys and values of one layer, kept for every position of a context.
//!
//! Both lie in panels of 16, so that attention's two products read them in order, 16 lanes at a time:
//!
//! ```text
//! keys    [kv head][position / 16][value][16 positions]      a vector is one value of 16 positions
//! values  [kv head][value / 16][position][16 values]         a vector is 16 values of one position
//! scales  [kv head][position]                                int8 only: number = code * scale
//! ```

use super::{Ops, lanes};
use crate::KernelError;
use crate::simd::{LANES, Simd, SimdOp, dispatch};
use half::f16;

/// How numbers are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvKind {
    /// Single precision, as it comes: for comparisons.
    F32,
    /// Half precision; magnitudes past 65504 become 65504.
    F16,
    /// Signed bytes with one scale for each position and head; at most scale / 2 off, scale = largest magnitude / 127.
    Int8,
}

/// The keys and values of one layer.
#[derive(Debug, Clone)]
pub struct KvCache {
    kv_heads: usize,
    head_dim: usize,
    /// Positions that there is room for, a multiple of 16.
    room: usize,
    /// Positions that were asked for.
    capacity: usize,
    len: usize,
    pub(super) data: KvData,
}

#[derive(Debug, Clone)]
pub(super) enum KvData {
    F32(Sides<f32>),
    F16(Sides<u16>),
    Int8 { codes: Sides<i8>, scales: Sides<f32> },
}

/// The same thing of keys and of values.
#[derive(Debug, Clone)]
pub(super) struct Sides<T> {
    pub(super) keys: Vec<T>,
    pub(super) values: Vec<T>,
}

/// What one number is kept as. Half precision is kept as bits, which the allocator hands out zeroed without touching
/// them: a cache takes memory as it fills.
pub(super) trait Element: Copy + Send + Sync {
    /// 16 numbers, without their scale.
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::F32;
    /// Rounds 16 numbers, already divided by their scale.
    fn store<S: Simd>(s: S, v: S::F32, to: &mut [Self; LANES]);
}

impl Element for f32 {
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[f32; LANES]) -> S::F32 {
        s.load(from)
    }

    #[inline(always)]
    fn store<S: Simd>(s: S, v: S::F32, to: &mut [f32; LANES]) {
        s.store(v, to);
    }
}

impl Element for u16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[u16; LANES]) -> S::F32 {
        s.load_f16(bytemuck::cast_ref(from))
    }

    #[inline(always)]
    fn store<S: Simd>(s: S, v: S::F32, to: &mut [u16; LANES]) {
        let most = f16::MAX.to_f32();
        let v = s.max(s.splat(-most), s.min(s.splat(most), v));
        s.store_f16(v, bytemuck::cast_mut(to));
    }
}

impl Element for i8 {
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[i8; LANES]) -> S::F32 {
        s.load_i8(from)
    }

    #[inline(always)]
    fn store<S: Simd>(s: S, v: S::F32, to: &mut [i8; LANES]) {
        s.store_i8(s.to_i32(v), to);
    }
}

impl KvCache {
    /// An empty cache with room for `capacity` positions of `kv_heads` x `head_dim` keys and values.
    pub fn new(kind: KvKind, kv_heads: usize, head_dim: usize, capacity: usize) -> KvCache {
        let room = capacity.next_multiple_of(LANES);
        let (keys, values) = (kv_heads * room * head_dim, kv_heads * room * head_dim.next_multiple_of(LANES));
        let data = match kind {
            KvKind::F32 => KvData::F32(Sides { keys: vec![0.0; keys], values: vec![0.0; values] }),
            KvKind::F16 => KvData::F16(Sides { keys: vec![0; keys], values: vec![0; values] }),
            KvKind::Int8 => KvData::Int8 {
                codes: Sides { keys: vec![0; keys], values: vec![0; values] },
                scales: Sides { keys: vec![0.0; kv_heads * room], values: vec![0.0; kv_heads * room] },
            },
        };
        KvCache { kv_heads, head_dim, room, capacity, len: 0, data }
    }

    /// How numbers are kept.
    pub fn kind(&self) -> KvKind {
        match self.data {
            KvData::F32(_) => KvKind::F32,
            KvData::F16(_) => KvKind::F16,
            KvData::Int8 { .. } => KvKind::Int8,
        }
    }

    /// Heads that keys and values have.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Values of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Positions that are filled.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is filled.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions that there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes that a full cache takes.
    pub fn bytes(&self) -> usize {
        match &self.data {
            KvData::F32(floats) => 4 * (floats.keys.len() + floats.values.len()),
            KvData::F16(bits) => 2 * (bits.keys.len() + bits.values.len()),
            KvData::Int8 { codes, scales } => {
                codes.keys.len() + codes.values.len() + 4 * (scales.keys.len() + scales.values.len())
            }
        }
    }

    /// Forgets positions from `len` on; no effect if there are fewer.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Positions in a panel row: where `values` starts its next panel.
    pub(super) fn room(&self) -> usize {
        self.room
    }

    /// Numbers of one head's keys and of one head's values.
    pub(super) fn head_len(&self) -> (usize, usize) {
        (self.room * self.head_dim, self.room * self.head_dim.next_multiple_of(LANES))
    }
}

impl Ops<'_> {
    /// Appends `keys` and `values`, both (rows, kv_heads, head_dim), at the cache's next positions.
    ///
    /// # Errors
    /// [`KernelError::Length`] if there is no room for that many rows, or if the lengths don't fit the cache; the cache
    /// is left as it was.
    pub fn append(&self, cache: &mut KvCache, keys: &[f32], values: &[f32]) -> Result<(), KernelError> {
        let width = cache.kv_heads * cache.head_dim;
        let rows = keys.len().checked_div(width).unwrap_or(0);
        for (what, found) in [("appended keys", keys.len()), ("appended values", values.len())] {
            if found != rows * width {
                return Err(KernelError::Length { what, found, wanted: rows * width });
            }
        }
        let wanted = cache.len + rows;
        if wanted > cache.capacity {
            return Err(KernelError::Length { what: "kv cache", found: cache.capacity, wanted });
        }
        if rows == 0 {
            return Ok(());
        }
        let at = Place { first: cache.len, room: cache.room, head_dim: cache.head_dim, kv_heads: cache.kv_heads };
        let (k, v) = cache.head_len();
        match &mut cache.data {
            KvData::F32(floats) => self.append_floats(at, keys, values, floats, (k, v)),
            KvData::F16(bits) => self.append_floats(at, keys, values, bits, (k, v)),
            KvData::Int8 { codes, scales } => {
                self.over_heads(
                    (&mut codes.keys, k),
                    (&mut scales.keys, cache.room),
                    keys.len(),
                    |head, to, scales| {
                        dispatch(self.isa, Append::<_, true> { at, head, from: keys, to, scales: Some(scales) });
                    },
                );
                let numbers = (&mut codes.values[..], v);
                self.over_heads(numbers, (&mut scales.values, cache.room), keys.len(), |head, to, scales| {
                    dispatch(self.isa, Append::<_, false> { at, head, from: values, to, scales: Some(scales) });
                });
            }
        }
        cache.len = wanted;
        Ok(())
    }

    /// Appends to sides that have no scales; `(k, v)` are numbers of one head's keys and values.
    fn append_floats<T: Element + Default>(
        &self,
        at: Place,
        keys: &[f32],
        values: &[f32],
        to: &mut Sides<T>,
        (k, v): (usize, usize),
    ) {
        self.over_heads((&mut to.keys, k), (&mut [], 0), keys.len(), |head, to, _| {
            dispatch(self.isa, Append::<_, true> { at, head, from: keys, to, scales: None });
        });
        self.over_heads((&mut to.values, v), (&mut [], 0), values.len(), |head, to, _| {
            dispatch(self.isa, Append::<_, false> { at, head, from: values, to, scales: None });
        });
    }

    /// `f(head, numbers of the head, its scales)`, in parallel if `work` numbers are worth it. No scales are `&[]`, 0.
    fn over_heads<T: Send>(
        &self,
        (numbers, head_len): (&mut [T], usize),
        (scales, room): (&mut [f32], usize),
        work: usize,
        f: impl Fn(usize, &mut [T], &mut [f32]) + Sync,
    ) {
        let parallel = work >= 2 * super::GRAIN;
        match (parallel, scales.is_empty()) {
            (true, true) => self.pool.for_each_part(numbers, head_len, |head, to| f(head, to, &mut [])),
            (true, false) => self.pool.for_each_part_pair((numbers, head_len), (scales, room), f),
            (false, true) => {
                numbers.chunks_mut(head_len).enumerate().for_each(|(head, to)| f(head, to, &mut []));
            }
            (false, false) => {
                let heads = numbers.chunks_mut(head_len).zip(scales.chunks_mut(room)).enumerate();
                heads.for_each(|(head, (to, scales))| f(head, to, scales));
            }
        }
    }
}

/// Where rows go.
#[derive(Clone, Copy)]
struct Place {
    first: usize,
    room: usize,
    head_dim: usize,
    kv_heads: usize,
}

/// Rounds one head's rows into its panels of keys or of values.
struct Append<'a, T, const KEYS: bool> {
    at: Place,
    head: usize,
    from: &'a [f32],               // (rows, kv_heads, head_dim)
    to: &'a mut [T],               // the head's panels
    scales: Option<&'a mut [f32]>, // (room)
}

impl<T: Element + Default, const KEYS: bool> SimdOp for Append<'_, T, KEYS> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(mut self, s: S) {
        let Place { first, room, head_dim, kv_heads } = self.at;
        let rows = self.from.chunks(kv_heads * head_dim);
        for (position, row) in (first..).zip(rows) {
            let x = &row[self.head * head_dim..][..head_dim];
            let mut inverse = s.splat(1.0);
            if let Some(scales) = &mut self.scales {
                let (scale, reciprocal) = scale_of(s, x);
                scales[position] = scale;
                inverse = s.splat(reciprocal);
            }
            for at in lanes(head_dim) {
                let mut rounded = [T::default(); LANES];
                T::store(s, s.mul(s.load_partial(&x[at.clone()]), inverse), &mut rounded);
                if KEYS {
                    let panel = &mut self.to[position / LANES * head_dim * LANES..][..head_dim * LANES];
                    for (value, rounded) in at.zip(rounded) {
                        panel[value * LANES + position % LANES] = rounded;
                    }
                } else {
                    let start = (at.start * room) + position * LANES;
                    self.to[start..start + LANES].copy_from_slice(&rounded);
                }
            }
        }
    }
}

/// (largest magnitude / 127, 127 / largest magnitude); NaN for the first if a number isn't finite.
#[inline(always)]
fn scale_of<S: Simd>(s: S, x: &[f32]) -> (f32, f32) {
    let (mut most, mut poison) = (s.splat(0.0), s.splat(0.0));
    for x in x.chunks(LANES) {
        let x = s.load_partial(x);
        most = s.max(s.abs(x), most);
        poison = s.fma(x, s.splat(0.0), poison);
    }
    let most = s.largest(most);
    let reciprocal = 127.0 / most;
    // Magnitudes so small that 127 / most overflows are kept as zeros.
    let (scale, reciprocal) = if reciprocal.is_finite() { (most / 127.0, reciprocal) } else { (0.0, 0.0) };
    (scale + s.sum(poison), reciprocal)
}
