// Copies of boxes of a tensor to shared memory by the tensor memory accelerator, on compute capability 9.0.
//
// Defined before: u32 and u64.

#pragma once

struct alignas(64) TensorMap { u64 words[16]; };

// Copy a box of a tensor with TMA; `barrier` counts the bytes. Elements outside the tensor become zeros.
__device__ __forceinline__ void copy_box(
    u32 to, const TensorMap* map, u32 barrier, int x0, int x1, int x2, int x3, int x4) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %3, %4, %5, %6}], [%7];"
                 ::"r"(to), "l"(map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(barrier) : "memory");
}
