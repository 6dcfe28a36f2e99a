// Which tiles of y a pair of thread blocks computes, in which order.
//
// Pair u takes the tiles u, u + pairs, u + 2 pairs ... Tiles are numbered by rasterization groups: `raster_group` tiles along n run together
// with all tiles along m, so that pairs at work at the same time share weights and activations in L2.
#pragma once
#include "sm100/config.cuh"

struct Problem {
    int m, n, k_tiles;
    int raster_group;  // tiles along n

    INLINE int tiles_m() const { return (m + TOKENS - 1) / TOKENS; }
    INLINE int tiles_n() const { return (n + 2 * ROWS - 1) / (2 * ROWS); }
    INLINE int rows() const { return (m + 7) / 8 * 8; }  // tokens as activations are stored
};

struct WorkTile {
    int tile, number, tile_n, tile_m;  // number: of the tiles of this pair

    INLINE explicit WorkTile(const Problem& p) : tile(blockIdx.x / 2), number(0) { place(p); }
    INLINE bool valid(const Problem& p) const { return tile < p.tiles_n() * p.tiles_m(); }
    INLINE void next(const Problem& p) { tile += gridDim.x / 2, number++, place(p); }
    INLINE void place(const Problem& p) {
        const int before = tile / (p.raster_group * p.tiles_m()) * p.raster_group;  // tiles along n of the groups before
        const int inside = tile - before * p.tiles_m(), width = max(1, min(p.tiles_n() - before, p.raster_group));
        tile_n = before + inside % width, tile_m = inside / width;
    }
};

// A slot of the ring, and the parity of the phase in which its barrier completes next.
struct Slot {
    int slot = 0;
    u32 parity;

    INLINE explicit Slot(u32 parity) : parity(parity) {}
    INLINE void next() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};
