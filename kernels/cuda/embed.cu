// Single rows of a weight in floats, products with unquantized weights, and what lies outside of a weight's grid.

#include "linear.cuh"

// Values that are added to a row outside of its grid; row_start is null where there are none.
struct Outliers {
    const u32* row_start; // (n + 1)
    const u32* cols;
    const u16* values; // halves
};

struct Embed {
    Weight weight;
    Outliers outliers;
    const u32* tokens;
    float* out; // (tokens, width)
    u32 width;
    float factor;
};

DEVICE void add_outliers(const Outliers& outliers, u32 row, float factor, float* out) {
    if (!outliers.row_start) return;
    __syncthreads();
    for (u32 at = outliers.row_start[row] + threadIdx.x; at < outliers.row_start[row + 1]; at += blockDim.x)
        out[outliers.cols[at]] += float_of_half(outliers.values[at]) * factor;
}

DEVICE float number_at(const Numbers& numbers, u32 groups, u32 tile, u32 group, u32 row) {
    FloatPair pair = number_pair(numbers, groups, tile, group, row % 8);
    return row < 8 ? pair.lo : pair.hi;
}

// out = factor * row of the weight; a block a token. See linear.cuh for where a code lies.
template <int CODES> DEVICE void embed(const Embed& p) {
    const Weight& weight = p.weight;
    u32 token = p.tokens[blockIdx.x], tile = token / 16, row = token % 16;
    float* out = p.out + (u64)blockIdx.x * p.width;
    for (u32 k = threadIdx.x; k < p.width; k += blockDim.x) {
        u32 unit = k / 64, h = k / 32 % 2, lane = row % 8 * 4 + k / 8 % 4, s = k / 4 % 2, e = k % 4;
        const u32* words = (const u32*)weight.codes;
        u32 code;
        if (CODES == CODES_W8) {
            u64 quad = (((u64)tile * weight.units + unit) * 2 + h) * 32 + lane;
            code = words[quad * 4 + s * 2 + e / 2] >> (8 * (row / 8 * 2 + e % 2)) & 255;
        } else {
            u64 quad = ((u64)tile * weight.units + unit) * 32 + lane;
            u32 pair = row / 8 + e / 2 * 2; // of the four that a word has
            u32 nibble = CODES == CODES_W4_TABLE ? pair * 2 + e % 2 : pair + e % 2 * 4;
            code = words[quad * 4 + h * 2 + s] >> (4 * nibble) & 15;
        }
        u32 group = divide(k / 32, weight.group_magic);
        float level;
        if (CODES == CODES_W4_TABLE) {
            u32 shift = code % 4 * 8;
            level = float_of_half((u16)((weight.table_lo[code / 4] >> shift & 255) | (weight.table_hi[code / 4] >> shift & 255) << 8));
        } else {
            u32 pair = weight.zero_kind == ZERO_INT ? weight.zeros[(tile * weight.groups + group) * 8 + row % 8] : 0;
            float zero = weight.zero_kind == ZERO_INT ? (float)(row < 8 ? pair & 255 : pair >> 8) : weight.zero;
            level = (float)code - zero;
        }
        float min = weight.zero_kind == ZERO_MIN ? number_at(weight.mins, weight.groups, tile, group, row) : 0.0f;
        float value = fmaf(number_at(weight.scales, weight.groups, tile, group, row), level, min);
        out[k] = value * p.factor;
    }
    add_outliers(p.outliers, token, p.factor, out);
}

KERNEL __launch_bounds__(256) embed_w4(const Embed p) { start(), embed<CODES_W4>(p); }
KERNEL __launch_bounds__(256) embed_w4_table(const Embed p) { start(), embed<CODES_W4_TABLE>(p); }
KERNEL __launch_bounds__(256) embed_w8(const Embed p) { start(), embed<CODES_W8>(p); }

// An unquantized weight (n, k) and a product with it.
struct Dense {
    const void* weight;
    const float* x;    // (m, k)
    const float* bias; // (n) or null
    float* out;        // (m, n)
    const u32* tokens; // an embedding's
    u32 n;
    u32 k;
    u32 m;
    u32 accumulate;
    float factor; // an embedding's
};

struct Half {
    u16 bits;
};
struct Bf16 {
    u16 bits;
};
DEVICE float dense_value(const float* from, u64 at) { return from[at]; }
DEVICE float dense_value(const Half* from, u64 at) { return float_of_half(from[at].bits); }
DEVICE float dense_value(const Bf16* from, u64 at) { return float_of_bf16(from[at].bits); }

// A warp an output, for up to 8 tokens: block x has 8 outputs, block y 8 tokens. For layers that stay unquantized; it
// reads the weight once every 8 tokens.
template <typename T> DEVICE void dense(const Dense& p) {
    u32 row = blockIdx.x * 8 + warp_id(), token0 = blockIdx.y * 8;
    if (row >= p.n) return;
    const T* weight = (const T*)p.weight;
    const float* x = p.x + (u64)token0 * p.k;
    float sums[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (u32 k = lane_id(); k < p.k; k += 32) {
        float w = dense_value(weight, (u64)row * p.k + k);
#pragma unroll
        for (int t = 0; t < 8; t++)
            if (token0 + t < p.m) sums[t] = fmaf(w, x[(u64)t * p.k + k], sums[t]);
    }
#pragma unroll
    for (int t = 0; t < 8; t++) {
        float y = warp_sum(sums[t]);
        if (lane_id() == 0 && token0 + t < p.m) {
            float* out = p.out + (u64)(token0 + t) * p.n + row;
            if (p.bias) y += p.bias[row];
            *out = p.accumulate ? *out + y : y;
        }
    }
}

template <typename T> DEVICE void embed_dense(const Dense& p) {
    const T* weight = (const T*)p.weight;
    u64 row = (u64)p.tokens[blockIdx.x] * p.k;
    for (u32 k = threadIdx.x; k < p.k; k += blockDim.x)
        p.out[(u64)blockIdx.x * p.k + k] = dense_value(weight, row + k) * p.factor;
}

KERNEL __launch_bounds__(256) dense_f32(const Dense p) { start(), dense<float>(p); }
KERNEL __launch_bounds__(256) dense_f16(const Dense p) { start(), dense<Half>(p); }
KERNEL __launch_bounds__(256) dense_bf16(const Dense p) { start(), dense<Bf16>(p); }
KERNEL __launch_bounds__(256) embed_f32(const Dense p) { start(), embed_dense<float>(p); }
KERNEL __launch_bounds__(256) embed_f16(const Dense p) { start(), embed_dense<Half>(p); }
KERNEL __launch_bounds__(256) embed_bf16(const Dense p) { start(), embed_dense<Bf16>(p); }

struct OutlierProduct {
    Outliers outliers;
    const float* x; // (m, k)
    float* out;     // (m, n)
    u32 n;
    u32 k;
};

// out += x * outliers^T; a warp an output, block y a token.
KERNEL __launch_bounds__(256) outliers_add(const OutlierProduct p) {
    start();
    u32 row = blockIdx.x * 8 + warp_id();
    if (row >= p.n) return;
    const float* x = p.x + (u64)blockIdx.y * p.k;
    u32 end = p.outliers.row_start[row + 1];
    float sum = 0.0f;
    for (u32 at = p.outliers.row_start[row] + lane_id(); at < end; at += 32)
        sum = fmaf(float_of_half(p.outliers.values[at]), x[p.outliers.cols[at]], sum);
    sum = warp_sum(sum);
    if (lane_id() == 0) p.out[(u64)blockIdx.y * p.n + row] += sum;
}
