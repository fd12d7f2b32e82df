// Attention of rows with one token each, on a paged cache: norms of heads, rotation, store, softmax.

#pragma once

#include "split_attention.cuh"

constexpr int MOST_UNITS = NUM_BLOCKS * ((ROWS * NUM_KV_HEADS + NUM_BLOCKS - 1) / NUM_BLOCKS);

// A block has every NUM_BLOCKS-th of the units: the splits of all rows and KV heads, of equally many rounds of keys: as
// few as fill the grid once (or as often as rows and heads do).
struct Splits {
    int rounds;
    int first[ROWS], length[ROWS];

    __device__ __forceinline__ int count(int row, int rounds) const {
        if (length[row] < 0) return 0;  // there is no such row
        const int all = (length[row] - first[row] / ROUND * ROUND + ROUND - 1) / ROUND;
        return max(1, (all + rounds - 1) / rounds);
    }
    __device__ __forceinline__ int total(int rounds) const {
        int found = 0;
#pragma unroll
        for (int row = 0; row < ROWS; ++row) found += count(row, rounds);
        return found * NUM_KV_HEADS;
    }
    __device__ __forceinline__ Splits(const int* seq_lens, int num_rows, int window) {
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            length[row] = row < num_rows ? seq_lens[row] : -1;
            first[row] = HAS_WINDOWS && window ? max(0, length[row] - window) : 0;
        }
        rounds = max(1, total(1) / MOST_UNITS);
        if (total(rounds) <= MOST_UNITS) return;
        int step = 1;  // `rounds` are too few; rounds + step will be enough
        for (; total(rounds + step) > MOST_UNITS; step *= 2) rounds += step;
        while (step > 1) {
            const int half = step / 2;
            if (total(rounds + half) > MOST_UNITS) rounds += half, step -= half;
            else step = half;
        }
        ++rounds;
    }
    // Find unit `at` of all units. Returns false if there are not so many.
    __device__ __forceinline__ bool find(Span& unit, int at, int num_rows) const {
        unit.head = at % NUM_KV_HEADS;
        int before = 0;
        unit.row = -1;
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            const int splits = count(row, rounds), split = at / NUM_KV_HEADS - before;
            if (row < num_rows && split >= 0 && split < splits) {
                unit.row = row, unit.split = split, unit.num_splits = splits, unit.length = length[row];
                const int start = first[row] / ROUND * ROUND + split * rounds * ROUND;
                unit.first = max(first[row], start), unit.last = min(length[row], start + rounds * ROUND);
                unit.place = at - split * NUM_KV_HEADS;
            }
            before += splits;
        }
        return unit.row >= 0;
    }
};

__device__ __forceinline__ int place_of(const Span& unit, int split) { return unit.place + split * NUM_KV_HEADS; }

struct Launch {  // its arguments
    Table table;
    const u16 *x_in, *cos, *sin;
    u16 *x, *update;  // residual stream and the last product
    const i64* slots;
    const int *pages, *lengths;
    int pages_stride, num_layers, num_rows;
    float eps, qk_eps, scale, soft_cap;
    // In the workspace: rows of activations, and attention's splits [MOST_UNITS, GROUP, HEAD_DIM + 2].
    Activation *qkv, *context, *activations;
    Activation *x_mid, *x_end;  // the residual stream after attention and after the MLP; without TAGGED both are x
    float* partial;
    u32* arrivals;  // [8, NUM_KV_HEADS], zero between launches
    Stamps stamps;
};

constexpr int HEAD_PARTS = HEAD_DIM / 32, HALF = ROTARY_DIM / 2;  // dims of a lane, of a half of the rotation

// Of the unit's query heads, key and value, in this order, what is known of head `index` before its projection: this
// lane's dims, their partners in the rotation, and the weights of the norm of both.
struct HeadTables {
    int at, index;  // of the head in the projection, in the unit
    bool is_value;
    float cos[HEAD_PARTS], sin[HEAD_PARTS], weight[HEAD_PARTS], partner_weight[HEAD_PARTS];

    static __device__ __forceinline__ int dim(int i) { return 32 * i + threadIdx.x % 32; }
    static __device__ __forceinline__ int partner(int i) {
        const int d = dim(i);
        return d < HALF ? d + HALF : d < ROTARY_DIM ? d - HALF : d;
    }
    __device__ __forceinline__ HeadTables(const Launch& launch, const Span& unit, int layer, int index) : index(index) {
        const bool is_query = index < GROUP;
        is_value = index == GROUP + 1;
        at = is_query ? unit.head * GROUP + index : NUM_HEADS + unit.head + is_value * NUM_KV_HEADS;
        const u16* norm = HAS_QK_NORM ? launch.table.tensor(layer, is_query ? Q_NORM : K_NORM) : nullptr;
#pragma unroll
        for (int i = 0; i < HEAD_PARTS; ++i) {
            const bool is_rotated = dim(i) < ROTARY_DIM;
            cos[i] = is_rotated ? to_float(__ldg(launch.cos + unit.row * ROTARY_DIM + dim(i))) : 1.f;
            sin[i] = is_rotated ? to_float(__ldg(launch.sin + unit.row * ROTARY_DIM + dim(i))) : 0.f;
            if (dim(i) < HALF) sin[i] = -sin[i];
            if (!HAS_QK_NORM) continue;
            weight[i] = to_float(__ldg(norm + dim(i))), partner_weight[i] = to_float(__ldg(norm + partner(i)));
        }
    }
};

// Normalise and rotate a head of a unit to shared memory. The numbers of the key and the value are also stored as the
// cache has them, which for FP8 means divided by their scale.
__device__ __forceinline__ void prepare_head(
    const Launch& launch, const Span& unit, const HeadTables& tables, const float* kv_scales, u16* heads, u32 tag) {
    u16* const to = heads + tables.index * HEAD_DIM;
    const Activation* from = launch.qkv + unit.row * QKV_SIZE + tables.at * HEAD_DIM;
    float x[HEAD_PARTS], y[HEAD_PARTS], sum = 0.f;
#pragma unroll
    for (int i = 0; i < HEAD_PARTS; ++i) {
        x[i] = get(from + tables.dim(i), tag), y[i] = get(from + tables.partner(i), tag);
        sum += x[i] * x[i];
    }
    if (HAS_QK_NORM && !tables.is_value) {
        const float scale = rsqrtf(over_warp(sum) / HEAD_DIM + launch.qk_eps);
#pragma unroll
        for (int i = 0; i < HEAD_PARTS; ++i) {
            x[i] = scaled_by_norm(x[i], scale, tables.weight[i]);
            y[i] = scaled_by_norm(y[i], scale, tables.partner_weight[i]);
            if (PLUS_ONE) x[i] = rounded_to_16_bits(x[i]), y[i] = rounded_to_16_bits(y[i]);
        }
    }
    u8* const codes = (u8*)(heads + CODES_AT) + (tables.index - GROUP) * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < HEAD_PARTS; ++i) {
        const u16 number = (u16)pair_of(tables.is_value ? x[i] : x[i] * tables.cos[i] + y[i] * tables.sin[i], 0.f);
        to[tables.dim(i)] = number;
        if (FP8_CACHE && tables.index >= GROUP)
            codes[tables.dim(i)] = e4m3_of(to_float(number) / __ldg(kv_scales + tables.is_value));
    }
}

// The step's own key and value in shared memory, as the cache has them.
__device__ __forceinline__ const Cached* own_token(const u16* heads, int is_value) {
    return (const Cached*)(FP8_CACHE ? heads + CODES_AT : heads + GROUP * HEAD_DIM) + is_value * HEAD_DIM;
}

// The key and the value of the step's own token go to the cache.
__device__ __forceinline__ void store_token(const Span& unit, const Cache& cache, i64 slot, const u16* heads) {
    if (slot < 0 || unit.split != unit.num_splits - 1) return;
    for (int i = threadIdx.x; i < HEAD_DIM / 4; i += THREADS) {
        const int is_value = i / (HEAD_DIM / 8), dim = i % (HEAD_DIM / 8) * 8;
        const Cached* to = (is_value ? cache.values : cache.keys) + (slot * NUM_KV_HEADS + unit.head) * HEAD_DIM + dim;
        *(Eight*)to = *(const Eight*)(own_token(heads, is_value) + dim);
    }
}

__device__ __forceinline__ void write_context(
    const Launch& launch, const Span& unit, int layer, float value_scale, u32 tag, int head, int dim, Merged m) {
    const int query_head = unit.head * GROUP + head;
    if (HAS_SINKS) m.add_sink(to_float(launch.table.tensor(layer, SINKS)[query_head]));
    Activation* to = launch.context + unit.row * Q_SIZE + query_head * HEAD_DIM + dim;
    const u32 pair = m.result(value_scale);
    if (TAGGED) store_now((uint2*)to, make_uint2((pair & 0xFFFF) | tag, pair >> 16 | tag));
    else *(u32*)to = pair;
}

__device__ __forceinline__ void attend_unit(
    const Launch& launch, const Span& unit, int layer, u32 tag, const Grid& grid, bool waits, u8* scratch,
    float* small) {
    const int warp = threadIdx.x / 32;
    u16* const heads = (u16*)scratch;
    const Cache cache = {(const Cached*)launch.table.tensor(layer, KEYS),
                         (const Cached*)launch.table.tensor(layer, VALUES),
                         launch.pages + (i64)unit.row * launch.pages_stride};
    Walk walk = {cache, unit, 0};
    Tile tiles[TILES_AHEAD] = {};
#pragma unroll
    for (int i = 0; i < TILES_AHEAD; ++i) walk.load(tiles[i], i);
    const float* const kv_scales = (const float*)launch.table.tensor(layer, KV_SCALES);
    const float scale = FP8_CACHE ? launch.scale * __ldg(kv_scales) : launch.scale;
    const float value_scale = FP8_CACHE ? __ldg(kv_scales + 1) : 1.f;
    const i64 slot_of_token = __ldg(launch.slots + unit.row);
    const HeadTables tables(launch, unit, layer, min(warp, GROUP + 1));
    if (waits) grid.wait();
    else meet();  // no thread reads the scratch memory any more
    if (warp < GROUP + 2) prepare_head(launch, unit, tables, kv_scales, heads, tag);
    for (int i = warp + WARPS; i < GROUP + 2; i += WARPS)
        prepare_head(launch, unit, HeadTables(launch, unit, layer, i), kv_scales, heads, tag);
    meet();
    store_token(unit, cache, slot_of_token, heads);
    auto correct = [&](Tile& tile, int newest) { tile.correct(own_token(heads, 0), own_token(heads, 1), newest); };
    const Attention result = attend_tiles(walk, unit, tiles, heads, scale, launch.soft_cap, correct);
    auto write = [&](int head, int dim, const Merged& sum) {
        write_context(launch, unit, layer, value_scale, tag, head, dim, sum);
    };
    float* const of_warps = (float*)(scratch + HEADS_BYTES);
    merge_warps(unit, result, of_warps, launch.partial, launch.arrivals, small, write);
}

__device__ __forceinline__ void attend(
    const Launch& launch, const Splits& splits, int layer, u32 tag, const Grid& grid, u8* scratch, float* small) {
    Span unit;
    bool waits = true;
    for (int at = blockIdx.x; splits.find(unit, at, launch.num_rows); at += NUM_BLOCKS) {
        attend_unit(launch, unit, layer, tag, grid, waits, scratch, small);
        waits = false;
    }
    if (waits) grid.wait();  // so that no block is two barriers ahead of another
}
