// Shared memory of a block, in bytes:
//
//   stage[STAGES]    ring, each aligned to 1024 bytes, the period of the swizzles:
//     x              [TOKENS][128]                  expanded activations; byte b of row r at b ^ (r % 8) * 16
//     values         [WARPGROUPS][64][64]           non-zero weights; byte b of row r at b ^ (r / 2 % 4) * 16
//     metadata       [WARPGROUPS][METADATA_BYTES]   compact or expanded (metadata.cuh)
//   staging          [WARPGROUPS][2][CHUNK_BYTES]   rows of y on their way out (epilogue.cuh)
//   own_x            [OWN_X_BYTES], then largest magnitudes and scales [TOKENS] each, and an mbarrier (own_x.cuh); stages have no x then
//   full, empty      [STAGES] mbarriers each        (gemm.cu)
//   nibbles          [masks] words                  metadata of every mask (metadata.cuh), with compact metadata
//   parts_full, parts_empty                         mbarriers, with SPLIT_K > 1
//   parts            partial sums (split_k.cuh)     in a buffer of their own up to 32 KiB; larger ones replace the stages
#pragma once
#include "sm90/config.cuh"
#include "sm90/metadata.cuh"
#include "sm90/ptx.cuh"

typedef Metadata<WINDOWS, WIDE> MetadataT;
constexpr int VALUE_BYTES = 4096, METADATA_BYTES = MetadataT::BYTES;  // of one row tile and stage
constexpr u32 VALUES_AT = OWN_X_BYTES ? 0 : TOKENS * 128, METADATA_AT = VALUES_AT + WARPGROUPS * VALUE_BYTES;  // in a stage
constexpr u32 STAGE_BYTES = (METADATA_AT + WARPGROUPS * METADATA_BYTES + 1023) / 1024 * 1024;

// A chunk of tokens goes from accumulators to y at a time. Two buffers a warpgroup, so that one barrier a chunk is enough.
typedef Output<OUT>::Storage Out;
constexpr int CHUNK = EPILOGUE_TOKENS % 32 == 0 && OUT != TYPE_FLOAT32 ? 32 : EPILOGUE_TOKENS % 16 == 0 ? 16 : 8;  // tokens
constexpr int CHUNK_BYTES = CHUNK * 64 * sizeof(Out);
constexpr u32 STAGING_AT = STAGES * STAGE_BYTES, STAGING_BYTES = 2 * CHUNK_BYTES;  // of a warpgroup

constexpr u32 OWN_X_AT = STAGING_AT + WARPGROUPS * STAGING_BYTES, PEAKS_AT = OWN_X_AT + OWN_X_BYTES;
constexpr u32 SCALES_AT = PEAKS_AT + 4 * TOKENS, X_READ_AT = SCALES_AT + 4 * TOKENS;
constexpr u32 OWN_X_END = OWN_X_BYTES ? X_READ_AT + 8 : OWN_X_AT;

constexpr u32 FULL_AT = OWN_X_END, EMPTY_AT = FULL_AT + 8 * STAGES;
constexpr u32 NIBBLES_AT = EMPTY_AT + 8 * STAGES, NIBBLES_END = NIBBLES_AT + 4 * MetadataT::MASKS;

constexpr u32 PARTS_BYTES = 4 * (SPLIT_K - 1) * REDUCER_TOKENS * 64 * WARPGROUPS;
constexpr bool PARTS_OWN_BUFFER = PARTS_BYTES <= 32768;
constexpr u32 PARTS_FULL_AT = (NIBBLES_END + 15) / 16 * 16, PARTS_EMPTY_AT = PARTS_FULL_AT + 8;
constexpr u32 PARTS_AT = PARTS_OWN_BUFFER ? PARTS_EMPTY_AT + 8 : 0;
// Two mbarriers and what aligns them take 32 bytes at most.
constexpr u32 CLUSTER_BYTES = SPLIT_K == 1 ? 0 : 32 + (PARTS_OWN_BUFFER ? PARTS_BYTES : 0);
constexpr u32 USED_BYTES = (NIBBLES_END + CLUSTER_BYTES + 1023) / 1024 * 1024;

static_assert(SPLIT_K == 1 || PARTS_EMPTY_AT + 8 + (PARTS_OWN_BUFFER ? PARTS_BYTES : 0) <= USED_BYTES, "parts are inside");
static_assert(PARTS_OWN_BUFFER || PARTS_BYTES <= STAGING_AT, "parts that replace the stages fit there");
static_assert(USED_BYTES <= 232448, "shared memory of a block: CUDA C++ Programming Guide, \"Compute Capabilities\"");
static_assert(THREADS == CONSUMERS + PRODUCERS && SHARED_BYTES == USED_BYTES, "the host launches what these files describe");

// Shared-window addresses.
struct Smem {
    u32 base;

    INLINE u32 stage(int slot) const { return base + slot * STAGE_BYTES; }
    INLINE u32 own_x() const { return base + OWN_X_AT; }
    INLINE u32 x_read() const { return base + X_READ_AT; }
    INLINE u32 peak(int token) const { return base + PEAKS_AT + 4 * token; }
    INLINE u32 scale(int token) const { return base + SCALES_AT + 4 * token; }
    INLINE u32 full(int slot) const { return base + FULL_AT + 8 * slot; }
    INLINE u32 empty(int slot) const { return base + EMPTY_AT + 8 * slot; }
    INLINE u32 nibbles() const { return base + NIBBLES_AT; }
    INLINE u32 parts_full() const { return base + PARTS_FULL_AT; }
    INLINE u32 parts_empty() const { return base + PARTS_EMPTY_AT; }
    INLINE u32 parts() const { return base + PARTS_AT; }
};
