// Appending keys and values, and attention over them in one streaming pass (FlashAttention, arXiv 2205.14135).
//
//   a block           one query row, one key head with up to 8 of its query heads, one chunk of keys

#include "cache.cuh"

struct Append {
    CacheLayer layer;
    const float* keys;   // (rows, kv_heads, head_dim)
    const float* values; // the same
    const Row* rows;
};

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

static const int THREADS = 128;
static const int TILE = 32; // keys whose scores are held at once, one a lane

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
