// How activations pass from block to block, and their norms.

#pragma once

// -- threads that compute --------------------------------------------------------------------------------

__device__ __forceinline__ void meet() { meet_at(1, THREADS); }

struct Stamps {
    u64* times;  // [layers, 5 phases, 4, NUM_BLOCKS]

    __device__ __forceinline__ void write(int layer, int phase, int event) const {
#if STAMPS
        if (threadIdx.x == 0) times[((layer * 5 + phase) * 4 + event) * NUM_BLOCKS + blockIdx.x] = cycles();
#endif
    }
};

// Where a phase ends. The barrier over the grid is a counter that only grows: all launches add a multiple of
// NUM_BLOCKS, and no block passes the first barrier before all have read the counter, so that each finds where the
// launch began. With TAGGED there is no barrier, as each activation says whether it is there.
struct Grid {
    u64* counter;
    u64 awaited;

    __device__ __forceinline__ explicit Grid(u64* at) : counter(at) {
        if (TAGGED) return;
        const u64 now = load_acquire(counter);
        awaited = now - now % NUM_BLOCKS;
    }
    __device__ __forceinline__ void arrive() {
        if (TAGGED) return;
        meet();
        if (threadIdx.x == 0) add_release(counter, 1);
        awaited += NUM_BLOCKS;
    }
    __device__ __forceinline__ void wait() const {
        if (!TAGGED && threadIdx.x == 0) wait_for_count(counter, awaited);
        meet();
    }
};

__device__ __forceinline__ float over_warp(float x) {
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
    return x;
}

__device__ __forceinline__ float rounded_to_16_bits(float x) { return to_float((u16)pair_of(x, 0.f)); }

__device__ __forceinline__ float scaled_by_norm(float x, float scale, float weight) {
    if (PLUS_ONE) return x * scale * (1.f + weight);
    return rounded_to_16_bits(x * scale) * weight;
}

// -- activations -------------------------------------------------------------------------------------------

// An activation in the workspace: 16 bits. With TAGGED a word, whose upper half is a tag: a number that says in
// which launch and layer the word was written. A reader that finds another tag reads again. This takes a store and a
// load, where a barrier takes a fence and an atomic operation besides.
// A word is not written again before all have read it, because whoever writes has read what all readers made of it.
// Blocks without a share of a phase must not read, as they may be late. A tag returns after 512 launches. Until then
// all words have been written again, except rows that no launch had; these have a tag of one of the last layers, and
// the first layer, which writes them, expects another one.
#if TAGGED
typedef u32 Activation;
#else
typedef u16 Activation;
#endif
constexpr int LAYERS_OF_TAG = 128;  // at most these, and at least 3

__device__ __forceinline__ u32 tag_of(u64 launch_index, int layer) {
    return (u32)(launch_index * LAYERS_OF_TAG + layer) << 16;
}

__device__ __forceinline__ void put(u16* at, float x, u32) { *at = (u16)pair_of(x, 0.f); }
__device__ __forceinline__ void put(u32* at, float x, u32 tag) { store_now(at, (pair_of(x, 0.f) & 0xFFFF) | tag); }

__device__ __forceinline__ float get(const u16* at, u32) { return to_float(load_from_l2(at)); }
__device__ __forceinline__ float get(const u32* at, u32 tag) {
    u32 word = load_now(at);
    while ((word ^ tag) >> 16) word = load_now(at);
    return to_float((u16)word);
}

// COUNT times eight activations, of which each four lie at `place(i, half)`; it is null where they are zero.
template <int COUNT, class PLACE>
__device__ __forceinline__ void get_eights(uint4 (&found)[COUNT], PLACE place, u32 tag) {
    uint4 low[COUNT], high[COUNT];
    u32 wrong;
    do {
        wrong = 0;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const u32 *a = place(i, 0), *b = place(i, 1);
            low[i] = a ? load_now((const uint4*)a) : make_uint4(tag, tag, tag, tag);
            high[i] = a ? load_now((const uint4*)b) : make_uint4(tag, tag, tag, tag);
        }
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            wrong |= (low[i].x ^ tag) | (low[i].y ^ tag) | (low[i].z ^ tag) | (low[i].w ^ tag) | (high[i].x ^ tag)
                     | (high[i].y ^ tag) | (high[i].z ^ tag) | (high[i].w ^ tag);
    } while (__any_sync(~0u, wrong >> 16));
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        found[i] = make_uint4(__byte_perm(low[i].x, low[i].y, 0x5410), __byte_perm(low[i].z, low[i].w, 0x5410),
                              __byte_perm(high[i].x, high[i].y, 0x5410), __byte_perm(high[i].z, high[i].w, 0x5410));
}

// -- norms -------------------------------------------------------------------------------------------------

constexpr int WARPS_OF_ROW = WARPS / ROWS, X_LOADS = (HIDDEN / 8 + 32 * WARPS_OF_ROW - 1) / (32 * WARPS_OF_ROW);

// Normalise x [num_rows, HIDDEN] to shared memory [ROWS, X_PITCH bytes]; waits for x. X: u16 or Activation.
template <class X>
__device__ __forceinline__ void normalize(
    const X* x, u32 tag, const u16* weight, float eps, int num_rows, u8* scratch, float* small, const Grid& grid,
    bool waits) {
    const int warp = threadIdx.x / 32, row = warp % ROWS, first = warp / ROWS * 32 + threadIdx.x % 32;
    auto load_weight = [&](int i) {
        const int piece = first + 32 * WARPS_OF_ROW * i;
        return piece < HIDDEN / 8 ? __ldg((const uint4*)(weight + 8 * piece)) : make_uint4(0, 0, 0, 0);
    };
    constexpr bool LOADS_EARLY = X_LOADS <= 16;  // if the registers suffice
    uint4 w[X_LOADS], v[X_LOADS];
#pragma unroll
    for (int i = 0; i < X_LOADS && LOADS_EARLY; ++i) w[i] = load_weight(i);
    if (waits) grid.wait();
    float sum = 0.f;
    auto place = [&](int i, int half) -> const X* {
        const int piece = first + 32 * WARPS_OF_ROW * i;
        return piece < HIDDEN / 8 && row < num_rows ? x + row * HIDDEN + 8 * piece + 4 * half : nullptr;
    };
    if constexpr (sizeof(X) == 4) get_eights(v, place, tag);
    else
#pragma unroll
        for (int i = 0; i < X_LOADS; ++i)
            v[i] = place(i, 0) ? load_from_l2((const uint4*)place(i, 0)) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < X_LOADS; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const u32 pair = word_of(v[i], j);
            const float low = to_float(pair & 0xFFFF), high = to_float(pair >> 16);
            sum += low * low + high * high;
        }
    sum = over_warp(sum);
    if constexpr (WARPS_OF_ROW > 1) {
        if (threadIdx.x % 32 == 0) small[warp] = sum;
        meet();
        sum = 0.f;
#pragma unroll
        for (int i = 0; i < WARPS_OF_ROW; ++i) sum += small[i * ROWS + row];
    }
    const float scale = rsqrtf(sum / HIDDEN + eps);
#pragma unroll
    for (int i = 0; i < X_LOADS; ++i) {
        const int piece = first + 32 * WARPS_OF_ROW * i;
        if (!LOADS_EARLY) w[i] = load_weight(i);
        u32 pair[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const u32 a = word_of(v[i], j), b = word_of(w[i], j);
            pair[j] = pair_of(scaled_by_norm(to_float(a & 0xFFFF), scale, to_float(b & 0xFFFF)),
                              scaled_by_norm(to_float(a >> 16), scale, to_float(b >> 16)));
        }
        if (piece < HIDDEN / 8)
            *(uint4*)(scratch + row * X_PITCH + 16 * piece) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
    }
    meet();
}
