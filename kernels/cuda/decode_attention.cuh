// Attention of rows with one token each, on a paged cache: norms of heads, rotation, store, softmax.

#pragma once

constexpr int TILE_KEYS = 16, ROUND = TILE_KEYS * WARPS;  // keys of a warp's tile, of all warps'
constexpr int KEY_STEPS = HEAD_DIM / 32, VALUE_PARTS = (HEAD_DIM + 63) / 64, VALUE_TILES = 8 * VALUE_PARTS;
constexpr int MOST_UNITS = NUM_BLOCKS * ((ROWS * NUM_KV_HEADS + NUM_BLOCKS - 1) / NUM_BLOCKS);

struct Span {  // the keys of a row and KV head, or a split of them
    int row, head, split, num_splits;
    int first, last, length;  // tokens of the split, of the row
};

// How many rounds of keys a split has: as few as fill the grid once (or as often as rows and heads do).
struct Splits {
    int rounds;
    int first[ROWS], length[ROWS];

    __device__ __forceinline__ int count(int row) const {
        const int all = (length[row] - first[row] / ROUND * ROUND + ROUND - 1) / ROUND;
        return max(1, (all + rounds - 1) / rounds);
    }
    __device__ __forceinline__ int total() const {
        int found = 0;
#pragma unroll
        for (int row = 0; row < ROWS; ++row) found += count(row);
        return found * NUM_KV_HEADS;
    }
    __device__ __forceinline__ Splits(const int* seq_lens, int num_rows, int window) {
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            length[row] = row < num_rows ? seq_lens[row] : 0;
            first[row] = HAS_WINDOWS && window ? max(0, length[row] - window) : 0;
        }
        rounds = 1;
        rounds = max(1, total() / MOST_UNITS);
        while (total() > MOST_UNITS) ++rounds;
    }
    // Returns false if there are no more units.
    __device__ __forceinline__ bool find(Span& unit, int index, int num_rows) const {
        unit.head = index % NUM_KV_HEADS;
        int before = 0;
        unit.row = -1;
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            const int splits = count(row), split = index / NUM_KV_HEADS - before;
            if (row < num_rows && split >= 0 && split < splits) {
                unit.row = row, unit.split = split, unit.num_splits = splits, unit.length = length[row];
                const int start = first[row] / ROUND * ROUND + split * rounds * ROUND;
                unit.first = max(first[row], start), unit.last = min(length[row], start + rounds * ROUND);
            }
            before += splits;
        }
        return unit.row >= 0;
    }
};

struct Cache {
    const u16 *keys, *values;
    const int* pages;  // of the unit's row
};

// A warp's keys and values of a tile of 16 tokens: of keys tokens g and g + 8, of values tokens 2 l, 2 l + 1, and 8
// further.
struct Tile {
    uint4 keys[2][KEY_STEPS], values[4][VALUE_PARTS];

    static __device__ __forceinline__ int key_token(int i) { return threadIdx.x % 32 / 4 + 8 * i; }
    static __device__ __forceinline__ int value_token(int i) { return 2 * (threadIdx.x % 4) + i % 2 + 8 * (i / 2); }

    __device__ __forceinline__ void load_keys(const Cache& cache, int head, i64 slot) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int s = 0; s < KEY_STEPS; ++s) {
                const i64 at = ((slot + key_token(i)) * NUM_KV_HEADS + head) * HEAD_DIM + 32 * s + threadIdx.x % 4 * 8;
                keys[i][s] = load_once((const u8*)(cache.keys + at));
            }
    }
    __device__ __forceinline__ void load_values(const Cache& cache, int head, i64 slot) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int p = 0; p < VALUE_PARTS; ++p) {
                const int dim = 64 * p + threadIdx.x % 32 / 4 * 8;
                values[i][p] = make_uint4(0, 0, 0, 0);
                const i64 at = ((slot + value_token(i)) * NUM_KV_HEADS + head) * HEAD_DIM + dim;
                if (dim < HEAD_DIM) values[i][p] = load_once((const u8*)(cache.values + at));
            }
    }
    // The step's own token is not in the cache yet, and values behind it may be NaN.
    __device__ __forceinline__ void correct(const u16* key, const u16* value, int newest) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (key_token(i) == newest)
#pragma unroll
                for (int s = 0; s < KEY_STEPS; ++s) keys[i][s] = *(const uint4*)(key + 32 * s + threadIdx.x % 4 * 8);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int p = 0; p < VALUE_PARTS; ++p) {
                const int dim = 64 * p + threadIdx.x % 32 / 4 * 8;
                if (value_token(i) == newest && dim < HEAD_DIM) values[i][p] = *(const uint4*)(value + dim);
                if (value_token(i) > newest) values[i][p] = make_uint4(0, 0, 0, 0);
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
    __device__ __forceinline__ i64 slot(int index) {
        if (index % 32 == 0) {
            const int mine = token(index + threadIdx.x % 32);
            pages = mine < unit.last ? cache.pages[mine / BLOCK_SIZE] : 0;
        }
        const int page = __shfl_sync(~0u, pages, index % 32);
        return (i64)page * BLOCK_SIZE + token(index) % BLOCK_SIZE;
    }
};

__device__ __forceinline__ float best_of_quad(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

struct Attention {  // a warp's result: of head g, and dims 64 p + 16 l + 8 i + j in sum[8 p + j][i]
    float sum[VALUE_TILES][4];
    float best, total;  // in base 2; the total is of this lane's keys

    __device__ __forceinline__ void add(
        const Tile& tile, const uint4 (&query)[KEY_STEPS], int token, const Span& unit, float scale, float soft_cap) {
        float scores[2][4] = {}, others[2][4] = {};  // of half the dims each
#pragma unroll
        for (int s = 0; s < KEY_STEPS; ++s)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const u32 first[4] = {query[s].x, 0, query[s].y, 0}, second[4] = {query[s].z, 0, query[s].w, 0};
                multiply(scores[i], first, tile.keys[i][s].x, tile.keys[i][s].y);
                multiply(others[i], second, tile.keys[i][s].z, tile.keys[i][s].w);
            }
        float highest = LOWEST;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float& score = scores[i / 2][i % 2];
            const int at = token + 8 * (i / 2) + 2 * (threadIdx.x % 4) + i % 2;
            score = (score + others[i / 2][i % 2]) * scale;
            if (HAS_SOFT_CAP) score = soft_cap * tanhf(score / soft_cap);
            score = at >= unit.first && at < unit.last ? score * LOG2_E : LOWEST;
            highest = fmaxf(highest, score);
        }
        const float higher = fmaxf(best, best_of_quad(highest)), decay = exp2f(best - higher);
        best = higher, total *= decay;
#pragma unroll
        for (int i = 0; i < 4; ++i) total += scores[i / 2][i % 2] = exp2f(scores[i / 2][i % 2] - higher);
        const u32 weights[4] = {pair_of(scores[0][0], scores[0][1]), 0, pair_of(scores[1][0], scores[1][1]), 0};
#pragma unroll
        for (int p = 0; p < VALUE_PARTS; ++p)
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                float(&to)[4] = sum[8 * p + j];
                to[0] *= decay, to[1] *= decay;
                const u32 choice = j % 2 ? 0x7632 : 0x5410;
                auto pair = [&](int i) {  // of two tokens
                    const uint4 &even = tile.values[i][p], &odd = tile.values[i + 1][p];
                    return __byte_perm(word_of(even, j / 2), word_of(odd, j / 2), choice);
                };
                multiply(to, weights, pair(0), pair(2));
            }
    }
};

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
    int at;  // of the head in the projection
    bool is_value;
    float cos[HEAD_PARTS], sin[HEAD_PARTS], weight[HEAD_PARTS], partner_weight[HEAD_PARTS];

    static __device__ __forceinline__ int dim(int i) { return 32 * i + threadIdx.x % 32; }
    static __device__ __forceinline__ int partner(int i) {
        const int d = dim(i);
        return d < HALF ? d + HALF : d < ROTARY_DIM ? d - HALF : d;
    }
    __device__ __forceinline__ HeadTables(const Launch& launch, const Span& unit, int layer, int index) {
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

// Normalise and rotate head `index` of a unit to shared memory.
__device__ __forceinline__ void prepare_head(
    const Launch& launch, const Span& unit, const HeadTables& tables, u16* to, u32 tag) {
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
#pragma unroll
    for (int i = 0; i < HEAD_PARTS; ++i)
        to[tables.dim(i)] = (u16)pair_of(tables.is_value ? x[i] : x[i] * tables.cos[i] + y[i] * tables.sin[i], 0.f);
}

// The key and the value of the step's own token go to the cache.
__device__ __forceinline__ void store_token(const Span& unit, const Cache& cache, i64 slot, const u16* heads) {
    if (slot < 0 || unit.split != unit.num_splits - 1) return;
    for (int i = threadIdx.x; i < HEAD_DIM / 4; i += THREADS) {
        const int is_value = i / (HEAD_DIM / 8), dim = i % (HEAD_DIM / 8) * 8;
        u16* to = (u16*)(is_value ? cache.values : cache.keys) + (slot * NUM_KV_HEADS + unit.head) * HEAD_DIM + dim;
        *(uint4*)to = *(const uint4*)(heads + (GROUP + is_value) * HEAD_DIM + dim);
    }
}

// Two dims of a head, of some parts that are added in their order: a part's share is 2^(best - the best of all).
struct Merged {
    float best, total, low, high;

    __device__ __forceinline__ explicit Merged(float best) : best(best), total(0.f), low(0.f), high(0.f) {}
    __device__ __forceinline__ void add(float its_best, float its_total, float2 x) {
        const float share = exp2f(its_best - best);
        total += its_total * share, low += x.x * share, high += x.y * share;
    }
};

__device__ __forceinline__ void write_context(
    const Launch& launch, const Span& unit, int layer, u32 tag, int head, int dim, Merged m) {
    const int query_head = unit.head * GROUP + head;
    if (HAS_SINKS) {  // may be far above all scores
        const float sink = to_float(launch.table.tensor(layer, SINKS)[query_head]) * LOG2_E;
        const float best = fmaxf(m.best, sink), share = exp2f(m.best - best);
        m.total = m.total * share + exp2f(sink - best), m.low *= share, m.high *= share;
    }
    const float share = m.total > 0.f ? 1.f / m.total : 0.f;  // an empty row sees no keys
    Activation* to = launch.context + unit.row * Q_SIZE + query_head * HEAD_DIM + dim;
    const u32 pair = pair_of(m.low * share, m.high * share);
    if (TAGGED) store_now((uint2*)to, make_uint2((pair & 0xFFFF) | tag, pair >> 16 | tag));
    else *(u32*)to = pair;
}

// The last split of a row and KV head to arrive adds up all of them.
__device__ __forceinline__ void merge_splits(
    const Launch& launch, const Span& unit, int index, int layer, u32 tag, float* small) {
    meet();
    if (threadIdx.x == 0) {
        u32* const arrivals = launch.arrivals + unit.row * NUM_KV_HEADS + unit.head;
        *(u32*)small = add_modulo(arrivals, unit.num_splits);
    }
    meet();
    if (*(u32*)small != unit.num_splits - 1) return;
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM / 2; i += THREADS) {
        const int head = i / (HEAD_DIM / 2), dim = i % (HEAD_DIM / 2) * 2;
        auto part = [&](int split) {
            const int place = index + (split - unit.split) * NUM_KV_HEADS;
            return launch.partial + ((i64)place * GROUP + head) * (HEAD_DIM + 2);
        };
        float best = LOWEST;
#pragma unroll 8
        for (int split = 0; split < unit.num_splits; ++split)
            best = fmaxf(best, load_from_l2((const float2*)(part(split) + HEAD_DIM)).x);
        Merged all(best);
#pragma unroll 8
        for (int split = 0; split < unit.num_splits; ++split) {
            const float2 stats = load_from_l2((const float2*)(part(split) + HEAD_DIM));
            all.add(stats.x, stats.y, load_from_l2((const float2*)(part(split) + dim)));
        }
        write_context(launch, unit, layer, tag, head, dim, all);
    }
}

// Add up the warps' results; `partial` is in shared memory, [WARPS, GROUP, HEAD_DIM + 2].
__device__ __forceinline__ void merge_warps(
    const Launch& launch, const Span& unit, int index, int layer, u32 tag, const Attention& mine, float* partial,
    float* small) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, l = threadIdx.x % 4;
    float total = mine.total;
    total += __shfl_xor_sync(~0u, total, 1), total += __shfl_xor_sync(~0u, total, 2);
    if (g < GROUP) {
        float* to = partial + (warp * GROUP + g) * (HEAD_DIM + 2);
        if (l == 0) *(float2*)(to + HEAD_DIM) = make_float2(mine.best, total);
#pragma unroll
        for (int p = 0; p < VALUE_PARTS; ++p)
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int j = 0; j < 8; j += 2) {
                    const int dim = 64 * p + 16 * l + 8 * i + j;
                    const float2 both = make_float2(mine.sum[8 * p + j][i], mine.sum[8 * p + j + 1][i]);
                    if (dim < HEAD_DIM) *(float2*)(to + dim) = both;
                }
    }
    meet();
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM / 2; i += THREADS) {
        const int head = i / (HEAD_DIM / 2), dim = i % (HEAD_DIM / 2) * 2;
        float best = LOWEST;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) best = fmaxf(best, partial[(w * GROUP + head) * (HEAD_DIM + 2) + HEAD_DIM]);
        Merged all(best);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float* from = partial + (w * GROUP + head) * (HEAD_DIM + 2);
            all.add(from[HEAD_DIM], from[HEAD_DIM + 1], *(const float2*)(from + dim));
        }
        if (unit.num_splits == 1) {
            write_context(launch, unit, layer, tag, head, dim, all);
            continue;
        }
        float* to = launch.partial + ((i64)index * GROUP + head) * (HEAD_DIM + 2);
        *(float2*)(to + dim) = make_float2(all.low, all.high);
        if (dim == 0) *(float2*)(to + HEAD_DIM) = make_float2(all.best, all.total);
    }
    if (unit.num_splits > 1) merge_splits(launch, unit, index, layer, tag, small);
}

__device__ __forceinline__ void attend_unit(
    const Launch& launch, const Span& unit, int index, int layer, u32 tag, const Grid& grid, bool waits, u8* scratch,
    float* small) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, l = threadIdx.x % 4;
    u16* const heads = (u16*)scratch;
    const Cache cache = {launch.table.tensor(layer, KEYS), launch.table.tensor(layer, VALUES),
                         launch.pages + (i64)unit.row * launch.pages_stride};
    Walk walk = {cache, unit, 0};
    Tile tile = {};
    i64 slot = walk.slot(0);
    if (walk.has(0)) tile.load_keys(cache, unit.head, slot), tile.load_values(cache, unit.head, slot);
    const i64 slot_of_token = __ldg(launch.slots + unit.row);
    const HeadTables tables(launch, unit, layer, min(warp, GROUP + 1));
    if (waits) grid.wait();
    else meet();  // no thread reads the scratch memory any more
    if (warp < GROUP + 2) prepare_head(launch, unit, tables, heads + warp * HEAD_DIM, tag);
    for (int i = warp + WARPS; i < GROUP + 2; i += WARPS)
        prepare_head(launch, unit, HeadTables(launch, unit, layer, i), heads + i * HEAD_DIM, tag);
    meet();
    store_token(unit, cache, slot_of_token, heads);
    uint4 query[KEY_STEPS];
#pragma unroll
    for (int s = 0; s < KEY_STEPS; ++s) {
        query[s] = make_uint4(0, 0, 0, 0);
        if (g < GROUP) query[s] = *(const uint4*)(heads + g * HEAD_DIM + 32 * s + 8 * l);
    }
    Attention result = {};
    result.best = LOWEST;
    for (int i = 0; walk.has(i); ++i) {
        const int token = walk.token(i);
        if (token + TILE_KEYS >= unit.length)
            tile.correct(heads + GROUP * HEAD_DIM, heads + (GROUP + 1) * HEAD_DIM, unit.length - 1 - token);
        result.add(tile, query, token, unit, launch.scale, launch.soft_cap);
        if (!walk.has(i + 1)) break;
        slot = walk.slot(i + 1);
        tile.load_keys(cache, unit.head, slot), tile.load_values(cache, unit.head, slot);
    }
    merge_warps(launch, unit, index, layer, tag, result, (float*)(scratch + HEADS_BYTES), small);
}

__device__ __forceinline__ void attend(
    const Launch& launch, const Splits& splits, int layer, u32 tag, const Grid& grid, u8* scratch, float* small) {
    Span unit;
    bool waits = true;
    for (int index = blockIdx.x; splits.find(unit, index, launch.num_rows); index += NUM_BLOCKS) {
        attend_unit(launch, unit, index, layer, tag, grid, waits, scratch, small);
        waits = false;
    }
    if (waits) grid.wait();  // so that no block is two barriers ahead of another
}
