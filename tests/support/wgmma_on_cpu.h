// Replaces wgmma.cuh, for kernels that run on a CPU with cuda_on_cpu.h. Products are made when they are begun.

#pragma once

inline void begin_products() {}
inline void commit_products() {}
template <int PENDING> void wait_products() {}
template <class T> void settle(T&) {}

// Addresses count from the block's dynamic shared memory.
inline u32 address(const void* p) { return u32((const u8*)p - dynamic_memory); }
inline u64 matrix(u32 at, u32, u32 pitch = 1024) { return at | u64(pitch) << 32; }
inline float element(u32 at) { return value_of(*(const u16*)(dynamic_memory + (at ^ (at >> 7 & 7) << 4))); }

template <int N> void multiply_rows(float (&sum)[N], const u32 (&a)[4], u64 b) {
    const unsigned self = me, first = self / 4 * 4, lane = self % 4;
    std::copy(a, a + 4, operands[self].a);
    __syncwarp();
    for (int i = 0; i < N; ++i) {
        const int half = i / 2 % 2, column = i / 4 * 8 + 2 * lane + i % 2;
        double total = sum[i];
        for (int k = 0; k < 16; ++k) {
            const u32 pair = operands[first + k % 8 / 2].a[2 * (k / 8) + half];
            total += (double)(k % 2 ? high(pair) : low(pair)) * element(u32(b) + column / 8 * u32(b >> 32) + column % 8 * 128 + 2 * k);
        }
        sum[i] = (float)total;
    }
    __syncwarp();
}

template <int N> void multiply_shared(float (&sum)[N], u64 a, u64 b) {
    auto place = [](u64 m, int row, int column) {
        return element(u32(m) + row / 8 * u32(m >> 32) + row % 8 * 128 + 2 * column);
    };
    const unsigned warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    for (int i = 0; i < N; ++i) {
        const int row = 16 * warp + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
        double total = sum[i];
        for (int k = 0; k < 16; ++k) total += (double)place(a, row, k) * place(b, column, k);
        sum[i] = (float)total;
    }
}
