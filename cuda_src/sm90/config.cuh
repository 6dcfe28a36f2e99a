// What the host chooses (arch/sm90_launch.py), and what follows from it. The defaults let gemm.cu compile alone.
#pragma once
#include "common/types.cuh"

#ifndef DTYPE
#define DTYPE TYPE_FLOAT8  // of weights and activations
#endif
#ifndef OUT
#define OUT TYPE_BFLOAT16
#endif
#ifndef TOKENS
#define TOKENS 256    // of a tile
#define WARPGROUPS 2  // consumers; each multiplies a row tile of 64 outputs
#define STAGES 4      // of the ring
#endif
#ifndef WINDOWS
#define WINDOWS 0  // of a group, of a pattern whose metadata is read in compact form; 0: expanded metadata
#endif
#ifndef SPLIT_K
#define SPLIT_K 1  // blocks of a cluster, which share the k of one tile
#endif
#ifndef PAIRS
#define PAIRS 0  // clusters of two: a block takes whole tiles while every block has one, then each cluster shares one of the others. The
                 // host gives every block one at least, each cluster one of the others at most, and a tile all tokens
#endif
#ifndef BLOCKS_PER_SM
#define BLOCKS_PER_SM 1  // resident at once, of this kernel or of this one and the next
#endif
#ifndef STAGES_PER_STEP
#define STAGES_PER_STEP (TOKENS > 32 ? 1 : 2)  // multiplied between two waits: small instructions are bound by latency
#endif
#ifndef OWN_X_BYTES
#define OWN_X_BYTES 0  // of shared memory, for a few tokens of y's type that a block quantizes itself (own_x.cuh); 0: x is an operand
#endif
#ifndef THREADS
#define THREADS (CONSUMERS + PRODUCERS)  // of a block
#endif
#ifndef SHARED_BYTES
#define SHARED_BYTES USED_BYTES  // dynamic
#endif

constexpr bool WIDE = DTYPE == TYPE_BFLOAT16 || DTYPE == TYPE_FLOAT16;

// Three warpgroups and more than 192 tokens leave no registers for a producer: consumers load their stages themselves.
constexpr bool CONSUMERS_LOAD = WARPGROUPS == 3 && TOKENS > 192;
// Accumulators that need more than an equal share of the 65536 registers take them from the producer by setmaxnreg; the producer is then
// a whole warpgroup. ptxas keeps instructions to the equal share, 128 with four warpgroups, which 192 tokens fit and 208 do not.
constexpr bool REBALANCE_REGISTERS = !CONSUMERS_LOAD && (TOKENS > 128 || (WARPGROUPS == 3 && TOKENS > 64));
constexpr int PRODUCER_REGISTERS = WARPGROUPS == 3 ? 32 : 40, CONSUMER_REGISTERS = WARPGROUPS == 3 ? 160 : 232;
constexpr int CONSUMERS = 128 * WARPGROUPS, PRODUCERS = CONSUMERS_LOAD ? 0 : REBALANCE_REGISTERS ? 128 : 32;  // threads

// Whether the first instruction of a tile computes D = A * B; otherwise D starts as zeros. With small accumulators, and before CUDA 12.9,
// ptxas would make every instruction wait for the one before.
constexpr bool FIRST_MMA_OVERWRITES = TOKENS > 64 && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1209;
// Sets of sums that the stages of a step go to in turn, so that small instructions need not wait for each other.
constexpr int ACCUMULATORS = STAGES_PER_STEP;

// Whether L2 evicts activations last. Every rasterization group reads them again, between weights and y, which stream through. Tiles of
// 192 outputs gained nothing (docs/notes/hopper-attempts.md).
constexpr bool ACTIVATIONS_EVICT_LAST = TOKENS == 256 && !CONSUMERS_LOAD;
// Whatever a kernel requests from memory delays all later requests, even those that L2 serves. So the next kernel starts when this one has
// RELEASE_AT stages left to request, and a kernel prefetches PREFETCH stages of weights until the kernels before it are complete.
constexpr int RELEASE_AT = 4, PREFETCH = TOKENS > 64 ? 4 : WARPGROUPS == 1 ? 9 : 6;

// The first REDUCERS blocks of a cluster, a power of two, add up partial sums and write y: REDUCER_TOKENS tokens each, whole groups of 8.
constexpr int LARGEST_POWER = SPLIT_K >= 4 ? 4 : SPLIT_K >= 2 ? 2 : 1, DIVIDES_GROUPS = TOKENS / 8 & -(TOKENS / 8);
constexpr int REDUCERS = LARGEST_POWER < DIVIDES_GROUPS ? LARGEST_POWER : DIVIDES_GROUPS, REDUCER_TOKENS = TOKENS / REDUCERS;
constexpr bool REDUCE_IN_HALVES = SPLIT_K > 1 && REDUCER_TOKENS > 64 && REDUCER_TOKENS % 16 == 0;

constexpr bool LOW_REGISTER_EPILOGUE = CONSUMERS_LOAD && TOKENS == 256;
constexpr bool FLOAT32_SPILLS = WARPGROUPS > 3 && TOKENS > 64 && OUT == TYPE_FLOAT32;  // up to 48 bytes, if all are written at a time
constexpr int EPILOGUE_TOKENS =  // written at a time
    LOW_REGISTER_EPILOGUE ? 64 : FLOAT32_SPILLS ? 32 : REDUCE_IN_HALVES ? REDUCER_TOKENS / 2 : REDUCER_TOKENS;

static_assert(REDUCER_TOKENS * REDUCERS == TOKENS && REDUCER_TOKENS % EPILOGUE_TOKENS == 0 && EPILOGUE_TOKENS % 8 == 0,
              "the epilogue takes whole groups of 8 tokens");
static_assert(!OWN_X_BYTES || (TOKENS == 8 && WINDOWS && !WIDE && OUT != TYPE_FLOAT32), "blocks quantize 16-bit x to 8 bits");
static_assert(STAGES > 2 * STAGES_PER_STEP, "the producer must have a slot to fill");
static_assert(!PAIRS || SPLIT_K == 2, "a pair is a cluster of two");
static_assert(!CONSUMERS_LOAD || (SPLIT_K == 1 && STAGES_PER_STEP == 1 && TOKENS > 64), "consumers load whole tiles, a stage a step");

#if DTYPE == TYPE_INT8
typedef int Accumulator;
INLINE float as_float(int v) { return __int2float_rn(v); }
INLINE u32 as_bits(int v) { return (u32)v; }
INLINE int from_bits(u32 v) { return (int)v; }
#else
typedef float Accumulator;
INLINE float as_float(float v) { return v; }
INLINE u32 as_bits(float v) { return __float_as_uint(v); }
INLINE float from_bits(u32 v) { return __uint_as_float(v); }
#endif
