//! Laws of the vector vocabulary and of the matrix products, over every instruction set that this CPU has.

#[path = "gemm/activations.rs"]
mod activations;
#[path = "gemm/cases.rs"]
mod cases;
#[path = "gemm/hostile.rs"]
mod hostile;
#[path = "gemm/products.rs"]
mod products;
#[path = "shared/quick.rs"]
mod quick;
#[path = "gemm/simd.rs"]
mod simd;
#[path = "gemm/table.rs"]
mod table;
