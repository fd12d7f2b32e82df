// Shared memory of prompts' attention, and the warp that fills it.

#pragma once

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
