// Split-K: the blocks of a cluster share the k of a tile, send partial sums to each other's shared memory, and add them up in order of
// rank, so that results do not vary from run to run.
//
//   block r    its steps along k --> part t to block t, for all other t < REDUCERS --> if r < REDUCERS: ?parts_full --> add, y
//
// A part is one block's sums of the REDUCER_TOKENS tokens that another block adds up. Parts in shared memory: u32 [from, without the block
// itself][warpgroup][group of 8 tokens][thread][4], the accumulators of a thread four by four.
#pragma once
#include "sm90/smem.cuh"

constexpr u32 PART_GROUP = 128 * 16, PART = WARPGROUPS * (REDUCER_TOKENS / 8) * PART_GROUP;  // bytes

// Where in the shared memory of block `to` the part of another block is.
INLINE u32 part_at(u32 from, u32 to) { return (from < to ? from : from - 1) * PART; }

// This thread's 16 bytes of the first group of tokens, in the first part.
INLINE u32 my_parts(Smem smem, int warpgroup, int thread) {
    return smem.parts() + warpgroup * (REDUCER_TOKENS / 8) * PART_GROUP + thread * 16;
}

// Sends this thread's sums. st.async counts bytes on the receiver's parts_full; a cluster barrier would wait for all memory instead, behind
// what the next kernel prefetches.
INLINE void send_parts(Smem smem, u32 parts, u32 rank, const Accumulator (&acc)[TOKENS / 2]) {
    cluster_wait();  // all blocks have initialized their barriers
    if (!PARTS_OWN_BUFFER) {  // parts replace stages: every receiver must have read its own
        threads_sync<CONSUMERS>(1 + WARPGROUPS);
        if (rank < REDUCERS && threadIdx.x < SPLIT_K) mbarrier_arrive_cluster(mapa(smem.parts_empty(), threadIdx.x));
        mbarrier_wait_cluster(smem.parts_empty(), 0);
    }
#pragma unroll
    for (u32 to = 0; to < REDUCERS; to++) {
        if (to == rank) continue;
        const u32 there = mapa(parts, to) + part_at(rank, to), parts_full = mapa(smem.parts_full(), to);
#pragma unroll
        for (int v = to * REDUCER_TOKENS / 2; v < (to + 1) * REDUCER_TOKENS / 2; v += 4)
            st_async(there + (v - to * REDUCER_TOKENS / 2) / 4 * PART_GROUP, parts_full, as_bits(acc[v]), as_bits(acc[v + 1]),
                     as_bits(acc[v + 2]), as_bits(acc[v + 3]));
    }
}
