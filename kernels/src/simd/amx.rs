//! AMX: matrix products of bfloat16 numbers in tile registers.
//!
//! ```text
//! a   16 activation rows, each 16 pairs of K to a line of 64 bytes
//! b   16 pairs of K, each 16 weight rows to a line
//! c   16 activation rows, each 16 weight rows of single precision to a line
//! ```
//! The compiler never uses tile registers, so they keep their contents between calls. Products flush denormals to zero.
//! Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.

use super::{LANES, TILE_ROWS, TileLines};
use crate::Isa;
use std::arch::asm;
use std::marker::PhantomData;

/// Multiply-adds of one call of [`Amx::multiply_registers`].
pub const REGISTER_PRODUCTS: usize = 4 * TILE_ROWS * LANES * LINE;
/// Bytes of a line.
const LINE: usize = size_of::<[u32; LANES]>();

/// A value exists only while this thread's tiles are configured. tmm0 to tmm3 are sums, tmm4 and tmm5 activations, tmm6
/// and tmm7 weights.
#[derive(Debug)]
pub struct Amx(PhantomData<*const ()>); // bound to its thread, whose registers these are

/// The operand of LDTILECFG: bytes of a register's lines, and their number.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    line_bytes: [u16; 16],
    lines: [u8; 16],
}

/// All registers as large as they can be.
static CONFIGURATION: Configuration = Configuration {
    palette: 1,
    start: 0,
    reserved: [0; 14],
    line_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    lines: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

impl Amx {
    /// Configures this thread's tiles, if the CPU has them. All registers are zero.
    pub fn new() -> Option<Self> {
        if !Isa::Amx.is_present() {
            return None;
        }
        // SAFETY: the CPU has tiles, the system allowed them to this process, and the operand is 64 valid bytes.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const CONFIGURATION, options(nostack, readonly, preserves_flags))
        };
        Some(Amx(PhantomData))
    }

    /// Zeroes all sums.
    #[inline(always)]
    pub fn zero(&self) {
        // SAFETY: `self` exists, so tiles are configured.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nostack, nomem, preserves_flags)
            );
        }
    }

    /// Loads the sums.
    #[inline(always)]
    pub fn load(&self, sums: [&TileLines; 4]) {
        // SAFETY: `self` exists, so tiles are configured; each operand is as large as a tile.
        unsafe {
            asm!(
                "tileloadd tmm0, [{} + {line}]",
                "tileloadd tmm1, [{} + {line}]",
                "tileloadd tmm2, [{} + {line}]",
                "tileloadd tmm3, [{} + {line}]",
                in(reg) sums[0],
                in(reg) sums[1],
                in(reg) sums[2],
                in(reg) sums[3],
                line = in(reg) LINE,
                options(nostack, readonly, preserves_flags),
            );
        }
    }

    /// Stores the sums in register `REGISTER`, 0 to 3.
    #[inline(always)]
    pub fn store<const REGISTER: usize>(&self, sums: &mut TileLines) {
        macro_rules! store {
            ($register:literal) => {
                asm!(concat!("tilestored [{} + {line}], ", $register), in(reg) sums, line = in(reg) LINE, options(nostack, preserves_flags))
            };
        }
        // SAFETY: `self` exists, so tiles are configured; the operand is as large as a tile.
        unsafe {
            match REGISTER {
                0 => store!("tmm0"),
                1 => store!("tmm1"),
                2 => store!("tmm2"),
                _ => store!("tmm3"),
            }
        }
    }

    /// Adds products: register `i + 2 j` gets those of `a[i]` and `b[j]`, tile after tile along K, up to the end of the
    /// shortest.
    #[inline(always)]
    pub fn multiply(&self, a: [&[TileLines]; 2], b: [&[TileLines]; 2]) {
        let len = a[0].len().min(a[1].len()).min(b[0].len()).min(b[1].len());
        for at in 0..len {
            // SAFETY: `self` exists, so tiles are configured; each operand is as large as a tile.
            unsafe {
                asm!(
                    "tileloadd tmm4, [{a0} + {line}]",
                    "tileloadd tmm6, [{b0} + {line}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{a1} + {line}]",
                    "tdpbf16ps tmm1, tmm5, tmm6",
                    "tileloadd tmm7, [{b1} + {line}]",
                    "tdpbf16ps tmm2, tmm4, tmm7",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    a0 = in(reg) &a[0][at],
                    a1 = in(reg) &a[1][at],
                    b0 = in(reg) &b[0][at],
                    b1 = in(reg) &b[1][at],
                    line = in(reg) LINE,
                    options(nostack, readonly, preserves_flags),
                );
            }
        }
    }

    /// Multiplies signed bytes in registers, [`REGISTER_PRODUCTS`] multiply-adds for each of the `times`: what the unit
    /// can do at most.
    pub fn multiply_registers(&self, times: usize, operand: &TileLines) {
        // SAFETY: `self` exists, so tiles are configured; the operand is as large as a tile.
        unsafe {
            asm!(
                "tileloadd tmm4, [{0} + {line}]",
                "tileloadd tmm6, [{0} + {line}]",
                in(reg) operand,
                line = in(reg) LINE,
                options(nostack, readonly, preserves_flags),
            );
            for _ in 0..times {
                asm!(
                    "tdpbssd tmm0, tmm4, tmm6",
                    "tdpbssd tmm1, tmm4, tmm6",
                    "tdpbssd tmm2, tmm4, tmm6",
                    "tdpbssd tmm3, tmm4, tmm6",
                    options(nostack, nomem, preserves_flags),
                );
            }
        }
    }
}

impl Drop for Amx {
    fn drop(&mut self) {
        // SAFETY: tiles are there; giving them up makes context switches cheap again.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}
