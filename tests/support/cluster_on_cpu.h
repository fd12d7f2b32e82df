// Replaces cluster.cuh, for kernels that run on a CPU with cuda_on_cpu.h. The blocks that run at once are a cluster.

#pragma once

inline int cluster_size() { return threads.size() / blockDim.x; }
inline int rank_in_cluster() { return me / blockDim.x; }
inline void meet_cluster() {
    static Barrier all;
    const unsigned round = all.round;
    ++all.arrived;
    wait_until([&] {
        const auto alive = std::count_if(threads.begin(), threads.end(), [](const Thread& t) { return t.is_alive(); });
        if (all.round == round && all.arrived == alive) all.arrived = 0, ++all.round;
        return all.round != round;
    });
}
inline float4 load_of_rank(int rank, u32 at) { return *(const float4*)(memory_of_blocks + rank * memory_size + at); }
