// The product of four warps together, wgmma, which only compute capability 9.0a has. Everything of prim.cuh holds too.

#pragma once

#include "prim.cuh"

// Registers may have been written by other instructions before; products of this warp group come after that.
DEVICE void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group of products.
DEVICE void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until every product has ended.
DEVICE void warpgroup_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// What this thread knows to be in shared memory may be read by products after the next barrier.
DEVICE void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Where a product finds its second factor: rows of 64 halves, one a column, 16-byte chunk c of row r at c ^ (r % 8), from
// an address on that is a multiple of 1024. The next 16 values of K are 2 further.
DEVICE u64 rows_at(u32 address) {
    const u64 swizzled = 1ull << 62, eight_rows = (u64)(1024 >> 4) << 32, unused = 1ull << 16;
    return swizzled | eight_rows | unused | (address & 0x3ffff) >> 4;
}

#define WGMMA_SUMS_4(c) "+f"(d[c][0]), "+f"(d[c][1]), "+f"(d[c][2]), "+f"(d[c][3])
#define WGMMA_SUMS_8(c) WGMMA_SUMS_4(c), WGMMA_SUMS_4(c + 1)
#define WGMMA_SUMS_16(c) WGMMA_SUMS_8(c), WGMMA_SUMS_8(c + 2)
#define WGMMA_SUMS_32(c) WGMMA_SUMS_16(c), WGMMA_SUMS_16(c + 4)
#define WGMMA_SUMS_64(c) WGMMA_SUMS_32(c), WGMMA_SUMS_32(c + 8)
#define WGMMA_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_NAMES_16 WGMMA_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_NAMES_32                                                                                                 \
    WGMMA_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_NAMES_64                                                                                                 \
    WGMMA_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
                   "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d = a (64 x 16) * b (16 x N) (+ d unless IS_FIRST), started, halves in, floats out. Each of four warps holds 16 rows of a
// and d as `mma` does, d for N / 8 times 8 columns.
template <bool IS_FIRST> struct Wgmma {
#define WGMMA(N, SUMS, A0, A1, A2, A3, B, D)                                                                           \
    DEVICE void start(float (&d)[N / 8][4], const u32 (&a)[4], u64 b) {                                                \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" WGMMA_NAMES_##SUMS "}, {%" #A0 ", %"   \
                     #A1 ", %" #A2 ", %" #A3 "}, %" #B ", %" #D ", 1, 1, 0;"                                           \
                     : WGMMA_SUMS_##SUMS(0)                                                                            \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(IS_FIRST ? 0 : 1));                     \
    }
    WGMMA(16, 8, 8, 9, 10, 11, 12, 13)
    WGMMA(32, 16, 16, 17, 18, 19, 20, 21)
    WGMMA(64, 32, 32, 33, 34, 35, 36, 37)
    WGMMA(128, 64, 64, 65, 66, 67, 68, 69)
};

// What a product left is read after this, not before.
template <int C> DEVICE void warpgroup_took(float (&d)[C][4]) {
#pragma unroll
    for (int c = 0; c < C; c++)
        asm volatile("" : "+f"(d[c][0]), "+f"(d[c][1]), "+f"(d[c][2]), "+f"(d[c][3])::"memory");
}
