//! Where benchmarks will be: rows of `GEMMS` and whole models, timed. Today `nibble kernels --time` and `nibble bench` do.
