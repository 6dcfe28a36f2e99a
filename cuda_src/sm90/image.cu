// Activations as the sm_90 GEMM's shared memory wants them: slid, in stages of 128 bytes, swizzled (arch/sm90.py, `image`).
//
//   image[stage][token / 8][token % 8][128 bytes]    byte b of a token's stage at b ^ token % 8 * 16
//
// A thread makes 16 bytes: four windows of an 8-bit type, two of a 16-bit type. 64 threads make 8 tokens of a stage, one KiB.
#include "common/convert.cuh"

#ifndef FROM
#define FROM TYPE_BFLOAT16  // of x
#define TO TYPE_BFLOAT16    // of the image
#define GROUP 8             // L of the pattern
#endif

typedef Element<FROM>::Storage From;
typedef Element<TO>::Storage To;

constexpr int WINDOWS = GROUP / 2 - 1, HELD = 16 / (4 * sizeof(To));  // windows a group, and in 16 bytes
// Two neighbouring elements at once, where a row's address allows it.
struct alignas(2 * sizeof(From)) Pair {
    From low, high;
};

extern "C" __global__ void __launch_bounds__(256) image(
    const From* __restrict__ x,  // [M, K] of strides row_step, step
    i64 row_step, i64 step,      // elements
    i64 m_, i64 k_, i64 stages_,
    uint4* __restrict__ out)     // [stages, ceil(M / 8), 8, 8] pieces
{
#if __CUDA_ARCH__ >= 900  // what x is written by may not be complete when this starts
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
    const int m = (int)m_, k = (int)k_, stages = (int)stages_;
    const int groups = (m + 7) / 8, piece = threadIdx.x % 8, token = threadIdx.x / 8 % 8;
    const int group = blockIdx.x, row = 8 * group + token;
    const From* from = x + row * row_step;
    const bool pairs = step == 1 && ((u64)x | (u64)(row_step * sizeof(From))) % sizeof(Pair) == 0;
    for (int stage = blockIdx.y * 4 + threadIdx.x / 64; stage < stages; stage += gridDim.y * 4) {
        alignas(16) To slid[16 / sizeof(To)];
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int window = (8 * stage + piece) * HELD + i, column = window / WINDOWS * GROUP + window % WINDOWS * 2;
#pragma unroll
            for (int c = 0; c < 4; c += 2) {
                To low = 0, high = 0;
                if (row < m && column + c + 1 < k && pairs) {
                    const Pair both = *(const Pair*)(from + column + c);
                    low = convert<FROM, TO>(both.low), high = convert<FROM, TO>(both.high);
                } else if (row < m) {
                    if (column + c < k) low = convert<FROM, TO>(from[(column + c) * step]);
                    if (column + c + 1 < k) high = convert<FROM, TO>(from[(column + c + 1) * step]);
                }
                slid[4 * i + c] = low, slid[4 * i + c + 1] = high;
            }
        }
        out[((i64)stage * groups + group) * 64 + token * 8 + (piece ^ token)] = *(const uint4*)slid;
    }
}
