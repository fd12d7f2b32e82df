// Sums a matrix [rows, width] over the ranks of a tensor-parallel model (all-reduce), adds the residual, and
// normalises the rows (RMSNorm). Every rank runs the kernel with the same number of blocks, and gets the same
// bits, because all ranks add in the order of ranks.
//
// Every rank has an inbox in its memory. A block stores its rows in the inboxes of all other ranks, and waits
// until the others' rows have arrived in its own inbox. There is no signal: words that have not arrived are
// EMPTY, a value that no row contains. An inbox has two buffers, each with a place for the rows of every rank
// and every block (the block's channel). Successive sums of a channel use the buffers in turn; `rounds` counts
// the sums of each channel. The reader of a row makes its place EMPTY again.
//
// Before a rank stores the rows of sum n, the readers have emptied the places of sum n - 2, which used the same
// buffer: the rank has received the readers' rows of sum n - 1, and the readers stored these after their kernel
// of sum n - 2 had ended.
//
// The blocks of all ranks must run at the same time. Each stores some rows ahead of the row that it waits for.
// `gather_over_ranks` puts rows of all ranks side by side in the same way.
//
// Macros: BF16; RANKS; PER_THREAD, vectors of 8 numbers per thread and row; NORM, what the kernel does:
#define SUM 0           // sum = the sum of all parts
#define NORMALIZE 1     // sum = residual + the sum of all parts, normed = weight * norm(sum)
#define NORMALIZE_ONE 2 // the same with (1 + weight) * norm(sum), rounded once

#include "ptx.cuh"

#define EMPTY 0x80008000u  // a pair of negative zeros, in both 16-bit types
#define TRIES 2048         // polls between two loads of `is_over`, which lies in the host's memory
#define AHEAD 4            // rows that a block stores before it waits for the first

struct Inboxes {
    u8* of[RANKS];
};

__device__ __forceinline__ float low_of(u32 pair) {
#if BF16
    return __uint_as_float(pair << 16);
#else
    return half_to_float(pair & 0xFFFFu);
#endif
}
__device__ __forceinline__ float high_of(u32 pair) {
#if BF16
    return __uint_as_float(pair & 0xFFFF0000u);
#else
    return half_to_float(pair >> 16);
#endif
}

__device__ __forceinline__ void add(float (&sum)[8], const uint4& v) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[2 * i] += low_of(words[i]), sum[2 * i + 1] += high_of(words[i]);
}

__device__ __forceinline__ uint4 packed(const float (&x)[8]) {
    return make_uint4(pair_of(x[0], x[1]), pair_of(x[2], x[3]), pair_of(x[4], x[5]), pair_of(x[6], x[7]));
}

// The vector with each EMPTY word replaced by zeros. Ranks send and add vectors in this form.
__device__ __forceinline__ uint4 sendable(uint4 v) {
    if (v.x == EMPTY) v.x = 0;
    if (v.y == EMPTY) v.y = 0;
    if (v.z == EMPTY) v.z = 0;
    if (v.w == EMPTY) v.w = 0;
    return v;
}

__device__ __forceinline__ bool has_arrived(const uint4& v) {
    return v.x != EMPTY && v.y != EMPTY && v.z != EMPTY && v.w != EMPTY;
}

__device__ __forceinline__ float sum_of_block(float x) {
    __shared__ float of_warps[32];
    x = sum_of_warp(x);
    __syncthreads();  // all threads have read `of_warps` of the previous row
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.f;
    for (int warp = 0; warp < blockDim.x / 32; ++warp) sum += of_warps[warp];
    return sum;
}

// Collect one vector of every rank: this rank's own, and the others' from the inbox, where the vector of rank r
// lies at place + r * buffer_bytes. Empties the inbox's places.
__device__ __forceinline__ void collect(
    uint4 (&parts)[RANKS], const uint4& own, u8* place, int buffer_bytes, int rank, const u32* is_over) {
    for (u32 tries = 1;; ++tries) {
        bool is_whole = true;
#pragma unroll
        for (int other = 0; other < RANKS; ++other)
            parts[other] = other == rank ? own : received(place + (long long)other * buffer_bytes);
#pragma unroll
        for (int other = 0; other < RANKS; ++other) is_whole &= has_arrived(parts[other]);
        if (is_whole || (tries % TRIES == 0 && now(is_over))) break;
    }
#pragma unroll
    for (int other = 0; other < RANKS; ++other)
        if (other != rank)
            send(place + (long long)other * buffer_bytes, make_uint4(EMPTY, EMPTY, EMPTY, EMPTY));
}

// Store this rank's vector at `place` of its own buffer in the inboxes of all other ranks.
__device__ __forceinline__ void send_to_others(const Inboxes& inboxes, long long place, int rank, const uint4& own) {
#pragma unroll
    for (int other = 0; other < RANKS; ++other)
        if (other != rank) send(inboxes.of[other] + place, own);
}

// The number of this channel's sums so far. To be called after all earlier kernels have ended.
__device__ __forceinline__ u32 begin_round(const u32* rounds) { return RANKS > 1 ? rounds[blockIdx.x] : 0; }
__device__ __forceinline__ void end_round(u32* rounds, u32 round) {
    if (RANKS == 1) return;
    __syncthreads();  // all threads have read the round
    if (threadIdx.x == 0) rounds[blockIdx.x] = round + 1;
}

// Where a block's rows begin in the buffer of this round.
__device__ __forceinline__ long long buffer_of(u32 round, int buffer_bytes, int channel_bytes) {
    return (long long)(round & 1) * RANKS * buffer_bytes + (long long)blockIdx.x * channel_bytes;
}

// weight * x / rms(x): x / rms(x) is rounded to 16 bits before and after the product, or only after it.
__device__ __forceinline__ uint4 normalized(const float (&x)[8], float scale, const uint4& weight) {
    float w[8] = {}, y[8];
    add(w, weight);
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] = NORM == NORMALIZE_ONE ? x[i] * scale * (1.f + w[i]) : x[i] * scale;
    uint4 result = packed(y);
    if (NORM == NORMALIZE_ONE) return result;
    float rounded[8] = {};
    add(rounded, result);
#pragma unroll
    for (int i = 0; i < 8; ++i) rounded[i] *= w[i];
    return packed(rounded);
}

// part, residual, sum, normed: [rows, width] in 16 bits; weight [width]. inboxes: of all ranks; inbox: this
// rank's. buffer_bytes: size of a rank's place in a buffer; channel_bytes: size of a block's place within that.
// rounds: one counter per block. is_over: if not 0, blocks no longer wait, as another rank has ended. rank is an
// argument and not a macro, so that all ranks run the same instructions and round alike.
extern "C" __global__ void __launch_bounds__(1024, 1) sum_over_ranks(
    const u8* part, const u8* residual, u8* sum, u8* normed, const u8* weight, Inboxes inboxes, u8* inbox,
    u32* rounds, const u32* is_over, int buffer_bytes, int channel_bytes, int rank, int rows, int width, float eps) {
    const int row_bytes = 2 * width, first = 16 * threadIdx.x, stride = 16 * blockDim.x;
    uint4 weights[PER_THREAD];
    if (NORM != SUM)
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i)
            if (first + i * stride < row_bytes) weights[i] = *(const uint4*)(weight + first + i * stride);
    wait_for_predecessor();
    release_successor();

    const u32 round = begin_round(rounds);
    const long long buffer = buffer_of(round, buffer_bytes, channel_bytes);
    const auto send_row = [&](int turn) {
        const int row = blockIdx.x + turn * gridDim.x;
        if (RANKS == 1 || row >= rows) return;
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i) {
            const int at = first + i * stride;
            if (at >= row_bytes) continue;
            const uint4 own = sendable(*(const uint4*)(part + (long long)row * row_bytes + at));
            send_to_others(inboxes, buffer + (long long)rank * buffer_bytes + turn * row_bytes + at, rank, own);
        }
    };

    for (int turn = 0; turn < AHEAD; ++turn) send_row(turn);
    for (int row = blockIdx.x, turn = 0; row < rows; row += gridDim.x, ++turn) {
        send_row(turn + AHEAD);
        float x[PER_THREAD][8], squares = 0.f;
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i) {
            const int at = first + i * stride;
            if (at >= row_bytes) continue;
            const long long number = (long long)row * row_bytes + at;
            uint4 parts[RANKS], before = make_uint4(0, 0, 0, 0);
            const uint4 own = sendable(*(const uint4*)(part + number));
            if (NORM != SUM) before = *(const uint4*)(residual + number);
            collect(parts, own, inbox + buffer + turn * row_bytes + at, buffer_bytes, rank, is_over);
#pragma unroll
            for (int k = 0; k < 8; ++k) x[i][k] = 0.f;
#pragma unroll
            for (int other = 0; other < RANKS; ++other) add(x[i], parts[other]);
            if (NORM != SUM) add(x[i], before);
            const uint4 total = packed(x[i]);
            *(uint4*)(sum + number) = total;
#pragma unroll
            for (int k = 0; k < 8; ++k) x[i][k] = 0.f;
            add(x[i], total);
#pragma unroll
            for (int k = 0; k < 8; ++k) squares += x[i][k] * x[i][k];
        }
        if (NORM == SUM) continue;
        const float scale = rsqrtf(sum_of_block(squares) / width + eps);
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i) {
            const int at = first + i * stride;
            if (at < row_bytes)
                *(uint4*)(normed + (long long)row * row_bytes + at) = normalized(x[i], scale, weights[i]);
        }
    }
    end_round(rounds, round);
}

// out [rows, RANKS * row_bytes] = part [rows, row_bytes] of all ranks side by side; share_bytes: of a block's
// share of part. The other arguments are those of `sum_over_ranks`. Sizes are multiples of 16 bytes.
extern "C" __global__ void __launch_bounds__(1024, 1) gather_over_ranks(
    const u8* part, u8* out, Inboxes inboxes, u8* inbox, u32* rounds, const u32* is_over, int buffer_bytes,
    int channel_bytes, int rank, int num_bytes, int row_bytes, int share_bytes) {
    wait_for_predecessor();
    release_successor();
    const u32 round = begin_round(rounds);
    const long long buffer = buffer_of(round, buffer_bytes, channel_bytes);
    const int start = blockIdx.x * share_bytes, end = min(start + share_bytes, num_bytes);
    for (int at = start + 16 * threadIdx.x; at < end; at += 16 * blockDim.x) {
        const uint4 own = sendable(*(const uint4*)(part + at));
        send_to_others(inboxes, buffer + (long long)rank * buffer_bytes + at - start, rank, own);
    }
    for (int at = start + 16 * threadIdx.x; at < end; at += 16 * blockDim.x) {
        uint4 parts[RANKS];
        const uint4 own = sendable(*(const uint4*)(part + at));
        collect(parts, own, inbox + buffer + at - start, buffer_bytes, rank, is_over);
        u8* const to = out + (long long)(at / row_bytes) * RANKS * row_bytes + at % row_bytes;
#pragma unroll
        for (int other = 0; other < RANKS; ++other) *(uint4*)(to + (long long)other * row_bytes) = parts[other];
    }
    end_round(rounds, round);
}
