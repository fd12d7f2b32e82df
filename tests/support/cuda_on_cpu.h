// Replaces ptx.cuh to run kernels of kernels/cuda/ on a CPU. A thread of a kernel is a fiber, which gives way
// to other fibers only at barriers and at instructions of a whole warp. Blocks run one after another, or
// together if they wait for each other. With a seed, threads take turns in random orders, warps pause now and
// then while other warps go on, and copies arrive late.

#include "fibers.h"

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
struct uint4 {
    u32 x, y, z, w;
};
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Place {
    unsigned x, y, z;
};

#define __device__
#define __grid_constant__
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

constexpr size_t STACK = 1 << 17;

struct Barrier {
    unsigned arrived = 0, round = 0;
};
struct Operands {
    u32 a[4], b[2];
};
struct Thread : Fiber {
    std::unique_ptr<char[]> stack{new char[STACK]};
};
static Place threadIdx, blockIdx, blockDim, gridDim;
static unsigned me, first_block;  // index of the running fiber; index of the first of the running blocks
static std::vector<Thread> threads;
static std::vector<Barrier> warp_barriers, block_barriers;
static std::map<std::pair<unsigned, int>, Barrier> named_barriers;
static std::vector<Operands> operands;
static std::unique_ptr<std::mt19937> random_numbers;  // null: without a seed
static u8 *dynamic_memory, *memory_of_blocks;
static unsigned memory_size;

inline void become(unsigned fiber) {
    me = fiber, threadIdx.x = fiber % blockDim.x, blockIdx.x = first_block + fiber / blockDim.x;
    dynamic_memory = memory_of_blocks + fiber / blockDim.x * memory_size;
}

inline void give_way() { threads[me].give_way(); }

template <class F> void wait_until(F ready) {
    if (!ready()) threads[me].wait_until(ready);
}

inline void meet(Barrier& barrier, unsigned count) {
    const unsigned round = barrier.round;
    if (++barrier.arrived == count) barrier.arrived = 0, ++barrier.round;
    else wait_until([&] { return barrier.round != round; });
}

inline void __syncwarp() { meet(warp_barriers[me / 32], 32); }
inline void __syncthreads() { meet(block_barriers[me / blockDim.x], blockDim.x); }
inline void meet_at(int id, int count) { meet(named_barriers[{me / blockDim.x, id}], count); }

template <class T> T __shfl_sync(u32, T x, int lane) {
    static std::vector<T> all;
    all.resize(threads.size());
    all[me] = x;
    __syncwarp();
    const T found = all[me / 32 * 32 + lane];
    __syncwarp();
    return found;
}
template <class T> T __shfl_xor_sync(u32 mask, T x, int lanes) { return __shfl_sync(mask, x, threadIdx.x % 32 ^ lanes); }

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
inline u32 bytes_and_signs(u32 x, u32 selector) {
    u32 found = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 choice = selector >> 4 * i & 15, byte = x >> 8 * (choice & 3) & 0xFF;
        found |= (choice < 8 ? byte : byte >> 7 ? 0xFF : 0) << 8 * i;
    }
    return found;
}
inline float half_to_float(u32 bits) {
    const int exponent = bits >> 10 & 31, digits = bits & 1023;
    const float size = exponent == 0    ? std::ldexp((float)digits, -24)
                       : exponent == 31 ? (digits ? NAN : INFINITY)
                                        : std::ldexp((float)(1024 + digits), exponent - 25);
    return bits & 0x8000 ? -size : size;
}
inline u32 half_of(float f) {  // the nearest float16, its bits
    if (f != f) return 0x7FFF;
    const u32 sign = bits_of(f) >> 16 & 0x8000;
    const float size = std::fabs(f);
    if (size >= 65520.f) return sign | 0x7C00;
    int exponent;
    std::frexp(size, &exponent);
    exponent = std::max(exponent - 1, -14);
    const u32 digits = (u32)std::nearbyint(std::ldexp(size, 10 - exponent));
    return sign | (digits < 1024 ? digits : ((exponent + 15) << 10) + digits - 1024);
}
inline u32 rounded(float f) {  // to the nearest 16-bit float, its bits
#if BF16
    if (f != f) return 0x7FFF;
    const u32 bits = bits_of(f);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
#else
    return half_of(f);
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
inline u32 half_pair_of(float first, float second) { return half_of(first) | half_of(second) << 16; }
inline u32 subtract(u32 a, u32 b) { return pair_of(low(a) - low(b), high(a) - high(b)); }
inline u32 times(u32 a, u32 b) { return pair_of(low(a) * low(b), high(a) * high(b)); }

inline float power_of_2(float x) {
    const float found = std::exp2(x);
    return found < 0x1p-126f ? 0.f : found;
}
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }

inline float sum_of_warp(float x) {
    const unsigned self = me, first = self / 32 * 32;
    for (unsigned distance = 16; distance > 0; distance /= 2) {
        operands[self].a[0] = bits_of(x);
        __syncwarp();
        x += __uint_as_float(operands[first + (self % 32 ^ distance)].a[0]);
        __syncwarp();
    }
    return x;
}

// mma.m16n8k16: sum += weights [16, 16] * inputs [16, 8]; number: the value of the bits of one of them
template <class NUMBER> void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1, NUMBER number) {
    auto low = [&](u32 pair) { return (double)number(pair & 0xFFFF); };
    auto high = [&](u32 pair) { return (double)number(pair >> 16); };
    const unsigned self = me, first = self / 32 * 32, lane = self % 32;
    operands[self] = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    __syncwarp();
    for (int i = 0; i < 4; ++i) {
        const unsigned row = lane / 4, column = 2 * (lane % 4) + i % 2;
        double total = sum[i];
        for (int k = 0; k < 8; ++k) {  // pairs of inputs
            const u32 weights = operands[first + 4 * row + k % 4].a[2 * (k / 4) + i / 2];
            const u32 inputs = operands[first + 4 * column + k % 4].b[k / 4];
            total += low(weights) * low(inputs) + high(weights) * high(inputs);
        }
        sum[i] = (float)total;
    }
    __syncwarp();
}

inline void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) { multiply(sum, a, b0, b1, value_of); }
inline void multiply_halves(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    multiply(sum, a, b0, b1, half_to_float);
}

// -- memory --------------------------------------------------------------------------------------------

inline void wait_for_predecessor() {}
inline void release_successor() {}
inline uint4 load_once(const u8* p) {
    uint4 v;
    memcpy(&v, p, 16);
    return v;
}
inline uint2 load_once_8(const u8* p) {
    uint2 v;
    memcpy(&v, p, 8);
    return v;
}

// Loads and stores of memory that another thread of this process, which stands in for another GPU, may store
// or load at the same time.
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

// A barrier's word: arrivals still to come in bits 0 to 15, arrivals of a round in bits 16 to 31, parity of the
// round in bit 32.
inline void make_barrier(u64* barrier, u32 count) { *barrier = (u64)count << 16 | count; }
inline void publish_barriers() {}
inline void finish_reads() {}
inline void arrive_at(u64* barrier) {
    if ((--*barrier & 0xFFFF) == 0) *barrier = (*barrier ^ 1ull << 32) | (*barrier >> 16 & 0xFFFF);
}
struct Copy {
    u64* arrived;
    std::function<void()> move;

    void make() const { move(), arrive_at(arrived); }
};
static std::vector<Copy> late_copies;
inline void copy_later(u64* arrived, std::function<void()> move) {
    const Copy copy = {arrived, std::move(move)};
    if (random_numbers) late_copies.push_back(copy);
    else copy.make();
}
inline void copy_to_shared(void* to, const u8* from, u32 bytes, u64* arrived) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16) __builtin_trap();
    copy_later(arrived, [=] { memcpy(to, from, bytes); });
}
inline void wait_for(u64* arrived, u32 parity) {
    wait_until([=] { return (*(volatile u64*)arrived >> 32 & 1) != parity; });
}
template <class T> T load_from_l2(const T* p) { return *p; }
inline void prefetch_to_l2(const void*) {}
template <class T> T __ldg(const T* p) { return *p; }
// A thread that polls a word must let the thread run that will store the word.
template <class T> T load_now(const T* p) {
    bool is_late = false;
    wait_until([&] { return std::exchange(is_late, true); });
    return *p;
}
template <class T> void store_now(T* p, T x) { *p = x; }
inline u64 add_one(u64* counter) { return (*counter)++; }
inline bool __any_sync(u32, bool x) {
    static std::vector<char> all;
    all.resize(threads.size());
    all[me] = x;
    __syncwarp();
    const bool found = std::count(&all[me / 32 * 32], &all[me / 32 * 32] + 32, 1);
    __syncwarp();
    return found;
}
inline u64 load_acquire(const u64* counter) { return *counter; }
inline void add_release(u64* counter, u64 count) { *counter += count; }
inline void wait_for_count(const u64* counter, u64 count) {
    wait_until([=] { return *(const volatile u64*)counter >= count; });
}
inline u32 add_modulo(u32* counter, u32 size) {
    const u32 before = *counter;
    *counter = before + 1 == size ? 0 : before + 1;
    return before;
}
inline u64 cycles() { return 0; }
template <int N> void shrink_registers() {}
template <int N> void grow_registers() {}
inline float __expf(float x) { return std::exp(x); }

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

// Make some of the copies that are due. Returns whether any was due.
inline bool make_late_copies() {
    const size_t due = late_copies.size();
    for (size_t i = 0; i < due; ++i) {
        std::swap(late_copies[i], late_copies[i + (*random_numbers)() % (due - i)]);
        late_copies[i].make();
        if ((*random_numbers)() % 4 == 0) {
            late_copies.erase(late_copies.begin(), late_copies.begin() + i + 1);
            return true;
        }
    }
    late_copies.clear();
    return due;
}

inline void choose_rests(std::vector<unsigned>& rests) {
    for (unsigned& rest : rests) {
        if (rest) --rest;
        else if ((*random_numbers)() % 256 == 0) rest = (*random_numbers)() % 256;
    }
}

// Returns false if the fibers wait for ever.
template <class Body> bool run_blocks(const Body& body, unsigned num_blocks) {
    static const Body* kernel;
    kernel = &body;
    const unsigned count = blockDim.x * num_blocks;
    warp_barriers.assign(count / 32, Barrier());
    block_barriers.assign(num_blocks, Barrier());
    named_barriers.clear();
    for (Thread& thread : threads)
        thread.prepare(thread.stack.get(), STACK, [] { (*kernel)(), threads[me].end(); });
    std::vector<unsigned> order(count), rests(count / 32);  // turns for which a warp rests
    std::iota(order.begin(), order.end(), 0);
    for (bool is_running = true; is_running;) {
        is_running = false;
        bool has_moved = random_numbers && make_late_copies();
        if (random_numbers) std::shuffle(order.begin(), order.end(), *random_numbers), choose_rests(rests);
        for (unsigned i : order) {
            is_running |= threads[i].is_alive();
            if (threads[i].is_alive() && rests[i / 32]) {
                has_moved = true;
                continue;
            }
            if (!threads[i].can_run()) continue;
            has_moved = true;
            become(i);
            threads[i].run();
        }
        if (is_running && !has_moved) return false;
    }
    return true;
}

// num_blocks: the number of neighbouring blocks that run at the same time. seed: 0 for the order of the threads' numbers.
template <class Body> bool run_grid(
    Body body, unsigned x, unsigned y, unsigned count, unsigned shared_bytes, unsigned num_blocks, unsigned seed) {
    random_numbers.reset(seed ? new std::mt19937(seed) : nullptr);
    memory_size = (shared_bytes + 127) / 128 * 128;
    std::vector<u8> memory(size_t(memory_size) * num_blocks + 1024, 0xFF);  // NaN
    memory_of_blocks = memory.data() + (1024 - (uintptr_t)memory.data() % 1024) % 1024;
    blockDim = {count, 1, 1}, gridDim = {x, y, 1};
    threads.resize(count * num_blocks), operands.resize(count * num_blocks);
    bool has_ended = true;
    for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y)
        for (first_block = 0; first_block < x; first_block += num_blocks) has_ended &= run_blocks(body, num_blocks);
    return has_ended;
}
