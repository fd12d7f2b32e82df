// Attention of few rows with one new token each, on a paged cache.
//
// A block computes units: the query heads of a KV head of a row, over a part of the row's keys. Its warps take tiles of
// 16 keys in turn, straight from global memory into registers, two tiles ahead. The keys of long rows are split so that
// units fill the grid once (`Splits`). All but the step's own token were stored by earlier steps, so that the first
// tiles are loaded before the previous kernel ends.
//
// Defined by the compiler's options: BF16, ROWS (at most so many), NUM_BLOCKS (of the grid), WARPS, HEAD_DIM, NUM_HEADS,
// NUM_KV_HEADS, BLOCK_SIZE (tokens of a page), HAS_WINDOWS, HAS_SOFT_CAP, SINK_BYTES (0: no sinks; 2; 4: float) and
// OVERLAP (programmatic dependent launch).

#include "ptx.cuh"
#include "numbers.cuh"

typedef long long i64;

constexpr int THREADS = 32 * WARPS, GROUP = NUM_HEADS / NUM_KV_HEADS;
__device__ __forceinline__ void meet() { __syncthreads(); }

#include "split_attention.cuh"

__device__ __forceinline__ float sink_of(const void* sinks, int head) {
    return SINK_BYTES == 4 ? ((const float*)sinks)[head] : to_float(((const u16*)sinks)[head]);
}

// Values behind the newest token may be NaN.
__device__ __forceinline__ void clear_values(Tile& tile, int newest) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int p = 0; p < VALUE_PARTS; ++p)
            if (tile.value_token(i) > newest) tile.values[i][p] = make_uint4(0, 0, 0, 0);
}

// query [rows, NUM_HEADS, HEAD_DIM], rows query_stride apart. keys, values [pages, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM].
// pages [rows, pages_stride]. lengths [rows], with the new token. sinks [NUM_HEADS] or null. out [rows, NUM_HEADS,
// HEAD_DIM]. of_splits [MOST_UNITS, GROUP, HEAD_DIM + 2]. arrivals [rows, NUM_KV_HEADS], zero before and after.
extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_attention(
    const u16* query, const u16* keys, const u16* values, const int* pages, const int* lengths, const void* sinks,
    u16* out, float* of_splits, u32* arrivals, i64 query_stride, i64 pages_stride, int num_rows, int window, float scale,
    float soft_cap) {
    __shared__ uint4 queries[GROUP * HEAD_DIM / 8];
    __shared__ float2 of_warps[WARPS * GROUP * (HEAD_DIM / 2 + 1)];
    __shared__ float small[1];
#if OVERLAP
    release_successor();
#endif
    const Splits splits(lengths, num_rows, window);
    bool is_waiting = OVERLAP;
    Span unit;
    for (int index = blockIdx.x; splits.find(unit, index, num_rows); index += NUM_BLOCKS) {
        const Cache cache = {keys, values, pages + unit.row * pages_stride};
        Walk walk = {cache, unit, 0};
        auto is_stored = [&](int i) { return walk.token(i) + TILE_KEYS < unit.length; };  // by earlier steps
        Tile tiles[2] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (is_stored(i)) walk.load(tiles[i], i);
        if (is_waiting) wait_for_predecessor();
        is_waiting = false;
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (!is_stored(i)) walk.load(tiles[i], i);
        const uint4* const from = (const uint4*)(query + unit.row * query_stride + unit.head * GROUP * HEAD_DIM);
        if (threadIdx.x < GROUP * HEAD_DIM / 8) queries[threadIdx.x] = from[threadIdx.x];
        meet();
        auto clear = [](Tile& tile, int newest) { clear_values(tile, newest); };
        const Attention result = attend_tiles(walk, unit, tiles, (const u16*)queries, scale, soft_cap, clear);
        auto write = [&](int head, int dim, Merged sum) {
            const int query_head = unit.head * GROUP + head;
            if (SINK_BYTES) sum.add_sink(sink_of(sinks, query_head));
            *(u32*)(out + ((i64)unit.row * NUM_HEADS + query_head) * HEAD_DIM + dim) = sum.result();
        };
        merge_warps(unit, index, result, (float*)of_warps, of_splits, arrivals, small, write);
        meet();  // no thread reads the queries or the sums any more
    }
    if (is_waiting) wait_for_predecessor();  // so that the kernel does not end before its predecessor
}
