// y[m, n] = x[m, k] @ w[n, k].T with (2N-2):2N weights on the sparse tensor cores of sm_80 and later.
//
// Weights are stored in fragment order (arch/sm80_layout.py, `arrange`); activations are stored as they are, and are lifted between
// shared memory and the instruction:
//
//   8-bit    a window is one register. At an even unit it is a word of x as loaded; at an odd unit, one byte permute of two.
//   16-bit   a window is a register of an even lane and one of the odd lane beside it. The even lane only ever needs even
//            units, the odd lane odd ones; at an odd unit of the window each takes one of two words that it has.
//   FP4      a byte is a pair of columns. x was lifted before it was quantized, since its scales are those of lifted columns: a
//            register is a word as it lies, and one of four lanes (MXFP4: two) shares a scale. Scales lie beside values
//            (arch/sm80_fp4.py).
//
// A thread block makes TILE_M tokens x TILE_N outputs; a warp WARP_M x WARP_N of it, as WARP_N/16 row tiles x WARP_M/8 groups.
//
//   global --cp.async--> ring of STAGES stages --> A: registers, for up to PASS instructions along k at a time
//                                              --> x: words of 8 tokens --lift--> B --mma.sp--> accumulators
//
// The A registers of the next pass are loaded while the last 8 tokens of this one are multiplied, into the same registers.
// With gridDim.y > 1 the blocks of one tile share k; the last to finish adds the parts in order, so results do not vary.
#include "common/types.cuh"
#include "sm80/ptx.cuh"
#include "sm80/smem.cuh"

// ---- what the host chooses (arch/sm80.py); the defaults let this file compile alone --------------------------------------
#ifndef DTYPE
#define DTYPE TYPE_INT8  // of weights and activations
#endif
#ifndef OUT
#define OUT TYPE_BFLOAT16
#endif
#ifndef GROUP
#define GROUP 8  // L of the pattern: 8 for 6:8
#define WORDS 8  // words of a lane and row
#define RUN 16   // units that an owner holds side by side
#define LOAD 16  // bytes of one load of x
#define STRIDE 144
#endif
#ifndef TILE_N
#define TILE_N 128
#define TILE_M 128
#define WARPS_N 2
#define WARPS_M 2
#define STAGES 3
#endif
#ifndef THREADS
#define THREADS (32 * WARPS_N * WARPS_M)  // of a block
#endif
#ifndef SCALES
#define SCALES 8  // FP4: of a row and block, ue4m3; 4: half as many, ue8m0
#endif
#ifndef BLOCK_SCALED
#define BLOCK_SCALED 0  // float8 only: the instruction with block scales, which are all 1
#endif
#ifndef FAULT
#define FAULT 0  // bits of a lane's index word to invert: a test makes a wrong kernel
#endif
#ifndef SHARED_BYTES
#define SHARED_BYTES sizeof(Shared)  // dynamic
#endif

// ---- what follows from it ----------------------------------------------------------------------------------------------
constexpr bool WIDE = DTYPE == TYPE_BFLOAT16 || DTYPE == TYPE_FLOAT16;
constexpr int UNITS = GROUP / 2, WINDOWS = UNITS - 1;           // per group
constexpr int STEPS = 2 * WORDS / UNITS * WINDOWS / 4;          // instructions along k in a block
constexpr int META_WORDS = WIDE ? (STEPS + 1) / 2 : STEPS;      // an index word serves two 16-bit instructions
constexpr bool FP4 = DTYPE == TYPE_FLOAT4;
constexpr int SCALES_AT = 512 * STEPS + 128 * META_WORDS;       // in a row tile: FP4's scales, words of every row
constexpr int SCALE_WORDS = FP4 * SCALES / 4;                   // of one row, for all instructions
constexpr int BLOCK_BYTES = SCALES_AT + 64 * SCALE_WORDS;       // of one row tile
constexpr int HELD = WORDS + SCALE_WORDS;                       // of one row of x: its words, then FP4's scales
constexpr int ROW_BYTES = 16 * (WORDS + FP4), CHUNKS = ROW_BYTES / 16;  // of one row of x, in chunks of 16 bytes
constexpr bool MIRRORED = WIDE && RUN % 4 == 0;                 // the second pair of lanes reads runs backwards: other banks
constexpr int WARPS = WARPS_N * WARPS_M;
constexpr int WARP_N = TILE_N / WARPS_N, WARP_M = TILE_M / WARPS_M;
constexpr int ROW_TILES = WARP_N / 16, GROUPS = WARP_M / 8;     // of one warp
// On sm_90 and sm_100 the compiler builds the float8 instruction from others, and needs registers for that.
constexpr bool EMULATED = DTYPE == TYPE_FLOAT8 && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200;
constexpr int FRAGMENTS = EMULATED ? 1 : ROW_TILES * GROUPS > 16 ? 12 : 20;  // of A that a warp holds beside its accumulators
constexpr int AT_ONCE = FRAGMENTS / ROW_TILES > 0 ? FRAGMENTS / ROW_TILES : 1;
constexpr int PASSES = (STEPS + AT_ONCE - 1) / AT_ONCE, PASS = (STEPS + PASSES - 1) / PASSES;

static_assert(TILE_N % (16 * WARPS_N) == 0 && TILE_M % (8 * WARPS_M) == 0, "a warp takes whole row tiles and groups of 8 tokens");
static_assert(2 * WORDS % UNITS == 0 && (2 * WORDS / UNITS * WINDOWS) % 4 == 0, "a block takes whole groups and instructions");
static_assert(!FP4 || (GROUP == 4 && RUN == 2 && STEPS == 2 && (SCALES == 8 || SCALES == 4)), "lifted x; 4 or 2 scales a step");
static_assert(STRIDE % 16 == 0 && STRIDE >= ROW_BYTES && CHUNKS <= 32 && STAGES >= 2, "rows are copied in 16-byte chunks");

INLINE constexpr int scale_word(int step) { return step * SCALE_WORDS / STEPS; }  // which has an instruction's scales

typedef Stage<TILE_N / 16, BLOCK_BYTES, TILE_M, STRIDE> StageT;
typedef SharedMemory<STAGES, StageT, WARPS, Staging<WARP_N>> Shared;
static_assert(THREADS == 32 * WARPS && SHARED_BYTES == sizeof(Shared), "the host launches what this file describes");
#if DTYPE == TYPE_INT8
typedef int Accumulator;
INLINE float as_float(int v) { return __int2float_rn(v); }
#else
typedef float Accumulator;
INLINE float as_float(float v) { return v; }
#endif

template <int STEP>
INLINE void multiply(Accumulator (&d)[4], const uint4& a, const u32 (&b)[4], u32 e, u32 scale_a, u32 scale_b) {
    e ^= FAULT;
#if DTYPE == TYPE_FLOAT4
    if constexpr (SCALES == 8) mma_sp_nvf4<0>(d, a, b, e, scale_a, scale_b);
    else mma_sp_mxf4<2 * STEP>(d, a, b, e, scale_a, scale_b);
#elif DTYPE == TYPE_INT8
    mma_sp_s8<0>(d, a, b, e);
#elif DTYPE == TYPE_FLOAT8 && BLOCK_SCALED
    mma_sp_mxf8_unscaled(d, a, b, e);
#elif DTYPE == TYPE_FLOAT8
    mma_sp_e4m3<0>(d, a, b, e);
#elif DTYPE == TYPE_BFLOAT16
    mma_sp_bf16<STEP % 2>(d, a, b, e);
#else
    mma_sp_f16<STEP % 2>(d, a, b, e);
#endif
}

// ---- words of x and windows ----------------------------------------------------------------------------------------------
struct Slots {
    int unit[4 * STEPS];         // where the window starts that an owner gives as register slot % 4 of step slot / 4
    int first[PASSES], last[PASSES];  // words that a pass reads
};

// Windows at even units come first: they are words as loaded, in the registers where they were loaded.
__device__ constexpr Slots make_slots() {
    Slots s = {};
    int slot = 0;
    for (int odd = 0; odd < 2; odd++)
        for (int t = 0; t < 4 * STEPS; t++) {
            int unit = t / WINDOWS * UNITS + t % WINDOWS;
            if (unit % 2 == odd) s.unit[slot++] = unit;
        }
    for (int pass = 0; pass < PASSES; pass++) {
        s.first[pass] = WORDS;
        for (int i = 4 * PASS * pass; i < 4 * PASS * (pass + 1) && i < 4 * STEPS; i++) {
            int low = s.unit[i] / 2, high = (s.unit[i] + 1) / 2;
            if (low < s.first[pass]) s.first[pass] = low;
            if (high > s.last[pass]) s.last[pass] = high;
        }
    }
    return s;
}
__device__ constexpr Slots slots = make_slots();

struct Lane {
    int g, q;  // lane = 4 g + q
    int start; // bytes into a row of x of this lane's first word
    int next;  // 16-bit: bytes from one word of a run to the next
    bool high; // 16-bit: whether this lane takes the later of two words in a window at an odd unit

    INLINE explicit Lane(int lane) : g(lane >> 2), q(lane & 3) {
        const int pair = q >> 1, odd = q & 1;
        const bool backwards = MIRRORED && pair;
        start = WIDE ? 4 * (pair * RUN + odd + (backwards ? RUN - 2 : 0)) : 2 * RUN * q;
        next = backwards ? -8 : 8;
        high = backwards ? odd : !odd;
    }

    // Words of one pass, from eight rows of a stage.
    INLINE void load(u32 (&w)[HELD], const u8 (*rows)[STRIDE], int pass) const {
        if constexpr (FP4) {
            const int index = 4 * g + q;
#pragma unroll
            for (int step = PASS * pass; step < PASS * (pass + 1) && step < STEPS; step++)
                w[WORDS + scale_word(step)] = *(const u32*)(rows[g] + 16 * WORDS + 4 * scale_word(step));
#pragma unroll
            for (int step = PASS * pass; step < PASS * (pass + 1) && step < STEPS; step++)
                ldmatrix_x4(w + 4 * step, rows[index % 8] + 64 * step + index / 8 * 16);
            return;
        }
        const u8* mine = rows[g] + start;
#pragma unroll
        for (int i = 0; i < WORDS; i += LOAD / 4) {
            if (i + LOAD / 4 <= slots.first[pass] || i > slots.last[pass]) continue;
            if (WIDE) {
                w[i] = *(const u32*)(mine + i / (RUN / 2) * (8 * RUN) + i % (RUN / 2) * next);
                continue;
            }
            const u8* from = mine + i / (RUN / 2) * (8 * RUN) + i % (RUN / 2) * 4;
            if (LOAD == 16) {
                uint4 v = *(const uint4*)from;
                w[i] = v.x, w[i + 1] = v.y, w[i + 2] = v.z, w[i + 3] = v.w;
            } else if (LOAD == 8) {
                uint2 v = *(const uint2*)from;
                w[i] = v.x, w[i + 1] = v.y;
            } else {
                w[i] = *(const u32*)from;
            }
        }
    }

    // The lift: this lane's register of one window.
    INLINE u32 window(const u32 (&w)[HELD], int slot) const {
        const int unit = slots.unit[slot];
        u32 low = w[unit / 2];
        if (unit % 2 == 0) return low;
        u32 up = w[unit / 2 + 1];
        return WIDE ? (high ? up : low) : __byte_perm(low, up, 0x5432);
    }
};

// ---- copies from global memory ---------------------------------------------------------------------------------------------
// The weights of a tile and block are contiguous, so all threads copy them 16 bytes each, in rounds. Of x, CHUNKS threads copy
// a row, and a round takes as many rows as there are threads for.
struct Copies {
    static constexpr int ROUND = 16 * THREADS, TILE_BYTES = TILE_N / 16 * BLOCK_BYTES, ROUND_ROWS = THREADS / CHUNKS;
    static constexpr int W_ROUNDS = (TILE_BYTES + ROUND - 1) / ROUND, X_ROUNDS = (TILE_M + ROUND_ROWS - 1) / ROUND_ROWS;
    static constexpr int ROUNDS = W_ROUNDS + X_ROUNDS;
    const u8 *weights, *x;
    i64 w_step, x_step;  // bytes from block to block; from a round's row of x to the next round's
    int x_left;          // bytes of the row of x from this thread's chunk on: chunks past them are zeros
    int rows;            // rows of x from this thread's first on: the others are zeros

    INLINE Copies(const u8* all_x, i64 x_pitch, i64 x_bytes, const u8* all_weights, i64 n, i64 m, i64 first, int tile_n, int tile_m) {
        const i64 row_tiles = (n + 255) / 256 * 16, row_tile = (i64)tile_n * (TILE_N / 16);  // whole tiles of any size
        const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS * 16;
        const i64 token = (i64)tile_m * TILE_M + row;
        w_step = row_tiles * BLOCK_BYTES;
        weights = all_weights + first * w_step + row_tile * BLOCK_BYTES + threadIdx.x * 16;
        x_step = x_pitch * ROUND_ROWS;
        x = all_x + token * x_pitch + first * ROW_BYTES + chunk;
        x_left = (int)(x_bytes - first * ROW_BYTES - chunk);
        rows = (int)(m - token < TILE_M ? m - token : TILE_M);
    }

    // Part `part` of `parts` of the next block of k, if there is one, into a stage; all parts in order make a block.
    INLINE void next(StageT& stage, bool more, int part = 0, int parts = 1) {
        const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS * 16, valid = x_left > 0 ? rows : 0;
#pragma unroll
        for (int round = ROUNDS * part / parts; round < ROUNDS * (part + 1) / parts; round++) {
            if (round < W_ROUNDS) {
                const int at = round * ROUND;
                const bool mine = at + ROUND <= TILE_BYTES || threadIdx.x * 16 < TILE_BYTES - at;
                cp_async_16(more && mine, stage.weights[0] + threadIdx.x * 16 + at, weights + at);
            } else {
                const int at = (round - W_ROUNDS) * ROUND_ROWS;
                const bool mine = (THREADS % CHUNKS == 0 || row < ROUND_ROWS) && (TILE_M % ROUND_ROWS == 0 || row + at < TILE_M);
                cp_async_16(more && mine, stage.x[row] + chunk + at * STRIDE, x, at < valid);
                x += x_step;
                asm("" : "+l"(x));  // or the compiler keeps every multiple of x_step in registers
            }
        }
        if (part == parts - 1) weights += w_step, x += ROW_BYTES - X_ROUNDS * x_step, x_left -= ROW_BYTES;
    }
};

// ---- the kernel ------------------------------------------------------------------------------------------------------------
extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm(
    const u8* __restrict__ x,         // [M, K] of DTYPE, 16-byte aligned rows; FP4: [M, blocks, ROW_BYTES]
    i64 x_pitch,                      // bytes from row to row, a multiple of 16
    i64 x_bytes,                      // bytes of a row
    const u8* __restrict__ weights,   // [blocks, row tiles, BLOCK_BYTES], arranged; row tiles a multiple of 16
    const float* __restrict__ scale_x,  // [M], types of 8 bits or less
    const float* __restrict__ scale_w,  // [N], likewise
    const void* __restrict__ bias,    // [N] of bias_type, or null
    i64 bias_type,
    Output<OUT>::Storage* __restrict__ y,  // [M, N]
    i64 y_pitch,                      // elements from row to row
    i64 m, i64 n, i64 blocks,
    uint4* __restrict__ parts,        // [gridDim.y, tiles, ROW_TILES * GROUPS, THREADS] accumulators, if gridDim.y > 1
    u32* __restrict__ arrived)        // [tiles] zeros, and left so
{
    extern __shared__ __align__(16) u8 raw[];
    Shared& shared = *(Shared*)raw;

    // Rasterization groups: 8 columns of tiles side by side run together, so that they share weights and activations in L2.
    const int tiles_n = (int)((n + TILE_N - 1) / TILE_N), tiles_m = (int)((m + TILE_M - 1) / TILE_M);
    const int raster_group = blockIdx.x / (8 * tiles_m), inside = blockIdx.x % (8 * tiles_m);
    const int width = tiles_n - 8 * raster_group < 8 ? tiles_n - 8 * raster_group : 8;
    const int tile_n = 8 * raster_group + inside % width, tile_m = inside / width;

    const int warp = threadIdx.x / 32;
    const int warp_n = warp % WARPS_N * WARP_N, warp_m = warp / WARPS_N * WARP_M;
    const Lane lane(threadIdx.x % 32);
    const i64 first = blocks * blockIdx.y / gridDim.y;
    const int count = (int)(blocks * (blockIdx.y + 1) / gridDim.y - first);
    Copies copies(x, x_pitch, x_bytes, weights, n, m, first, tile_n, tile_m);

    Accumulator acc[ROW_TILES][GROUPS][4] = {};
    uint4 a[PASS][ROW_TILES];
    u32 e[PASS][ROW_TILES], scales[PASS][ROW_TILES];
    u32 words[2][HELD];

    auto load_a = [&](const StageT& stage, int pass, int s, int i) {
        const u8* row_tile = stage.weights[warp_n / 16 + i];
        int step = pass * PASS + s, index = threadIdx.x % 32;
        a[s][i] = ((const uint4*)row_tile)[32 * step + index];
        if (!WIDE || step % 2 == 0 || s == 0) e[s][i] = ((const u32*)(row_tile + 512 * STEPS))[32 * (WIDE ? step / 2 : step) + index];
        scales[s][i] = FP4 ? ((const u32*)(row_tile + SCALES_AT))[16 * scale_word(step) + 2 * lane.g + lane.q % 2] : 0;
    };
    auto load_x = [&](u32 (&w)[HELD], const StageT& stage, int pass, int group) {
        lane.load(w, stage.x + warp_m + 8 * group, pass);
    };

#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        copies.next(shared.stage[i], i < count);
        cp_async_commit_group();
    }
    cp_async_wait_group<STAGES - 2>();
    __syncthreads();
#pragma unroll
    for (int s = 0; s < PASS; s++)
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++) load_a(shared.stage[0], 0, s, i);
    load_x(words[0], shared.stage[0], 0, 0);

    int slot = 0;
#pragma unroll 1
    for (int left = count; left > 0; left--) {
        StageT &now = shared.stage[slot], &free = shared.stage[slot == 0 ? STAGES - 1 : slot - 1];
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        StageT& then = shared.stage[slot];
        const bool more = left > STAGES - 1;
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            const int next_pass = (pass + 1) % PASSES;
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                const bool last = group == GROUPS - 1, leave = last && pass == PASSES - 1;
                const int part = pass * GROUPS + group, turn = part % 2;
                copies.next(free, more, part, PASSES * GROUPS);  // where the last block was, which nobody reads any more
                if (leave) {  // all of this block is in registers: the next one must have come
                    cp_async_commit_group();
                    cp_async_wait_group<STAGES - 2>();
                    __syncthreads();
                }
                const StageT& source = leave ? then : now;
                load_x(words[1 - turn], source, last ? next_pass : pass, last ? 0 : group + 1);
#pragma unroll
                for (int s = 0; s < PASS; s++) {
                    const int step = pass * PASS + s;
                    if (step < STEPS) {
                        u32 b[4], scale = words[turn][FP4 ? WORDS + scale_word(step) : 0];
#pragma unroll
                        for (int r = 0; r < 4; r++) b[r] = lane.window(words[turn], 4 * step + r);
#pragma unroll
                        for (int i = 0; i < ROW_TILES; i++) {
                            if (step % 2 == 0) multiply<0>(acc[i][group], a[s][i], b, e[s][i], scales[s][i], scale);
                            else multiply<1>(acc[i][group], a[s][i], b, e[WIDE && s > 0 ? s - 1 : s][i], scales[s][i], scale);
                        }
                    }
                }
                if (last)
#pragma unroll
                    for (int s = 0; s < PASS; s++)
#pragma unroll
                        for (int i = 0; i < ROW_TILES; i++)
                            if (next_pass * PASS + s < STEPS) load_a(source, next_pass, s, i);
            }
        }
        if (PASSES * GROUPS % 2)  // the words of the next block's first group stand in words[1]
#pragma unroll
            for (int i = 0; i < HELD; i++) words[0][i] = words[1][i];
    }
    cp_async_wait_group<0>();
    __syncthreads();

    if (gridDim.y > 1) {  // this block's part; whoever comes last adds them all, in order
        const i64 tiles = gridDim.x, part = (i64)ROW_TILES * GROUPS * THREADS;
        uint4* mine = parts + blockIdx.x * part + threadIdx.x;
        auto fragment = [&](int f) -> Accumulator (&)[4] { return acc[f / GROUPS][f % GROUPS]; };
#pragma unroll
        for (int f = 0; f < ROW_TILES * GROUPS; f++) mine[blockIdx.y * tiles * part + f * THREADS] = *(const uint4*)fragment(f);
        __threadfence();
        __syncthreads();
        u32& seen = *(u32*)raw;
        if (threadIdx.x == 0) seen = atomicAdd(&arrived[blockIdx.x], 1);
        __syncthreads();
        if (seen + 1 != gridDim.y) return;
        __threadfence();
        if (threadIdx.x == 0) arrived[blockIdx.x] = 0;
        __syncthreads();  // `seen` is about to be overwritten
#pragma unroll
        for (int f = 0; f < ROW_TILES * GROUPS; f++) {
            Accumulator(&sum)[4] = fragment(f);
            sum[0] = sum[1] = sum[2] = sum[3] = 0;
            for (i64 z = 0; z < gridDim.y; z++) {
                uint4 v = ld_global_cg(mine + z * tiles * part + f * THREADS);
                const Accumulator* add = (const Accumulator*)&v;
#pragma unroll
                for (int r = 0; r < 4; r++) sum[r] += add[r];
            }
        }
    }

    // Epilogue: eight tokens at a time through this warp's own rows in shared memory, out in 16-byte chunks of y.
    typedef Output<OUT>::Storage Out;
    constexpr int VECTOR = 16 / sizeof(Out), LANES = WARP_N / VECTOR;  // lanes that write one row
    static_assert(32 % LANES == 0, "the lanes of a warp share out whole rows");
    Staging<WARP_N>& staging = shared.staging[warp];
    const int write_row = threadIdx.x % 32 / LANES, column = threadIdx.x % LANES * VECTOR;
    const i64 n0 = (i64)tile_n * TILE_N + warp_n + column, m0 = (i64)tile_m * TILE_M + warp_m;
    float channel[VECTOR], offset[VECTOR];
#pragma unroll
    for (int v = 0; v < VECTOR; v++) {
        channel[v] = !WIDE && n0 + v < n ? scale_w[n0 + v] : 1.0f;
        offset[v] = bias && n0 + v < n ? load_float(bias, n0 + v, bias_type) : 0.0f;
    }
    const bool vector_writes = n0 + VECTOR <= n && ((u64)y | (u64)(y_pitch * sizeof(Out))) % 16 == 0;
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
            for (int r = 0; r < 4; r++)
                staging.row[2 * lane.q + (r & 1)][16 * i + 8 * (r >> 1) + lane.g] = as_float(acc[i][group][r]);
        __syncwarp();
#pragma unroll
        for (int row = write_row; row < 8; row += 32 / LANES) {
            const i64 token = m0 + 8 * group + row;
            if (token >= m || n0 >= n) continue;
            const float of_token = WIDE ? 1.0f : scale_x[token];
            alignas(16) Out out[VECTOR];
#pragma unroll
            for (int v = 0; v < VECTOR; v++) {
                float sum = staging.row[row][column + v];
                if (!WIDE) sum = __fmul_rn(__fmul_rn(sum, of_token), channel[v]);
                if (bias) sum = __fadd_rn(sum, offset[v]);
                out[v] = Output<OUT>::round(sum);
            }
            Out* to = y + token * y_pitch + n0;
            if (vector_writes) *(uint4*)to = *(const uint4*)out;
            else
#pragma unroll
                for (int v = 0; v < VECTOR; v++)
                    if (n0 + v < n) to[v] = out[v];
        }
        __syncwarp();
    }
}
