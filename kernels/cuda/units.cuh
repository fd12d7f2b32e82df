// Multiplies units of quantised weights, which are 128 inputs of tiles of 16 outputs, on the tensor cores.
//
// Defined before: ROW_TILES (tiles of outputs), TOKEN_TILES (of 8 rows of x), and the macros of codes.cuh.

#pragma once

struct Unit {  // a lane's codes, scales and zeros, of outputs lane / 4 and lane / 4 + 8 of each tile
    uint4 codes[ROW_TILES][2][LOADS];
    uint2 upper[ROW_TILES][2];  // the upper two bits of INT6 codes
    Scales scales[ROW_TILES][2];
    Zeros zeros[ROW_TILES][2];
};

// The records of the tiles lie `stride` bytes apart.
__device__ __forceinline__ void read_record(Unit& unit, const u8* record, int stride, int lane) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const u8* p = record + r * stride;
            const int output = 2 * (lane / 4) + half;  // a lane's two outputs are neighbours
            unit.codes[r][half][0] = *(const uint4*)(p + 512 * half + 16 * lane);
            if constexpr (CODE == INT6) unit.upper[r][half] = *(const uint2*)(p + 1024 + 256 * half + 8 * lane);
            if constexpr (GROUPS > 0) unit.scales[r][half].load(p + CODE_RECORD + output * UNIT_SCALES * SCALE_BYTES);
            if constexpr (HAS_ZEROS) unit.zeros[r][half].load(p + CODE_RECORD + SCALE_RECORD + output * NUM_SCALES);
        }
}

// A lane's eight inputs of a quarter, of which p is the first.
__device__ __forceinline__ uint4 inputs_of_quarter(const u16* p) {
    if constexpr (CODE == INT6) {  // four inputs of either group of 16
        const uint2 low = *(const uint2*)p, high = *(const uint2*)(p + 16);
        return make_uint4(low.x, low.y, high.x, high.y);
    }
    return *(const uint4*)p;
}

// A lane's eight codes of a quarter as four pairs of floats, not scaled. half: 1 for the output that is 8 further.
// group: the group of the lane's zero. RAW: see `unpack_nibbles`.
template <bool RAW>
__device__ __forceinline__ void unpack_quarter(
    const Unit& unit, int r, int half, int q, int group, u32 (&pair)[4]) {
    u32 zero = NO_ZERO;
    if constexpr (HAS_ZEROS) zero = zero_of(unit.zeros[r][half], group);
    const uint4& c = unit.codes[r][half][NIBBLES ? 0 : q / 2];
    if constexpr (CODE == INT6) {
        const uint2& upper = unit.upper[r][half];
        unpack_sixes(q == 0 ? c.x : q == 1 ? c.y : q == 2 ? c.z : c.w, q < 2 ? upper.x : upper.y, q % 2, pair);
    } else if constexpr (NIBBLES) {
        unpack_nibbles<RAW>(q == 0 ? c.x : q == 1 ? c.y : q == 2 ? c.z : c.w, zero, pair);
    } else {
        unpack_bytes(q % 2 ? c.z : c.x, zero, pair[0], pair[1]);
        unpack_bytes(q % 2 ? c.w : c.y, zero, pair[2], pair[3]);
    }
}

// total += the products of a quarter (32 inputs). b: the 8 of these inputs that belong to the lane. sum: sums over
// a group's inputs, zero before the first quarter. RAW: see `unpack_nibbles`.
template <bool RAW = false>
__device__ __forceinline__ void multiply_quarter(
    float (&total)[ROW_TILES][TOKEN_TILES][4], float (&sum)[ROW_TILES][TOKEN_TILES][4], const Unit& unit, int q,
    const uint4 (&b)[TOKEN_TILES]) {
    const int l = threadIdx.x % 4;
    const int group = SCALES_CODES ? 2 * q + l / 2 : q * NUM_SCALES / 4;
    if constexpr (HAS_MINIMA) {  // a minimum multiplies the sum of its group's inputs
        const u32 ones[4] = {ONES, ONES, ONES, ONES};
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; ++t) {
            float s[4] = {};
            multiply(s, ones, b[t].x, b[t].y);
            multiply(s, ones, b[t].z, b[t].w);
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    total[r][t][i] += minimum_of(unit.scales[r][i / 2], group) * s[i];
        }
    }
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
        u32 pair[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            unpack_quarter<RAW>(unit, r, half, q, group, pair[half]);
            if constexpr (SCALES_CODES) {
                const float scale = scale_of(unit.scales[r][half], group);
#pragma unroll
                for (int p = 0; p < 4; ++p) pair[half][p] = scaled(pair[half][p], scale);
            }
        }
        const u32 first[4] = {pair[0][0], pair[1][0], pair[0][1], pair[1][1]};
        const u32 second[4] = {pair[0][2], pair[1][2], pair[0][3], pair[1][3]};
        if constexpr (CODE == INT6) {  // each instruction multiplies a group
            const Scales &above = unit.scales[r][0], &below = unit.scales[r][1];
#pragma unroll
            for (int t = 0; t < TOKEN_TILES; ++t) {
                float low[4] = {}, high[4] = {};
                multiply(low, first, b[t].x, b[t].y);
                multiply(high, second, b[t].z, b[t].w);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    total[r][t][i] += scale_of(i < 2 ? above : below, 2 * q) * low[i];
                    total[r][t][i] += scale_of(i < 2 ? above : below, 2 * q + 1) * high[i];
                }
            }
            continue;
        }
        constexpr bool SCALES_SUMS = GROUPS > 0 && !SCALES_CODES;
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; ++t) {
            float(&s)[4] = SCALES_SUMS ? sum[r][t] : total[r][t];
            multiply(s, first, b[t].x, b[t].y);
            multiply(s, second, b[t].z, b[t].w);
        }
        if (SCALES_SUMS && (q + 1) * NUM_SCALES % 4 == 0) {
            const float above = scale_of(unit.scales[r][0], group), below = scale_of(unit.scales[r][1], group);
#pragma unroll
            for (int t = 0; t < TOKEN_TILES; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    total[r][t][i] += (i < 2 ? above : below) * sum[r][t][i];
                    sum[r][t][i] = 0.f;
                }
        }
    }
}
