// A quantized weight (n, k) on the device, and one product with it: out = x * weight^T (+ bias) (+ out).
//
// Codes lie as the tensor cores take them. A tile is 16 rows, a unit 64 values of K; a lane's 16 bytes are what it feeds
// to the four steps of a unit (8-bit codes: two times 16 bytes for two steps each).
//
//   codes    [tile][unit][1 or 2][32 lanes][16 bytes]
//   lane 4i+j, half h of the unit, step s: rows i and i+8, k = 64 unit + 32 h + 8 j + 4 s + {0, 1, 2, 3}
//   4 bits   one word a step: nibbles 0, 4 = row i, k + {0, 1};  1, 5 = row i+8;  2, 6 = row i, k + {2, 3};  3, 7 = row i+8
//   a table  one word a step: bytes row i, k + {0, 1};  row i+8;  row i, k + {2, 3};  row i+8
//   8 bits   two words a step: row i, k + {0, 1}, row i+8, k + {0, 1};  the same with k + {2, 3}
//   numbers  [tile][group][8] pairs of (row i, row i+8)
//
// The order of k inside of 32 values is the tensor cores' to forget: activations are read in the same order, which makes
// a lane's activations of 32 values 16 consecutive bytes.
//
// Products of a level (an integer of up to 9 bits, or a half from the table) and an activation in half precision are
// exact, sums are single precision; the scale comes once every 32 values. So weights are never rounded.

#include "rows.cuh"

enum NumberKind { NUMBERS_F16 = 0, NUMBERS_F32 = 1, NUMBERS_CODED = 2 };
enum ZeroKind { ZERO_CONST = 0, ZERO_INT = 1, ZERO_MIN = 2 };
enum CodeKind { CODES_W4 = 0, CODES_W4_TABLE = 1, CODES_W8 = 2 };

// One number a group and row. Coded: number = (code - bias) * second[span of the group].
struct Numbers {
    const void* first;
    const FloatPair* second;
    u32 kind;
    float bias;
    u32 spans;      // a row
    u32 span_magic; // divides a group's index by the groups of a span
};

struct Weight {
    const Quad* codes;
    const u16* zeros; // ZERO_INT: pairs of bytes
    Numbers scales;
    Numbers mins;    // ZERO_MIN
    u32 table_lo[4]; // CODES_W4_TABLE: the low bytes of 16 halves
    u32 table_hi[4]; // and their high bytes
    u32 n;
    u32 units;       // of 64 values of K
    u32 groups;      // a row, those of padding included
    u32 group_magic; // divides an index of 32 values by the 32s of a group
    u32 zero_kind;
    float zero; // ZERO_CONST
};

// Another weight of the same kind and K that is multiplied with the same activations in the same launch.
struct Also {
    const Quad* codes;
    const u16* zeros;
    Numbers scales;
    Numbers mins;
    const float* bias; // (n) or null
    float* out;        // (m, n)
    u32 n;
    u32 first; // its first tile; ~0 if there is no such weight
};

enum GateKind { GATE_NONE = 0, GATE_SILU = 1, GATE_GELU = 2 };

struct Product {
    Weight weight;
    const u16* x;        // (m, 64 units) halves, each row times a power of two
    const float* factor; // (m) that power's reciprocal
    const float* bias;   // (n) or null
    float* out;          // (m, n)
    float* partial;      // (splits, m, n) sums of parts of K
    u32 m;
    u32 accumulate;
    u32 split_units; // units of one part of K
    u32 splits;
    Also also[2];
    // few.cuh only:
    const float* rows; // (m, k) where rows aren't ready in x and factor; null where they are
    const float* gain; // (k) where these rows are normed first, or null
    u32 k;
    float eps;
    u32 row_warps;   // warps that make one row ready
    u32 tiles;       // of all weights together; of the gate alone where `gate`
    u32 share;       // of these, how many a block takes
    u32 gate;        // out = gate(x * weight^T) * (x * also[0]^T)
};

// Where a table of pairs lies: entry c of 256 is the pair of halves that byte c stands for, 32 times, once for each lane's
// bank.
static const u32 TABLE_BYTES = 256 * 256;

// The half that code `x` of a table stands for.
DEVICE u32 table_half(const Weight& weight, u32 x) {
    u32 lo = x < 8 ? (x < 4 ? weight.table_lo[0] : weight.table_lo[1]) : (x < 12 ? weight.table_lo[2] : weight.table_lo[3]);
    u32 hi = x < 8 ? (x < 4 ? weight.table_hi[0] : weight.table_hi[1]) : (x < 12 ? weight.table_hi[2] : weight.table_hi[3]);
    u32 shift = x % 4 * 8;
    return (lo >> shift & 255) | (hi >> shift & 255) << 8;
}

// A block's threads write that table.
template <u32 THREADS> DEVICE void fill_table(u8* shared, const Weight& weight) {
    for (u32 c = threadIdx.x; c < 256; c += THREADS) {
        u32 pair = table_half(weight, c % 16) | table_half(weight, c / 16) << 16;
        Quad four = {pair, pair, pair, pair};
#pragma unroll
        for (u32 r = 0; r < 8; r++) *(Quad*)(shared + c * 256 + (r + lane_id()) % 8 * 16) = four;
    }
}

// The numbers of rows i and i+8 of a tile.
DEVICE FloatPair number_pair(const Numbers& numbers, u32 groups, u32 tile, u32 group, u32 i) {
    u32 at = (tile * groups + group) * 8 + i;
    if (numbers.kind == NUMBERS_F16) return floats_of(((const u32*)numbers.first)[at]);
    if (numbers.kind == NUMBERS_F32) return ((const FloatPair*)numbers.first)[at];
    u32 codes = ((const u16*)numbers.first)[at];
    FloatPair second = numbers.second[(tile * numbers.spans + divide(group, numbers.span_magic)) * 8 + i];
    FloatPair d;
    d.lo = __fmul_rn((float)(codes & 255) - numbers.bias, second.lo);
    d.hi = __fmul_rn((float)(codes >> 8) - numbers.bias, second.hi);
    return d;
}

// What turns codes of rows i and i+8 into levels, for one group.
struct Zeros {
    u32 lo; // half pair of 1024 + zero of row i
    u32 hi; // 8-bit codes: the same of row i+8; 4-bit codes: half pair of -(64 + zero)
};

template <int CODES> DEVICE Zeros zeros_of(float lo, float hi) {
    Zeros z;
    z.lo = half2_of(1024.0f + lo, 1024.0f + lo);
    z.hi = CODES == CODES_W8 ? half2_of(1024.0f + hi, 1024.0f + hi) : half2_of(-64.0f - hi, -64.0f - hi);
    return z;
}

template <int CODES> DEVICE Zeros zeros_at(const Weight& weight, u32 tile, u32 group, u32 i) {
    if (weight.zero_kind != ZERO_INT) return zeros_of<CODES>(weight.zero, weight.zero);
    u32 pair = weight.zeros[(tile * weight.groups + group) * 8 + i];
    return zeros_of<CODES>((float)(pair & 255), (float)(pair >> 8));
}

// Bytes of the table for the four codes in the low 16 bits.
DEVICE u32 look_up(const u32 (&table)[4], u32 low_bits, u32 above) {
    return pick_bits(above, bytes_of(table[2], table[3], low_bits), bytes_of(table[0], table[1], low_bits));
}

// The tensor core's operand of one step: levels of rows i and i+8. `q0` is a 4-bit step's word; `q1` the second one of 8
// bits.
template <int CODES> DEVICE void levels_of(u32 (&a)[4], u32 q0, u32 q1, const Zeros& zeros, const Weight& weight) {
    if (CODES == CODES_W4) {
        // A half 0x6400 | c is 1024 + c, and 0x6400 | c << 4 is 1024 + 16 c: both subtractions are exact.
        const u32 sixteenth = 0x2c002c00;
        u32 q8 = q0 >> 8;
        a[0] = half2_sub(and_or(q0, 0x000f000f, 0x64006400), zeros.lo);
        a[1] = half2_fma(and_or(q0, 0x00f000f0, 0x64006400), sixteenth, zeros.hi);
        a[2] = half2_sub(and_or(q8, 0x000f000f, 0x64006400), zeros.lo);
        a[3] = half2_fma(and_or(q8, 0x00f000f0, 0x64006400), sixteenth, zeros.hi);
    } else if (CODES == CODES_W8) {
        a[0] = half2_sub(bytes_of(q0, 0x64646464, 0x4140), zeros.lo);
        a[1] = half2_sub(bytes_of(q0, 0x64646464, 0x4342), zeros.hi);
        a[2] = half2_sub(bytes_of(q1, 0x64646464, 0x4140), zeros.lo);
        a[3] = half2_sub(bytes_of(q1, 0x64646464, 0x4342), zeros.hi);
    } else {
        // Byte selectors take 3 bits; the fourth chooses between the table's halves.
        u32 low_bits = q0 & 0x77777777, above = (q0 >> 3) & 0x11111111;
        u32 above_first = bytes_of(0x0000ff00, 0, above), above_second = bytes_of(0x0000ff00, 0, above >> 16);
        u32 lo_first = look_up(weight.table_lo, low_bits, above_first);
        u32 hi_first = look_up(weight.table_hi, low_bits, above_first);
        u32 lo_second = look_up(weight.table_lo, low_bits >> 16, above_second);
        u32 hi_second = look_up(weight.table_hi, low_bits >> 16, above_second);
        a[0] = bytes_of(lo_first, hi_first, 0x5140);
        a[1] = bytes_of(lo_first, hi_first, 0x7362);
        a[2] = bytes_of(lo_second, hi_second, 0x5140);
        a[3] = bytes_of(lo_second, hi_second, 0x7362);
    }
}

// Times 16 bytes that a lane has of a unit.
template <int CODES> static const int QUADS = CODES == CODES_W8 ? 2 : 1;

// The operands of both steps of half `h` of a unit. `codes` are the lane's 16 bytes that hold it.
template <int CODES>
DEVICE void levels_of_half(u32 (&a)[2][4], const Quad& codes, int h, const Zeros& zeros, const Weight& weight) {
    if (CODES == CODES_W8) {
        levels_of<CODES>(a[0], codes.x, codes.y, zeros, weight);
        levels_of<CODES>(a[1], codes.z, codes.w, zeros, weight);
    } else {
        levels_of<CODES>(a[0], h == 0 ? codes.x : codes.z, 0, zeros, weight);
        levels_of<CODES>(a[1], h == 0 ? codes.y : codes.w, 0, zeros, weight);
    }
}

// sums += scale * sum + min * (sum of the activations), for rows i and i+8 and two columns.
DEVICE void add_scaled(float (&sums)[4], const float (&sum)[4], const FloatPair& scale) {
    sums[0] = fmaf(scale.lo, sum[0], sums[0]);
    sums[1] = fmaf(scale.lo, sum[1], sums[1]);
    sums[2] = fmaf(scale.hi, sum[2], sums[2]);
    sums[3] = fmaf(scale.hi, sum[3], sums[3]);
}

// A matrix of ones: its product with activations is their sum, in the lanes that want it.
DEVICE void add_minimums(float (&sums)[4], const Quad& x, const FloatPair& min) {
    const u32 ones[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00};
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    mma(sum, ones, x.x, x.y);
    mma(sum, ones, x.z, x.w);
    add_scaled(sums, sum, min);
}

// Leaves the sums of a tile's rows i and i+8 with tokens from `token0` on, as the tensor cores have them: whole ones as
// outputs; of a part of K they stay bare sums, whose factors and bias come when the parts are added.
template <int COLUMNS> DEVICE void leave_sums(const Product& p, const float (&sums)[COLUMNS][4], u32 tile, u32 token0) {
    bool is_whole = p.splits == 1, accumulate = is_whole && p.accumulate;
    float* out = is_whole ? p.out : p.partial + (u64)blockIdx.z * p.m * p.weight.n;
    u32 i = lane_id() / 4, j = lane_id() % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 row = tile * 16 + half * 8 + i;
        if (row >= p.weight.n) continue;
        float bias = is_whole && p.bias ? p.bias[row] : 0.0f;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                u32 token = token0 + c * 8 + 2 * j + e;
                if (token >= p.m) continue;
                float* to = out + (u64)token * p.weight.n + row;
                float y = fmaf(sums[c][half * 2 + e], is_whole ? p.factor[token] : 1.0f, bias);
                *to = accumulate ? *to + y : y;
            }
    }
}

// One output from its whole sum.
DEVICE void write_output(const Product& p, u32 token, u32 row, float sum) {
    float y = sum * p.factor[token];
    if (p.bias) y += p.bias[row];
    float* out = p.out + (u64)token * p.weight.n + row;
    *out = p.accumulate ? *out + y : y;
}
