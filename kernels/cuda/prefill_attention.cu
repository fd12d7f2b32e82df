// Paged attention of rows with several new tokens, for compute capability 9.0.
//
// A thread block computes ROWS query rows: query tokens of a request times the GROUP heads that share a KV
// head. One warp copies keys and values to shared memory with the tensor memory accelerator (TMA), a page
// at a time. Two warpgroups compute 64 query rows each. A warpgroup starts the product of its queries with
// the next tile of keys before the softmax of the current tile, so that the tensor cores and the softmax
// work at the same time; the warpgroups take turns at the tensor cores for the same reason. Tiles of keys
// are visited from the last to the first, so that the masked tiles at the diagonal come first and the long
// unmasked part follows.
//
// Pages outside the context or before the window are not read: the copy is given a page number outside the
// cache, for which TMA writes zeros.
//
// Where few queries have a long context, blocks of a cluster share its keys and merge their sums. The number
// of blocks that share keys follows from the lengths on the device, so that a captured launch serves all
// lengths.
//
// Defined by the compiler's options: BF16 (query, cache and out are bfloat16, otherwise float16), HEAD_DIM
// (a multiple of 8, up to 256; zeros fill the last part of 64 columns), GROUP, NUM_KV_HEADS, BLOCK_SIZE
// (tokens of a page, a multiple of 8), KEYS (KV tokens of a tile, a multiple of BLOCK_SIZE and of 16),
// STAGES (tiles of keys and of values in shared memory, at least 2), HAS_WINDOW, HAS_SOFT_CAP, SINK_BYTES
// (2 or 4; 0: no sinks), OVERLAP (programmatic dependent launch).

#include "hopper.cuh"

constexpr int ROWS = 128, TOKENS = ROWS / GROUP, PAGES = KEYS / BLOCK_SIZE, NUM_HEADS = NUM_KV_HEADS * GROUP;
// Shared memory holds matrices in parts of 64 columns (see `matrix`).
constexpr int PARTS = (HEAD_DIM + 63) / 64, COLUMNS = 64 * PARTS;
constexpr int PART_BYTES = KEYS * 128, TILE_BYTES = PARTS * PART_BYTES;
constexpr int QUERY_PART = ROWS * 128, QUERY_BYTES = PARTS * QUERY_PART;
// A product of weights and values has OUT_COLUMNS columns of the output.
constexpr int OUT_COLUMNS = COLUMNS % 128 ? 64 : 128, OUT_PARTS = COLUMNS / OUT_COLUMNS;
constexpr int MIN_TILES = 4;  // least number of tiles for a block that shares a context
constexpr float LOG2_E = 1.4426950408889634f;

struct Work {  // what a block computes
    int row, start, count;       // of the request: batch row, first token of the step, number of tokens
    int length, context;         // of the request: with and without the step's tokens
    int kv_head, first_query;    // of the block, counted in the request's tokens of the step
    int first_key, end;          // range of the keys that any query of the block sees
    int part, parts;             // this block's index among the blocks that share the keys, and their number
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
    int position[2];          // of the query in its request
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
    int pieces = 0;  // of this lane's rows
#pragma unroll 4
    for (int row = threadIdx.x % 32; row < num_rows; row += 32) pieces += pieces_of(query_start_loc, num_rows, row);
    return sum_of_warp(pieces);
}

// Finds the request of a piece, and the piece's first query; any request if there is no such piece.
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

// The programs of a step, one for each piece and KV head, and how blocks share them.
struct Programs {
    int pieces, parts;  // pieces in the step; number of blocks that share the keys of a program

    // The program that this block computes in this turn; negative: there is none.
    __device__ __forceinline__ int of_turn(int turn) const {  // the longest programs come first
        return pieces * NUM_KV_HEADS - 1 - (int)(blockIdx.x + turn * gridDim.x) / parts;
    }
};

// The blocks that share a program are as many as let all programs run at once, up to a cluster.
__device__ __forceinline__ Programs count_programs(const int* query_start_loc, int num_rows, int max_blocks) {
    Programs programs = {count_pieces(query_start_loc, num_rows), cluster_size()};
    while (programs.parts > 1 && programs.pieces * NUM_KV_HEADS * programs.parts > max_blocks) programs.parts /= 2;
    return programs;
}

// Finds the piece and KV head of a program, and this block's share of the tiles. Returns false if there are too
// few tiles for this block, as merging the sums of few tiles does not pay.
__device__ __forceinline__ bool find_work(
    Work& work, int program, const Programs& programs, const int* query_start_loc, const int* seq_lens, int num_rows,
    int max_blocks, int window) {
    // If the pieces of one head keep all multiprocessors busy, heads are computed one after another, because
    // the keys and values of one head are more likely to stay in the L2 cache.
    const bool heads_first = programs.pieces >= max_blocks;
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

__device__ __forceinline__ void produce(
    const TensorMap* map, const Work& work, const int* table, int num_blocks, u32 tiles, u32 barriers, Place& place) {
    const int lane = threadIdx.x;
    // The page that this lane copies; a page number outside the cache if no query sees the page's tokens.
    auto page_of = [&](int tile) {
        const int token = tile * KEYS + lane * BLOCK_SIZE;
        const bool seen = lane < PAGES && token < work.end && token + BLOCK_SIZE > work.first_key;
        return seen ? table[token / BLOCK_SIZE] : num_blocks;
    };
    auto copy = [&](Place at, int page, int kind) {
        const u32 full = barriers + 8 * (4 * at.slot + kind), to = tiles + (2 * at.slot + kind) * TILE_BYTES;
        wait(full + 16, (at.round & 1) ^ 1);  // until the slot is empty
        if (lane == 0) expect(full, TILE_BYTES);
        __syncwarp();
        if (lane < PAGES)
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
                copy_box(to + part * PART_BYTES + lane * BLOCK_SIZE * 128, map, full,
                         64 * part, 0, work.kv_head, page, kind);
    };
    int page = page_of(work.last_tile);
    copy(place, page, 0);
    for (int tile = work.last_tile; tile >= work.first_tile; --tile) {
        const Place next = place.next();
        const bool has_next = tile > work.first_tile;
        const int next_page = has_next ? page_of(tile - 1) : 0;
        if (has_next) copy(next, next_page, 0);
        copy(place, page, 1);
        page = next_page, place = next;
    }
}

// Copies the queries of this warpgroup to shared memory, with zeros for rows without a token.
__device__ __forceinline__ void load_queries(u32 to, const u16* query, i64 stride, const Work& work, int group) {
    constexpr int PIECES = COLUMNS / 8;  // of 16 bytes, in a query row
    const int thread = threadIdx.x % 128;
#pragma unroll
    for (int i = thread; i < 64 * PIECES; i += 128) {
        const int row = 64 * group + i / PIECES, piece = i % PIECES, token = work.first_query + row / GROUP;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (row < TOKENS * GROUP && token < work.count && 8 * piece < HEAD_DIM)
            x = *(const uint4*)(query + (work.start + token) * stride
                                + (work.kv_head * GROUP + row % GROUP) * HEAD_DIM + 8 * piece);
        const u32 at = to + piece / 8 * QUERY_PART + row * 128 + ((piece % 8) ^ (row % 8)) * 16;
        store_16_bytes(at, x);
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

// The address of a sum in shared memory. Columns are swizzled, so that rows begin in different banks.
__device__ __forceinline__ u32 sums_at(u32 at, int row, int column) {
    return at + (row * COLUMNS + (column ^ row % 8 * 8)) * 4;
}

// Merges the sums of the blocks that share the keys. Each block merges and writes some of the rows.
__device__ __forceinline__ void merge(
    const Work& work, const float (&sums)[OUT_PARTS][OUT_COLUMNS / 2], const Softmax& softmax, u16* out, int first_row,
    u32 queries, u32 tiles) {
    const int lane = threadIdx.x % 32, thread = threadIdx.x - 128;
    meet(3, 256);  // no product reads shared memory any more
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
                make_uint2(pack(sum.x / total, sum.y / total), pack(sum.z / total, sum.w / total));
    }
    meet_cluster();  // until the other blocks have read this block's sums
}

__device__ __forceinline__ void consume(
    const Work& work, const u16* query, i64 query_stride, const void* sinks, u16* out, float scale, int window,
    float soft_cap, u32 queries, u32 tiles, u32 barriers, Place& place) {
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    meet(4 + group, 128);  // no product reads the queries of the program before any more
    load_queries(queries, query, query_stride, work, group);
    publish_to_tensor_cores();
    meet(4 + group, 128);

    const int first_row = 64 * group + 16 * warp + lane / 4;
    Softmax softmax;
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
    auto full = [&](int slot, int kind) { return barriers + 8 * (4 * slot + kind); };
    auto tile_at = [&](int slot, int kind) { return tiles + (2 * slot + kind) * TILE_BYTES; };
    auto release = [&](int slot, int kind) {
        __syncwarp();
        if (lane == 0) arrive(full(slot, kind) + 16);
    };

    float scores[KEYS / 2], sums[OUT_PARTS][OUT_COLUMNS / 2], decay[2];
    u32 weights[KEYS / 4];
    const u32 my_queries = queries + 64 * group * 128;
    int slot = place.slot, round = place.round;
    wait(full(slot, 0), round & 1);
    begin_products();
    multiply_keys(scores, my_queries, tile_at(slot, 0));
    commit_products();
    wait_products<0>();
    settle(scores);
    release(slot, 0);
    softmax.step(scores, decay, is_masked(last), key_of(last), window);
#pragma unroll
    for (int i = 0; i < KEYS / 4; ++i) weights[i] = pack(scores[2 * i], scores[2 * i + 1]);
#pragma unroll
    for (int part = 0; part < OUT_PARTS; ++part)
#pragma unroll
        for (int i = 0; i < OUT_COLUMNS / 2; ++i) sums[part][i] = 0.f;
    if ((last + 1) * KEYS > work.length) {
        wait(full(slot, 1), round & 1);
        clear_values(tile_at(slot, 1), work.length - last * KEYS);
    }

    if (group == 1 && last > first) pass(1, 256);
    for (int tile = last - 1; tile >= first; --tile) {
        const int next_slot = slot + 1 == STAGES ? 0 : slot + 1, next_round = round + (next_slot == 0);
        wait(full(next_slot, 0), next_round & 1);
        meet(1 + group, 256);
        begin_products();
        settle(scores);
        multiply_keys(scores, my_queries, tile_at(next_slot, 0));
        commit_products();
        wait(full(slot, 1), round & 1);
#pragma unroll
        for (int part = 0; part < OUT_PARTS; ++part) settle(sums[part]);
        settle(weights);
        begin_products();
        multiply_values(sums, weights, tile_at(slot, 1));
        commit_products();
        if ((group == 0 || tile > first)) pass(2 - group, 256);
        wait_products<1>();
        settle(scores);
        release(next_slot, 0);
        softmax.step(scores, decay, is_masked(tile), key_of(tile), window);
        compute_now(softmax.total[0] + softmax.total[1], barriers);  // before the wait
        wait_products<0>();
#pragma unroll
        for (int part = 0; part < OUT_PARTS; ++part) settle(sums[part]);
        settle(weights);
        release(slot, 1);
#pragma unroll
        for (int i = 0; i < KEYS / 4; ++i) weights[i] = pack(scores[2 * i], scores[2 * i + 1]);
        if (__any_sync(~0u, decay[0] != 1.f || decay[1] != 1.f))  // rarely, late in a long context
#pragma unroll
            for (int part = 0; part < OUT_PARTS; ++part)
#pragma unroll
                for (int i = 0; i < OUT_COLUMNS / 2; ++i) sums[part][i] *= decay[i / 2 % 2];
        slot = next_slot, round = next_round;
    }
    wait(full(slot, 1), round & 1);
    begin_products();
    multiply_values(sums, weights, tile_at(slot, 1));
    commit_products();
    wait_products<0>();
#pragma unroll
    for (int part = 0; part < OUT_PARTS; ++part) settle(sums[part]);
    release(slot, 1);
    place = Place{slot, round}.next();

#pragma unroll
    for (int half = 0; half < 2; ++half) softmax.total[half] = over_quad(softmax.total[half], false);
    if (work.parts > 1) return merge(work, sums, softmax, out, first_row, queries, tiles);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first_row + 8 * half;
        const float factor = 1.f / softmax.total[half];
        if (!has_token(work, row)) continue;
        u16* to = place_of(out, work, row) + 2 * (lane % 4);
#pragma unroll
        for (int part = 0; part < OUT_PARTS; ++part)
#pragma unroll
            for (int j = 0; j < OUT_COLUMNS / 8; ++j) {
                if (part * OUT_COLUMNS + 8 * j >= HEAD_DIM) continue;
                const float* x = &sums[part][4 * j + 2 * half];
                *(u32*)(to + part * OUT_COLUMNS + 8 * j) = pack(x[0] * factor, x[1] * factor);
            }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) prefill_attention(
    const __grid_constant__ TensorMap cache, const u16* query, const int* block_tables, const int* seq_lens,
    const int* query_start_loc, const void* sinks, u16* out, float scale, int window, float soft_cap,
    i64 query_stride, i64 table_stride, int num_blocks, int num_rows, int max_blocks) {
#if OVERLAP
    release_next_kernel();
#endif
    extern __shared__ u8 memory[];
    const Programs programs = count_programs(query_start_loc, num_rows, max_blocks);
    const u32 queries = (address(memory) + 1023) & ~1023u, tiles = queries + QUERY_BYTES;
    const u32 barriers = tiles + 2 * STAGES * TILE_BYTES;  // per slot: keys full, values full, keys empty, values empty
    if (threadIdx.x == 0) {
        for (int i = 0; i < 4 * STAGES; ++i) init(barriers + 8 * i, i % 4 < 2 ? 1 : 8);
        publish_barriers();
    }
    __syncthreads();
#if OVERLAP
    wait_for_previous_kernel();
#endif
    Work work;
    Place place;
    auto find = [&](int program) {
        return find_work(work, program, programs, query_start_loc, seq_lens, num_rows, max_blocks, window);
    };
    if (threadIdx.x < 128) {
        shrink_registers<24>();
        if (threadIdx.x >= 32) return;
        for (int turn = 0, program; (program = programs.of_turn(turn)) >= 0; ++turn)
            if (find(program))
                produce(&cache, work, block_tables + work.row * table_stride, num_blocks, tiles, barriers, place);
    } else {
        grow_registers<240>();
        for (int turn = 0, program; (program = programs.of_turn(turn)) >= 0; ++turn)
            if (find(program))
                consume(work, query, query_stride, sinks, out, scale, window, soft_cap, queries, tiles, barriers, place);
    }
}
