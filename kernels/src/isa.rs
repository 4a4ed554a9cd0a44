//! Which instructions this process may use: what the CPU has, capped by `NIBBLE_ISA`.

#[cfg(target_arch = "x86_64")]
mod tiles;

use crate::KernelError;
use std::sync::OnceLock;

/// An instruction set that kernels are written for, narrowest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Portable Rust, on every CPU.
    Scalar,
    /// AVX2, FMA and F16C (Haswell, Zen and later).
    Avx2,
    /// AVX2 with the 256-bit VPDPBUSD (Alder Lake, Zen 5 and later).
    AvxVnni,
    /// AVX-512 F, BW, DQ, VL and VNNI (Ice Lake, Zen 4 and later).
    Avx512,
    /// AVX-512 with the tiles of AMX-BF16 and AMX-INT8 (Sapphire Rapids and later, where the system allows them).
    Amx,
}

impl Isa {
    /// Every instruction set, narrowest first.
    pub const ALL: [Isa; 5] = [Isa::Scalar, Isa::Avx2, Isa::AvxVnni, Isa::Avx512, Isa::Amx];

    /// The word for it in kernel names and in `NIBBLE_ISA`.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avxvnni",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
        }
    }

    /// Whether this CPU has the instructions (`NIBBLE_ISA` is not asked).
    pub fn is_present(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = || {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            };
            match self {
                Isa::Scalar => true,
                Isa::Avx2 => avx2(),
                Isa::AvxVnni => avx2() && is_x86_feature_detected!("avxvnni"),
                Isa::Avx512 => {
                    avx2()
                        && is_x86_feature_detected!("avx512f")
                        && is_x86_feature_detected!("avx512bw")
                        && is_x86_feature_detected!("avx512dq")
                        && is_x86_feature_detected!("avx512vl")
                        && is_x86_feature_detected!("avx512vnni")
                }
                Isa::Amx => Isa::Avx512.is_present() && tiles::are_allowed(),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Isa::Scalar
        }
    }

    /// The widest instruction set this process may use; asked once.
    ///
    /// An unknown word in `NIBBLE_ISA` counts as `scalar` here; [`Isa::check_environment`] reports it.
    pub fn best() -> Isa {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| {
            let cap = Self::cap().unwrap_or(Some(Isa::Scalar)).unwrap_or(Isa::Amx);
            Isa::ALL.into_iter().rev().find(|isa| *isa <= cap && isa.is_present()).unwrap_or(Isa::Scalar)
        })
    }

    /// Every instruction set that this process may use, narrowest first: what tests walk.
    pub fn usable() -> impl Iterator<Item = Isa> {
        let best = Self::best();
        Isa::ALL.into_iter().filter(move |isa| *isa <= best && isa.is_present())
    }

    /// Refuses a `NIBBLE_ISA` that names no instruction set.
    pub fn check_environment() -> Result<(), KernelError> {
        Self::cap().map(|_| ())
    }

    fn cap() -> Result<Option<Isa>, KernelError> {
        match std::env::var("NIBBLE_ISA") {
            Err(_) => Ok(None),
            Ok(word) if word.is_empty() => Ok(None),
            Ok(word) => Isa::ALL
                .into_iter()
                .find(|isa| isa.name() == word)
                .map(Some)
                .ok_or(KernelError::IsaName { found: word }),
        }
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
