//! Floor 0: bytes and floats in, floats out.
//!
//! A weight arrives as codes and scales ([`WeightSource`]), is packed once into panels ([`PackedWeight`]) and is then
//! multiplied without ever becoming a dense matrix: each row of [`GEMMS`] is a kernel that decodes codes in registers.
//! Everything is chosen at run time from what the CPU offers ([`Isa`]), capped by `NIBBLE_ISA`.
//!
//! This crate knows nothing of files, schemes or models.

pub mod act;
mod buffer;
pub mod cuda;
pub mod error;
pub mod gemm;
pub mod isa;
pub mod limits;
pub mod ops;
pub mod pool;
pub mod probe;
pub mod simd;
pub mod weight;

pub use act::{ActKind, Activations, TILED_ROWS};
pub use buffer::{give_back_freed_memory, keep_freed_memory};
pub use error::KernelError;
pub use gemm::{GEMMS, GemmKernel, Product, multiply};
pub use isa::Isa;
pub use ops::Ops;
pub use pool::Pool;
pub use weight::{DenseSource, Levels, Outliers, PackedWeight, Scales, WeightKind, WeightSource, Zeros};

/// Weight rows (output features) in one panel: a vector of 16 lanes is one row a lane.
pub const PANEL: usize = 16;
/// Consecutive values along K that share one activation scale; weight groups are multiples of it.
pub const BLOCK: usize = 32;
