// Products and the softmax of a warpgroup's query rows.

#pragma once

__device__ __forceinline__ void multiply_keys(float (&scores)[KEYS / 2], u32 query, u32 keys) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (64 * part + 16 * k < HEAD_DIM)
                multiply(scores, matrix(query + part * QUERY_PART + 32 * k, 16),
                         matrix(keys + part * PART_BYTES + 32 * k, 16), part + k > 0);
}

__device__ __forceinline__ void multiply_values(
    float (&sums)[OUT_PARTS][OUT_COLUMNS / 2], const u32 (&weights)[KEYS / 4], u32 values) {
#pragma unroll
    for (int k = 0; k < KEYS / 16; ++k)
#pragma unroll
        for (int part = 0; part < OUT_PARTS; ++part)
            multiply(sums[part], weights + 4 * k,
                     matrix(values + part * (OUT_COLUMNS / 64) * PART_BYTES + 2048 * k, PART_BYTES));
}

__device__ __forceinline__ float over_quad(float x, bool is_max) {
#pragma unroll
    for (int lanes = 1; lanes <= 2; lanes *= 2) {
        const float other = __shfl_xor_sync(~0u, x, lanes);
        x = is_max ? fmaxf(x, other) : x + other;
    }
    return x;
}

// -- the softmax of a thread's two query rows ----------------------------------------------------------

__device__ __forceinline__ float sink_of(const void* sinks, int head) {
#if SINK_BYTES == 4
    return ((const float*)sinks)[head];
#else
    return unpack(((const u16*)sinks)[head]);
#endif
}

struct Softmax {
    float best[2], total[2];  // highest logit, in base 2; sum of weights over this thread's columns only
    int position[2];          // position of the query in its request
    float to_base_2, cap_rate;

    // first_row: the first of the thread's query rows of the program; the second is 8 further.
    __device__ __forceinline__ Softmax(
        const Work& work, int first_row, const void* sinks, float scale, float soft_cap)
        : to_base_2((HAS_SOFT_CAP ? soft_cap : scale) * LOG2_E),
          cap_rate(HAS_SOFT_CAP ? scale * 2 * LOG2_E / soft_cap : 0.f) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + 8 * half;
            position[half] = work.context + work.first_query + row / GROUP;
            const bool has_sink = SINK_BYTES && row < TOKENS * GROUP && work.part == 0;
            best[half] = has_sink ? sink_of(sinks, work.kv_head * GROUP + row % GROUP) * LOG2_E : -INFINITE;
            total[half] = has_sink && threadIdx.x % 4 == 0;
        }
    }
    // One step of online softmax: replaces `scores` by weights. decay: the factors of earlier sums.
    __device__ __forceinline__ void step(
        float (&scores)[KEYS / 2], float (&decay)[2], bool is_masked, int first_key, int window) {
#if HAS_SOFT_CAP
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i)  // tanh
            scores[i] = 1.f - __fdividef(2.f, 1.f + exp2(scores[i] * cap_rate));
#endif
        if (is_masked) {
#pragma unroll
            for (int i = 0; i < KEYS / 2; ++i) {
                const int key = first_key + 8 * (i / 4) + i % 2, at = position[i / 2 % 2];
                if (key > at || (HAS_WINDOW && key <= at - window)) scores[i] = -INFINITE;
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float highest = scores[2 * half];
#pragma unroll
            for (int i = 0; i < KEYS / 2; ++i)
                if (i / 2 % 2 == half) highest = fmaxf(highest, scores[i]);
            const float higher = fmaxf(best[half], over_quad(highest, true) * to_base_2);
            const float shift = higher == -INFINITE ? 0.f : higher;  // no key seen so far
            decay[half] = exp2(best[half] - shift);
            best[half] = higher;
            float sum = 0.f;
#pragma unroll
            for (int i = 0; i < KEYS / 2; ++i)
                if (i / 2 % 2 == half) sum += scores[i] = exp2(scores[i] * to_base_2 - shift);
            total[half] = total[half] * decay[half] + sum;
        }
    }
};

// Zeroes the values after the end of the context, which may be NaN: a weight of 0 times NaN is NaN.
__device__ __forceinline__ void clear_values(u32 values, int first_row) {
    for (int i = first_row * 8 + threadIdx.x - 128; i < KEYS * 8; i += 256)
        for (int part = 0; part < PARTS; ++part)
            store_16_bytes(values + part * PART_BYTES + i * 16, make_uint4(0, 0, 0, 0));
    publish_to_tensor_cores();
    meet(3, 256);
}
