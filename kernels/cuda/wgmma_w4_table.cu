// ARCHITECTURE compute_90a, PTX 8.0
// More than 32 tokens times a weight of 4-bit codes whose levels come from a table: up to 64 and 128 at a time.

#include "wgmma.cuh"

WGMMA_KERNEL(wgmma64_f16_w4_table, CODES_W4_TABLE, SCALES_F16, 64, 1, 2, 4, 2)
WGMMA_KERNEL(wgmma128_f16_w4_table, CODES_W4_TABLE, SCALES_F16, 128, 2, 1, 5, 1)
WGMMA_KERNEL(wgmma64_coded_w4_table, CODES_W4_TABLE, SCALES_CODED, 64, 1, 2, 4, 2)
WGMMA_KERNEL(wgmma128_coded_w4_table, CODES_W4_TABLE, SCALES_CODED, 128, 2, 1, 5, 1)
WGMMA_KERNEL(wgmma64_any_w4_table, CODES_W4_TABLE, SCALES_ANY, 64, 1, 2, 4, 2)
WGMMA_KERNEL(wgmma128_any_w4_table, CODES_W4_TABLE, SCALES_ANY, 128, 2, 1, 5, 1)
