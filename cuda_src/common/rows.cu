// Rows of x where and as the GEMM wants them: out[row, c] = x[row, source(c)], rounded to another type, zero past k.
// For what is not there already: strides that cp.async cannot read, another type, a pattern that is lifted in memory.
#include "common/convert.cuh"

#ifndef FROM
#define FROM TYPE_FLOAT32
#define TO TYPE_BFLOAT16
#endif
#ifndef THREADS
#define THREADS 256  // of a block
#endif
#ifndef LIFT
#define LIFT 0  // columns of a group, to repeat columns as the windows overlap; 0: as they are
#endif

typedef Element<FROM>::Storage From;
typedef Element<TO>::Storage To;

extern "C" __global__ void __launch_bounds__(THREADS) rows(
    const From* __restrict__ x,  // [M, K] of strides row_step, step
    i64 row_step, i64 step,      // elements
    i64 k,
    To* __restrict__ out,        // [M, columns]
    i64 columns)
{
    const i64 row = blockIdx.x;
    for (i64 c = blockIdx.y * THREADS + threadIdx.x; c < columns; c += gridDim.y * THREADS) {
        i64 source = c;
#if LIFT
        constexpr int WINDOWS = LIFT / 2 - 1;
        source = c / 4 / WINDOWS * LIFT + c / 4 % WINDOWS * 2 + c % 4;
#endif
        out[row * columns + c] = source < k ? convert<FROM, TO>(x[row * row_step + source * step]) : (To)0;
    }
}
