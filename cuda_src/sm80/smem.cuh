// Shared memory of the kernel: a ring of stages, each one block of k; afterwards, the warps' staging rows for the output.
#pragma once
#include "common/types.cuh"

template <int RowTiles, int BlockBytes, int Rows, int Stride> struct alignas(16) Stage {
    // a row tile is 16 outputs: [steps][32 lanes][16 bytes], [words][32 lanes][4 bytes]; FP4: then [words][16 rows][4 bytes]
    u8 weights[RowTiles][BlockBytes];
    u8 x[Rows][Stride];              // a row = one token, unslid, padded so that loads meet no bank conflict; FP4: lifted, then scales
};

// Outputs of eight tokens on their way from fragment order to rows. Rows of Outputs + 4 floats put the 32 lanes of a fragment
// (rows 2 q + c, columns g) on 32 banks.
template <int Outputs> struct alignas(16) Staging {
    float row[8][Outputs + 4];
};

template <int Stages, class StageT, int Warps, class StagingT> union SharedMemory {
    StageT stage[Stages];
    StagingT staging[Warps];
};
