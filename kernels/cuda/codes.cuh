// Decodes quantised weights to 16-bit floats in registers. linear.cu explains the macros, and includes
// ptx.cuh before this file.

#pragma once

#include "numbers.cuh"

enum Code { FP8, INT8, INT4, FP4, INT6 };
enum ScaleType { FLOAT32, BFLOAT16, FLOAT16, E8M0, E4M3, INTEGER8 };

// Whether codes lie in records: INT4, FP4 and INT6. A record stores the lower four bits of INT6 codes like
// INT4 codes, and the upper two bits after them.
#define NIBBLES (CODE == 2 || CODE == 3 || CODE == 4)
constexpr int UNIT = 128;                              // inputs
// Bytes of an output's codes in a unit; for INT6, of the lower four bits only.
constexpr int UNIT_BYTES = NIBBLES ? UNIT / 2 : UNIT;
constexpr int UPPER_BYTES = CODE == INT6 ? UNIT / 4 : 0;  // bytes of the upper two bits in a unit
// Loads of 16 bytes that each of the four lanes of an output needs for a unit.
constexpr int LOADS = UNIT_BYTES / 64;
// FP8 codes lie in the order of the inputs, because cuBLASLt multiplies by the same tensor: a lane's 16
// bytes are the codes of 16 consecutive inputs. In the layouts of the other codes (kernels/records.py) a
// lane has 8 consecutive inputs of each quarter of 32; with INT6, 4 consecutive inputs of each 16.
constexpr bool IN_ORDER = CODE == FP8;
constexpr int LANE_INPUTS = IN_ORDER ? 16 : CODE == INT6 ? 4 : 8;
// Index, within a unit, of the first input of lane 0 in a quarter of its codes. Lane l (of the four that
// share an output) begins LANE_INPUTS * l inputs later.
__device__ __forceinline__ constexpr int first_input(int quarter) {
    return IN_ORDER ? 64 * (quarter / 2) + 8 * (quarter % 2) : 32 * quarter;
}
constexpr int SCALE_BYTES = SCALE == FLOAT32 ? 4 : SCALE == BFLOAT16 || SCALE == FLOAT16 ? 2 : 1;
// Scales of groups of 16 inputs multiply the codes; scales of larger groups multiply sums of products. INT6
// has its inputs in such an order that an instruction multiplies one group.
constexpr bool SCALES_CODES = GROUPS == 8 && CODE != INT6;
// The pair of floats that unpacking INT4 subtracts if there are no zeros: the offset, plus a zero of 8, or
// of 0 with minima.
constexpr u32 NO_ZERO = (BF16 ? 0x43004300u : 0x64006400u) + (HAS_MINIMA ? 0u : 0x00080008u);
constexpr u32 ONES = BF16 ? 0x3F803F80u : 0x3C003C00u;

// -- codes to floats -------------------------------------------------------------------------------

// Unpacked FP8 codes, and NVFP4 codes times their scales, are too small by the factor FACTOR, a power of two.
// The kernel multiplies the final sum by FACTOR. This changes a sum of codes by at most 2^-29.
constexpr bool IS_NVFP4 = CODE == FP4 && GROUPS == 8 && SCALE == E4M3;
constexpr float FACTOR = CODE == FP8 ? (BF16 ? 1.329227995784916e36f : 256.f)  // 2^120, 2^8
                         : IS_NVFP4  ? (BF16 ? 6.646139978924579e35f : 16384.f)  // 2^119, 2^14
                                     : 1.f;
// The power of two by which a float with the bits of an E4M3 scale is too small. Scales of NVFP4 in BF16 are
// left too large by 2^7, so that their products with the codes, which are too small by 2^126, are exact.
constexpr float E4M3_POWER = IS_NVFP4 && BF16 ? 1.7014118346046923e38f : 1.329227995784916e36f;  // 2^127, 2^120

// Four 8-bit codes -> two pairs, exact.
__device__ __forceinline__ void unpack_bytes(u32 codes, u32 zero, u32& first, u32& second) {
    if constexpr (CODE == FP8) {
        // Sign, four exponent and three mantissa bits move to their places in a 16-bit float, whose
        // exponent's bias is larger by 120 or 8. The byte above a code is full of the code's sign.
        constexpr int SHIFT = BF16 ? 4 : 7;
        constexpr u32 MASK = BF16 ? 0x87F087F0u : 0xBF80BF80u;
        first = (bytes_and_signs(codes, 0x9180) << SHIFT) & MASK;
        second = (bytes_and_signs(codes, 0xB3A2) << SHIFT) & MASK;
    } else {
        u32 v = codes ^ 0x80808080u;  // code + 128
#if BF16
        const float OFFSET = 8388608.f + 128.f;  // 2^23, where a float's lowest bits are an integer
        float f0 = __uint_as_float(__byte_perm(v, 0x4B000000u, 0x7440)) - OFFSET;
        float f1 = __uint_as_float(__byte_perm(v, 0x4B000000u, 0x7441)) - OFFSET;
        float f2 = __uint_as_float(__byte_perm(v, 0x4B000000u, 0x7442)) - OFFSET;
        float f3 = __uint_as_float(__byte_perm(v, 0x4B000000u, 0x7443)) - OFFSET;
        first = pair_of(f0, f1), second = pair_of(f2, f3);
#else
        first = subtract(__byte_perm(v, 0x64646464u, 0x4140), 0x64806480u);  // 1024 + 128
        second = subtract(__byte_perm(v, 0x64646464u, 0x4342), 0x64806480u);
#endif
#if HAS_ZEROS
        first = subtract(first, zero), second = subtract(second, zero);
#endif
    }
}

__device__ __forceinline__ constexpr u32 shifted(u32 bits, int up) {
    return up >= 0 ? bits << max(up, 0) : bits >> max(-up, 0);
}

// Eight 6-bit codes -> four pairs of code - 32, exact. The code becomes the lowest bits of a float of 128
// (BF16) or 1024, from which that offset and 32 are subtracted. upper: the upper bits of two quarters.
// quarter: 0 or 1, which of the two.
__device__ __forceinline__ void unpack_sixes(u32 lower, u32 upper, int quarter, u32 (&pair)[4]) {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
        const int down = 8 * quarter + 2 * p - 4;
        const u32 above = shifted(upper, -down) & 0x00300030u;
        const u32 bits = ((lower >> (4 * p)) & 0x000F000Fu) | above | (BF16 ? 0x43004300u : 0x64006400u);
        pair[p] = subtract(bits, (BF16 ? 0x43004300u : 0x64006400u) + 0x00200020u);
    }
}

// Eight 4-bit codes -> four pairs, exact but for FACTOR. The lower and the upper 16 bits of the word each have
// one code of every pair. INT4 codes lie at bits 0, 4, 8 and 12. E2M1 codes lie where few instructions move
// them to their places in a bfloat16: the first three codes have their magnitude (three bits) from bit 6, 0
// and 3 on, and their sign nine bits above the magnitude's first bit; the last code has its magnitude in bits
// 10, 11 and 13, and its sign in bit 14. RAW: INT4 codes stay larger by 128 or 1024, and by their zero; E2M1 codes
// stay smaller by 2^126 or 2^14.
template <bool RAW = false>
__device__ __forceinline__ void unpack_nibbles(u32 codes, u32 zero, u32 (&pair)[4]) {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
        if constexpr (CODE == INT4) {  // the code becomes the lowest bits of a float of 128 or 1024
            pair[p] = ((codes >> (4 * p)) & 0x000F000Fu) | (BF16 ? 0x43004300u : 0x64006400u);
            if (!RAW) pair[p] = subtract(pair[p], zero);
        } else {  // the bias of the 16-bit float's exponent is larger than E2M1's by 126 or 14
            constexpr u32 SIGN = 0x80008000u, POWER = BF16 ? 0x7E807E80u : 0x74007400u;
            constexpr u32 ONE = 0x00010001u;
            constexpr int TO = BF16 ? 6 : 9;  // the lowest bit of the magnitude
            const int from = p == 0 ? 6 : 3 * (p - 1);
            if (p < 3)
                pair[p] = (shifted(codes, TO - from) & ONE * (7u << TO)) | (shifted(codes, 6 - from) & SIGN);
            else
                pair[p] = (shifted(codes, TO - 10) & ONE * (3u << TO)) | (shifted(codes, TO - 11) & ONE * (4u << TO))
                          | (codes << 1 & SIGN);
            if constexpr (!IS_NVFP4 && !RAW) pair[p] = times(pair[p], POWER);
        }
    }
}

// -- scales and zeros of an output and a unit --------------------------------------------------------

template <int BYTES> struct Few {  // BYTES bytes in registers, loaded together
    u32 word[(BYTES + 3) / 4];

    __device__ __forceinline__ void load(const void* p) {
        if constexpr (BYTES == 1) word[0] = *(const u8*)p;
        else if constexpr (BYTES == 2) word[0] = *(const u16*)p;
        else
#pragma unroll
            for (int i = 0; i < BYTES / 4; ++i) word[i] = ((const u32*)p)[i];
    }
    // Volatile, so that the compiler does not move the load down to its use.
    __device__ __forceinline__ void load_now(const void* p) {
        if constexpr (BYTES == 1) word[0] = *(const volatile u8*)p;
        else if constexpr (BYTES == 2) word[0] = *(const volatile u16*)p;
        else
#pragma unroll
            for (int i = 0; i < BYTES / 4; ++i) word[i] = ((const volatile u32*)p)[i];
    }
    template <int SIZE> __device__ __forceinline__ u32 get(int i) const {
        if constexpr (SIZE == 4) return word[i];
        return (word[i * SIZE / 4] >> (8 * (i * SIZE % 4))) & (SIZE == 1 ? 0xFFu : 0xFFFFu);
    }
};

constexpr int NUM_SCALES = GROUPS ? GROUPS : 1;
// Numbers of an output in a unit, in a scale's type: the scales, the minima if there are any, and, in the
// place of four numbers, the two float16 factors (of the scales and of the minima) if there are any.
constexpr int UNIT_SCALES = NUM_SCALES * (1 + HAS_MINIMA) + 4 * HAS_FACTORS;
typedef Few<UNIT_SCALES * SCALE_BYTES> Scales;
typedef Few<NUM_SCALES> Zeros;

__device__ __forceinline__ float scale_at(const Scales& scales, int index) {
    u32 bits = scales.get<SCALE_BYTES>(index);
    if constexpr (SCALE == FLOAT32) return __uint_as_float(bits);
    if constexpr (SCALE == BFLOAT16) return __uint_as_float(bits << 16);
    if constexpr (SCALE == E8M0) return __uint_as_float(bits << 23);
    if constexpr (SCALE == E4M3) return __uint_as_float((bits & 0x7Fu) << 20) * E4M3_POWER;
    if constexpr (SCALE == INTEGER8) return (float)(signed char)bits;
    return half_to_float(bits);
}

__device__ __forceinline__ float scale_of(const Scales& scales, int group) {
    if constexpr (!HAS_FACTORS) return scale_at(scales, group);
    return scale_at(scales, group) * half_to_float(scales.get<2>(UNIT_SCALES / 2 - 2));  // exact
}

__device__ __forceinline__ float minimum_of(const Scales& scales, int group) {
    if constexpr (!HAS_FACTORS) return scale_at(scales, NUM_SCALES + group);
    return scale_at(scales, NUM_SCALES + group) * half_to_float(scales.get<2>(UNIT_SCALES / 2 - 1));
}

// Two weights, rounded once for int8; E2M1 codes times a scale of E4M3 are exact.
__device__ __forceinline__ u32 scaled(u32 pair, float scale) {
    if constexpr (CODE == INT8) return pair_of(to_float(pair & 0xFFFFu) * scale, to_float(pair >> 16) * scale);
    return times(pair, pair_of(scale, scale));
}

// The zero that unpacking subtracts, as a pair of equal floats; for INT4 with the offset (128 or 1024).
__device__ __forceinline__ u32 zero_of(const Zeros& zeros, int group) {
    u32 byte = zeros.get<1>(group);
    if constexpr (CODE == INT4) return (BF16 ? 0x43004300u : 0x64006400u) + byte * 0x00010001u;
    float f = (float)(signed char)byte;
    return pair_of(f, f);
}

// A record has the codes of 16 outputs in a unit [2 halves, 8 outputs, 4 lanes, 16 bytes], with INT6 the
// codes' upper bits [2 halves, 8 outputs, 4 lanes, 8 bytes], then the outputs' scales [8, 2 halves,
// UNIT_SCALES], and their zeros [8, 2 halves, NUM_SCALES] if there are any.
constexpr int CODE_RECORD = 16 * (UNIT_BYTES + UPPER_BYTES);
constexpr int SCALE_RECORD = GROUPS ? 16 * UNIT_SCALES * SCALE_BYTES : 0;
constexpr int RECORD = CODE_RECORD + SCALE_RECORD + (HAS_ZEROS ? 16 * NUM_SCALES : 0);
