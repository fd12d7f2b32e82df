// Products of a warpgroup (128 threads) on the tensor cores (wgmma), on compute capability 9.0.
//
// Defined before: BF16 (16-bit numbers are bfloat16, otherwise float16), u32 and u64.

#pragma once

#if BF16
#define TYPES "bf16"
#else
#define TYPES "f16"
#endif

// Products are asynchronous: they run while the thread goes on. Call `begin_products` after the last change
// of a register that the products use, and `commit_products` at the end of a group of products.
__device__ __forceinline__ void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Wait until at most PENDING groups run.
template <int PENDING> __device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keep the compiler from moving uses of these registers across this point, since running products read or
// write them.
template <int N> __device__ __forceinline__ void settle(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N> __device__ __forceinline__ void settle(u32 (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}
// The wgmma descriptor of a matrix in shared memory with the 128-byte swizzle: rows of 64 numbers (128 bytes),
// whose 16-byte pieces are permuted by XOR with the row's number modulo 8. at: the matrix's address, which is
// a multiple of 1024, plus the offset of the first of 16 columns or rows. stride: bytes between parts of 64
// columns; used only for b of the `multiply` that takes a from registers. pitch: bytes between eights of rows.
__device__ __forceinline__ u64 matrix(u32 at, u32 stride, u32 pitch = 1024) {
    return (u64)((at & 0x3FFFF) >> 4) | (u64)(stride >> 4) << 16 | (u64)(pitch >> 4) << 32 | 1ull << 62;
}

// Operands of inline assembler: the sums, and their numbers.
#define SUMS4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define SUMS8(x, i) SUMS4(x, i), SUMS4(x, i + 4)
#define SUMS16(x, i) SUMS8(x, i), SUMS8(x, i + 8)
#define SUMS32(x, i) SUMS16(x, i), SUMS16(x, i + 16)
#define TO_4 "%0, %1, %2, %3"
#define TO_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define TO_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define TO_32 TO_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TO_48 TO_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define TO_64 TO_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TO_80 TO_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define TO_96 TO_80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define TO_112 TO_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define TO_128 TO_112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// sum[i, j] += a[i, :] * b[j, :]. sum: 64 rows of COLUMNS columns, of which thread t holds parts of two rows: t / 32 *
// 16 + t % 32 / 4 (half 0), and the row 8 further (half 1). sum[4 * j + 2 * half + {0, 1}] has the columns 8 * j + 2 *
// (t % 4) + {0, 1}. a: 16 columns in registers, in the layout of a sum and packed in pairs. b: 16 columns in shared
// memory. A0 to B: the numbers of the operands that follow the sums.
#define MULTIPLY_ROWS(COLUMNS, NUMBERS, A0, A1, A2, A3, B, ...)                                                      \
    __device__ __forceinline__ void multiply_rows(float (&sum)[COLUMNS / 2], const u32 (&a)[4], u64 b) {             \
        asm volatile(                                                                                                \
            "{.reg .pred p; setp.eq.b32 p, 0, 0;"                                                                    \
            "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPES "." TYPES                                  \
            " {" NUMBERS "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, 0;}"                        \
            : __VA_ARGS__                                                                                            \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                   \
    }
MULTIPLY_ROWS(8, TO_4, 4, 5, 6, 7, 8, SUMS4(sum, 0))
MULTIPLY_ROWS(16, TO_8, 8, 9, 10, 11, 12, SUMS8(sum, 0))
MULTIPLY_ROWS(32, TO_16, 16, 17, 18, 19, 20, SUMS16(sum, 0))
MULTIPLY_ROWS(64, TO_32, 32, 33, 34, 35, 36, SUMS32(sum, 0))
MULTIPLY_ROWS(128, TO_64, 64, 65, 66, 67, 68, SUMS32(sum, 0), SUMS32(sum, 32))
MULTIPLY_ROWS(192, TO_96, 96, 97, 98, 99, 100, SUMS32(sum, 0), SUMS32(sum, 32), SUMS32(sum, 64))
MULTIPLY_ROWS(256, TO_128, 128, 129, 130, 131, 132, SUMS32(sum, 0), SUMS32(sum, 32), SUMS32(sum, 64), SUMS32(sum, 96))

// sum[i, j] += a[i, :] * b[j, :], as `multiply_rows`, with a in shared memory, too: 64 rows of 16 columns.
#define MULTIPLY_SHARED(COLUMNS, NUMBERS, A, B, ...)                                                                 \
    __device__ __forceinline__ void multiply_shared(float (&sum)[COLUMNS / 2], u64 a, u64 b) {                       \
        asm volatile(                                                                                                \
            "{.reg .pred p; setp.eq.b32 p, 0, 0;"                                                                    \
            "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPES "." TYPES                                  \
            " {" NUMBERS "}, %" #A ", %" #B ", p, 1, 1, 0, 0;}"                                                      \
            : __VA_ARGS__                                                                                            \
            : "l"(a), "l"(b));                                                                                       \
    }
MULTIPLY_SHARED(8, TO_4, 4, 5, SUMS4(sum, 0))
MULTIPLY_SHARED(16, TO_8, 8, 9, SUMS8(sum, 0))
MULTIPLY_SHARED(32, TO_16, 16, 17, SUMS16(sum, 0))
