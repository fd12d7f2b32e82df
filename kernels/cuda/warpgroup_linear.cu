// out[t, n] = sum over k of x[t, k] * w[n, k], for many rows t; w is stored as codes of 4 or 6 bits in records, or of 8
// bits in rows (`kernels/records.py`).
//
// Lanes turn codes into 16-bit floats, times their scales, in registers: the left operand of a product of a
// warpgroup, [64 outputs, 16 inputs]. The right operand is x in shared memory, [TOKENS rows, 16 inputs], which the
// tensor cores read for all four warps at once. As in linear.cu, a lane keeps the inputs of 16 consecutive bytes
// of codes, so x must lie in the same order (`kernels/arrange_triton.py`).
//
// Two warpgroups compute 64 * ROW_TILES outputs each, and further warps copy UNITS units of the block's records
// and of x at a time to one of STAGES slots of shared memory: the lanes of a warp ask for copies one after another,
// some 44 ns each, so that one warp would be too slow. The tensor cores work for one warpgroup while the other
// decodes, and while each decodes its next operands. A row of x is a column of a product; a block with few rows
// multiplies only the columns that it needs, in steps of STEP. The blocks of a cluster compute the same sums, each
// over a part of the inputs.
//
// With EXPERTS, a block multiplies up to TOKENS items of one expert; linear.cu explains items.
//
// Defined by the compiler's options: TOKENS (8, 16, 32, 64, 128 or 256), ROW_TILES, UNITS, STAGES, BLOCKS (that
// share a multiprocessor), and CODE, BF16, GROUPS, SCALE, HAS_ZEROS, HAS_MINIMA, HAS_FACTORS, HAS_BIAS, EXPERTS,
// OUT32 and OVERLAP as in linear.cu.

#include "ptx.cuh"
#include "cluster.cuh"
#include "tensor_copies.cuh"
#include "wgmma.cuh"
#include "cluster_sums.cuh"
#include "codes.cuh"
#define TOKEN_TILES (TOKENS / 8)
#include "units.cuh"

constexpr int WARPS = 8;                      // that multiply
constexpr bool IS_ALONE = BLOCKS == 1;        // then a whole warpgroup copies, and gives its registers to the others
constexpr int COPYING_WARPS = IS_ALONE ? 4 : 2;
constexpr int THREADS = 32 * (WARPS + COPYING_WARPS);
constexpr int TILES = WARPS * ROW_TILES;      // of 16 outputs, of a block
constexpr int OUTPUTS = 16 * TILES;
constexpr int X_ROW = 2 * UNIT;               // bytes of a row of x in a unit
constexpr int X_UNIT = TOKENS * X_ROW;
// A slot has UNITS units of x, and of codes: records [TILES, UNITS, RECORD], or rows [UNITS, OUTPUTS, UNIT].
constexpr int X_SLOT = UNITS * X_UNIT, RECORDS = UNITS * RECORD;
constexpr int CODES = NIBBLES ? TILES * RECORDS : UNITS * OUTPUTS * UNIT, SLOT = X_SLOT + CODES;
constexpr int CODE_COPIES = NIBBLES ? TILES : UNITS;  // of a slot
constexpr int STEP = TOKENS >= 256 ? 64 : TOKENS >= 16 ? TOKENS / 2 : TOKENS;
constexpr int PITCH = OUTPUTS + 4;            // numbers between the sums of two rows

#if OUT32
typedef float OUT;
#else
typedef u16 OUT;
#endif

// Whether a scale is a 16-bit float of x's type, so that a product of pairs rounds a weight once.
constexpr bool IS_OF_X = SCALE == (BF16 ? BFLOAT16 : FLOAT16);
constexpr bool SCALES_PAIRS = NIBBLES && (IS_OF_X || SCALE == E4M3 || (SCALE == E8M0 && BF16)) && !HAS_MINIMA &&
                              !HAS_FACTORS && CODE != INT6;
// MXFP4 codes stay smaller by 2^126, and their scales become larger by 2^63, so that sums lack a factor of 2^63.
// Scales above 2^64, which no real weights have, become infinite.
constexpr bool IS_MXFP4 = CODE == FP4 && SCALE == E8M0 && SCALES_PAIRS;
// FP8 codes that have scales are multiplied by FACTOR first, as they may be too small for products of 16 bits.
constexpr bool RAISES_CODES = CODE == FP8 && GROUPS > 0;
constexpr float SUM_FACTOR = IS_MXFP4 ? 9223372036854775808.f : RAISES_CODES ? 1.f : FACTOR;

// A scale twice, for a pair of weights.
__device__ __forceinline__ u32 pair_of_scale(const Scales& scales, int group) {
    if constexpr (IS_OF_X) return scales.get<2>(group) * 0x00010001u;
    if constexpr (IS_MXFP4) return min(scales.get<1>(group) + 63, 255u) * 0x00800080u;
    const float scale = scale_of(scales, group);
    return pair_of(scale, scale);
}

// The weights of a quarter of a tile's unit, rounded once: `operand` has two left operands of 16 inputs each.
__device__ __forceinline__ void decode_quarter(const Unit& unit, int r, int q, u32 (&operand)[2][4]) {
    const int l = threadIdx.x % 4;
    const int group = SCALES_CODES ? 2 * q + l / 2 : q * NUM_SCALES / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32 pair[4];
        unpack_quarter<IS_MXFP4>(unit, r, half, q, group, pair);
        const Scales& scales = unit.scales[r][half];
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            if constexpr (GROUPS > 0 && SCALES_PAIRS) {
                pair[p] = times(pair[p], pair_of_scale(scales, group));
            } else if constexpr (GROUPS > 0) {
                const float scale = scale_of(scales, CODE == INT6 ? 2 * q + p / 2 : group);
                const float minimum = HAS_MINIMA ? minimum_of(scales, group) : -0.f;  // x + -0 is x
                const float raise = RAISES_CODES ? FACTOR : 1.f;
                pair[p] = pair_of(to_float(pair[p] & 0xFFFFu) * raise * scale + minimum,
                                  to_float(pair[p] >> 16) * raise * scale + minimum);
            }
            operand[p / 2][2 * (p % 2) + half] = pair[p];
        }
    }
}

// The descriptor of a right operand: 16 of a unit's inputs, of all rows. x lies in parts of 8 rows and 64 inputs,
// two of which are a unit.
__device__ __forceinline__ u64 columns_of_unit(u32 at, int first_input) {
    return matrix(at + first_input / 64 * 1024 + first_input % 64 * 2, 0, 2048);
}

__device__ __forceinline__ float result_of(float sum, const float* row_scales, const u16* bias, int output) {
    if constexpr (SUM_FACTOR != 1.f) sum *= SUM_FACTOR;
    if (row_scales) sum *= row_scales[output];
    if constexpr (HAS_BIAS) sum += to_float(bias[output]);
    return sum;
}

__device__ __forceinline__ void store(float* to, float x) { *to = x; }
__device__ __forceinline__ void store(u16* to, float x) { *to = (u16)pair_of(x, 0.f); }
__device__ __forceinline__ void store_four(float* to, const float4& x) { *(float4*)to = x; }
__device__ __forceinline__ void store_four(u16* to, const float4& x) {
    *(uint2*)to = make_uint2(pair_of(x.x, x.y), pair_of(x.z, x.w));
}

struct Stages {  // of the inputs: from `first` to `end`, those of a block
    int first, end;
};

struct Matrix {  // of the block's expert, if there are experts
    const u8* codes;       // records
    const TensorMap* map;  // of codes in rows, of all experts
    const u8 *scales, *zeros;  // of codes in rows: [outputs / 2^scale_shift, scale_stride]
    int first_row, scale_shift, scale_stride, num_outputs, num_units;
};

#if !NIBBLES
// A lane's codes of a unit, in rows of a slot, and their scales.
__device__ __forceinline__ void read_rows(Unit& unit, const u8* rows, const Matrix& matrix, int first_output, int index) {
    const int g = threadIdx.x % 32 / 4, l = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = 64 * r + 8 * half + g;
#pragma unroll
            for (int i = 0; i < LOADS; ++i)
                unit.codes[r][half][i] = *(const uint4*)(rows + row * UNIT + ((4 * i + l) ^ g) * 16);
            const int output = min(first_output + row, matrix.num_outputs - 1);
            const long long at = (long long)(output >> matrix.scale_shift) * matrix.scale_stride + index * UNIT_SCALES;
            if constexpr (GROUPS > 0) unit.scales[r][half].load(matrix.scales + at * SCALE_BYTES);
            if constexpr (HAS_ZEROS) unit.zeros[r][half].load(matrix.zeros + at);
        }
}
#endif

// Copies the block's stages. columns: the number of rows of x that the block multiplies.
__device__ __forceinline__ void copy_stages(
    u8* memory, const u8* x, const Matrix& matrix, int tile_block, Stages stages, int columns) {
    u8* const codes = memory + STAGES * X_SLOT;
    u64 *const full = (u64*)(memory + STAGES * SLOT), *const empty = full + STAGES;
    const int lane = threadIdx.x % 32, copying_warp = threadIdx.x / 32 - WARPS;
    const int piece = lane * COPYING_WARPS + copying_warp, unit_of_x = piece - CODE_COPIES;  // codes come first
    if (piece >= CODE_COPIES + UNITS) return;
    for (int stage = stages.first; stage < stages.end; ++stage) {
        const int index = stage - stages.first, slot = index % STAGES;
        const int first = stage * UNITS, count = min(UNITS, matrix.num_units - first);
        wait_for(empty + slot, index / STAGES % 2 ^ 1);
        if (unit_of_x >= 0 && unit_of_x < count) {
            copy_to_shared(memory + slot * X_SLOT + unit_of_x * X_UNIT,
                           x + ((long long)blockIdx.y * matrix.num_units + first + unit_of_x) * X_UNIT, columns * X_ROW,
                           full + slot);
        } else if (NIBBLES && unit_of_x < 0) {
            const long long tile = min(tile_block * TILES + piece, (matrix.num_outputs + 15) / 16 - 1);
            copy_to_shared(codes + slot * CODES + piece * RECORDS,
                           matrix.codes + (tile * matrix.num_units + first) * RECORD, count * RECORD, full + slot);
        } else if (piece < count) {
            expect_bytes(full + slot, OUTPUTS * UNIT);
            copy_box(address(codes + slot * CODES + piece * OUTPUTS * UNIT), matrix.map, address(full + slot),
                     (first + piece) * UNIT, matrix.first_row + tile_block * OUTPUTS, 0, 0, 0);
        } else {
            arrive_at(full + slot);
        }
    }
}

// Multiplies the first COLUMNS rows of x. Leaves the sums [COLUMNS, PITCH] in shared memory.
template <int COLUMNS>
__device__ __forceinline__ void multiply_stages(u8* memory, const Matrix& matrix, int tile_block, Stages stages) {
    u8* const codes = memory + STAGES * X_SLOT;
    u64 *const full = (u64*)(memory + STAGES * SLOT), *const empty = full + STAGES;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_tile = warp / 4 * 4 * ROW_TILES + warp % 4;  // the warp's other tiles are 4 further each
    float total[ROW_TILES][COLUMNS / 2] = {};
    for (int stage = stages.first; stage < stages.end; ++stage) {
        const int index = stage - stages.first, slot = index % STAGES, count = min(UNITS, matrix.num_units - stage * UNITS);
        wait_for(full + slot, index / STAGES % 2);
        const u8* const here = codes + slot * CODES;
        const u32 x_here = address(memory) + slot * X_SLOT;
#pragma unroll
        for (int u = 0; u < UNITS; ++u) {
            if (u >= count) break;
            Unit unit;
#if NIBBLES
            read_record(unit, here + first_tile * RECORDS + u * RECORD, 4 * RECORDS, lane);
#else
            read_rows(unit, here + (u * OUTPUTS + 16 * first_tile) * UNIT, matrix, tile_block * OUTPUTS + 16 * first_tile,
                      stage * UNITS + u);
#endif
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                u32 operand[ROW_TILES][2][4];
#pragma unroll
                for (int r = 0; r < ROW_TILES; ++r) decode_quarter(unit, r, q, operand[r]);
                begin_products();
#pragma unroll
                for (int k = 0; k < 2; ++k)
#pragma unroll
                    for (int r = 0; r < ROW_TILES; ++r)
                        multiply_rows(total[r], operand[r][k], columns_of_unit(x_here + u * X_UNIT, 32 * q + 16 * k));
                commit_products();
                wait_products<1>();  // the next quarter is decoded while these products run
            }
        }
        wait_products<0>();
        finish_reads();
        __syncwarp();
        if (lane == 0) arrive_at(empty + slot);
    }

    float* const sums = (float*)memory;
    meet_at(1, 32 * WARPS);
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
        settle(total[r]);
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; ++i) {
            const int row = i / 4 * 8 + 2 * (lane % 4) + i % 2;
            sums[row * PITCH + 16 * (first_tile + 4 * r) + lane / 4 + i / 2 % 2 * 8] = total[r][i];
        }
    }
    meet_at(1, 32 * WARPS);
}

// Multiplies the first `columns` rows of x: a multiple of STEP, at most COLUMNS.
template <int COLUMNS>
__device__ __forceinline__ void multiply_columns(
    u8* memory, const Matrix& matrix, int tile_block, Stages stages, int columns) {
    if constexpr (COLUMNS > STEP)
        if (columns < COLUMNS) return multiply_columns<COLUMNS - STEP>(memory, matrix, tile_block, stages, columns);
    multiply_stages<COLUMNS>(memory, matrix, tile_block, stages);
}

// x [blocks of rows, num_units, TOKENS / 8, 2, 8, 64], each part of 64 inputs with the 128-byte swizzle. codes:
// records; those of two experts are expert_bytes apart. map: of codes in rows, [experts * num_outputs, num_inputs].
// scales, zeros (of codes in rows): [outputs / 2^scale_shift, scale_stride] or null. row_scales: float [outputs] or
// null; bias [outputs]. Scales, zeros, row scales and bias have a first dimension of experts. out [rows, num_outputs].
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) warpgroup_linear(
    const u8* x, const u8* __restrict__ codes, const __grid_constant__ TensorMap map, const u8* __restrict__ scales,
    const u8* __restrict__ zeros, int scale_shift, int scale_stride, const float* __restrict__ row_scales,
    const u16* __restrict__ bias, OUT* __restrict__ out, int num_rows, int num_outputs, int num_units,
    const int* item_of_row, const int* expert_of_block, int num_items, int num_experts, long long expert_bytes) {
    extern __shared__ __align__(1024) u8 memory[];  // x [STAGES, X_SLOT], codes [STAGES, CODES], barriers
    if (threadIdx.x < STAGES) {
        u64* const full = (u64*)(memory + STAGES * SLOT);
        make_barrier(full + threadIdx.x, CODE_COPIES + UNITS);
        make_barrier(full + STAGES + threadIdx.x, WARPS);
    }
    publish_barriers();
    __syncthreads();
#if OVERLAP
    wait_for_predecessor();
    release_successor();
#endif
    const int first_row = blockIdx.y * TOKENS;
#if EXPERTS
    const int expert = expert_of_block[blockIdx.y];
    if (expert >= num_experts) return;
    codes += expert * expert_bytes;
    const long long scales_before = (long long)expert * (((num_outputs - 1) >> scale_shift) + 1) * scale_stride;
    if (scales) scales += scales_before * SCALE_BYTES;
    if (zeros) zeros += scales_before;
    if (row_scales) row_scales += (long long)expert * num_outputs;
    if (HAS_BIAS) bias += (long long)expert * num_outputs;
    auto has_row = [&](int row) { return item_of_row[first_row + row] < num_items; };  // items come first
#else
    constexpr int expert = 0;
    auto has_row = [&](int row) { return first_row + row < num_rows; };
#endif
    const Matrix matrix = {codes, &map, scales, zeros, expert * num_outputs, scale_shift, scale_stride, num_outputs,
                           num_units};
    const int split = rank_in_cluster(), splits = cluster_size(), tile_block = blockIdx.x / splits;
    const int num_stages = (num_units + UNITS - 1) / UNITS;
    const Stages stages = {num_stages * split / splits, num_stages * (split + 1) / splits};
    int columns = TOKENS;
    while (columns > STEP && !has_row(columns - STEP)) columns -= STEP;

    if (threadIdx.x >= 32 * WARPS) {
        if (IS_ALONE) shrink_registers<24>();
        copy_stages(memory, x, matrix, tile_block, stages, columns);
        return;
    }
    if (IS_ALONE) grow_registers<240>();
    multiply_columns<TOKENS>(memory, matrix, tile_block, stages, columns);
    if (splits > 1) meet_cluster();

    const float* const sums = (const float*)memory;
    for (int i = threadIdx.x + 32 * WARPS * split; i < OUTPUTS / 4 * columns; i += 32 * WARPS * splits) {
        const int row = i / (OUTPUTS / 4), within = i % (OUTPUTS / 4) * 4, output = tile_block * OUTPUTS + within;
        if (!has_row(row)) break;
        if (output >= num_outputs) continue;
#if EXPERTS
        OUT* const to = out + (long long)item_of_row[first_row + row] * num_outputs + output;
#else
        OUT* const to = out + (long long)(first_row + row) * num_outputs + output;
#endif
        float4 four = sums_of_cluster(sums + row * PITCH + within, splits);
        float* const each = (float*)&four;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (output + j < num_outputs) each[j] = result_of(each[j], row_scales, bias, output + j);
        if (num_outputs % 4 == 0) store_four(to, four);
        else
            for (int j = 0; j < 4 && output + j < num_outputs; ++j) store(to + j, each[j]);
    }
    if (splits > 1) meet_cluster();  // other blocks read this block's shared memory until here
}
