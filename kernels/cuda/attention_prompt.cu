// Attention of a prompt's rows over keys and values in half precision, on the tensor cores (FlashAttention-2,
// arXiv 2307.08691).
//
//   block x           64 queries: consecutive rows of one sequence, each with all query heads of a key head; the last
//                     rows come first, since they see most
//   block y           the key head
//   a warp            16 of the queries, over all keys; a lane has numbers of two of them, `i` and `i + 8`
//
// Queries are rounded to halves after each was multiplied by a power of two, weights (0 to 1) as they are; scores and sums
// are single precision. Rows of a tile of keys that nobody sees are zeros.

#include "cache.cuh"
#include "rows.cuh"

struct Prompt {
    CacheLayer layer;
    const float* q; // (rows, heads, head_dim)
    const Row* rows;
    float* out; // (rows, heads, head_dim)
    u32 heads;
    u32 group; // query heads of a key head
    u32 first; // of the rows that are meant
    u32 count; // of these: one after the other in one sequence
    u32 window; // positions a query sees, its own included
    float scale;
    float cap; // 0: none
    u32 unused;
};

static const int THREADS = 128;
static const int QUERIES = 64; // of a block
static const int KEYS = 64;    // of a tile

// A tile of keys and one of values. Rows are so far apart that the eight bytes that half a warp reads at a time lie in
// different banks: the lanes of keys are four rows apart by one, those of values by two.
template <int DIM> struct Tile {
    u16 keys[KEYS][DIM + 16];
    u16 values[KEYS][DIM + 8];
};

struct __align__(8) FourHalves {
    u32 lo, hi;
};

template <int DIM> DEVICE void attend_prompt(const Prompt& p) {
    extern __shared__ __align__(16) u8 shared[];
    Tile<DIM>* tiles = (Tile<DIM>*)shared;
    u32 lane = lane_id(), i = lane / 4, j = lane % 4;
    u32 head_dim = p.layer.head_dim, queries = p.count * p.group;
    u32 query0 = ((queries - 1) / QUERIES - blockIdx.x) * QUERIES;
    u32 position0 = p.rows[p.first].position;
    const u8* cache = p.rows[p.first].cache;

    // Past the last query it is computed again, and not written.
    u32 position[2];
    u64 at[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        u32 query = min(query0 + warp_id() * 16 + r * 8 + i, queries - 1), row = query / p.group;
        position[r] = position0 + row;
        at[r] = ((u64)(p.first + row) * p.heads + blockIdx.y * p.group + query % p.group) * head_dim;
    }
    u32 last = position0 + (min(query0 + QUERIES, queries) - 1) / p.group, lowest = position0 + query0 / p.group;
    u32 end = last + 1, begin = lowest + 1 > p.window ? lowest + 1 - p.window : 0;
    begin = begin / KEYS * KEYS;

    u64 place0 = (u64)blockIdx.y * p.layer.capacity;
    const u16* keys = (const u16*)(cache + p.layer.keys) + place0 * head_dim;
    const u16* values = (const u16*)(cache + p.layer.values) + place0 * head_dim;
    auto fetch = [&](u32 key0, u32 slot) {
#pragma unroll
        for (int part = 0; part < KEYS * DIM / 8 / THREADS; part++) {
            u32 chunk = part * THREADS + threadIdx.x, key = chunk / (DIM / 8), d = chunk % (DIM / 8) * 8;
            bool is_there = key0 + key < end && d < head_dim;
            u64 from = is_there ? (u64)(key0 + key) * head_dim + d : 0;
            copy_async(shared_address(&tiles[slot].keys[key][d]), keys + from, is_there ? 16 : 0);
            copy_async(shared_address(&tiles[slot].values[key][d]), values + from, is_there ? 16 : 0);
        }
        copy_commit();
    };
    fetch(begin, 0);

    // Queries as operands: of 16 values of a head, lane j takes 4 j to 4 j + 3, and of keys as well.
    u32 q[DIM / 16][4];
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float v[DIM / 16][4], most = 0.0f;
#pragma unroll
        for (int s = 0; s < DIM / 16; s++) {
            Quad raw = {0, 0, 0, 0};
            if (s * 16 + 4 * j < head_dim) raw = *(const Quad*)(p.q + at[r] + s * 16 + 4 * j);
            v[s][0] = __uint_as_float(raw.x), v[s][1] = __uint_as_float(raw.y);
            v[s][2] = __uint_as_float(raw.z), v[s][3] = __uint_as_float(raw.w);
#pragma unroll
            for (int e = 0; e < 4; e++) most = larger(most, magnitude(v[s][e]));
        }
        most = larger(most, from_lane_xor(most, 1));
        Power power = power_for(larger(most, from_lane_xor(most, 2)));
        factor[r] = p.scale * power.reciprocal;
#pragma unroll
        for (int s = 0; s < DIM / 16; s++) {
            q[s][r] = half2_of(v[s][0] * power.power, v[s][1] * power.power);
            q[s][2 + r] = half2_of(v[s][2] * power.power, v[s][3] * power.power);
        }
    }

    const float log2_e = 1.4426950408889634f;
    float largest[2] = {-infinity(), -infinity()}, total[2] = {0.0f, 0.0f};
    // Of 32 values of a head, the columns of tile e of four are 4 c + e.
    float sums[DIM / 32][4][4];
#pragma unroll
    for (int b = 0; b < DIM / 32; b++)
#pragma unroll
        for (int e = 0; e < 4; e++)
#pragma unroll
            for (int k = 0; k < 4; k++) sums[b][e][k] = 0.0f;

    u32 slot = 0;
#pragma unroll 1
    for (u32 key0 = begin; key0 < end; key0 += KEYS) {
        copy_wait<0>();
        __syncthreads();
        // Every warp has left the other tile.
        if (key0 + KEYS < end) fetch(key0 + KEYS, slot ^ 1);
        const Tile<DIM>& tile = tiles[slot];
        float scores[KEYS / 8][4];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int s = 0; s < DIM / 16; s++) {
                FourHalves k = *(const FourHalves*)&tile.keys[n * 8 + i][s * 16 + 4 * j];
                if (s == 0)
                    mma_first(scores[n], q[s], k.lo, k.hi);
                else
                    mma(scores[n], q[s], k.lo, k.hi);
            }
        }
        // Only the first and the last tiles have keys that some query doesn't see.
        bool is_whole = key0 + KEYS <= lowest + 1 && last - key0 < p.window;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float most = largest[r];
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float score = scores[n][2 * r + e] * factor[r];
                    if (p.cap > 0.0f) score = p.cap * tanh_fast(score / p.cap);
                    u32 key = key0 + n * 8 + 2 * j + e;
                    bool is_seen = is_whole || (key <= position[r] && position[r] - key < p.window);
                    score = is_seen ? score * log2_e : -infinity();
                    scores[n][2 * r + e] = score;
                    most = larger(most, score);
                }
            most = larger(most, from_lane_xor(most, 1));
            most = larger(most, from_lane_xor(most, 2));
            // A query that has seen no key yet has no largest score: its weights are zeros.
            float base = most == -infinity() ? 0.0f : most, sum = 0.0f;
            float correction = exp2_fast(largest[r] - base);
            largest[r] = most;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float weight = exp2_fast(scores[n][2 * r + e] - base);
                    scores[n][2 * r + e] = weight;
                    sum += weight;
                }
            total[r] = fmaf(total[r], correction, sum);
#pragma unroll
            for (int b = 0; b < DIM / 32; b++)
#pragma unroll
                for (int e = 0; e < 4; e++) sums[b][e][2 * r] *= correction, sums[b][e][2 * r + 1] *= correction;
        }
#pragma unroll
        for (int n = 0; n < KEYS / 8; n += 2) {
            u32 weights[4] = {half2_of(scores[n][0], scores[n][1]), half2_of(scores[n][2], scores[n][3]),
                              half2_of(scores[n + 1][0], scores[n + 1][1]), half2_of(scores[n + 1][2], scores[n + 1][3])};
            u32 key = n * 8 + 2 * j;
#pragma unroll
            for (int b = 0; b < DIM / 32; b++) {
                u32 d = b * 32 + 4 * i;
                FourHalves v0 = *(const FourHalves*)&tile.values[key][d], v1 = *(const FourHalves*)&tile.values[key + 1][d];
                FourHalves v2 = *(const FourHalves*)&tile.values[key + 8][d], v3 = *(const FourHalves*)&tile.values[key + 9][d];
                mma(sums[b][0], weights, bytes_of(v0.lo, v1.lo, 0x5410), bytes_of(v2.lo, v3.lo, 0x5410));
                mma(sums[b][1], weights, bytes_of(v0.lo, v1.lo, 0x7632), bytes_of(v2.lo, v3.lo, 0x7632));
                mma(sums[b][2], weights, bytes_of(v0.hi, v1.hi, 0x5410), bytes_of(v2.hi, v3.hi, 0x5410));
                mma(sums[b][3], weights, bytes_of(v0.hi, v1.hi, 0x7632), bytes_of(v2.hi, v3.hi, 0x7632));
            }
        }
        slot ^= 1;
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float all = total[r] + from_lane_xor(total[r], 1);
        all += from_lane_xor(all, 2);
        if (query0 + warp_id() * 16 + r * 8 + i >= queries) continue;
        // Column 2 j of the four tiles together is values 8 j to 8 j + 3, column 2 j + 1 the next four.
#pragma unroll
        for (int b = 0; b < DIM / 32; b++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                u32 d = b * 32 + 8 * j + 4 * c;
                if (d >= head_dim) continue;
                Quad four = {__float_as_uint(sums[b][0][2 * r + c] / all), __float_as_uint(sums[b][1][2 * r + c] / all),
                             __float_as_uint(sums[b][2][2 * r + c] / all), __float_as_uint(sums[b][3][2 * r + c] / all)};
                *(Quad*)(p.out + at[r] + d) = four;
            }
    }
}

KERNEL __launch_bounds__(128, 3) attend_prompt64(const Prompt p) { start(), attend_prompt<64>(p); }
KERNEL __launch_bounds__(128, 2) attend_prompt128(const Prompt p) { start(), attend_prompt<128>(p); }
