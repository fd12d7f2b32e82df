// Numbers of the KV cache: 16 bits, or E4M3 codes, which become exact numbers of 16 bits in registers.
//
// Defined before: FP8_CACHE (0 or 1), BF16, and what ptx.cuh and numbers.cuh define.

#pragma once

#include "e4m3.cuh"

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
    widen(x.low, found.x, found.y), widen(x.high, found.z, found.w);
    return found;
}
// Pairs of the numbers 2 i of two times eight, and of the numbers 2 i + 1.
__device__ __forceinline__ void pairs_across(const Eight& even, const Eight& odd, int i, u32& first, u32& second) {
    const u32 a = i < 2 ? even.low : even.high, b = i < 2 ? odd.low : odd.high;
    widen(__byte_perm(a, b, i % 2 ? 0x7362 : 0x5140), first, second);
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
#endif
