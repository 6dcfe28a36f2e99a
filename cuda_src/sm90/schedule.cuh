// Which part of the work a block does: whole tiles, then ranges of tiles that are cut along k.
#pragma once
#include "common/types.cuh"

struct Work {
    int tile, first, last;  // steps first ... last - 1 along k
};

struct Problem {
    int m, n, steps, tiles_n, tiles;
    int streamed;   // tiles that are cut along k, the last ones, into `sharers` equal ranges, one a unit
    u32 sharers, units;
    INLINE int whole() const { return tiles - streamed; }
    // Ranges count the steps of all streamed tiles, one after another. Unit u's starts at:
    INLINE u32 range_start(u32 u) const { return streamed ? min(u, sharers) * (u32)(streamed * steps) / sharers : 0; }
    // the unit whose range holds a step
    INLINE u32 holder(u32 step) const { return ((step + 1) * sharers - 1) / (u32)(streamed * steps); }
};

// The pieces of a unit's work, in order. A unit is a block, or a cluster.
//
// Whoever holds the last steps of a cut tile waits for the others' parts: units of lower numbers, which started earlier. A range is
// done backwards, so that a unit makes its part of a tile that it does not finish before it waits for one that it does.
struct Schedule {
    const Problem& p;
    int tile, begin, end;

    INLINE Schedule(const Problem& p, u32 unit) : p(p), tile(unit), begin(p.range_start(unit)), end(p.range_start(unit + 1)) {}
    INLINE bool next(Work& w) {
        if (tile < p.whole()) {
            w.tile = tile, w.first = 0, w.last = p.steps;
            tile += p.units;
            return true;
        }
        if (begin >= end) return false;
        const int cut = (end - 1) / p.steps, start = cut * p.steps;
        w.tile = p.whole() + cut, w.first = max(begin - start, 0), w.last = end - start;
        end = start + w.first;
        return true;
    }
};

// Tiles run in bands of Band tiles of n, so that blocks at work together share weights and activations in the L2 cache.
template <int Band> INLINE void place(const Problem& p, int tile, int& tile_n, int& tile_m) {
    const int tiles_m = p.tiles / p.tiles_n, band = tile / (Band * tiles_m), inside = tile % (Band * tiles_m);
    const int width = min(p.tiles_n - Band * band, Band);
    tile_n = Band * band + inside % width, tile_m = inside / width;
}
