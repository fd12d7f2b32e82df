// Replaces e4m3.cuh to run kernels on a CPU.
#pragma once

inline float number_of_e4m3(u32 code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    if ((code & 0x7F) == 0x7F) return NAN;
    const float size = std::ldexp(exponent ? 8 + mantissa : mantissa, std::max(exponent, 1) - 10);
    return code & 0x80 ? -size : size;
}
inline void widen(u32 codes, u32& first, u32& second) {
    auto number = [&](int i) { return number_of_e4m3(codes >> 8 * i & 0xFF); };
    first = pair_of(number(0), number(1)), second = pair_of(number(2), number(3));
}
inline void widen_to_halves(u32 codes, u32& first, u32& second) {
    auto half = [&](int i) -> u32 {
        const float number = number_of_e4m3(codes >> 8 * i & 0xFF);
        const u32 sign = std::signbit(number) ? 0x8000 : 0;
        if (std::isnan(number)) return 0x7FFF;
        if (number == 0.f) return sign;
        int exponent;
        const float digits = std::frexp(std::fabs(number), &exponent);  // all numbers are normal halves
        return sign | (exponent + 14) << 10 | (u32)(digits * 2048.f - 1024.f);
    };
    first = half(0) | half(1) << 16, second = half(2) | half(3) << 16;
}
inline u8 e4m3_of(float x) {
    if (std::isnan(x)) return 0x7F;
    const float size = std::min(std::fabs(x), 448.f);
    const int exponent = size < 0x1p-6f ? -5 : std::ilogb(size) + 1;  // of the number above; -5 for the smallest
    const float step = std::ldexp(1.f, exponent - 4);
    const int steps = (int)std::nearbyint(size / step);  // ties to even; 16 steps are the next exponent's 8
    const int code = (exponent + 5) * 8 + steps;
    return (u8)(std::min(code, 0x7E) | (std::signbit(x) ? 0x80 : 0));
}
