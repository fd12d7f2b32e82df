// Products of the rows with a block's share of a matrix.

#pragma once

// Where a product's inputs come from: normalised rows in shared memory, or rows in global memory. Columns of
// sums without a row are not used, so their lanes may read any row.
struct SharedInputs {
    static constexpr int AHEAD = 1;
    const u8* rows;
    int num_rows;

    template <class T> __device__ __forceinline__ T load(int row, int input) const {
        return *(const T*)(rows + row * X_PITCH + 2 * input);
    }
};
template <int INPUTS> struct GlobalInputs {
    static constexpr int AHEAD = larger(1, 16 / (STEPS * X_PARTS));  // segments whose loads are in flight
    const u16* rows;
    int num_rows;

    template <class T> __device__ __forceinline__ T load(int row, int input) const {
        return load_from_l2((const T*)(rows + row * INPUTS + input));
    }
};

template <int INPUTS> struct TaggedInputs {
    const u32* rows;
    int num_rows;
    u32 tag;
};

__device__ __forceinline__ int row_of_lane(int num_rows) {
    const int row = threadIdx.x % 32 / 4;
    return row < num_rows ? row : 0;
}

// The first of a lane's eight inputs of a part of a step.
__device__ __forceinline__ int input_of_lane(int input, int part) {
    const int l = threadIdx.x % 4;
    return PACKED ? input + first_input(part) + l * LANE_INPUTS : input + l * 8;
}

template <class SOURCE> __device__ __forceinline__ uint4 load_part(const SOURCE& source, int input, int part) {
    const int row = row_of_lane(source.num_rows), at = input_of_lane(input, part);
    if (!PACKED || CODE != INT6) return source.template load<uint4>(row, at);
    const uint2 low = source.template load<uint2>(row, at), high = source.template load<uint2>(row, at + 16);
    return make_uint4(low.x, low.y, high.x, high.y);
}

// Codes of int4 take an instruction less for two weights if they stay raised: larger by 128 or 1024, and by their zero.
// The sum of a group's inputs times that is taken off again, which needs the sum once for all outputs.
constexpr bool RAISED = PACKED && CODE == INT4 && !SCALES_CODES;

struct Inputs {  // a lane's of a segment
    uint4 parts[STEPS][X_PARTS];
    float sums[RAISED ? STEPS : 1][NUM_SCALES][2];  // of a group, for rows 2 l and 2 l + 1

    __device__ __forceinline__ void sum_groups() {
        if (!RAISED) return;
        constexpr int PARTS = X_PARTS / NUM_SCALES;  // of a group
        const u32 ones[4] = {ONES, ONES, ONES, ONES};
#pragma unroll
        for (int s = 0; s < STEPS; ++s)
#pragma unroll
            for (int group = 0; group < NUM_SCALES; ++group) {
                float sum[4] = {};
#pragma unroll
                for (int p = group * PARTS; p < (group + 1) * PARTS; ++p) {
                    multiply(sum, ones, parts[s][p].x, parts[s][p].y);
                    multiply(sum, ones, parts[s][p].z, parts[s][p].w);
                }
                sums[s][group][0] = sum[0], sums[s][group][1] = sum[1];
            }
    }
};

__device__ __forceinline__ bool has_step(int s, int num_inputs, int segment) {
    const int step = s * WARPS + threadIdx.x / 32;
    if (STEPS_OF_SLOT % WARPS && step >= STEPS_OF_SLOT) return false;
    return num_inputs % SEGMENT == 0 || segment * SEGMENT + step * STEP < num_inputs;
}

template <int MATRIX, class SOURCE>
__device__ __forceinline__ void load_inputs(Inputs& x, const SOURCE& source, int segment) {
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
        const int input = segment * SEGMENT + (s * WARPS + threadIdx.x / 32) * STEP;
        const bool is_inside = has_step(s, inputs_of(MATRIX), segment);
#pragma unroll
        for (int p = 0; p < X_PARTS; ++p)
            x.parts[s][p] = is_inside ? load_part(source, input, p) : make_uint4(0, 0, 0, 0);
    }
}

// A warp's weights of a slot, in registers.
struct Weights {
    uint4 lower[STEPS], upper[STEPS];  // 16 bits
    Unit units[PACKED ? STEPS : 1];
};

// Take this warp's weights from the next slot, which may then be filled again.
template <int MATRIX> __device__ __forceinline__ void take_slot(Weights& weights, Ring& ring, int segment) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    wait_for(ring.full + ring.slot, ring.parity);
    const u8* const slot = ring.slots + ring.slot * SLOT;
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
        if (!has_step(s, inputs_of(MATRIX), segment)) continue;
        const int step = s * WARPS + warp;
        const u8* at = slot + lane / 4 * PITCH + step * STEP_BYTES + lane % 4 * 16;
        if constexpr (IN_RECORDS) read_record(weights.units[s], slot + step * RECORD, 0, lane);
        else if constexpr (PACKED)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int i = 0; i < LOADS; ++i)
                    weights.units[s].codes[0][half][i] = *(const uint4*)(at + 8 * half * PITCH + 64 * i);
                const u8* const scale = slot + 16 * PITCH + half * HALF_SCALES + 4 * step;
                if constexpr (HAS_BLOCKS) weights.units[s].scales[0][half].load(scale);
            }
        else weights.lower[s] = *(const uint4*)at, weights.upper[s] = *(const uint4*)(at + 8 * PITCH);
    }
    finish_reads();
    __syncwarp();
    if (lane == 0) arrive_at(ring.empty + ring.slot);
    ring.advance();
}

// Two sums, so that a product need not wait for the one before.
struct TileSum {
    float parts[2][ROW_TILES][TOKEN_TILES][4];
};

// Take off a group's sum what raised codes add to it; q: the first quarter of the group.
__device__ __forceinline__ void lower(float (&sum)[4], const Unit& unit, const float (&of_inputs)[2], int q) {
    if constexpr (!RAISED) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        u32 zero = NO_ZERO;
        if constexpr (HAS_ZEROS) zero = zero_of(unit.zeros[0][i / 2], q * NUM_SCALES / 4);
        sum[i] -= to_float(zero & 0xFFFF) * of_inputs[i % 2];
    }
}

// sum += the weights of a slot times the inputs of its segment
template <int MATRIX>
__device__ __forceinline__ void multiply_slot(TileSum& sum, const Weights& weights, const Inputs& x, int segment) {
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
        if (!has_step(s, inputs_of(MATRIX), segment)) continue;
        if constexpr (PACKED) {
            float of_group[ROW_TILES][TOKEN_TILES][4] = {};
#pragma unroll
            for (int q = 0; q < X_PARTS; ++q) {
                const uint4 b[1] = {x.parts[s][q]};
                auto& to = GROUPS > 0 ? of_group : sum.parts[s % 2];
                if (q * NUM_SCALES % 4 == 0)
                    lower(to[0][0], weights.units[s], x.sums[RAISED ? s : 0][q * NUM_SCALES / 4], q);
                multiply_quarter<RAISED>(sum.parts[s % 2], of_group, weights.units[s], q, b);
            }
        } else {
            const uint4 &lower = weights.lower[s], &upper = weights.upper[s], &b = x.parts[s][0];
            const u32 first[4] = {lower.x, upper.x, lower.y, upper.y};
            const u32 second[4] = {lower.z, upper.z, lower.w, upper.w};
            multiply(sum.parts[0][0][0], first, b.x, b.y);
            multiply(sum.parts[1][0][0], second, b.z, b.w);
        }
    }
}

// Bring a warp's sums of a tile to shared memory, where `sum_of` finds them.
__device__ __forceinline__ void share_sums(const TileSum& sum, float* shared, int tile) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, l = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = 2 * l + i % 2, output = g + 8 * (i / 2);
        float* const to = shared + ((warp * MOST_TILES + tile) * 16 + output) * ROWS + row;
        if (row < ROWS) *to = sum.parts[0][0][0][i] + sum.parts[1][0][0][i];
    }
}

// The order of slots: all segments of a tile, then the next tile, if a lane can hold all its inputs in registers;
// otherwise all tiles of a segment, then the next segment.
template <int MATRIX> struct AllInputs {  // a lane's
    Inputs of_segment[segments_of(MATRIX)];
};

template <int MATRIX, class SOURCE>
__device__ __forceinline__ void load_all_inputs(AllInputs<MATRIX>& x, const SOURCE& source) {
#pragma unroll
    for (int i = 0; i < segments_of(MATRIX); ++i) load_inputs<MATRIX>(x.of_segment[i], source, i);
}

constexpr int MOST_EIGHTS = 16;  // times eight tagged inputs that a lane loads at once

template <int MATRIX, int INPUTS>
__device__ __forceinline__ void load_all_inputs(AllInputs<MATRIX>& x, const TaggedInputs<INPUTS>& source) {
    constexpr int ALL = segments_of(MATRIX) * STEPS * X_PARTS, COUNT = ALL < MOST_EIGHTS ? ALL : MOST_EIGHTS;
    const u32* const row = source.rows + row_of_lane(source.num_rows) * inputs_of(MATRIX);
#pragma unroll
    for (int first = 0; first < ALL; first += COUNT) {
        uint4 eights[COUNT];
        auto place = [&](int i, int half) -> const u32* {
            const int part = (first + i) % X_PARTS, s = (first + i) / X_PARTS % STEPS;
            const int segment = (first + i) / (X_PARTS * STEPS);
            if (first + i >= ALL || !has_step(s, inputs_of(MATRIX), segment)) return nullptr;
            const int input = segment * SEGMENT + (s * WARPS + threadIdx.x / 32) * STEP;
            return row + input_of_lane(input, part) + half * (PACKED && CODE == INT6 ? 16 : 4);
        };
        get_eights(eights, place, source.tag);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int eight = first + i, s = eight / X_PARTS % STEPS;
            if (eight < ALL) x.of_segment[eight / (X_PARTS * STEPS)].parts[s][eight % X_PARTS] = eights[i];
        }
    }
}

template <int MATRIX, class SOURCE>
__device__ __forceinline__ void multiply_tile_by_tile(
    Ring& ring, const SOURCE& source, float* shared, int num_tiles) {
    constexpr int SEGMENTS = segments_of(MATRIX);
    AllInputs<MATRIX> x;
    load_all_inputs(x, source);
#pragma unroll
    for (int i = 0; i < SEGMENTS; ++i) x.of_segment[i].sum_groups();
    meet();  // no warp reads shared inputs any more, in whose place the sums come
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; ++tile) {
        TileSum sum = {};
        Weights weights[2];
        take_slot<MATRIX>(weights[0], ring, 0);
#pragma unroll
        for (int i = 0; i < SEGMENTS; ++i) {
            if (i + 1 < SEGMENTS) take_slot<MATRIX>(weights[(i + 1) % 2], ring, i + 1);
            multiply_slot<MATRIX>(sum, weights[i % 2], x.of_segment[i], i);
        }
        share_sums(sum, shared, tile);
    }
}

template <int MATRIX, class SOURCE>
__device__ __forceinline__ void multiply_by_segments(
    Ring& ring, const SOURCE& source, float* shared, int num_tiles) {
    constexpr int AHEAD = SOURCE::AHEAD, SEGMENTS = segments_of(MATRIX);
    TileSum sums[most_tiles(MATRIX)] = {};
    Inputs x[AHEAD];
    Weights weights;
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        if (i < SEGMENTS) load_inputs<MATRIX>(x[i], source, i);
#pragma unroll 1
    for (int first = 0; first < SEGMENTS; first += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int segment = first + i;
            if (segment >= SEGMENTS) continue;
            x[i].sum_groups();
#pragma unroll
            for (int tile = 0; tile < most_tiles(MATRIX); ++tile) {
                if (tile >= num_tiles) continue;
                take_slot<MATRIX>(weights, ring, segment);
                multiply_slot<MATRIX>(sums[tile], weights, x[i], segment);
            }
            load_inputs<MATRIX>(x[i], source, min(segment + AHEAD, SEGMENTS - 1));  // the last ones in vain
        }
    }
    meet();  // see above
#pragma unroll
    for (int tile = 0; tile < most_tiles(MATRIX); ++tile)
        if (tile < num_tiles) share_sums(sums[tile], shared, tile);
}

// The sum over the warps of an output of a tile, for one row.
__device__ __forceinline__ float sum_of(const float* sums, int tile, int output, int row) {
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += sums[((warp * MOST_TILES + tile) * 16 + output) * ROWS + row];
    return sum;
}

// What becomes of a sum: result = sum * scale + bias.
struct Affine {
    float scale, bias;

    Affine() = default;
    __device__ __forceinline__ Affine(const Table& table, int layer, int matrix, int output) : scale(1.f), bias(0.f) {
        if (PACKED) scale = __ldg((const float*)table.part(layer, matrix, ROW_SCALES) + output);
        const u16* biases = HAS_BIASES ? table.part(layer, matrix, BIAS) : nullptr;
        if (biases) bias = to_float(__ldg(biases + output));
    }
    __device__ __forceinline__ float of(float sum) const { return PACKED ? sum * FACTOR * scale + bias : sum + bias; }
};

constexpr bool HAS_UP_TILES = IN_RECORDS;  // up's outputs are a tile of their own, not the second half of gate's
constexpr int UP_TILE = HAS_UP_TILES ? 1 : 0, UP_OUTPUT = HAS_UP_TILES ? 0 : 8;  // from a gate's place to up's
// Gates and up are counted once.
__device__ constexpr int outputs_of_tile(int matrix) { return matrix == GATE_UP ? PIECE : 16; }
__device__ constexpr int tiles_of_result(int matrix) { return matrix == GATE_UP && HAS_UP_TILES ? 2 : 1; }
// Of a thread.
__device__ constexpr int results_of(int matrix) {
    return (most_tiles(matrix) / tiles_of_result(matrix) * outputs_of_tile(matrix) * ROWS + THREADS - 1) / THREADS;
}

// Call `call(i, tile, output, row)` for each result of this thread.
template <int MATRIX, class CALL>
__device__ __forceinline__ void for_each_result(const Share<MATRIX>& share, int num_rows, CALL call) {
    constexpr int OUTPUTS = outputs_of_tile(MATRIX);
#pragma unroll
    for (int i = 0; i < results_of(MATRIX); ++i) {
        const int index = i * THREADS + threadIdx.x, output = index % OUTPUTS, row = index / OUTPUTS % ROWS;
        const int tile = index / (OUTPUTS * ROWS) * tiles_of_result(MATRIX);
        if (tile < share.num_tiles() && row < num_rows && share.has(tile, output)) call(i, tile, output, row);
    }
}

// A product of the block's share. For each result, `finish(tile, output, row, result, old)` is called once, where
// `old` is what `before(tile, output, row)` returned before the product. Of gate and up, results are those of gates,
// and `finish` gets those of up as `old`.
template <int MATRIX, class SOURCE, class BEFORE, class FINISH>
__device__ __forceinline__ void product(const Table& table, int layer, Ring& ring, const SOURCE& source,
                                        const Share<MATRIX>& share, float* shared, int num_rows, BEFORE before,
                                        FINISH finish) {
    constexpr bool IS_GATED = MATRIX == GATE_UP;
    constexpr int RESULTS = results_of(MATRIX);
    Affine affine[RESULTS] = {}, affine_of_up[RESULTS] = {};
    float old[RESULTS] = {};
    for_each_result(share, num_rows, [&](int i, int tile, int output, int row) {
        affine[i] = Affine(table, layer, MATRIX, share.output(tile, output));
        old[i] = before(tile, output, row);
        if (!IS_GATED) return;
        affine_of_up[i] = Affine(table, layer, MATRIX, share.output(tile + UP_TILE, output + UP_OUTPUT));
    });
    if constexpr (holds_inputs(MATRIX)) multiply_tile_by_tile<MATRIX>(ring, source, shared, share.num_tiles());
    else multiply_by_segments<MATRIX>(ring, source, shared, share.num_tiles());
    meet();
    for_each_result(share, num_rows, [&](int i, int tile, int output, int row) {
        if (IS_GATED) old[i] = affine_of_up[i].of(sum_of(shared, tile + UP_TILE, output + UP_OUTPUT, row));
        finish(tile, output, row, affine[i].of(sum_of(shared, tile, output, row)), old[i]);
    });
}

__device__ __forceinline__ float activated(float x) {
    if (ACTIVATION == 0) return x / (1.f + __expf(-x));
    if (ACTIVATION == 1) return 0.5f * x * (1.f + erff(x * 0.70710678118654752f));
    return x / (1.f + __expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
}
