// Runs a kernel that includes `kernels/cuda/hopper.cuh` on a CPU: this file takes that header's place.
//
// The threads of a cluster of blocks are fibers that run in turn, so that a wait that nobody ends is noticed.
// Copies are made some turns after they were asked for; products when they are begun.

#include "fibers.h"

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
typedef long long i64;
struct uint4 { u32 x, y, z, w; };
struct uint2 { u32 x, y; };
struct float4 { float x, y, z, w; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __shared__
#define __launch_bounds__(...)
#define INFINITE std::numeric_limits<float>::infinity()
#define __fdividef(a, b) ((a) / (b))
using std::max;
using std::min;

struct Index { int x; };
static Index threadIdx, blockIdx, gridDim;

// -- fibers --------------------------------------------------------------------------------------------

constexpr int THREADS = 384, MAX_BLOCKS = 8, FIBERS = THREADS * MAX_BLOCKS, STACK = 1 << 16, MEMORY = 256 << 10;
constexpr u32 FIRST_ADDRESS = 1024;
alignas(1024) u8 memory[MEMORY * MAX_BLOCKS];  // of each block
static Fiber fibers[FIBERS];
static u8 stacks[size_t(FIBERS) * STACK];
static int me, cluster_blocks, first_block, num_alive;
static long idle;  // turns since anything happened
static std::vector<std::function<void()>> copies;
static std::mt19937 chance(7);

inline int rank_in_cluster() { return me / THREADS; }
inline int cluster_size() { return cluster_blocks; }
inline void become(int fiber) { me = fiber, threadIdx.x = me % THREADS, blockIdx.x = first_block + rank_in_cluster(); }
template <class F> inline void wait_until(F ready) {
    if (!ready()) fibers[me].wait_until(ready);
    idle = 0;
}

template <class F> bool run_cluster(F kernel) {
    static std::function<void()> body;
    body = kernel;
    std::memset(memory, 0xFF, MEMORY * cluster_blocks);  // NaN
    copies.clear();
    idle = 0;
    const int threads = THREADS * cluster_blocks;
    num_alive = threads;
    for (int i = 0; i < threads; ++i)
        fibers[i].prepare(&stacks[size_t(i) * STACK], STACK, [] { body(), --num_alive, fibers[me].end(); });
    while (num_alive) {
        for (int i = 0; i < threads; ++i) {
            if (!fibers[i].can_run()) continue;
            become(i);
            fibers[i].run();
        }
        for (size_t n = copies.size() / 2 + (chance() % 4 == 0); n && copies.size(); --n) {
            const size_t i = chance() % copies.size();
            auto copy = copies[i];
            copies.erase(copies.begin() + i);
            copy();
            idle = 0;
        }
        if (++idle > 200) return false;  // all wait for ever
    }
    return copies.empty();
}

// -- barriers ------------------------------------------------------------------------------------------

struct Barrier { int arrivals, left; i64 bytes; u32 parity; };
struct Meeting { int arrived; u32 turn; };
static std::map<std::pair<int, u32>, Barrier> barriers_at;  // of a block
static std::map<std::pair<int, int>, Meeting> meetings;

inline u32 address(const void* p) { return u32((const u8*)p - memory) + FIRST_ADDRESS; }
inline u8* at_address(u32 a, int rank = rank_in_cluster()) {
    if (a < FIRST_ADDRESS || a >= FIRST_ADDRESS + MEMORY) abort();
    return memory + rank * MEMORY + (a - FIRST_ADDRESS);
}
inline Barrier& barrier_at(u32 a, int rank = rank_in_cluster()) { return barriers_at.at({rank, a}); }
inline void init(u32 barrier, int arrivals) { barriers_at[{rank_in_cluster(), barrier}] = {arrivals, arrivals, 0, 0}; }
inline void publish_barriers() {}
inline void end_phase(Barrier& b) {
    if (b.left < 0) abort();
    if (b.left == 0 && b.bytes == 0) b.left = b.arrivals, b.parity ^= 1;
}
inline void arrive(u32 barrier) { Barrier& b = barrier_at(barrier); --b.left; end_phase(b); }
inline void __syncwarp();
inline void arrive_of_warp(u32 barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(barrier);
}
inline void expect(u32 barrier, u32 bytes) { Barrier& b = barrier_at(barrier); b.bytes += bytes; --b.left; end_phase(b); }
inline void wait(u32 barrier, u32 parity) { Barrier& b = barrier_at(barrier); wait_until([&] { return b.parity != parity; }); }
inline bool arrive_at(Meeting& m, int threads) {
    if (++m.arrived < threads) return false;
    m.arrived = 0, ++m.turn;
    return true;
}
inline void pass(int id, int threads) { arrive_at(meetings[{rank_in_cluster(), id}], threads); }
inline void meet_at(Meeting& m, int threads) {
    const u32 turn = m.turn;
    if (!arrive_at(m, threads)) wait_until([&] { return m.turn != turn; });
}
inline void meet(int id, int threads) { meet_at(meetings[{rank_in_cluster(), id}], threads); }
// Threads that have ended do not count; those of the producing warps end without arriving.
inline void meet_cluster() {
    static Meeting all;
    const u32 turn = all.turn;
    ++all.arrived;
    wait_until([&] {
        if (all.turn == turn && all.arrived == num_alive) all.arrived = 0, ++all.turn;
        return all.turn != turn;
    });
}
inline float4 load_of_rank(int rank, u32 at) {
    float4 x;
    std::memcpy(&x, at_address(at, rank), 16);
    return x;
}
inline void __syncthreads() { meet(0, THREADS); }
inline void __syncwarp() { meet(100 + threadIdx.x / 32, 32); }
// What `use` makes of the values that the 32 lanes of this warp have.
template <class T, class F> auto share(T x, F use) {
    static T all[FIBERS];
    all[me] = x;
    __syncwarp();
    const auto found = use(&all[me / 32 * 32]);
    __syncwarp();
    return found;
}
template <class T> T from_lane(T x, int lane) { return share(x, [=](const T* all) { return all[lane]; }); }
inline float __shfl_xor_sync(u32, float x, int lanes) { return from_lane(x, me % 32 ^ lanes); }
inline int __shfl_sync(u32, int x, int lane) { return from_lane(x, lane); }
inline int __shfl_up_sync(u32, int x, int lanes) { return from_lane(x, max(me % 32 - lanes, 0)); }
inline int sum_of_warp(int x) { return share(x, [](const int* all) { return std::accumulate(all, all + 32, 0); }); }
inline u32 __ballot_sync(u32, bool x) {
    return share(x, [](const bool* all) {
        u32 found = 0;
        for (int lane = 0; lane < 32; ++lane) found |= u32(all[lane]) << lane;
        return found;
    });
}
inline bool __any_sync(u32 lanes, bool x) { return __ballot_sync(lanes, x); }
inline int __popc(u32 x) { return __builtin_popcount(x); }

// -- memory --------------------------------------------------------------------------------------------

inline u32 swizzled(u32 a) { return a ^ (a >> 7 & 7) << 4; }

// Address, 5 sizes, 4 strides in bytes, 3 sizes of a box, whose rows have 128 bytes.
struct alignas(64) TensorMap { u64 words[16]; };

inline void copy_box(u32 to, const TensorMap* map, u32 barrier, int x0, int x1, int x2, int x3, int x4) {
    const u64* w = map->words;
    const int rank = rank_in_cluster();
    copies.push_back([=] {
        const u64 size = 128 / w[10];  // bytes of an element
        for (u64 row = 0; row < w[11] * w[12]; ++row)
            for (u64 byte = 0; byte < 128; ++byte) {
                const u64 at[5] = {x0 + byte / size, x1 + row % w[11], x2 + row / w[11], u64(x3), u64(x4)};
                bool inside = true;
                u64 offset = x0 * size + byte;
                for (int i = 0; i < 5; ++i) inside = inside && at[i] < w[1 + i], offset += i ? at[i] * w[5 + i] : 0;
                *at_address(swizzled(to + row * 128 + byte), rank) = inside ? *(const u8*)(w[0] + offset) : 0;
            }
        Barrier& b = barrier_at(barrier, rank);
        b.bytes -= w[11] * w[12] * 128;
        end_phase(b);
    });
}
inline void store_16_bytes(u32 to, uint4 x) { std::memcpy(at_address(to), &x, 16); }
inline uint4 load_16_bytes(u32 at) {
    uint4 x;
    std::memcpy(&x, at_address(at), 16);
    return x;
}
inline void store_4_bytes(u32 to, u32 x) { std::memcpy(at_address(to), &x, 4); }
template <class T> void store_words(u32 to, const T& x) { std::memcpy(at_address(to), &x, sizeof(T)); }
template <class T> void load_words(T& x, u32 at) { std::memcpy(&x, at_address(at), sizeof(T)); }
inline int atomicAdd(int* at, int x) { return std::exchange(*at, *at + x); }
inline void store_8_bytes(u32 to, float x, float y) { std::memcpy(at_address(to), &x, 4), std::memcpy(at_address(to + 4), &y, 4); }
inline void publish_to_tensor_cores() {}
inline void release_next_kernel() {}
inline void wait_for_previous_kernel() {}
template <int N> void shrink_registers() {}
template <int N> void grow_registers() {}

// -- numbers, products ---------------------------------------------------------------------------------

inline float unpack(u16 bits) {
#if BF16
    const u32 wide = u32(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
#else
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return x;
#endif
}
inline u16 narrow(float x) {
    u16 bits;
#if BF16
    u32 wide;
    std::memcpy(&wide, &x, 4);
    bits = x != x ? 0x7FFF : (wide + 0x7FFF + (wide >> 16 & 1)) >> 16;
#else
    const _Float16 half = _Float16(x);
    std::memcpy(&bits, &half, 2);
#endif
    return bits;
}
inline u32 pair_of(float low, float high) { return narrow(low) | u32(narrow(high)) << 16; }
inline void begin_products() {}
inline void commit_products() {}
template <int PENDING> void wait_products() {}
template <class T> void settle(T&) {}
inline void compute_now(float x, u32) { if (x < 0) abort(); }

inline u64 matrix(u32 at, u32 stride) { return u64(at) | u64(stride) << 32; }
inline float element(u32 a) { return unpack(*(const u16*)at_address(swizzled(a))); }

template <int N> void multiply(float (&sum)[N], u64 a, u64 b, int add) {
    const int t = threadIdx.x % 128;
    for (int i = 0; i < N; ++i) {
        const int row = t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + t % 4 * 2 + i % 2;
        float x = add ? sum[i] : 0;
        for (int k = 0; k < 16; ++k) x += element(u32(a) + row * 128 + 2 * k) * element(u32(b) + column * 128 + 2 * k);
        sum[i] = x;
    }
}
template <int N> void multiply(float (&sum)[N], const u32* a, u64 b) {
    static u32 all[FIBERS][4];
    const int t = threadIdx.x;
    std::memcpy(all[me], a, 16);
    __syncwarp();
    for (int i = 0; i < N; ++i) {
        const int half = i / 2 % 2, column = i / 4 * 8 + t % 4 * 2 + i % 2;
        float x = sum[i];
        for (int k = 0; k < 16; ++k) {
            const u32 both = all[me / 4 * 4 + k % 8 / 2][2 * (k / 8) + half];
            x += unpack(u16(k % 2 ? both >> 16 : both)) * element(u32(b) + column / 64 * u32(b >> 32) + k * 128 + column % 64 * 2);
        }
        sum[i] = x;
    }
    __syncwarp();
}

// -- launches ------------------------------------------------------------------------------------------

// Call KERNEL with the arguments at these addresses, as the driver does.
template <class... Arguments, size_t... I>
void call(void (*kernel)(Arguments...), void** at, std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<Arguments>*)at[I]...);
}

// Run all clusters of a kernel, one after another. Returns 0, or 1 + the first block of one that waits for ever.
template <class... Arguments> int launch(void (*kernel)(Arguments...), int blocks, int cluster, void** arguments) {
    gridDim.x = blocks, cluster_blocks = cluster;
    for (first_block = 0; first_block < blocks; first_block += cluster) {
        barriers_at.clear();
        meetings.clear();
        if (!run_cluster([&] { call(kernel, arguments, std::index_sequence_for<Arguments...>()); })) return 1 + first_block;
    }
    return 0;
}
