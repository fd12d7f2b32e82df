// Instructions of compute capability 9.0: barriers (mbarrier) and copies (TMA) in shared memory, and products
// of a warpgroup (128 threads) on the tensor cores (wgmma). Addresses of shared memory are 32 bits wide.
//
// Defined before: BF16 (16-bit numbers are bfloat16, otherwise float16).

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#include "cluster.cuh"
#include "tensor_copies.cuh"
#include "wgmma.cuh"

#define INFINITE __int_as_float(0x7f800000)

// -- barriers ------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// A barrier (mbarrier) of 8 bytes in shared memory. A phase of the barrier completes when `arrivals` threads
// have arrived and all bytes announced by `expect` have been copied. Phases have parity 0, 1, 0, ...; before
// the first phase completes, a wait for parity 1 returns at once.
__device__ __forceinline__ void init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {  // announces bytes, and arrives
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    asm volatile("{.reg .pred p; again: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @!p bra again;}"
                 ::"r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void arrive_of_warp(u32 barrier) {  // once, when all lanes are here
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(barrier);
}
// Wait at the block's named barrier `id` (0 to 15) for `threads` threads. `pass` arrives without waiting.
__device__ __forceinline__ void meet(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void pass(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// -- memory --------------------------------------------------------------------------------------------

__device__ __forceinline__ void store_16_bytes(u32 to, uint4 x) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ __forceinline__ uint4 load_16_bytes(u32 at) {
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at) : "memory");
    return x;
}
__device__ __forceinline__ void store_4_bytes(u32 to, u32 x) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}
// Store or load a structure of 32-bit numbers.
template <class T> __device__ __forceinline__ void store_words(u32 to, const T& x) {
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 4; ++i) store_4_bytes(to + 4 * i, ((const u32*)&x)[i]);
}
template <class T> __device__ __forceinline__ void load_words(T& x, u32 at) {
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 4; ++i)
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(((u32*)&x)[i]) : "r"(at + 4 * i) : "memory");
}
__device__ __forceinline__ void store_8_bytes(u32 to, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x), "f"(y) : "memory");
}
// After the next barrier, the tensor cores see what this thread has stored in shared memory.
__device__ __forceinline__ void publish_to_tensor_cores() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ int sum_of_warp(int x) { return __reduce_add_sync(~0u, x); }

// Programmatic dependent launch: the next kernel may start; wait until the previous kernel has ended.
__device__ __forceinline__ void release_next_kernel() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void wait_for_previous_kernel() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Set the number of registers per thread of this warpgroup.
template <int N> __device__ __forceinline__ void shrink_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void grow_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// -- numbers -------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 pair_of(float low, float high) {
    u32 both;
    asm("cvt.rn." TYPES "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ float unpack(u16 bits) {
#if BF16
    return __uint_as_float((u32)bits << 16);
#else
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
#endif
}
__device__ __forceinline__ float exp2(float x) {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}

// -- products ------------------------------------------------------------------------------------------

// Make the compiler compute x before this point. The store never happens, as x is never negative, but the
// compiler does not know that.
__device__ __forceinline__ void compute_now(float x, u32 anywhere) {
    if (x < 0.f) asm volatile("st.shared.b32 [%0], %1;" ::"r"(anywhere), "f"(x) : "memory");
}

// sum += a * b. sum: 64 rows of 64, 128, 160 or 176 columns. Thread t holds parts of two rows: t / 32 * 16 +
// t % 32 / 4 (half 0), and the row 8 further (half 1). sum[4 * j + 2 * half + {0, 1}] has the columns 8 * j +
// 2 * (t % 4) + {0, 1}.
// With a and b in shared memory, 16 columns each: sum[i, j] += a[i, :] * b[j, :]; without `add`, sum = a * b.
// With a in registers, in the layout of a sum and packed in pairs, and b in shared memory, 16 rows:
// sum[i, j] += a[i, :] * b[:, j].
__device__ __forceinline__ void multiply(float (&sum)[32], u64 a, u64 b, int add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %34, 0;"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES "." TYPES " "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1, 0, 0;}"
        : SUMS8(sum, 0), SUMS8(sum, 8), SUMS8(sum, 16), SUMS8(sum, 24)
        : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void multiply(float (&sum)[64], u64 a, u64 b, int add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %66, 0;"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPES "." TYPES " "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"
        " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"
        " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1, 0, 0;}"
        : SUMS8(sum, 0), SUMS8(sum, 8), SUMS8(sum, 16), SUMS8(sum, 24), SUMS8(sum, 32), SUMS8(sum, 40),
          SUMS8(sum, 48), SUMS8(sum, 56)
        : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void multiply(float (&sum)[80], u64 a, u64 b, int add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %82, 0;"
        "wgmma.mma_async.sync.aligned.m64n160k16.f32." TYPES "." TYPES " {" TO_80 "}, %80, %81, p, 1, 1, 0, 0;}"
        : SUMS32(sum, 0), SUMS32(sum, 32), SUMS16(sum, 64)
        : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void multiply(float (&sum)[88], u64 a, u64 b, int add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %90, 0;"
        "wgmma.mma_async.sync.aligned.m64n176k16.f32." TYPES "." TYPES " "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"
        " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"
        " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63,"
        " %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79,"
        " %80, %81, %82, %83, %84, %85, %86, %87}, "
        "%88, %89, p, 1, 1, 0, 0;}"
        : SUMS8(sum, 0), SUMS8(sum, 8), SUMS8(sum, 16), SUMS8(sum, 24), SUMS8(sum, 32), SUMS8(sum, 40),
          SUMS8(sum, 48), SUMS8(sum, 56), SUMS8(sum, 64), SUMS8(sum, 72), SUMS8(sum, 80)
        : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void multiply(float (&sum)[32], const u32* a, u64 b) {
    asm volatile(
        "{.reg .pred p; setp.eq.b32 p, 0, 0;"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES "." TYPES " "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, p, 1, 1, 1;}"
        : SUMS8(sum, 0), SUMS8(sum, 8), SUMS8(sum, 16), SUMS8(sum, 24)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void multiply(float (&sum)[64], const u32* a, u64 b) {
    asm volatile(
        "{.reg .pred p; setp.eq.b32 p, 0, 0;"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPES "." TYPES " "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"
        " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"
        " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, p, 1, 1, 1;}"
        : SUMS8(sum, 0), SUMS8(sum, 8), SUMS8(sum, 16), SUMS8(sum, 24), SUMS8(sum, 32), SUMS8(sum, 40),
          SUMS8(sum, 48), SUMS8(sum, 56)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
