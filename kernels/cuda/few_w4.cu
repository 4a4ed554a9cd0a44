// Up to 8 tokens times a weight of 4-bit codes whose levels are evenly spaced.

#include "few.cuh"

FEW_OF(w4, CODES_W4, 8)
