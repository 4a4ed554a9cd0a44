//! What this machine could do at most, measured: the denominators of every share that is reported.
//!
//! Generating text reads every weight once a token, so memory bandwidth bounds it; reading a prompt multiplies each
//! weight by many rows, so integer multiply-adds do. Both are the best of several short rounds: other work on the
//! machine only ever slows a round down.

use crate::buffer::Buffer;
use crate::simd::{self, BYTES, Simd, SimdOp};
use crate::{Isa, Pool};
use std::hint::black_box;
use std::time::Instant;

/// Bytes that are read: more than the last-level cache of most machines.
const READ: usize = 256 << 20;
/// Rounds of which the best counts.
const ROUNDS: usize = 8;
/// Streams that a thread reads side by side; memory serves several open pages faster than one.
const STREAMS: usize = 4;
/// How far ahead of the loads each stream is asked for.
const AHEAD: usize = 4096;
/// Vectors of multiply-adds that a thread does in one round of [`int8_peak`].
const PRODUCTS: usize = 24 << 20;

/// Bytes a second that the pool's threads read from memory together, with vector loads and software prefetch.
///
/// Takes 256 MiB of memory and a fraction of a second. On a machine whose last-level cache holds that much, it is the
/// cache that is measured.
pub fn read_bandwidth(pool: &Pool) -> f64 {
    let mut bytes = Buffer::<u8>::zeroed_in_large_pages(READ);
    // Pages that nobody has written are all the same page of zeros, which a cache holds.
    bytes.fill(1);
    let lines = bytes.as_chunks().0;
    best(|| {
        pool.run(&|worker, workers| {
            let part = &lines[lines.len() * worker / workers..lines.len() * (worker + 1) / workers];
            black_box(simd::dispatch(Isa::best(), Read(part)));
        });
        READ as f64
    })
}

/// Multiply-adds a second of 8-bit integers that the pool's threads do together, operands in the first-level cache,
/// with the widest instructions that this process may use.
pub fn int8_peak(pool: &Pool) -> f64 {
    #[cfg(target_arch = "x86_64")]
    if Isa::best() == Isa::Amx {
        return tile_peak(pool);
    }
    best(|| {
        pool.run(&|_, _| {
            black_box(simd::dispatch(Isa::best(), Multiply));
        });
        (pool.threads() * PRODUCTS * BYTES) as f64
    })
}

#[cfg(target_arch = "x86_64")]
fn tile_peak(pool: &Pool) -> f64 {
    let times = PRODUCTS * BYTES / simd::REGISTER_PRODUCTS;
    let operand = simd::TileLines([[0x0305_0307; simd::LANES]; simd::TILE_ROWS]);
    best(|| {
        pool.run(&|_, _| {
            if let Some(amx) = simd::Amx::new() {
                amx.multiply_registers(times, black_box(&operand));
            }
        });
        (pool.threads() * times * simd::REGISTER_PRODUCTS) as f64
    })
}

/// The most work a second over all rounds; `round` returns how much it did.
fn best(mut round: impl FnMut() -> f64) -> f64 {
    let mut best = 0.0;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let work = round();
        best = f64::max(best, work / start.elapsed().as_secs_f64());
    }
    best
}

struct Read<'a>(&'a [[u8; BYTES]]);

impl SimdOp for Read<'_> {
    type Output = i32;

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> i32 {
        let len = self.0.len() / STREAMS;
        let mut sums = [s.splat_i32(0); STREAMS];
        for at in 0..len {
            for (stream, sum) in sums.iter_mut().enumerate() {
                let line = &self.0[stream * len + at];
                s.prefetch(line.as_ptr().wrapping_add(AHEAD));
                *sum = s.add_i32(*sum, s.words(s.load_bytes(line)));
            }
        }
        let mut total = s.splat_i32(0);
        for sum in sums {
            total = s.add_i32(total, sum);
        }
        s.sum_i32(total)
    }
}

struct Multiply;

impl SimdOp for Multiply {
    type Output = i32;

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> i32 {
        // Enough independent sums to hide an instruction's latency, few enough to stay in registers.
        const CHAINS: usize = 12;
        let chains = if matches!(S::ISA, Isa::Avx512) { CHAINS } else { CHAINS / 2 };
        let (codes, x) = (black_box([3; BYTES]), black_box([[5i8; 4]; 4 * CHAINS]));
        let codes = s.load_bytes(&codes);
        let zero = s.splat_i32(0);
        let mut sums = [s.start_nibbles(zero, zero); CHAINS];
        for step in 0..PRODUCTS / chains {
            let x = &x[step % 4 * CHAINS..][..CHAINS];
            for chain in 0..chains {
                sums[chain] = s.dot_nibbles(sums[chain], codes, s.splat4(&x[chain]));
            }
        }
        let mut total = s.splat_i32(0);
        for sum in sums {
            total = s.add_i32(total, s.nibble_total(sum, s.splat_i32(0x0001_0001)));
        }
        s.sum_i32(total)
    }
}
