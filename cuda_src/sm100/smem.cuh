// Shared memory of a block, in bytes; both blocks of a pair have the same:
//
//   stage[STAGES]    ring, each aligned to 1024 bytes, the period of the swizzles:
//     activations    [BLOCKS][TOKENS / 2][128]   expanded; byte b of row r at b ^ (r % 8) * 16
//     values         [BLOCKS][128][64]           non-zero weights; byte b of row r at b ^ (r / 2 % 4) * 16
//     metadata       [128][16]
//   full, empty      [STAGES] mbarriers each     (gemm.cu)
//   sums_full, sums_empty                        mbarriers
//   tensor           address of tensor memory
#pragma once
#include "sm100/config.cuh"

#ifndef STAGE_BYTES
#define VALUES_AT (BLOCKS * BLOCK_BYTES)  // in a stage
#define METADATA_AT (VALUES_AT + BLOCKS * VALUE_BYTES)
#define STAGE_BYTES (METADATA_AT + METADATA_BYTES)
#endif
constexpr u32 FULL_AT = STAGES * STAGE_BYTES, EMPTY_AT = FULL_AT + 8 * STAGES, SUMS_FULL_AT = EMPTY_AT + 8 * STAGES;
constexpr u32 SUMS_EMPTY_AT = SUMS_FULL_AT + 8, TENSOR_AT = SUMS_EMPTY_AT + 8;
constexpr u32 USED_BYTES = STAGES * STAGE_BYTES + 1024;

static_assert(VALUES_AT == BLOCKS * BLOCK_BYTES && METADATA_AT == VALUES_AT + BLOCKS * VALUE_BYTES, "operands of a stage follow");
static_assert(STAGE_BYTES == METADATA_AT + METADATA_BYTES && STAGE_BYTES % 1024 == 0, "stages are aligned to the swizzles' period");
static_assert(BLOCK_BYTES % 1024 == 0 && VALUE_BYTES % 512 == 0, "and so are the operands");
static_assert(TENSOR_AT + 4 <= USED_BYTES && SHARED_BYTES == USED_BYTES, "the host launches what these files describe");
static_assert(USED_BYTES <= 232448, "shared memory of a block: CUDA C++ Programming Guide, \"Compute Capabilities\"");

// Shared-window addresses.
struct Smem {
    u32 base;

    INLINE u32 stage(int slot) const { return base + slot * STAGE_BYTES; }
    INLINE u32 full(int slot) const { return base + FULL_AT + 8 * slot; }
    INLINE u32 empty(int slot) const { return base + EMPTY_AT + 8 * slot; }
    INLINE u32 sums_full() const { return base + SUMS_FULL_AT; }
    INLINE u32 sums_empty() const { return base + SUMS_EMPTY_AT; }
    INLINE u32 tensor() const { return base + TENSOR_AT; }
};
