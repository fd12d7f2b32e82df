// Attention of a step's rows with one new token each, on a paged cache.
//
// A block computes units: the query heads of a KV head of a row, over all or a part of the row's keys. Its warps take
// tiles of 16 keys in turn, straight from global memory into registers, TILES_AHEAD tiles ahead. The first tiles are
// loaded before the previous kernel ends, if they do not have the row's newest token. Their tokens, and the lengths and
// pages of rows, were stored before the matrix product that made the queries, and a product lets its successor start only
// after its own wait.
//
// Defined by the compiler's options: BF16, FP8_CACHE, MAX_ROWS, NUM_BLOCKS (of the grid), BLOCKS (of a multiprocessor),
// WARPS, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, BLOCK_SIZE (tokens of a page), HAS_WINDOWS, HAS_SOFT_CAP, SINK_BYTES (0: no
// sinks; 2; 4: float) and OVERLAP (programmatic dependent launch).

#include "ptx.cuh"
#include "numbers.cuh"

typedef long long i64;

constexpr int THREADS = 32 * WARPS, GROUP = NUM_HEADS / NUM_KV_HEADS;
__device__ __forceinline__ void meet() { __syncthreads(); }

#include "split_attention.cuh"

constexpr int OVERHEAD = 2;  // rounds
constexpr int LENGTHS_AT_ONCE = 2;  // that a thread loads
constexpr int MAX_SPLITS = 32;  // of a unit: one block adds up their results

// The sum of x over the lanes up to this one.
__device__ __forceinline__ i64 sum_of_lanes(i64 x) {
    const int lane = threadIdx.x % 32;
    for (int distance = 1; distance < 32; distance *= 2) {
        const i64 other = __shfl_sync(~0u, x, max(lane - distance, 0));
        if (lane >= distance) x += other;
    }
    return x;
}

// A unit is a row and KV head with its rounds of keys. All rounds lie in a row, and each block has an equal share of them,
// which may end within a unit. If lengths differ much, OVERHEAD rounds more lie before each unit's, for the time that a
// unit takes whatever its length; otherwise blocks have equally many units anyway.
struct Splits {
    const int *ends, *lengths;  // in shared memory: [MAX_ROWS + 1] where a row's rounds begin; [MAX_ROWS]
    int num_rows, window, overhead, share, at, last;  // at: the round where the block's next unit begins

    // All threads of the block call this. counts: in shared memory, [MAX_ROWS + 1]. starts [num_rows + 1]: the first
    // token of each row.
    __device__ __forceinline__ Splits(
        int* ends, int* lengths, int* counts, const int* seq_lens, const int* starts, int num_rows, int window)
        : ends(ends), lengths(lengths), num_rows(num_rows), window(window) {
        const int lane = threadIdx.x % 32;
        int shortest = 1 << 29, longest = 1;
        i64 before = 0;  // of the rows before: 2^32 times the rounds, and the number of rows that have rounds
        for (int first_row = 0; first_row < num_rows; first_row += 32 * LENGTHS_AT_ONCE) {
            int its_length[LENGTHS_AT_ONCE];
#pragma unroll
            for (int k = 0; k < LENGTHS_AT_ONCE; ++k) {
                const int row = first_row + 32 * k + lane;
                its_length[k] = row < num_rows && starts[row + 1] - starts[row] == 1 ? seq_lens[row] : -1;
            }
#pragma unroll
            for (int k = 0; k < LENGTHS_AT_ONCE; ++k) {
                const int row = first_row + 32 * k + lane, length = its_length[k], count = max(rounds_of(length), 1);
                if (first_row + 32 * k >= num_rows) break;
                // A captured step's padding has rows of length 1, which must not make lengths differ.
                if (length > 1) shortest = min(shortest, count), longest = max(longest, count);
                const i64 sum = before + sum_of_lanes(length < 0 ? 0 : (i64)count << 32 | 1);
                if (threadIdx.x < 32 && row < num_rows)
                    ends[row + 1] = (int)(sum >> 32), counts[row + 1] = (int)sum, lengths[row] = length;
                before = __shfl_sync(~0u, sum, 31);
            }
        }
        for (int distance = 16; distance; distance /= 2) {
            shortest = min(shortest, __shfl_sync(~0u, shortest, lane ^ distance));
            longest = max(longest, __shfl_sync(~0u, longest, lane ^ distance));
        }
        overhead = longest > 2 * shortest ? OVERHEAD : 0;
        if (threadIdx.x == 0) ends[0] = 0;
        meet();
        for (int row = threadIdx.x + 1; row <= num_rows; row += THREADS)
            ends[row] = (ends[row] + overhead * counts[row]) * NUM_KV_HEADS;
        const int all = ((int)(before >> 32) + overhead * (int)before) * NUM_KV_HEADS;
        const int fewest = (longest + MAX_SPLITS - 2) / (MAX_SPLITS - 1);  // a unit may begin within a share
        share = max((all + NUM_BLOCKS - 1) / NUM_BLOCKS, fewest);
        at = blockIdx.x * share, last = min(all, at + share);
        meet();
    }
    __device__ __forceinline__ int rounds_of(int length) const {
        return (length - first(length) / ROUND * ROUND + ROUND - 1) / ROUND;
    }
    __device__ __forceinline__ int first(int length) const {
        return HAS_WINDOWS && window ? max(0, length - window) : 0;
    }
    // Find the block's next unit. Returns false if there are no more.
    __device__ __forceinline__ bool next(Span& unit) {
        if (at >= last) return false;
        int low = 0, high = num_rows - 1;  // the last row that begins at `at` or before
        while (low < high) {
            const int middle = (low + high + 1) / 2;
            if (ends[middle] <= at) low = middle;
            else high = middle - 1;
        }
        const int rounds = (ends[low + 1] - ends[low]) / NUM_KV_HEADS, within = at - ends[low], from = within % rounds;
        const int start = at - from, until = min(from + last - at, rounds);  // start: of the unit
        at += until - from;
        unit.row = low, unit.head = within / rounds, unit.length = lengths[low];
        unit.place = (start + overhead) / share, unit.split = (int)blockIdx.x - unit.place;
        unit.num_splits = (start + rounds - 1) / share - unit.place + 1;
        const int oldest = first(unit.length), origin = oldest / ROUND * ROUND;
        unit.first = max(oldest, origin + max(from - overhead, 0) * ROUND);
        unit.last = min(unit.length, origin + (until - overhead) * ROUND);
        return unit.split >= 0;  // otherwise the share ends before the unit's first keys
    }
};

// A block has at most one unit that is the first of several splits, and at most one that is a later split.
__device__ __forceinline__ int place_of(const Span& unit, int split) {
    return split == 0 ? NUM_BLOCKS + unit.place : unit.place + split;
}

__device__ __forceinline__ float sink_of(const void* sinks, int head) {
    return SINK_BYTES == 4 ? ((const float*)sinks)[head] : to_float(((const u16*)sinks)[head]);
}

// Values behind the newest token may be NaN.
__device__ __forceinline__ void clear_values(Tile& tile, int newest) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int p = 0; p < VALUE_PARTS; ++p)
            if (tile.value_token(i) > newest) tile.values[i][p] = Eight();
}

// query [tokens, NUM_HEADS, HEAD_DIM], tokens query_stride apart. keys, values [pages, BLOCK_SIZE, NUM_KV_HEADS,
// HEAD_DIM]. pages [rows, pages_stride]. lengths [rows], with the new token. starts [rows + 1]: each row's first token.
// sinks [NUM_HEADS] or null. kv_scales [2] or null: of keys and of values. out [tokens, NUM_HEADS, HEAD_DIM]. of_splits
// [2 * NUM_BLOCKS, GROUP, HEAD_DIM + 2]. arrivals [rows, NUM_KV_HEADS], zero before and after.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) decode_attention(
    const u16* query, const Cached* keys, const Cached* values, const int* pages, const int* lengths, const int* starts,
    const void* sinks, const float* kv_scales, u16* out, float* of_splits, u32* arrivals, i64 query_stride,
    i64 pages_stride, int num_rows, int window, float scale, float soft_cap) {
    __shared__ uint4 queries[GROUP * HEAD_DIM / 8];
    extern __shared__ __align__(16) u8 of_warps[];  // float [WARPS, GROUP, HEAD_DIM + 2]
    __shared__ float small[1];
    if (OVERLAP) release_successor();
    __shared__ int ends[MAX_ROWS + 1], lengths_of_rows[MAX_ROWS], counts[MAX_ROWS + 1];
    Splits splits(ends, lengths_of_rows, counts, lengths, starts, num_rows, window);
    float value_scale = 1.f;
    if (kv_scales) scale *= kv_scales[0], value_scale = kv_scales[1];
    Span unit;
    Cache cache = {keys, values, pages};
    Walk walk = {cache, unit, 0};
    Tile tiles[TILES_AHEAD] = {};
    uint4 query_part = {};  // this thread's, of the unit's queries
    auto load_stored = [&] {  // the tiles that do not have the newest token
        cache.pages = pages + unit.row * pages_stride;
#pragma unroll
        for (int i = 0; i < TILES_AHEAD; ++i)
            if (walk.token(i) + TILE_KEYS < unit.length) walk.load(tiles[i], i);
    };
    auto load_rest = [&] {
#pragma unroll
        for (int i = 0; i < TILES_AHEAD; ++i)
            if (walk.token(i) + TILE_KEYS >= unit.length) walk.load(tiles[i], i);
        const u16* const from = query + starts[unit.row] * query_stride + unit.head * GROUP * HEAD_DIM;
        if (threadIdx.x < GROUP * HEAD_DIM / 8) query_part = ((const uint4*)from)[threadIdx.x];
    };
    bool is_found = splits.next(unit);
    if (is_found) load_stored();
    if (OVERLAP) wait_for_predecessor();
    if (is_found) load_rest();
    while (is_found) {
        if (threadIdx.x < GROUP * HEAD_DIM / 8) queries[threadIdx.x] = query_part;
        meet();
        auto clear = [](Tile& tile, int newest) { clear_values(tile, newest); };
        const Attention result = attend_tiles(walk, unit, tiles, (const u16*)queries, scale, soft_cap, clear);
        // The next unit's tiles are on their way while the warps' results are added.
        const Span done = unit;
        is_found = splits.next(unit);
        if (is_found) load_stored(), load_rest();
        auto write = [&](int head, int dim, Merged sum) {
            const int query_head = done.head * GROUP + head;
            if (SINK_BYTES) sum.add_sink(sink_of(sinks, query_head));
            *(u32*)(out + ((i64)starts[done.row] * NUM_HEADS + query_head) * HEAD_DIM + dim) = sum.result(value_scale);
        };
        merge_warps(done, result, (float*)of_warps, of_splits, arrivals, small, write);
    }
}
