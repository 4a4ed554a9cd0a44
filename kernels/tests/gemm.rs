//! Laws of the vector vocabulary and of the matrix products, over every instruction set that this CPU has.

#[path = "gemm/simd.rs"]
mod simd;
