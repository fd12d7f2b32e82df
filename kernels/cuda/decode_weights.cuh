// The ring of slots in shared memory through which a block's weights go, and the threads that fill it.

#pragma once

struct Ring {
    u8* slots;
    u64 *full, *empty;
    int slot;
    u32 parity;
    int num_copied;  // slots, by threads that copy

    __device__ __forceinline__ void advance() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
    // Wait until fewer than MOST_COPIES slots are on their way: more would fill the queues of the memory, and loads
    // of activations would wait behind the weights.
    __device__ __forceinline__ void limit_copies() {
        if (num_copied++ < MOST_COPIES) return;
        const bool wraps = slot < MOST_COPIES;
        wait_for(full + slot - MOST_COPIES + wraps * STAGES, parity ^ wraps);
    }
};

// A thread takes some 40 ns to ask for a copy, so that each warp asks for a part of a slot's copies. All other threads
// leave, because a thread for which nobody waits could miss that a barrier opened twice.
constexpr int COPIES_OF_WARP = (COPIES + COPYING_WARPS - 1) / COPYING_WARPS;
__device__ __forceinline__ int index_of_copy() {
    return (threadIdx.x - THREADS) / 32 * COPIES_OF_WARP + threadIdx.x % 32;
}
__device__ __forceinline__ bool copies() {
    return threadIdx.x % 32 < COPIES_OF_WARP && index_of_copy() < COPIES;
}

// Copy the weights of a tile of a segment to the next slot.
template <int MATRIX>
__device__ __forceinline__ void copy_tile(
    Ring& ring, const u8* weights, const u8* scales, const Share<MATRIX>& share, int tile, int segment) {
    constexpr int STEPS_OF_ROW = inputs_of(MATRIX) / STEP;
    wait_for(ring.empty + ring.slot, ring.parity ^ 1);
    ring.limit_copies();
    u8* const slot = ring.slots + ring.slot * SLOT;
    u64* const full = ring.full + ring.slot;
    const int step = segment * STEPS_OF_SLOT, count = min(STEPS_OF_SLOT, STEPS_OF_ROW - step);
    const int copy = index_of_copy(), half = copy - 16;
    const bool is_scales = HAS_BLOCKS && half >= 0;
    const i64 output = share.output(tile, is_scales ? 8 * half : copy);
    constexpr int SIZE = IN_RECORDS ? RECORD : STEP_BYTES;  // of a step
    if (!share.has(tile, is_scales ? 8 * half : copy)) arrive_at(full);
    else if (is_scales) {
        const u8* const from = scales + ((output >> SCALE_SHIFT) * STEPS_OF_ROW + step) * 4;
        copy_to_shared(slot + 16 * PITCH + half * HALF_SCALES, from, count * 4, full);
    } else {
        const u8* const from = weights + ((IN_RECORDS ? output / 16 : output) * STEPS_OF_ROW + step) * SIZE;
        copy_to_shared(slot + copy * PITCH, from, count * SIZE, full);
    }
    ring.advance();
}

template <int MATRIX> __device__ __forceinline__ void copy_share(Ring& ring, const Table& table, int layer) {
    const Share<MATRIX> share(layer);
    const u8* const weights = (const u8*)table.part(layer, MATRIX, WEIGHT);
    const u8* const scales = (const u8*)table.part(layer, MATRIX, SCALES);
    if constexpr (holds_inputs(MATRIX)) {
        for (int tile = 0; tile < share.num_tiles(); ++tile)
            for (int segment = 0; segment < segments_of(MATRIX); ++segment)
                copy_tile(ring, weights, scales, share, tile, segment);
    } else {
        for (int segment = 0; segment < segments_of(MATRIX); ++segment)
            for (int tile = 0; tile < share.num_tiles(); ++tile)
                copy_tile(ring, weights, scales, share, tile, segment);
    }
}

// Bring a small tensor to the L2 cache, of which each block brings a part.
__device__ __forceinline__ void prefetch(const u16* tensor, int size) {
    constexpr int LINE = 64;  // 128 bytes
    for (int line = blockIdx.x * COPIES + index_of_copy(); line * LINE < size; line += NUM_BLOCKS * COPIES)
        prefetch_to_l2(tensor + line * LINE);
}

__device__ __forceinline__ void copy_weights(Ring& ring, const Table& table, int num_layers) {
    for (int layer = 0; layer < num_layers; ++layer) {
        prefetch(table.tensor(layer, ATTN_NORM), HIDDEN);
        prefetch(table.tensor(layer, MLP_NORM), HIDDEN);
        if (HAS_QK_NORM) {
            prefetch(table.tensor(layer, Q_NORM), HEAD_DIM);
            prefetch(table.tensor(layer, K_NORM), HEAD_DIM);
        }
        copy_share<QKV>(ring, table, layer);
        copy_share<OUT>(ring, table, layer);
        copy_share<GATE_UP>(ring, table, layer);
        copy_share<DOWN>(ring, table, layer);
    }
}
