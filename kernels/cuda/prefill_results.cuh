// How results of prompts' attention leave a block, alone or merged with those of the blocks that share the keys.

#pragma once

__device__ __forceinline__ bool has_token(const Work& work, int row) {
    return row < TOKENS * GROUP && work.first_query + row / GROUP < work.count;
}

__device__ __forceinline__ u16* place_of(u16* out, const Work& work, int row) {
    const i64 token = work.start + work.first_query + row / GROUP;
    return out + (token * NUM_HEADS + work.kv_head * GROUP + row % GROUP) * HEAD_DIM;
}

// The address of 16 bytes of a query row. Pieces are swizzled as TMA does.
__device__ __forceinline__ u32 piece_at(u32 queries, int row, int piece) {
    return queries + piece / 8 * QUERY_PART + row * 128 + ((piece % 8) ^ (row % 8)) * 16;
}

// The address of a sum in shared memory. Columns are swizzled, so that rows begin in different banks.
__device__ __forceinline__ u32 sums_at(u32 at, int row, int column) {
    return at + (row * COLUMNS + (column ^ row % 8 * 8)) * 4;
}

// Merges the sums of the blocks that share the keys. Each block merges and writes some of the rows.
__device__ __forceinline__ void merge(
    const Work& work, const float (&sums)[OUT_PARTS][OUT_COLUMNS / 2], const Softmax& softmax, u16* out, int first_row,
    u32 queries, u32 tiles) {
    const int lane = threadIdx.x % 32, thread = threadIdx.x - 128;
    meet(3, 256);  // both warpgroups' products have finished reading shared memory
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first_row + 8 * half;
        if (lane % 4 == 0) store_8_bytes(queries + 16 * row, softmax.best[half], softmax.total[half]);
#pragma unroll
        for (int part = 0; part < OUT_PARTS; ++part)
#pragma unroll
            for (int j = 0; j < OUT_COLUMNS / 8; ++j) {
                const float* x = &sums[part][4 * j + 2 * half];
                store_8_bytes(sums_at(tiles, row, part * OUT_COLUMNS + 8 * j + lane % 4 * 2), x[0], x[1]);
            }
    }
    meet_cluster();
    const int first_rank = rank_in_cluster() - work.part;  // of the blocks that share the keys
    const int begin = ROWS * work.part / work.parts, end = ROWS * (work.part + 1) / work.parts;
    for (int i = begin * (COLUMNS / 4) + thread; i < end * (COLUMNS / 4); i += 256) {
        const int row = i / (COLUMNS / 4), column = i % (COLUMNS / 4) * 4;
        float best = -INFINITE, total = 0.f;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int part = 0; part < work.parts; ++part) {
            const float4 its = load_of_rank(first_rank + part, queries + 16 * row);  // best, total
            const float4 x = load_of_rank(first_rank + part, sums_at(tiles, row, column));
            const float higher = fmaxf(best, its.x), shift = higher == -INFINITE ? 0.f : higher;
            const float old = exp2(best - shift), its_share = exp2(its.x - shift);
            best = higher;
            total = total * old + its.y * its_share;
            sum.x = sum.x * old + x.x * its_share, sum.y = sum.y * old + x.y * its_share;
            sum.z = sum.z * old + x.z * its_share, sum.w = sum.w * old + x.w * its_share;
        }
        if (has_token(work, row) && column < HEAD_DIM)
            *(uint2*)(place_of(out, work, row) + column) =
                make_uint2(pair_of(sum.x / total, sum.y / total), pair_of(sum.z / total, sum.w / total));
    }
    meet_cluster();  // until the other blocks have read this block's sums
}

// Writes a warpgroup's results to `out`. The results pass through the queries' place in shared memory, so that
// each thread writes 16 bytes at a time.
__device__ __forceinline__ void write(
    const Work& work, const float (&sums)[OUT_PARTS][OUT_COLUMNS / 2], const float (&total)[2], u16* out, int first_row,
    u32 queries) {
    const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
    meet(4 + group, 128);  // the warpgroup's products have finished reading the queries
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float factor = 1.f / total[half];
#pragma unroll
        for (int part = 0; part < OUT_PARTS; ++part)
#pragma unroll
            for (int j = 0; j < OUT_COLUMNS / 8; ++j) {
                const float* x = &sums[part][4 * j + 2 * half];
                store_4_bytes(piece_at(queries, first_row + 8 * half, part * (OUT_COLUMNS / 8) + j) + lane % 4 * 4,
                              pair_of(x[0] * factor, x[1] * factor));
            }
    }
    meet(4 + group, 128);
#pragma unroll 4
    for (int i = threadIdx.x % 128; i < 64 * PIECES_OF_16_BYTES; i += 128) {
        const int row = 64 * group + i / PIECES_OF_16_BYTES, piece = i % PIECES_OF_16_BYTES;
        if (has_token(work, row) && 8 * piece < HEAD_DIM)
            *(uint4*)(place_of(out, work, row) + 8 * piece) = load_16_bytes(piece_at(queries, row, piece));
    }
    publish_to_tensor_cores();  // so that TMA's next copy comes after the stores to shared memory
}
