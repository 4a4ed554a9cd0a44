// Up to 8 tokens times a weight of 4-bit codes of a table.

#include "few.cuh"

FEW_OF(w4_table, CODES_W4_TABLE, 4)
