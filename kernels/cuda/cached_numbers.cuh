// Numbers of the KV cache: 16 bits, or E4M3 codes; and the products of attention with them.
//
// Codes become float16 in registers, exactly and in one instruction for two, while bfloat16 would take four. The other
// factor becomes float16, too, which holds a number of bfloat16 from 2^-17 to 2^16 exactly. Weights are from 2^-16 to 2^15
// (see split_attention.cuh). Queries are multiplied by a power of two that brings the largest of a head just below 2^15,
// so that only numbers below 2^-31 of the largest lose digits. Otherwise products are those of bfloat16, to the bit.
//
// Defined before: FP8_CACHE (0 or 1), BF16, and what ptx.cuh and numbers.cuh define.

#pragma once

#include "e4m3.cuh"

constexpr bool BECOMES_HALVES = FP8_CACHE && BF16;

#if FP8_CACHE
typedef u8 Cached;
struct alignas(8) Eight {  // consecutive numbers
    u32 low = 0, high = 0;
};

__device__ __forceinline__ Eight load_eight(const u8* p) {
    const uint2 words = load_once_8(p);
    Eight found;
    found.low = words.x, found.high = words.y;
    return found;
}
__device__ __forceinline__ uint4 pairs_of(const Eight& x) {
    uint4 found;
    widen_to_halves(x.low, found.x, found.y), widen_to_halves(x.high, found.z, found.w);
    return found;
}
// Pairs of the numbers 2 i of two times eight, and of the numbers 2 i + 1.
__device__ __forceinline__ void pairs_across(const Eight& even, const Eight& odd, int i, u32& first, u32& second) {
    const u32 a = i < 2 ? even.low : even.high, b = i < 2 ? odd.low : odd.high;
    widen_to_halves(__byte_perm(a, b, i % 2 ? 0x7362 : 0x5140), first, second);
}
__device__ __forceinline__ void multiply_cached(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    multiply_halves(sum, a, b0, b1);
}
#else
typedef u16 Cached;
typedef uint4 Eight;

__device__ __forceinline__ uint4 load_eight(const u16* p) { return load_once((const u8*)p); }
__device__ __forceinline__ const uint4& pairs_of(const uint4& x) { return x; }
__device__ __forceinline__ void pairs_across(const uint4& even, const uint4& odd, int i, u32& first, u32& second) {
    const u32 a = word_of(even, i), b = word_of(odd, i);
    first = __byte_perm(a, b, 0x5410), second = __byte_perm(a, b, 0x7632);
}
__device__ __forceinline__ void multiply_cached(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    multiply(sum, a, b0, b1);
}
#endif

// The other factor's pair, of bfloat16, times a power of two.
__device__ __forceinline__ u32 as_halves(u32 pair, float factor) {
    return half_pair_of(to_float((u16)pair) * factor, to_float((u16)(pair >> 16)) * factor);
}
