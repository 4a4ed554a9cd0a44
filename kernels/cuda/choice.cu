// Choosing the next token: the largest of a row of logits, its largest few, and what all of them weigh.
//
//   a key             a number and its place in 64 bits that sort as they should: larger numbers first, then lower places
//
// The largest few of a row are found in passes: a block sorts its part of the row and leaves the first of it, until one part
// is left.

#include "prim.cuh"

struct Argmax {
    const float* x;    // (rows, stride)
    const u32* places; // (rows, stride): where the numbers are from; null: from here
    float* values;     // (rows, parts), or null
    u32* out;          // (rows, parts)
    u32 stride;
    u32 width; // numbers of a row that are looked at
    u32 part;  // of these, how many a block looks at
    u32 parts;
};

DEVICE bool is_better(float a, u32 at, float b, u32 than) { return a > b || (a == b && at < than); }

// Where a row's largest number is, the first of equals; NaN is never it. Block x looks at a part of row y; 0xffffffff if
// there is no number.
KERNEL __launch_bounds__(1024) argmax(const Argmax p) {
    start();
    __shared__ float values[32];
    __shared__ u32 places[32];
    u64 row = (u64)blockIdx.y * p.stride;
    float best = -infinity();
    u32 place = 0xffffffff, end = min(p.width, (blockIdx.x + 1) * p.part);
    for (u32 k = blockIdx.x * p.part + threadIdx.x; k < end; k += blockDim.x) {
        u32 from = p.places ? p.places[row + k] : k;
        if (is_better(p.x[row + k], from, best, place)) best = p.x[row + k], place = from;
    }
    for (u32 mask = 16; mask > 0; mask /= 2) {
        float other = from_lane_xor(best, mask);
        u32 there = from_lane_xor(place, mask);
        if (is_better(other, there, best, place)) best = other, place = there;
    }
    if (lane_id() == 0) values[warp_id()] = best, places[warp_id()] = place;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (u32 w = 1; w < blockDim.x / 32; w++)
        if (is_better(values[w], places[w], best, place)) best = values[w], place = places[w];
    u32 to = blockIdx.y * p.parts + blockIdx.x;
    p.out[to] = place;
    if (p.values) p.values[to] = best;
}

static const int SORTERS = 512;         // threads of a block that sorts
static const int PART = 4 * SORTERS;    // keys that it sorts

struct TopK {
    const float* x;  // (width) numbers, or null
    const u64* keys; // (width) keys, where there are no numbers
    u64* out;        // (blocks, k): the first of each part; 0 where it has fewer
    u32 width;
    u32 k; // at most PART / 2
};

// No number's key is 0. NaN goes before all numbers; zeros are equal, whatever their sign.
DEVICE u64 key_of(float x, u32 place) {
    u32 bits = __float_as_uint(x + 0.0f);
    u32 order = x == x ? bits ^ ((int)bits < 0 ? 0xffffffff : 0x80000000) : 0xffffffff;
    return (u64)order << 32 | (0xffffffff - place);
}

// Block x sorts the numbers of its part, largest first (bitonic: Batcher 1968), and leaves the first k.
KERNEL __launch_bounds__(512) top_k(const TopK p) {
    start();
    __shared__ u64 keys[PART];
    for (u32 i = threadIdx.x; i < PART; i += SORTERS) {
        u32 at = blockIdx.x * PART + i;
        keys[i] = at >= p.width ? 0 : p.x ? key_of(p.x[at], at) : p.keys[at];
    }
    for (u32 size = 2; size <= PART; size *= 2)
        for (u32 gap = size / 2; gap > 0; gap /= 2) {
            __syncthreads();
            for (u32 i = threadIdx.x; i < PART / 2; i += SORTERS) {
                u32 a = 2 * i - (i & (gap - 1)), b = a + gap;
                u64 first = keys[a], second = keys[b];
                // The last round sorts everything one way, the others each half of the next round's lists its own way.
                if ((first < second) == ((a & size) == 0)) keys[a] = second, keys[b] = first;
            }
        }
    __syncthreads();
    for (u32 i = threadIdx.x; i < p.k; i += SORTERS) p.out[(u64)blockIdx.x * p.k + i] = keys[i];
}

struct Weigh {
    const float* x;
    const u64* largest; // the key of the largest number
    float* sums;        // (blocks)
    u32 width;
    u32 part; // numbers of a block
    float reciprocal; // of the temperature
    u32 unused;
};

// Sums of e^((x - largest) / temperature) over the parts of a row; block x has part x.
KERNEL __launch_bounds__(256) weigh(const Weigh p) {
    start();
    __shared__ float scratch[8];
    u32 order = (u32)(*p.largest >> 32), end = min(p.width, (blockIdx.x + 1) * p.part);
    float most = __uint_as_float(order ^ ((int)order < 0 ? 0x80000000 : 0xffffffff)), sum = 0.0f;
    for (u32 k = blockIdx.x * p.part + threadIdx.x; k < end; k += 256) sum += exp_fast((p.x[k] - most) * p.reciprocal);
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) p.sums[blockIdx.x] = sum;
}

struct Penalize {
    float* x;
    const u32* tokens; // (count, 2): a token, and how often it was there
    u32 count;
    float repetition;
    float frequency;
    float presence;
};

// Tokens that were there already become less likely, by the host's very roundings.
KERNEL __launch_bounds__(256) penalize(const Penalize p) {
    start();
    u32 i = blockIdx.x * 256 + threadIdx.x;
    if (i >= p.count) return;
    float& x = p.x[p.tokens[2 * i]];
    float less = x > 0.0f ? __fdiv_rn(x, p.repetition) : __fmul_rn(x, p.repetition);
    float taken = __fadd_rn(__fmul_rn(p.frequency, (float)p.tokens[2 * i + 1]), p.presence);
    x = __fsub_rn(less, taken);
}
