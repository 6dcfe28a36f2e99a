// Which tiles of y a block computes, in which order, and which part of k.
//
// A unit of work is a block, or with SPLIT_K > 1 a cluster. Unit u takes the tiles begin + u, begin + u + units ... of a launch; a
// cluster has one tile. Tiles are numbered by rasterization groups: `raster_group` tiles along n run together with all tiles along m, so
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
    int raster_group;                   // tiles along n
};

// A tile, and this block's part of k: steps first ... last - 1.
struct WorkTile {
    int tile, row_tile, tile_m, first, last;

    INLINE WorkTile(const Problem& p, i64 begin) : tile((int)begin + blockIdx.x / SPLIT_K) {
        const u32 rank = SPLIT_K == 1 ? 0 : cluster_rank(), steps = p.stages / STAGES_PER_STEP;
        first = steps * rank / SPLIT_K, last = steps * (rank + 1) / SPLIT_K;
        place(p);
    }
    INLINE void next(const Problem& p) { tile += gridDim.x / SPLIT_K, place(p); }
    INLINE void place(const Problem& p) {
        const int tiles_n = (p.last_row_tile - p.first_row_tile + WARPGROUPS - 1) / WARPGROUPS, tiles_m = (p.m + TOKENS - 1) / TOKENS;
        const int before = tile / (p.raster_group * tiles_m) * p.raster_group;  // tiles along n of the groups before
        const int inside = tile - before * tiles_m, width = min(tiles_n - before, p.raster_group);
        row_tile = p.first_row_tile + (before + inside % width) * WARPGROUPS, tile_m = inside / width;
        // Weights are padded to pairs of row tiles: of three, the last tile of y may repeat outputs of the one before.
        if (WARPGROUPS == 3) row_tile = min(row_tile, p.last_row_tile - WARPGROUPS);
    }
};
