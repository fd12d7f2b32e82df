// What a decode step computes, and which part a block has of it. decode_step.cu explains the macros.

#pragma once

typedef long long i64;

constexpr int THREADS = 32 * WARPS, COPYING_WARPS = 4;  // threads that compute
constexpr int GROUP = NUM_HEADS / NUM_KV_HEADS, Q_SIZE = NUM_HEADS * HEAD_DIM, KV_SIZE = NUM_KV_HEADS * HEAD_DIM;
constexpr int QKV_SIZE = Q_SIZE + 2 * KV_SIZE;

// -- the model's tensors -------------------------------------------------------------------------------

// The columns of the table, as `FIELDS` in kernels/decode_step.py.
enum Field { KEYS, VALUES, KV_SCALES, WINDOW, ATTN_NORM, MLP_NORM, Q_NORM, K_NORM, SINKS, MATRICES };
enum Part { WEIGHT, SCALES, ZEROS, ROW_SCALES, BIAS, PARTS };
enum Matrix { QKV, OUT, GATE_UP, DOWN, NUM_MATRICES };
constexpr int NUM_FIELDS = MATRICES + NUM_MATRICES * PARTS;

struct Table {
    const i64* words;  // [layers, NUM_FIELDS]

    __device__ __forceinline__ const u16* tensor(int layer, int field) const {
        return (const u16*)words[layer * NUM_FIELDS + field];
    }
    __device__ __forceinline__ const u16* part(int layer, int matrix, int part) const {
        return tensor(layer, MATRICES + matrix * PARTS + part);
    }
};

__device__ constexpr int inputs_of(int matrix) {
    return matrix == DOWN ? INTERMEDIATE : matrix == OUT ? Q_SIZE : HIDDEN;
}
constexpr bool IN_RECORDS = PACKED && NIBBLES;
// What is divided among the blocks: halves of a tile, or of gate and up whole tiles, of which one half has gates.
// Records: whole tiles, or of gate and up pairs of tiles.
constexpr int PIECE = IN_RECORDS ? 16 : 8;  // outputs
__device__ constexpr int pieces_of(int matrix) {
    return (matrix == QKV ? QKV_SIZE : matrix == GATE_UP ? INTERMEDIATE : HIDDEN) / PIECE;
}
__device__ constexpr int tiles_of(int matrix, int pieces) {
    return (pieces * PIECE * (matrix == GATE_UP ? 2 : 1) + 15) / 16;
}
__device__ constexpr int most_tiles(int matrix) {
    return tiles_of(matrix, (pieces_of(matrix) + NUM_BLOCKS - 1) / NUM_BLOCKS);
}

template <int MATRIX> struct Share {  // of a block
    int first, count;  // pieces

    __device__ __forceinline__ explicit Share(int layer) {
        first = (blockIdx.x + 31 * layer + 53 * MATRIX) % NUM_BLOCKS;
        count = (pieces_of(MATRIX) - first + NUM_BLOCKS - 1) / NUM_BLOCKS;
    }
    __device__ __forceinline__ int num_tiles() const { return tiles_of(MATRIX, count); }
    // An output of a tile, 0 ... 15; the last tile may have one half only.
    __device__ __forceinline__ bool has(int tile, int output) const {
        return MATRIX == GATE_UP || IN_RECORDS || 2 * tile + output / 8 < count;
    }
    __device__ __forceinline__ int output(int tile, int output) const {
        if (MATRIX != GATE_UP) return piece(tile * 16 / PIECE + output / PIECE) * PIECE + output % PIECE;
        const int is_up = IN_RECORDS ? tile % 2 : output / 8;
        return piece(IN_RECORDS ? tile / 2 : tile) * PIECE + output % PIECE + is_up * INTERMEDIATE;
    }
    __device__ __forceinline__ int piece(int index) const { return first + index * NUM_BLOCKS; }
};

// -- shared memory -------------------------------------------------------------------------------------

// A step: the inputs of a tile that a warp multiplies at once. A lane has X_PARTS times eight of them.
constexpr int STEP = PACKED ? UNIT : 32, STEP_BYTES = PACKED ? UNIT_BYTES : 64, X_PARTS = STEP / 32;
constexpr int STEPS_OF_SLOT = SEGMENT / STEP, STEPS = (STEPS_OF_SLOT + WARPS - 1) / WARPS;  // of a warp
constexpr int PITCH = STEPS_OF_SLOT * STEP_BYTES + 64;  // the rows of two outputs begin 16 banks apart
// Scales of blocks of inputs and outputs follow the rows, for each half of a tile.
constexpr bool HAS_BLOCKS = PACKED && !NIBBLES && GROUPS > 0;
constexpr int HALF_SCALES = HAS_BLOCKS ? 4 * STEPS_OF_SLOT : 0;  // bytes
constexpr int SLOT = IN_RECORDS ? STEPS_OF_SLOT * RECORD : 16 * PITCH + 2 * HALF_SCALES;
constexpr int COPIES = IN_RECORDS ? 1 : HAS_BLOCKS ? 18 : 16;
__device__ constexpr int segments_of(int matrix) { return (inputs_of(matrix) + SEGMENT - 1) / SEGMENT; }

constexpr int MOST_HELD = 32;  // pieces of eight inputs in a lane's registers
__device__ constexpr bool holds_inputs(int matrix) { return segments_of(matrix) * STEPS * X_PARTS <= MOST_HELD; }

static_assert(!TAGGED || (holds_inputs(OUT) && holds_inputs(DOWN)), "tagged inputs are loaded at once");

__device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int X_PITCH = HIDDEN * 2 + (PACKED && IN_ORDER ? 16 : HIDDEN % 64 ? 0 : 64);  // no bank conflicts
constexpr int X_BYTES = ROWS * X_PITCH;
constexpr int MOST_TILES =
    larger(larger(most_tiles(QKV), most_tiles(OUT)), larger(most_tiles(GATE_UP), most_tiles(DOWN)));
constexpr int SUM_BYTES = WARPS * MOST_TILES * 16 * ROWS * 4;
constexpr int CODES_AT = (GROUP + 2) * HEAD_DIM;  // in 16-bit numbers: the codes of the key and the value
constexpr int HEADS_BYTES = 2 * CODES_AT + (FP8_CACHE ? 2 * HEAD_DIM : 0), PARTIAL_BYTES = WARPS * GROUP * (HEAD_DIM + 2) * 4;
// Used by one phase at a time: normalised rows, then sums; or heads and partial results of attention.
static_assert(larger(larger(X_BYTES, SUM_BYTES), HEADS_BYTES + PARTIAL_BYTES) <= SCRATCH, "");
constexpr int BARRIERS = 2 * STAGES * 8;
