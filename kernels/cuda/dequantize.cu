// Writes rows of a matrix in 16 bits, out [num_rows, num_inputs]; each weight is rounded once. Codes lie
// in rows (8 bits) or in records (4 and 6 bits); linear.cu explains both, and the macros. A warp computes
// 16 rows and a unit of 128 inputs; blockIdx.x is the group of 16 rows, blockIdx.y a group of units. With
// HAS_IDS, row i of out is row ids[i] of the matrix, otherwise row i.

#include "ptx.cuh"
#include "codes.cuh"

extern "C" __global__ void dequantize(
    const u8* __restrict__ codes, const u8* __restrict__ scales, const u8* __restrict__ zeros,
    const float* __restrict__ row_scales, const long long* ids, u16* __restrict__ out, int num_rows,
    int num_inputs, long long row_bytes, int scale_shift, int scale_stride) {
    wait_for_predecessor();
    release_successor();
    const int lane = threadIdx.x % 32, g = lane / 4, l = lane % 4;
    const int num_units = (num_inputs + UNIT - 1) / UNIT;
    const int unit = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
    if (unit >= num_units) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = 16 * blockIdx.x + 8 * half + g;
        if (row >= num_rows) continue;
        const int output = HAS_IDS ? (int)ids[row] : row;
        uint4 loaded[LOADS];
        uint2 upper = make_uint2(0, 0);
        Scales scale;
        Zeros zero_code;
#if NIBBLES
        const u8* record = codes + ((long long)(output / 16) * num_units + unit) * RECORD;
        const int place = 2 * (output % 8) + output / 8 % 2;  // of the output's scales in the record
        loaded[0] = *(const uint4*)(record + 64 * (output % 16) + 16 * l);
        if (CODE == INT6) upper = *(const uint2*)(record + 1024 + 32 * (output % 16) + 8 * l);
        if (GROUPS > 0) scale.load(record + CODE_RECORD + place * UNIT_SCALES * SCALE_BYTES);
        if (HAS_ZEROS) zero_code.load(record + CODE_RECORD + SCALE_RECORD + place * NUM_SCALES);
#else
        for (int i = 0; i < LOADS; ++i)
            if (!IN_ORDER || unit * UNIT + 64 * i + 16 * l < num_inputs)
                loaded[i] = *(const uint4*)(codes + (long long)output * row_bytes + unit * UNIT + 64 * i + 16 * l);
        const long long at = (long long)(output >> scale_shift) * scale_stride + unit * UNIT_SCALES;
        if (GROUPS > 0) scale.load(scales + at * SCALE_BYTES);
        if (HAS_ZEROS) zero_code.load(zeros + at);
#endif
        const float of_row = row_scales ? row_scales[output] : 1.f;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const int group = SCALES_CODES ? 2 * q + l / 2 : q * NUM_SCALES / 4;
            u32 zero = NO_ZERO, pair[4];
            const u32 word = q == 0 ? loaded[0].x : q == 1 ? loaded[0].y : q == 2 ? loaded[0].z : loaded[0].w;
            if constexpr (CODE == INT6) {
                unpack_sixes(word, q < 2 ? upper.x : upper.y, q % 2, pair);
#pragma unroll
                for (int p = 0; p < 4; ++p) {
                    const float s = scale_of(scale, 2 * q + p / 2) * (row_scales ? row_scales[output] : 1.f);
                    pair[p] = pair_of(to_float(pair[p] & 0xFFFFu) * s, to_float(pair[p] >> 16) * s);
                }
#pragma unroll
                for (int group = 0; group < 2; ++group) {
                    const int input = unit * UNIT + 32 * q + 16 * group + 4 * l;
                    if (input < num_inputs)
                        *(uint2*)(out + (long long)row * num_inputs + input) = make_uint2(pair[2 * group], pair[2 * group + 1]);
                }
                continue;
            }
            if (HAS_ZEROS) zero = zero_of(zero_code, group);
            const uint4& c = loaded[NIBBLES ? 0 : q / 2];
#if NIBBLES
            unpack_nibbles(word, zero, pair);
#else
            unpack_bytes(q % 2 ? c.z : c.x, zero, pair[0], pair[1]);
            unpack_bytes(q % 2 ? c.w : c.y, zero, pair[2], pair[3]);
#endif
            const float s = (GROUPS > 0 ? scale_of(scale, group) : 1.f) * of_row;
            const float minimum = HAS_MINIMA ? minimum_of(scale, group) : -0.f;  // x + -0 is x
#pragma unroll
            for (int p = 0; p < 4; ++p)
                pair[p] = pair_of(to_float(pair[p] & 0xFFFFu) * FACTOR * s + minimum,
                                  to_float(pair[p] >> 16) * FACTOR * s + minimum);
            const int input = unit * UNIT + first_input(q) + LANE_INPUTS * l;
            if (input < num_inputs)
                *(uint4*)(out + (long long)row * num_inputs + input) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
        }
    }
}
