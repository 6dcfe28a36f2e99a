// y[m, n] = x[m, k] @ w[n, k].T with (2N-2):2N weights on the sparse tensor cores of sm_90, through wgmma.mma_async.sp.
//
// Weights are the sparse operand A (64 outputs a strip), slid activations the dense operand B; both stand in global memory as the
// images that shared memory wants (arch/sm90_layout.py, arch/operand.py), so every copy is one contiguous bulk copy:
//
//   producer   one thread: global --cp.async.bulk--> ring of STAGES stages, 128 slid bytes along k each
//   consumers  WARPGROUPS warpgroups, a strip each: wait full --> 2 wgmma a stage --> release the stages before
//
// Three warpgroups of more than 192 tokens leave no registers for a producer (SELF): whichever consumer warp is the last to have read a
// stage asks for the next one in its place.
//
// A unit does one tile after another. With CUT == 1 it is a block. Otherwise it is a cluster that has one tile: its blocks cut k into
// equal parts and send them to each other's shared memory, where they are added up in order. That is for what whole tiles leave
// processors idle: few tokens, and the last, half-empty round of many.
//
// The next kernel of the stream may start near the end of this one (griddepcontrol; see LATE). What that one needs of
// those before it, x and its scales, waits until they are complete, while its ring already fills with weights.
#include "common/types.cuh"
#include "sm90/epilogue.cuh"
#include "sm90/index.cuh"
#include "sm90/ptx.cuh"
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
// Stages of a step, which a warpgroup multiplies at once while the step before is under way: small instructions are bound by latency.
#ifndef BATCH
#define BATCH (TOKENS > 64 ? 1 : 2)
#endif
#ifndef THREADS
#define THREADS (CONSUMERS + PRODUCERS)  // of a block
#endif
#ifndef SHARED_BYTES
#define SHARED_BYTES USED_BYTES  // dynamic
#endif

constexpr bool WIDE = DTYPE == TYPE_BFLOAT16 || DTYPE == TYPE_FLOAT16;
typedef Index<WINDOWS, WIDE> IndexT;
constexpr int VALUE_BYTES = 4096, INDEX_BYTES = IndexT::BYTES;  // of one strip and stage
constexpr bool SELF = WARPGROUPS == 3 && TOKENS > 192;
// Where accumulators need more than an equal share of the 65536 registers, setmaxnreg takes them from the producer, which must then be a
// whole warpgroup. ptxas has instructions keep to the equal share, 128 with four warpgroups: 192 tokens are the most that fit.
constexpr bool UNEQUAL = !SELF && (TOKENS > 128 || WARPGROUPS == 3);
constexpr int CONSUMERS = 128 * WARPGROUPS, PRODUCERS = SELF ? 0 : UNEQUAL ? 128 : 32;  // threads
constexpr int PRODUCER_REGISTERS = WARPGROUPS == 3 ? 32 : 40, CONSUMER_REGISTERS = WARPGROUPS == 3 ? 160 : 232;
// Whether a tile starts with D = A * B; with small accumulators, and before CUDA 12.9, ptxas would then wait after each instruction.
constexpr bool FRESH = TOKENS > 64 && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1209;
// Whether the second-level cache shall evict activations last: of many tokens, they are read again for every band of tiles, between
// weights and y, which stream through. Tiles of 192 outputs gained nothing (docs/hopper.md).
constexpr bool KEPT = TOKENS == 256 && !SELF;
// Sums that the stages of a step go to in turn, so that small instructions need not wait for each other.
constexpr int CHAINS = BATCH;
// What a kernel asks memory for all at once delays everything else that is asked for, even what the second-level cache holds. So the next
// kernel starts when this one has so many stages left to ask for; and until all before it is complete, it asks for part of its ring.
constexpr int LATE = 4, FILL = TOKENS > 64 ? STAGES : WARPGROUPS == 1 ? 9 : 6;
// As many blocks of a cluster as a power of two allows share out the tokens when they add up, and write them.
constexpr int POWER = CUT >= 8 ? 8 : CUT >= 4 ? 4 : CUT >= 2 ? 2 : 1;
constexpr int SHARES = POWER < TOKENS / 8 ? POWER : TOKENS / 8, SHARE = TOKENS / SHARES;
constexpr bool LEAN = SELF && TOKENS == 256;  // no registers for the epilogue, either
constexpr int PORTION = LEAN ? 64 : CUT == 1 ? TOKENS : SHARE > 64 ? SHARE / 2 : SHARE;  // tokens that a block writes at a time
typedef Rows<OUT, PORTION> RowsT;

// Shared memory: a ring of stages; rows of y on their way out (epilogue.cuh); barriers; nibbles of every code (index.cuh); and, of a
// cluster, two barriers and the parts that come in. A stage is
//   slid activations [TOKENS][128]; 128-byte swizzle: byte b of row r at b ^ (r % 8) * 16
//   kept weights [WARPGROUPS][64][64]; 64-byte swizzle: byte b of row r at b ^ (r / 2 % 4) * 16
//   codes, or index words in the order of threads [WARPGROUPS][INDEX_BYTES]
constexpr u32 VALUES_AT = TOKENS * 128, INDEX_AT = VALUES_AT + WARPGROUPS * VALUE_BYTES;
constexpr u32 STAGE_BYTES = (INDEX_AT + WARPGROUPS * INDEX_BYTES + 1023) / 1024 * 1024;  // swizzled tiles start on whole patterns
constexpr u32 STAGING_AT = STAGES * STAGE_BYTES, STAGING_BYTES = 2 * RowsT::BYTES;  // of a warpgroup
constexpr u32 FULL_AT = STAGING_AT + WARPGROUPS * STAGING_BYTES, EMPTY_AT = FULL_AT + 8 * STAGES;
constexpr u32 TABLE_AT = EMPTY_AT + 8 * STAGES;
constexpr u32 PARTS = CUT == 1 ? 0 : 4 * CUT * SHARE * 64 * WARPGROUPS;  // bytes
constexpr bool APART = PARTS <= 16384;  // parts have memory of their own; else they replace the stages, once those are read
constexpr u32 COME_AT = (TABLE_AT + 4 * IndexT::CODES + 15) / 16 * 16, READY_AT = COME_AT + 8;  // barriers: parts are there; may be sent
constexpr u32 PARTS_AT = APART ? READY_AT + 8 : 0;
// Two barriers and what aligns them take 32 bytes at most.
constexpr u32 USED_BYTES = (TABLE_AT + 4 * IndexT::CODES + (CUT == 1 ? 0 : 32 + (APART ? PARTS : 0)) + 1023) / 1024 * 1024;
static_assert(COME_AT + (CUT == 1 ? 0 : 16 + (APART ? PARTS : 0)) <= USED_BYTES && USED_BYTES <= 232448, "shared memory of a block");
static_assert(THREADS == CONSUMERS + PRODUCERS && SHARED_BYTES == USED_BYTES, "the host launches what this file describes");
static_assert(SHARE * SHARES == TOKENS && SHARE % PORTION == 0 && PORTION % 8 == 0, "portions of whole groups of tokens");
static_assert(APART || PARTS <= STAGING_AT, "parts take the place of the stages");
static_assert(STAGES > 2 * BATCH, "the producer must have a slot to fill");
static_assert(!SELF || (CUT == 1 && BATCH == 1 && TOKENS > 64), "tiles that load their stages by themselves");

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
    int band;                     // tiles of n that run together with all tiles of m
};

// A tile, and this block's part of k: steps first ... last - 1. Tiles run in bands of so many tiles of n, so that blocks at work together
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
        const int before = tile / (p.band * tiles_m) * p.band, inside = tile - before * tiles_m, width = min(tiles_n - before, p.band);
        strip = p.first_strip + (before + inside % width) * WARPGROUPS, tile_m = inside / width;
        if (WARPGROUPS == 3) strip = min(strip, p.last_strip - WARPGROUPS);  // strips are padded to pairs: the last two tiles may share some
    }
};

// A launch may be followed by another one that does the rest of the tiles.
enum Order { ALONE, BEFORE_REST, REST };

// ---- copies --------------------------------------------------------------------------------------------------------------------
struct Operands {
    const u8 *x, *values, *index;
    u32 shared;
    int rows, strips;

    INLINE Operands(const Problem& p, const u8* x, const u8* values, const u8* index, u32 shared)
        : x(x), values(values), index(index), shared(shared), rows((p.m + 7) / 8 * 8), strips((p.n + 127) / 128 * 2) {}
    INLINE u32 full(int slot) const { return shared + FULL_AT + 8 * slot; }
    INLINE u32 x_bytes(const Piece& piece) const { return min(rows - piece.tile_m * TOKENS, TOKENS) * 128; }

    // Announces a whole stage, and asks for its weights.
    INLINE void weights(const Piece& piece, int stage, int slot) const {
        mbarrier_arrive_expect_tx(full(slot), x_bytes(piece) + WARPGROUPS * (VALUE_BYTES + INDEX_BYTES));
        const u32 to = shared + slot * STAGE_BYTES;
        const i64 strip = (i64)stage * strips + piece.strip;
        cp_async_bulk(to + VALUES_AT, values + strip * VALUE_BYTES, WARPGROUPS * VALUE_BYTES, full(slot));
        cp_async_bulk(to + INDEX_AT, index + strip * INDEX_BYTES, WARPGROUPS * INDEX_BYTES, full(slot));
    }
    INLINE void activations(const Piece& piece, int stage, int slot) const {
        const i64 row = (i64)stage * rows + piece.tile_m * TOKENS;
        const u32 to = shared + slot * STAGE_BYTES;
        if (KEPT) cp_async_bulk_kept(to, x + row * 128, x_bytes(piece), full(slot));
        else cp_async_bulk(to, x + row * 128, x_bytes(piece), full(slot));
    }
};

// The producer: the copies of all stages, in order, as slots become empty.
INLINE void load(const Problem& p, i64 begin, Order order, const Operands& operands) {
    int slot = 0;
    u32 parity = 1;  // of a phase that is complete before the first
    int ahead = -1;  // stages whose weights are under way
    for (Piece piece(p, begin); piece.tile < p.end; piece.next(p)) {
        const int first = piece.first * BATCH, last = piece.last * BATCH;
        if (ahead < 0) {
            ahead = min(last - first, FILL < STAGES ? FILL : STAGES);
#pragma unroll 1
            for (int s = 0; s < ahead; s++) operands.weights(piece, first + s, s);
            if (order != REST) griddepcontrol_wait();
            if (order == BEFORE_REST) griddepcontrol_launch_dependents();  // blocks of the rest take the places of those that are done
        }
        const bool ends = order != BEFORE_REST && piece.tile + gridDim.x / CUT >= p.end;
#pragma unroll 1
        for (int stage = first; stage < last; stage++) {
            mbarrier_wait(operands.shared + EMPTY_AT + 8 * slot, parity);
            if (ends && stage == max(first, last - 1 - LATE)) griddepcontrol_launch_dependents();
            if (ahead > 0) ahead--;
            else operands.weights(piece, stage, slot);
            operands.activations(piece, stage, slot);
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
        i64 order,                          // of this launch
        i64 band)
{
    extern __shared__ __align__(1024) u8 raw[];
    const u32 shared = kept(shared_address(raw));
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            mbarrier_init(shared + FULL_AT + 8 * s, 1);
            if (SELF) st_shared(shared + EMPTY_AT + 8 * s, 0);  // counts warps
            else mbarrier_init(shared + EMPTY_AT + 8 * s, CONSUMERS / 32);
        }
        if (CUT > 1) {
            mbarrier_init(shared + COME_AT, 1), mbarrier_init(shared + READY_AT, SHARES);
            mbarrier_arrive_expect_tx(shared + COME_AT, PARTS);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    if (CUT > 1) cluster_arrive_relaxed();  // its barriers are there

    const int m = (int)m_, n = (int)n_;
    const Problem p = {m, n, (int)stages, (int)first_strip, (int)last_strip, (int)end, (int)band};
    const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
    const Operands operands(p, x, values, index, shared);
    if (!SELF && warpgroup == WARPGROUPS) {
        if (UNEQUAL) setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x % 128 == 0) load(p, begin, (Order)order, operands);
        return;
    }

    // ---- consumers
    if (UNEQUAL) setmaxnreg_inc<CONSUMER_REGISTERS>();
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, g = lane / 4;
    const u32 table = shared + TABLE_AT;
    if (WINDOWS) {
        IndexT::fill(table, threadIdx.x, CONSUMERS);
        threads_sync<CONSUMERS>(1 + WARPGROUPS);
    }
    if (order != REST) griddepcontrol_wait();
    const bool aligned = ((u64)y | (u64)(y_pitch * sizeof(RowsT::Out))) % 16 == 0;
    u8* const staging = raw + STAGING_AT + warpgroup * STAGING_BYTES;
    const u32 my_values = VALUES_AT + warpgroup * VALUE_BYTES;
    IndexT index_of(table, INDEX_AT + warpgroup * INDEX_BYTES, thread);
    int slot = 0, oldest = 0;  // of the stages that are not released
    u32 parity = 0;

    Piece piece(p, begin), after = piece;  // this tile, and the next
    if (SELF) {
        if (order == BEFORE_REST) griddepcontrol_launch_dependents();
        if (threadIdx.x == 0)
            for (int s = 0; s < STAGES; s++) operands.weights(piece, s, s), operands.activations(piece, s, s);
        __syncwarp();
    }
    // This warp has read the oldest stage, number `stage` of the tile.
    auto release = [&](int stage) {
        const u32 empty = shared + EMPTY_AT + 8 * oldest;
        if (SELF) {
            if (lane == 0 && atom_inc_shared(empty, CONSUMERS / 32 - 1) == CONSUMERS / 32 - 1) {
                const int next = stage + STAGES;
                if (next < p.stages) operands.weights(piece, next, oldest), operands.activations(piece, next, oldest);
                else if (after.tile < p.end)
                    operands.weights(after, next - p.stages, oldest), operands.activations(after, next - p.stages, oldest);
            }
            __syncwarp();
        } else if (lane == 0) mbarrier_arrive(empty);
        oldest = oldest + 1 == STAGES ? 0 : oldest + 1;
    };

#pragma unroll 1
    while (piece.tile < p.end) {
        const int m0 = piece.tile_m * TOKENS, n0 = (piece.strip + warpgroup) * 64;
        if (CUT == 1) after.next(p);

        // what the epilogue needs, asked for now unless registers are short
        const int share = CUT == 1 ? 0 : cluster_rank() * SHARE;  // the first of the tokens that this block adds up and writes
        TokenScales<PORTION> token;
        float channel[2] = {1, 1}, offset[2] = {};
        auto ask = [&] {
            if (!WIDE) token.load(scale_x, m0 + share, m, lane);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int output = min(n0 + 16 * warp + g + 8 * h, n - 1);
                if (!WIDE) channel[h] = scale_w[output];
                if (bias) offset[h] = load_float(bias, output, bias_type);
            }
        };
        if (!SELF) ask();

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
                stage[j] = shared + slot * STAGE_BYTES;
                mbarrier_wait(operands.full(slot), parity);
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
                for (int j = 0; j < BATCH; j++) release(s - 1);
        };
#pragma unroll 1
        while (true) {
            step(e[0]);
            if (++s == last) break;
            step(e[1]);
            if (++s == last) break;
        }
        wgmma_wait_group<0>();
#pragma unroll
        for (int j = 0; j < BATCH; j++) release(last - 1);
        if (SELF) ask();
#pragma unroll
        for (int c = 1; c < CHAINS; c++)
#pragma unroll
            for (int v = 0; v < TOKENS / 2; v++) acc[0][v] += acc[c][v];

        // scales, bias, rounding, and out
        auto finish = [&](const Accumulator (&total)[PORTION / 2], int m0) {
            auto write = [&](auto biased, auto whole) {
                write_rows<OUT, PORTION, LEAN, !WIDE, decltype(biased)::value, decltype(whole)::value>(
                    total, token, channel, offset, y, y_pitch, aligned, m0, n0, m, n, staging, thread, 1 + warpgroup);
            };
            const bool whole = aligned && m0 + PORTION <= m && n0 + 64 <= n;
            if (bias) whole ? write(Flag<true>(), Flag<true>()) : write(Flag<true>(), Flag<false>());
            else whole ? write(Flag<false>(), Flag<true>()) : write(Flag<false>(), Flag<false>());
        };
        if constexpr (CUT == 1) {
#pragma unroll
            for (int at = 0; at < TOKENS; at += PORTION) {
                const bool more = !WIDE && at + PORTION < TOKENS, early = OUT != TYPE_FLOAT32;  // which leaves no registers
                TokenScales<PORTION> later;
                if (more && early) later.load(scale_x, m0 + at + PORTION, m, lane);
                finish((const Accumulator (&)[PORTION / 2])acc[0][at / 2], m0 + at);
                if (more && !early) later.load(scale_x, m0 + at + PORTION, m, lane);
                if (more) token = later;
            }
            piece = after;
        } else {
            // Parts go to the blocks that add them up: 16 bytes of a thread at [from][warpgroup][group of tokens][thread]. Stores that
            // count on the receiver's barrier; cluster barriers would wait for all memory, behind what the next kernel reads ahead.
            constexpr u32 GROUP = 128 * 16, FROM = WARPGROUPS * (SHARE / 8) * GROUP;
            const u32 rank = cluster_rank(), parts = shared + PARTS_AT + warpgroup * (SHARE / 8) * GROUP + thread * 16;
            cluster_wait();  // all blocks have started
            if (!APART) {
                threads_sync<CONSUMERS>(1 + WARPGROUPS);
                if (rank < SHARES && threadIdx.x < CUT) mbarrier_arrive_cluster(mapa(shared + READY_AT, threadIdx.x));
                mbarrier_wait_cluster(shared + READY_AT, 0);
            }
#pragma unroll
            for (u32 to = 0; to < SHARES; to++) {
                const u32 there = mapa(parts, to) + rank * FROM, come = mapa(shared + COME_AT, to);
#pragma unroll
                for (int v = to * SHARE / 2; v < (to + 1) * SHARE / 2; v += 4)
                    st_async(there + (v - to * SHARE / 2) / 4 * GROUP, come, as_bits(acc[0][v]), as_bits(acc[0][v + 1]),
                             as_bits(acc[0][v + 2]), as_bits(acc[0][v + 3]));
            }
            if (rank < SHARES) {
                mbarrier_wait_cluster(shared + COME_AT, 0);
#pragma unroll 1
                for (int at = 0; at < SHARE; at += PORTION) {
                    if (!WIDE && at > 0) token.load(scale_x, m0 + share + at, m, lane);
                    Accumulator sum[PORTION / 2];
#pragma unroll
                    for (u32 r = 0; r < CUT; r++) {
#pragma unroll
                        for (int v = 0; v < PORTION / 2; v += 4) {
                            const uint4 add = ld_shared4(parts + r * FROM + (at / 8 + v / 4) * GROUP);
                            const u32 bits[4] = {add.x, add.y, add.z, add.w};
#pragma unroll
                            for (int c = 0; c < 4; c++) sum[v + c] = r == 0 ? from_bits(bits[c]) : sum[v + c] + from_bits(bits[c]);
                        }
                    }
                    finish(sum, m0 + share + at);
                }
            }
            break;
        }
    }
    if (order == REST) griddepcontrol_wait();  // so that whoever waits for this launch has waited for the one before
}
