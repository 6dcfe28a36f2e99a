// Loads into the ring. Global memory holds the layout of shared memory (arch/sm90_layout.py, arch/operand.py), so an operand of a stage
// is one contiguous bulk copy.
#pragma once
#include "sm90/scheduler.cuh"
#include "sm90/smem.cuh"

struct Loads {
    const u8* x;         // [stages, rows, 128], without OWN_X_BYTES
    const u8* values;    // [stages, row_tiles, VALUE_BYTES]
    const u8* metadata;  // [stages, row_tiles, METADATA_BYTES]
    Smem smem;
    int rows, row_tiles;  // tokens, padded to 8; row tiles, padded to 2

    INLINE Loads(const Problem& p, const u8* x, const u8* values, const u8* metadata, Smem smem)
        : x(x), values(values), metadata(metadata), smem(smem), rows((p.m + 7) / 8 * 8), row_tiles((p.n + 127) / 128 * 2) {}
    INLINE u32 x_bytes(const WorkTile& work) const { return OWN_X_BYTES ? 0 : min(rows - work.tile_m * TOKENS, TOKENS) * 128; }

    // Announces all bytes of a stage to its full barrier, and requests its weights.
    INLINE void weights(const WorkTile& work, int stage, int slot) const {
        mbarrier_arrive_expect_tx(smem.full(slot), x_bytes(work) + WARPGROUPS * (VALUE_BYTES + METADATA_BYTES));
        const u32 to = smem.stage(slot);
        const i64 row_tile = (i64)stage * row_tiles + work.row_tile;
        cp_async_bulk(to + VALUES_AT, values + row_tile * VALUE_BYTES, WARPGROUPS * VALUE_BYTES, smem.full(slot));
        cp_async_bulk(to + METADATA_AT, metadata + row_tile * METADATA_BYTES, WARPGROUPS * METADATA_BYTES, smem.full(slot));
    }
    INLINE void activations(const WorkTile& work, int stage, int slot) const {
        const i64 row = (i64)stage * rows + work.tile_m * TOKENS;
        const u32 to = smem.stage(slot);
        if (ACTIVATIONS_EVICT_LAST) cp_async_bulk_evict_last(to, x + row * 128, x_bytes(work), smem.full(slot));
        else cp_async_bulk(to, x + row * 128, x_bytes(work), smem.full(slot));
    }
    INLINE void stage(const WorkTile& work, int stage, int slot) const { weights(work, stage, slot), activations(work, stage, slot); }
};

// The producer thread: all stages of all its tiles, in order, as slots become empty.
INLINE void produce(const Problem& p, i64 begin, Order order, const Loads& loads) {
    int slot = 0;
    u32 parity = 1;  // an mbarrier starts as if a phase of parity 1 were complete: all slots are empty
    int ahead = -1;  // stages whose weights are requested already
    for (WorkTile work(p, begin); work.tile < p.end; work.next(p)) {
        const int first = work.first * STAGES_PER_STEP, last = work.last * STAGES_PER_STEP;
        if (ahead < 0) {
            ahead = min(last - first, PREFETCH < STAGES ? PREFETCH : STAGES);
#pragma unroll 1
            for (int s = 0; s < ahead; s++) loads.weights(work, first + s, s);
            if (order != REST) griddepcontrol_wait();
            if (OWN_X_BYTES) mbarrier_wait(loads.smem.x_read(), 0);  // x would come behind the weights of all slots
            if (order == BEFORE_REST) griddepcontrol_launch_dependents();  // blocks of the rest replace those that are done
        }
        const bool ends = order != BEFORE_REST && work.following(p) >= p.end;
#pragma unroll 1
        for (int stage = first; stage < last; stage++) {
            if (ahead == 0) mbarrier_wait(loads.smem.empty(slot), parity);
            if (ends && stage == max(first, last - 1 - RELEASE_AT)) griddepcontrol_launch_dependents();
            if (ahead > 0) ahead--;
            else loads.weights(work, stage, slot);
            if (!OWN_X_BYTES) loads.activations(work, stage, slot);
            if (++slot == STAGES) slot = 0, parity ^= 1;
        }
    }
}
