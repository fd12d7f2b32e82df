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

#include "prefill_programs.cuh"
#include "prefill_copies.cuh"
#include "prefill_products.cuh"
#include "prefill_results.cuh"

__device__ __forceinline__ void consume(
    const Work& work, const void* sinks, u16* out, float scale, int window, float soft_cap, const float* kv_scales,
    int turn, const Shared& shared, Place& place) {
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const int first_row = 64 * group + 16 * warp + lane / 4;
#if CHUNKS
    if (kv_scales) scale *= kv_scales[0];
#endif
    Softmax softmax(work, first_row, sinks, scale, soft_cap);
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
    auto take_weights = [&] {
#pragma unroll
        for (int i = 0; i < KEYS / 4; ++i) weights[i] = pair_of(scores[2 * i], scores[2 * i + 1]);
    };
    auto settle_sums = [&] {
#pragma unroll
        for (int part = 0; part < OUT_PARTS; ++part) settle(sums[part]);
    };
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
    take_weights();
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
        settle_sums();
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
        settle_sums();
        settle(weights);
        release(slot, 1);
        take_weights();
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
    settle_sums();
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
