// Runs kernels of kernels/cuda/ on a CPU, in place of ptx.cuh: a thread is a fiber, which gives way to
// the others only at barriers and at the instructions of a warp. One block runs after another.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
struct uint4 {
    u32 x, y, z, w;
};
struct Place {
    unsigned x, y, z;
};

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(threads, blocks)

using std::max;
using std::min;
struct uint2 {
    u32 x, y;
};
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

// -- threads -----------------------------------------------------------------------------------------

struct Barrier {
    unsigned arrived = 0, round = 0;
};
struct Operands {
    u32 a[4], b[2];
};
struct Thread {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 17);
    bool has_ended = false;
};
static Place threadIdx, blockIdx, blockDim, gridDim;
static std::vector<Thread> threads;
static std::vector<Barrier> warp_barriers;
static std::vector<Operands> operands;
static Barrier block_barrier;
static ucontext_t scheduler;
static u8* dynamic_memory;

inline void give_way() {
    const unsigned self = threadIdx.x;
    swapcontext(&threads[self].context, &scheduler);
    threadIdx.x = self;
}

inline void meet(Barrier& barrier, unsigned count) {
    const unsigned round = barrier.round;
    if (++barrier.arrived == count) barrier.arrived = 0, ++barrier.round;
    else
        while (barrier.round == round) give_way();
}

inline void __syncwarp() { meet(warp_barriers[threadIdx.x / 32], 32); }
inline void __syncthreads() { meet(block_barrier, blockDim.x); }

// -- arithmetic ----------------------------------------------------------------------------------------

inline u32 bits_of(float f) {
    u32 bits;
    memcpy(&bits, &f, 4);
    return bits;
}
inline float __uint_as_float(u32 bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline u32 __byte_perm(u32 low, u32 high, u32 selector) {
    const u64 bytes = (u64)high << 32 | low;
    u32 found = 0;
    for (int i = 0; i < 4; ++i) found |= (u32)(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return found;
}
inline float half_to_float(u32 bits) {
    const int exponent = bits >> 10 & 31, digits = bits & 1023;
    const float size = exponent == 0    ? std::ldexp((float)digits, -24)
                       : exponent == 31 ? (digits ? NAN : INFINITY)
                                        : std::ldexp((float)(1024 + digits), exponent - 25);
    return bits & 0x8000 ? -size : size;
}
inline u32 rounded(float f) {  // to the nearest 16-bit float, its bits
    if (f != f) return 0x7FFF;
#if BF16
    const u32 bits = bits_of(f);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
#else
    const u32 sign = bits_of(f) >> 16 & 0x8000;
    const float size = std::fabs(f);
    if (size >= 65520.f) return sign | 0x7C00;
    int exponent;
    std::frexp(size, &exponent);
    exponent = std::max(exponent - 1, -14);
    const u32 digits = (u32)std::nearbyint(std::ldexp(size, 10 - exponent));
    return sign | (digits < 1024 ? digits : ((exponent + 15) << 10) + digits - 1024);
#endif
}
inline float value_of(u32 bits) {
#if BF16
    return __uint_as_float(bits << 16);
#else
    return half_to_float(bits);
#endif
}
inline float low(u32 pair) { return value_of(pair & 0xFFFF); }
inline float high(u32 pair) { return value_of(pair >> 16); }
inline u32 pair_of(float first, float second) { return rounded(first) | rounded(second) << 16; }
inline u32 subtract(u32 a, u32 b) { return pair_of(low(a) - low(b), high(a) - high(b)); }
inline u32 times(u32 a, u32 b) { return pair_of(low(a) * low(b), high(a) * high(b)); }

inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }

inline float sum_of_warp(float x) {
    const unsigned self = threadIdx.x, first = self / 32 * 32;
    for (unsigned distance = 16; distance > 0; distance /= 2) {
        operands[self].a[0] = bits_of(x);
        __syncwarp();
        x += __uint_as_float(operands[first + (self % 32 ^ distance)].a[0]);
        __syncwarp();
    }
    return x;
}

// mma.m16n8k16: sum += weights [16, 16] * inputs [16, 8]
inline void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const unsigned self = threadIdx.x, first = self / 32 * 32, lane = self % 32;
    operands[self] = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    __syncwarp();
    for (int i = 0; i < 4; ++i) {
        const unsigned row = lane / 4, column = 2 * (lane % 4) + i % 2;
        double total = sum[i];
        for (int k = 0; k < 8; ++k) {  // pairs of inputs
            const u32 weights = operands[first + 4 * row + k % 4].a[2 * (k / 4) + i / 2];
            const u32 inputs = operands[first + 4 * column + k % 4].b[k / 4];
            total += (double)low(weights) * low(inputs) + (double)high(weights) * high(inputs);
        }
        sum[i] = (float)total;
    }
    __syncwarp();
}

// -- memory --------------------------------------------------------------------------------------------

inline void wait_for_predecessor() {}
inline void release_successor() {}
inline uint4 load_once(const u8* p) {
    uint4 v;
    memcpy(&v, p, 16);
    return v;
}

// Memory that another thread of this process, for a kernel another GPU, reads or writes meanwhile.
inline void send(u8* to, const uint4& v) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    for (int i = 0; i < 4; ++i) __atomic_store_n((u32*)to + i, words[i], __ATOMIC_RELAXED);
}
inline uint4 received(const u8* from) {
    u32 words[4];
    for (int i = 0; i < 4; ++i) words[i] = __atomic_load_n((const u32*)from + i, __ATOMIC_RELAXED);
    give_way();  // this thread may wait for what other threads of its block have yet to send
    return {words[0], words[1], words[2], words[3]};
}
inline u32 now(const u32* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }

// A barrier's word: copies to come, copies of a round, parity of the round.
inline void make_barrier(u64* barrier, u32 count) { *barrier = (u64)count << 16 | count; }
inline void publish_barriers() {}
inline void copy_to_shared(void* to, const u8* from, u32 bytes, u64* arrived) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16) __builtin_trap();
    memcpy(to, from, bytes);
    if ((--*arrived & 0xFFFF) == 0) *arrived = (*arrived ^ 1ull << 32) | (*arrived >> 16 & 0xFFFF);
}
inline void wait_for(u64* arrived, u32 parity) {
    while ((*arrived >> 32 & 1) == parity) give_way();
}

// -- launching -----------------------------------------------------------------------------------------

template <class... Types> struct Call {
    void (*kernel)(Types...);
    void** arguments;
    template <size_t... I> void with(std::index_sequence<I...>) const { kernel(*(Types*)arguments[I]...); }
    void operator()() const { with(std::index_sequence_for<Types...>()); }
};
template <class... Types> Call<Types...> call(void (*kernel)(Types...), void** arguments) {
    return {kernel, arguments};
}

template <class Body> void run_thread(Body* body) {
    (*body)();
    threads[threadIdx.x].has_ended = true;
}

template <class Body> void run_block(Body& body) {
    const unsigned count = blockDim.x;
    warp_barriers.assign(count / 32, Barrier());
    block_barrier = Barrier();
    for (Thread& thread : threads) {
        thread.has_ended = false;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = &scheduler;
        makecontext(&thread.context, (void (*)())(void (*)(Body*))run_thread<Body>, 1, &body);
    }
    for (bool is_running = true; is_running;) {
        is_running = false;
        for (unsigned i = 0; i < count; ++i) {
            if (threads[i].has_ended) continue;
            is_running = true, threadIdx.x = i;
            swapcontext(&scheduler, &threads[i].context);
        }
    }
}

template <class Body> void run_grid(Body body, unsigned x, unsigned y, unsigned count, unsigned shared_bytes) {
    alignas(128) static u8 memory[1 << 18];
    if (shared_bytes > sizeof memory) __builtin_trap();
    dynamic_memory = memory;
    blockDim = {count, 1, 1}, gridDim = {x, y, 1};
    threads.resize(count), operands.resize(count);
    for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x) run_block(body);
}
