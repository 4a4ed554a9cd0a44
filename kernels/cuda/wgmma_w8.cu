// ARCHITECTURE compute_90a, PTX 8.0
// More than 32 tokens times a weight of 8-bit codes: up to 64 and 128 at a time.

#include "wgmma.cuh"

WGMMA_KERNEL(wgmma64_f16_w8, CODES_W8, SCALES_F16, 64, 1, 2, 4, 2)
WGMMA_KERNEL(wgmma128_f16_w8, CODES_W8, SCALES_F16, 128, 2, 1, 5, 1)
WGMMA_KERNEL(wgmma64_coded_w8, CODES_W8, SCALES_CODED, 64, 1, 2, 4, 2)
WGMMA_KERNEL(wgmma128_coded_w8, CODES_W8, SCALES_CODED, 128, 2, 1, 5, 1)
WGMMA_KERNEL(wgmma64_any_w8, CODES_W8, SCALES_ANY, 64, 1, 2, 4, 2)
WGMMA_KERNEL(wgmma128_any_w8, CODES_W8, SCALES_ANY, 128, 2, 1, 5, 1)
