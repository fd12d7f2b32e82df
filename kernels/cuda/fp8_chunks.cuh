// Tiles of an FP8 (e4m3) cache. One warp copies codes to a ring of chunks in shared memory with TMA. Other warps
// convert the chunks to 16 bits, and write them to the tiles that the tensor cores read.
//
// A chunk has some tokens of a tile. Each converting warp takes every CONVERTERS-th chunk, so that these warps do
// not meet after each tile. Chunks have rows of 128 bytes, in parts of 128 columns, swizzled as TMA does.
//
// Defined before: everything of hopper.cuh, KEYS, BLOCK_SIZE, PARTS and PART_BYTES (see prefill_attention.cu),
// CHUNK (tokens of a chunk, a multiple of 8 and a divisor of KEYS), CHUNKS (chunks in the ring).

#pragma once

#include "e4m3.cuh"

constexpr int CONVERTERS = 3;              // warps that convert
constexpr int CODE_PARTS = (PARTS + 1) / 2;  // parts of 128 columns
constexpr int CODE_PART = CHUNK * 128, CHUNK_BYTES = CODE_PARTS * CODE_PART;
// Tokens of a page that one copy reads, and the number of copies for each part of a chunk.
constexpr int BOX_TOKENS = CHUNK < BLOCK_SIZE ? CHUNK : BLOCK_SIZE, BOXES = CHUNK / BOX_TOKENS;
// Every warp must have a chunk of every tile, since a warp that waits for a barrier must not miss any of its phases.
static_assert(KEYS / CHUNK >= CONVERTERS && CHUNKS > CONVERTERS, "too few chunks");
constexpr int BATCH = 4;  // loads of 16 bytes that a converting thread has in flight

struct Target {       // where a chunk is to be written
    u32 rows;         // the address in the tile's first part; 0: no chunks follow
    u32 full;         // the barrier at which to arrive when all rows are written
    u32 empty, parity;  // the barrier to wait at before a row is written
};

struct Ring {  // addresses in shared memory
    static constexpr u32 BYTES = CHUNKS * (CHUNK_BYTES + 16 + sizeof(Target));
    u32 codes, barriers, targets;

    __device__ __forceinline__ explicit Ring(u32 at)
        : codes(at), barriers(codes + CHUNKS * CHUNK_BYTES), targets(barriers + 16 * CHUNKS) {}
    // Chunks are counted from the start of the kernel.
    __device__ __forceinline__ static u32 slot(u32 chunk) { return chunk % CHUNKS; }
    __device__ __forceinline__ static u32 parity(u32 chunk) { return chunk / CHUNKS & 1; }
    __device__ __forceinline__ u32 codes_of(u32 chunk) const { return codes + slot(chunk) * CHUNK_BYTES; }
    __device__ __forceinline__ u32 full(u32 chunk) const { return barriers + 16 * slot(chunk); }
    __device__ __forceinline__ u32 empty(u32 chunk) const { return full(chunk) + 8; }
    __device__ __forceinline__ u32 target(u32 chunk) const { return targets + slot(chunk) * (u32)sizeof(Target); }

    __device__ __forceinline__ void init_barriers() const {
        for (int i = 0; i < 2 * CHUNKS; ++i) init(barriers + 8 * i, 1);
    }
};

// Copies the chunks of a tile. tile: the target of the tile's first chunk. page, token: this lane's page and the
// first token to copy from it; lanes copy in the order of a tile's tokens. chunk: the number of chunks so far. All
// lanes of the copying warp call this.
__device__ __forceinline__ void copy_chunks(
    const Ring& ring, const TensorMap* cache, Target tile, int kv_head, int page, int token, int kind, u32& chunk) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int i = 0; i < KEYS / CHUNK; ++i, ++chunk, tile.rows += CHUNK * 128) {
        wait(ring.empty(chunk), ring.parity(chunk) ^ 1);
        if (lane == 0) {
            store_words(ring.target(chunk), tile);
            expect(ring.full(chunk), CHUNK_BYTES);
        }
        __syncwarp();
        if (lane / BOXES == i)
#pragma unroll
            for (int part = 0; part < CODE_PARTS; ++part)
                copy_box(ring.codes_of(chunk) + part * CODE_PART + lane % BOXES * BOX_TOKENS * 128, cache,
                         ring.full(chunk), 128 * part, token, kv_head, page, kind);
    }
}

// Ends `convert_chunks` in all converting warps.
__device__ __forceinline__ void end_chunks(const Ring& ring, u32 chunk) {
    for (int i = 0; i < CONVERTERS; ++i, ++chunk) {
        wait(ring.empty(chunk), ring.parity(chunk) ^ 1);
        if (threadIdx.x % 32 == 0) {
            store_words(ring.target(chunk), Target{});
            arrive(ring.full(chunk));
        }
    }
}

// Converts every CONVERTERS-th chunk, from chunk `first` on. All lanes of a converting warp call this.
__device__ __forceinline__ void convert_chunks(const Ring& ring, u32 first) {
    // A warp converts 8 rows of 64 columns at a time. Four lanes have a row, 16 columns each: one piece of 16 bytes
    // in the chunk, and two in the tile. Eight lanes access memory at the same time: rows r and r ^ 5, whose
    // swizzled pieces are in different banks, in the chunk as well as in the tile.
    const u32 lane = threadIdx.x % 32, row = lane / 8 ^ lane / 4 % 2 * 5, piece = lane % 4;
    const u32 in_chunk = row * 128 + (piece ^ row) * 16, in_tile = row * 128 + (2 * piece ^ row) * 16;
#pragma unroll 1
    for (u32 chunk = first;; chunk += CONVERTERS) {
        // Another warp may not have converted the chunk that had this chunk's slot before. While not even the codes
        // of that chunk have arrived, a wait for the next phase of `full` would return at once.
        wait(ring.empty(chunk), ring.parity(chunk) ^ 1);
        wait(ring.full(chunk), ring.parity(chunk));
        Target target;
        load_words(target, ring.target(chunk));
        if (target.rows == 0) return;
        const u32 from = ring.codes_of(chunk), left = target.rows + in_tile, right = left ^ 16;
        wait(target.empty, target.parity);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const u32 its_codes = from + part / 2 * CODE_PART + (in_chunk ^ part % 2 * 64);
#pragma unroll
            for (int start = 0; start < CHUNK; start += 8 * BATCH) {
                uint4 codes[BATCH];
#pragma unroll
                for (int i = 0; i < BATCH; ++i)
                    if (start + 8 * i < CHUNK) codes[i] = load_16_bytes(its_codes + (start + 8 * i) * 128);
#pragma unroll
                for (int i = 0; i < BATCH; ++i) {
                    if (start + 8 * i >= CHUNK) continue;
                    const u32 rows = part * PART_BYTES + (start + 8 * i) * 128;
                    uint4 x;
                    widen(codes[i].x, x.x, x.y), widen(codes[i].y, x.z, x.w);
                    store_16_bytes(left + rows, x);
                    widen(codes[i].z, x.x, x.y), widen(codes[i].w, x.z, x.w);
                    store_16_bytes(right + rows, x);
                }
            }
        }
        publish_to_tensor_cores();
        arrive_of_warp(target.full);
        arrive_of_warp(ring.empty(chunk));
    }
}
