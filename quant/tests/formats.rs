//! Laws of file formats and conversions, one binary.

#[path = "formats/convert.rs"]
mod convert;
#[path = "formats/hostile.rs"]
mod hostile;
#[path = "formats/import.rs"]
mod import;
#[path = "formats/native.rs"]
mod native;
#[path = "formats/output.rs"]
mod output;
#[path = "formats/read.rs"]
mod read;
#[path = "formats/support.rs"]
mod support;
