// One decoded token of each sequence, turned, appended and attended in one launch.

#include "cache.cuh"

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
