// Shared memory of the kernel: a ring of stages, staging for the output, barriers.
#pragma once
#include "common/types.cuh"

// One stage: 128 slid bytes along k, two instructions.
template <int Strips, int Tokens, int MetaBytes> struct alignas(1024) Stage {
    u8 x[Tokens][128];          // slid activations, 128-byte swizzle: byte b of row r at b ^ (r % 8) * 16
    // 64 outputs a strip: 64 kept bytes each, 64-byte swizzle: byte b of row r at b ^ (r / 2 % 4) * 16; then the index words
    // in the order of threads
    u8 strip[Strips][4096 + MetaBytes];
};

// Outputs of a warpgroup on their way to rows of y: 32 tokens x 64 outputs, twice for 16-bit types, once for float32. The 16-byte
// piece p of row r stands at p ^ r % 8.
struct alignas(1024) Staging {
    u8 buffer[2][4096];
};

template <int Stages, class StageT, int Warpgroups> struct SharedMemory {
    StageT stage[Stages];
    Staging staging[Warpgroups];
    u64 full[Stages], empty[Stages];
    u32 seen[Warpgroups];
};
