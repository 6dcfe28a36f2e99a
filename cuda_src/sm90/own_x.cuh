// A few tokens, of y's type, quantized and lifted by the blocks that multiply by them: no launch comes before the product.
//
//   x [M, K] --16-byte loads--> largest magnitude of each token, over all columns --> scale
//                          `--> kept: the block's part of k --times the inverse, rounded, gathered--> operand
//
//   operand  [stages of the block][8][M][16]  chunks of four windows in the order of the instructions (arch/operand.py, HALVES), tokens
//                                             side by side. An instruction reads eight tokens; those past M are the bytes that follow,
//                                             and their columns of D are not stored
//   kept     [M][vectors][16]                 x from the vector that holds the block's first column
//
// The bits are those of slidesparse_nb/cuda/kernels/quantize.py. Tiles of a block share the operand; with PAIRS its part of k is all of it.
#pragma once
#include "sm90/smem.cuh"

// The two elements of y's type in a word.
INLINE float low(u32 word) { return OUT == TYPE_BFLOAT16 ? from_bfloat16((u16)word) : from_float16((u16)word); }
INLINE float high(u32 word) { return low(word >> 16); }

// Both, quantized: in the low half, the first lowest.
INLINE u32 quantize_two(u32 word, float inverse) {
    const float a = __fmul_rn(low(word), inverse), b = __fmul_rn(high(word), inverse);
    if (DTYPE == TYPE_INT8) {
        constexpr float ROUND = 12582912;  // 1.5 * 2^23: leaves a whole number, ties to even, in the low bits
        return __byte_perm(__float_as_uint(__fadd_rn(a, ROUND)), __float_as_uint(__fadd_rn(b, ROUND)), 0x0040);
    }
    u16 both;  // PTX ISA, "cvt"
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(b), "f"(a));
    return both;
}

struct OwnX {
    u32 operand, m;  // address in shared memory; tokens, each read by as many warps

    // What an instruction reads of a stage of this block, and how much further the stage's second instruction reads.
    INLINE u64 descriptor(int stage) const { return plain_descriptor(operand + stage * 128 * m, 16 * m); }
    INLINE u64 second() const { return 4 * m; }

    // Makes the operand of stages first ... last - 1, and the scales. By all consumers, after x is complete.
    //   x: [m, k] of y's type, rows `pitch` bytes apart, 16-byte aligned; k: a multiple of 8
    INLINE void make(Smem smem, const u8* x, i64 pitch, int k, int first, int last) const {
        constexpr int GROUP = WINDOWS ? WINDOWS : 1;               // windows of a group, which has a pair of columns more
        constexpr float LARGEST = DTYPE == TYPE_INT8 ? 127 : 448;  // of the type of the operand
        constexpr u32 POSITIONS = 0x76325410, INFINITE = 0x7F800000, NAN = 0x7FC00000;  // HALVES, a nibble a chunk; bits of float32
        const int threads = CONSUMERS / m, token = threadIdx.x / threads, thread = threadIdx.x % threads;
        const int window = first * 32, end = last * 32;
        const int vectors = k / 8, v0 = (window + window / GROUP) / 4, v1 = (end + end / GROUP) / 4 + 1;
        const u32 kept = operand + (last - first) * 128 * m + token * (v1 - v0) * 16;
        const uint4* row = (const uint4*)(x + token * pitch);

        // ---- largest magnitude
        u32 peak = 0;  // of both halves: magnitudes sort like their bits, NaN last
        auto look = [&](auto loads) {  // that a thread has in flight
            constexpr int LOADS = decltype(loads)::value;
#pragma unroll 1
            for (int v = thread; v < vectors; v += LOADS * threads) {
                uint4 held[LOADS];
#pragma unroll
                for (int i = 0; i < LOADS; i++) held[i] = row[min(v + i * threads, vectors - 1)];
#pragma unroll
                for (int i = 0; i < LOADS; i++) {
                    peak = max_u16x2(max_u16x2(peak, held[i].x & 0x7FFF7FFF), held[i].y & 0x7FFF7FFF);
                    peak = max_u16x2(max_u16x2(peak, held[i].z & 0x7FFF7FFF), held[i].w & 0x7FFF7FFF);
                    const int at = v + i * threads;
                    if (at >= v0 && at < min(v1, vectors)) st_shared4(kept + 16 * (at - v0), held[i]);
                }
            }
        };
        if (vectors <= 5 * threads) look(Number<5>());
        else look(Number<10>());
        peak = redux_max(max(peak & 0xFFFF, peak >> 16));
        if (threadIdx.x % 32 == 0) red_max_shared(smem.peak(token), peak), mbarrier_arrive(smem.x_read());
        threads_sync<CONSUMERS>(1 + WARPGROUPS);

        // ---- operand
        const float absmax = low(ld_shared(smem.peak(token)));
        const bool finite = __float_as_uint(absmax) < INFINITE, live = finite && absmax >= 0x1p-100f;  // else zeros
        const float inverse = live ? __fdiv_rn(LARGEST, absmax) : 0;
        if (thread == 0) st_shared(smem.scale(token), live ? __float_as_uint(__fdiv_rn(absmax, LARGEST)) : finite ? 0x3F800000 : NAN);
        const int pairs = live ? k / 2 : 0;  // of columns
#pragma unroll 2
        for (int chunk = thread; chunk < (last - first) * 8; chunk += threads) {
            u32 made[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int w = window + chunk * 4 + i, pair = w + w / GROUP;  // of the window's first two columns
                const u32 from = kept + 4 * (pair - 4 * v0);
                const u32 two = pair < pairs ? ld_shared(from) : 0, more = pair + 1 < pairs ? ld_shared(from + 4) : 0;
                made[i] = __byte_perm(quantize_two(two, inverse), quantize_two(more, inverse), 0x5410);
            }
            const u32 position = chunk / 8 * 8 + (POSITIONS >> 4 * (chunk % 8) & 7);
            st_shared4(operand + (position * m + token) * 16, uint4{made[0], made[1], made[2], made[3]});
        }
        fence_proxy_async();
        threads_sync<CONSUMERS>(1 + WARPGROUPS);
    }
};
