// More than 32 tokens times a quantized weight on the tensor cores of compute capability 9.0a: four warps multiply 64 outputs
// with up to 128 tokens at a time, weights from registers and activations from shared memory, so a code is turned into its
// level once for all of these tokens and activations are read by no thread.
//
//   outputs   block x: OUTS warp groups of 64
//   tokens    block y: N
//   K         block z: a part of the units, parts are added afterwards in one order; WAYS warp groups of a block that have
//             the same outputs take the part's units in turn, their sums are added in one order at the end
//
// Activations and codes of STAGES times WAYS units are on their way to shared memory at any time. Codes go through shared
// memory only to wait there without registers: a lane reads back what it copied itself. The sum of 32 values is scaled
// into single precision before the next one begins, as in the other kernels.

#include "linear.cuh"
#include "warpgroup.cuh"

// What scales are stored as, known when the kernel is compiled: halves; codes with one number at the second level for each
// row; or any of all kinds, and zero points and minimums then. Without these, zero points are constant.
enum ScaleKind { SCALES_F16 = 0, SCALES_CODED = 1, SCALES_ANY = 2 };

// Numbers of rows i and i+8 for one half of a unit, as they are stored.
struct Stored {
    u32 first;
    FloatPair second;
};

// `span` is their number at the second level where each row has one.
template <int SCALES> DEVICE Stored load_number(const Numbers& numbers, u32 tile, u32 groups, u32 group, u32 i) {
    Stored d;
    u32 at = (tile * groups + group) * 8 + i;
    if (SCALES == SCALES_F16 || (SCALES == SCALES_ANY && numbers.kind == NUMBERS_F16)) {
        d.first = ((const u32*)numbers.first)[at];
    } else if (SCALES == SCALES_CODED || numbers.kind == NUMBERS_CODED) {
        d.first = ((const u16*)numbers.first)[at];
        if (SCALES == SCALES_ANY)
            d.second = numbers.second[(tile * numbers.spans + divide(group, numbers.span_magic)) * 8 + i];
    } else {
        d.second = ((const FloatPair*)numbers.first)[at];
    }
    return d;
}

template <int SCALES> DEVICE FloatPair number_of(const Numbers& numbers, const Stored& stored, const FloatPair& span) {
    if (SCALES == SCALES_F16 || (SCALES == SCALES_ANY && numbers.kind == NUMBERS_F16)) return floats_of(stored.first);
    if (SCALES == SCALES_ANY && numbers.kind == NUMBERS_F32) return stored.second;
    FloatPair second = SCALES == SCALES_CODED ? span : stored.second, d;
    d.lo = __fmul_rn((float)(stored.first & 255) - numbers.bias, second.lo);
    d.hi = __fmul_rn((float)(stored.first >> 8) - numbers.bias, second.hi);
    return d;
}

template <int CODES, int N, int OUTS, int WAYS> struct WgmmaStage {
    static const u32 ROWS = N * 128;            // bytes of a unit's activations
    static const u32 WARP = QUADS<CODES> * 512; // bytes of a unit's codes of a warp
    static const u32 CODES_FROM = WAYS * ROWS;
    static const u32 BYTES = CODES_FROM + OUTS * WAYS * 4 * WARP;
};

template <int CODES, int SCALES, int N, int OUTS, int WAYS, int STAGES> DEVICE void wgmma(const Product& p) {
    extern __shared__ __align__(1024) u8 shared[];
    typedef WgmmaStage<CODES, N, OUTS, WAYS> Stage;
    constexpr int Q = QUADS<CODES>, COLUMNS = N / 8;
    // Threads that share activations, and 16-byte chunks of a unit's that each copies.
    constexpr u32 TEAM = OUTS * 128, CHUNKS = N * 8 / TEAM;
    static_assert(N * 8 % TEAM == 0, "every thread copies as many chunks");
    const Weight& weight = p.weight;
    u32 lane = lane_id(), warp = warp_id(), i = lane / 4, j = lane % 4, units = weight.units;
    u32 warp_group = warp / 4, way = warp_group % WAYS, out_group = warp_group / WAYS;
    u32 token0 = blockIdx.y * N;
    u32 begin = blockIdx.z * p.split_units, end = min(begin + p.split_units, units);
    u32 turns = (end - begin + WAYS - 1) / WAYS;
    // Tiles past the last one compute it again, and are not written.
    u32 own_tile = (blockIdx.x * OUTS + out_group) * 4 + warp % 4;
    u32 tile = min(own_tile, (weight.n + 15) / 16 - 1);

    u32 base = shared_address(shared);
    u32 member = out_group * 128 + threadIdx.x % 128, chunk = member % 8;
    u32 x_from[CHUNKS]; // halves between a row's and the batch's beginning; ~0: no such row
#pragma unroll
    for (int part = 0; part < CHUNKS; part++) {
        u32 token = token0 + part * (TEAM / 8) + member / 8;
        x_from[part] = token < p.m ? token * units * 64 + chunk * 8 : ~0u;
    }
    u32 x_to = base + way * Stage::ROWS + member / 8 * 128 + (chunk ^ member / 8 % 8) * 16;
    u32 codes_to = base + Stage::CODES_FROM + warp * Stage::WARP + lane * 16;
    const Quad* codes_from = weight.codes + (u64)tile * units * Q * 32 + lane;
    auto unit_of = [&](u32 turn) { return begin + turn * WAYS + way; };
    auto fetch = [&](u32 turn, u32 slot) {
        u32 unit = unit_of(turn), to = slot * Stage::BYTES;
        if (unit < end) {
#pragma unroll
            for (int part = 0; part < CHUNKS; part++) {
                bool is_there = x_from[part] != ~0u;
                const u16* from = p.x + ((is_there ? x_from[part] : 0) + unit * 64);
                copy_async(x_to + to + part * (TEAM * 16), from, is_there ? 16 : 0);
            }
#pragma unroll
            for (int q = 0; q < Q; q++) copy_async(codes_to + to + q * 512, codes_from + (unit * Q + q) * 32, 16);
        }
        copy_commit();
    };
    bool has_ints = SCALES == SCALES_ANY && weight.zero_kind == ZERO_INT;
    bool has_mins = SCALES == SCALES_ANY && weight.zero_kind == ZERO_MIN;
    FloatPair span = {0.0f, 0.0f};
    if (SCALES == SCALES_CODED) span = weight.scales.second[tile * 8 + i];
    Stored scales[2], mins[2];
    u32 ints[2];
    auto fetch_numbers = [&](u32 turn) {
        u32 unit = unit_of(turn);
        if (unit >= end) return;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 group = divide(2 * unit + h, weight.group_magic);
            scales[h] = load_number<SCALES>(weight.scales, tile, weight.groups, group, i);
            if (has_mins) mins[h] = load_number<SCALES>(weight.mins, tile, weight.groups, group, i);
            if (has_ints) ints[h] = weight.zeros[(tile * weight.groups + group) * 8 + i];
        }
    };

    float sums[COLUMNS][4], sum[COLUMNS][4];
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
#pragma unroll
        for (int e = 0; e < 4; e++) sums[c][e] = 0.0f, sum[c][e] = 0.0f;
    Zeros constant = zeros_of<CODES>(weight.zero, weight.zero);
    // In a register from here on: a product's registers are written before its fence.
    u32 one;
    asm volatile("mov.b32 %0, 0x3c003c00;" : "=r"(one));
    const u32 ones[4] = {one, one, one, one};

    fetch_numbers(0);
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) fetch(s, s);
    u32 slot = 0, free_slot = STAGES - 1;
#pragma unroll 1
    for (u32 turn = 0; turn < turns; turn++) {
        FloatPair scale[2], min[2];
        Zeros zeros[2] = {constant, constant};
        bool is_there = unit_of(turn) < end;
        if (is_there)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                scale[h] = number_of<SCALES>(weight.scales, scales[h], span);
                if (has_mins) min[h] = number_of<SCALES>(weight.mins, mins[h], span);
                if (has_ints) zeros[h] = zeros_of<CODES>((float)(ints[h] & 255), (float)(ints[h] >> 8));
            }
        copy_wait<STAGES - 2>();
        show_to_products();
        __syncthreads();
        // Every warp has left the slot that was computed last.
        fetch_numbers(turn + 1);
        fetch(turn + STAGES - 1, free_slot);
        if (is_there) {
            u64 rows = rows_at(base + slot * Stage::BYTES + way * Stage::ROWS);
            u32 a[2][2][4];
            Quad codes[Q];
#pragma unroll
            for (int q = 0; q < Q; q++) codes[q] = load_shared(codes_to + slot * Stage::BYTES + q * 512);
            levels_of_half<CODES>(a[0], codes[0], 0, zeros[0], weight);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                // 32 values are 64 bytes of a row.
                u64 at = rows + h * 4;
                warpgroup_begin();
                Wgmma<true>::start(sum, a[h][0], at);
                Wgmma<false>::start(sum, a[h][1], at + 2);
                warpgroup_commit();
                if (h == 0) levels_of_half<CODES>(a[1], codes[Q - 1], 1, zeros[1], weight);
                warpgroup_wait();
                warpgroup_took(sum);
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) add_scaled(sums[c], sum[c], scale[h]);
                if (has_mins) {
                    warpgroup_begin();
                    Wgmma<true>::start(sum, ones, at);
                    Wgmma<false>::start(sum, ones, at + 2);
                    warpgroup_commit();
                    warpgroup_wait();
                    warpgroup_took(sum);
#pragma unroll
                    for (int c = 0; c < COLUMNS; c++) add_scaled(sums[c], sum[c], min[h]);
                }
            }
        }
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        free_slot = free_slot + 1 == STAGES ? 0 : free_slot + 1;
    }
    copy_wait<0>();

    if (WAYS > 1) {
        __syncthreads();
        float* scratch = (float*)shared + (out_group * (WAYS - 1) * COLUMNS * 4) * 128 + threadIdx.x % 128;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (way > 0) scratch[((way - 1) * COLUMNS * 4 + c * 4 + e) * 128] = sums[c][e];
        __syncthreads();
        if (way > 0) return;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
#pragma unroll
            for (int e = 0; e < 4; e++)
#pragma unroll
                for (int w = 0; w < WAYS - 1; w++) sums[c][e] += scratch[(w * COLUMNS * 4 + c * 4 + e) * 128];
    }

    leave_sums(p, sums, own_tile, token0);
}

// BLOCKS on a processor at a time: the registers that leaves a thread are the most it may use.
#define WGMMA_KERNEL(NAME, CODES, SCALES, N, OUTS, WAYS, STAGES, BLOCKS)                                               \
    KERNEL __launch_bounds__(128 * OUTS * WAYS, BLOCKS) NAME(const Product p) {                                        \
        start(), wgmma<CODES, SCALES, N, OUTS, WAYS, STAGES>(p);                                                       \
    }
