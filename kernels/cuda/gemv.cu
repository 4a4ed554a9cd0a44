// Up to 8 tokens times a quantized weight, at the memory's pace. A block computes one tile of 16 outputs; its warps take
// the units of K in turn, and their sums are added in one order.
//
// Each warp has the codes of DEPTH units on their way to shared memory, where they wait without registers: a lane reads
// back what it copied itself, so no barrier is needed.

#include "linear.cuh"

static const int DEPTH = 4;
static const int MOST_WARPS = 8;
// Floats between two tokens' sums in shared memory: four lanes that differ in tokens hit different banks.
static const int TOKEN_STRIDE = 20;

template <int CODES> union GemvShared {
    Quad codes[MOST_WARPS][DEPTH][QUADS<CODES>][32];
    float sums[MOST_WARPS][8 * TOKEN_STRIDE];
};

template <int CODES> DEVICE void gemv(const Product& p) {
    __shared__ GemvShared<CODES> shared;
    const Weight& weight = p.weight;
    u32 lane = lane_id(), warp = warp_id(), warps = blockDim.x / 32, tile = blockIdx.x;
    u32 i = lane / 4, j = lane % 4, units = weight.units;
    const int quads = QUADS<CODES>;
    const Quad* codes = weight.codes + (u64)tile * units * quads * 32 + lane;
    const Quad* x = (const Quad*)(p.x + (u64)i * units * 64) + j; // token i

    auto fetch = [&](u32 unit, u32 slot) {
#pragma unroll
        for (int q = 0; q < quads; q++)
            copy_async(shared_address(&shared.codes[warp][slot][q][lane]), codes + (unit * quads + q) * 32, 16);
    };
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
        if (warp + d * warps < units) fetch(warp + d * warps, d);
        copy_commit();
    }
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    u32 slot = 0;
    for (u32 unit = warp; unit < units; unit += warps) {
        copy_wait<DEPTH - 1>();
        Quad now[quads];
#pragma unroll
        for (int q = 0; q < quads; q++) now[q] = shared.codes[warp][slot][q][lane];
        if (unit + DEPTH * warps < units) fetch(unit + DEPTH * warps, slot);
        copy_commit();
#pragma unroll
        for (int h = 0; h < 2; h++) {
            Quad b = {0, 0, 0, 0};
            if (i < p.m) b = x[unit * 8 + h * 4];
            u32 group = divide(2 * unit + h, weight.group_magic);
            FloatPair scale = number_pair(weight.scales, weight.groups, tile, group, i);
            u32 a[2][4];
            levels_of_half<CODES>(a, now[quads == 2 ? h : 0], h, zeros_at<CODES>(weight, tile, group, i), weight);
            float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            mma(sum, a[0], b.x, b.y);
            mma(sum, a[1], b.z, b.w);
            add_scaled(sums, sum, scale);
            if (weight.zero_kind == ZERO_MIN)
                add_minimums(sums, b, number_pair(weight.mins, weight.groups, tile, group, i));
        }
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
    }
    copy_wait<0>();
    __syncthreads(); // the sums lie where the codes were
    float* part = shared.sums[warp];
    part[(2 * j) * TOKEN_STRIDE + i] = sums[0];
    part[(2 * j + 1) * TOKEN_STRIDE + i] = sums[1];
    part[(2 * j) * TOKEN_STRIDE + i + 8] = sums[2];
    part[(2 * j + 1) * TOKEN_STRIDE + i + 8] = sums[3];
    __syncthreads();
    for (u32 at = threadIdx.x; at < 128; at += blockDim.x) {
        u32 token = at / 16, row = tile * 16 + at % 16;
        if (token < p.m && row < weight.n) {
            float sum = 0.0f;
            for (u32 w = 0; w < warps; w++) sum += shared.sums[w][token * TOKEN_STRIDE + at % 16];
            write_output(p, token, row, sum);
        }
    }
}

KERNEL __launch_bounds__(256, 4) gemv_w4(const Product p) { gemv<CODES_W4>(p); }
KERNEL __launch_bounds__(256, 4) gemv_w4_table(const Product p) { gemv<CODES_W4_TABLE>(p); }
KERNEL __launch_bounds__(256, 4) gemv_w8(const Product p) { gemv<CODES_W8>(p); }
