// Clusters of thread blocks, on compute capability 9.0.
//
// Defined before: u32.

#pragma once

// Blocks of a cluster run at the same time and can read each other's shared memory.
__device__ __forceinline__ int cluster_size() {
    int size;
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
    return size;
}
__device__ __forceinline__ int rank_in_cluster() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void meet_cluster() {  // all threads of the cluster that have not ended
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ float4 load_of_rank(int rank, u32 at) {
    float4 x;
    asm volatile("{.reg .b32 a; mapa.shared::cluster.u32 a, %4, %5;"
                 "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [a];}"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(at), "r"(rank) : "memory");
    return x;
}
