// 9 to 64 tokens times a weight of 8-bit codes.

#include "gemv.cuh"

// Up to 16, 32 and 64, each also for many outputs.
GEMV(gemv16_w8, CODES_W8, 2, 1, 8, 2, 1)
GEMV(gemv16_wide_w8, CODES_W8, 2, 2, 8, 1, 1)
GEMV(gemv32_w8, CODES_W8, 4, 2, 8, 1, 1)
GEMV(gemv32_wide_w8, CODES_W8, 4, 2, 4, 1, 2)
GEMV(gemv64_w8, CODES_W8, 8, 2, 8, 1, 1)
GEMV(gemv64_wide_w8, CODES_W8, 8, 2, 4, 1, 2)
