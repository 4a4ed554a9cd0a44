// Keys and values of a sequence, and attention over them in one streaming pass (FlashAttention, arXiv 2205.14135).
//
//   a cache's layer   keys (kv_heads, capacity, head_dim), values the same; int8 only: a scale for each head and position
//   a block           one query row, one key head with up to 8 of its query heads, one chunk of keys
//
// Chunks of a row are merged afterwards, first to last, so that results don't depend on who finished when.

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

struct Append {
    CacheLayer layer;
    const float* keys;   // (rows, kv_heads, head_dim)
    const float* values; // the same
    const Row* rows;
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

// A warp writes one head of a row's keys or values; block x is the row.
template <int KIND> DEVICE void append(const Append& p, u32 head, bool is_key) {
    u32 head_dim = p.layer.head_dim, pairs = head_dim / 2;
    const Row& row = p.rows[blockIdx.x];
    const float* x = (is_key ? p.keys : p.values) + ((u64)blockIdx.x * p.layer.kv_heads + head) * head_dim;
    u64 place = (u64)head * p.layer.capacity + row.position;
    Stored<KIND> kept = keep<KIND>(x, head_dim);
    float* scales = (float*)(row.cache + (is_key ? p.layer.key_scales : p.layer.value_scales));
    if (KIND == CACHE_INT8 && lane_id() == 0) scales[place] = kept.scale;
    u8* to = row.cache + (is_key ? p.layer.keys : p.layer.values);
    for (u32 pair = lane_id(); pair < pairs; pair += 32) kept.put(to, place * pairs + pair, x + 2 * pair);
}

struct RopeAppend {
    Append append;
    float* q;         // (rows, heads, head_dim)
    float* k;         // the keys that are appended
    const float* cos; // (positions, half)
    const float* sin;
    u32 heads;
    u32 half; // pairs of a head that turn
};

// Turns queries and keys in place, values d and d + half of a head together, and appends keys and values. A warp a head of
// a row: block x is the row, block y first the query heads, then keys' and values' heads.
template <int KIND> DEVICE void rope_append(const RopeAppend& p) {
    u32 head_dim = p.append.layer.head_dim, kv_heads = p.append.layer.kv_heads, head = blockIdx.y;
    bool is_query = head < p.heads, is_value = head >= p.heads + kv_heads;
    if (!is_value) {
        u64 at = is_query ? (u64)blockIdx.x * p.heads + head : (u64)blockIdx.x * kv_heads + (head - p.heads);
        float* x = (is_query ? p.q : p.k) + at * head_dim;
        u32 turn = p.append.rows[blockIdx.x].position * p.half;
        for (u32 d = lane_id(); d < p.half; d += 32) {
            float a = x[d], b = x[d + p.half], c = p.cos[turn + d], s = p.sin[turn + d];
            x[d] = fmaf(-b, s, a * c);
            x[d + p.half] = fmaf(a, s, b * c);
        }
        if (is_query) return;
        __syncthreads(); // the other lanes' numbers
    }
    append<KIND>(p.append, is_value ? head - p.heads - kv_heads : head - p.heads, !is_value);
}

KERNEL __launch_bounds__(32) rope_append_f32(const RopeAppend p) { start(), rope_append<CACHE_F32>(p); }
KERNEL __launch_bounds__(32) rope_append_f16(const RopeAppend p) { start(), rope_append<CACHE_F16>(p); }
KERNEL __launch_bounds__(32) rope_append_int8(const RopeAppend p) { start(), rope_append<CACHE_INT8>(p); }

KERNEL __launch_bounds__(32) append_f32(const Append p) { start(), append<CACHE_F32>(p, blockIdx.y, blockIdx.z == 0); }
KERNEL __launch_bounds__(32) append_f16(const Append p) { start(), append<CACHE_F16>(p, blockIdx.y, blockIdx.z == 0); }
KERNEL __launch_bounds__(32) append_int8(const Append p) { start(), append<CACHE_INT8>(p, blockIdx.y, blockIdx.z == 0); }

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
static const int THREADS = 128;
static const int TILE = 32; // keys whose scores are held at once, one a lane

// The two numbers that two codes stand for, but for their scale.
DEVICE FloatPair of_codes(u32 codes) {
    FloatPair d = {(float)(signed char)(codes & 255), (float)(signed char)(codes >> 8 & 255)};
    return d;
}

// Two numbers of one head at one position.
template <int KIND> DEVICE FloatPair cached(const u8* numbers, const float* scales, u64 place, u32 pairs, u32 pair) {
    u64 at = place * pairs + pair;
    if (KIND == CACHE_F32) return ((const FloatPair*)numbers)[at];
    if (KIND == CACHE_F16) return floats_of(((const u32*)numbers)[at]);
    u32 codes = ((const u16*)numbers)[at];
    float scale = scales[place];
    FloatPair d = of_codes(codes);
    d.lo *= scale, d.hi *= scale;
    return d;
}

template <int KIND> DEVICE void attend(const Attend& p) {
    extern __shared__ __align__(16) float shared[];
    u32 head_dim = p.layer.head_dim, pairs = head_dim / 2, stride = head_dim + 1;
    u32 chunk = blockIdx.x, kv_head = blockIdx.y / p.passes, pass = blockIdx.y % p.passes, row = blockIdx.z;
    u32 group = p.heads / p.layer.kv_heads;
    u32 head0 = kv_head * group + pass * p.block_heads;
    u32 heads = min(p.block_heads, group - pass * p.block_heads);
    // Threads that read values: `spread` positions at a time, a pair of numbers each.
    u32 spread = max((u32)THREADS / pairs, 1u);

    float* queries = shared;                                        // (heads, head_dim)
    float* weights = queries + p.block_heads * head_dim;            // (heads, TILE)
    float* corrections = weights + p.block_heads * TILE;            // (heads)
    float* totals = corrections + p.block_heads;                    // (heads)
    float* keys = totals + p.block_heads;                           // (TILE, stride); at the end (spread, heads, head_dim)

    u32 position = p.rows[row].position;
    const u8* cache = p.rows[row].cache;
    u32 seen = position + 1 > p.window ? position + 1 - p.window : 0;
    u32 begin = max(seen, chunk * p.chunk), end = min(position + 1, (chunk + 1) * p.chunk);
    float* partial = p.partial + (((u64)row * p.chunks + chunk) * p.heads + head0) * (head_dim + 2);
    if (begin >= end) {
        // The query sees no key of this chunk.
        if (threadIdx.x < heads) partial[(u64)threadIdx.x * (head_dim + 2) + head_dim + 1] = 0.0f;
        return;
    }
    const u8* key_numbers = cache + p.layer.keys;
    const u8* value_numbers = cache + p.layer.values;
    const float* key_scales = (const float*)(cache + p.layer.key_scales);
    const float* value_scales = (const float*)(cache + p.layer.value_scales);
    u64 place0 = (u64)kv_head * p.layer.capacity;

    const float* q = p.q + ((u64)row * p.heads + head0) * head_dim;
    for (u32 at = threadIdx.x; at < heads * head_dim; at += THREADS) queries[at] = q[at] * p.scale;

    // Of the heads that this thread's warp scores: every fourth.
    float largest[MOST_HEADS / 4], total[MOST_HEADS / 4];
#pragma unroll
    for (int s = 0; s < MOST_HEADS / 4; s++) largest[s] = -infinity(), total[s] = 0.0f;
    FloatPair sums[MOST_HEADS];
#pragma unroll
    for (int g = 0; g < MOST_HEADS; g++) sums[g].lo = sums[g].hi = 0.0f;
    u32 my_pair = threadIdx.x % pairs, my_start = threadIdx.x / pairs;

    for (u32 first = begin; first < end; first += TILE) {
        u32 count = min(end - first, (u32)TILE);
        for (u32 at = threadIdx.x; at < count * pairs; at += THREADS) {
            u32 key = at / pairs, pair = at % pairs;
            FloatPair x = cached<KIND>(key_numbers, key_scales, place0 + first + key, pairs, pair);
            keys[key * stride + 2 * pair] = x.lo;
            keys[key * stride + 2 * pair + 1] = x.hi;
        }
        __syncthreads();
#pragma unroll
        for (int s = 0; s < MOST_HEADS / 4; s++) {
            u32 head = warp_id() + 4 * s;
            if (head < heads) {
                float score = -infinity();
                if (lane_id() < count) {
                    score = 0.0f;
                    for (u32 d = 0; d < head_dim; d++)
                        score = fmaf(queries[head * head_dim + d], keys[lane_id() * stride + d], score);
                    if (p.cap > 0.0f) score = p.cap * tanh_fast(score / p.cap);
                }
                float most = larger(largest[s], warp_max(score));
                float weight = lane_id() < count ? exp_fast(score - most) : 0.0f;
                float correction = exp_fast(largest[s] - most);
                total[s] = fmaf(total[s], correction, warp_sum(weight));
                largest[s] = most;
                weights[head * TILE + lane_id()] = weight;
                if (lane_id() == 0) corrections[head] = correction;
            }
        }
        __syncthreads();
        if (my_start < spread) {
#pragma unroll
            for (int g = 0; g < MOST_HEADS; g++)
                if (g < heads) sums[g].lo *= corrections[g], sums[g].hi *= corrections[g];
            for (u32 key = my_start; key < count; key += spread) {
                FloatPair x = cached<KIND>(value_numbers, value_scales, place0 + first + key, pairs, my_pair);
#pragma unroll
                for (int g = 0; g < MOST_HEADS; g++)
                    if (g < heads) {
                        sums[g].lo = fmaf(weights[g * TILE + key], x.lo, sums[g].lo);
                        sums[g].hi = fmaf(weights[g * TILE + key], x.hi, sums[g].hi);
                    }
            }
        }
    }
    __syncthreads();
    if (my_start < spread) {
#pragma unroll
        for (int g = 0; g < MOST_HEADS; g++)
            if (g < heads) {
                float* to = keys + (my_start * p.block_heads + g) * head_dim + 2 * my_pair;
                to[0] = sums[g].lo;
                to[1] = sums[g].hi;
            }
    }
#pragma unroll
    for (int s = 0; s < MOST_HEADS / 4; s++) {
        u32 head = warp_id() + 4 * s;
        if (head < heads && lane_id() == 0) {
            totals[head] = total[s];
            if (p.chunks > 1) {
                partial[(u64)head * (head_dim + 2) + head_dim] = largest[s];
                partial[(u64)head * (head_dim + 2) + head_dim + 1] = total[s];
            }
        }
    }
    __syncthreads();
    float* out = p.out + ((u64)row * p.heads + head0) * head_dim;
    for (u32 at = threadIdx.x; at < heads * head_dim; at += THREADS) {
        u32 head = at / head_dim, d = at % head_dim;
        float sum = 0.0f;
        for (u32 part = 0; part < spread; part++) sum += keys[(part * p.block_heads + head) * head_dim + d];
        if (p.chunks > 1)
            partial[(u64)head * (head_dim + 2) + d] = sum;
        else
            out[at] = sum / totals[head];
    }
}

KERNEL __launch_bounds__(128, 4) attend_f32(const Attend p) { start(), attend<CACHE_F32>(p); }
KERNEL __launch_bounds__(128, 4) attend_f16(const Attend p) { start(), attend<CACHE_F16>(p); }
KERNEL __launch_bounds__(128, 4) attend_int8(const Attend p) { start(), attend<CACHE_INT8>(p); }

// One decoded token of each sequence: turns its queries and its key, appends key and value, and attends, in one launch.
// A block is a row, a key head with all of its query heads, and a chunk of keys; the block of the last chunk appends. Keys
// and values wait in shared memory as they are stored, two tiles of them at a time.
struct Step {
    Attend attend;
    const float* k;   // (rows, kv_heads, head_dim), not turned
    const float* v;   // the same
    const float* cos; // (positions, half), null: nothing turns
    const float* sin;
    u32 half;   // pairs of a head that turn
    u32 stride; // bytes between two keys in shared memory: 64 more than a multiple of 128, so that two keys fill all banks
};

static const int STEP_THREADS = 256;
static const int STEP_TILE = 64;

// Two numbers of a stored row, but for its scale.
template <int KIND> DEVICE FloatPair stored(const u8* row, u32 pair) {
    if (KIND == CACHE_F32) return ((const FloatPair*)row)[pair];
    if (KIND == CACHE_F16) return floats_of(((const u32*)row)[pair]);
    return of_codes(((const u16*)row)[pair]);
}

// The same of 16 bytes of it.
template <int KIND> DEVICE FloatPair stored(const Quad& quad, u32 pair) {
    const u32 words[4] = {quad.x, quad.y, quad.z, quad.w};
    if (KIND == CACHE_F16) return floats_of(words[pair]);
    if (KIND == CACHE_INT8) return of_codes(words[pair / 2] >> pair % 2 * 16);
    FloatPair d = {__uint_as_float(words[2 * pair % 4]), __uint_as_float(words[(2 * pair + 1) % 4])};
    return d;
}

template <int KIND> DEVICE void attend_step(const Step& s) {
    extern __shared__ __align__(16) float shared[];
    u8* bytes = (u8*)shared;
    constexpr u32 SIZE = KIND == CACHE_F32 ? 4 : KIND == CACHE_F16 ? 2 : 1, PER = 16 / SIZE;
    const Attend& p = s.attend;
    u32 head_dim = p.layer.head_dim, pairs = head_dim / 2, heads = p.block_heads, lane = lane_id(), warp = warp_id();
    u32 chunk = blockIdx.x, kv_head = blockIdx.y, row = blockIdx.z, head0 = kv_head * heads;
    u32 tile_bytes = STEP_TILE * s.stride, quads = head_dim / PER;

    u8* keys = bytes;                                    // (2, STEP_TILE, stride)
    u8* values = keys + 2 * tile_bytes;                  // the same
    float* queries = (float*)(values + 2 * tile_bytes);  // (heads, head_dim)
    float* weights = queries + heads * head_dim;         // (heads, STEP_TILE)
    float* corrections = weights + heads * STEP_TILE;    // (heads)
    float* totals = corrections + MOST_HEADS;            // (heads)
    float* fresh = totals + MOST_HEADS;                  // (2, head_dim): the new key and value
    u8* fresh_stored = (u8*)(fresh + 2 * head_dim);      // the same as they are stored

    let_next_start();
    wait_for_previous();
    u32 position = p.rows[row].position;
    u8* cache = p.rows[row].cache;
    u32 seen = position + 1 > p.window ? position + 1 - p.window : 0;
    u32 begin = max(seen, chunk * p.chunk), end = min(position + 1, (chunk + 1) * p.chunk);
    float* partial = p.partial + (((u64)row * p.chunks + chunk) * p.heads + head0) * (head_dim + 2);
    if (begin >= end) {
        // The query sees no key of this chunk.
        if (threadIdx.x < heads) partial[(u64)threadIdx.x * (head_dim + 2) + head_dim + 1] = 0.0f;
        return;
    }
    bool is_last = end == position + 1;
    u64 place0 = (u64)kv_head * p.layer.capacity;
    const float* key_scales = (const float*)(cache + p.layer.key_scales) + place0;
    const float* value_scales = (const float*)(cache + p.layer.value_scales) + place0;

    u32 to = shared_address(bytes);
    // What is new is not there yet.
    auto fetch = [&](u32 first, u32 slot) {
        if (first < end) {
            u32 count = min(end - first, (u32)STEP_TILE) * quads;
            for (u32 at = threadIdx.x; at < count; at += STEP_THREADS) {
                u32 key = at / quads, quad = at % quads;
                if (first + key == position) continue;
                u64 from = ((place0 + first + key) * quads + quad) * 16;
                u32 there = to + slot * tile_bytes + key * s.stride + quad * 16;
                copy_async(there, cache + p.layer.keys + from, 16);
                copy_async(there + 2 * tile_bytes, cache + p.layer.values + from, 16);
            }
        }
        copy_commit();
    };
    fetch(begin, 0);
    fetch(begin + STEP_TILE, 1);

    const float* q = p.q + ((u64)row * p.heads + head0) * head_dim;
    const float* k = s.k + ((u64)row * p.layer.kv_heads + kv_head) * head_dim;
    const float* v = s.v + ((u64)row * p.layer.kv_heads + kv_head) * head_dim;
    for (u32 at = threadIdx.x; at < (heads + 2) * head_dim; at += STEP_THREADS) {
        u32 head = at / head_dim, d = at % head_dim;
        const float* x = head < heads ? q + head * head_dim : head == heads ? k : v;
        float y = x[d];
        if (s.cos && head <= heads && d < 2 * s.half) {
            u32 turn = position * s.half + d % s.half;
            float c = s.cos[turn], sine = s.sin[turn];
            y = d < s.half ? fmaf(-x[d + s.half], sine, y * c) : fmaf(x[d - s.half], sine, y * c);
        }
        if (head < heads)
            queries[at] = y * p.scale;
        else
            fresh[at - heads * head_dim] = y;
    }
    __syncthreads();
    if (is_last && warp < 2) {
        // The new key by the first warp, the new value by the second one.
        Stored<KIND> kept = keep<KIND>(fresh + warp * head_dim, head_dim);
        u8* there = cache + (warp == 0 ? p.layer.keys : p.layer.values);
        if (KIND == CACHE_INT8 && lane == 0)
            ((float*)(cache + (warp == 0 ? p.layer.key_scales : p.layer.value_scales)))[place0 + position] = kept.scale;
        for (u32 pair = lane; pair < pairs; pair += 32) {
            kept.put(there, (place0 + position) * pairs + pair, fresh + warp * head_dim + 2 * pair);
            kept.put(fresh_stored + warp * head_dim * SIZE, pair, fresh + warp * head_dim + 2 * pair);
        }
    }
    __syncthreads();
    auto put_fresh = [&](u32 first, u32 slot) {
        if (!is_last || position < first || position >= first + STEP_TILE) return;
        u32 at = threadIdx.x;
        if (at >= 2 * quads) return;
        u8* there = (at < quads ? keys : values) + slot * tile_bytes + (position - first) * s.stride + at % quads * 16;
        *(Quad*)there = ((const Quad*)fresh_stored)[at];
    };
    put_fresh(begin, 0);
    put_fresh(begin + STEP_TILE, 1);

    // Of the head that the warp scores.
    float largest = -infinity(), total = 0.0f;
    FloatPair sums[MOST_HEADS];
#pragma unroll
    for (int g = 0; g < MOST_HEADS; g++) sums[g].lo = sums[g].hi = 0.0f;
    u32 spread = STEP_THREADS / pairs, my_pair = threadIdx.x % pairs, my_start = threadIdx.x / pairs;
    u32 my_key = threadIdx.x / 4, part = threadIdx.x % 4, slot = 0;

    for (u32 first = begin; first < end; first += STEP_TILE, slot ^= 1) {
        u32 count = min(end - first, (u32)STEP_TILE);
        float key_scale = 1.0f, value_scale[2] = {1.0f, 1.0f};
        if (KIND == CACHE_INT8) {
            if (my_key < count) key_scale = key_scales[first + my_key];
#pragma unroll
            for (u32 n = 0; n < 2; n++)
                if (warp < heads && lane + 32 * n < count) value_scale[n] = value_scales[first + lane + 32 * n];
        }
        copy_wait<1>();
        __syncthreads();
        float dots[MOST_HEADS];
#pragma unroll
        for (int g = 0; g < MOST_HEADS; g++) dots[g] = 0.0f;
        if (my_key < count) {
            const u8* key = keys + slot * tile_bytes + my_key * s.stride;
            for (u32 quad = part; quad < quads; quad += 4) {
                Quad own = *(const Quad*)(key + quad * 16);
                float x[PER];
#pragma unroll
                for (u32 pair = 0; pair < PER / 2; pair++) {
                    FloatPair two = stored<KIND>(own, pair);
                    x[2 * pair] = two.lo, x[2 * pair + 1] = two.hi;
                }
                const float* query = queries + quad * PER;
#pragma unroll
                for (int g = 0; g < MOST_HEADS; g++)
                    if (g < heads) {
#pragma unroll
                        for (u32 e = 0; e < PER; e += 4) {
                            Quad four = *(const Quad*)(query + g * head_dim + e);
                            dots[g] = fmaf(x[e], __uint_as_float(four.x), dots[g]);
                            dots[g] = fmaf(x[e + 1], __uint_as_float(four.y), dots[g]);
                            dots[g] = fmaf(x[e + 2], __uint_as_float(four.z), dots[g]);
                            dots[g] = fmaf(x[e + 3], __uint_as_float(four.w), dots[g]);
                        }
                    }
            }
        }
#pragma unroll
        for (int g = 0; g < MOST_HEADS; g++)
            if (g < heads) {
                float dot = dots[g];
                dot += from_lane_xor(dot, 1);
                dot += from_lane_xor(dot, 2);
                if (part == g % 4) weights[g * STEP_TILE + my_key] = dot * key_scale;
            }
        __syncthreads();
        if (warp < heads) {
            float score[2];
#pragma unroll
            for (u32 n = 0; n < 2; n++) {
                score[n] = lane + 32 * n < count ? weights[warp * STEP_TILE + lane + 32 * n] : -infinity();
                if (p.cap > 0.0f && lane + 32 * n < count) score[n] = p.cap * tanh_fast(score[n] / p.cap);
            }
            float most = larger(largest, warp_max(larger(score[0], score[1])));
            float correction = exp_fast(largest - most), sum = 0.0f;
#pragma unroll
            for (u32 n = 0; n < 2; n++) {
                float weight = lane + 32 * n < count ? exp_fast(score[n] - most) : 0.0f;
                sum += weight;
                weights[warp * STEP_TILE + lane + 32 * n] = weight * value_scale[n];
            }
            total = fmaf(total, correction, warp_sum(sum));
            largest = most;
            if (lane == 0) corrections[warp] = correction;
        }
        __syncthreads();
        if (my_start < spread) {
#pragma unroll
            for (int g = 0; g < MOST_HEADS; g++)
                if (g < heads) sums[g].lo *= corrections[g], sums[g].hi *= corrections[g];
            for (u32 key = my_start; key < count; key += spread) {
                FloatPair x = stored<KIND>(values + slot * tile_bytes + key * s.stride, my_pair);
#pragma unroll
                for (int g = 0; g < MOST_HEADS; g++)
                    if (g < heads) {
                        sums[g].lo = fmaf(weights[g * STEP_TILE + key], x.lo, sums[g].lo);
                        sums[g].hi = fmaf(weights[g * STEP_TILE + key], x.hi, sums[g].hi);
                    }
            }
        }
        __syncthreads();
        fetch(first + 2 * STEP_TILE, slot);
        put_fresh(first + 2 * STEP_TILE, slot);
    }
    copy_wait<0>();
    float* spare = (float*)bytes; // (spread, heads, head_dim), over the tiles
    if (my_start < spread) {
#pragma unroll
        for (int g = 0; g < MOST_HEADS; g++)
            if (g < heads) *(FloatPair*)(spare + (my_start * heads + g) * head_dim + 2 * my_pair) = sums[g];
    }
    if (warp < heads && lane == 0) {
        totals[warp] = total;
        if (p.chunks > 1) {
            partial[(u64)warp * (head_dim + 2) + head_dim] = largest;
            partial[(u64)warp * (head_dim + 2) + head_dim + 1] = total;
        }
    }
    __syncthreads();
    float* out = p.out + ((u64)row * p.heads + head0) * head_dim;
    for (u32 at = threadIdx.x; at < heads * head_dim; at += STEP_THREADS) {
        u32 head = at / head_dim, d = at % head_dim;
        float sum = 0.0f;
        for (u32 n = 0; n < spread; n++) sum += spare[n * heads * head_dim + at];
        if (p.chunks > 1)
            partial[(u64)head * (head_dim + 2) + d] = sum;
        else
            out[at] = sum / totals[head];
    }
}

KERNEL __launch_bounds__(256) attend_step_f32(const Step p) { attend_step<CACHE_F32>(p); }
KERNEL __launch_bounds__(256) attend_step_f16(const Step p) { attend_step<CACHE_F16>(p); }
KERNEL __launch_bounds__(256) attend_step_int8(const Step p) { attend_step<CACHE_INT8>(p); }

// A row's chunks together; block x is the head, block y the row.
KERNEL __launch_bounds__(128) attend_merge(const Attend p) {
    start();
    u32 head_dim = p.layer.head_dim, head = blockIdx.x, row = blockIdx.y, part_len = head_dim + 2;
    const float* parts = p.partial + ((u64)row * p.chunks * p.heads + head) * part_len;
    u64 next = (u64)p.heads * part_len;
    float most = -infinity();
    for (u32 c = 0; c < p.chunks; c++)
        if (parts[c * next + head_dim + 1] != 0.0f) most = larger(most, parts[c * next + head_dim]);
    for (u32 d = threadIdx.x; d < head_dim; d += THREADS) {
        float sum = 0.0f, total = 0.0f;
        for (u32 c = 0; c < p.chunks; c++) {
            const float* part = parts + c * next;
            if (part[head_dim + 1] == 0.0f) continue;
            float share = exp_fast(part[head_dim] - most);
            sum = fmaf(share, part[d], sum);
            total = fmaf(share, part[head_dim + 1], total);
        }
        p.out[((u64)row * p.heads + head) * head_dim + d] = sum / total;
    }
}
