// All decoder blocks of a decode step of few rows in one launch: a step is a reading of the weights, and
// nothing may interrupt it.
//
// One thread block runs on each multiprocessor. Some of its warps copy the block's share of every matrix,
// matrix after matrix and layer after layer, to a ring of slots in shared memory. These warps never wait for
// other blocks, because weights depend on nothing, so memory stays busy while the other warps wait for the
// activations. WARPS warps compute five phases a layer:
//
//     norm, qkv | norms of heads, rotation, store, attention | out, residual | norm, gate, up, act | down, residual
//
// A barrier over the grid ends each phase, or, where activations are few, each says itself that it is there
// (`Activation`). Activations pass through the L2 cache.
//
// A block owns whole outputs, in pieces of 8, so that no sums cross blocks. Its pieces are every NUM_BLOCKS-th one,
// so that all blocks together read a contiguous window, from one that turns from matrix to matrix, so that all blocks
// read equally many bytes in the long run. A slot has the weights of a tile of 16 outputs (two pieces; of gate and up
// 8 outputs each) and SEGMENT inputs. Each warp multiplies some of a slot's inputs on the tensor cores, as the left
// operand [16 outputs, 16 inputs], by the rows as the right operand [16 inputs, 8 rows]. As in linear.cu, the order of
// inputs is free, so that a lane loads 16 bytes at a time. The warps' sums are added through shared memory, in a fixed
// order.
//
// In attention, a unit is the keys of one row and KV head, or a split of them. Warps take tiles of 16 keys in
// turn, and load the first from global memory before the phase begins. The last of a row's splits to end adds them up
// in a fixed order.
//
// Defined by the compiler's options: BF16 (otherwise float16), ROWS (1, 2, 4 or 8: most rows), NUM_BLOCKS (of the
// grid), WARPS (that compute), STAGES (slots), SEGMENT (inputs of a slot), MOST_COPIES (slots on their way at once),
// TAGGED (activations have tags), SCRATCH (bytes), HIDDEN, INTERMEDIATE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, ROTARY_DIM,
// BLOCK_SIZE (tokens of a page, a multiple of 16), PLUS_ONE (norms multiply by 1 + weight), HAS_QK_NORM, ACTIVATION (0:
// silu, 1: gelu, 2: gelu_tanh), HAS_SOFT_CAP, HAS_WINDOWS, HAS_SINKS, HAS_BIASES, FP8_CACHE, STAMPS (write the time of
// each phase), PACKED (weights are quantised, in one of the layouts of codes.cuh; 8-bit codes with scales of outputs, or
// of blocks of 128 inputs and 2^SCALE_SHIFT outputs), and those of codes.cuh.

#define ROW_TILES 1
#define TOKEN_TILES 1
#include "ptx.cuh"
#include "codes.cuh"
#include "units.cuh"
#include "decode_model.cuh"
#include "decode_weights.cuh"
#include "decode_activations.cuh"
#include "decode_products.cuh"
#include "decode_attention.cuh"

// The residual stream before a phase, and where a phase leaves it: `plain` or `rows`, with tags of their layers.
struct Residual {
    const u16* plain;  // null, or what the launch was given
    const Activation* rows;
    u32 tag;

    __device__ __forceinline__ float at(int place) const {
        return plain ? to_float(load_from_l2(plain + place)) : get(rows + place, tag);
    }
};

// A product that is added to the residual stream `before` if `adds`. Goes to `after` and `plain`, if they are not null.
template <int MATRIX>
__device__ __forceinline__ void add_product(
    const Launch& launch, Ring& ring, const Activation* inputs, u32 tag, const Residual& before, bool adds,
    Activation* after, u16* plain, int layer, float* shared) {
    const Share<MATRIX> share(layer);
    if (TAGGED && share.count == 0) return;  // tags of inputs that nobody reads may be any
    auto place = [&](int tile, int i, int row) { return row * HIDDEN + share.output(tile, i); };
    auto residual = [&](int tile, int i, int row) { return adds ? before.at(place(tile, i, row)) : 0.f; };
    auto add = [&](int tile, int i, int row, float result, float old) {
        const float sum = old + rounded_to_16_bits(result);
        if (after) put(after + place(tile, i, row), sum, tag);
        if (plain) put(plain + place(tile, i, row), sum, 0);
    };
#if TAGGED
    const TaggedInputs<inputs_of(MATRIX)> source = {inputs, launch.num_rows, tag};
#else
    const GlobalInputs<inputs_of(MATRIX)> source = {inputs, launch.num_rows};
#endif
    product<MATRIX>(launch.table, layer, ring, source, share, shared, launch.num_rows, residual, add);
}

__device__ __forceinline__ float nothing(int, int, int) { return 0.f; }

__device__ __forceinline__ void normalize_residual(
    const Launch& launch, const Residual& x, int layer, int norm, u8* scratch, float* small, const Grid& grid) {
    const u16* const weight = launch.table.tensor(layer, norm);
    if (x.plain) normalize(x.plain, 0, weight, launch.eps, launch.num_rows, scratch, small, grid, false);
    else normalize(x.rows, x.tag, weight, launch.eps, launch.num_rows, scratch, small, grid, true);
}

__device__ __forceinline__ void project_heads(
    const Launch& launch, Ring& ring, const Residual& x, u32 tag, int layer, u8* scratch, float* small,
    const Grid& grid) {
    const Share<QKV> share(layer);
    if (TAGGED && share.count == 0) return;
    normalize_residual(launch, x, layer, ATTN_NORM, scratch, small, grid);
    launch.stamps.write(layer, 0, 1);
    const SharedInputs source = {scratch, ROWS};
    auto store = [&](int tile, int i, int row, float result, float) {
        put(launch.qkv + row * QKV_SIZE + share.output(tile, i), result, tag);
    };
    product<QKV>(launch.table, layer, ring, source, share, (float*)scratch, launch.num_rows, nothing, store);
}

__device__ __forceinline__ void project_gates(
    const Launch& launch, Ring& ring, const Residual& x, u32 tag, int layer, u8* scratch, float* small,
    const Grid& grid) {
    const Share<GATE_UP> share(layer);
    if (TAGGED && share.count == 0) return;
    normalize_residual(launch, x, layer, MLP_NORM, scratch, small, grid);
    launch.stamps.write(layer, 3, 1);
    const SharedInputs source = {scratch, ROWS};
    auto store = [&](int tile, int i, int row, float gate, float up) {
        const float act = rounded_to_16_bits(activated(rounded_to_16_bits(gate))) * rounded_to_16_bits(up);
        put(launch.activations + row * INTERMEDIATE + share.output(tile, i), act, tag);
    };
    product<GATE_UP>(launch.table, layer, ring, source, share, (float*)scratch, launch.num_rows, nothing, store);
}

__device__ __forceinline__ void run_layers(
    const Launch& launch, Ring& ring, Grid& grid, u64 launch_index, u8* scratch, float* small) {
    const Splits all(launch.lengths, launch.num_rows, 0);
    for (int layer = 0; layer < launch.num_layers; ++layer) {
        const bool is_first = layer == 0, is_last = layer == launch.num_layers - 1;
        const u32 tag = tag_of(launch_index, layer + 1);
        const Residual begin = {is_first ? launch.x_in : nullptr, launch.x_end, tag_of(launch_index, layer)};
        const Residual middle = {nullptr, launch.x_mid, tag};
        project_heads(launch, ring, begin, tag, layer, scratch, small, grid);
        launch.stamps.write(layer, 0, 2);
        grid.arrive();
        launch.stamps.write(layer, 0, 3);

        const i64 window = HAS_WINDOWS ? launch.table.words[layer * NUM_FIELDS + WINDOW] : 0;
        const Splits splits = window ? Splits(launch.lengths, launch.num_rows, (int)window) : all;
        attend(launch, splits, layer, tag, grid, scratch, small);
        launch.stamps.write(layer, 1, 2);
        grid.arrive();
        launch.stamps.write(layer, 1, 3);

        grid.wait();
        launch.stamps.write(layer, 2, 1);
        add_product<OUT>(launch, ring, launch.context, tag, begin, true, launch.x_mid,
                         TAGGED && is_last ? launch.x : nullptr, layer, (float*)scratch);
        launch.stamps.write(layer, 2, 2);
        grid.arrive();
        launch.stamps.write(layer, 2, 3);

        project_gates(launch, ring, middle, tag, layer, scratch, small, grid);
        launch.stamps.write(layer, 3, 2);
        grid.arrive();
        launch.stamps.write(layer, 3, 3);

        grid.wait();
        launch.stamps.write(layer, 4, 1);
        add_product<DOWN>(launch, ring, launch.activations, tag, middle, !is_last, is_last ? nullptr : launch.x_end,
                          is_last ? launch.update : nullptr, layer, (float*)scratch);
        launch.stamps.write(layer, 4, 2);
        grid.arrive();
        launch.stamps.write(layer, 4, 3);
    }
}

// Of the threads that compute.
__device__ __forceinline__ void compute(
    Launch launch, Ring& ring, u8* workspace, u8* scratch, float* small, u64* times) {
    u64* const counter = (u64*)workspace;
    u64 launch_index = 0;
    if (TAGGED) {  // counted by all blocks
        if (threadIdx.x == 0) *(u64*)small = add_one(counter) / NUM_BLOCKS;
        meet();
        launch_index = *(u64*)small;
        meet();
    }
    Grid grid(counter);
    launch.arrivals = (u32*)(workspace + 128);
    launch.qkv = (Activation*)(workspace + 128 + (8 * NUM_KV_HEADS * 4 + 127) / 128 * 128);
    launch.context = launch.qkv + ROWS * QKV_SIZE;
    launch.activations = launch.context + ROWS * Q_SIZE;
    Activation* const residual = launch.activations + ROWS * INTERMEDIATE;
    launch.partial = (float*)(residual + 2 * ROWS * HIDDEN);
#if TAGGED
    launch.x_mid = residual, launch.x_end = residual + ROWS * HIDDEN;
#else
    launch.x_mid = launch.x_end = launch.x;
#endif
    launch.stamps.times = times;
    run_layers(launch, ring, grid, launch_index, scratch, small);
}

// x_in [num_rows, HIDDEN] is read only; x and update [num_rows, HIDDEN] are the results. cos, sin [num_rows,
// ROTARY_DIM]. slots [num_rows], -1: store nothing. pages [num_rows, pages_stride]. lengths [num_rows] include the
// step's token. workspace: see `workspace_bytes` in kernels/decode_step_cuda.py. stamps: [layers, 5, 4, NUM_BLOCKS].
extern "C" __global__ void __launch_bounds__(THREADS + 32 * COPYING_WARPS, 1) decode_step(
    const i64* __restrict__ table, const u16* __restrict__ x_in, const u16* __restrict__ cos,
    const u16* __restrict__ sin, u16* x, u16* update, const i64* __restrict__ slots, const int* __restrict__ pages,
    const int* __restrict__ lengths, u8* workspace, u64* stamps, int pages_stride, int num_layers, int num_rows,
    float eps, float qk_eps, float scale, float soft_cap) {
    extern __shared__ __align__(128) u8 ring_memory[];
    u64* const barriers = (u64*)(ring_memory + STAGES * SLOT + SCRATCH);
    float* const small = (float*)((u8*)barriers + BARRIERS);
    Ring ring = {ring_memory, barriers, barriers + STAGES, 0, 0, 0};
    if (threadIdx.x < STAGES) {
        make_barrier(ring.full + threadIdx.x, COPIES);
        make_barrier(ring.empty + threadIdx.x, WARPS);
    }
    publish_barriers();
    __syncthreads();
    const Launch launch = {{table}, x_in, cos, sin, x, update, slots, pages, lengths, pages_stride, num_layers,
                           num_rows, eps, qk_eps, scale, soft_cap};
    if (threadIdx.x >= THREADS) {  // a warpgroup, as registers are given to warpgroups
        shrink_registers<40>();
        if (copies()) copy_weights(ring, launch.table, num_layers);
    } else {
        grow_registers<232>();
        compute(launch, ring, workspace, ring_memory + STAGES * SLOT, small, stamps);
    }
}
