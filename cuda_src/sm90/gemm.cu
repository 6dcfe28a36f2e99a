// y[m, n] = x[m, k] @ w[n, k].T with (2N-2):2N weights on the sparse tensor cores of sm_90, through wgmma.mma_async.sp.
//
// Weights are the sparse operand A (64 outputs a strip), slid activations the dense operand B; both stand in global memory as the
// images that shared memory wants (arch/sm90.py), so every copy is one contiguous bulk copy:
//
//   producer   one thread: global --cp.async.bulk--> ring of STAGES stages, 128 slid bytes along k each
//   consumers  WARPGROUPS warpgroups, STRIPS strips each: wait full --> 2 wgmma a strip and stage --> release the stages before
//
// The work is shared out among units (schedule.cuh):
//   CUT == 1   a unit is a block. It does whole tiles, then a range of the last `streamed` tiles, which are cut along k so that no
//              processor idles in a last, half-empty round. Who holds the last steps of a cut tile adds the others' parts.
//   CUT > 1    a unit is a cluster, which does one tile: its blocks cut k into equal parts and add them up through each other's shared
//              memory. For few tokens, where time is latency.
// Parts are always added in order of k, or with the last one first: results do not vary.
//
// The next kernel of the stream may start at once (griddepcontrol); what this one needs of those before it, x, scales and workspace,
// waits until they are complete, while the ring already fills with weights.
#include "common/types.cuh"
#include "sm90/epilogue.cuh"
#include "sm90/ptx.cuh"
#include "sm90/schedule.cuh"
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
#define STRIPS 1
#define STAGES 4
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
constexpr int META_BYTES = WIDE ? 512 : 1024;   // of one strip and stage
constexpr int STRIP_BYTES = 4096 + META_BYTES;  // of one strip and stage in global memory
constexpr int TILE_STRIPS = WARPGROUPS * STRIPS;
// Where accumulators need more than an equal share of the 65536 registers, setmaxnreg takes them from the producer, which must then be a
// whole warpgroup.
constexpr bool UNEQUAL = STRIPS * TOKENS > 128;
// Whether a tile starts with D = A * B; with small or several accumulators ptxas would then wait after each instruction.
constexpr bool FRESH = STRIPS == 1 && TOKENS > 64;
// Blocks of a cluster share out the tokens when they add up, and write them.
constexpr int SHARES = CUT < TOKENS / 8 ? CUT : TOKENS / 8, SHARE = TOKENS / SHARES;
constexpr int THREADS = 128 * WARPGROUPS + (UNEQUAL ? 128 : 32);
constexpr int CONSUMER_REGISTERS = WARPGROUPS == 3 ? 152 : 232;
constexpr int PRODUCER_REGISTERS = (WARPGROUPS == 3 ? 512 : 504) - WARPGROUPS * CONSUMER_REGISTERS;

typedef Stage<TILE_STRIPS, TOKENS, META_BYTES> StageT;
typedef Rows<OUT, SHARE> RowsT;
typedef SharedMemory<STAGES, StageT, WARPGROUPS, RowsT::BYTES> Shared;
constexpr u32 STRIP_AT = TOKENS * 128, FULL_AT = __builtin_offsetof(Shared, full), EMPTY_AT = __builtin_offsetof(Shared, empty);
static_assert(sizeof(Shared) <= 232448, "shared memory of a block");
static_assert(sizeof(StageT) % 1024 == 0, "swizzled tiles start on whole patterns");
static_assert(SHARE * SHARES == TOKENS && SHARE % 8 == 0, "shares of whole groups of tokens");
static_assert(CUT == 1 || 4 * TOKENS * 64 * TILE_STRIPS <= sizeof(StageT) * STAGES, "parts take the place of the stages");
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

INLINE Problem problem(i64 m, i64 n, i64 stages, i64 streamed, i64 sharers) {
    const int tiles_n = ((int)n + 64 * TILE_STRIPS - 1) / (64 * TILE_STRIPS), tiles_m = ((int)m + TOKENS - 1) / TOKENS;
    return {(int)m, (int)n, (int)stages / BATCH, tiles_n, tiles_n * tiles_m, (int)streamed, (u32)sharers, gridDim.x / CUT};
}
INLINE u32 rank_in_unit() { return CUT == 1 ? 0 : cluster_rank(); }

// A piece of work, and where its tile lies. With CUT, this block's part of k.
struct Piece {
    Work w;
    int tile_n, tile_m;
    INLINE bool next(const Problem& p, Schedule& schedule, u32 rank) {
        if (!schedule.next(w)) return false;
        place<BAND>(p, w.tile, tile_n, tile_m);
        if (CUT > 1) w.first = p.steps * rank / CUT, w.last = p.steps * (rank + 1) / CUT;
        return true;
    }
};

// ---- producer ------------------------------------------------------------------------------------------------------------------
// The copies of all stages of a unit, in order, as slots become empty.
INLINE void load(const Problem& p, u32 shared, const u8* __restrict__ x, const u8* __restrict__ weights) {
    const int strips = (p.n + 63) / 64, rows = (p.m + 7) / 8 * 8;
    bool waited = false;
    int slot = 0, ahead = 0;  // stages whose weights are under way
    u32 parity = 1;           // of a phase that is complete before the first
    Schedule schedule(p, blockIdx.x / CUT);
    for (Piece piece; piece.next(p, schedule, rank_in_unit());) {
        const Work& w = piece.w;
        const int row = piece.tile_m * TOKENS, strip = piece.tile_n * TILE_STRIPS;
        const int x_bytes = min(rows - row, TOKENS) * 128, here = min(strips - strip, TILE_STRIPS);
        const u8* from_x = x + ((i64)w.first * BATCH * rows + row) * 128;
        const u8* from_w = weights + ((i64)strip * p.steps + w.first) * BATCH * STRIP_BYTES;
        auto weights_to = [&](int slot) {
            const u32 full = shared + FULL_AT + 8 * slot;
            mbarrier_arrive_expect_tx(full, x_bytes + here * STRIP_BYTES);
            u32 to = shared + slot * sizeof(StageT) + STRIP_AT;
            const u8* from = from_w;
#pragma unroll 1
            for (int i = 0; i < here; i++, to += STRIP_BYTES, from += (i64)p.steps * BATCH * STRIP_BYTES)
                cp_async_bulk(to, from, STRIP_BYTES, full);
            from_w += STRIP_BYTES;
        };
        int count = (w.last - w.first) * BATCH;
        if (!waited) {
            ahead = min(count, STAGES);
            for (int s = 0; s < ahead; s++) weights_to(s);
            griddepcontrol_wait();
            waited = true;
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
        const u8* __restrict__ weights,     // [strips, stages, STRIP_BYTES], arranged
        const float* __restrict__ scale_x,  // [M], 8-bit types
        const float* __restrict__ scale_w,  // [N], 8-bit types
        const void* __restrict__ bias,      // [N] of bias_type, or null
        i64 bias_type,
        Output<OUT>::Storage* __restrict__ y,  // [M, N]
        i64 y_pitch,                        // elements from row to row
        i64 m_, i64 n_,
        i64 stages_,                        // even
        i64 streamed_, i64 sharers_,        // tiles that are cut along k; blocks that share them
        uint4* __restrict__ parts,          // [gridDim.x, WARPGROUPS, STRIPS, TOKENS / 8, 128] accumulators, if streamed
        u32* __restrict__ arrived)          // [streamed, WARPGROUPS] zeros, and left so
{
    extern __shared__ __align__(1024) u8 raw[];
    const u32 shared = kept(shared_address(raw));
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++)
            mbarrier_init(shared + FULL_AT + 8 * s, 1), mbarrier_init(shared + EMPTY_AT + 8 * s, 4 * WARPGROUPS);
        fence_mbarrier_init();
    }
    __syncthreads();
    griddepcontrol_launch_dependents();

    const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
    if (warpgroup == WARPGROUPS) {
        if (UNEQUAL) setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x % 128 == 0) load(problem(m_, n_, stages_, streamed_, sharers_), shared, x, weights);
        __syncwarp();
        if (CUT > 1) cluster_sync(), cluster_sync();  // as the consumers do
        return;
    }

    // ---- consumers
    if (UNEQUAL) setmaxnreg_inc<CONSUMER_REGISTERS>();
    griddepcontrol_wait();
    const int m = (int)m_, n = (int)n_;
    const Problem p = problem(m_, n_, stages_, streamed_, sharers_);
    const u32 unit = blockIdx.x / CUT, rank = rank_in_unit();
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, g = lane / 4;
    const bool aligned = ((u64)y | (u64)(y_pitch * sizeof(RowsT::Out))) % 16 == 0;
    u8(*const staging)[RowsT::BYTES] = ((Shared*)raw)->staging[warpgroup];
    const u32 my_strips = STRIP_AT + warpgroup * (STRIPS * STRIP_BYTES), my_words = my_strips + 4096 + thread * (WIDE ? 4 : 8);
    int slot = 0, oldest = 0;  // of the stages that are not released
    u32 parity = 0;
    auto release = [&] {
        if (lane == 0) mbarrier_arrive(shared + EMPTY_AT + 8 * oldest);
        oldest = oldest + 1 == STAGES ? 0 : oldest + 1;
    };

    Schedule schedule(p, unit);
    Piece piece;
    bool more = piece.next(p, schedule, rank);
#pragma unroll 1
    while (more) {
        const Work w = piece.w;
        const int tile_m0 = piece.tile_m * TOKENS, share = CUT == 1 ? 0 : min(rank, SHARES - 1) * SHARE, m0 = tile_m0 + share;
        const int n0 = (piece.tile_n * TILE_STRIPS + warpgroup * STRIPS) * 64;

        // what the epilogue needs, asked for now
        TokenScales<SHARE> token;
        float channel[STRIPS][2];
        if (!WIDE) token.load(scale_x, m0, m, lane);
#pragma unroll
        for (int i = 0; i < STRIPS; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = min(n0 + 64 * i + 16 * warp + g + 8 * h, n - 1);
                channel[i][h] = WIDE ? 1.0f : scale_w[row];
            }

        Accumulator acc[STRIPS][TOKENS / 2];
        if (!FRESH)
#pragma unroll
            for (int i = 0; i < STRIPS; i++)
#pragma unroll
                for (int v = 0; v < TOKENS / 2; v++) acc[i][v] = 0;
        // The index words of one step are still being read when those of the next are loaded.
        u32 e[2][BATCH][STRIPS][2];
        int s = w.first;
        auto step = [&](u32 (&index)[BATCH][STRIPS][2]) {
            u32 stage[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                stage[j] = shared + slot * (u32)sizeof(StageT);
                mbarrier_wait(shared + FULL_AT + 8 * slot, parity);
#pragma unroll
                for (int i = 0; i < STRIPS; i++) {
                    const u32 words = stage[j] + my_words + i * STRIP_BYTES;
                    if (WIDE) index[j][i][0] = index[j][i][1] = ld_shared(words);
                    else {
                        const uint2 both = ld_shared2(words);
                        index[j][i][0] = both.x, index[j][i][1] = both.y;
                    }
                }
                if (++slot == STAGES) slot = 0, parity ^= 1;
            }
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                const u64 b = matrix_descriptor<128>(stage[j]);
#pragma unroll
                for (int i = 0; i < STRIPS; i++) {
                    const u64 a = matrix_descriptor<64>(stage[j] + my_strips + i * STRIP_BYTES);
                    Wgmma<DTYPE, TOKENS, 0>::mma(acc[i], a, b, index[j][i][0], !FRESH || j > 0 || s > w.first);
                    Wgmma<DTYPE, TOKENS, WIDE>::mma(acc[i], a + 2, b + 4, index[j][i][1], 1);
                }
            }
            wgmma_commit_group();
            wgmma_wait_group<1>();  // those before are read
            if (s > w.first)
#pragma unroll
                for (int j = 0; j < BATCH; j++) release();
        };
#pragma unroll 1
        while (true) {
            step(e[0]);
            if (++s == w.last) break;
            step(e[1]);
            if (++s == w.last) break;
        }
        more = piece.next(p, schedule, rank);
        wgmma_wait_group<0>();
#pragma unroll
        for (int j = 0; j < BATCH; j++) release();

        // scales, bias, rounding, and out
        auto finish = [&](auto& total) {
            if constexpr (sizeof(total[0]) == sizeof(Accumulator) * SHARE / 2) {
                const bool whole = aligned && m0 + SHARE <= m && n0 + 64 * STRIPS <= n;
#pragma unroll
                for (int i = 0; i < STRIPS; i++) {
                    float offset[2] = {};
                    if (bias)
#pragma unroll
                        for (int h = 0; h < 2; h++)
                            offset[h] = load_float(bias, min(n0 + 64 * i + 16 * warp + g + 8 * h, n - 1), bias_type);
                    auto write = [&](auto biased, auto inside) {
                        write_rows<OUT, SHARE, !WIDE, decltype(biased)::value, decltype(inside)::value>(
                            total[i], token, channel[i], offset, y, y_pitch, aligned, m0, n0 + 64 * i, m, n, staging,
                            i * RowsT::CHUNKS % 2, thread, 1 + warpgroup);
                    };
                    if (bias) whole ? write(Flag<true>(), Flag<true>()) : write(Flag<true>(), Flag<false>());
                    else whole ? write(Flag<false>(), Flag<true>()) : write(Flag<false>(), Flag<false>());
                }
                if (STRIPS * RowsT::CHUNKS % 2) warpgroup_sync(1 + warpgroup);  // the next tile starts with the buffer last read
            }
        };
        // Accumulators as parts: 16 bytes of thread t at [strip][group of tokens][t].
        constexpr int PART = STRIPS * (TOKENS / 8) * 128;  // of a warpgroup, in 16 bytes
        auto store_part = [&](uint4* part) {
#pragma unroll
            for (int i = 0; i < STRIPS; i++)
#pragma unroll
                for (int v = 0; v < TOKENS / 2; v += 4)
                    part[(i * (TOKENS / 8) + v / 4) * 128 + thread] =
                        make_uint4(as_bits(acc[i][v]), as_bits(acc[i][v + 1]), as_bits(acc[i][v + 2]), as_bits(acc[i][v + 3]));
        };

        if constexpr (CUT > 1) {
            threads_sync<128 * WARPGROUPS>(1 + WARPGROUPS);  // everybody has read the stages, where the parts go
            store_part((uint4*)raw + warpgroup * PART);
            cluster_sync();
            Accumulator sum[STRIPS][SHARE / 2];
            const u32 mine = shared + 16 * (warpgroup * PART + thread);
#pragma unroll
            for (u32 r = 0; r < CUT; r++) {
                const u32 part = mapa(mine, r) + share / 8 * 2048;
#pragma unroll
                for (int i = 0; i < STRIPS; i++)
#pragma unroll
                    for (int v = 0; v < SHARE / 2; v += 4) {
                        const uint4 add = ld_shared_cluster(part + (i * (TOKENS / 8) + v / 4) * 2048);
                        const u32 bits[4] = {add.x, add.y, add.z, add.w};
#pragma unroll
                        for (int c = 0; c < 4; c++) sum[i][v + c] = r == 0 ? from_bits(bits[c]) : sum[i][v + c] + from_bits(bits[c]);
                    }
            }
            cluster_arrive();
            if (rank < SHARES) finish(sum);
            cluster_wait();  // nobody reads this block's part any more
        } else {
            const int cut = w.tile - p.whole();  // which of the streamed tiles
            u32* const counter = arrived + cut * WARPGROUPS + warpgroup;
            auto part_of = [&](u32 u) { return parts + ((i64)u * WARPGROUPS + warpgroup) * PART; };
            if (w.last < p.steps) {  // a part, for whoever holds the last steps
                store_part(part_of(unit));
                __threadfence();
                warpgroup_sync(1 + warpgroup);
                if (thread == 0) red_add_release(counter, 1);
            } else {
                if (w.first > 0) {
                    const u32 head = p.holder(cut * p.steps);
                    if (thread == 0) {
                        while (ld_acquire(counter) != unit - head) {}
                        *counter = 0;
                    }
                    warpgroup_sync(1 + warpgroup);
                    for (u32 u = head; u < unit; u++) {
                        const uint4* part = part_of(u) + thread;
#pragma unroll
                        for (int i = 0; i < STRIPS; i++)
#pragma unroll
                            for (int v = 0; v < TOKENS / 2; v += 4) {
                                const uint4 add = ld_global_cg(part + (i * (TOKENS / 8) + v / 4) * 128);
                                acc[i][v] += from_bits(add.x), acc[i][v + 1] += from_bits(add.y);
                                acc[i][v + 2] += from_bits(add.z), acc[i][v + 3] += from_bits(add.w);
                            }
                    }
                }
                finish(acc);
            }
        }
    }
}
