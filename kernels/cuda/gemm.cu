// More than 64 tokens times a quantized weight on the tensor cores. A block is four warps; each holds TILES tiles of 16
// outputs for 8 * COLUMNS tokens, so a code is turned into its level once for all tokens of the block.
//
//   outputs   block x: 4 warps x TILES tiles of 16
//   tokens    block y: 8 * COLUMNS
//   K         block z: a part of the units; parts are added afterwards in one order
//
// Activations and codes of STAGES units are on their way to shared memory at any time. Codes go through shared memory
// only to wait there without registers: a lane reads back what it copied itself.

#include "linear.cuh"

static const int WARPS = 4;

template <int CODES, int COLUMNS, int TILES> struct Stage {
    Quad x[8 * COLUMNS][8]; // (token, 8 values of K): chunk c of an odd token lies at c ^ 4, so that two tokens' chunks
                            // fill all banks
    Quad codes[WARPS][TILES][QUADS<CODES>][32];
};

template <int CODES, int COLUMNS, int TILES, int STAGES> DEVICE void gemm(const Product& p) {
    __shared__ Stage<CODES, COLUMNS, TILES> stages[STAGES];
    const int quads = QUADS<CODES>;
    const Weight& weight = p.weight;
    u32 lane = lane_id(), warp = warp_id(), i = lane / 4, j = lane % 4, units = weight.units;
    u32 token0 = blockIdx.y * (8 * COLUMNS);
    u32 tiles = (weight.n + 15) / 16;
    u32 first = blockIdx.z * p.split_units;
    u32 end = min(first + p.split_units, units);
    u32 tile0 = (blockIdx.x * WARPS + warp) * TILES;

    // Tiles past the last one compute it again, and are not written.
    u32 tile[TILES];
#pragma unroll
    for (int t = 0; t < TILES; t++) tile[t] = min(tile0 + t, tiles - 1);

    u32 x_from[8 * COLUMNS * 8 / (WARPS * 32)]; // halves between a row's and the batch's beginning; ~0: no such row
    u32 chunk = threadIdx.x % 8;
#pragma unroll
    for (int part = 0; part < 8 * COLUMNS * 8 / (WARPS * 32); part++) {
        u32 token = part * (WARPS * 4) + threadIdx.x / 8;
        x_from[part] = token0 + token < p.m ? (token0 + token) * units * 64 + chunk * 8 : ~0u;
    }
    const Quad* codes_from[TILES];
#pragma unroll
    for (int t = 0; t < TILES; t++) codes_from[t] = weight.codes + (u64)tile[t] * units * quads * 32 + lane;
    u32 x_to = shared_address(&stages[0].x[threadIdx.x / 8][chunk ^ (threadIdx.x / 8 & 1) * 4]);
    u32 codes_to = shared_address(&stages[0].codes[warp][0][0][lane]);
    const u32 stage_bytes = sizeof(Stage<CODES, COLUMNS, TILES>);
    auto fetch = [&](u32 unit, u32 slot) {
#pragma unroll
        for (int part = 0; part < 8 * COLUMNS * 8 / (WARPS * 32); part++) {
            bool is_there = x_from[part] != ~0u;
            const u16* from = p.x + ((is_there ? x_from[part] : 0) + unit * 64);
            copy_async(x_to + slot * stage_bytes + part * (WARPS * 4 * 128), from, is_there ? 16 : 0);
        }
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int q = 0; q < quads; q++)
                copy_async(codes_to + slot * stage_bytes + (t * quads + q) * 512,
                           codes_from[t] + (unit * quads + q) * 32, 16);
    };
    // Scales of the next unit are on their way while one is computed.
    u32 raw[TILES][2];
    FloatPair second[TILES][2];
    bool is_coded = weight.scales.kind == NUMBERS_CODED;
    auto fetch_scales = [&](u32 unit) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 group = divide(2 * unit + h, weight.group_magic);
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                u32 at = (tile[t] * weight.groups + group) * 8 + i;
                if (is_coded) {
                    raw[t][h] = ((const u16*)weight.scales.first)[at];
                    u32 span = tile[t] * weight.scales.spans + divide(group, weight.scales.span_magic);
                    second[t][h] = weight.scales.second[span * 8 + i];
                } else if (weight.scales.kind == NUMBERS_F16) {
                    raw[t][h] = ((const u32*)weight.scales.first)[at];
                } else {
                    second[t][h] = ((const FloatPair*)weight.scales.first)[at];
                }
            }
        }
    };
    auto scale_of = [&](int t, int h) {
        if (weight.scales.kind == NUMBERS_F16) return floats_of(raw[t][h]);
        if (!is_coded) return second[t][h];
        FloatPair d;
        d.lo = __fmul_rn((float)(raw[t][h] & 255) - weight.scales.bias, second[t][h].lo);
        d.hi = __fmul_rn((float)(raw[t][h] >> 8) - weight.scales.bias, second[t][h].hi);
        return d;
    };

    float sums[TILES][COLUMNS][4];
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
#pragma unroll
            for (int e = 0; e < 4; e++) sums[t][c][e] = 0.0f;

    if (first < end) fetch_scales(first);
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (first + s < end) fetch(first + s, s);
        copy_commit();
    }
    Zeros constant = zeros_of<CODES>(weight.zero, weight.zero);
    u32 slot = 0, free_slot = STAGES - 1;
#pragma unroll 1
    for (u32 unit = first; unit < end; unit++) {
        FloatPair scale[TILES][2];
#pragma unroll
        for (int t = 0; t < TILES; t++) scale[t][0] = scale_of(t, 0), scale[t][1] = scale_of(t, 1);
        copy_wait<STAGES - 2>();
        __syncthreads();
        // Every warp has left the slot that was computed last.
        if (unit + 1 < end) fetch_scales(unit + 1);
        if (unit + STAGES - 1 < end) fetch(unit + STAGES - 1, free_slot);
        copy_commit();
        const Stage<CODES, COLUMNS, TILES>& stage = stages[slot];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 group = divide(2 * unit + h, weight.group_magic);
            u32 a[TILES][2][4];
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                Quad codes = stage.codes[warp][t][quads == 2 ? h : 0][lane];
                Zeros zeros = constant;
                if (weight.zero_kind == ZERO_INT) zeros = zeros_at<CODES>(weight, tile[t], group, i);
                levels_of_half<CODES>(a[t], codes, h, zeros, weight);
            }
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                Quad b = stage.x[c * 8 + i][(h * 4 + j) ^ ((i & 1) * 4)];
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                    mma(sum, a[t][0], b.x, b.y);
                    mma(sum, a[t][1], b.z, b.w);
                    add_scaled(sums[t][c], sum, scale[t][h]);
                }
                if (weight.zero_kind == ZERO_MIN)
#pragma unroll
                    for (int t = 0; t < TILES; t++)
                        add_minimums(sums[t][c], b, number_pair(weight.mins, weight.groups, tile[t], group, i));
            }
        }
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        free_slot = free_slot + 1 == STAGES ? 0 : free_slot + 1;
    }
    copy_wait<0>();

#pragma unroll
    for (int t = 0; t < TILES; t++) leave_sums(p, sums[t], tile0 + t, token0);
}

// BLOCKS on a processor at a time: the registers that leaves a thread are the most it may use.
#define GEMM(NAME, CODES, COLUMNS, TILES, STAGES, BLOCKS)                                                              \
    KERNEL __launch_bounds__(128, BLOCKS) NAME(const Product p) { start(), gemm<CODES, COLUMNS, TILES, STAGES>(p); }

GEMM(gemm64_w4, CODES_W4, 8, 4, 2, 1)
GEMM(gemm64_w4_table, CODES_W4_TABLE, 8, 2, 3, 3)
GEMM(gemm64_w8, CODES_W8, 8, 4, 2, 1)

// The parts of K together, first to last.
KERNEL __launch_bounds__(256) gemm_sum(const Product p) {
    start();
    u32 n = p.weight.n;
    u64 at = (u64)blockIdx.x * 256 + threadIdx.x, outputs = (u64)p.m * n;
    if (at >= outputs) return;
    float sum = 0.0f;
    for (u32 part = 0; part < p.splits; part++) sum += p.partial[part * outputs + at];
    write_output(p, (u32)(at / n), (u32)(at % n), sum);
}
