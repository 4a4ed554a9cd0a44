// What is done to single numbers of rows, for kernels that do it between products and for products that do it themselves.

#include "prim.cuh"

// A power of two and its reciprocal.
struct Power {
    float power, reciprocal;
};

// The one that brings a row's largest magnitude into 8192..16384: no row is too large for halves, and values 2^-27 of the
// largest still count.
DEVICE Power power_for(float most) {
    int exponent = (int)(__float_as_uint(most) >> 23);
    int shift = exponent == 255 ? 0 : min(140 - exponent, 126);
    Power p;
    p.power = __uint_as_float((u32)(127 + shift) << 23);
    p.reciprocal = __uint_as_float((u32)(127 - shift) << 23);
    return p;
}

DEVICE float silu(float x) { return x / (1.0f + exp_fast(-x)); }

// By its approximation with tanh.
DEVICE float gelu(float x) {
    float inner = 0.7978845608028654f * fmaf(0.044715f * x * x, x, x);
    return 0.5f * x * (1.0f + tanh_fast(inner));
}
