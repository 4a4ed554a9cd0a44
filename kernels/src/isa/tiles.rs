//! Whether AMX can be used: CPUs have tiles, and systems give them to those who ask.

use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::sync::OnceLock;

/// Whether the CPU has AMX with bfloat16 and bytes, and the system lets this process use it; asked once.
pub(super) fn are_allowed() -> bool {
    static ALLOWED: OnceLock<bool> = OnceLock::new();
    *ALLOWED.get_or_init(|| has_tiles() && request_tiles())
}

/// CPUID's leaf 7 and the operating system's XCR0 both have them.
fn has_tiles() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    const INT8: u32 = 1 << 25;
    const OSXSAVE: u32 = 1 << 27;
    const TILE_STATE: u64 = 3 << 17;
    #[target_feature(enable = "xsave")]
    fn state() -> u64 {
        // SAFETY: the caller found OSXSAVE, so the register can be read.
        unsafe { _xgetbv(0) }
    }
    let (highest, basic) = (__cpuid(0).eax, __cpuid(1));
    highest >= 7
        && __cpuid_count(7, 0).edx & (BF16 | TILE | INT8) == BF16 | TILE | INT8
        && basic.ecx & OSXSAVE != 0
        // SAFETY: OSXSAVE means that the CPU has the instruction and the system lets programs use it.
        && unsafe { state() } & TILE_STATE == TILE_STATE
}

/// Linux gives room for tiles to those who ask (arch_prctl, since 5.16); it holds for all threads of the process.
#[cfg(target_os = "linux")]
fn request_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn request_tiles() -> bool {
    false
}
