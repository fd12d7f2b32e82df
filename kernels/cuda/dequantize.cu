// Writes the matrix out [num_outputs, num_inputs] in 16 bits; each weight is rounded once. Codes lie in
// rows (8 bits) or records (4 bits), see linear.cu, which also explains the macros. A warp computes a
// tile of 16 outputs and a unit of 128 inputs; blockIdx.x is the tile, blockIdx.y a group of units.

#include "codes.cuh"

extern "C" __global__ void dequantize(
    const u8* __restrict__ codes, const u8* __restrict__ scales, const u8* __restrict__ zeros,
    const float* __restrict__ row_scales, u16* __restrict__ out, int num_outputs, int num_inputs,
    long long row_bytes, int scale_shift, int scale_stride) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    const int lane = threadIdx.x % 32, g = lane / 4, l = lane % 4;
    const int num_units = (num_inputs + UNIT - 1) / UNIT;
    const int tile = blockIdx.x, unit = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
    if (unit >= num_units) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int output = 16 * tile + 8 * half + g;
        if (output >= num_outputs) continue;
        uint4 loaded[LOADS];
        Scales scale;
        Zeros zero_code;
#if NIBBLES
        const u8* record = codes + ((long long)tile * num_units + unit) * RECORD;
        loaded[0] = *(const uint4*)(record + 512 * half + 16 * lane);
        if (GROUPS > 0) scale.load(record + 1024 + (2 * g + half) * UNIT_SCALES * SCALE_BYTES);
        if (HAS_ZEROS) zero_code.load(record + 1024 + SCALE_RECORD + (2 * g + half) * NUM_SCALES);
#else
        for (int i = 0; i < LOADS; ++i)
            if (!IN_ORDER || unit * UNIT + 64 * i + 16 * l < num_inputs)
                loaded[i] = *(const uint4*)(codes + output * row_bytes + unit * UNIT + 64 * i + 16 * l);
        const long long at = (long long)(output >> scale_shift) * scale_stride + unit * UNIT_SCALES;
        if (GROUPS > 0) scale.load(scales + at * SCALE_BYTES);
        if (HAS_ZEROS) zero_code.load(zeros + at);
#endif
        const float of_row = row_scales ? row_scales[output] : 1.f, factor = CODE == FP8 ? FP8_FACTOR : 1.f;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const int group = SCALES_CODES ? 2 * q + l / 2 : q * NUM_SCALES / 4;
            u32 zero = NO_ZERO, pair[4];
            if (HAS_ZEROS) zero = zero_of(zero_code, group);
            const uint4& c = loaded[NIBBLES ? 0 : q / 2];
#if NIBBLES
            unpack_nibbles(q == 0 ? c.x : q == 1 ? c.y : q == 2 ? c.z : c.w, zero, pair);
#else
            unpack_bytes(q % 2 ? c.z : c.x, zero, pair[0], pair[1]);
            unpack_bytes(q % 2 ? c.w : c.y, zero, pair[2], pair[3]);
#endif
            const float s = (GROUPS > 0 ? scale_of(scale, group) : 1.f) * of_row;
            const float minimum = HAS_MINIMA ? minimum_of(scale, group) : -0.f;  // x + -0 is x
#pragma unroll
            for (int p = 0; p < 4; ++p)
                pair[p] = pair_of(to_float(pair[p] & 0xFFFFu) * factor * s + minimum,
                                  to_float(pair[p] >> 16) * factor * s + minimum);
            const int input = unit * UNIT + first_input(q) + LANE_INPUTS * l;
            if (input < num_inputs)
                *(uint4*)(out + (long long)output * num_inputs + input) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
        }
    }
}
