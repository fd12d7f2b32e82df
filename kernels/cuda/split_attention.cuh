// Attention of rows with one new token on a paged cache, split among the thread blocks: a warp's tiles of keys and
// values in registers, and the sums over warps and splits. The including file decides which keys a block has.
//
// Defined before: WARPS, THREADS (that compute), HEAD_DIM, NUM_KV_HEADS, GROUP (query heads of a KV head, at most 8),
// BLOCK_SIZE, FP8_CACHE (keys and values are E4M3 codes), HAS_SOFT_CAP, and `meet`, a barrier of these threads.

#pragma once

#include "cached_numbers.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LOWEST = -1e30f;  // below all scores, and finite
// A weight is 2^(score - reference). A score that is higher than the reference by more than HEADROOM raises it, so far
// that it stays for a while, as all sums must then be multiplied. Weights below LEAST, which are 2^-28 of the largest or
// less, count as 0, so that float16 has all weights of bfloat16.
constexpr float HEADROOM = 15.f, NEW_HEADROOM = 12.f, LEAST = 0x1p-16f;
constexpr int TILE_KEYS = 16, ROUND = TILE_KEYS * WARPS;  // keys of a warp's tile, of all warps'
constexpr int AT_ONCE = 8;  // splits whose results are loaded together
constexpr int TILES_AHEAD = HEAD_DIM > 128 ? 1 : FP8_CACHE ? 3 : 2;  // of a warp, in registers or on their way
constexpr int TOKEN = NUM_KV_HEADS * HEAD_DIM;  // numbers of a token in the cache
constexpr int KEY_STEPS = HEAD_DIM / 32, VALUE_PARTS = (HEAD_DIM + 63) / 64, VALUE_TILES = 4 * VALUE_PARTS;

struct Span {  // the keys of a row and KV head, or a split of them
    int row, head, split, num_splits;
    int first, last, length;  // tokens of the split, of the row
    int place;                // from which `place_of` derives the places of the results of splits
};

// The place of a unit's split among the results of all splits, below MOST_UNITS; defined by the including file.
__device__ __forceinline__ int place_of(const Span& unit, int split);

struct Cache {
    const Cached *keys, *values;
    const int* pages;  // of the unit's row
};

// A warp's keys and values of a tile of 16 tokens: of keys tokens g and g + 8, of values tokens 2 l, 2 l + 1, and 8
// further.
struct Tile {
    Eight keys[2][KEY_STEPS], values[4][VALUE_PARTS];

    static __device__ __forceinline__ int key_token(int i) { return threadIdx.x % 32 / 4 + 8 * i; }
    static __device__ __forceinline__ int value_token(int i) { return 2 * (threadIdx.x % 4) + i % 2 + 8 * (i / 2); }
    static __device__ __forceinline__ int value_dim(int part) { return 64 * part + threadIdx.x % 32 / 4 * 8; }
    static __device__ __forceinline__ bool has_values(int part) {
        return 64 * (part + 1) <= HEAD_DIM || value_dim(part) < HEAD_DIM;
    }

    // `at`: the place of the tile's first token in the cache. What differs between a lane's loads is known to the compiler.
    __device__ __forceinline__ void load_keys(const Cache& cache, i64 at) {
        const Cached* const mine = cache.keys + at + key_token(0) * TOKEN + threadIdx.x % 4 * 8;
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int s = 0; s < KEY_STEPS; ++s) keys[i][s] = load_eight(mine + 8 * i * TOKEN + 32 * s);
    }
    __device__ __forceinline__ void load_values(const Cache& cache, i64 at) {
        const Cached* const mine = cache.values + at + value_token(0) * TOKEN + value_dim(0);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int p = 0; p < VALUE_PARTS; ++p) {
                values[i][p] = Eight();
                if (has_values(p)) values[i][p] = load_eight(mine + (i % 2 + 8 * (i / 2)) * TOKEN + 64 * p);
            }
    }
    // The step's own token is not in the cache yet, and values behind it may be NaN.
    __device__ __forceinline__ void correct(const Cached* key, const Cached* value, int newest) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (key_token(i) == newest)
#pragma unroll
                for (int s = 0; s < KEY_STEPS; ++s) keys[i][s] = *(const Eight*)(key + 32 * s + threadIdx.x % 4 * 8);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int p = 0; p < VALUE_PARTS; ++p) {
                if (value_token(i) == newest && has_values(p)) values[i][p] = *(const Eight*)(value + value_dim(p));
                if (value_token(i) > newest) values[i][p] = Eight();
            }
    }
};

// A warp's tiles of a unit: which there are and where they lie in the cache.
struct Walk {
    const Cache& cache;
    const Span& unit;
    int pages;  // this lane's, of 32 tiles of the warp

    __device__ __forceinline__ int token(int index) const {
        return unit.first / TILE_KEYS * TILE_KEYS + (index * WARPS + (int)threadIdx.x / 32) * TILE_KEYS;
    }
    __device__ __forceinline__ bool has(int index) const { return token(index) < unit.last; }
    // Where tile `index` begins in the cache. All lanes of the warp call this for 0, 1, 2 and so on.
    __device__ __forceinline__ i64 place(int index) {
        if (index % 32 == 0) {
            const int mine = token(index + threadIdx.x % 32);
            pages = mine < unit.last ? cache.pages[mine / BLOCK_SIZE] : 0;
        }
        const int page = __shfl_sync(~0u, pages, index % 32);
        return ((i64)page * BLOCK_SIZE + token(index) % BLOCK_SIZE) * TOKEN + unit.head * HEAD_DIM;
    }
    // Begin to load tile `index`, if there is one.
    __device__ __forceinline__ void load(Tile& tile, int index) {
        const i64 at = place(index);
        if (has(index)) tile.load_keys(cache, at), tile.load_values(cache, at);
    }
};

__device__ __forceinline__ float best_of_quad(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// A lane's part of the unit's queries: of head g, dims 8 l to 8 l + 7 of each 32, as the products take them. An FP8 cache
// leaves registers to hold them.
struct Queries {
    const u16* heads;  // in shared memory
    float scale;       // of the head's scores
    uint4 held[FP8_CACHE ? KEY_STEPS : 1];

    __device__ __forceinline__ Queries(const u16* heads, float scale) : heads(heads), scale(scale) {
        if (!FP8_CACHE) return;
#pragma unroll
        for (int s = 0; s < KEY_STEPS; ++s) held[s] = load(s);
        if (BECOMES_HALVES) convert();
    }
    __device__ __forceinline__ uint4 load(int step) const {
        const int g = threadIdx.x % 32 / 4, l = threadIdx.x % 4;
        return g < GROUP ? *(const uint4*)(heads + g * HEAD_DIM + 32 * step + 8 * l) : make_uint4(0, 0, 0, 0);
    }
    __device__ __forceinline__ uint4 of(int step) const { return FP8_CACHE ? held[step] : load(step); }

    __device__ __forceinline__ void convert() {
        int largest = 0;  // the bits of the head's largest number
#pragma unroll
        for (int s = 0; s < KEY_STEPS; ++s)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32 pair = word_of(held[s], i);
                largest = max(largest, max((int)(pair & 0x7FFF), (int)(pair >> 16 & 0x7FFF)));
            }
        largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
        // Exponents of 127 are those of 1. The factor is 2^(14 - the largest exponent), and neither is subnormal.
        const int exponent = max(largest >> 7, 15);
        const float factor = __uint_as_float(127 + 14 + 127 - exponent << 23);
        scale *= __uint_as_float(exponent - 14 << 23);
#pragma unroll
        for (int s = 0; s < KEY_STEPS; ++s) {
            uint4& x = held[s];
            x = make_uint4(as_halves(x.x, factor), as_halves(x.y, factor), as_halves(x.z, factor), as_halves(x.w, factor));
        }
    }
};

struct Attention {  // a warp's result
    float sum[VALUE_TILES][4];  // [4 p + j / 2][2 (j % 2) + i]: dim 64 p + 8 g + j of head 2 l + i
    float best, total;          // the reference of head g, in base 2; the total is of this lane's keys

    __device__ __forceinline__ void raise(float higher) {
        const int l = threadIdx.x % 4;
        const float decay = power_of_2(best - higher);
        best = higher, total *= decay;
        const float decays[2] = {__shfl_sync(~0u, decay, 8 * l), __shfl_sync(~0u, decay, 8 * l + 4)};
#pragma unroll
        for (int t = 0; t < VALUE_TILES; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[t][i] *= decays[i % 2];
    }
    // then: is called as soon as the tile's keys are no longer needed.
    template <class THEN>
    __device__ __forceinline__ void add(
        const Tile& tile, const Queries& queries, int token, const Span& unit, float soft_cap, const THEN& then) {
        float scores[2][4] = {}, others[2][4] = {};  // of half the dims each
#pragma unroll
        for (int s = 0; s < KEY_STEPS; ++s) {
            const uint4 query = queries.of(s);
            const u32 first[4] = {query.x, 0, query.y, 0}, second[4] = {query.z, 0, query.w, 0};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint4 pairs = pairs_of(tile.keys[i][s]);
                multiply_cached(scores[i], first, pairs.x, pairs.y);
                multiply_cached(others[i], second, pairs.z, pairs.w);
            }
        }
        then();
        float highest = LOWEST;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float& score = scores[i / 2][i % 2];
            const int at = token + 8 * (i / 2) + 2 * (threadIdx.x % 4) + i % 2;
            score = (score + others[i / 2][i % 2]) * queries.scale;
            if (HAS_SOFT_CAP) score = soft_cap * tanhf(score / soft_cap);
            score = at >= unit.first && at < unit.last ? score * LOG2_E : LOWEST;
            highest = fmaxf(highest, score);
        }
        highest = best_of_quad(highest);
        const bool is_higher = highest > best + HEADROOM;
        if (__any_sync(~0u, is_higher)) raise(is_higher ? highest - NEW_HEADROOM : best);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float& score = scores[i / 2][i % 2];
            const float above = score - best;  // by more than HEADROOM where huge scores are rounded; may be NaN
            const float weight = power_of_2(above > HEADROOM ? HEADROOM : above);
            total += score = weight < LEAST ? 0.f : weight;
        }
        // Weights are the right operand of the next product as they are, and values the left operand.
        u32 low = pair_of(scores[0][0], scores[0][1]), high = pair_of(scores[1][0], scores[1][1]);
        if (BECOMES_HALVES) low = as_halves(low, 1.f), high = as_halves(high, 1.f);
#pragma unroll
        for (int t = 0; t < VALUE_TILES; ++t) {
            u32 values[4];  // pairs of two tokens
            pairs_across(tile.values[0][t / 4], tile.values[1][t / 4], t % 4, values[0], values[1]);
            pairs_across(tile.values[2][t / 4], tile.values[3][t / 4], t % 4, values[2], values[3]);
            multiply_cached(sum[t], values, low, high);
        }
    }
};

// A warp's attention over its tiles of a unit, of which the first TILES_AHEAD are loaded. queries: of the unit's heads, in
// shared memory. finish(tile, newest): corrects the tile that has the row's newest token, or tokens behind it.
template <class FINISH>
__device__ __forceinline__ Attention attend_tiles(
    Walk& walk, const Span& unit, Tile (&tiles)[TILES_AHEAD], const u16* queries, float scale, float soft_cap,
    const FINISH& finish) {
    Attention result = {};
    result.best = LOWEST;
    const Queries held(queries, scale);
    for (int first = 0; walk.has(first); first += TILES_AHEAD) {
#pragma unroll
        for (int k = 0; k < TILES_AHEAD; ++k) {
            const int i = first + k, token = walk.token(i);
            if (!walk.has(i)) break;
            if (token + TILE_KEYS >= unit.length) finish(tiles[k], unit.length - 1 - token);
            if constexpr (TILES_AHEAD > 1) {
                result.add(tiles[k], held, token, unit, soft_cap, [] {});
                walk.load(tiles[k], i + TILES_AHEAD);
            } else {  // keys are on their way while values are multiplied
                const i64 next = walk.place(i + 1);
                const bool has_next = walk.has(i + 1);
                result.add(tiles[k], held, token, unit, soft_cap, [&] {
                    if (has_next) tiles[k].load_keys(walk.cache, next);
                });
                if (has_next) tiles[k].load_values(walk.cache, next);
            }
        }
    }
    return result;
}

// Two dims of a head, of some parts that are added in their order: a part's share is 2^(best - the best of all).
struct Merged {
    float best, total, low, high;

    __device__ __forceinline__ explicit Merged(float best) : best(best), total(0.f), low(0.f), high(0.f) {}
    __device__ __forceinline__ void add(float its_best, float its_total, float2 x) {
        const float share = power_of_2(its_best - best);
        total += its_total * share, low += x.x * share, high += x.y * share;
    }
    __device__ __forceinline__ void raise(float higher) {  // the best of all
        const float share = power_of_2(best - higher);
        total *= share, low *= share, high *= share, best = higher;
    }
    // A sink is a further logit, without a value. The logit may be far above all scores.
    __device__ __forceinline__ void add_sink(float sink) {
        raise(fmaxf(best, sink * LOG2_E));
        total += power_of_2(sink * LOG2_E - best);
    }
    __device__ __forceinline__ u32 result(float value_scale) const {  // two dims
        const float share = total > 0.f ? value_scale / total : 0.f;  // a row without tokens sees no keys
        return pair_of(low * share, high * share);
    }
};

// The last split of a row and KV head to arrive adds up all of them.
template <class WRITE>
__device__ __forceinline__ void merge_splits(
    const Span& unit, const float* partial, u32* arrivals, float* small, const WRITE& write) {
    meet();
    if (threadIdx.x == 0)
        *(u32*)small = add_modulo(arrivals + unit.row * NUM_KV_HEADS + unit.head, unit.num_splits);
    meet();
    if (*(u32*)small != unit.num_splits - 1) return;
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM / 2; i += THREADS) {
        const int head = i / (HEAD_DIM / 2), dim = i % (HEAD_DIM / 2) * 2;
        Merged all(LOWEST);
        for (int first = 0; first < unit.num_splits; first += AT_ONCE) {
            float2 stats[AT_ONCE], values[AT_ONCE];
            float best = all.best;
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) {
                stats[k] = make_float2(LOWEST, 0.f), values[k] = make_float2(0.f, 0.f);
                if (first + k >= unit.num_splits) continue;
                const float* const from =
                    partial + ((i64)place_of(unit, first + k) * GROUP + head) * (HEAD_DIM + 2);
                stats[k] = load_from_l2((const float2*)(from + HEAD_DIM));
                values[k] = load_from_l2((const float2*)(from + dim));
            }
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) best = fmaxf(best, stats[k].x);
            all.raise(best);
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) all.add(stats[k].x, stats[k].y, values[k]);
        }
        write(head, dim, all);
    }
}

// Add up the warps' results, and then, in the last block to arrive, the splits'. write(head, dim, sum): of two dims of
// a query head of the unit. of_warps: in shared memory, [WARPS, GROUP, HEAD_DIM + 2]; of_splits: [MOST_UNITS, GROUP,
// HEAD_DIM + 2]; arrivals: [rows, NUM_KV_HEADS], zero before and after.
template <class WRITE>
__device__ __forceinline__ void merge_warps(
    const Span& unit, const Attention& mine, float* of_warps, float* of_splits, u32* arrivals, float* small,
    const WRITE& write) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, l = threadIdx.x % 4;
    float total = mine.total;
    total += __shfl_xor_sync(~0u, total, 1), total += __shfl_xor_sync(~0u, total, 2);
    float* const to = of_warps + warp * GROUP * (HEAD_DIM + 2);
    if (g < GROUP && l == 0) *(float2*)(to + g * (HEAD_DIM + 2) + HEAD_DIM) = make_float2(mine.best, total);
#pragma unroll
    for (int t = 0; t < VALUE_TILES; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int head = 2 * l + i, dim = 64 * (t / 4) + 8 * g + 2 * (t % 4);
            const float2 both = make_float2(mine.sum[t][i], mine.sum[t][2 + i]);
            if (head < GROUP && dim < HEAD_DIM) *(float2*)(to + head * (HEAD_DIM + 2) + dim) = both;
        }
    meet();
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM / 2; i += THREADS) {
        const int head = i / (HEAD_DIM / 2), dim = i % (HEAD_DIM / 2) * 2;
        float best = LOWEST;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) best = fmaxf(best, of_warps[(w * GROUP + head) * (HEAD_DIM + 2) + HEAD_DIM]);
        Merged all(best);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float* from = of_warps + (w * GROUP + head) * (HEAD_DIM + 2);
            all.add(from[HEAD_DIM], from[HEAD_DIM + 1], *(const float2*)(from + dim));
        }
        if (unit.num_splits == 1) {
            write(head, dim, all);
            continue;
        }
        float* to = of_splits + ((i64)place_of(unit, unit.split) * GROUP + head) * (HEAD_DIM + 2);
        *(float2*)(to + dim) = make_float2(all.low, all.high);
        if (dim == 0) *(float2*)(to + HEAD_DIM) = make_float2(all.best, all.total);
    }
    if (unit.num_splits > 1) merge_splits(unit, of_splits, arrivals, small, write);
}
