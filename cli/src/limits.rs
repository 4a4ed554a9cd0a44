//! What this machine could do at most, to measure shares against.

use nibble_kernels::{Pool, limits};
use serde::Serialize;

/// Measured limits of some threads.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Limits {
    /// Threads that were measured together.
    pub threads: usize,
    /// Bytes a second from memory.
    pub read_bytes_per_second: f64,
    /// int8 multiply-adds a second.
    pub int8_multiply_adds_per_second: f64,
}

impl Limits {
    /// Measures the pool's threads; takes about a second.
    pub fn of(pool: &Pool) -> Limits {
        Limits {
            threads: pool.threads(),
            read_bytes_per_second: limits::read_bandwidth(pool),
            int8_multiply_adds_per_second: limits::int8_peak(pool),
        }
    }

    /// In a line: `2 threads: 38.1 GB/s, 0.35 int8 TOPS` (a multiply-add is two operations).
    pub fn line(&self) -> String {
        format!(
            "{} threads: {:.1} GB/s from memory, {:.3} int8 TOPS",
            self.threads,
            self.read_bytes_per_second / 1e9,
            self.int8_multiply_adds_per_second * 2.0 / 1e12
        )
    }
}
