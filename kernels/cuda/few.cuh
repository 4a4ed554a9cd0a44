// Up to 8 tokens times quantized weights, at the memory's pace.
//
//   outputs   block x: `share` tiles of 16, of up to three weights one after another, or of a gate and its factor in turn
//   tokens    all
//   K         warps take a tile's units in turn; their sums are added in one order
//
// Each warp copies what it will need to a ring in shared memory, DEPTH units ahead and across tiles: codes, and beside them
// the bytes that their scales are made of. Nothing of that depends on an earlier kernel, so it is on its way before the
// kernel waits for the one before it.
//
// Rows are ready in half precision, or the block makes them so itself: each row (normed, if there is a gain) is multiplied
// by a power of two, rounded and kept in shared memory. That costs every block a look at every row, and saves a launch.
//
// Codes of a table are looked up two at a time: entry c of 256 is the pair of halves that byte c stands for. Every entry
// is there 32 times, once for each lane's bank, so that no two lanes ever wait for each other; with the entries 256 bytes
// apart, a byte of the codes and a lane's place make the address in one instruction. Rows lie between the entries.

#include "linear.cuh"

// Units of a warp that are on their way; the host knows it too, and the sizes of what lies beside the ring.
static const int DEPTH = 4;
static const u32 SCRATCH_BYTES = 256;

// What scales are stored as, known when the kernel is compiled: halves; codes with one number at the second level for each
// row; anything, with minimums or integer zero points too.
enum ScaleKind { SCALE_F16, SCALE_CODED, SCALE_ANY };

// Byte `SELECT` & 3 of `bytes` less `bias`, exactly; `shifted_bias` is bias + 2^23.
template <u32 SELECT> DEVICE float byte_less(u32 bytes, float shifted_bias) {
    return __uint_as_float(bytes_of(bytes, 0x4b000000, SELECT)) - shifted_bias;
}

// Numbers of rows i and i+8 from the bytes of one group: 8 pairs, and 8 pairs of the second level.
DEVICE FloatPair number_of(const Numbers& numbers, const u8* first, const u8* second, u32 i) {
    if (numbers.kind == NUMBERS_F16) return floats_of(((const u32*)first)[i]);
    if (numbers.kind == NUMBERS_F32) return ((const FloatPair*)first)[i];
    u32 codes = ((const u16*)first)[i];
    FloatPair d = ((const FloatPair*)second)[i];
    d.lo *= (float)(codes & 255) - numbers.bias;
    d.hi *= (float)(codes >> 8) - numbers.bias;
    return d;
}

// Bytes of the numbers of one group of a tile.
DEVICE u32 record_bytes(u32 kind) { return kind == NUMBERS_F16 ? 32 : kind == NUMBERS_F32 ? 64 : 16; }

// One of three, without an array.
template <typename T> DEVICE T of_three(u32 which, T first, T second, T third) {
    return which == 0 ? first : which == 1 ? second : third;
}

template <int CODES, int SCALE, int WARPS> DEVICE void few(const Product& p) {
    extern __shared__ __align__(16) u8 shared[];
    constexpr bool IS_TABLE = CODES == CODES_W4_TABLE;
    constexpr int Q = QUADS<CODES>;
    constexpr u32 THREADS = WARPS * 32;
    constexpr u32 BESIDE = SCALE == SCALE_CODED ? 32 : SCALE == SCALE_F16 ? 64 : 512; // bytes of a unit's scales
    constexpr u32 SLOT = Q * 512 + BESIDE;
    constexpr u32 UNIT_STRIDE = IS_TABLE ? 256 : 128;                             // bytes between two units of a row
    const Weight& weight = p.weight;
    u32 lane = lane_id(), warp = warp_id(), i = lane / 4, j = lane % 4, units = weight.units, m = p.m;
    u32 gated = p.gate == GATE_NONE ? 0 : 1;
    u32 first = blockIdx.x * p.share, own = min(p.share, p.tiles - first), count = own << gated;

    u8* halves = shared + (IS_TABLE ? 128 : 0);
    u8* rings = shared + (IS_TABLE ? TABLE_BYTES : p.rows ? m * units * 128 : 0);
    float* scratch = (float*)(rings + WARPS * DEPTH * SLOT); // 8 factors, then two numbers a warp
    float* parts = scratch + SCRATCH_BYTES / 4;              // (tile, warp, token, row)
    u32 token_stride = m == 1 ? 16 : 20;                     // four lanes that differ in tokens hit different banks

    // Which weight the block's tile `s` is of, and which of its tiles.
    struct Place {
        u32 which, tile;
    };
    auto place_of = [&](u32 s) {
        Place at = {0, first + s};
        if (gated) {
            at = {s & 1, first + s / 2};
        } else if (at.tile >= p.also[1].first) {
            at = {2, at.tile - p.also[1].first};
        } else if (at.tile >= p.also[0].first) {
            at = {1, at.tile - p.also[0].first};
        }
        return at;
    };
    auto numbers_of = [&](u32 which) {
        return of_three((u32)which, &weight.scales, &p.also[0].scales, &p.also[1].scales);
    };

    // What the lane copies beside the codes: `record` of an array that has one a group or a span.
    bool copies = lane < BESIDE / 16;
    u32 half = SCALE == SCALE_CODED ? lane : SCALE == SCALE_F16 ? lane / 2 : lane / 4 % 2;
    u32 record = SCALE == SCALE_CODED ? 16 : 32;
    bool by_span = false;
    if (SCALE == SCALE_ANY) {
        u32 role = lane / 8; // scales, their second level, minimums or zero points, the second level of minimums
        const Numbers& numbers = role < 2 ? weight.scales : weight.mins;
        by_span = role % 2 == 1;
        record = by_span ? 64 : role == 2 && weight.zero_kind == ZERO_INT ? 16 : record_bytes(numbers.kind);
        copies = lane % 4 * 16 < record && (!by_span || numbers.kind == NUMBERS_CODED) &&
                 (role < 2 || weight.zero_kind == ZERO_MIN || (role == 2 && weight.zero_kind == ZERO_INT));
    }
    u32 span_magic = SCALE == SCALE_ANY ? (lane < 16 ? weight.scales.span_magic : weight.mins.span_magic) : 0;
    u32 records = by_span ? (lane < 16 ? weight.scales.spans : weight.mins.spans) : weight.groups;

    u32 fetch_s = 0, fetch_unit = warp;
    const Quad* codes = nullptr;
    const u8* beside = nullptr;
    auto open = [&](u32 s) {
        Place at = place_of(s);
        codes = of_three(at.which, weight.codes, p.also[0].codes, p.also[1].codes) + (u64)at.tile * units * (Q * 32) + lane;
        const void* base = of_three(at.which, weight.scales.first, p.also[0].scales.first, p.also[1].scales.first);
        if (SCALE == SCALE_ANY) {
            if (lane >= 8)
                base = of_three<const void*>(at.which, weight.scales.second, p.also[0].scales.second, p.also[1].scales.second);
            if (lane >= 16) base = of_three(at.which, weight.mins.first, p.also[0].mins.first, p.also[1].mins.first);
            if (lane >= 16 && weight.zero_kind == ZERO_INT)
                base = of_three<const void*>(at.which, weight.zeros, p.also[0].zeros, p.also[1].zeros);
            if (lane >= 24)
                base = of_three<const void*>(at.which, weight.mins.second, p.also[0].mins.second, p.also[1].mins.second);
        }
        u32 part = SCALE == SCALE_CODED ? 0 : SCALE == SCALE_F16 ? lane % 2 : lane % 4;
        beside = (const u8*)base + (u64)at.tile * records * record + part * 16;
    };
    u32 ring = shared_address(rings) + warp * (DEPTH * SLOT) + lane * 16;
    auto fetch = [&](u32 slot) {
        if (fetch_unit < units && fetch_s < count) {
            u32 to = ring + slot * SLOT;
#pragma unroll
            for (int q = 0; q < Q; q++) copy_async(to + q * 512, codes + (fetch_unit * Q + q) * 32, 16);
            if (copies) {
                u32 at = divide(2 * fetch_unit + half, weight.group_magic);
                if (SCALE == SCALE_ANY && by_span) at = divide(at, span_magic);
                copy_async(to + Q * 512, beside + at * record, 16);
            }
            fetch_unit += WARPS;
            if (fetch_unit >= units) {
                fetch_unit = warp, fetch_s++;
                if (fetch_s < count) open(fetch_s);
            }
        }
        copy_commit();
    };
    open(0);
#pragma unroll
    for (u32 d = 0; d < DEPTH; d++) fetch(d);
    let_next_start();

    u32 lane_bytes = lane * 4;
    if (IS_TABLE) fill_table<THREADS>(shared, weight);

    // What the thread's first output is made with, of the gate and of its factor; asked for ahead.
    u32 outputs = own * 16 * m;
    float second[2], bias[2], before = 0.0f;
    float* to = nullptr;
    auto constants_of = [&](u32 out) {
        u32 row_of_block = out % (own * 16), token = out / (own * 16), r = row_of_block % 16;
        to = nullptr;
#pragma unroll
        for (u32 g = 0; g < 2; g++) {
            second[g] = 1.0f, bias[g] = 0.0f;
            if (g > gated) continue;
            Place at = place_of((row_of_block / 16 << gated) + g);
            u32 row = at.tile * 16 + r;
            u32 n = of_three(at.which, weight.n, p.also[0].n, p.also[1].n);
            if (row >= n) continue;
            if (g == 0) to = of_three(at.which, p.out, p.also[0].out, p.also[1].out) + (u64)token * n + row;
            const float* biases = of_three(at.which, p.bias, p.also[0].bias, p.also[1].bias);
            if (biases) bias[g] = biases[row];
            if (SCALE == SCALE_CODED)
                second[g] = ((const float*)numbers_of(at.which)->second)[at.tile * 16 + r % 8 * 2 + r / 8];
        }
    };
    if (threadIdx.x < outputs) constants_of(threadIdx.x);

    wait_for_previous();
    if (p.accumulate && to) before = *to;
    const u8* x; // of the lane's token
    u32 unit_stride = p.rows ? UNIT_STRIDE : 128, swizzle = 0;
    u32 token = i < m ? i : 0;
    if (p.rows) {
        // Chunk c of an odd row lies at c ^ 4, so that two rows' chunks fill all banks.
        constexpr int READS = 4;
        u32 row = warp / p.row_warps, at0 = warp % p.row_warps * 32 + lane, step = p.row_warps * 32;
        float v[READS][4];
        float most = 0.0f, sum = 0.0f;
        const float* from = p.rows + (u64)row * p.k;
#pragma unroll
        for (int r = 0; r < READS; r++) {
            u32 at = (r * step + at0) * 4;
            Quad q = {0, 0, 0, 0};
            if (row < m && at < p.k) q = *(const Quad*)(from + at);
            v[r][0] = __uint_as_float(q.x), v[r][1] = __uint_as_float(q.y);
            v[r][2] = __uint_as_float(q.z), v[r][3] = __uint_as_float(q.w);
        }
        if (p.gain) {
#pragma unroll
            for (int r = 0; r < READS; r++) {
                u32 at = (r * step + at0) * 4;
                if (at >= p.k) continue;
                Quad q = *(const Quad*)(p.gain + at);
#pragma unroll
                for (int e = 0; e < 4; e++) sum = fmaf(v[r][e], v[r][e], sum);
                v[r][0] *= __uint_as_float(q.x), v[r][1] *= __uint_as_float(q.y);
                v[r][2] *= __uint_as_float(q.z), v[r][3] *= __uint_as_float(q.w);
            }
        }
#pragma unroll
        for (int r = 0; r < READS; r++)
#pragma unroll
            for (int e = 0; e < 4; e++) most = larger(most, magnitude(v[r][e]));
        sum = warp_sum(sum);
        most = warp_max(most);
        if (lane == 0) scratch[8 + 2 * warp] = sum, scratch[9 + 2 * warp] = most;
        __syncthreads();
        sum = most = 0.0f;
        u32 warp0 = row * p.row_warps;
        for (u32 w = 0; w < p.row_warps; w++) sum += scratch[8 + 2 * (warp0 + w)], most = larger(most, scratch[9 + 2 * (warp0 + w)]);
        float scale = p.gain ? 1.0f / sqrtf(sum / (float)p.k + p.eps) : 1.0f;
        Power power = power_for(most * scale);
        if (row < m) {
            struct __align__(8) Halves {
                u32 lo, hi;
            };
#pragma unroll
            for (int r = 0; r < READS; r++) {
                u32 at = (r * step + at0) * 4;
                if (at < units * 64) {
                    Halves h = {half2_of(v[r][0] * scale * power.power, v[r][1] * scale * power.power),
                                half2_of(v[r][2] * scale * power.power, v[r][3] * scale * power.power)};
                    u8* place = halves + (row * units + at / 64) * UNIT_STRIDE;
                    *(Halves*)(place + (at % 64 / 8 ^ (row & 1) * 4) * 16 + at % 8 * 2) = h;
                }
            }
            if (at0 == 0) scratch[row] = power.reciprocal;
        }
        x = halves + token * units * UNIT_STRIDE;
        swizzle = (token & 1) * 64;
    } else {
        x = (const u8*)(p.x + (u64)token * units * 64);
        if (threadIdx.x < m) scratch[threadIdx.x] = p.factor[threadIdx.x];
    }
    __syncthreads();

    // Integer zero points are taken off as minimums; the constant keeps levels small.
    float zero = SCALE == SCALE_ANY && weight.zero_kind == ZERO_INT ? (CODES == CODES_W8 ? 128.0f : 8.0f) : weight.zero;
    Zeros zeros = zeros_of<CODES>(zero, zero);
    float shifted_bias = weight.scales.bias + 8388608.0f;
    Quad ahead[2] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
    bool is_there = i < m;
    auto look_ahead = [&](u32 unit) {
        if (!is_there) return;
        ahead[0] = *(const Quad*)(x + unit * unit_stride + (j * 16 ^ swizzle));
        ahead[1] = *(const Quad*)(x + unit * unit_stride + (j * 16 + 64 ^ swizzle));
    };
    if (warp < units) look_ahead(warp);
    u32 slot = 0;
#pragma unroll 1
    for (u32 s = 0; s < count; s++) {
        float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
        for (u32 unit = warp; unit < units; unit += WARPS) {
            copy_wait<DEPTH - 1>();
            warp_meets();
            const u8* place = rings + (warp * DEPTH + slot) * SLOT;
            Quad own_codes[Q], b[2] = {ahead[0], ahead[1]};
#pragma unroll
            for (int q = 0; q < Q; q++) own_codes[q] = ((const Quad*)place)[q * 32 + lane];
            look_ahead(unit + WARPS < units ? unit + WARPS : warp);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                u32 a[2][4];
                const Quad& quad = own_codes[Q == 2 ? h : 0];
                if (IS_TABLE) {
                    u32 words[2] = {h == 0 ? quad.x : quad.z, h == 0 ? quad.y : quad.w};
#pragma unroll
                    for (u32 step = 0; step < 2; step++)
#pragma unroll
                        for (u32 e = 0; e < 4; e++)
                            a[step][e] = *(const u32*)(shared + bytes_of(words[step], lane_bytes, 0x5504 | e << 4));
                } else {
                    levels_of_half<CODES>(a, quad, h, zeros, weight);
                }
                float sum[4];
                mma_first(sum, a[0], b[h].x, b[h].y);
                mma(sum, a[1], b[h].z, b[h].w);
                const u8* numbers = place + Q * 512;
                FloatPair scale;
                if (SCALE == SCALE_CODED) {
                    u32 pair = ((const u16*)(numbers + h * 16))[i];
                    scale.lo = byte_less<0x7440>(pair, shifted_bias), scale.hi = byte_less<0x7441>(pair, shifted_bias);
                } else if (SCALE == SCALE_F16) {
                    scale = floats_of(((const u32*)(numbers + h * 32))[i]);
                } else {
                    scale = number_of(weight.scales, numbers + h * 64, numbers + 128 + h * 64, i);
                }
                add_scaled(sums, sum, scale);
                if (SCALE == SCALE_ANY && weight.zero_kind != ZERO_CONST) {
                    FloatPair min;
                    if (weight.zero_kind == ZERO_INT) {
                        u32 pair = ((const u16*)(numbers + 256 + h * 64))[i];
                        min.lo = scale.lo * (zero - (float)(pair & 255)), min.hi = scale.hi * (zero - (float)(pair >> 8));
                    } else {
                        min = number_of(weight.mins, numbers + 256 + h * 64, numbers + 384 + h * 64, i);
                    }
                    add_minimums(sums, b[h], min);
                }
            }
            warp_meets(); // all lanes have read what the next copy overwrites
            fetch(slot);
            slot = (slot + 1) % DEPTH;
        }
        float* part = parts + (s * WARPS + warp) * m * token_stride + i;
        if (2 * j < m) part[2 * j * token_stride] = sums[0], part[2 * j * token_stride + 8] = sums[2];
        if (2 * j + 1 < m) part[(2 * j + 1) * token_stride] = sums[1], part[(2 * j + 1) * token_stride + 8] = sums[3];
    }
    copy_wait<0>();
    __syncthreads();

#pragma unroll 1
    for (u32 out = threadIdx.x; out < outputs; out += THREADS) {
        if (out != threadIdx.x) {
            constants_of(out);
            if (p.accumulate && to) before = *to;
        }
        if (!to) continue;
        u32 row = out % (own * 16), token = out / (own * 16);
        float y[2];
#pragma unroll
        for (u32 g = 0; g < 2; g++) {
            const float* part = parts + ((row / 16 << gated) + (g & gated)) * WARPS * m * token_stride + token * token_stride + row % 16;
            float sum = 0.0f;
#pragma unroll
            for (u32 w = 0; w < WARPS; w++) sum += part[w * m * token_stride];
            y[g] = fmaf(sum * second[g], scratch[token], bias[g]);
            if (!gated) break;
        }
        if (p.gate == GATE_SILU) y[0] = silu(y[0]) * y[1];
        if (p.gate == GATE_GELU) y[0] = gelu(y[0]) * y[1];
        *to = p.accumulate ? before + y[0] : y[0];
    }
}

// BLOCKS on a processor at a time, so that the next kernel's block has room beside this one's.
#define FEW(NAME, CODES, SCALE, WARPS, BLOCKS)                                                                         \
    KERNEL __launch_bounds__(WARPS * 32, BLOCKS) NAME(const Product p) { few<CODES, SCALE, WARPS>(p); }

#define FEW_OF(SUFFIX, CODES, ANY_WARPS)                                                                               \
    FEW(few_f16_##SUFFIX, CODES, SCALE_F16, 16, 2)                                                                     \
    FEW(few_f16_short_##SUFFIX, CODES, SCALE_F16, 8, 4)                                                                \
    FEW(few_coded_##SUFFIX, CODES, SCALE_CODED, 16, 2)                                                                 \
    FEW(few_coded_short_##SUFFIX, CODES, SCALE_CODED, 8, 4)                                                            \
    FEW(few_any_##SUFFIX, CODES, SCALE_ANY, ANY_WARPS, 2)
