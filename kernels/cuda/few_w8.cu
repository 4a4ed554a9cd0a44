// Up to 8 tokens times a weight of 8-bit codes.

#include "few.cuh"

FEW_OF(w8, CODES_W8, 8)
