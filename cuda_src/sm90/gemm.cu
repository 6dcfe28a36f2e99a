// y[m, n] = x[m, k] @ w[n, k].T with (2N-2):2N weights on the sparse tensor cores of sm_90, through wgmma.mma_async.sp.
//
// Weights are the sparse operand A (64 outputs a strip), slid activations the dense operand B; both stand in global memory as the
// images that shared memory wants (arch/sm90.py), so every copy is one contiguous bulk copy:
//
//   producer   one thread: global --cp.async.bulk--> ring of STAGES stages, 128 slid bytes along k each
//   consumers  WARPGROUPS warpgroups, STRIPS strips each: wait full --> 2 wgmma a strip --> release the stage before
//
// A thread block is one of gridDim.x that share out all the work. The first `streamed` tiles are cut along k into equal ranges, one
// a block, so that no processor idles in a last, half-empty round; a tile that several blocks share is summed by the one that
// finishes last, part by part in order, so that results do not vary. The other tiles are whole, one after another.
#include "common/types.cuh"
#include "sm90/ptx.cuh"
#include "sm90/smem.cuh"

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

constexpr bool WIDE = DTYPE == TYPE_BFLOAT16 || DTYPE == TYPE_FLOAT16;
constexpr int META_BYTES = WIDE ? 512 : 1024;           // of one strip and stage
constexpr int STRIP_BYTES = 4096 + META_BYTES;          // of one strip and stage in global memory
constexpr int TILE_STRIPS = WARPGROUPS * STRIPS, TILE_N = 64 * TILE_STRIPS;
constexpr int THREADS = 128 * (WARPGROUPS + 1);
// The register file holds 65536: setmaxnreg takes them from the producer and shares them among the consumers.
constexpr int PRODUCER_REGISTERS = WARPGROUPS == 3 ? 32 : 40, CONSUMER_REGISTERS = WARPGROUPS == 3 ? 160 : 232;

typedef Stage<TILE_STRIPS, TOKENS, META_BYTES> StageT;
typedef SharedMemory<STAGES, StageT, WARPGROUPS> Shared;
static_assert(sizeof(Shared) <= 232448, "shared memory of a block");
static_assert(sizeof(StageT) % 1024 == 0, "swizzled tiles start on whole patterns");

template <class T> INLINE T bits_as(u32 v) { return (T)v; }
template <> INLINE float bits_as<float>(u32 v) { return __uint_as_float(v); }
#if DTYPE == TYPE_INT8
typedef int Accumulator;
INLINE float as_float(int v) { return __int2float_rn(v); }
INLINE u32 as_bits(int v) { return (u32)v; }
INLINE int from_bits(u32 v) { return (int)v; }
#else
typedef float Accumulator;
INLINE float as_float(float v) { return v; }
INLINE u32 as_bits(float v) { return __float_as_uint(v); }
INLINE float from_bits(u32 v) { return __uint_as_float(v); }
#endif

// ---- which tiles, and which part of k ----------------------------------------------------------------------------------------
struct Work {
    int tile, first, last;  // stages first ... last - 1 along k
};

struct Problem {
    int m, n, stages, tiles_n, tiles, streamed;
    // Blocks share streamed * stages stages; block b starts at:
    INLINE u32 range_start(u32 b) const { return b * (u32)(streamed * stages) / gridDim.x; }
    // the block whose range holds a stage
    INLINE u32 holder(u32 stage) const { return ((stage + 1) * gridDim.x - 1) / (u32)(streamed * stages); }
};

// The pieces of this block's work, in order: first its range of the streamed tiles, then whole tiles.
struct Schedule {
    const Problem& p;
    int at, end, tile;

    INLINE Schedule(const Problem& p)
        : p(p), at(p.range_start(blockIdx.x)), end(p.range_start(blockIdx.x + 1)), tile(p.streamed + blockIdx.x) {}
    INLINE bool next(Work& w) {
        if (at < end) {
            w.tile = at / p.stages;
            w.first = at - w.tile * p.stages;
            w.last = min(w.first + end - at, p.stages);
            at += w.last - w.first;
            return true;
        }
        w.tile = tile, w.first = 0, w.last = p.stages;
        tile += gridDim.x;
        return w.tile < p.tiles;
    }
};

// Tiles run in bands of BAND tiles of n, so that blocks at work together share weights and activations in the L2 cache.
#ifndef BAND
#define BAND 16
#endif
INLINE void place(const Problem& p, int tile, int& tile_n, int& tile_m) {
    const int tiles_m = p.tiles / p.tiles_n, band = tile / (BAND * tiles_m), inside = tile % (BAND * tiles_m);
    const int width = min(p.tiles_n - BAND * band, BAND);
    tile_n = BAND * band + inside % width, tile_m = inside / width;
}

// ---- the kernel ----------------------------------------------------------------------------------------------------------------
extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm(
    const u8* __restrict__ x,           // [stages, ceil(M / 8), 8, 128] swizzled image of slid activations
    const u8* __restrict__ weights,     // [strips, stages, STRIP_BYTES], arranged
    const float* __restrict__ scale_x,  // [M], 8-bit types
    const float* __restrict__ scale_w,  // [N], 8-bit types
    const void* __restrict__ bias,      // [N] of bias_type, or null
    i64 bias_type,
    Output<OUT>::Storage* __restrict__ y,  // [M, N]
    i64 y_pitch,                        // elements from row to row
    i64 m_, i64 n_, i64 stages_,
    i64 streamed_,                      // tiles that are cut along k
    uint4* __restrict__ parts,          // [2 * gridDim.x, WARPGROUPS, STRIPS * TOKENS / 8, 128] accumulators, if streamed
    u32* __restrict__ arrived)          // [streamed, WARPGROUPS] zeros, and left so
{
    extern __shared__ __align__(1024) u8 raw[];
    Shared& shared = *(Shared*)raw;
    const int m = (int)m_, n = (int)n_, stages = (int)stages_, streamed = (int)streamed_;
    const int tiles_n = (n + TILE_N - 1) / TILE_N, tiles_m = (m + TOKENS - 1) / TOKENS;
    const Problem problem = {m, n, stages, tiles_n, tiles_n * tiles_m, streamed};
    const int strips = (n + 63) / 64, rows = (m + 7) / 8 * 8;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) mbarrier_init(shared.full[s], 1), mbarrier_init(shared.empty[s], 4 * WARPGROUPS);
        fence_mbarrier_init();
    }
    __syncthreads();

    const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
    if (warpgroup == WARPGROUPS) {  // ---- producer
        setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x % 128 == 0) {
            const i64 strip_pitch = (i64)stages * STRIP_BYTES;
            int slot = 0;
            u32 parity = 1;  // of a phase that is complete before the first
            Schedule schedule(problem);
            for (Work w; schedule.next(w);) {
                int tile_n, tile_m;
                place(problem, w.tile, tile_n, tile_m);
                const int row = tile_m * TOKENS, strip = tile_n * TILE_STRIPS;
                const int x_bytes = min(rows - row, TOKENS) * 128, here = min(strips - strip, TILE_STRIPS);
                const u8* from_x = x + ((i64)w.first * rows + row) * 128;
                const u8* from_w = weights + strip * strip_pitch + w.first * STRIP_BYTES;
                for (int s = w.first; s < w.last; s++, from_x += (i64)rows * 128, from_w += STRIP_BYTES) {
                    StageT& stage = shared.stage[slot];
                    u64& full = shared.full[slot];
                    mbarrier_wait(shared.empty[slot], parity);
                    mbarrier_arrive_expect_tx(full, x_bytes + here * STRIP_BYTES);
                    cp_async_bulk(stage.x, from_x, x_bytes, full);
                    const u8* from = from_w;
#pragma unroll 1
                    for (int i = 0; i < here; i++, from += strip_pitch) cp_async_bulk(stage.strip[i], from, STRIP_BYTES, full);
                    if (++slot == STAGES) slot = 0, parity ^= 1;
                }
            }
        }
        return;
    }

    // ---- consumers
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    const int thread = threadIdx.x % 128, warp = thread / 32, g = thread % 32 / 4, q = thread % 4;
    int slot = 0;
    u32 parity = 0;
    Schedule schedule(problem);
#pragma unroll 1
    for (Work w; schedule.next(w);) {
        Accumulator acc[STRIPS][TOKENS / 2];
#pragma unroll
        for (int i = 0; i < STRIPS; i++)
#pragma unroll
            for (int v = 0; v < TOKENS / 2; v++) acc[i][v] = 0;
        u32 e[2][STRIPS][2];
        int s = w.first, before = 0;  // slot of the stage before

        auto step = [&](u32 (&index)[STRIPS][2]) {
            StageT& stage = shared.stage[slot];
            mbarrier_wait(shared.full[slot], parity);
#pragma unroll
            for (int i = 0; i < STRIPS; i++) {
                const u8* meta = stage.strip[warpgroup * STRIPS + i] + 4096;
                if (WIDE) index[i][0] = index[i][1] = ((const u32*)meta)[thread];
                else {
                    const uint2 both = ((const uint2*)meta)[thread];
                    index[i][0] = both.x, index[i][1] = both.y;
                }
            }
            const u64 b = matrix_descriptor<128>(stage.x);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < STRIPS; i++) {
                const u64 a = matrix_descriptor<64>(stage.strip[warpgroup * STRIPS + i]);
                Wgmma<DTYPE, TOKENS, 0>::mma(acc[i], a, b, index[i][0]);
                Wgmma<DTYPE, TOKENS, WIDE>::mma(acc[i], a + 2, b + 4, index[i][1]);
            }
            wgmma_commit_group();
            wgmma_wait_group<1>();  // the stage before is read
            if (s > w.first && thread % 32 == 0) mbarrier_arrive(shared.empty[before]);
            before = slot;
            if (++slot == STAGES) slot = 0, parity ^= 1;
        };
#pragma unroll 1
        while (true) {  // the index words of one stage are still being read when those of the next are loaded
            step(e[0]);
            if (++s == w.last) break;
            step(e[1]);
            if (++s == w.last) break;
        }
        wgmma_wait_group<0>();
        if (thread % 32 == 0) mbarrier_arrive(shared.empty[before]);

        int tile_n, tile_m;
        place(problem, w.tile, tile_n, tile_m);
        if (w.last - w.first < stages) {  // a part of a tile: whoever comes last adds them all, in order
            constexpr i64 PART = STRIPS * (TOKENS / 8) * 128;
            const u32 begin = w.tile * stages, head = problem.holder(begin), tail = problem.holder(begin + stages - 1);
            auto part_of = [&](u32 block) {  // the first tile of a block's range in its slot 0, the last one in slot 1
                const i64 at = 2 * block + (problem.range_start(block) < begin);
                return parts + (at * WARPGROUPS + warpgroup) * PART + thread;
            };
            uint4* mine = part_of(blockIdx.x);
#pragma unroll
            for (int i = 0; i < STRIPS; i++)
#pragma unroll
                for (int v = 0; v < TOKENS / 2; v += 4)
                    mine[(i * (TOKENS / 8) + v / 4) * 128] =
                        make_uint4(as_bits(acc[i][v]), as_bits(acc[i][v + 1]), as_bits(acc[i][v + 2]), as_bits(acc[i][v + 3]));
            __threadfence();
            warpgroup_sync(1 + warpgroup);
            u32* counter = arrived + w.tile * WARPGROUPS + warpgroup;
            if (thread == 0) shared.seen[warpgroup] = atomicAdd(counter, 1);
            warpgroup_sync(1 + warpgroup);
            if (shared.seen[warpgroup] != tail - head) continue;
            __threadfence();
            if (thread == 0) *counter = 0;
#pragma unroll
            for (int i = 0; i < STRIPS; i++)
#pragma unroll
                for (int v = 0; v < TOKENS / 2; v++) acc[i][v] = 0;
            for (u32 block = head; block <= tail; block++) {
                const uint4* part = part_of(block);
#pragma unroll
                for (int i = 0; i < STRIPS; i++)
#pragma unroll
                    for (int v = 0; v < TOKENS / 2; v += 4) {
                        uint4 add = ld_global_cg(part + (i * (TOKENS / 8) + v / 4) * 128);
                        acc[i][v] += from_bits(add.x), acc[i][v + 1] += from_bits(add.y);
                        acc[i][v + 2] += from_bits(add.z), acc[i][v + 3] += from_bits(add.w);
                    }
            }
        }

        // Epilogue: 32 tokens at a time through the warpgroup's staging rows, out in 16-byte pieces of y.
        typedef Output<OUT>::Storage Out;
        constexpr int VECTOR = 16 / sizeof(Out), PIECES = 64 / VECTOR;  // pieces of 16 bytes in a row of 64 outputs
        constexpr int CHUNK = TOKENS < 32 || STRIPS * TOKENS > 320 ? 16 : 32;  // fewer registers where accumulators hold most
        u8* const staging = shared.staging[warpgroup].buffer[0];
        const int m0 = tile_m * TOKENS, lane = thread % 32;
        const bool aligned = ((u64)y | (u64)(y_pitch * sizeof(Out))) % 16 == 0;
        const int to_row = thread / PIECES, to_piece = thread % PIECES;
        float next_token[CHUNK / 8][2];
        auto load_tokens = [&](int chunk) {
#pragma unroll
            for (int j = 0; j < CHUNK / 8; j++)
#pragma unroll
                for (int c = 0; c < 2; c++)
                    next_token[j][c] = WIDE ? 1.0f : scale_x[min(m0 + chunk * CHUNK + 8 * j + 2 * q + c, m - 1)];
        };
#pragma unroll
        for (int i = 0; i < STRIPS; i++) {
            load_tokens(0);
            const int strip_n = tile_n * TILE_N + (warpgroup * STRIPS + i) * 64, to_n = strip_n + to_piece * VECTOR;
            const bool whole = aligned && to_n + VECTOR <= n;
            Out* to = y + (i64)(m0 + to_row) * y_pitch + to_n;
            float channel[2], offset[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = min(strip_n + 16 * warp + g + 8 * h, n - 1);
                channel[h] = WIDE ? 1.0f : scale_w[row];
                offset[h] = bias ? load_float(bias, row, bias_type) : -0.0f;  // adding -0.0 changes nothing, not even -0.0
            }
#pragma unroll
            for (int chunk = 0; chunk < TOKENS / CHUNK; chunk++) {
                u8* buffer = staging + (OUT != TYPE_FLOAT32 && chunk % 2 ? 4096 : 0);
                if (OUT == TYPE_FLOAT32) warpgroup_sync(1 + warpgroup);  // one buffer only: everybody has read it
                float of_token[CHUNK / 8][2];
#pragma unroll
                for (int j = 0; j < CHUNK / 8; j++) of_token[j][0] = next_token[j][0], of_token[j][1] = next_token[j][1];
                if (chunk + 1 < TOKENS / CHUNK) load_tokens(chunk + 1);  // while this chunk is written
                u32 pair[2][2];
#pragma unroll
                for (int j = 0; j < CHUNK / 8; j++) {
                    float value[4];
#pragma unroll
                    for (int r = 0; r < 4; r++) {
                        float sum = as_float(acc[i][chunk * CHUNK / 2 + 4 * j + r]);
                        if (!WIDE) sum = __fmul_rn(__fmul_rn(sum, of_token[j][r & 1]), channel[r >> 1]);
                        value[r] = __fadd_rn(sum, offset[r >> 1]);
                    }
                    if (OUT == TYPE_FLOAT32) {
#pragma unroll
                        for (int r = 0; r < 4; r++) {
                            const int row = 8 * j + 2 * q + (r & 1), column = 16 * warp + g + 8 * (r >> 1);
                            ((float*)buffer)[row * 64 + (column ^ row % 8 * 4)] = value[r];
                        }
                    } else {
                        pair[j % 2][0] = Output<OUT>::round2(value[0], value[1]);
                        pair[j % 2][1] = Output<OUT>::round2(value[2], value[3]);
                        if (j % 2) {  // matrices: 8 tokens of j - 1, then of j, each for 8 outputs and the next 8
                            const int row = 8 * (j - 1) + lane / 16 * 8 + lane % 8, piece = 2 * warp + lane / 8 % 2;
                            stmatrix_x4_trans(shared_address(buffer) + row * 128 + (piece ^ row % 8) * 16, pair[0][0], pair[0][1],
                                              pair[1][0], pair[1][1]);
                        }
                    }
                }
                warpgroup_sync(1 + warpgroup);
#pragma unroll
                for (int pass = 0; pass < (CHUNK * PIECES + 127) / 128; pass++) {
                    const int row = pass * (128 / PIECES) + to_row;
                    if ((CHUNK * PIECES < 128 && row >= CHUNK) || m0 + chunk * CHUNK + row >= m || to_n >= n) continue;
                    const uint4 out = *(const uint4*)(buffer + row * (16 * PIECES) + (to_piece ^ row % 8) * 16);
                    Out* at = to + (i64)(chunk * CHUNK + pass * (128 / PIECES)) * y_pitch;
                    if (whole) *(uint4*)at = out;
                    else {
                        const u32 words[4] = {out.x, out.y, out.z, out.w};
#pragma unroll
                        for (int v = 0; v < VECTOR; v++)
                            if (to_n + v < n)
                                at[v] = sizeof(Out) == 4 ? bits_as<Out>(words[v % 4]) : (Out)(words[v / 2 % 4] >> 16 * (v % 2));
                    }
                }
            }
            warpgroup_sync(1 + warpgroup);
        }
    }
}
