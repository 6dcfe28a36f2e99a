// Shared memory of the kernel: a ring of stages, rows of the output on their way out, barriers.
#pragma once
#include "common/types.cuh"

// One stage: 128 slid bytes along k, two instructions.
template <int Tokens, int Strips, int ValueBytes, int IndexBytes> struct alignas(1024) Stage {
    u8 x[Tokens][128];  // slid activations, 128-byte swizzle: byte b of row r at b ^ (r % 8) * 16
    // 64 outputs a strip: 64 kept bytes each, 64-byte swizzle: byte b of row r at b ^ (r / 2 % 4) * 16
    u8 values[Strips][ValueBytes];
    u8 index[Strips][IndexBytes];  // codes, or index words in the order of threads
};

template <int Stages, class StageT, int Warpgroups, int StagingBytes, int Codes> struct SharedMemory {
    StageT stage[Stages];
    u8 staging[Warpgroups][2][StagingBytes];  // epilogue.cuh
    u64 full[Stages], empty[Stages];
    u32 nibbles[Codes + (Codes == 0)];  // of every code
};
