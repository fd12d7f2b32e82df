// E4M3 codes and 16-bit floats.
//
// Defined before: BF16, u8, u16, u32, and `pair_of`, which makes a pair of 16-bit floats of two floats.

#pragma once

// Four codes -> two pairs of float16, exact. A NaN stays NaN.
__device__ __forceinline__ void widen_to_halves(u32 codes, u32& first, u32& second) {
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b;}"
        : "=r"(first), "=r"(second) : "r"(codes));
}

// Four codes -> two pairs, exact. A NaN stays NaN.
__device__ __forceinline__ void widen(u32 codes, u32& first, u32& second) {
    widen_to_halves(codes, first, second);
#if BF16
    float x[4];
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(x[0]), "=f"(x[1]) : "r"(first));
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(x[2]), "=f"(x[3]) : "r"(second));
    first = pair_of(x[0], x[1]), second = pair_of(x[2], x[3]);
#endif
}

// The nearest code; numbers beyond 448 become 448. A NaN stays NaN.
__device__ __forceinline__ u8 e4m3_of(float x) {
    u16 d;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(0.f), "f"(x));
    return (u8)d;
}
