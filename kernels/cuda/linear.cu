// out[t, n] = sum over k of x[t, k] * w[n, k], for few rows t; w is stored as codes of 8, 6 or 4 bits.
//
// The time to read w dominates. A warp owns 16 * ROW_TILES outputs and every K_WARPS-th unit of 128
// inputs. Lanes turn codes into 16-bit floats in registers; these are the left operand of a tensor-core
// instruction [16 outputs, 16 inputs], and x is the right operand [16 inputs, 8 rows]. The order of
// inputs does not change a sum of products, so a lane need not hold the codes of the inputs that the
// instruction assigns to the lane, as long as x is read in the same order. Each lane can therefore read
// 16 consecutive bytes at a time. The partial sums of the K_WARPS warps are added through shared memory,
// in a fixed order.
//
// 8-bit codes lie in rows (INT8: in the order of `kernels/records.py: pack_bytes`). Lanes load them
// into registers, DEPTH units ahead.
// 4- and 6-bit codes lie in records of 16 outputs and a unit, with their scales and zeros
// (`kernels/records.py: pack_records`). One thread of a warp copies CHUNK records at a time to
// shared memory, DEPTH chunks ahead.
//
// With EXPERTS, each of the gridDim.y blocks multiplies up to TOKENS items of one expert.
// `item_of_row` [blocks, TOKENS] has the items of a block (num_items or more: no item); item i reads row
// i / items_per_row of x and writes row i of out. Without `item_of_row`, block i has only item i. A block
// whose expert is num_experts or more is empty.
//
// Defined by the compiler's options: CODE, BF16 (x and out are bfloat16, otherwise float16),
// TOKEN_TILES (of 8 rows of x), ROW_TILES, N_WARPS, K_WARPS, DEPTH, CHUNK (see `quantized_cuda.Tiling`),
// GROUPS (scales of an output per unit; 0: none), SCALE (the type of these scales), HAS_ZEROS, HAS_MINIMA
// and HAS_FACTORS (minima and factors follow the scales of an output and a unit), HAS_BIAS, TAIL (the last
// unit is partial), EXPERTS, OUT32 (out is float), OVERLAP (programmatic dependent launch).

#include "ptx.cuh"
#include "codes.cuh"
#include "units.cuh"

constexpr int TILES = ROW_TILES * N_WARPS, OUTPUTS = 16 * TILES, TOKENS = 8 * TOKEN_TILES;
constexpr int THREADS = 32 * N_WARPS * K_WARPS;

#if OUT32
typedef float OUT;
#else
typedef u16 OUT;
#endif

// -- copies to shared memory (codes in records) -------------------------------------------------------

constexpr int SLOT = CHUNK * RECORD;  // bytes of a chunk of one tile

// -- the kernel ------------------------------------------------------------------------------------

// x [rows, num_inputs], rows x_stride elements apart. codes: rows of row_bytes bytes, or records; those of
// two experts are expert_bytes apart.
// scales, zeros (8-bit): [outputs / 2^scale_shift, scale_stride]. row_scales: float [outputs] or null.
// bias [outputs]. out [rows, num_outputs]. With experts, all tensors of the matrix but codes are
// contiguous, with a first dimension of experts.
extern "C" __global__ void __launch_bounds__(THREADS, 1) quantized_linear(
    const u16* x, const u8* __restrict__ codes, const u8* __restrict__ scales, const u8* __restrict__ zeros,
    const float* __restrict__ row_scales, const u16* __restrict__ bias, OUT* __restrict__ out,
    int num_rows, int num_outputs, int num_inputs, long long x_stride, long long row_bytes, int scale_shift,
    int scale_stride, int items_per_row, const int* item_of_row, const int* expert_of_block, int num_items,
    int num_experts, long long expert_bytes) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int n_warp = warp % N_WARPS, k_warp = warp / N_WARPS;
    const int g = lane / 4, l = lane % 4;
    const int num_units = (num_inputs + UNIT - 1) / UNIT;
    const int first_output = (blockIdx.x * TILES + n_warp * ROW_TILES) * 16;

#if EXPERTS  // the previous kernels write the routing, so this kernel waits before it reads the routing
#if OVERLAP
    wait_for_predecessor();
#endif
    const int expert = expert_of_block[blockIdx.y];
    if (expert >= num_experts) return;
    codes += expert * expert_bytes;
    const long long scales_before = (long long)expert * (((num_outputs - 1) >> scale_shift) + 1) * scale_stride;
    if (scales) scales += scales_before * SCALE_BYTES;
    if (zeros) zeros += scales_before;
    if (row_scales) row_scales += (long long)expert * num_outputs;
    if (HAS_BIAS) bias += (long long)expert * num_outputs;
#endif

#if EXPERTS
    auto item_of = [&](int row) {
        if (item_of_row) return item_of_row[blockIdx.y * TOKENS + row];
        return row ? num_items : (int)blockIdx.y;
    };
#endif

    // Start loading the weights.
#if NIBBLES
    extern __shared__ __align__(128) u8 ring[];  // [warps, DEPTH, ROW_TILES, SLOT]
    __shared__ u64 arrived[N_WARPS * K_WARPS][DEPTH];
    u8* const ring_of_warp = ring + warp * DEPTH * ROW_TILES * SLOT;
    const int num_tiles = (num_outputs + 15) / 16, num_chunks = (num_units + CHUNK - 1) / CHUNK;
    if (lane < DEPTH)
        make_barrier(&arrived[warp][lane], ROW_TILES);
    publish_barriers();
    __syncwarp();
    auto load = [&](int chunk, int slot) {
        if (chunk >= num_chunks || lane != 0) return;
        const int num_records = min(CHUNK, num_units - chunk * CHUNK);
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) {
            const long long tile = min(first_output / 16 + r, num_tiles - 1);
            copy_to_shared(ring_of_warp + (slot * ROW_TILES + r) * SLOT,
                           codes + (tile * num_units + chunk * CHUNK) * RECORD, num_records * RECORD,
                           &arrived[warp][slot]);
        }
    };
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) load(k_warp + d * K_WARPS, d);
#else
    const u8* row[ROW_TILES][2];
    int scale_row[ROW_TILES][2];
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int output = min(first_output + 16 * r + 8 * half + g, num_outputs - 1);
            row[r][half] = codes + output * row_bytes + 16 * l;
            scale_row[r][half] = output >> scale_shift;
        }
    auto load = [&](Unit& unit, int index) {
        if (index >= num_units) return;
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int i = 0; i < LOADS; ++i) {
                    // Past the last input, x is zero, so the value of the code does not matter.
                    const bool is_beyond = TAIL && IN_ORDER && index * UNIT + 64 * i + 16 * l >= num_inputs;
                    const u8* p = is_beyond ? row[r][half] - 16 * l : row[r][half] + index * UNIT_BYTES + 64 * i;
                    unit.codes[r][half][i] = load_once(p);
                }
                const long long at = (long long)scale_row[r][half] * scale_stride + index * UNIT_SCALES;
                if constexpr (GROUPS > 0) unit.scales[r][half].load_now(scales + at * SCALE_BYTES);
                if constexpr (HAS_ZEROS) unit.zeros[r][half].load_now(zeros + at);
            }
    };
    Unit ahead[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) load(ahead[d], k_warp + d * K_WARPS);
#endif

#if OVERLAP
#if !EXPERTS
    wait_for_predecessor();  // before this line, the kernel reads weights only
#endif
    release_successor();
#endif

    const u16* x_of_lane[TOKEN_TILES];
    bool is_row[TOKEN_TILES];
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; ++t) {
        long long row_of_x = 8 * t + g;
        is_row[t] = row_of_x < num_rows;
#if EXPERTS
        const int item = item_of(8 * t + g);
        is_row[t] = item < num_items, row_of_x = item / items_per_row;
#endif
        x_of_lane[t] = x + row_of_x * x_stride + LANE_INPUTS * l;
    }

    float total[ROW_TILES][TOKEN_TILES][4] = {};
    auto multiply_unit = [&](const Unit& unit, int index) {
        float sum[ROW_TILES][TOKEN_TILES][4] = {};  // sums over a group's inputs
#pragma unroll
        for (int q = 0; q < 4; ++q) {  // a quarter: 32 inputs, of which a lane has 8
            const int within = first_input(q);
            const bool is_inside = !TAIL || index * UNIT + within + LANE_INPUTS * l < num_inputs;
            uint4 b[TOKEN_TILES];
#pragma unroll
            for (int t = 0; t < TOKEN_TILES; ++t) {
                b[t] = make_uint4(0, 0, 0, 0);
                if (is_row[t] && is_inside) b[t] = inputs_of_quarter(x_of_lane[t] + index * UNIT + within);
            }
            multiply_quarter(total, sum, unit, q, b);
        }
    };

#if NIBBLES
    int slot = 0;
    u32 parity = 0;
    for (int chunk = k_warp; chunk < num_chunks; chunk += K_WARPS) {
        wait_for(&arrived[warp][slot], parity);
        const u8* here = ring_of_warp + slot * ROW_TILES * SLOT;
        Unit unit;
        if ((chunk + 1) * CHUNK <= num_units) {
#pragma unroll
            for (int u = 0; u < CHUNK; ++u) {
                read_record(unit, here + u * RECORD, SLOT, lane);
                multiply_unit(unit, chunk * CHUNK + u);
            }
        } else {
            for (int u = 0; chunk * CHUNK + u < num_units; ++u) {
                read_record(unit, here + u * RECORD, SLOT, lane);
                multiply_unit(unit, chunk * CHUNK + u);
            }
        }
        __syncwarp();
        load(chunk + DEPTH * K_WARPS, slot);
        if (++slot == DEPTH) slot = 0, parity ^= 1;
    }
#else
    for (int first = k_warp; first < num_units; first += DEPTH * K_WARPS) {
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            const int index = first + d * K_WARPS;
            if (index >= num_units) continue;
            multiply_unit(ahead[d], index);
            load(ahead[d], index + DEPTH * K_WARPS);
        }
    }
#endif

    // Add the partial sums of the K_WARPS warps that share outputs.
    __shared__ float sums[K_WARPS][TOKENS][OUTPUTS + 4];
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int output = (n_warp * ROW_TILES + r) * 16 + 8 * (i / 2) + g;
                sums[k_warp][8 * t + 2 * l + i % 2][output] = total[r][t][i];
            }
    __syncthreads();
    for (int i = threadIdx.x; i < OUTPUTS * TOKENS; i += THREADS) {
        const int token = i / OUTPUTS, output = blockIdx.x * OUTPUTS + i % OUTPUTS;
        long long row_of_out = token;
#if EXPERTS
        row_of_out = item_of(token);
        if (row_of_out >= num_items || output >= num_outputs) continue;
#else
        if (token >= num_rows || output >= num_outputs) continue;
#endif
        float sum = 0.f;
#pragma unroll
        for (int k = 0; k < K_WARPS; ++k) sum += sums[k][token][i % OUTPUTS];
        if constexpr (FACTOR != 1.f) sum *= FACTOR;
        if (row_scales) sum *= row_scales[output];
        if constexpr (HAS_BIAS) sum += to_float(bias[output]);
        if constexpr (sizeof(OUT) == 4) out[row_of_out * num_outputs + output] = sum;
        else out[row_of_out * num_outputs + output] = (u16)pair_of(sum, 0.f);
    }
}
