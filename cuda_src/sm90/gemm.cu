// y[m, n] = x[m, k] @ w[n, k].T with (2N-2):2N weights on the sparse tensor cores of sm_90, through wgmma.mma_async.sp.
//
// Weights are the sparse operand A (64 outputs a strip), slid activations the dense operand B; both stand in global memory as the
// images that shared memory wants (arch/sm90_layout.py), so every copy is one contiguous bulk copy:
//
//   producer   one thread: global --cp.async.bulk--> ring of STAGES stages, 128 slid bytes along k each
//   consumers  WARPGROUPS warpgroups, a strip each: wait full --> 2 wgmma a stage --> release the stages before
//
// A unit does one tile after another. With CUT == 1 it is a block. Otherwise it is a cluster that has one tile: its blocks cut k into
// equal parts and add them up, in order, through each other's shared memory. That is for what whole tiles leave processors idle: few
// tokens, and the last, half-empty round of many.
//
// The next kernel of the stream may start at once (griddepcontrol). What this one needs of those before it, x and its scales, waits
// until they are complete, while the ring already fills with weights.
#include "common/types.cuh"
#include "sm90/epilogue.cuh"
#include "sm90/index.cuh"
#include "sm90/ptx.cuh"
#include "sm90/smem.cuh"
#include "sm90/wgmma.cuh"

#ifndef DTYPE
#define DTYPE TYPE_FLOAT8
#endif
#ifndef OUT
#define OUT TYPE_BFLOAT16
#endif
#ifndef TOKENS
#define TOKENS 256
#define WARPGROUPS 2
#define STAGES 4
#endif
#ifndef WINDOWS
#define WINDOWS 0  // of the pattern whose masks come as codes; 0: index words come as they are
#endif
#ifndef CUT
#define CUT 1
#endif
#ifndef BLOCKS
#define BLOCKS 1  // on a processor at a time, of this kernel or this and the next
#endif
#ifndef BAND
#define BAND 16
#endif
// Stages of a step, which a warpgroup multiplies at once while the step before is under way: small instructions are bound by latency.
#ifndef BATCH
#define BATCH (TOKENS > 64 ? 1 : 2)
#endif

constexpr bool WIDE = DTYPE == TYPE_BFLOAT16 || DTYPE == TYPE_FLOAT16;
typedef Index<WINDOWS, WIDE> IndexT;
constexpr int VALUE_BYTES = 4096, INDEX_BYTES = IndexT::BYTES;  // of one strip and stage
// Where accumulators need more than an equal share of the 65536 registers, setmaxnreg takes them from the producer, which must then be a
// whole warpgroup.
constexpr bool UNEQUAL = TOKENS > 128;
constexpr int THREADS = 128 * WARPGROUPS + (UNEQUAL ? 128 : 32);
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
// Whether a tile starts with D = A * B; with small accumulators ptxas would then wait after each instruction.
constexpr bool FRESH = TOKENS > 64;
// Sums that the stages of a step go to in turn, so that small instructions need not wait for each other.
constexpr int CHAINS = BATCH;
// As many blocks of a cluster as a power of two allows share out the tokens when they add up, and write them.
constexpr int POWER = CUT >= 8 ? 8 : CUT >= 4 ? 4 : CUT >= 2 ? 2 : 1;
constexpr int SHARES = POWER < TOKENS / 8 ? POWER : TOKENS / 8, SHARE = TOKENS / SHARES;
constexpr int PORTION = CUT == 1 ? TOKENS : SHARE > 64 ? SHARE / 2 : SHARE;  // tokens that a block adds up and writes at a time


typedef Stage<TOKENS, WARPGROUPS, VALUE_BYTES, INDEX_BYTES> StageT;
typedef Rows<OUT, PORTION> RowsT;
typedef SharedMemory<STAGES, StageT, WARPGROUPS, RowsT::BYTES, IndexT::CODES> Shared;
constexpr u32 VALUES_AT = TOKENS * 128, INDEX_AT = VALUES_AT + WARPGROUPS * VALUE_BYTES;  // of a stage
constexpr u32 STAGING_AT = STAGES * sizeof(StageT), FULL_AT = STAGING_AT + WARPGROUPS * 2 * RowsT::BYTES, EMPTY_AT = FULL_AT + 8 * STAGES;
constexpr u32 TABLE_AT = EMPTY_AT + 8 * STAGES;
static_assert(TABLE_AT + 4 * IndexT::CODES <= sizeof(Shared) && sizeof(Shared) <= 232448, "shared memory of a block");
static_assert(sizeof(StageT) % 1024 == 0, "swizzled tiles start on whole patterns");
static_assert(SHARE * SHARES == TOKENS && SHARE % PORTION == 0 && PORTION % 8 == 0, "portions of whole groups of tokens");
static_assert(CUT == 1 || 4 * TOKENS * 64 * WARPGROUPS <= STAGING_AT, "parts take the place of the stages");
static_assert(STAGES > 2 * BATCH, "the producer must have a slot to fill");

#if DTYPE == TYPE_INT8
typedef int Accumulator;
INLINE u32 as_bits(int v) { return (u32)v; }
INLINE int from_bits(u32 v) { return (int)v; }
#else
typedef float Accumulator;
INLINE u32 as_bits(float v) { return __float_as_uint(v); }
INLINE float from_bits(u32 v) { return __uint_as_float(v); }
#endif

// ---- which tiles, and which part of k ------------------------------------------------------------------------------------------
struct Problem {
    int m, n, stages;
    int first_strip, last_strip;  // of weights, that this launch computes; one past the last
    int end;                      // of the tiles of this launch
};

// A tile, and this block's part of k: steps first ... last - 1. Tiles run in bands of BAND tiles of n, so that blocks at work together
// share weights and activations in the L2 cache.
struct Piece {
    int tile, strip, tile_m, first, last;

    INLINE Piece(const Problem& p, i64 begin) : tile((int)begin + blockIdx.x / CUT) {
        const u32 rank = CUT == 1 ? 0 : cluster_rank(), steps = p.stages / BATCH;
        first = steps * rank / CUT, last = steps * (rank + 1) / CUT;
        place(p);
    }
    INLINE void next(const Problem& p) { tile += gridDim.x / CUT, place(p); }
    INLINE void place(const Problem& p) {
        const int tiles_n = (p.last_strip - p.first_strip + WARPGROUPS - 1) / WARPGROUPS, tiles_m = (p.m + TOKENS - 1) / TOKENS;
        const int band = tile / (BAND * tiles_m), inside = tile % (BAND * tiles_m), width = min(tiles_n - BAND * band, BAND);
        strip = p.first_strip + (BAND * band + inside % width) * WARPGROUPS, tile_m = inside / width;
    }
};

// A launch may be followed by another one that does the rest of the tiles.
enum Order { ALONE, BEFORE_REST, REST };

// ---- producer ------------------------------------------------------------------------------------------------------------------
// The copies of all stages, in order, as slots become empty.
INLINE void load(const Problem& p, i64 begin, Order order, u32 shared, const u8* __restrict__ x, const u8* __restrict__ values,
                 const u8* __restrict__ index) {
    const int strips = (p.n + 127) / 128 * 2, rows = (p.m + 7) / 8 * 8;
    int slot = 0;
    u32 parity = 1;     // of a phase that is complete before the first
    int ahead = -1;     // stages whose weights are under way
    for (Piece piece(p, begin); piece.tile < p.end; piece.next(p)) {
        const int row = piece.tile_m * TOKENS, at = piece.first * BATCH;
        const u32 x_bytes = min(rows - row, TOKENS) * 128;
        const u8* from_x = x + ((i64)at * rows + row) * 128;
        i64 strip = (i64)at * strips + piece.strip;
        auto weights_to = [&](int slot) {
            const u32 full = shared + FULL_AT + 8 * slot;
            mbarrier_arrive_expect_tx(full, x_bytes + WARPGROUPS * (VALUE_BYTES + INDEX_BYTES));
            const u32 to = shared + slot * sizeof(StageT);
            cp_async_bulk(to + VALUES_AT, values + strip * VALUE_BYTES, WARPGROUPS * VALUE_BYTES, full);
            cp_async_bulk(to + INDEX_AT, index + strip * INDEX_BYTES, WARPGROUPS * INDEX_BYTES, full);
            strip += strips;
        };
        int count = (piece.last - piece.first) * BATCH;
        if (ahead < 0) {
            ahead = min(count, STAGES);
            for (int s = 0; s < ahead; s++) weights_to(s);
            if (order != REST) griddepcontrol_wait();
            if (order == BEFORE_REST) griddepcontrol_launch_dependents();
        }
        for (; count > 0; count--, from_x += (i64)rows * 128) {
            mbarrier_wait(shared + EMPTY_AT + 8 * slot, parity);
            if (ahead > 0) ahead--;
            else weights_to(slot);
            cp_async_bulk(shared + slot * sizeof(StageT), from_x, x_bytes, shared + FULL_AT + 8 * slot);
            if (++slot == STAGES) slot = 0, parity ^= 1;
        }
    }
}

// ---- the kernel ----------------------------------------------------------------------------------------------------------------
extern "C" __global__ void
#if CUT > 1
    __cluster_dims__(CUT, 1, 1)
#endif
    __launch_bounds__(THREADS, BLOCKS) gemm(
        const u8* __restrict__ x,           // [stages, ceil(M / 8), 8, 128] swizzled image of slid activations
        const u8* __restrict__ values,      // [stages, strips, VALUE_BYTES] swizzled image of kept weights; strips: ceil(N / 128) * 2
        const float* scale_x,               // [M], 8-bit types; not __restrict__: it may be written while this kernel starts
        const float* __restrict__ scale_w,  // [N], 8-bit types
        const void* bias,                   // [N] of bias_type, or null; likewise
        i64 bias_type,
        Output<OUT>::Storage* __restrict__ y,  // [M, N]
        i64 y_pitch,                        // elements from row to row
        i64 m_, i64 n_,
        const u8* __restrict__ index,       // [stages, strips, INDEX_BYTES] codes or index words
        i64 stages,                         // even
        i64 first_strip, i64 last_strip,    // whose outputs this launch computes
        i64 begin, i64 end,                 // tiles of them
        i64 order)                          // of this launch
{
    extern __shared__ __align__(1024) u8 raw[];
    const u32 shared = kept(shared_address(raw));
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++)
            mbarrier_init(shared + FULL_AT + 8 * s, 1), mbarrier_init(shared + EMPTY_AT + 8 * s, 4 * WARPGROUPS);
        fence_mbarrier_init();
    }
    __syncthreads();
    if (order != BEFORE_REST) griddepcontrol_launch_dependents();

    const int m = (int)m_, n = (int)n_;
    const Problem p = {m, n, (int)stages, (int)first_strip, (int)last_strip, (int)end};
    const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
    if (warpgroup == WARPGROUPS) {
        if (UNEQUAL) setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x % 128 == 0) load(p, begin, (Order)order, shared, x, values, index);
        __syncwarp();
        if (CUT > 1) cluster_sync(), cluster_sync();  // as the consumers do
        return;
    }

    // ---- consumers
    if (UNEQUAL) setmaxnreg_inc<CONSUMER_REGISTERS>();
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, g = lane / 4;
    const u32 table = shared + TABLE_AT;
    if (WINDOWS) {
        IndexT::fill(table, threadIdx.x, 128 * WARPGROUPS);
        threads_sync<128 * WARPGROUPS>(1 + WARPGROUPS);
    }
    if (order != REST) griddepcontrol_wait();
    const bool aligned = ((u64)y | (u64)(y_pitch * sizeof(RowsT::Out))) % 16 == 0;
    u8* const staging = ((Shared*)raw)->staging[warpgroup][0];
    const u32 my_values = VALUES_AT + warpgroup * VALUE_BYTES;
    IndexT index_of(table, INDEX_AT + warpgroup * INDEX_BYTES, thread);
    int slot = 0, oldest = 0;  // of the stages that are not released
    u32 parity = 0;
    auto release = [&] {
        if (lane == 0) mbarrier_arrive(shared + EMPTY_AT + 8 * oldest);
        oldest = oldest + 1 == STAGES ? 0 : oldest + 1;
    };

    Piece piece(p, begin);
#pragma unroll 1
    while (piece.tile < p.end) {
        const int m0 = piece.tile_m * TOKENS, n0 = (piece.strip + warpgroup) * 64;

        // what the epilogue needs, asked for now
        TokenScales<TOKENS> token;
        float channel[2] = {1, 1};
        if (!WIDE) {
            if (CUT == 1) token.load(scale_x, m0, m, lane);
#pragma unroll
            for (int h = 0; h < 2; h++) channel[h] = scale_w[min(n0 + 16 * warp + g + 8 * h, n - 1)];
        }

        Accumulator acc[CHAINS][TOKENS / 2];
        if (!FRESH)
#pragma unroll
            for (int v = 0; v < CHAINS * TOKENS / 2; v++) acc[v / (TOKENS / 2)][v % (TOKENS / 2)] = 0;
        u32 e[2][BATCH][2];  // the index words of one step are still being read when those of the next are loaded
        const int first = piece.first, last = piece.last;
        int s = first;
        index_of.start(first * BATCH);
        auto step = [&](u32 (&index)[BATCH][2]) {
            u32 stage[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                stage[j] = shared + slot * (u32)sizeof(StageT);
                mbarrier_wait(shared + FULL_AT + 8 * slot, parity);
                index_of.read(stage[j], index[j]);
                if (++slot == STAGES) slot = 0, parity ^= 1;
            }
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                const u64 a = matrix_descriptor<64>(stage[j] + my_values), b = matrix_descriptor<128>(stage[j]);
                Wgmma<DTYPE, TOKENS, 0>::mma(acc[j % CHAINS], a, b, index[j][0], !FRESH || s > first);
                Wgmma<DTYPE, TOKENS, WIDE>::mma(acc[j % CHAINS], a + 2, b + 4, index[j][1], 1);
            }
            wgmma_commit_group();
            wgmma_wait_group<1>();  // those before are read
            if (s > first)
#pragma unroll
                for (int j = 0; j < BATCH; j++) release();
        };
#pragma unroll 1
        while (true) {
            step(e[0]);
            if (++s == last) break;
            step(e[1]);
            if (++s == last) break;
        }
        if (CUT == 1) piece.next(p);
        wgmma_wait_group<0>();
#pragma unroll
        for (int j = 0; j < BATCH; j++) release();
#pragma unroll
        for (int c = 1; c < CHAINS; c++)
#pragma unroll
            for (int v = 0; v < TOKENS / 2; v++) acc[0][v] += acc[c][v];

        // scales, bias, rounding, and out
        auto finish = [&](const auto& total, const auto& token, int m0) {
            constexpr int COUNT = sizeof(total) / sizeof(Accumulator) * 2;  // tokens
            float offset[2] = {};
            if (bias)
#pragma unroll
                for (int h = 0; h < 2; h++) offset[h] = load_float(bias, min(n0 + 16 * warp + g + 8 * h, n - 1), bias_type);
            auto write = [&](auto biased, auto whole) {
                write_rows<OUT, COUNT, !WIDE, decltype(biased)::value, decltype(whole)::value>(
                    total, token, channel, offset, y, y_pitch, aligned, m0, n0, m, n, staging, thread, 1 + warpgroup);
            };
            const bool whole = aligned && m0 + COUNT <= m && n0 + 64 <= n;
            if (bias) whole ? write(Flag<true>(), Flag<true>()) : write(Flag<true>(), Flag<false>());
            else whole ? write(Flag<false>(), Flag<true>()) : write(Flag<false>(), Flag<false>());
        };
        if constexpr (CUT == 1) finish(acc[0], token, m0);
        else {
            // Parts, 16 bytes of a thread at [warpgroup][group of tokens][thread], take the place of the stages, once those are read.
            threads_sync<128 * WARPGROUPS>(1 + WARPGROUPS);
            constexpr u32 GROUP = 128 * 16;
            const u32 mine = shared + warpgroup * (TOKENS / 8 * GROUP) + thread * 16;
#pragma unroll
            for (int v = 0; v < TOKENS / 2; v += 4)
                st_shared(mine + v / 4 * GROUP, as_bits(acc[0][v]), as_bits(acc[0][v + 1]), as_bits(acc[0][v + 2]), as_bits(acc[0][v + 3]));
            cluster_sync();
            const u32 rank = cluster_rank();
            if (rank >= SHARES) cluster_arrive();
            else
#pragma unroll 1
                for (int at = rank * SHARE, end = at + SHARE; at < end; at += PORTION) {
                    TokenScales<PORTION> token;
                    if (!WIDE) token.load(scale_x, m0 + at, m, lane);
                    Accumulator sum[PORTION / 2];
#pragma unroll
                    for (u32 r = 0; r < CUT; r++) {
                        const u32 part = mapa(mine, r) + at / 8 * GROUP;
#pragma unroll
                        for (int v = 0; v < PORTION / 2; v += 4) {
                            const uint4 add = ld_shared_cluster(part + v / 4 * GROUP);
                            const u32 bits[4] = {add.x, add.y, add.z, add.w};
#pragma unroll
                            for (int c = 0; c < 4; c++) sum[v + c] = r == 0 ? from_bits(bits[c]) : sum[v + c] + from_bits(bits[c]);
                        }
                    }
                    if (at + PORTION == end) cluster_arrive();  // has read what it needs: before y is written, which would take a while
                    finish(sum, token, m0 + at);
                }
            cluster_wait();  // nobody reads this block's part any more
            break;
        }
    }
    if (order == REST) griddepcontrol_wait();  // so that whoever waits for this launch has waited for the one before
}
