// Expanded metadata of a whole weight from compact: what a product reads that does not decode while it multiplies. Reference:
// arch/sm90_layout.py, expand.
#include "sm90/metadata.cuh"

#ifndef DTYPE
#define DTYPE TYPE_FLOAT8  // of weights
#endif
#ifndef WINDOWS
#define WINDOWS 3  // of a group
#endif
#ifndef THREADS
#define THREADS 256  // of a block
#endif
#ifndef ROW_TILES
#define ROW_TILES 8  // of a stage, that a block expands
#endif

constexpr bool WIDE = DTYPE == TYPE_BFLOAT16 || DTYPE == TYPE_FLOAT16;
typedef Metadata<WINDOWS, WIDE> Compact;
constexpr int COMPACT_WORDS = Compact::BYTES / 4, EXPANDED_WORDS = 2 * COMPACT_WORDS;  // of a row tile and stage
constexpr int STEP = THREADS / 128, EACH = ROW_TILES / STEP;  // row tiles at a time; that a thread takes part in
static_assert(THREADS % 128 == 0 && ROW_TILES % STEP == 0, "128 threads expand a row tile, as they would read it");

extern "C" __global__ void __launch_bounds__(THREADS) expand(
    const u32* __restrict__ compact,  // [stages, row tiles, COMPACT_WORDS]; row tiles: ceil(N / 128) * 2
    u32* __restrict__ expanded,       // [stages, row tiles, EXPANDED_WORDS]
    i64 n)
{
    __shared__ u32 nibbles[Compact::MASKS];
    const u32 table = shared_address(nibbles);
    Compact::fill(table, threadIdx.x, THREADS);
    __syncthreads();

    const int thread = threadIdx.x % 128, row_tiles = (int)((n + 127) / 128 * 2), blocks = (row_tiles + ROW_TILES - 1) / ROW_TILES;
    const int stage = blockIdx.x / blocks, first = blockIdx.x % blocks * ROW_TILES + threadIdx.x / 128;
    Compact metadata(table, 0, thread);
    metadata.start(stage);
    u32 word[EACH][2];  // this thread's, and for 16-bit types that of 8 rows below
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int row_tile = min(first + i * STEP, row_tiles - 1);
        const u32* mine = compact + ((i64)stage * row_tiles + row_tile) * COMPACT_WORDS + metadata.mine / 4;
        word[i][0] = mine[0];
        if (WIDE) word[i][1] = mine[8];
    }
    griddepcontrol_wait();  // kernels before may still read what is overwritten here
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        if (first + i * STEP >= row_tiles) break;
        u32 e[2];
        metadata.decode(word[i][0], [&] { return word[i][1]; }, e);
        u32* to = expanded + ((i64)stage * row_tiles + first + i * STEP) * EXPANDED_WORDS;
        if (WIDE) to[thread] = e[0];
        else ((uint2*)to)[thread] = uint2{e[0], e[1]};
    }
}
