// Words for single instructions, so that the kernels include no header of any toolkit and read as what they do.
// A half pair is a u32 whose low 16 bits are the first number. Everything here is for compute capability 8.0 and later.

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE static __device__ __forceinline__
#define KERNEL extern "C" __global__ void

// Four words that are loaded and stored at once.
struct __align__(16) Quad {
    u32 x, y, z, w;
};
struct __align__(8) FloatPair {
    float lo, hi;
};

DEVICE u32 lane_id() { return threadIdx.x & 31; }
DEVICE u32 warp_id() { return threadIdx.x >> 5; }

// a - b in both halves, rounded once.
DEVICE u32 half2_sub(u32 a, u32 b) {
    u32 d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// a * b + c in both halves, rounded once.
DEVICE u32 half2_fma(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// Both floats rounded to halves; past 65504 they become infinite.
DEVICE u32 half2_of(float lo, float hi) {
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
    return d;
}

DEVICE float float_of_half(u16 h) {
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(h));
    return d;
}

DEVICE FloatPair floats_of(u32 pair) {
    FloatPair d;
    d.lo = float_of_half((u16)pair);
    d.hi = float_of_half((u16)(pair >> 16));
    return d;
}

DEVICE float float_of_bf16(u16 h) { return __uint_as_float((u32)h << 16); }

// Four bytes of the eight in (a: 0..3, b: 4..7), one a nibble of the selector.
DEVICE u32 bytes_of(u32 a, u32 b, u32 selector) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
}

// (a & mask) | bits in one instruction.
DEVICE u32 and_or(u32 a, u32 mask, u32 bits) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
    return d;
}

// mask ? a : b, bit by bit.
DEVICE u32 pick_bits(u32 mask, u32 a, u32 b) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(d) : "r"(mask), "r"(a), "r"(b));
    return d;
}

// 2^x, at most 2 units in the last place off.
DEVICE float exp2_fast(float x) {
    float d;
    asm("ex2.approx.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

// e^x. The product's rounding error grows with |x|: about |x| * 2^-24 relative.
DEVICE float exp_fast(float x) { return exp2_fast(x * 1.4426950408889634f); }

// tanh(x) from one exponential; exact at both ends.
DEVICE float tanh_fast(float x) {
    float t = exp_fast(-2.0f * (x < 0.0f ? -x : x));
    float y = (1.0f - t) / (1.0f + t);
    return x < 0.0f ? -y : y;
}


// The address of shared memory as instructions take it.
DEVICE u32 shared_address(const void* p) {
    u64 d;
    asm("cvta.to.shared.u64 %0, %1;" : "=l"(d) : "l"(p));
    return (u32)d;
}

// Four words of shared memory in one access.
DEVICE Quad load_shared(u32 address) {
    Quad d;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
                 : "r"(address)
                 : "memory");
    return d;
}

// Four words of memory that no kernel writes while this one runs and that no other thread of the processor wants.
DEVICE Quad load_once(const Quad* from) {
    Quad d;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
                 : "l"(from));
    return d;
}

// A kernel may start while the one before it still runs (programmatic launch, compute capability 9.0). Until it has
// waited it may read what was written long ago, weights that is, and must write nothing. Where the device can't, both
// lines mean nothing and the kernel starts when the one before has ended: the driver module turns the pragmas into
// instructions.
DEVICE void wait_for_previous() { asm volatile(".pragma \"griddepcontrol.wait\";" ::: "memory"); }

// The next kernel may start once every block has said this or ended; its wait is for this kernel's end all the same.
DEVICE void let_next_start() { asm volatile(".pragma \"griddepcontrol.launch_dependents\";" ::: "memory"); }

// How a kernel begins that asks for nothing before it may.
DEVICE void start() {
    let_next_start();
    wait_for_previous();
}

// Starts copying 16 bytes to shared memory; with `bytes` 0 they become zeros and nothing is read.
DEVICE void copy_async(u32 to, const void* from, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Closes a group of copies.
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N groups of this thread's copies are in flight.
template <int N> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// d = a (16 x 16) * b (16 x 8) + d, halves in, floats out. Lane 4i+j holds of a: rows i and i+8, columns 2j, 2j+1, 2j+8,
// 2j+9; of b: column i, rows 2j, 2j+1, 2j+8, 2j+9; of d: rows i and i+8, columns 2j, 2j+1.
DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d = a * b, as mma.
DEVICE void mma_first(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %10, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

// What lanes of the warp did to memory before is seen by all of them after.
DEVICE void warp_meets() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }

// The number that lane (own ^ mask) has.
DEVICE float from_lane_xor(float x, u32 mask) {
    float d;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=f"(d) : "f"(x), "r"(mask));
    return d;
}

DEVICE u32 from_lane_xor(u32 x, u32 mask) {
    u32 d;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=r"(d) : "r"(x), "r"(mask));
    return d;
}

// The sum over the warp, in every lane, in one order.
DEVICE float warp_sum(float x) {
    for (u32 mask = 16; mask > 0; mask /= 2) x += from_lane_xor(x, mask);
    return x;
}

// The larger; NaN only if both are.
DEVICE float larger(float a, float b) {
    float d;
    asm("max.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
    return d;
}

DEVICE float smaller(float a, float b) {
    float d;
    asm("min.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
    return d;
}

DEVICE float warp_max(float x) {
    for (u32 mask = 16; mask > 0; mask /= 2) x = larger(x, from_lane_xor(x, mask));
    return x;
}

DEVICE float magnitude(float x) { return __uint_as_float(__float_as_uint(x) & 0x7fffffff); }

DEVICE float infinity() { return __uint_as_float(0x7f800000); }

// i / d for the d that `magic` was made for: floor(2^32 / d) + 1, or 0 for d = 1. Right while i * d < 2^32.
DEVICE u32 divide(u32 i, u32 magic) { return magic == 0 ? i : __umulhi(i, magic); }

// The sum over the block, in every thread, in one order. `scratch` has room for a float a warp; blocks are whole warps.
DEVICE float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    if (lane_id() == 0) scratch[warp_id()] = x;
    __syncthreads();
    float sum = 0.0f;
    for (u32 w = 0; w < blockDim.x / 32; w++) sum += scratch[w];
    return sum;
}

DEVICE float block_max(float x, float* scratch) {
    x = warp_max(x);
    if (lane_id() == 0) scratch[warp_id()] = x;
    __syncthreads();
    float most = scratch[0];
    for (u32 w = 1; w < blockDim.x / 32; w++) most = larger(most, scratch[w]);
    return most;
}

// Where a row of a batch stands: its sequence's cache and its position there.
struct Row {
    u8* cache;
    u32 position;
    u32 unused;
};
