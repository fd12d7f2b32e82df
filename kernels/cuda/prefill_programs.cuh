// The programs of a step of prompts' attention, and which of them a block computes. prefill_attention.cu explains the
// macros.

#pragma once

struct Work {  // a program, as one block computes it
    int row, start, count;       // of the request: batch row, its first token in the step, number of tokens
    int length, context;         // of the request: with and without the step's tokens
    int kv_head, first_query;    // of the program, counted in the request's tokens of the step
    int first_key, end;          // range of the keys that any query of the program sees
    int part, parts;             // this block's index among the blocks that share the keys, and the number of
                                 // these blocks; parts = 0: no program is left
    int first_tile, last_tile;   // the tiles of this part, the last one included
};

// A piece is up to TOKENS query tokens of one request. Pieces are numbered through all requests that have
// several tokens in the step; the decode kernel computes requests with one token. All lanes of a warp must
// call these functions together.
__device__ __forceinline__ int pieces_of(const int* query_start_loc, int num_rows, int row) {
    const int count = row < num_rows ? query_start_loc[row + 1] - query_start_loc[row] : 0;
    return count > 1 ? (count + TOKENS - 1) / TOKENS : 0;
}

__device__ __forceinline__ int count_pieces(const int* query_start_loc, int num_rows) {
    const int lane = threadIdx.x % 32, tokens = query_start_loc[num_rows];
    int pieces = 0;  // of this lane's rows
    // Rows without tokens come last, and most rows of a captured step have none.
    for (int first = 0; first < num_rows && query_start_loc[first] < tokens; first += 128)
#pragma unroll
        for (int row = first; row < first + 128; row += 32) pieces += pieces_of(query_start_loc, num_rows, row + lane);
    return sum_of_warp(pieces);
}

// Finds the request of a piece, and the piece's first query.
__device__ __forceinline__ void find_piece(Work& work, int piece, const int* query_start_loc, int num_rows) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int first = 0;; first += 32) {
        const int mine = pieces_of(query_start_loc, num_rows, first + lane);
        int end = mine;  // becomes the number of pieces of this lane's row and the lanes below
#pragma unroll
        for (int lanes = 1; lanes < 32; lanes *= 2) {
            const int below = __shfl_up_sync(~0u, end, lanes);
            if (lane >= lanes) end += below;
        }
        const int rows = __popc(__ballot_sync(~0u, end <= piece));  // whose pieces all come before this piece
        piece -= sum_of_warp(lane < rows ? mine : 0);
        if (rows == 32 && first + 32 < num_rows) continue;
        work.row = min(first + rows, num_rows - 1), work.first_query = piece * TOKENS;
        break;
    }
    work.start = query_start_loc[work.row];
    work.count = query_start_loc[work.row + 1] - work.start;
}

// The programs of a step, one for each piece and KV head, and how blocks share them. Programs are taken from
// the last to the first, as the last pieces of a request see the most keys. Program n is n steps from the end.
struct Programs {
    int pieces, parts;  // pieces in the step; number of blocks that share the keys of a program

    __device__ __forceinline__ int count() const { return pieces * NUM_KV_HEADS; }
    __device__ __forceinline__ int first() const { return (int)blockIdx.x / parts; }

    // The program after a block's first one. counter: 0 before and after the kernel. All lanes of a warp call this.
    __device__ __forceinline__ int next(int* counter) const {
        if (parts > 1) return count();  // all programs run at once
        int taken = 0;
        if (threadIdx.x % 32 == 0) {
            taken = atomicAdd(counter, 1);
            if (taken == count() - 1) *counter = 0;  // the last call, as there is one after each program
        }
        return (int)gridDim.x + __shfl_sync(~0u, taken, 0);
    }
};

// As many blocks share a program as possible if all programs are to run at once; at most a whole cluster.
__device__ __forceinline__ Programs count_programs(const int* query_start_loc, int num_rows) {
    Programs programs = {count_pieces(query_start_loc, num_rows), cluster_size()};
    while (programs.parts > 1 && programs.count() * programs.parts > (int)gridDim.x) programs.parts /= 2;
    return programs;
}

// Finds the piece and KV head of a program, and this block's share of the tiles. Returns false if there are too
// few tiles for this block, as merging the sums of few tiles does not pay.
__device__ __forceinline__ bool find_work(
    Work& work, int program, const Programs& programs, const int* query_start_loc, const int* seq_lens, int num_rows,
    int window) {
    program = programs.count() - 1 - program;
    // If the pieces of one head keep all multiprocessors busy, heads are computed one after another, because
    // the keys and values of one head are more likely to stay in the L2 cache.
    const bool heads_first = programs.pieces >= (int)gridDim.x;
    work.kv_head = heads_first ? program / programs.pieces : program % NUM_KV_HEADS;
    const int piece = heads_first ? program % programs.pieces : program / NUM_KV_HEADS;
    find_piece(work, piece, query_start_loc, num_rows);
    work.length = seq_lens[work.row];
    work.context = work.length - work.count;
    work.first_key = HAS_WINDOW ? max(work.context + work.first_query - window + 1, 0) : 0;
    work.end = min(work.context + work.first_query + TOKENS, work.length);
    const int first = work.first_key / KEYS, last = (work.end - 1) / KEYS, tiles = last - first + 1;
    work.part = blockIdx.x % programs.parts;
    work.parts = max(1, min(programs.parts, tiles / MIN_TILES));
    work.last_tile = last - tiles * work.part / work.parts;
    work.first_tile = last + 1 - tiles * (work.part + 1) / work.parts;
    return work.part < work.parts;
}
