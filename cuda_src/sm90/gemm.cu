// y[m, n] = x[m, k] @ w[n, k].T with (2N-2):2N weights on the sparse tensor cores of sm_90, through wgmma.mma_async.sp.
//
// Weights are the sparse operand A, a row tile of 64 outputs a warpgroup; expanded activations are the dense operand B, TOKENS tokens. A
// stage is 128 bytes of B along k, two instructions. A block computes a tile of WARPGROUPS row tiles x TOKENS tokens:
//
//   producer   one thread             global --cp.async.bulk--> ring of STAGES slots
//   consumers  WARPGROUPS warpgroups  ring --wgmma--> accumulators --scales, bias, staging--> y
//
// Without registers for a producer (CONSUMERS_LOAD) the last consumer warp to release a slot loads it anew. With SPLIT_K > 1 the blocks of
// a cluster share the k of one tile (split_k.cuh), with PAIRS after whole tiles of their own. The pipeline, for one stage a step and three
// slots; time goes right, ?b waits for b, !b arrives on it:
//
//   producer      load 0   load 1   load 2   ?empty[0] . . . . . . . . . . . . . load 3   ?empty[1] . . . . . . . load 4
//   copies          `-- bytes --> !full[0] --> !full[1] --> !full[2]               `-- bytes --> !full[0]
//   consumers     ?full[0] metadata 0, wgmma 0   ?full[1] metadata 1, wgmma 1   ?wgmma 0 !empty[0]   ?full[2] metadata 2, wgmma 2 ...
//   tensor core                             [====== wgmma 0 ======][====== wgmma 1 ======][====== wgmma 2 ======]
//
//   barrier        arrivals that complete a phase                       who waits, for what
//   full[slot]     the loading thread, and all bytes it has announced   consumers, before they read the slot
//   x_read         lane 0 of every consumer warp                        the producer, before it fills the ring (OWN_X_BYTES)
//   empty[slot]    lane 0 of every consumer warp                        the producer, before it loads the slot
//                  (CONSUMERS_LOAD: a counter of warps, no barrier)
//   cluster        every thread, when its block's barriers are ready    consumers, before they send parts
//   parts_full     thread 0, and the bytes of all parts                 consumers that add up parts, before they read them
//   parts_empty    a thread of every block that adds up parts           consumers, before parts replace stages there
//   bar.sync 1+w   the 128 threads of warpgroup w                       the same, between writes and reads of its staging
//   bar.sync 1+WARPGROUPS  all consumers                                the same: nibbles are written; stages are read; x is quantized
//
// Invariants
// - A slot is released when the instructions that read it are complete: a step after they were issued, or at the end of the tile.
// - Slots are filled and read in one order, across tiles. A phase of full or empty is a pass of the ring.
// - The producer does not wait for slots whose weights it requested ahead: they were empty. Consumers that quantize x may have released
//   them by now, and then the parity of that wait names the next phase, which need not come.
// - Until griddepcontrol_wait only weights, their metadata and scale_w are read, and nothing is written: kernels before may still write x,
//   scale_x and bias, and read y. The second of two launches waits at its end only: the first starts it after its own wait.
// - Sums are added in an order that shape and launch fix: k upwards in a block, sets of accumulators, ranks of a cluster. No run differs.
// - Tokens past m: an operand x is stored in groups of 8, and a tile loads whole groups. Whatever rows past m hold, their columns of D are
//   not stored.
// - Outputs past n: weights are stored in pairs of row tiles, zeros past n. Tiles of three and more may overlap, and store the same bits:
//   with PAIRS clusters share the last two, so that both add in the same order.
#include "sm90/epilogue.cuh"
#include "sm90/own_x.cuh"
#include "sm90/producer.cuh"
#include "sm90/scheduler.cuh"
#include "sm90/split_k.cuh"
#include "sm90/wgmma_sp.cuh"

INLINE void init_barriers(Smem smem) {
    for (int s = 0; s < STAGES; s++) {
        mbarrier_init(smem.full(s), 1);
        if (CONSUMERS_LOAD) st_shared(smem.empty(s), 0);
        else mbarrier_init(smem.empty(s), CONSUMERS / 32);
    }
    if (OWN_X_BYTES) {
        mbarrier_init(smem.x_read(), CONSUMERS / 32);
        for (int token = 0; token < TOKENS; token++) st_shared(smem.peak(token), 0);
    }
    if (SPLIT_K > 1) {
        mbarrier_init(smem.parts_full(), 1), mbarrier_init(smem.parts_empty(), REDUCERS);
        mbarrier_arrive_expect_tx(smem.parts_full(), PARTS_BYTES);
    }
    fence_mbarrier_init();
}

// Issues the instructions of a step: acc += A * B; acc = A * B unless `add`.
//   stage: addresses; values: offset of the warpgroup's row tile in a stage; e: metadata
//   b: of the first instruction of a stage; second: from there to that of the other
INLINE void multiply(Accumulator (&acc)[ACCUMULATORS][TOKENS / 2], const u32 (&stage)[STAGES_PER_STEP], u32 values,
                     const u64 (&b)[STAGES_PER_STEP], u64 second, const u32 (&e)[STAGES_PER_STEP][2], bool add) {
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < STAGES_PER_STEP; j++) {
        const u64 a = matrix_descriptor<64>(stage[j] + values);
        WgmmaSp<DTYPE, TOKENS, 0>::mma(acc[j % ACCUMULATORS], a, b[j], e[j][0], add);
        WgmmaSp<DTYPE, TOKENS, WIDE>::mma(acc[j % ACCUMULATORS], a + 2, b[j] + second, e[j][1], 1);
    }
    wgmma_commit_group();
}

extern "C" __global__ void
#if SPLIT_K > 1
    __cluster_dims__(SPLIT_K, 1, 1)
#endif
    __launch_bounds__(THREADS, BLOCKS_PER_SM) gemm(
        const u8* x,                        // [stages, ceil(M / 8), 8, 128], expanded and swizzled; with OWN_X_BYTES [M, K] of y's type
        const u8* __restrict__ values,      // [stages, row tiles, 64, 64], swizzled; row tiles: ceil(N / 128) * 2
        const float* scale_x,               // [M], 8-bit types, not with OWN_X_BYTES; not __restrict__: may be written while this starts
        const float* __restrict__ scale_w,  // [N], 8-bit types
        const void* bias,                   // [N] of bias_type, or null; not __restrict__ either
        i64 bias_type,
        Out* __restrict__ y,                // [M, N]
        i64 y_pitch,                        // elements from row to row
        i64 m_, i64 n_,
        const u8* __restrict__ metadata,    // [stages, row tiles, METADATA_BYTES], compact or expanded
        i64 stages,                         // even
        i64 first_row_tile, i64 last_row_tile,  // whose outputs this launch computes; last: one past
        i64 begin, i64 end,                 // tiles of them
        i64 order,                          // of this launch
        i64 raster_group,                   // tiles along n
        i64 x_pitch, i64 k)                 // of x [M, K]: bytes from row to row; K
{
    extern __shared__ __align__(1024) u8 raw[];
    const Smem smem = {opaque(shared_address(raw))};
    if (threadIdx.x == 0) init_barriers(smem);
    __syncthreads();
    if (SPLIT_K > 1) cluster_arrive_relaxed();

    const int m = (int)m_, n = (int)n_;
    const int shared = PAIRS ? (int)end - (int)(end - begin) % (int)gridDim.x : 0;
    const Problem p = {m, n, (int)stages, (int)first_row_tile, (int)last_row_tile, (int)end, shared, (int)raster_group};
    const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
    const Loads loads(p, x, values, metadata, smem);
    if (!CONSUMERS_LOAD && warpgroup == WARPGROUPS) {
        if (REBALANCE_REGISTERS) setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x % 128 == 0) produce(p, begin, (Order)order, loads);
        return;
    }

    // ---- consumers
    if (REBALANCE_REGISTERS) setmaxnreg_inc<CONSUMER_REGISTERS>();
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, g = lane / 4;
    if (WINDOWS) {
        MetadataT::fill(smem.nibbles(), threadIdx.x, CONSUMERS);
        threads_sync<CONSUMERS>(1 + WARPGROUPS);
    }
    if (order != REST) griddepcontrol_wait();
    const bool aligned = ((u64)y | (u64)(y_pitch * sizeof(Out))) % 16 == 0;
    u8* const staging = raw + STAGING_AT + warpgroup * STAGING_BYTES;
    const u32 my_values = VALUES_AT + warpgroup * VALUE_BYTES;
    MetadataT my_metadata(smem.nibbles(), METADATA_AT + warpgroup * METADATA_BYTES, thread);
    int slot = 0, oldest = 0;  // of the ring: to read next; not released
    u32 parity = 0;            // of the phase in which `slot` is full

    WorkTile work(p, begin), next = work;
    const OwnX own_x = {smem.own_x(), (u32)m};
    const int own_first = work.first;  // step; with PAIRS the operand is of all k, and the last tile takes a part of it
    if (OWN_X_BYTES) {
        own_x.make(smem, x, x_pitch, (int)k, work.first * STAGES_PER_STEP, work.last * STAGES_PER_STEP);
        scale_x = (const float*)(raw + SCALES_AT);
    }
    if (CONSUMERS_LOAD) {
        if (order == BEFORE_REST) griddepcontrol_launch_dependents();
        if (threadIdx.x == 0)
            for (int s = 0; s < STAGES; s++) loads.stage(work, s, s);
        __syncwarp();
    }
    // This warp has read the oldest slot, stage number `stage` of the tile.
    auto release = [&](int stage) {
        const u32 empty = smem.empty(oldest);
        if (CONSUMERS_LOAD) {
            if (lane == 0 && atom_inc_shared(empty, CONSUMERS / 32 - 1) == CONSUMERS / 32 - 1) {
                const int then = stage + STAGES;
                if (then < p.stages) loads.stage(work, then, oldest);
                else if (next.tile < p.end) loads.stage(next, then - p.stages, oldest);
            }
            __syncwarp();
        } else if (lane == 0) mbarrier_arrive(empty);
        oldest = oldest + 1 == STAGES ? 0 : oldest + 1;
    };

#pragma unroll 1
    while (work.tile < p.end) {
        const int m0 = work.tile_m * TOKENS, n0 = (work.row_tile + warpgroup) * 64;
        next.next(p);

        // ---- scales and bias: loaded ahead, unless registers are short
        const int share = work.alone ? 0 : cluster_rank() * REDUCER_TOKENS;  // first of the tokens that this block writes
        TokenScales token;
        float channel[2] = {1, 1}, offset[2] = {};  // of this thread's outputs, 8 apart
        auto load_scaling = [&] {
            if (!WIDE) token.load(scale_x, m0 + share, m, lane);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int output = min(n0 + 16 * warp + g + 8 * h, n - 1);
                if (!WIDE) channel[h] = scale_w[output];
                if (bias) offset[h] = load_float(bias, output, bias_type);
            }
        };
        if (!CONSUMERS_LOAD) load_scaling();

        // ---- steps along k
        Accumulator acc[ACCUMULATORS][TOKENS / 2];
        if (!FIRST_MMA_OVERWRITES)
#pragma unroll
            for (int v = 0; v < ACCUMULATORS * TOKENS / 2; v++) acc[v / (TOKENS / 2)][v % (TOKENS / 2)] = 0;
        u32 e[2][STAGES_PER_STEP][2];  // instructions still read the metadata of one step when that of the next is loaded
        const int first = work.first, last = work.last;
        int s = first;
        my_metadata.start(first * STAGES_PER_STEP);
        auto step = [&](u32 (&metadata)[STAGES_PER_STEP][2]) {
            u32 stage[STAGES_PER_STEP];
            u64 b[STAGES_PER_STEP];
#pragma unroll
            for (int j = 0; j < STAGES_PER_STEP; j++) {
                stage[j] = smem.stage(slot);
                b[j] = OWN_X_BYTES ? own_x.descriptor((s - own_first) * STAGES_PER_STEP + j) : matrix_descriptor<128>(stage[j]);
                mbarrier_wait(smem.full(slot), parity);
                my_metadata.read(stage[j], metadata[j]);
                if (++slot == STAGES) slot = 0, parity ^= 1;
            }
            multiply(acc, stage, my_values, b, OWN_X_BYTES ? own_x.second() : 4, metadata, !FIRST_MMA_OVERWRITES || s > first);
            wgmma_wait_group<1>();  // the step before is complete
            if (s > first)
#pragma unroll
                for (int j = 0; j < STAGES_PER_STEP; j++) release(s - 1);
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
        for (int j = 0; j < STAGES_PER_STEP; j++) release(last - 1);
        if (CONSUMERS_LOAD) load_scaling();
#pragma unroll
        for (int c = 1; c < ACCUMULATORS; c++)
#pragma unroll
            for (int v = 0; v < TOKENS / 2; v++) acc[0][v] += acc[c][v];

        // ---- out
        auto finish = [&](const Accumulator (&sum)[EPILOGUE_TOKENS / 2], int m0) {
            auto write = [&](auto biased, auto whole) {
                write_rows<decltype(biased)::value, decltype(whole)::value>(sum, token, channel, offset, y, y_pitch, aligned, m0, n0, m, n,
                                                                           staging, thread, 1 + warpgroup);
            };
            const bool whole = aligned && m0 + EPILOGUE_TOKENS <= m && n0 + 64 <= n;
            if (bias) whole ? write(Flag<true>(), Flag<true>()) : write(Flag<true>(), Flag<false>());
            else whole ? write(Flag<false>(), Flag<true>()) : write(Flag<false>(), Flag<false>());
        };
        if (work.alone) {
#pragma unroll
            for (int at = 0; at < TOKENS; at += EPILOGUE_TOKENS) {
                // the next scales are loaded before these tokens are stored, or after float32, which leaves no registers
                const bool more = !WIDE && at + EPILOGUE_TOKENS < TOKENS, early = OUT != TYPE_FLOAT32;
                TokenScales later;
                if (more && early) later.load(scale_x, m0 + at + EPILOGUE_TOKENS, m, lane);
                finish((const Accumulator (&)[EPILOGUE_TOKENS / 2])acc[0][at / 2], m0 + at);
                if (more && !early) later.load(scale_x, m0 + at + EPILOGUE_TOKENS, m, lane);
                if (more) token = later;
            }
            work = next;
        } else if constexpr (SPLIT_K > 1) {
            const u32 rank = cluster_rank(), parts = my_parts(smem, warpgroup, thread);
            send_parts(smem, parts, rank, acc[0]);
            if (rank < REDUCERS) {
                Accumulator own[REDUCER_TOKENS / 2];  // of the tokens that this block adds up
#pragma unroll
                for (int v = 0; v < REDUCER_TOKENS / 2; v++)
#pragma unroll
                    for (u32 r = 0; r < REDUCERS; r++)
                        if (r == 0 || r == rank) own[v] = acc[0][r * REDUCER_TOKENS / 2 + v];
                mbarrier_wait_cluster(smem.parts_full(), 0);
#pragma unroll
                for (int at = 0; at < REDUCER_TOKENS; at += EPILOGUE_TOKENS) {
                    if (!WIDE && at > 0) token.load(scale_x, m0 + share + at, m, lane);
                    Accumulator sum[EPILOGUE_TOKENS / 2];  // of all parts, in order of rank
#pragma unroll
                    for (u32 r = 0; r < SPLIT_K; r++) {
#pragma unroll
                        for (int v = 0; v < EPILOGUE_TOKENS / 2; v += 4) {
                            const uint4 part = r == rank ? uint4() : ld_shared4(parts + part_at(r, rank) + (at / 8 + v / 4) * PART_GROUP);
                            const u32 bits[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
                            for (int c = 0; c < 4; c++) {
                                const Accumulator more = r == rank ? own[at / 2 + v + c] : from_bits(bits[c]);
                                sum[v + c] = r == 0 ? more : sum[v + c] + more;
                            }
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
