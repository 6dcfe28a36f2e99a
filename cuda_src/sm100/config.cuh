// What the host chooses (arch/sm100.py, arch/sm100_layout.py), and what follows from it. The defaults let gemm.cu compile alone.
#pragma once
#include "common/types.cuh"

#ifndef DTYPE
#define DTYPE TYPE_FLOAT8  // of weights and activations
#endif
#ifndef OUT
#define OUT TYPE_BFLOAT16
#endif
#ifndef TOKENS
#define TOKENS 256  // of a tile
#define STAGES 8    // slots of the ring
#endif
#ifndef THREADS
#define THREADS 192  // of a block
#endif
#ifndef SHARED_BYTES
#define SHARED_BYTES USED_BYTES  // dynamic
#endif

constexpr bool WIDE = DTYPE == TYPE_BFLOAT16 || DTYPE == TYPE_FLOAT16;
constexpr int BLOCKS = WIDE ? 2 : 1;         // of 128 bytes of expanded k, in a k-tile of 128 expanded columns
constexpr int INSTRUCTIONS = 2 * BLOCKS;     // along k in a k-tile, 64 bytes of expanded k each
constexpr int ROWS = 128, PAIR_TOKENS = TOKENS / 2;  // outputs of a block; tokens that a block of the pair loads
constexpr int VALUE_BYTES = ROWS * 64, METADATA_BYTES = ROWS * 16, WEIGHT_BYTES = BLOCKS * VALUE_BYTES + METADATA_BYTES;
constexpr int BLOCK_BYTES = PAIR_TOKENS * 128;  // of activations

constexpr int EPILOGUE_WARPS = 4, PRODUCER_WARP = 4, MMA_WARP = 5;
static_assert(THREADS == 32 * (EPILOGUE_WARPS + 2), "the host launches what these files describe");
static_assert(TOKENS % 32 == 0 && TOKENS <= 256, "PTX ISA, \"Matrix Shape\": cta_group::2, kind i8");

#if DTYPE == TYPE_INT8
#define KIND "i8"
INLINE float as_float(u32 v) { return __int2float_rn((int)v); }
#else
#if DTYPE == TYPE_FLOAT8
#define KIND "f8f6f4"
#else
#define KIND "f16"
#endif
INLINE float as_float(u32 v) { return __uint_as_float(v); }
#endif
typedef Output<OUT>::Storage Out;
