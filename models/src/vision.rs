//! Vision models: pictures in, statistics, plans and figures out.
//!
//! ```text
//! pictures, arrays --data--> samples --calibrate--> ranges --> a quantized model --evaluate--> agreement, SQNR
//! ```

mod arrays;
pub mod calibrate;
pub mod data;
pub mod diagnose;
pub mod evaluate;
pub mod export;
pub mod latency;
pub mod mixed;
pub mod picture;
pub mod prepare;
pub mod pth;
pub mod text;
mod windows;
