// Wrappers of the PTX instructions for which CUDA C++ has no function. tests/support/cuda_on_cpu.py replaces
// this file, so that the kernels run on a CPU.

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#if BF16
#define PAIR "bf16x2"
#define MMA_TYPES "f32.bf16.bf16.f32"
#else
#define PAIR "f16x2"
#define MMA_TYPES "f32.f16.f16.f32"
#endif

// -- programmatic dependent launch -------------------------------------------------------------------

__device__ __forceinline__ void wait_for_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ void release_successor() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// -- arithmetic on pairs of 16-bit floats ------------------------------------------------------------

__device__ __forceinline__ u32 subtract(u32 a, u32 b) {
    u32 d;
    asm("sub.rn." PAIR " %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ __forceinline__ u32 times(u32 a, u32 b) {
    u32 d;
    asm("mul.rn." PAIR " %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ __forceinline__ u32 pair_of(float low, float high) {
    u32 d;
    asm("cvt.rn." PAIR ".f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

__device__ __forceinline__ float half_to_float(u32 bits) {
    float f;
    asm("{.reg .b16 t; cvt.u16.u32 t, %1; cvt.f32.f16 %0, t;}" : "=f"(f) : "r"(bits));
    return f;
}

// A pair of float16, whatever the dtype.
__device__ __forceinline__ u32 half_pair_of(float low, float high) {
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

// 2^x, to some 22 bits; 0 where the result would be subnormal.
__device__ __forceinline__ float power_of_2(float x) {
    float d;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

// Four bytes, chosen by the four bits of `selector` for each: 0 to 3 is this byte of x, and 8 to 11 is the sign (the
// highest bit) of byte 0 to 3, in all eight bits.
__device__ __forceinline__ u32 bytes_and_signs(u32 x, u32 selector) {
    u32 d;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(d) : "r"(x), "r"(selector));
    return d;
}

// The sum over the threads of a warp, in a fixed order; all threads get the same bits.
__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, distance);
    return x;
}

// sum += weights [16, 16] * inputs [16, 8]
__device__ __forceinline__ void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col." MMA_TYPES
        " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same for float16, whatever the dtype.
__device__ __forceinline__ void multiply_halves(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
        " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// -- memory ------------------------------------------------------------------------------------------

// Load 16 bytes that are read only once, without keeping them in the L1 cache.
__device__ __forceinline__ uint4 load_once(const u8* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// The same for 8 bytes.
__device__ __forceinline__ uint2 load_once_8(const u8* p) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

// Store or load 16 bytes in the memory of this or of another GPU, while another GPU loads or stores them. Each
// of the four words arrives as a whole.
__device__ __forceinline__ void send(u8* to, const uint4& v) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ uint4 received(const u8* from) {
    uint4 v;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    return v;
}
// Load a word that the host or another GPU may write at the same time.
__device__ __forceinline__ u32 now(const u32* p) { return *(const volatile u32*)p; }

__device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// A barrier in shared memory that opens after `count` arrivals; `copy_to_shared` arrives once.
__device__ __forceinline__ void make_barrier(u64* barrier, u32 count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address(barrier)), "r"(count));
}

__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrive at a barrier, which then also waits for so many bytes to be copied.
__device__ __forceinline__ void expect_bytes(u64* arrived, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address(arrived)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_to_shared(void* to, const u8* from, u32 bytes, u64* arrived) {
    expect_bytes(arrived, bytes);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(address(to)), "l"(from), "r"(bytes), "r"(address(arrived)) : "memory");
}

__device__ __forceinline__ void wait_for(u64* arrived, u32 parity) {
    asm volatile("{.reg .pred p; again: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @!p bra again;}"
                 ::"r"(address(arrived)), "r"(parity) : "memory");
}

// Wait at the block's named barrier `id` (0 to 15) for `threads` threads.
__device__ __forceinline__ void meet_at(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrive at a barrier in shared memory.
__device__ __forceinline__ void arrive_at(u64* barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}

// Call before another thread learns that this thread has read shared memory, which copies may then overwrite.
// Without this fence, a copy may overtake loads that are still in flight.
__device__ __forceinline__ void finish_reads() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// -- memory that other blocks write while the kernel runs ----------------------------------------------

__device__ __forceinline__ uint4 load_from_l2(const uint4* p) { return __ldcg(p); }
__device__ __forceinline__ uint2 load_from_l2(const uint2* p) { return __ldcg(p); }
__device__ __forceinline__ float2 load_from_l2(const float2* p) { return __ldcg(p); }
__device__ __forceinline__ u16 load_from_l2(const u16* p) { return __ldcg(p); }

__device__ __forceinline__ void prefetch_to_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Loads and stores of words that take the place of a barrier. The compiler must not merge or drop them, as a
// thread loads a word until another block has stored it.
__device__ __forceinline__ u32 load_now(const u32* p) {
    u32 x;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}
__device__ __forceinline__ uint4 load_now(const uint4* p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void store_now(u32* p, u32 x) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
__device__ __forceinline__ void store_now(uint2* p, uint2 x) {
    asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(x.x), "r"(x.y) : "memory");
}

// Counters that all blocks share. A thread that sees the new count also sees everything that the adding thread
// wrote before, and what the threads wrote that the adding thread had met at a barrier.
__device__ __forceinline__ u64 load_acquire(const u64* counter) {
    u64 found;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(counter) : "memory");
    return found;
}
__device__ __forceinline__ void add_release(u64* counter, u64 count) {
    asm volatile("red.release.gpu.global.add.u64 [%0], %1;" ::"l"(counter), "l"(count) : "memory");
}
__device__ __forceinline__ void wait_for_count(const u64* counter, u64 count) {
    while (load_acquire(counter) < count) {}
}
__device__ __forceinline__ u64 add_one(u64* counter) { return atomicAdd(counter, 1ull); }
// Count from 0 to size - 1 and then from 0 again; returns the count before the call.
__device__ __forceinline__ u32 add_modulo(u32* counter, u32 size) {
    __threadfence();
    const u32 before = atomicInc(counter, size - 1);
    __threadfence();
    return before;
}

// The clock of this multiprocessor, in cycles.
__device__ __forceinline__ u64 cycles() {
    u64 now;
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(now)::"memory");
    return now;
}

// Set the number of registers per thread of this warpgroup.
template <int N> __device__ __forceinline__ void shrink_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void grow_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
