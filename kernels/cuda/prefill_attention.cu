// Paged attention of rows with several new tokens, for compute capability 9.0.
//
// A program is ROWS query rows: query tokens of a request times the GROUP heads that share a KV head. There
// are as many thread blocks as run at once, and a block that has computed a program takes the next one, the
// longest first. One warp chooses the programs and copies queries, keys and values to shared memory with the
// tensor memory accelerator (TMA); it copies for the next program while the current one is computed. Two
// warpgroups compute 64 query rows each. A warpgroup starts the product of its queries with the next tile of
// keys before the softmax of the current tile, so that the tensor cores and the softmax work at the same
// time; the warpgroups take turns at the tensor cores for the same reason. Tiles of keys are visited from the
// last to the first, so that the masked tiles at the diagonal come first and the long unmasked part follows.
//
// Pages outside the context or before the window are not read: the copy is given a page number outside the
// cache, for which TMA writes zeros.
//
// Of an FP8 cache, the copying warp reads codes, which further warps convert to 16 bits (fp8_chunks.cuh); the rest
// of the kernel is the same. The scale of the keys multiplies the scores, and that of the values the results.
//
// Where few queries have a long context, blocks of a cluster share its keys and merge their sums. The number
// of blocks that share keys follows from the lengths on the device, so that a captured launch serves all
// lengths.
//
// Defined by the compiler's options: BF16 (query, out and a cache of 16 bits are bfloat16, otherwise float16),
// HEAD_DIM (a multiple of 8, of 16 for an FP8 cache, up to 256; zeros fill the last part of 64 columns), GROUP,
// NUM_KV_HEADS, BLOCK_SIZE (tokens of a page, a multiple of 8), KEYS (KV tokens of a tile, a multiple of BLOCK_SIZE
// and of 16), STAGES (tiles of keys and of values in shared memory, at least 2), QUERY_STAGES (programs whose
// queries are in shared memory), CHUNK and CHUNKS (see fp8_chunks.cuh; both 0 for a cache of 16 bits), HAS_WINDOW,
// HAS_SOFT_CAP, SINK_BYTES (2 or 4; 0: no sinks), OVERLAP (programmatic dependent launch).

#include "hopper.cuh"

constexpr int ROWS = 128, TOKENS = ROWS / GROUP, NUM_HEADS = NUM_KV_HEADS * GROUP;
// Shared memory holds matrices in parts of 64 columns (see `matrix`).
constexpr int PARTS = (HEAD_DIM + 63) / 64, COLUMNS = 64 * PARTS;
constexpr int PART_BYTES = KEYS * 128, TILE_BYTES = PARTS * PART_BYTES;
constexpr int QUERY_PART = ROWS * 128, QUERY_BYTES = PARTS * QUERY_PART;
constexpr int PIECES_OF_16_BYTES = COLUMNS / 8;  // of a query row
// A product of weights and values has OUT_COLUMNS columns of the output.
constexpr int OUT_COLUMNS = COLUMNS % 128 ? 64 : 128, OUT_PARTS = COLUMNS / OUT_COLUMNS;
constexpr int CONSUMING_WARPS = 8;
constexpr int MIN_TILES = 4;  // least number of tiles for a block that shares a context
constexpr float LOG2_E = 1.4426950408889634f;

#if CHUNKS
#include "fp8_chunks.cuh"
constexpr int COPIED_TOKENS = BOX_TOKENS, RING_BYTES = Ring::BYTES, FULL_ARRIVALS = KEYS / CHUNK;
#else
constexpr int COPIED_TOKENS = BLOCK_SIZE, RING_BYTES = 0, FULL_ARRIVALS = 1;
#endif
// A copy reads COPIED_TOKENS tokens. FULL_ARRIVALS: at a barrier that says that a tile is full.
constexpr int COPIES = KEYS / COPIED_TOKENS;

struct Work {  // a program, as one block computes it
    int row, start, count;       // of the request: batch row, its first token in the step, number of tokens
    int length, context;         // of the request: with and without the step's tokens
    int kv_head, first_query;    // of the program, counted in the request's tokens of the step
    int first_key, end;          // range of the keys that any query of the program sees
    int part, parts;             // this block's index among the blocks that share the keys, and the number of
                                 // these blocks; parts = 0: no program is left
    int first_tile, last_tile;   // the tiles of this part, the last one included
};

// -- products ------------------------------------------------------------------------------------------

__device__ __forceinline__ void multiply_keys(float (&scores)[KEYS / 2], u32 query, u32 keys) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (64 * part + 16 * k < HEAD_DIM)
                multiply(scores, matrix(query + part * QUERY_PART + 32 * k, 16),
                         matrix(keys + part * PART_BYTES + 32 * k, 16), part + k > 0);
}

__device__ __forceinline__ void multiply_values(
    float (&sums)[OUT_PARTS][OUT_COLUMNS / 2], const u32 (&weights)[KEYS / 4], u32 values) {
#pragma unroll
    for (int k = 0; k < KEYS / 16; ++k)
#pragma unroll
        for (int part = 0; part < OUT_PARTS; ++part)
            multiply(sums[part], weights + 4 * k,
                     matrix(values + part * (OUT_COLUMNS / 64) * PART_BYTES + 2048 * k, PART_BYTES));
}

__device__ __forceinline__ float over_quad(float x, bool is_max) {
#pragma unroll
    for (int lanes = 1; lanes <= 2; lanes *= 2) {
        const float other = __shfl_xor_sync(~0u, x, lanes);
        x = is_max ? fmaxf(x, other) : x + other;
    }
    return x;
}

// -- the softmax of a thread's two query rows ----------------------------------------------------------

struct Softmax {
    float best[2], total[2];  // highest logit, in base 2; sum of weights over this thread's columns only
    int position[2];          // position of the query in its request
    float to_base_2, cap_rate;

    // One step of online softmax: replaces `scores` by weights. decay: the factors of earlier sums.
    __device__ __forceinline__ void step(
        float (&scores)[KEYS / 2], float (&decay)[2], bool is_masked, int first_key, int window) {
#if HAS_SOFT_CAP
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i)  // tanh
            scores[i] = 1.f - __fdividef(2.f, 1.f + exp2(scores[i] * cap_rate));
#endif
        if (is_masked) {
#pragma unroll
            for (int i = 0; i < KEYS / 2; ++i) {
                const int key = first_key + 8 * (i / 4) + i % 2, at = position[i / 2 % 2];
                if (key > at || (HAS_WINDOW && key <= at - window)) scores[i] = -INFINITE;
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float highest = scores[2 * half];
#pragma unroll
            for (int i = 0; i < KEYS / 2; ++i)
                if (i / 2 % 2 == half) highest = fmaxf(highest, scores[i]);
            const float higher = fmaxf(best[half], over_quad(highest, true) * to_base_2);
            const float shift = higher == -INFINITE ? 0.f : higher;  // no key seen so far
            decay[half] = exp2(best[half] - shift);
            best[half] = higher;
            float sum = 0.f;
#pragma unroll
            for (int i = 0; i < KEYS / 2; ++i)
                if (i / 2 % 2 == half) sum += scores[i] = exp2(scores[i] * to_base_2 - shift);
            total[half] = total[half] * decay[half] + sum;
        }
    }
};

// -- the kernel ----------------------------------------------------------------------------------------

// A piece is up to TOKENS query tokens of one request. Pieces are numbered through all requests that have
// several tokens in the step; the decode kernel computes requests with one token. All lanes of a warp must
// call these functions together.
__device__ __forceinline__ int pieces_of(const int* query_start_loc, int num_rows, int row) {
    const int count = row < num_rows ? query_start_loc[row + 1] - query_start_loc[row] : 0;
    return count > 1 ? (count + TOKENS - 1) / TOKENS : 0;
}

__device__ __forceinline__ int count_pieces(const int* query_start_loc, int num_rows) {
    const int lane = threadIdx.x % 32, tokens = query_start_loc[num_rows];
    int pieces = 0;  // of this lane's rows
    // Rows without tokens come last, and most rows of a captured step have none.
    for (int first = 0; first < num_rows && query_start_loc[first] < tokens; first += 128)
#pragma unroll
        for (int row = first; row < first + 128; row += 32) pieces += pieces_of(query_start_loc, num_rows, row + lane);
    return sum_of_warp(pieces);
}

// Finds the request of a piece, and the piece's first query.
__device__ __forceinline__ void find_piece(Work& work, int piece, const int* query_start_loc, int num_rows) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int first = 0;; first += 32) {
        const int mine = pieces_of(query_start_loc, num_rows, first + lane);
        int end = mine;  // becomes the number of pieces of this lane's row and the lanes below
#pragma unroll
        for (int lanes = 1; lanes < 32; lanes *= 2) {
            const int below = __shfl_up_sync(~0u, end, lanes);
            if (lane >= lanes) end += below;
        }
        const int rows = __popc(__ballot_sync(~0u, end <= piece));  // whose pieces all come before this piece
        piece -= sum_of_warp(lane < rows ? mine : 0);
        if (rows == 32 && first + 32 < num_rows) continue;
        work.row = min(first + rows, num_rows - 1), work.first_query = piece * TOKENS;
        break;
    }
    work.start = query_start_loc[work.row];
    work.count = query_start_loc[work.row + 1] - work.start;
}

// The programs of a step, one for each piece and KV head, and how blocks share them. Programs are taken from
// the last to the first, as the last pieces of a request see the most keys. Program n is n steps from the end.
struct Programs {
    int pieces, parts;  // pieces in the step; number of blocks that share the keys of a program

    __device__ __forceinline__ int count() const { return pieces * NUM_KV_HEADS; }
    __device__ __forceinline__ int first() const { return (int)blockIdx.x / parts; }

    // The program after a block's first one. counter: 0 before and after the kernel. All lanes of a warp call this.
    __device__ __forceinline__ int next(int* counter) const {
        if (parts > 1) return count();  // all programs run at once
        int taken = 0;
        if (threadIdx.x % 32 == 0) {
            taken = atomicAdd(counter, 1);
            if (taken == count() - 1) *counter = 0;  // the last call, as there is one after each program
        }
        return (int)gridDim.x + __shfl_sync(~0u, taken, 0);
    }
};

// As many blocks share a program as possible if all programs are to run at once; at most a whole cluster.
__device__ __forceinline__ Programs count_programs(const int* query_start_loc, int num_rows) {
    Programs programs = {count_pieces(query_start_loc, num_rows), cluster_size()};
    while (programs.parts > 1 && programs.count() * programs.parts > (int)gridDim.x) programs.parts /= 2;
    return programs;
}

// Finds the piece and KV head of a program, and this block's share of the tiles. Returns false if there are too
// few tiles for this block, as merging the sums of few tiles does not pay.
__device__ __forceinline__ bool find_work(
    Work& work, int program, const Programs& programs, const int* query_start_loc, const int* seq_lens, int num_rows,
    int window) {
    program = programs.count() - 1 - program;
    // If the pieces of one head keep all multiprocessors busy, heads are computed one after another, because
    // the keys and values of one head are more likely to stay in the L2 cache.
    const bool heads_first = programs.pieces >= (int)gridDim.x;
    work.kv_head = heads_first ? program / programs.pieces : program % NUM_KV_HEADS;
    const int piece = heads_first ? program % programs.pieces : program / NUM_KV_HEADS;
    find_piece(work, piece, query_start_loc, num_rows);
    work.length = seq_lens[work.row];
    work.context = work.length - work.count;
    work.first_key = HAS_WINDOW ? max(work.context + work.first_query - window + 1, 0) : 0;
    work.end = min(work.context + work.first_query + TOKENS, work.length);
    const int first = work.first_key / KEYS, last = (work.end - 1) / KEYS, tiles = last - first + 1;
    work.part = blockIdx.x % programs.parts;
    work.parts = max(1, min(programs.parts, tiles / MIN_TILES));
    work.last_tile = last - tiles * work.part / work.parts;
    work.first_tile = last + 1 - tiles * (work.part + 1) / work.parts;
    return work.part < work.parts;
}

// The slot in shared memory of the next tile, and how often the slots have been filled before. A block's
// programs follow each other through the slots, so that copies for the next program begin early.
struct Place {
    int slot = 0, round = 0;
    __device__ __forceinline__ Place next() const {
        return {slot + 1 == STAGES ? 0 : slot + 1, round + (slot + 1 == STAGES)};
    }
};

// Barriers, 8 bytes each. Per slot: keys full, values full, keys empty, values empty. For each of the two
// descriptions of programs (`Work`): full (both), empty (both). For each of the QUERY_STAGES places for a
// program's queries: full (all), empty (all).
constexpr int WORKS = 4 * STAGES, QUERIES = WORKS + 4, BARRIERS = QUERIES + 2 * QUERY_STAGES;

struct Shared {  // addresses in shared memory
    u32 queries, tiles, ring, barriers, works;

    __device__ __forceinline__ explicit Shared(u32 at)
        : queries(at), tiles(at + QUERY_STAGES * QUERY_BYTES), ring(tiles + 2 * STAGES * TILE_BYTES),
          barriers(ring + RING_BYTES), works(barriers + 8 * BARRIERS) {}
    __device__ __forceinline__ u32 tile(int slot, int kind) const { return tiles + (2 * slot + kind) * TILE_BYTES; }
    __device__ __forceinline__ u32 full(int slot, int kind) const { return barriers + 8 * (4 * slot + kind); }
    __device__ __forceinline__ u32 empty(int slot, int kind) const { return full(slot, kind) + 16; }
    __device__ __forceinline__ u32 work(int turn) const { return works + turn % 2 * (int)sizeof(Work); }
    __device__ __forceinline__ u32 work_full(int turn) const { return barriers + 8 * (WORKS + turn % 2); }
    __device__ __forceinline__ u32 work_empty(int turn) const { return work_full(turn) + 16; }
    __device__ __forceinline__ u32 queries_of(int turn) const { return queries + turn % QUERY_STAGES * QUERY_BYTES; }
    __device__ __forceinline__ u32 queries_full(int turn) const { return barriers + 8 * (QUERIES + turn % QUERY_STAGES); }
    __device__ __forceinline__ u32 queries_empty(int turn) const { return queries_full(turn) + 8 * QUERY_STAGES; }

    __device__ __forceinline__ void init_barriers() const {
        for (int i = 0; i < 4 * STAGES; ++i) init(barriers + 8 * i, i % 4 < 2 ? FULL_ARRIVALS : CONSUMING_WARPS);
        for (int turn = 0; turn < 2; ++turn) init(work_full(turn), 1), init(work_empty(turn), 32 * CONSUMING_WARPS);
        for (int turn = 0; turn < QUERY_STAGES; ++turn)
            init(queries_full(turn), 1), init(queries_empty(turn), CONSUMING_WARPS);
#if CHUNKS
        Ring(ring).init_barriers();
#endif
    }
};

// Tells the warpgroups what this turn's program is; work.parts = 0: none, and the kernel ends.
__device__ __forceinline__ void announce(const Work& work, int turn, const Shared& shared) {
    wait(shared.work_empty(turn), (turn / 2 & 1) ^ 1);
    if (threadIdx.x == 0) {
        store_words(shared.work(turn), work);
        arrive(shared.work_full(turn));
    }
}

__device__ __forceinline__ void copy_queries(const TensorMap* map, const Work& work, int turn, const Shared& shared) {
    wait(shared.queries_empty(turn), (turn / QUERY_STAGES & 1) ^ 1);
    if (threadIdx.x != 0) return;
    expect(shared.queries_full(turn), PARTS * TOKENS * GROUP * 128);
    // The box may include tokens of the next request, whose results are not written.
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
        copy_box(shared.queries_of(turn) + part * QUERY_PART, map, shared.queries_full(turn),
                 64 * part, work.kv_head * GROUP, work.start + work.first_query, 0, 0);
}

__device__ __forceinline__ void produce(
    const TensorMap* cache, const TensorMap* query, const Work& work, const int* table, int num_blocks, int turn,
    const Shared& shared, Place& place, u32& chunk) {
    const int lane = threadIdx.x;
    // The page from which this lane copies; a page number outside the cache if no query sees the copied tokens.
    auto page_of = [&](int tile) {
        const int token = tile * KEYS + lane * COPIED_TOKENS;
        const bool seen = lane < COPIES && token < work.end && token + COPIED_TOKENS > work.first_key;
        return seen ? table[token / BLOCK_SIZE] : num_blocks;
    };
    auto copy = [&](Place at, int page, int kind) {
        const u32 full = shared.full(at.slot, kind), to = shared.tile(at.slot, kind);
#if CHUNKS
        const Target tile = {to, full, shared.empty(at.slot, kind), (at.round & 1) ^ 1u};
        const int token = lane * COPIED_TOKENS % BLOCK_SIZE;
        copy_chunks(Ring(shared.ring), cache, tile, work.kv_head, page, token, kind, chunk);
#else
        wait(shared.empty(at.slot, kind), (at.round & 1) ^ 1);
        if (lane == 0) expect(full, TILE_BYTES);
        __syncwarp();
        if (lane < COPIES)
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
                copy_box(to + part * PART_BYTES + lane * BLOCK_SIZE * 128, cache, full,
                         64 * part, 0, work.kv_head, page, kind);
#endif
    };
    int page = page_of(work.last_tile);
    copy(place, page, 0);
    copy_queries(query, work, turn, shared);
    for (int tile = work.last_tile; tile >= work.first_tile; --tile) {
        const Place next = place.next();
        const bool has_next = tile > work.first_tile;
        const int next_page = has_next ? page_of(tile - 1) : 0;
        if (has_next) copy(next, next_page, 0);
        copy(place, page, 1);
        page = next_page, place = next;
    }
}

// Zeroes the values after the end of the context, which may be NaN: a weight of 0 times NaN is NaN.
__device__ __forceinline__ void clear_values(u32 values, int first_row) {
    for (int i = first_row * 8 + threadIdx.x - 128; i < KEYS * 8; i += 256)
        for (int part = 0; part < PARTS; ++part)
            store_16_bytes(values + part * PART_BYTES + i * 16, make_uint4(0, 0, 0, 0));
    publish_to_tensor_cores();
    meet(3, 256);
}

__device__ __forceinline__ float sink_of(const void* sinks, int head) {
#if SINK_BYTES == 4
    return ((const float*)sinks)[head];
#else
    return unpack(((const u16*)sinks)[head]);
#endif
}

// -- results -------------------------------------------------------------------------------------------

__device__ __forceinline__ bool has_token(const Work& work, int row) {
    return row < TOKENS * GROUP && work.first_query + row / GROUP < work.count;
}

__device__ __forceinline__ u16* place_of(u16* out, const Work& work, int row) {
    const i64 token = work.start + work.first_query + row / GROUP;
    return out + (token * NUM_HEADS + work.kv_head * GROUP + row % GROUP) * HEAD_DIM;
}

// The address of 16 bytes of a query row. Pieces are swizzled as TMA does.
__device__ __forceinline__ u32 piece_at(u32 queries, int row, int piece) {
    return queries + piece / 8 * QUERY_PART + row * 128 + ((piece % 8) ^ (row % 8)) * 16;
}

// The address of a sum in shared memory. Columns are swizzled, so that rows begin in different banks.
__device__ __forceinline__ u32 sums_at(u32 at, int row, int column) {
    return at + (row * COLUMNS + (column ^ row % 8 * 8)) * 4;
}

// Merges the sums of the blocks that share the keys. Each block merges and writes some of the rows.
__device__ __forceinline__ void merge(
    const Work& work, const float (&sums)[OUT_PARTS][OUT_COLUMNS / 2], const Softmax& softmax, u16* out, int first_row,
    u32 queries, u32 tiles) {
    const int lane = threadIdx.x % 32, thread = threadIdx.x - 128;
    meet(3, 256);  // both warpgroups' products have finished reading shared memory
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first_row + 8 * half;
        if (lane % 4 == 0) store_8_bytes(queries + 16 * row, softmax.best[half], softmax.total[half]);
#pragma unroll
        for (int part = 0; part < OUT_PARTS; ++part)
#pragma unroll
            for (int j = 0; j < OUT_COLUMNS / 8; ++j) {
                const float* x = &sums[part][4 * j + 2 * half];
                store_8_bytes(sums_at(tiles, row, part * OUT_COLUMNS + 8 * j + lane % 4 * 2), x[0], x[1]);
            }
    }
    meet_cluster();
    const int first_rank = rank_in_cluster() - work.part;  // of the blocks that share the keys
    const int begin = ROWS * work.part / work.parts, end = ROWS * (work.part + 1) / work.parts;
    for (int i = begin * (COLUMNS / 4) + thread; i < end * (COLUMNS / 4); i += 256) {
        const int row = i / (COLUMNS / 4), column = i % (COLUMNS / 4) * 4;
        float best = -INFINITE, total = 0.f;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int part = 0; part < work.parts; ++part) {
            const float4 its = load_of_rank(first_rank + part, queries + 16 * row);  // best, total
            const float4 x = load_of_rank(first_rank + part, sums_at(tiles, row, column));
            const float higher = fmaxf(best, its.x), shift = higher == -INFINITE ? 0.f : higher;
            const float old = exp2(best - shift), its_share = exp2(its.x - shift);
            best = higher;
            total = total * old + its.y * its_share;
            sum.x = sum.x * old + x.x * its_share, sum.y = sum.y * old + x.y * its_share;
            sum.z = sum.z * old + x.z * its_share, sum.w = sum.w * old + x.w * its_share;
        }
        if (has_token(work, row) && column < HEAD_DIM)
            *(uint2*)(place_of(out, work, row) + column) =
                make_uint2(pair_of(sum.x / total, sum.y / total), pair_of(sum.z / total, sum.w / total));
    }
    meet_cluster();  // until the other blocks have read this block's sums
}

// Writes a warpgroup's results to `out`. The results pass through the queries' place in shared memory, so that
// each thread writes 16 bytes at a time.
__device__ __forceinline__ void write(
    const Work& work, const float (&sums)[OUT_PARTS][OUT_COLUMNS / 2], const float (&total)[2], u16* out, int first_row,
    u32 queries) {
    const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
    meet(4 + group, 128);  // the warpgroup's products have finished reading the queries
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float factor = 1.f / total[half];
#pragma unroll
        for (int part = 0; part < OUT_PARTS; ++part)
#pragma unroll
            for (int j = 0; j < OUT_COLUMNS / 8; ++j) {
                const float* x = &sums[part][4 * j + 2 * half];
                store_4_bytes(piece_at(queries, first_row + 8 * half, part * (OUT_COLUMNS / 8) + j) + lane % 4 * 4,
                              pair_of(x[0] * factor, x[1] * factor));
            }
    }
    meet(4 + group, 128);
#pragma unroll 4
    for (int i = threadIdx.x % 128; i < 64 * PIECES_OF_16_BYTES; i += 128) {
        const int row = 64 * group + i / PIECES_OF_16_BYTES, piece = i % PIECES_OF_16_BYTES;
        if (has_token(work, row) && 8 * piece < HEAD_DIM)
            *(uint4*)(place_of(out, work, row) + 8 * piece) = load_16_bytes(piece_at(queries, row, piece));
    }
    publish_to_tensor_cores();  // so that TMA's next copy comes after the stores to shared memory
}

__device__ __forceinline__ void consume(
    const Work& work, const void* sinks, u16* out, float scale, int window, float soft_cap, const float* kv_scales,
    int turn, const Shared& shared, Place& place) {
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const int first_row = 64 * group + 16 * warp + lane / 4;
    Softmax softmax;
#if CHUNKS
    if (kv_scales) scale *= kv_scales[0];
#endif
    softmax.to_base_2 = (HAS_SOFT_CAP ? soft_cap : scale) * LOG2_E;
    softmax.cap_rate = HAS_SOFT_CAP ? scale * 2 * LOG2_E / soft_cap : 0.f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first_row + 8 * half;
        softmax.position[half] = work.context + work.first_query + row / GROUP;
        const bool has_sink = SINK_BYTES && row < TOKENS * GROUP && work.part == 0;
        softmax.best[half] = has_sink ? sink_of(sinks, work.kv_head * GROUP + row % GROUP) * LOG2_E : -INFINITE;
        softmax.total[half] = has_sink && lane % 4 == 0;
    }
    const int last = work.last_tile, first = work.first_tile;
    const int first_position = work.context + work.first_query;
    const int last_position = first_position + TOKENS - 1;
    auto is_masked = [&](int tile) {
        return (tile + 1) * KEYS - 1 > first_position || (HAS_WINDOW && tile * KEYS <= last_position - window);
    };
    auto key_of = [&](int tile) { return tile * KEYS + 2 * (lane % 4); };
    auto release = [&](int slot, int kind) { arrive_of_warp(shared.empty(slot, kind)); };

    float scores[KEYS / 2], sums[OUT_PARTS][OUT_COLUMNS / 2], decay[2];
    u32 weights[KEYS / 4];
    const u32 queries = shared.queries_of(turn), my_queries = queries + 64 * group * 128;
    int slot = place.slot, round = place.round;
    wait(shared.queries_full(turn), turn / QUERY_STAGES & 1);
    wait(shared.full(slot, 0), round & 1);
    begin_products();
    multiply_keys(scores, my_queries, shared.tile(slot, 0));
    commit_products();
    wait_products<0>();
    settle(scores);
    release(slot, 0);
    softmax.step(scores, decay, is_masked(last), key_of(last), window);
#pragma unroll
    for (int i = 0; i < KEYS / 4; ++i) weights[i] = pair_of(scores[2 * i], scores[2 * i + 1]);
#pragma unroll
    for (int part = 0; part < OUT_PARTS; ++part)
#pragma unroll
        for (int i = 0; i < OUT_COLUMNS / 2; ++i) sums[part][i] = 0.f;
    if ((last + 1) * KEYS > work.length) {
        wait(shared.full(slot, 1), round & 1);
        clear_values(shared.tile(slot, 1), work.length - last * KEYS);
    }

    // Barrier 1 + g opens the turn of warpgroup g at the tensor cores. Warpgroup 0 has the first turn.
    if (group == 1 && last > first) pass(1, 256);
    for (int tile = last - 1; tile >= first; --tile) {
        const int next_slot = slot + 1 == STAGES ? 0 : slot + 1, next_round = round + (next_slot == 0);
        wait(shared.full(next_slot, 0), next_round & 1);
        meet(1 + group, 256);
        begin_products();
        settle(scores);
        multiply_keys(scores, my_queries, shared.tile(next_slot, 0));
        commit_products();
        wait(shared.full(slot, 1), round & 1);
#pragma unroll
        for (int part = 0; part < OUT_PARTS; ++part) settle(sums[part]);
        settle(weights);
        begin_products();
        multiply_values(sums, weights, shared.tile(slot, 1));
        commit_products();
        if ((group == 0 || tile > first)) pass(2 - group, 256);
        wait_products<1>();
        settle(scores);
        release(next_slot, 0);
        softmax.step(scores, decay, is_masked(tile), key_of(tile), window);
        compute_now(softmax.total[0] + softmax.total[1], shared.barriers);  // before the wait
        wait_products<0>();
#pragma unroll
        for (int part = 0; part < OUT_PARTS; ++part) settle(sums[part]);
        settle(weights);
        release(slot, 1);
#pragma unroll
        for (int i = 0; i < KEYS / 4; ++i) weights[i] = pair_of(scores[2 * i], scores[2 * i + 1]);
        if (__any_sync(~0u, decay[0] != 1.f || decay[1] != 1.f))  // rare once many keys have been seen
#pragma unroll
            for (int part = 0; part < OUT_PARTS; ++part)
#pragma unroll
                for (int i = 0; i < OUT_COLUMNS / 2; ++i) sums[part][i] *= decay[i / 2 % 2];
        slot = next_slot, round = next_round;
    }
#if CHUNKS
    const float value_scale = kv_scales ? kv_scales[1] : 1.f;
#endif
    wait(shared.full(slot, 1), round & 1);
    begin_products();
    multiply_values(sums, weights, shared.tile(slot, 1));
    commit_products();
    wait_products<0>();
#pragma unroll
    for (int part = 0; part < OUT_PARTS; ++part) settle(sums[part]);
    release(slot, 1);
    place = Place{slot, round}.next();

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        softmax.total[half] = over_quad(softmax.total[half], false);
#if CHUNKS
        softmax.total[half] /= value_scale;  // so that division by the total multiplies by the scale
#endif
    }
    if (work.parts > 1) return merge(work, sums, softmax, out, first_row, queries, shared.tiles);
    write(work, sums, softmax.total, out, first_row, queries);
    arrive_of_warp(shared.queries_empty(turn));
}

extern "C" __global__ void __launch_bounds__(384, 1) prefill_attention(
    const __grid_constant__ TensorMap cache, const __grid_constant__ TensorMap query, const int* block_tables,
    const int* seq_lens, const int* query_start_loc, const void* sinks, u16* out, int* counter, float scale, int window,
    float soft_cap, i64 table_stride, int num_blocks, int num_rows, const float* kv_scales) {
#if OVERLAP
    release_next_kernel();
#endif
    extern __shared__ u8 memory[];
    const Shared shared((address(memory) + 1023) & ~1023u);
    if (threadIdx.x == 0) {
        shared.init_barriers();
        publish_barriers();
    }
    __syncthreads();
#if OVERLAP
    wait_for_previous_kernel();
#endif
    Work work;
    Place place;
    if (threadIdx.x < 128) {
        shrink_registers<CHUNKS ? 56 : 40>();
#if CHUNKS
        if (threadIdx.x >= 32) return convert_chunks(Ring(shared.ring), threadIdx.x / 32 - 1);
#else
        if (threadIdx.x >= 32) return;
#endif
        u32 chunk = 0;  // number of chunks of an FP8 cache copied so far
        const Programs programs = count_programs(query_start_loc, num_rows);
        int turn = 0;
        for (int program = programs.first(); program < programs.count(); program = programs.next(counter)) {
            if (!find_work(work, program, programs, query_start_loc, seq_lens, num_rows, window)) continue;
            announce(work, turn, shared);
            const int* table = block_tables + work.row * table_stride;
            produce(&cache, &query, work, table, num_blocks, turn, shared, place, chunk);
            ++turn;
        }
        work.parts = 0;
        announce(work, turn, shared);
#if CHUNKS
        end_chunks(Ring(shared.ring), chunk);
#endif
    } else {
        grow_registers<CHUNKS ? 224 : 232>();
        for (int turn = 0;; ++turn) {
            wait(shared.work_full(turn), turn / 2 & 1);
            load_words(work, shared.work(turn));
            arrive(shared.work_empty(turn));  // every thread arrives, as racecheck requires
            if (work.parts == 0) break;
            consume(work, sinks, out, scale, window, soft_cap, kv_scales, turn, shared, place);
        }
    }
}
