// 9 to 64 tokens times a quantized weight, at the memory's pace.
//
//   outputs   block x: TILES tiles of 16
//   tokens    block y: 8 * COLUMNS
//   K         warps take its units in turn; their sums are added in one order
//
// A lane holds the codes of its next DEPTH units in registers, so that memory is always asked for something; activations
// come from the cache. Scales are made ready first, in single precision for every 32 values, whatever they are stored as:
// the loop knows one kind of scale, and its addresses are constants. Integer zero points become minimums there.
//
// Codes of a table are looked up two at a time: entry c of 256 is the pair of halves that byte c stands for. Every entry
// is there 32 times, once for each lane's bank, so that no two lanes ever wait for each other; with the entries 256 bytes
// apart, a byte of the codes and a lane's place make the address in one instruction. Scales lie between the entries.

#include "linear.cuh"

// Units whose scales are in shared memory at a time, all tiles of a block together; the host knows it too.
static const u32 PHASE = 256;
// Floats between two tokens' sums in shared memory: four lanes that differ in tokens hit different banks.
static const int TOKEN_STRIDE = 20;

// Loads four things and puts them where they belong, then the next four: a thread waits for memory once every four.
template <u32 THREADS, typename Load, typename Put> DEVICE void by_fours(u32 count, Load load, Put put) {
#pragma unroll 1
    for (u32 first = threadIdx.x; first < count; first += 4 * THREADS) {
        decltype(load(0)) loaded[4];
#pragma unroll
        for (u32 r = 0; r < 4; r++)
            if (first + r * THREADS < count) loaded[r] = load(first + r * THREADS);
#pragma unroll
        for (u32 r = 0; r < 4; r++)
            if (first + r * THREADS < count) put(first + r * THREADS, loaded[r]);
    }
}

struct CodedPair {
    u32 codes;
    FloatPair second;
};

// Puts the numbers of `count` (32 values, row pair i) of one tile, from 32 values `block0` on, where `put` says, in single
// precision.
template <u32 THREADS, typename Put>
DEVICE void numbers_ready(const Weight& weight, const Numbers& numbers, u32 tile, u32 block0, u32 count, Put put) {
    u32 base = tile * weight.groups, i = threadIdx.x % 8;
    auto group = [&](u32 at) { return divide(block0 + at / 8, weight.group_magic); };
    if (numbers.kind == NUMBERS_F16) {
        const u32* from = (const u32*)numbers.first + base * 8 + i;
        by_fours<THREADS>(count, [&](u32 at) { return from[group(at) * 8]; },
                          [&](u32 at, u32 pair) { put(at, floats_of(pair)); });
    } else if (numbers.kind == NUMBERS_F32) {
        const FloatPair* from = (const FloatPair*)numbers.first + base * 8 + i;
        by_fours<THREADS>(count, [&](u32 at) { return from[group(at) * 8]; }, put);
    } else {
        const u16* from = (const u16*)numbers.first + base * 8 + i;
        const FloatPair* second = numbers.second + tile * numbers.spans * 8 + i;
        auto load = [&](u32 at) {
            u32 g = group(at);
            CodedPair pair = {from[g * 8], second[divide(g, numbers.span_magic) * 8]};
            return pair;
        };
        by_fours<THREADS>(count, load, [&](u32 at, const CodedPair& pair) {
            FloatPair number;
            number.lo = __fmul_rn((float)(pair.codes & 255) - numbers.bias, pair.second.lo);
            number.hi = __fmul_rn((float)(pair.codes >> 8) - numbers.bias, pair.second.hi);
            put(at, number);
        });
    }
}

template <int CODES, int COLUMNS, int TILES, int WARPS, int DEPTH> DEVICE void gemv(const Product& p) {
    extern __shared__ __align__(16) u8 shared[];
    constexpr bool IS_TABLE = CODES == CODES_W4_TABLE;
    constexpr int Q = QUADS<CODES>;
    constexpr u32 THREADS = WARPS * 32, PHASE_UNITS = PHASE / TILES;
    // Bytes between the scales of two units; within one: (half, row i) pairs.
    constexpr u32 STRIDE = IS_TABLE ? 256 : 128, START = IS_TABLE ? 128 : 0;
    static_assert(PHASE_UNITS % (DEPTH * WARPS) == 0, "a warp's place in its ring is the same in every phase");
    const Weight& weight = p.weight;
    u32 lane = lane_id(), warp = warp_id(), i = lane / 4, j = lane % 4, units = weight.units;
    u32 tile0 = blockIdx.x * TILES, token0 = blockIdx.y * (8 * COLUMNS);
    u32 tiles = (weight.n + 15) / 16;
    u32 held = min(units, PHASE_UNITS);
    bool has_min = weight.zero_kind != ZERO_CONST;
    u8* mins = shared + (IS_TABLE ? TABLE_BYTES : TILES * held * 128);

    // Tiles past the last one compute it again, and are not written.
    const Quad* codes[TILES];
#pragma unroll
    for (int t = 0; t < TILES; t++)
        codes[t] = weight.codes + ((u64)min(tile0 + t, tiles - 1) * units + warp) * (Q * 32) + lane;
    Quad ring[DEPTH][TILES][Q];
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
        if (warp + d * WARPS < units)
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int q = 0; q < Q; q++) ring[d][t][q] = load_once(codes[t] + (d * WARPS * Q + q) * 32);
    let_next_start();

    u32 lane_bytes = lane * 4;
    if (IS_TABLE) fill_table<THREADS>(shared, weight);

    const Quad* x[COLUMNS];
    bool is_there[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        u32 token = token0 + c * 8 + i;
        is_there[c] = token < p.m;
        x[c] = (const Quad*)(p.x + (u64)(is_there[c] ? token : 0) * units * 64) + warp * 8 + j;
    }
    float sums[TILES][COLUMNS][4];
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
#pragma unroll
            for (int e = 0; e < 4; e++) sums[t][c][e] = 0.0f;
    // Integer zero points are taken off as minimums; the constant keeps levels small.
    float zero = weight.zero_kind == ZERO_INT ? (CODES == CODES_W8 ? 128.0f : 8.0f) : weight.zero;
    Zeros zeros = zeros_of<CODES>(zero, zero);

    // The scales of units from `begin` on.
    auto make_ready = [&](u32 begin) {
        u32 count = min(units - begin, held) * 16;
#pragma unroll 1
        for (u32 t = 0; t < TILES; t++) {
            u32 tile = min(tile0 + t, tiles - 1);
            auto scale_at = [&](u32 at) {
                return (FloatPair*)(shared + (t * held + at / 16) * STRIDE + START + at % 16 * 8);
            };
            auto min_at = [&](u32 at) { return (FloatPair*)(mins + (t * held + at / 16) * 128 + at % 16 * 8); };
            numbers_ready<THREADS>(weight, weight.scales, tile, 2 * begin, count,
                                   [&](u32 at, FloatPair number) { *scale_at(at) = number; });
            if (weight.zero_kind == ZERO_MIN)
                numbers_ready<THREADS>(weight, weight.mins, tile, 2 * begin, count,
                                       [&](u32 at, FloatPair number) { *min_at(at) = number; });
            if (weight.zero_kind == ZERO_INT)
#pragma unroll 1
                for (u32 at = threadIdx.x; at < count; at += THREADS) {
                    u32 group = divide(2 * begin + at / 8, weight.group_magic);
                    u32 pair = weight.zeros[(tile * weight.groups + group) * 8 + at % 8];
                    FloatPair number = *scale_at(at); // the thread's own
                    number.lo *= zero - (float)(pair & 255);
                    number.hi *= zero - (float)(pair >> 8);
                    *min_at(at) = number;
                }
        }
    };

    u32 at = 0; // of the phase: bytes between its first unit's scales and those of the warp's next unit
    auto step = [&](int d, u32 unit) {
        Quad b[COLUMNS];
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                b[c] = {0, 0, 0, 0};
                if (is_there[c]) b[c] = x[c][d * WARPS * 8 + h * 4];
            }
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const Quad& own = ring[d][t][Q == 2 ? h : 0];
                u32 a[2][4];
                if (IS_TABLE) {
                    u32 words[2] = {h == 0 ? own.x : own.z, h == 0 ? own.y : own.w};
#pragma unroll
                    for (u32 s = 0; s < 2; s++)
#pragma unroll
                        for (u32 e = 0; e < 4; e++)
                            a[s][e] = *(const u32*)(shared + bytes_of(words[s], lane_bytes, 0x5504 | e << 4));
                } else {
                    levels_of_half<CODES>(a, own, h, zeros, weight);
                }
                // The last of these codes was taken: the place is free.
                if (h == 1 && unit + DEPTH * WARPS < units)
#pragma unroll
                    for (int q = 0; q < Q; q++)
                        ring[d][t][q] = load_once(codes[t] + ((d + DEPTH) * WARPS * Q + q) * 32);
                u32 place = t * held + d * WARPS;
                FloatPair scale = *(const FloatPair*)(shared + at * STRIDE + place * STRIDE + START + h * 64 + i * 8);
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) {
                    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                    mma(sum, a[0], b[c].x, b[c].y);
                    mma(sum, a[1], b[c].z, b[c].w);
                    add_scaled(sums[t][c], sum, scale);
                }
                if (has_min) {
                    FloatPair min = *(const FloatPair*)(mins + at * 128 + place * 128 + h * 64 + i * 8);
#pragma unroll
                    for (int c = 0; c < COLUMNS; c++) add_minimums(sums[t][c], b[c], min);
                }
            }
        }
    };

    u32 unit = warp;
    for (u32 begin = 0; begin < units; begin += held) {
        if (begin > 0) __syncthreads(); // every warp has read the scales before
        make_ready(begin);
        if (begin == 0) wait_for_previous();
        __syncthreads();
        u32 end = min(begin + held, units);
        at = warp;
#pragma unroll 1
        for (; unit + (DEPTH - 1) * WARPS < end; unit += DEPTH * WARPS, at += DEPTH * WARPS) {
#pragma unroll
            for (int d = 0; d < DEPTH; d++) step(d, unit + d * WARPS);
#pragma unroll
            for (int t = 0; t < TILES; t++) codes[t] += DEPTH * WARPS * Q * 32;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) x[c] += DEPTH * WARPS * 8;
        }
    }
    // What is left of the last phase.
#pragma unroll
    for (int d = 0; d < DEPTH - 1; d++)
        if (unit + d * WARPS < units) step(d, unit + d * WARPS);

    float* parts = (float*)shared;
    constexpr u32 ROWS = TILES * 16;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        __syncthreads(); // the sums lie where scales and the sums before were
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            float* part = parts + (warp * TILES + t) * (8 * TOKEN_STRIDE);
            part[(2 * j) * TOKEN_STRIDE + i] = sums[t][c][0];
            part[(2 * j + 1) * TOKEN_STRIDE + i] = sums[t][c][1];
            part[(2 * j) * TOKEN_STRIDE + i + 8] = sums[t][c][2];
            part[(2 * j + 1) * TOKEN_STRIDE + i + 8] = sums[t][c][3];
        }
        __syncthreads();
        for (u32 out = threadIdx.x; out < 8 * ROWS; out += THREADS) {
            u32 token = token0 + c * 8 + out / ROWS, r = out % ROWS, row = tile0 * 16 + r;
            if (token < p.m && row < weight.n) {
                float sum = 0.0f;
#pragma unroll
                for (u32 w = 0; w < WARPS; w++)
                    sum += parts[(w * TILES + r / 16) * (8 * TOKEN_STRIDE) + out / ROWS * TOKEN_STRIDE + r % 16];
                write_output(p, token, row, sum);
            }
        }
    }
}

// BLOCKS on a processor at a time: the registers that leaves a thread are the most it may use.
#define GEMV(NAME, CODES, COLUMNS, TILES, WARPS, DEPTH, BLOCKS)                                                        \
    KERNEL __launch_bounds__(WARPS * 32, BLOCKS) NAME(const Product p) {                                               \
        gemv<CODES, COLUMNS, TILES, WARPS, DEPTH>(p);                                                                  \
    }
