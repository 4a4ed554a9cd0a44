//! Vision models: pictures in, statistics, plans and figures out.
//!
//! ```text
//! pictures, arrays --data--> samples --calibrate--> ranges --> a quantized model --evaluate--> agreement, SQNR
//! ```

mod arrays;
pub mod calibrate;
pub mod data;
pub mod evaluate;
pub mod export;
pub mod latency;
pub mod picture;
pub mod pth;
pub mod text;
