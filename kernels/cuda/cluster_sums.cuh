// Sums of products whose inputs the blocks of a cluster share.
//
// Defined before: what cluster.cuh defines, and `address`.

#pragma once

// Four sums, added over the blocks of the cluster in a fixed order.
__device__ __forceinline__ float4 sums_of_cluster(const float* sums, int splits) {
    if (splits == 1) return *(const float4*)sums;
    float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int rank = 0; rank < splits; ++rank) {
        const float4 part = load_of_rank(rank, address(sums));
        total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
    }
    return total;
}
