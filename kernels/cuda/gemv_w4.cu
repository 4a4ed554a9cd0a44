// 9 to 64 tokens times a weight of 4-bit codes whose levels are evenly spaced.

#include "gemv.cuh"

// Up to 16, 32 and 64, each also for many outputs.
GEMV(gemv16_w4, CODES_W4, 2, 1, 8, 2, 2)
GEMV(gemv16_wide_w4, CODES_W4, 2, 2, 8, 1, 2)
GEMV(gemv32_w4, CODES_W4, 4, 2, 8, 1, 1)
GEMV(gemv32_wide_w4, CODES_W4, 4, 2, 4, 1, 3)
GEMV(gemv64_w4, CODES_W4, 8, 2, 8, 1, 1)
GEMV(gemv64_wide_w4, CODES_W4, 8, 2, 4, 1, 2)
