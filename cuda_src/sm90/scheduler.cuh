// Which tiles of y a block computes, in which order, and which part of k.
//
// A unit of work is a block, or with SPLIT_K > 1 a cluster. Unit u takes the tiles begin + u, begin + u + units ... of a launch; a
// cluster has one tile. With PAIRS blocks are units while all of them have a tile; then cluster u takes the u-th of the others, if there
// is one. Tiles are numbered by rasterization groups: `raster_group` tiles along n run together with all tiles along m, so
// that blocks at work at the same time share weights and activations in L2.
#pragma once
#include "sm90/config.cuh"
#include "sm90/ptx.cuh"

// A product takes one launch, or two: the second does the tiles that would not fill the SMs of another round.
enum Order { ALONE, BEFORE_REST, REST };

struct Problem {
    int m, n, stages;                   // stages: that cover k, an even number
    int first_row_tile, last_row_tile;  // of weights, that this launch computes; last: one past
    int end;                            // one past the last tile of this launch
    int shared;                         // the first tile that a cluster shares, with PAIRS
    int raster_group;                   // tiles along n
};

// A tile, and this block's part of k: steps first ... last - 1.
struct WorkTile {
    int tile, row_tile, tile_m, first, last;
    bool alone;  // this block computes all of it

    INLINE WorkTile(const Problem& p, i64 begin)
        : tile((int)begin + blockIdx.x / (PAIRS ? 1 : SPLIT_K)), alone(SPLIT_K == 1 || PAIRS) {
        take_part(p), place(p);
    }
    INLINE void take_part(const Problem& p) {
        const u32 steps = p.stages / STAGES_PER_STEP;
        first = 0, last = steps;
        if (!alone) first = steps * cluster_rank() / SPLIT_K, last = steps * (cluster_rank() + 1) / SPLIT_K;
    }
    // The tile after this one; `end` or more: there is none.
    INLINE int following(const Problem& p) const {
        if (!alone) return p.end;
        const int next = tile + gridDim.x;
        return PAIRS && next >= p.shared ? p.shared + blockIdx.x / SPLIT_K : next;
    }
    INLINE void next(const Problem& p) {
        tile = following(p);
        if (PAIRS && tile >= p.shared) alone = false, take_part(p);
        place(p);
    }
    INLINE void place(const Problem& p) {
        const int tiles_n = (p.last_row_tile - p.first_row_tile + WARPGROUPS - 1) / WARPGROUPS, tiles_m = (p.m + TOKENS - 1) / TOKENS;
        const int before = tile / (p.raster_group * tiles_m) * p.raster_group;  // tiles along n of the groups before
        const int inside = tile - before * tiles_m, width = min(tiles_n - before, p.raster_group);
        row_tile = p.first_row_tile + (before + inside % width) * WARPGROUPS, tile_m = inside / width;
        // Weights are padded to pairs of row tiles: of three and more, the last tile of y may repeat outputs of the one before.
        if (WARPGROUPS >= 3) row_tile = min(row_tile, p.last_row_tile - WARPGROUPS);
    }
};
