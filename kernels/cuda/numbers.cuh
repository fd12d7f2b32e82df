// Numbers of 16 bits, and words of loaded bytes.
//
// Defined before: BF16 (16-bit numbers are bfloat16, otherwise float16), u16, u32 and uint4.

#pragma once

__device__ __forceinline__ float to_float(u16 v) {
#if BF16
    return __uint_as_float((u32)v << 16);
#else
    return half_to_float(v);
#endif
}

__device__ __forceinline__ u32 word_of(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}
