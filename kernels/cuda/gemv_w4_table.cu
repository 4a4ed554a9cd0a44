// 9 to 64 tokens times a weight of 4-bit codes of a table.

#include "gemv.cuh"

// Up to 16, 32 and 64, each also for many outputs.
GEMV(gemv16_w4_table, CODES_W4_TABLE, 2, 1, 8, 2, 1)
GEMV(gemv16_wide_w4_table, CODES_W4_TABLE, 2, 2, 8, 1, 1)
GEMV(gemv32_w4_table, CODES_W4_TABLE, 4, 2, 8, 1, 1)
GEMV(gemv32_wide_w4_table, CODES_W4_TABLE, 4, 2, 4, 1, 2)
GEMV(gemv64_w4_table, CODES_W4_TABLE, 8, 2, 8, 1, 1)
GEMV(gemv64_wide_w4_table, CODES_W4_TABLE, 8, 2, 4, 1, 2)
