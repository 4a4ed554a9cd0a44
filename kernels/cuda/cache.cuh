// Keys and values of a sequence, and what attention over them takes.
//
//   a cache's layer   keys (kv_heads, capacity, head_dim), values the same; int8 only: a scale for each head and position
//
// Chunks of a row's keys are merged after attention, first to last, so that results don't depend on who finished when.

#include "prim.cuh"

enum CacheKind { CACHE_F32 = 0, CACHE_F16 = 1, CACHE_INT8 = 2 };

// Byte offsets of one layer's parts from the cache's start.
struct CacheLayer {
    u64 keys;
    u64 values;
    u64 key_scales;
    u64 value_scales;
    u32 kv_heads;
    u32 head_dim; // even
    u32 capacity;
    u32 unused;
};

// How a head's numbers are stored: by their scale, if they have one.
template <int KIND> struct Stored {
    float scale, reciprocal;

    // Two numbers as pair `at` of an array.
    __device__ __forceinline__ void put(u8* to, u64 at, const float* x) const {
        float lo = x[0], hi = x[1];
        if (KIND == CACHE_F32) {
            ((FloatPair*)to)[at] = {lo, hi};
        } else if (KIND == CACHE_F16) {
            const float most = 65504.0f;
            // NaN stays NaN: a comparison with it is false.
            lo = lo > most ? most : lo < -most ? -most : lo;
            hi = hi > most ? most : hi < -most ? -most : hi;
            ((u32*)to)[at] = half2_of(lo, hi);
        } else {
            int a = __float2int_rn(lo * reciprocal), b = __float2int_rn(hi * reciprocal);
            ((u16*)to)[at] = (u16)((a & 255) | (b & 255) << 8);
        }
    }
};

// The warp's decision about one head's numbers.
template <int KIND> DEVICE Stored<KIND> keep(const float* x, u32 head_dim) {
    Stored<KIND> kept = {1.0f, 1.0f};
    if (KIND == CACHE_INT8) {
        float most = 0.0f, poison = 0.0f;
        for (u32 d = lane_id(); d < head_dim; d += 32) {
            most = larger(most, magnitude(x[d]));
            poison = fmaf(x[d], 0.0f, poison); // NaN if a number isn't finite
        }
        most = warp_max(most);
        poison = warp_sum(poison);
        kept.reciprocal = 127.0f / most;
        // Magnitudes so small that 127 / most overflows are kept as zeros.
        bool is_finite = magnitude(kept.reciprocal) < infinity();
        kept.scale = (is_finite ? most / 127.0f : 0.0f) + poison;
        if (!is_finite) kept.reciprocal = 0.0f;
    }
    return kept;
}

struct Attend {
    CacheLayer layer;
    const float* q; // (rows, heads, head_dim)
    const Row* rows;
    float* out;      // (rows, heads, head_dim)
    float* partial;  // (rows, chunks, heads, head_dim + 2): sums, largest score, weight
    u32 heads;
    u32 block_heads; // query heads of a block, at most MOST_HEADS
    u32 passes;      // blocks that share a key head
    u32 chunk;       // keys of a chunk
    u32 chunks;
    u32 window; // positions a query sees, its own included
    float scale;
    float cap; // 0: none
};

static const int MOST_HEADS = 8;

// The two numbers that two codes stand for, but for their scale.
DEVICE FloatPair of_codes(u32 codes) {
    FloatPair d = {(float)(signed char)(codes & 255), (float)(signed char)(codes >> 8 & 255)};
    return d;
}
