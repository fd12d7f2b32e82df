// out[t, n] = sum over k of x[t, k] * w[n, k], for few rows t, in 16 bits.
//
// The time to read w dominates. A block has up to 128 outputs and all inputs, or, if the blocks of a cluster share
// outputs, a part of the inputs. Two warps ask the tensor memory accelerator for stages of 64 inputs: one for w,
// which begins before the previous kernel has ended, as weights depend on nothing, and one for x. Two warpgroups
// multiply on the tensor cores: w is the left operand, [64 outputs, 16 inputs], and x the right operand, [TOKENS rows,
// 16 inputs], both in shared memory. The sums of a cluster's blocks are added through their shared memory, in a fixed
// order.
//
// Defined by the compiler's options: BF16 (otherwise float16), TOKENS (most rows: 8, 16 or 32), HAS_BIAS,
// OVERLAP (programmatic dependent launch).

#include "ptx.cuh"
#include "numbers.cuh"
#include "cluster.cuh"
#include "tensor_copies.cuh"
#include "wgmma.cuh"
#include "cluster_sums.cuh"

constexpr int WARPS = 8;                   // that multiply: two warpgroups
constexpr int THREADS = 32 * (WARPS + 2);
constexpr int INPUTS = 64, ROW = 2 * INPUTS;  // of a stage; bytes of its rows
constexpr int X_BYTES = TOKENS * ROW;
constexpr int MOST_OUTPUTS = 128, PITCH = MOST_OUTPUTS + 4;  // numbers between the sums of two rows

struct Ring {
    u8* slots;  // [num_slots, slot_bytes]: x, then w
    u64 *full, *empty;
    int num_slots, slot_bytes;
    int slot;  // of the thread's next stage
    u32 parity;

    __device__ __forceinline__ u32 place() const { return address(slots) + slot * slot_bytes; }
    __device__ __forceinline__ void advance() {
        if (++slot == num_slots) slot = 0, parity ^= 1;
    }
};

// Copy rows of a tensor for each stage of 64 inputs, to `offset` in a slot.
__device__ __forceinline__ void copy_rows(
    Ring ring, const TensorMap* map, int first_row, int first_stage, int num_stages, int offset, int bytes) {
    for (int stage = first_stage; stage < first_stage + num_stages; ++stage, ring.advance()) {
        u64* const full = ring.full + ring.slot;
        wait_for(ring.empty + ring.slot, ring.parity ^ 1);
        expect_bytes(full, bytes);
        copy_box(ring.place() + offset, map, address(full), stage * INPUTS, first_row, 0, 0, 0);
    }
}

// Multiply all stages. Leaves the sums [TOKENS, PITCH] in shared memory.
__device__ __forceinline__ void multiply_stages(Ring ring, int num_stages) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4;
    float total[TOKENS / 2] = {};
    u64* read = nullptr;  // tells that the slot of the stage before is empty
    for (int i = 0; i < num_stages; ++i, ring.advance()) {
        wait_for(ring.full + ring.slot, ring.parity);
        const u32 x = ring.place(), w = x + X_BYTES + group * 64 * ROW;
        begin_products();
#pragma unroll
        for (int k = 0; k < INPUTS / 16; ++k)
            multiply_shared(total, matrix(w + 32 * k, 0), matrix(x + 32 * k, 0));
        commit_products();
        wait_products<1>();  // those of the stage before have ended
        if (read && lane == 0) arrive_at(read);
        read = ring.empty + ring.slot;
    }
    wait_products<0>();
    meet_at(1, 32 * WARPS);
    float* const sums = (float*)ring.slots;
    settle(total);
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) {
        const int token = i / 4 * 8 + 2 * (lane % 4) + i % 2;
        sums[token * PITCH + 16 * warp + lane / 4 + i / 2 % 2 * 8] = total[i];
    }
    meet_at(1, 32 * WARPS);
}

// weights: map of w [num_outputs, num_inputs] with boxes of `tile_outputs` rows, a multiple of 8. inputs: map of x
// [num_rows, num_inputs] with boxes of TOKENS rows. bias [num_outputs]. out [num_rows, num_outputs].
extern "C" __global__ void __launch_bounds__(THREADS, 2) dense_linear(
    const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap inputs, const u16* __restrict__ bias,
    u16* __restrict__ out, int num_rows, int num_outputs, int num_inputs, int tile_outputs, int num_slots) {
    extern __shared__ __align__(1024) u8 memory[];  // slots, room for rows of w that are not there, barriers
    const int slot_bytes = X_BYTES + tile_outputs * ROW;
    u64* const barriers = (u64*)(memory + num_slots * slot_bytes + (MOST_OUTPUTS - tile_outputs) * ROW);
    const Ring ring = {memory, barriers, barriers + num_slots, num_slots, slot_bytes, 0, 0};
    if (threadIdx.x < num_slots) {
        make_barrier(ring.full + threadIdx.x, 2);
        make_barrier(ring.empty + threadIdx.x, WARPS);
    }
    publish_barriers();
    __syncthreads();
    const int split = rank_in_cluster(), splits = cluster_size(), first_output = blockIdx.x / splits * tile_outputs;
    const int all_stages = (num_inputs + INPUTS - 1) / INPUTS, first_stage = all_stages * split / splits;
    const int num_stages = all_stages * (split + 1) / splits - first_stage, warp = threadIdx.x / 32;
    if (warp >= WARPS) {
        if (threadIdx.x % 32) return;
        if (warp == WARPS) {
            copy_rows(ring, &weights, first_output, first_stage, num_stages, X_BYTES, tile_outputs * ROW);
            return;
        }
#if OVERLAP
        wait_for_predecessor();
        release_successor();
#endif
        copy_rows(ring, &inputs, 0, first_stage, num_stages, 0, X_BYTES);
        return;
    }
    multiply_stages(ring, num_stages);
    if (splits > 1) meet_cluster();

    const float* const sums = (const float*)memory;
    const int fours = tile_outputs / 4, count = fours * num_rows;
    for (int i = threadIdx.x + 32 * WARPS * split; i < count; i += 32 * WARPS * splits) {
        const int row = i / fours, within = i % fours * 4, output = first_output + within;
        if (output >= num_outputs) continue;
        const float4 four = sums_of_cluster(sums + row * PITCH + within, splits);
        const float* const each = (const float*)&four;
        u16* const to = out + (long long)row * num_outputs + output;
        u32 pair[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float low = each[2 * j], high = each[2 * j + 1];
            if (HAS_BIAS) low += to_float(bias[output + 2 * j]), high += to_float(bias[output + 2 * j + 1]);
            pair[j] = pair_of(low, high);
        }
        *(uint2*)to = make_uint2(pair[0], pair[1]);
    }
    if (splits > 1) meet_cluster();  // other blocks read this block's shared memory until here
}
