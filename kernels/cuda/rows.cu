// What a transformer does to rows between its products. Sums are single precision in one order a block.

#include "rows.cuh"

struct Pack {
    const float* x; // (rows, width)
    u16* out;       // (rows, 64 units)
    float* factor;  // (rows)
    u32 width;
    u32 units;
    u32 by_steps;
    u32 unused;
};

// Where a product that takes its activations step by step (wgmma.cuh) finds pair `pair` of a row: of 32 values, the 16 of
// each step of 16 side by side, in the order in which linear.cuh gives a lane the codes.
DEVICE u32 step_order(u32 pair) { return (pair & ~15u) | (pair & 3) * 4 | (pair >> 2 & 3); }

// Rows in half precision, each times its power of two.
KERNEL __launch_bounds__(256) pack_rows(const Pack p) {
    start();
    __shared__ float scratch[8];
    u32 row = blockIdx.x;
    const float* x = p.x + (u64)row * p.width;
    float most = 0.0f;
    for (u32 k = threadIdx.x; k < p.width; k += 256) most = larger(most, magnitude(x[k]));
    Power power = power_for(block_max(most, scratch));
    u32* out = (u32*)p.out + (u64)row * p.units * 32;
    for (u32 pair = threadIdx.x; pair < p.units * 32; pair += 256) {
        float lo = 2 * pair < p.width ? x[2 * pair] * power.power : 0.0f;
        float hi = 2 * pair + 1 < p.width ? x[2 * pair + 1] * power.power : 0.0f;
        out[p.by_steps ? step_order(pair) : pair] = half2_of(lo, hi);
    }
    if (threadIdx.x == 0) p.factor[row] = power.reciprocal;
}

// A row in registers: four numbers a thread, READS times. Rows have whole fours, at most READS * 4096 numbers.
static const int READS = 4;

struct RowPart {
    float v[READS][4];
};

DEVICE RowPart row_of(const float* x, u32 width) {
    RowPart part;
#pragma unroll
    for (u32 r = 0; r < READS; r++) {
        u32 at = (r * blockDim.x + threadIdx.x) * 4;
        Quad q = {0, 0, 0, 0};
        if (at < width) q = *(const Quad*)(x + at);
        part.v[r][0] = __uint_as_float(q.x);
        part.v[r][1] = __uint_as_float(q.y);
        part.v[r][2] = __uint_as_float(q.z);
        part.v[r][3] = __uint_as_float(q.w);
    }
    return part;
}

// Leaves a row as it is and in half precision, times its power of two.
template <typename P> DEVICE void leave(const RowPart& part, float* out, const P& p, u64 row, float* scratch) {
    u32 width = p.width, units = p.units;
    u32* halves = (u32*)p.halves + row * units * 32;
    float most = 0.0f;
#pragma unroll
    for (u32 r = 0; r < READS; r++)
#pragma unroll
        for (u32 e = 0; e < 4; e++) most = larger(most, magnitude(part.v[r][e]));
    Power power = power_for(block_max(most, scratch));
    struct __align__(8) Halves {
        u32 lo, hi;
    };
#pragma unroll
    for (u32 r = 0; r < READS; r++) {
        u32 at = (r * blockDim.x + threadIdx.x) * 4;
        const float* v = part.v[r];
        if (at < width) {
            Quad q = {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])};
            *(Quad*)(out + at) = q;
        }
        // Numbers past the row are zeros.
        if (at < units * 64) {
            Halves h = {half2_of(v[0] * power.power, v[1] * power.power), half2_of(v[2] * power.power, v[3] * power.power)};
            if (p.by_steps) {
                u32* to = halves + step_order(at / 2);
                to[0] = h.lo;
                to[4] = h.hi;
            } else {
                *(Halves*)(halves + at / 2) = h;
            }
        }
    }
    if (threadIdx.x == 0) p.factor[row] = power.reciprocal;
}

struct Norm {
    const float* x; // (rows, width)
    const float* gain;
    float* out; // (rows, width), may be x
    u32 width;
    float eps;
};

// A block a row.
KERNEL __launch_bounds__(1024) rms_norm(const Norm p) {
    start();
    __shared__ float scratch[32];
    const float* x = p.x + (u64)blockIdx.x * p.width;
    float* out = p.out + (u64)blockIdx.x * p.width;
    float sum = 0.0f;
    for (u32 k = threadIdx.x; k < p.width; k += blockDim.x) sum = fmaf(x[k], x[k], sum);
    float mean = block_sum(sum, scratch) / (float)p.width;
    float scale = 1.0f / sqrtf(mean + p.eps);
    for (u32 k = threadIdx.x; k < p.width; k += blockDim.x) out[k] = x[k] * scale * p.gain[k];
}

struct NormPack {
    const float* x; // (rows, width)
    const float* gain;
    float* out;    // (rows, width), may be x
    u16* halves;   // (rows, 64 units)
    float* factor; // (rows)
    u32 width;
    u32 units;
    float eps;
    u32 by_steps;
};

// The same for rows that a product reads next.
KERNEL __launch_bounds__(1024) rms_norm_pack(const NormPack p) {
    __shared__ float scratch[64];
    u64 row = blockIdx.x;
    let_next_start();
    RowPart gain = row_of(p.gain, p.width);
    wait_for_previous();
    RowPart part = row_of(p.x + row * p.width, p.width);
    float sum = 0.0f;
#pragma unroll
    for (u32 r = 0; r < READS; r++)
#pragma unroll
        for (u32 e = 0; e < 4; e++) sum = fmaf(part.v[r][e], part.v[r][e], sum);
    float mean = block_sum(sum, scratch) / (float)p.width;
    float scale = 1.0f / sqrtf(mean + p.eps);
#pragma unroll
    for (u32 r = 0; r < READS; r++)
#pragma unroll
        for (u32 e = 0; e < 4; e++) part.v[r][e] = part.v[r][e] * scale * gain.v[r][e];
    leave(part, p.out + row * p.width, p, row, scratch + 32);
}

struct Rope {
    float* x;         // (rows, heads, head_dim)
    const float* cos; // (positions, half)
    const float* sin;
    const Row* rows;
    u32 heads;
    u32 head_dim;
    u32 half;
    u32 count; // rows * heads * half
};

// A thread a pair: values d and d + half of a head.
KERNEL __launch_bounds__(256) rope(const Rope p) {
    start();
    u32 at = blockIdx.x * 256 + threadIdx.x;
    if (at >= p.count) return;
    u32 d = at % p.half, head = at / p.half;
    u32 turn = p.rows[head / p.heads].position * p.half + d;
    float* x = p.x + (u64)head * p.head_dim + d;
    float a = x[0], b = x[p.half], c = p.cos[turn], s = p.sin[turn];
    x[0] = fmaf(-b, s, a * c);
    x[p.half] = fmaf(a, s, b * c);
}

struct Elements {
    float* x;
    const float* y;
    u64 count;
    float factor;
};

DEVICE u64 element() { return (u64)blockIdx.x * 256 + threadIdx.x; }

// x = silu(x) * y
KERNEL __launch_bounds__(256) gate_silu(const Elements p) {
    start();
    if (element() < p.count) p.x[element()] = silu(p.x[element()]) * p.y[element()];
}

// x = gelu(x) * y
KERNEL __launch_bounds__(256) gate_gelu(const Elements p) {
    start();
    if (element() < p.count) p.x[element()] = gelu(p.x[element()]) * p.y[element()];
}

struct GatePack {
    float* x;       // (rows, width)
    const float* y; // (rows, width)
    u16* halves;    // (rows, 64 units)
    float* factor;  // (rows)
    u32 width;
    u32 units;
    u32 by_steps;
    u32 unused;
};

// The same for rows that a product reads next. A block a row.
template <bool SILU> DEVICE void gate_pack(const GatePack& p) {
    __shared__ float scratch[32];
    u64 row = blockIdx.x;
    RowPart part = row_of(p.x + row * p.width, p.width), up = row_of(p.y + row * p.width, p.width);
#pragma unroll
    for (u32 r = 0; r < READS; r++)
#pragma unroll
        for (u32 e = 0; e < 4; e++) part.v[r][e] = (SILU ? silu(part.v[r][e]) : gelu(part.v[r][e])) * up.v[r][e];
    leave(part, p.x + row * p.width, p, row, scratch);
}

KERNEL __launch_bounds__(1024) gate_pack_silu(const GatePack p) { start(), gate_pack<true>(p); }
KERNEL __launch_bounds__(1024) gate_pack_gelu(const GatePack p) { start(), gate_pack<false>(p); }

// x += y
KERNEL __launch_bounds__(256) add(const Elements p) {
    start();
    if (element() < p.count) p.x[element()] += p.y[element()];
}

// x *= factor
KERNEL __launch_bounds__(256) scale(const Elements p) {
    start();
    if (element() < p.count) p.x[element()] *= p.factor;
}

// x = factor * tanh(x / factor)
KERNEL __launch_bounds__(256) softcap(const Elements p) {
    start();
    if (element() < p.count) p.x[element()] = p.factor * tanh_fast(p.x[element()] / p.factor);
}

struct Select {
    const float* x; // (.., width)
    const u32* rows;
    float* out; // (rows, width)
    u32 width;
};

// A block a row.
KERNEL __launch_bounds__(256) select_rows(const Select p) {
    start();
    const float* x = p.x + (u64)p.rows[blockIdx.x] * p.width;
    float* out = p.out + (u64)blockIdx.x * p.width;
    for (u32 k = threadIdx.x; k < p.width; k += 256) out[k] = x[k];
}
