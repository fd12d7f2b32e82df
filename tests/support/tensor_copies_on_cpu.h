// Replaces tensor_copies.cuh, for kernels that run on a CPU with cuda_on_cpu.h.

#pragma once

struct TensorMap { u64 words[16]; };  // address, 5 sizes, 4 strides in bytes, 3 sizes of a box

inline void copy_box(u32 to, const TensorMap* map, u32 barrier, int x0, int x1, int, int, int) {
    const TensorMap copy = *map;  // the kernel's argument may be gone when the copy is made
    u8* const memory = dynamic_memory;
    u64* const arrived = (u64*)(memory + barrier);
    copy_later(arrived, [=] {
        const u64* const w = copy.words;
        const u64 size = 128 / w[10];  // bytes of an element: a row of the box has 128
        for (u64 row = 0; row < w[11]; ++row)
            for (u64 byte = 0; byte < 128; ++byte) {
                const bool inside = x0 + byte / size < w[1] && x1 + row < w[2];
                const u32 at = to + row * 128 + byte;
                memory[at ^ (at >> 7 & 7) << 4] = inside ? ((const u8*)w[0])[(x1 + row) * w[6] + x0 * size + byte] : 0;
            }
    });
}
inline void expect_bytes(u64*, u32) {}  // the copy arrives
