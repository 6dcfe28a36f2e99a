// y[m, n] = x[m, k] @ w[n, k].T with (2N-2):2N weights on the sparse tensor cores of sm_100 and sm_103, through tcgen05.mma.sp.
//
// Weights are the sparse operand A; expanded activations are the dense operand B. A pair of thread blocks, on two neighbouring SMs, computes
// a tile of 256 outputs x TOKENS tokens: each block loads its 128 outputs' weights and half of the tokens, the tensor cores of both read
// both halves of B, and the sums of 128 outputs x TOKENS tokens are in the tensor memory of their block. A k-tile is 128 expanded columns.
//
//   producer           both blocks   global --cp.async.bulk--> ring of STAGES slots
//   MMA thread         block 0       metadata --tcgen05.cp--> tensor memory; ring --tcgen05.mma.sp--> sums in tensor memory
//   relay              block 1       its own full slots --> full slots of block 0
//   epilogue, 4 warps  both blocks   sums --tcgen05.ld--> registers --scales, bias--> y
//
// The pipeline for three slots; time goes right, ?b waits for b, !b arrives on it. full' is the barrier of block 1.
//
//   block 1 producer    load 0   load 1   load 2   ?empty[0] . . . . . . . . . load 3
//   copies                `-- bytes --> !full'[0] --> !full'[1] ...
//   block 1 relay         ?full'[0] !full[0]   ?full'[1] !full[1]   ?full'[2] !full[2]
//   block 0 producer    load 0   load 1   load 2   ?empty[0] . . . . . . . . . load 3
//   copies                `-- bytes --> !full[0] --> !full[1] ...
//   block 0 MMA thread    ?sums_empty ?full[0] cp 0, mma 0, commit   ?full[1] cp 1, mma 1, commit  ...  mma last, commit   ?sums_empty ...
//   tensor cores                              [= cp 0 =][==== mma 0 ====]!empty[0] [= cp 1 =][==== mma 1 ====]!empty[1] ... !sums_full
//   epilogue warps      ?sums_full (tile t) ld chunk, !sums_empty, write chunk, ld chunk, write chunk ... ?sums_full (tile t + 1)
//
//   barrier            arrivals that complete a phase                              who waits, for what
//   full[s], block 0   its producer and its bytes; block 1's relay                 the MMA thread, before it reads slot s of both blocks
//   full[s], block 1   its producer and its bytes                                  the relay, before it arrives on block 0's
//   empty[s], both     the commit after the instructions that read slot s          the producers, before they load slot s
//   sums_full, both    the commit after the last k-tile of a tile                  the epilogue warps, before they read sums
//   sums_empty, block 0  the epilogue warps of both blocks, 8                      the MMA thread, before the first k-tile of a tile
//   cluster            all threads of the pair: both blocks run, barriers are initialized; at the end, nothing more is read
//
// Invariants
// - Slots are filled and read in one order, across tiles. A phase of full or empty is a pass of the ring; a phase of sums_* is a tile.
// - A slot's metadata in tensor memory belong to the slot: they are overwritten after full[s], that is after the commit on empty[s].
// - The sums of tile t are in set t % 2. The sets may share one chunk of columns, the last of set 0 and the first of set 1, which is read
//   first. sums_empty of tile t comes after that chunk of t is read, and, in the order of each warp, after all of tile t - 1 is. So tile
//   t + 1 may be multiplied while the rest of tile t is written.
// - tcgen05.cp and tcgen05.mma of one thread execute in order ("Pipelined tcgen05 Instructions"), and so do products with the same sums.
// - Producers end when every slot that they filled is empty: no arrival is under way to a block that has ended.
// - Sums are added in the order of k. No run differs.
// - Tokens past m: x is stored in groups of 8, and a block loads whole groups. Whatever rows past them hold, their columns of D are not stored.
// - Outputs past n: weights are stored in pairs of row tiles, zeros past n.
#include "sm100/descriptors.cuh"
#include "sm100/ptx.cuh"
#include "sm100/scheduler.cuh"
#include "sm100/smem.cuh"

INLINE void init_barriers(Smem smem, u32 rank) {
    for (int s = 0; s < STAGES; s++) mbarrier_init(smem.full(s), rank == 0 ? 2 : 1), mbarrier_init(smem.empty(s), 1);
    mbarrier_init(smem.sums_full(), 1), mbarrier_init(smem.sums_empty(), 2 * EPILOGUE_WARPS);
    fence_mbarrier_init();
}

// The producer: this block's half of every k-tile of all tiles, in order, as slots become empty.
INLINE void produce(const Problem& p, const u8* x, const u8* weights, Smem smem, u32 rank) {
    Slot at(1);  // an mbarrier starts as if a phase of parity 1 were complete: all slots are empty
    const i64 row_tiles = 2 * p.tiles_n(), rows = p.rows();
    for (WorkTile work(p); work.valid(p); work.next(p)) {
        const int first = work.tile_m * TOKENS + rank * PAIR_TOKENS;
        const u32 bytes = max(0, min((int)rows - first, PAIR_TOKENS)) * 128;  // of a block of activations
        const u8* from = weights + (2 * work.tile_n + rank) * (i64)WEIGHT_BYTES;
#pragma unroll 1
        for (int k_tile = 0; k_tile < p.k_tiles; k_tile++, from += row_tiles * WEIGHT_BYTES) {
            const u32 full = smem.full(at.slot), to = smem.stage(at.slot);
            mbarrier_wait_or_trap(smem.empty(at.slot), at.parity);
            mbarrier_arrive_expect_tx(full, WEIGHT_BYTES + BLOCKS * bytes);
            cp_async_bulk(to + VALUES_AT, from, WEIGHT_BYTES, full);
            if (bytes)
#pragma unroll
                for (int b = 0; b < BLOCKS; b++)
                    cp_async_bulk(to + b * BLOCK_BYTES, x + ((k_tile * BLOCKS + b) * rows + first) * 128, bytes, full);
            at.next();
        }
    }
#pragma unroll 1
    for (int s = 0; s < STAGES; s++, at.next()) mbarrier_wait_or_trap(smem.empty(at.slot), at.parity);
}

// The MMA thread of block 0, for the pair.
INLINE void multiply(const Problem& p, Smem smem, u32 tensor) {
    Slot at(0);
    for (WorkTile work(p); work.valid(p); work.next(p)) {
        mbarrier_wait_or_trap(smem.sums_empty(), work.number % 2 ^ 1);
        tcgen05_fence_after_thread_sync();
        const u32 sums = tensor + work.number % 2 * SECOND_COLUMN;
#pragma unroll 1
        for (int k_tile = 0; k_tile < p.k_tiles; k_tile++) {
            mbarrier_wait_or_trap(smem.full(at.slot), at.parity);
            tcgen05_fence_after_thread_sync();
            const u32 stage = smem.stage(at.slot) >> 4, metadata = tensor + METADATA_COLUMN + at.slot * METADATA_COLUMNS;
            tcgen05_cp(metadata, METADATA_DESCRIPTOR + stage + (METADATA_AT >> 4));
            const u64 a = VALUES_DESCRIPTOR + stage + (VALUES_AT >> 4), b = ACTIVATIONS_DESCRIPTOR + stage;
#pragma unroll
            for (int i = 0; i < INSTRUCTIONS; i++) {
                constexpr const Step(&steps)[INSTRUCTIONS] = step_of;
                tcgen05_mma_sp(sums, a + steps[i].values, b + steps[i].activations, metadata + steps[i].column,
                               INSTRUCTION_DESCRIPTOR | steps[i].selector, k_tile > 0 || i > 0);
            }
            tcgen05_commit(smem.empty(at.slot));
            at.next();
        }
        tcgen05_commit(smem.sums_full());
    }
}

// The relay thread of block 1: bytes that have arrived in its slots count for block 0's barriers, too. It reads and writes none of them, so
// its arrival orders nothing else: a release at cluster scope would cost a memory fence a k-tile, longer than the tensor cores take for one.
INLINE void relay(const Problem& p, Smem smem) {
    Slot at(0);
    for (WorkTile work(p); work.valid(p); work.next(p))
#pragma unroll 1
        for (int k_tile = 0; k_tile < p.k_tiles; k_tile++, at.next()) {
            mbarrier_wait_or_trap(smem.full(at.slot), at.parity);
            mbarrier_arrive_cluster(mapa(smem.full(at.slot), 0));
        }
}

// An epilogue warp: its 32 outputs, an output a lane, of all tiles. y = sum * scale of the token * scale of the output + bias.
INLINE void epilogue(const Problem& p, const float* scale_x, const float* scale_w, const void* bias, i64 bias_type, Out* y, i64 y_pitch,
                     Smem smem, u32 tensor, u32 rank, int warp, int lane) {
    const u32 empty = mapa(smem.sums_empty(), 0);
    for (WorkTile work(p); work.valid(p); work.next(p)) {
        const int set = work.number % 2, n = (2 * work.tile_n + rank) * ROWS + 32 * warp + lane, output = min(n, p.n - 1);
        const float channel = WIDE ? 1.0f : scale_w[output], offset = bias ? load_float(bias, output, bias_type) : 0.0f;
        mbarrier_wait_or_trap(smem.sums_full(), set);
        tcgen05_fence_after_thread_sync();
#pragma unroll 1
        for (int c = 0; c < TOKENS / CHUNK; c++) {
            const int at = (set ? c : TOKENS / CHUNK - 1 - c) * CHUNK, m0 = work.tile_m * TOKENS + at;  // the shared chunk first
            u32 sums[CHUNK];
            tcgen05_ld(sums, tensor + (32 * warp << 16) + set * SECOND_COLUMN + at);
            if (c == 0) {
                tcgen05_fence_before_thread_sync();
                __syncwarp();
                if (lane == 0) mbarrier_arrive_cluster(empty);
            }
            const float token = WIDE ? 1.0f : scale_x[min(m0 + lane, p.m - 1)];  // of token m0 + lane
            Out* to = y + m0 * y_pitch + n;
#pragma unroll
            for (int i = 0; i < CHUNK; i++, to += y_pitch) {
                float v = as_float(sums[i]);
                if (!WIDE) v = __fmul_rn(__fmul_rn(v, __shfl_sync(0xffffffff, token, i)), channel);
                if (bias) v = __fadd_rn(v, offset);
                if (n < p.n && m0 + i < p.m) *to = Output<OUT>::round(v);
            }
        }
    }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1) gemm(
    const u8* __restrict__ x,           // [k-tiles * BLOCKS, ceil(M / 8), 8, 128], expanded and swizzled
    const u8* __restrict__ weights,     // [k-tiles, row tiles, WEIGHT_BYTES], values and metadata; row tiles: ceil(N / 256) * 2
    const float* __restrict__ scale_x,  // [M], 8-bit types
    const float* __restrict__ scale_w,  // [N], 8-bit types
    const void* __restrict__ bias,      // [N] of bias_type, or null
    i64 bias_type,
    Out* __restrict__ y,                // [M, N]
    i64 y_pitch,                        // elements from row to row
    i64 m, i64 n, i64 k_tiles,
    i64 raster_group)                   // tiles along n
{
    extern __shared__ __align__(1024) u8 raw[];
    const Smem smem = {shared_address(raw)};
    const Problem p = {(int)m, (int)n, (int)k_tiles, (int)raster_group};
    const u32 rank = cluster_rank();
    const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    if (threadIdx.x == 0) init_barriers(smem, rank);
    cluster_sync();  // before what involves the other block: it must have started
    if (warp == MMA_WARP) tcgen05_alloc(smem.tensor(), TENSOR_COLUMNS);
    tcgen05_fence_before_thread_sync();
    __syncthreads();
    tcgen05_fence_after_thread_sync();
    const u32 tensor = ld_shared(smem.tensor());

    if (warp < EPILOGUE_WARPS) epilogue(p, scale_x, scale_w, bias, bias_type, y, y_pitch, smem, tensor, rank, warp, lane);
    else if (elect_one()) {
        if (warp == PRODUCER_WARP) produce(p, x, weights, smem, rank);
        else if (rank == 0) multiply(p, smem, tensor);
        else relay(p, smem);
    }
    __syncwarp();
    tcgen05_fence_before_thread_sync();
    cluster_sync();
    if (warp == MMA_WARP) tcgen05_dealloc(tensor, TENSOR_COLUMNS);
}
